"""What TensorBoard and W&B show of a run, read from their files."""

from __future__ import annotations

import io
import json
import struct
import time

import pytest
import yaml
from PIL import Image

from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime import run_folder, trackers
from spiralrope_cli.core.runtime.progress import Reporter, read_metrics


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()


def test_tensorboard_shows_a_training_its_samples_and_its_config(drawn_once):
    events = events_of(drawn_once)
    tags = {"epoch", "loss", "lr", "grad_norm", "images_per_s", "vb"}
    assert set(events.Tags()["scalars"]) == {f"train/{tag}" for tag in tags}
    [logged] = read_metrics(drawn_once)
    [shown] = events.Scalars("train/loss")
    assert (shown.step, shown.value) == (2, pytest.approx(logged["loss"]))
    [drawn] = events.Images("samples")
    with Image.open(drawn_once / "samples.png") as grid:
        assert Image.open(io.BytesIO(drawn.encoded_image_string)).tobytes() == grid.tobytes()
    [text] = events.Tensors("config/text_summary")[0].tensor_proto.string_val
    config = text.decode().removeprefix("```yaml\n").removesuffix("```")
    assert yaml.safe_load(config) == yaml.safe_load((drawn_once / "config.yaml").read_text())


def test_validation_has_a_group_of_its_own(trained_once):
    events = events_of(trained_once)
    assert {tag.partition("/")[0] for tag in events.Tags()["scalars"]} == {"train", "val"}
    [last] = [line for line in read_metrics(trained_once) if "acc1" in line]
    for tag, name in {"acc1": "acc1", "loss": "val_loss", "ema_loss": "ema_val_loss"}.items():
        [event] = events.Scalars(f"val/{tag}")
        assert (event.step, event.value) == (8, pytest.approx(last[name]))


@pytest.fixture
def killed_and_resumed(runs):
    """Steps 1 to 4 of a run, and steps 3 to 6 after a kill; the run folder."""

    def call(tracker, out="run"):
        options = {"arch": "dit-32x1x1-2", "max_steps": 6, "warmup_epochs": 0, "out": out}
        run = resolve("dit-train", {**options, "tracker": tracker}).run
        (runs / out).mkdir(parents=True)
        run_folder.write_config(run)
        Image.new("RGB", (8, 4), "red").save("grid.png")
        for before, last in ((0, 4), (2, 6)):
            if before and tracker == "wandb":
                time.sleep(1)  # older wandb names a session's folder by its second alone
            with Reporter(run, step=before, best_acc1=None, first=True) as reporter:
                for step in range(before + 1, last + 1):
                    reporter.log(step, {"loss": step + before / 10})
                reporter.sampled(last, runs / "grid.png")
        return runs / out

    return call


def test_tensorboard_shows_each_step_once_after_a_kill(killed_and_resumed):
    events = events_of(killed_and_resumed("tensorboard"))
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(step, pytest.approx(step + 0.2 * (step > 2))) for step in range(1, 7)]
    assert [event.step for event in events.Images("samples")] == [6]
    assert [event.step for event in events.Tensors("config/text_summary")] == [1, 3]


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def wandb_session(path):
    """Run, values by step, and exit code of a .wandb file."""
    records = {kind: [] for kind in ("run", "history", "exit")}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        records.setdefault(kind, []).append(getattr(record, kind))
    history = {}
    for each in records["history"]:
        values = {}
        for item in each.item:
            name, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
            parts = value.items() if isinstance(value, dict) else ()  # of wandb 0.17
            values |= {f"{name}/{part}": inner for part, inner in parts} or {name: value}
        history[values["_step"]] = values
    return records["run"][0], history, records["exit"][0].exit_code


def test_wandb_offline_continues_its_run_and_obeys_the_environment(killed_and_resumed, monkeypatch):
    import wandb

    theirs = {"MODE": "offline", "PROJECT": "theirs", "ENTITY": "lab", "SILENT": "true"}
    for name, value in theirs.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder = killed_and_resumed("wandb", out="rotate=2-seed0/dit-train")
    wandb.teardown()  # `finish` does not wait until the file is closed
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    (run, first, code), (resumed, again, _) = map(wandb_session, files)
    assert (run.project, run.entity, code) == ("theirs", "lab", 0)
    assert run.display_name == "rotate=2-seed0/dit-train", "a stage of a pipeline"
    assert resumed.run_id == run.run_id == (folder / "wandb-id").read_text()
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["arch"] == "dit-32x1x1-2"
    assert config["optim"]["max_steps"] == 6
    losses = [
        {step: values["train/loss"] for step, values in history.items()}
        for history in (first, again)
    ]
    assert losses == [
        {step: pytest.approx(step + before / 10) for step in range(before + 1, before + 5)}
        for before in (0, 2)
    ]
    with Image.open(files[1].parent / "files" / again[6]["samples/path"]) as sent:
        assert sent.getpixel((0, 0)) == (255, 0, 0)


def test_wandb_without_a_key_is_told_before_workers_start(runs, monkeypatch):
    import wandb

    wandb.teardown()  # it reads the environment once
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(runs))
    monkeypatch.setenv("NETRC", str(runs / "none"))
    with pytest.raises(ConfigError, match=r"--tracker wandb: .*(API key|api_key)") as refused:
        trackers.log_in("wandb")
    assert "WANDB_MODE=offline" in refused.value.hint
    for mode in ("offlin", ""):
        monkeypatch.setenv("WANDB_MODE", mode)
        with pytest.raises(ConfigError, match="--tracker wandb: ") as refused:
            trackers.log_in("wandb")
        assert len(str(refused.value).splitlines()) == 2
    wandb.teardown()
