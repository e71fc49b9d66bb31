from __future__ import annotations

import pytest
import yaml

from spiralrope_cli.core.config.option import to_nested
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.run_folder import read_config


@pytest.mark.parametrize("command", ["pretrain", "dit-train"])
def test_a_kind_of_rope_sets_rotate_and_names_the_folder(runs, command):
    for kind in ("axial", "mixed"):
        resolved = resolve(command, {"rope_kind": kind})
        assert (resolved.run.rope.rope_kind, resolved.run.rope.rotate) == (kind, 0)
        assert resolved.run.out.endswith(f"-digits-{kind}")
        assert resolve(command, {"rope_kind": kind, "rotate": 0}).run == resolved.run
        with pytest.raises(ConfigError, match=f"--rotate 2 does not fit --rope-kind {kind}"):
            resolve(command, {"rope_kind": kind, "rotate": 2})
    notes = resolve(command, {"rope_kind": "mixed", "theta": 100.0}).warnings
    assert "--theta has no effect: --rope-kind is mixed" in notes


def test_the_kind_of_a_config_file_and_that_of_an_option(runs):
    for kind in ("axial", "mixed"):
        run = resolve("pretrain", {"rope_kind": kind}).run
        (runs / "config.yaml").write_text(yaml.safe_dump(to_nested(run)))
        again = resolve("pretrain", {}, config_file="config.yaml").run
        assert again == run
        spiral = resolve("pretrain", {"rope_kind": "spiral"}, config_file="config.yaml").run
        assert (spiral.rope.rope_kind, spiral.rope.rotate) == ("spiral", 2)
        with pytest.raises(ConfigError, match="--rotate 4 does not fit"):
            resolve("pretrain", {"rotate": 4}, config_file="config.yaml")
    (runs / "config.yaml").write_text("rope: {rope_kind: mixed, rotate: 4}")
    with pytest.raises(ConfigError, match="--rotate 4 does not fit"):
        resolve("pretrain", {}, config_file="config.yaml")


def test_a_config_of_an_earlier_version_is_read(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("optim: {steps: 7}\naugment: {max_shift: 0.5, max_rotation: 3}\n")
    assert read_config(file) == {"max_steps": 7, "translate": 0.5, "degrees": 3.0}


@pytest.mark.parametrize("optim", ["{steps: 7, max_steps: 8}", "{max_steps: 8, steps: 7}"])
def test_a_value_under_its_old_name_and_its_new_one_is_refused(tmp_path, optim):
    file = tmp_path / "config.yaml"
    file.write_text(f"optim: {optim}\n")
    with pytest.raises(ConfigError, match="'steps' and 'max_steps' are one"):
        read_config(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rope: " + "[" * 20_000, "is not YAML: it is nested too deeply"),
        ("&a {rope: *a}", "config key 'rope' is unknown"),
        ("&a {x: *a}", "/config.yaml: config key 'x' is unknown"),
        ("rope: {rotate: &a [*a]}", r"--rotate is \[\[\["),
        ("rope: {rotate: 2.5}", "/config.yaml: --rotate is 2.5"),
        ("optim: {lr: a, epochs: b}", "/config.yaml: --lr is a.*\n.*/config.yaml: --epochs is b"),
        ("rope: {rotate: .inf}", "--rotate is inf"),
        (f"rope: {{rotate: {'1' * 60}}}", "--rotate is 1111"),
        (f"rope: {{rotate: {'1' * 6000}}}", "is not YAML"),
        ("rope: {rotate: 2", "is not YAML: line 1: expected ',' or '}'"),
        ("arch: deit-s\n\trope: 2", "is not YAML: line 2: found character"),
        ("- rope", "is not a config of a run"),
        ("rope: {rotate: 2, rotate: 4}", "has the key 'rotate' twice"),
        ("rope: {rotate: 2}\nmodel: {}\nrope: {theta: 3}", "has the key 'rope' twice"),
        ("optim: {betas: [{a: 1, a: 2}]}", "has the key 'a' twice"),
        ("\0", "is not YAML"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path, text, told):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told) as refused:
        read_config(file)
    assert len(refused.value.message) < 500
    file.write_bytes(b"rope: \xff\xfe")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_config(file)


def test_a_whole_number_may_be_written_with_a_point(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("rope: {rotate: 2.0}")
    assert repr(read_config(file)) == "{'rotate': 2}"
