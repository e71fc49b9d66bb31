"""Weights go round: out of runs and files, through both layouts, and back."""

from __future__ import annotations

import hashlib
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, pushes_a_card
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from typer.testing import CliRunner

from spiralrope_cli import RopeConfig, create_model, load_model, main
from spiralrope_cli.core.errors import CheckpointError, ConfigError, DiskError, FetchError
from spiralrope_cli.core.hub.catalog import WEIGHTS_REPO, find_row
from spiralrope_cli.core.hub.published import read_published
from spiralrope_cli.core.storage import read_safetensors

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
DEIT, DIT, BARE = "deit_tiny_checkpoint.pth", "dit_tiny_0000007.pt", "dit_tiny_raw.pth"


@pytest.fixture
def export(runs):
    """`spiralrope export ...` in this process; gives the path that it printed, and stderr."""

    def call(*words):
        done = CliRunner().invoke(main.app, ["export", *map(str, words)])
        if done.exception is not None:
            raise done.exception
        return runs / done.stdout.strip(), done.stderr

    return call


def make_run(folder, arch="deit-32x2x2", rope=None, **sizes):
    """What a finished run left: two checkpoints of random weights, the first the best one."""
    rope = rope or RopeConfig(rotate=4)
    model = {"num_classes": 5, **sizes}
    if arch.startswith("deit"):
        model = {"image_size": [16, 16], "patch_size": 4, "in_chans": 1, **model}
    config = {
        "command": "pretrain" if arch.startswith("deit") else "dit-train",
        "arch": arch,
        "data": "digits",
        "num_train": 64,
        "rope": vars(rope),
        "model": model,
        "optim": {"batch_size": 16},
    }
    pairs = {n: tuple(v) if isinstance(v, list) else v for n, v in model.items()}
    torch.manual_seed(0)
    for step in (4, 8):
        place = folder / "checkpoints" / f"{step:07d}"
        place.mkdir(parents=True)
        for kind in ("model", "ema"):
            network = create_model(arch, rope=rope, **pairs)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            metadata = {"config": json.dumps(config), "step": str(step), "weights": kind}
            save_model(network, str(place / f"{kind}.safetensors"), metadata)
    (folder / "checkpoints" / "best.json").write_text('{"step": 4}')
    return folder


def outputs(source, ema=False, **more):
    model = load_model(source, ema=ema, **more)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if hasattr(model, "x_embedder"):
            x = torch.randn(2, model.in_chans, *model.input_size, generator=noise)
            return model(x, torch.tensor([7, 900]), torch.tensor([1, 2]))
        channels = model.patch_embed.proj.in_channels
        return model(torch.randn(2, channels, *model.image_size, generator=noise))


def same(first, second):
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        if name.endswith("freqs"):
            torch.testing.assert_close(value, second[name], rtol=1e-6, atol=0)
        else:
            assert torch.equal(value, second[name]), name


def test_learned_frequencies_go_round_as_safetensors_alone(export, runs):
    make_run(runs / "run", rope=RopeConfig(rope_kind="mixed"))
    path, _ = export(runs / "run", "--layout", "safetensors", "--ema")
    assert torch.equal(outputs(path), outputs(runs / "run", ema=True))
    assert load_model(path).rope.config.rope_kind == "mixed"
    assert "mixed" in (path / "README.md").read_text()
    with pytest.raises(ConfigError, match="no place for the learned frequencies") as refused:
        export(runs / "run", "--layout", "published")
    assert refused.value.hint == "use --layout safetensors"


def test_axial_of_our_own_is_rotate_0_in_the_published_layout(export, runs):
    make_run(runs / "run", rope=RopeConfig(rope_kind="axial"))
    path, _ = export(runs / "run", "--layout", "published")
    args = torch.load(path, weights_only=True)["args"]
    assert args["rotate"] == 0
    assert not any("kind" in name for name in args)
    assert torch.equal(outputs(path), outputs(runs / "run"))


# ---- the published layout


@pytest.mark.parametrize(("name", "ema_key"), [(DEIT, "model_ema"), (DIT, "ema")])
def test_code_for_published_files_finds_what_it_expects(export, name, ema_key):
    """Names, order, shapes, dtypes and frequencies are those of the golden file itself."""
    path, _ = export(GOLDEN / name, "--layout", "published")
    golden, ours = read_published(GOLDEN / name), torch.load(path, weights_only=True)
    assert list(ours)[:2] == ["model", ema_key]
    assert type(ours["args"]) is dict
    same(golden.raw, ours["model"])
    same(golden.ema, ours[ema_key])
    for option, value in ours["args"].items():
        if option in golden.args and option not in ("model", "image_size"):
            assert golden.args[option] == value
    assert ours.get("epoch") == (17 if name == DEIT else None)


@pytest.mark.parametrize("name", [DEIT, DIT])
@pytest.mark.parametrize("ema", [False, True])
def test_a_round_trip_changes_no_bit(export, name, ema):
    word = "--ema" if ema else "--no-ema"
    folder, _ = export(GOLDEN / name, "--layout", "safetensors", word)
    back, _ = export(folder, "--layout", "published", "--out", "back.pth")
    golden, ours = read_published(GOLDEN / name), read_published(back)
    same(golden.ema if ema else golden.raw, ours.raw)
    assert not ours.has_both
    assert torch.equal(outputs(GOLDEN / name, ema), outputs(back))
    assert torch.equal(outputs(GOLDEN / name, ema), outputs(folder))


@pytest.mark.parametrize(
    ("arch", "rope", "sizes"),
    [
        ("deit-32x2x2", {"rotate": 2, "same_theta": True}, {}),
        ("deit-32x2x2", {"theta": 100.0, "truncate_percentage": 0.5, "min_freq_lang": 0.0}, {}),
        ("deit-32x2x2", {"freqs_for": "pixel", "max_freq": 5.0}, {}),
        ("deit-32x2x2", {"projection": "exact"}, {"image_size": [8, 16], "pretrain_grid": [3, 5]}),
        ("deit-32x2x2", {"enabled": False}, {}),
        ("dit-32x2x2-2", {"rotate": 4, "max_freq_lang": 1.0}, {"input_size": [8, 4]}),
        ("dit-32x2x2-2", {"scaling": "extrapolate"}, {"qk_norm": True, "input_size": 8}),
        ("dit-32x2x2-2", {"enabled": False}, {"input_size": [4, 8]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["published", "safetensors"])
def test_what_was_exported_computes_what_the_run_does(export, runs, arch, rope, sizes, layout):
    run = make_run(runs / "run", arch, RopeConfig(**rope), **sizes)
    path, _ = export(run, "--layout", layout)
    assert torch.equal(outputs(run), outputs(path))
    here, there = load_model(run), load_model(path)
    if here.rope is not None:
        assert here.rope.config == there.rope.config
        assert here.rope.pretrain_grid == there.rope.pretrain_grid
    if layout == "published":
        assert torch.equal(outputs(run, ema=True), outputs(path, ema=True))
        assert not torch.equal(outputs(path), outputs(path, ema=True))


def test_one_set_alone_is_found_under_both_names_and_is_what_it_is_called(export, runs):
    run = make_run(runs / "run")
    path, said = export(run, "--layout", "published", "--ema")
    assert path.name == "run-0000008-ema.pth"
    assert "averaged (EMA) weights" in said
    content = torch.load(path, weights_only=True)
    same(content["model"], content["model_ema"])
    both, _ = export(run, "--layout", "published")
    assert path.stat().st_size < 0.6 * both.stat().st_size
    assert torch.equal(outputs(path), outputs(run, ema=True))
    raw, _ = export(run, "--layout", "safetensors", "--out", "raw")
    with pytest.warns(UserWarning, match="holds only raw weights"):
        assert torch.equal(outputs(raw, ema=True), outputs(run))


def test_epochs_and_steps_are_told(export, runs):
    path, said = export(make_run(runs / "run"), "--layout", "published", "--best")
    content = torch.load(path, weights_only=True)
    assert (content["step"], content["epoch"]) == (4, 0)
    assert "step 4" in said
    _, said = export(path, "--layout", "safetensors")
    assert "step 4" in said


@pytest.mark.parametrize(
    ("arch", "rope", "sizes", "note"),
    [
        ("deit-32x2x2", {"projection": "exact"}, {}, "not exact"),
        (
            "deit-32x2x2",
            {},
            {"pretrain_grid": [2, 2]},
            "takes 4x4 patches as",
        ),
        ("deit-32x2x2", {}, {"image_size": [8, 16]}, "supports square grids only, not 2x4"),
        ("dit-32x2x2-2", {}, {"qk_norm": True}, "no QK norm"),
        ("deit-32x2x2", {"scaling": "extrapolate"}, {"pretrain_grid": [2, 2]}, ""),
        ("deit-32x2x2", {"rotate": 1, "projection": "exact"}, {}, ""),
    ],
)
def test_what_the_published_code_would_compute_otherwise_is_noted(
    export, runs, arch, rope, sizes, note
):
    run = make_run(runs / "run", arch, RopeConfig(**rope), **sizes)
    _, said = export(run, "--layout", "published")
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(note)
    assert not note or note in notes[0]


def test_a_bare_state_dict_gets_the_options_that_it_lacks(export):
    with pytest.raises(ConfigError, match="does not contain its RoPE options"):
        export(GOLDEN / BARE, "--layout", "published")
    path, _ = export(GOLDEN / BARE, "--layout", "published", "--rotate", 2)
    rope = RopeConfig(rotate=2, scaling="extrapolate")
    assert torch.equal(outputs(path), outputs(GOLDEN / BARE, rope=rope))


def test_weights_that_are_not_whole_are_refused(export, runs):
    content = torch.load(export(GOLDEN / DEIT, "--layout", "published")[0], weights_only=True)
    del content["model"]["norm.scale"]
    torch.save(content, runs / "less.pth")
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.scale\)"):
        export(runs / "less.pth", "--layout", "safetensors")


# ---- safetensors and the card


def test_the_folder_has_all_that_a_stranger_needs(export, runs):
    run = make_run(runs / "run")
    weights = run / "checkpoints" / "0000008" / "ema.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    row = {
        **{"weights": "EMA", "sha256": digest, "data": "digits", "image_size": [16, 16]},
        **{"crop_ratio": 1.0, "acc1": 93.25, "acc5": 99.5, "loss": 0.25, "count": 360},
    }
    stale = {**row, "sha256": "0" * 64, "acc1": 11.0}
    raw = {**row, "weights": "raw", "acc1": 22.0}
    (run / "eval.json").write_text(json.dumps({"rows": [row, stale, raw]}))
    folder, _ = export(run, "--layout", "safetensors", "--ema")
    assert folder.name == "run-0000008-ema"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["digits"]
    assert card.data.pipeline_tag == "image-classification"
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {
        "acc@1, 16 px, crop 1.0": 93.25,
        "acc@5, 16 px, crop 1.0": 99.5,
    }
    assert "| digits | 16 | 1.0 | 93.25 | 99.50 | 0.2500 | 360 |" in card.text
    assert "| rotate | 4 |" in card.text
    assert "load_model(" in card.text
    assert str(runs) not in card.content
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["weights"], metadata["step"]) == ("ema", "8")
    assert json.loads(metadata["config"])["data"] == "digits"
    described = json.loads((folder / "config.json").read_text())
    assert described["arch"] == "deit-32x2x2"
    assert described["rope"]["rotate"] == 4
    assert torch.equal(outputs(folder), outputs(run, ema=True))


def test_without_figures_the_card_claims_none(export):
    folder, _ = export(GOLDEN / DIT, "--layout", "safetensors")
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None
    assert card.data.datasets is None
    assert "Metrics" not in card.text


def test_a_damaged_eval_file_is_told_and_nothing_is_left(export, runs):
    run = make_run(runs / "run")
    (run / "eval.json").write_text('[{"acc1": ')
    with pytest.raises(CheckpointError, match=r"eval\.json cannot be read"):
        export(run, "--layout", "safetensors")
    assert not (runs / "exports").exists()


# ---- writing


@pytest.mark.parametrize("layout", ["published", "safetensors"])
def test_nothing_is_written_over(export, runs, layout):
    path, _ = export(GOLDEN / DEIT, "--layout", layout)
    before = path.stat().st_mtime_ns
    with pytest.raises(FetchError, match="exists already"):
        export(GOLDEN / DEIT, "--layout", layout, "--no-ema", "--out", path)
    assert path.stat().st_mtime_ns == before
    assert [p.name for p in (runs / "exports").iterdir()] == [path.name]


@pytest.mark.parametrize("layout", ["published", "safetensors"])
def test_a_size_limit_leaves_nothing(spiralrope, runs, layout):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = spiralrope("export", GOLDEN / DEIT, "--layout", layout, expect=1, preexec_fn=small_files)
    assert "error: exports/deit_tiny_checkpoint" in done.stderr
    assert ": a file reached the size limit (ulimit -f)\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert not list((runs / "exports").iterdir())


@pytest.mark.parametrize(("layout", "name"), [("published", "x.pth"), ("safetensors", "x")])
def test_a_file_where_a_folder_would_be_is_told(export, runs, layout, name):
    (runs / "file").touch()
    with pytest.raises(ConfigError, match=f"file/{name} cannot be written"):
        export(GOLDEN / DEIT, "--layout", layout, "--out", f"file/{name}")


def test_too_little_space_is_told_before_anything_is_written(export, runs, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(DiskError, match=r"1 kB free, and 2\.\d+ MB are needed"):
        export(GOLDEN / DEIT, "--layout", "published")
    assert not (runs / "exports").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("deit-s", "--layout", "onnx"), "--layout is onnx; it must be safetensors, published or"),
        (("deit-s", "--layout", "published", "--out", "x"), "must end in .pth or .pt"),
        (("deit-s", "--layout", "safetensors", "--out", "x.pth"), "is the name of a file"),
        (("deit-s", "--layout", "published", "--best"), "deit-s is not one"),
        (("deit-q", "--layout", "published"), "or a published name"),
    ],
)
def test_wrong_words_are_usage_errors(export, words, message):
    with pytest.raises(ConfigError, match=message):
        export(*words)


def test_published_weights_are_fetched_by_name(spiralrope, runs):
    server = HubServer()
    server.repos[WEIGHTS_REPO] = {find_row("deit-s").file: (GOLDEN / DEIT).read_bytes()}
    home = {"HF_ENDPOINT": server.url, "HF_HOME": str(runs / "home"), "HF_TOKEN": ""}
    try:
        done = spiralrope("export", "deit-s", "--layout", "safetensors", "--ema", env=home)
    finally:
        server.close()
    assert done.stdout == "exports/deit-s-ema\n"
    card = ModelCard.load(runs / "exports" / "deit-s-ema" / "README.md")
    assert card.data.datasets == ["imagenet-1k"]
    assert torch.equal(outputs(runs / "exports" / "deit-s-ema"), outputs(GOLDEN / DEIT, ema=True))


# ---- onto the Hub


def measured(run, acc1=93.25):
    """A run whose EMA weights of the last checkpoint were evaluated."""
    weights = run / "checkpoints" / "0000008" / "ema.safetensors"
    row = {
        **{"weights": "EMA", "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()},
        **{"data": "/home/me/digits", "image_size": [16, 16], "crop_ratio": 1.0},
        **{"acc1": acc1, "acc5": 99.5, "loss": 0.25, "count": 360},
    }
    (run / "eval.json").write_text(json.dumps({"rows": [row]}))
    return run


def push(export, source, repo="me/vit", *more):
    path, said = export(source, "--ema", "--push", repo, "--license", "mit", *more)
    return str(path), said


@pushes_a_card
def test_a_push_leaves_all_on_the_hub_and_nothing_here(hub, export, runs):
    run = measured(make_run(runs / "run"))
    url, _ = push(export, run)
    assert url.endswith(f"{hub.url.partition('://')[2]}/me/vit")
    assert set(hub.repos["me/vit"]) == {"README.md", "config.json", "model.safetensors"}
    assert not (runs / "exports").exists()
    card = ModelCard.load("me/vit")
    assert (card.data.license, card.data.library_name) == ("mit", "spiralrope")
    [first, second] = card.data.eval_results
    assert (first.dataset_name, first.metric_value, second.metric_value) == ("digits", 93.25, 99.5)
    assert card.data.model_name == "vit"
    assert "arXiv:2602.03227" in card.text
    assert "title = {spiralrope}" in card.text
    everything = b"".join(hub.repos["me/vit"].values())
    assert str(runs).encode() not in everything
    assert b"/home/me" not in everything, "no paths of this machine"
    assert torch.equal(outputs("hf:me/vit", ema=True), outputs(run, ema=True))


@pushes_a_card
def test_every_example_of_the_card_runs(hub, export, runs):
    push(export, make_run(runs / "run"))
    card = ModelCard.load("me/vit").text
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        found = {}
        exec(example, found)
        assert found["model"].num_classes == 5
    assert "spiralrope eval hf:me/vit" in card


@pushes_a_card
def test_the_second_push_brings_the_new_weights_and_figures(hub, export, runs):
    push(export, measured(make_run(runs / "run")))
    first = outputs("hf:me/vit", ema=True)
    other = make_run(runs / "other")
    path = other / "checkpoints" / "0000008" / "ema.safetensors"
    state, metadata = read_safetensors(path)
    save_file({name: 2 * value for name, value in state.items()}, path, metadata)
    push(export, measured(other, acc1=95.5))
    assert not torch.equal(outputs("hf:me/vit", ema=True), first)
    assert ModelCard.load("me/vit").data.eval_results[0].metric_value == 95.5
    assert len(hub.commits["me/vit"]) == 2


@pushes_a_card
def test_private_and_out_are_kept(hub, export, runs):
    _, _ = push(export, make_run(runs / "run"), "lab/vit", "--private", "--out", "kept")
    assert hub.private == {"lab/vit"}
    kept = {path.name: path.read_bytes() for path in (runs / "kept").iterdir()}
    assert kept == hub.repos["lab/vit"]


def test_damaged_weights_never_reach_the_hub(hub, export, runs):
    run = make_run(runs / "run")
    path = run / "checkpoints" / "0000008" / "ema.safetensors"
    state, metadata = read_safetensors(path)
    state = {name: value.clone() for name, value in state.items()}
    state["norm.scale"][0] = torch.nan
    save_file(state, path, metadata)
    with pytest.raises(CheckpointError, match="not finite"):
        push(export, run)
    assert not hub.repos


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--push", "me/vit"), "--push me/vit needs --license"),
        (("--push", "vit", "--license", "mit"), "--push is vit; it must be OWNER/NAME"),
        (("--private",), "--private has no effect without --push"),
        (("--license", "MIT!"), "--license is MIT!; it must be an identifier of the Hub"),
        (("--layout", "published", "--license", "mit"), "--license with --layout published"),
        (("--vae", "mse"), "--vae mse has no effect with --layout safetensors"),
    ],
)
def test_wrong_words_of_a_push_are_usage_errors(hub, export, words, message):
    with pytest.raises(ConfigError, match=message):
        export("deit-s", *words)
    assert not hub.asked


@pushes_a_card
def test_the_real_commands_push_and_read(spiralrope, runs):
    server = HubServer()
    env = server.variables(runs / "home", "hf_me")
    try:
        words = ("--push", "me/vit", "--license", "mit", "--private")
        done = spiralrope("export", make_run(runs / "run"), *words, env=env)
        assert done.stdout == f"{server.url}/me/vit\n"
        assert "Traceback" not in done.stderr
        done = spiralrope("fetch", "hf:me/vit", env=env)
        assert Path(done.stdout.strip()).name == "model.safetensors"
        done = spiralrope("fetch", "hf:me/vit", env={**env, "HF_TOKEN": ""}, expect=1)
        assert "does not let you read me/vit (401)" in done.stderr
    finally:
        server.close()
