from __future__ import annotations

import pytest

from spiralrope_cli.core.config.models import DEIT_SIZES, RopeConfig
from spiralrope_cli.core.errors import ConfigError, FetchError
from spiralrope_cli.core.hub.catalog import (
    INCEPTION_VARIABLE,
    ROWS,
    WEIGHTS_REPO,
    find_row,
    hub_row,
    listed_file,
)


def test_every_row_says_where_it_comes_from():
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert bool(row.repo) != bool(row.url)
        assert row.kind in ("deit", "dit", "vae", "inception", "reference", "data")
        assert row.what
        if row.rope is not None:
            RopeConfig(**row.rope)
        if row.kind == "deit":
            assert row.arch in DEIT_SIZES


def test_the_step_is_the_true_one_and_not_that_of_the_file_name():
    best = find_row("dit-xl2@7m")
    assert best.file_name == "0700000.pth"
    assert best.steps == 7_000_000
    assert best.rope == {"rotate": 4, "max_freq_lang": 1.5, "same_theta": False}
    assert find_row("dit-xl2@400k").steps == 400_000
    assert find_row("dit-xl2@400k").arch == best.arch == "dit-xl2"


def test_the_best_one_needs_no_suffix():
    assert find_row("dit-xl2") is find_row("dit-xl2@7m")
    assert find_row(" DiT-XL2 ") is find_row("dit-xl2@7m")


@pytest.mark.parametrize(
    ("name", "guess"),
    [("deit-x", "deit-s"), ("dit-xl2@7k", "dit-xl2@7m"), ("incepton", "inception")],
)
def test_a_wrong_name_brings_the_nearest(name, guess):
    with pytest.raises(
        ConfigError, match=f"{name} is not a published name(.|\n)*did you mean {guess}"
    ):
        find_row(name)
    with pytest.raises(ConfigError) as far:
        find_row("zzzzzzzz")
    assert "did you mean" not in str(far.value)


def test_vaes_bring_what_diffusers_reads():
    assert find_row("vae-ema").repo == "stabilityai/sd-vae-ft-ema"
    assert find_row("vae-mse").repo == "stabilityai/sd-vae-ft-mse"
    assert set(find_row("vae-mse").files) == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_mirror_takes_the_place_of_the_published_address(monkeypatch):
    assert find_row("inception").source_url.startswith("https://github.com/toshas/torch-fidelity/")
    monkeypatch.setenv(INCEPTION_VARIABLE, "https://mirror.example/i.pth")
    assert find_row("inception").source_url == "https://mirror.example/i.pth"
    assert "512/VIRTUAL_imagenet512.npz" in find_row("imagenet512-ref").source_url


# --- hf:OWNER/NAME[/FILE][@REVISION]
@pytest.mark.parametrize(
    ("given", "repo", "file", "revision"),
    [
        ("hf:me/vit", "me/vit", "", None),
        ("hf:me/vit/", "me/vit", "", None),
        ("hf:me/vit@v1.0", "me/vit", "", "v1.0"),
        ("hf:me/vit/a/b.pth", "me/vit", "a/b.pth", None),
        ("hf:me/vit/a@refs/pr/1", "me/vit", "a", "refs/pr/1"),
    ],
)
def test_places_on_the_hub_are_understood(given, repo, file, revision):
    row = find_row(given)
    assert (row.name, row.repo, row.file, row.revision) == (given, repo, file, revision)
    assert row.listed


@pytest.mark.parametrize("given", ["hf:", "hf:me", "hf:/me", "hf:me/", "hf:me/vit@", "hf:m e/vit"])
def test_other_places_are_refused_with_the_form(given):
    with pytest.raises(ConfigError, match="is not hf:OWNER/NAME"):
        find_row(given)


def test_published_files_keep_what_the_catalogue_knows_of_them():
    row = find_row(f"hf:{WEIGHTS_REPO}/dit_xl2/0700000.pth@abc")
    assert (row.rope, row.steps) == (find_row("dit-xl2").rope, 7_000_000)
    assert row.revision == "abc"
    assert row.folder_name == "haoyuliu00-Spiral_RoPE-dit_xl2-0700000.pth-abc"


PIPELINE = [
    *("model_index.json", "transformer/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
]


@pytest.mark.parametrize(
    ("given", "names", "file"),
    [
        ("hf:me/a", ["x.bin", "model.safetensors"], "model.safetensors"),
        ("hf:me/a", ["README.md", "runs/x.pth"], "runs/x.pth"),
        ("hf:me/a/runs", ["x.pth", "runs/y.pth"], "runs/y.pth"),
        ("hf:me/a/runs", ["runs/model.safetensors", "runs/y.pth"], "runs/model.safetensors"),
        ("hf:me/a/x.pth", ["x.pth", "model.safetensors"], "x.pth"),
        ("hf:me/a", PIPELINE, "transformer/diffusion_pytorch_model.safetensors"),
    ],
)
def test_the_file_is_found_where_there_is_no_doubt(given, names, file):
    assert listed_file(find_row(given), names).file == file


def test_the_vae_of_a_pipeline_comes_with_its_config():
    row = listed_file(hub_row("hf:me/a", "vae"), PIPELINE)
    assert row.files == ("vae/config.json", "vae/diffusion_pytorch_model.safetensors")


def test_many_files_are_not_all_named():
    with pytest.raises(FetchError, match="several files") as refused:
        listed_file(find_row("hf:me/a"), [f"{number}.pth" for number in range(9)])
    assert str(refused.value).endswith("5.pth and 3 more")
    with pytest.raises(FetchError, match="me/a has no weights") as refused:
        listed_file(find_row("hf:me/a"), ["README.md"])
    assert refused.value.hint == "it has README.md"
