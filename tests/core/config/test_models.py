from __future__ import annotations

import pytest

from spiralrope_cli.core.config.models import DIT_SIZES, arch_name, dit_size, is_dit
from spiralrope_cli.core.errors import ConfigError


@pytest.mark.parametrize("name", DIT_SIZES)
def test_every_dit_is_known_by_the_papers_name_too(name):
    size = name.removeprefix("dit-")
    paper = f"DiT-{size[:-1].capitalize() if size[0] == 't' else size[:-1].upper()}/{size[-1]}"
    assert arch_name(paper) == arch_name(name) == name
    assert dit_size(paper).patch_size == int(size[-1])
    assert is_dit(paper)
    assert is_dit(name)


def test_head_sizes_are_the_published_ones():
    assert {name: size.head_dim for name, size in DIT_SIZES.items()} == {
        name: 72 if "xl" in name else 64 for name in DIT_SIZES
    }


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("DiT-XL/3", "dit-xl"), ("dit_b4", "dit-b4"), ("dit-b16", "dit-b")]
)
def test_an_unknown_dit_suggests_the_nearest(wrong, nearest):
    with pytest.raises(ConfigError) as caught:
        dit_size(wrong)
    assert wrong in caught.value.message
    assert f"did you mean {nearest}" in caught.value.hint


@pytest.mark.parametrize("numbers", ["32x1x0", "0x1x1", "32x1x3", "32x100000000x1"])
def test_sizes_that_no_network_has_are_refused_before_it_is_built(numbers):
    with pytest.raises(ConfigError, match=f"--arch dit-{numbers}-2: .* are not possible"):
        dit_size(f"dit-{numbers}-2")


def test_a_deit_is_no_dit():
    assert not is_dit("deit-s")
    with pytest.raises(ConfigError, match="--arch deit-s is a DeiT"):
        dit_size("deit-s")
