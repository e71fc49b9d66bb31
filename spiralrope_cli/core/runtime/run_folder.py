"""The run folder: its files, and whether a command may resume in it.

No torch, so that errors come before any worker starts.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from spiralrope_cli.core.config.datasets import class_difference
from spiralrope_cli.core.config.dit_runs import RUN_KINDS, TrainingRun
from spiralrope_cli.core.config.option import (
    build,
    flat_values,
    flatten,
    leaves,
    read_values,
    renamed,
    to_nested,
)
from spiralrope_cli.core.config.recipes import with_micro_batch
from spiralrope_cli.core.config.runs import ClassifierRun
from spiralrope_cli.core.config.training import RUNS_FOLDER
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.storage import (
    CHECKPOINTS,
    CONFIG_FILE,
    CURVES_FILE,
    ENVIRONMENT_FILE,
    SAMPLES,
    SOURCES_FILE,
    parse,
    read_yaml,
    write_whole,
)

STEP_DIGITS = 7
LENGTH = {"epochs", "max_steps", "warmup_epochs"}
"""Fields of the length of a run; `fit_to_run` fits the warm-up to it."""

SAME = (
    *("sha256", "checkpoint", "weights", "data", "labels", "image_size", "crop_ratio", "rope"),
    "precision",
)
"""A new row of `eval.json` replaces an old one that is equal in these."""


def step_folder(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"{step:0{STEP_DIGITS}d}"


def sample_file(folder: Path, step: int) -> Path:
    return folder / SAMPLES / f"{step:0{STEP_DIGITS}d}.png"


def steps_on_disk(folder: Path) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.is_dir():
        return []
    return sorted(int(entry.name) for entry in checkpoints.iterdir() if entry.name.isdigit())


def run_configs(folder: Path) -> Iterator[Path]:
    """Config files of the runs in a folder, also inside pipelines and sweeps."""
    for depth in (1, 2, 3):
        yield from folder.glob(f"{'*/' * depth}{CONFIG_FILE}")


def inner_runs(folder: Path) -> str:
    """A hint that names the runs inside a folder; empty if there are none."""
    inside = sorted(str(config.parent) for config in run_configs(folder))
    more = ", ..." if len(inside) > 3 else ""
    return f"name a run in it: {', '.join(inside[:3])}{more}" if inside else ""


def find_run(given: str) -> Path:
    """The run folder by path, or by name below `runs/`."""
    for folder in (Path(os.path.expanduser(given)), Path(RUNS_FOLDER) / given):
        if folder.is_dir():
            return folder
    there = [entry.name for entry in sorted(Path(RUNS_FOLDER).glob("*/"))]
    near = difflib.get_close_matches(given, there, n=1, cutoff=0.5)
    raise CheckpointError(
        f"there is no run {given}, also not below {RUNS_FOLDER}/",
        f"did you mean {near[0]}?" if near else "",
    )


def first_step(run: TrainingRun) -> int:
    """The step at which the run resumes; 0: start. Checks `--resume` and the options."""
    folder = Path(run.out)
    steps = steps_on_disk(folder)
    if run.machine.resume == "must" and not steps:
        raise CheckpointError(
            f"--resume must: {folder / CHECKPOINTS} holds no checkpoint",
            "use --resume auto to start from step 0",
        )
    if not steps:
        return 0
    if run.machine.resume == "never":
        raise CheckpointError(
            f"--resume never: {folder} already holds checkpoints up to step {steps[-1]}",
            "choose another --out or --name, or remove that folder",
        )
    check_same(run, folder, step=steps[-1])
    return steps[-1]


def is_finished(run: TrainingRun, step: int) -> bool:
    """Whether a run at this step is finished, curves included."""
    return step == run.total_steps and (Path(run.out) / CURVES_FILE).exists()


def check_same(run: TrainingRun, folder: Path, *, step: int = 0) -> None:
    """Raises if the run in a folder has other options that change its results.

    Resumed at `step`, a run of constant learning rate may be longer or shorter than it was.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds checkpoints but no {CONFIG_FILE}",
            "restore it, or choose another --out or --name",
        )
    before, now = read_config(folder / CONFIG_FILE, type(run)), flat_values(run)
    known = leaves(type(run))
    free = {name for name, opt in known.items() if opt.free}
    before.setdefault("ema", True)  # earlier versions started from nothing else
    names = before.pop("class_names", ()), now.pop("class_names")  # they stored no names
    if other := class_difference(*names):
        raise CheckpointError(
            f"{folder} holds a run on other classes: {other}",
            "give the class folders their names of before, or this run another --name or --out",
        )
    # No default in its place: the run may have been trained with another value.
    if lacking := [name for name in now if name not in before and name not in free]:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} lacks {', '.join(lacking)}",
            "another version of spiralrope made it; give this run another --name or --out",
        )
    if before["rope_kind"] != now["rope_kind"]:
        free.add("rotate")  # it follows from the kind
    constant = before["schedule"] == run.optim.schedule == "constant"
    if constant and step > run.total_steps:
        raise CheckpointError(
            f"{folder} is at step {step}, and this run would end at {run.total_steps}",
            "give it more steps, or another --name or --out",
        )
    if differing := differences(
        before, now, free | LENGTH if constant and step else free, lambda name: known[name].called
    ):
        hint = "repeat those, or give this run another --name or --out"
        same_length = all(before[name] == now[name] for name in ("epochs", "max_steps"))
        if not (constant or same_length or differences(before, now, free | LENGTH)):
            again = "dit-train --init-from" if run.command == "dit-train" else "finetune"
            hint = (
                f"its {run.optim.schedule} schedule depends on the length: start from its weights "
                f"by spiralrope {again} {folder}, or give this run another --name or --out"
            )
        raise CheckpointError(f"{folder} holds a run with other options: {differing}", hint)


def micro_batch_so_far(run: TrainingRun, world_size: int) -> int | None:
    """The micro-batch that a started run found, if its batch still splits into it; else None."""
    file = Path(run.out) / CONFIG_FILE
    with contextlib.suppress(ConfigError):  # it was found for another number of processes
        if file.is_file() and steps_on_disk(file.parent):
            size: int | None = read_config(file, type(run)).get("micro_batch_size")
            with_micro_batch(run, size).split_batch(world_size)
            return size
    return None


def precision_so_far(run: TrainingRun) -> tuple[str, list[str]]:
    """The precision of a started run, empty if unknown; a note if its word has changed."""
    stored = read_config(Path(run.out) / CONFIG_FILE, type(run)).get("precision", "auto")
    last = read_json(Path(run.out) / ENVIRONMENT_FILE)
    if stored == "auto":  # earlier versions did not store what it became
        stored = {"float32": "fp32", "bfloat16": "bf16"}.get(last.get("precision", ""), "")
    was_tf32 = stored == "fp32" and last.get("device") == "cuda" and "tf32" not in last
    note = f"{run.out} is of a version whose fp32 was TF32 on GPUs; --precision tf32 is that"
    return stored, [note] * was_tf32


def repeated_run(kind: type[TrainingRun], folder: Path, given: Mapping[str, Any]) -> TrainingRun:
    """The run in a folder; given options must be equal to those of the run."""
    values = {**read_config(folder / CONFIG_FILE, kind), "out": str(folder)}
    may_differ = {name for name, opt in leaves(kind).items() if opt.free}
    changes = {k: v for k, v in given.items() if k in values and k not in may_differ}
    if "data" in changes and (root := Path(os.path.expanduser(str(changes["data"])))).is_dir():
        changes["data"] = str(root.resolve())
    check_same(build(kind, {**values, **changes}), folder)
    return cast(TrainingRun, build(kind, values))


def differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Collection[str],
    word: Callable[[str], str] = str,
) -> str:
    """The first values that differ, as text; empty if all are equal.

    Names in `free` may differ; `word` gives the option of a name.
    """
    changed = [
        f"{word(name)} was {before.get(name)}, now {value}"
        for name, value in now.items()
        if name not in free and before.get(name) != value
    ]
    more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
    return "; ".join(changed[:3]) + more


def read_config(path: Path, kind: type[TrainingRun] | None = None) -> dict[str, Any]:
    """Flat values of a `config.yaml`, in the types of their fields; checks that it is of `kind`."""
    nested = read_yaml(path)
    try:
        if not isinstance(nested, dict):
            raise ConfigError("it is not a config of a run")
        command = nested.get("command")
        of_file = RUN_KINDS.get(str(command), kind or ClassifierRun)
        if kind is not None and of_file is not kind:
            raise ConfigError(f"it is of another kind of run, {command}")
        values = flatten(renamed(nested, of_file), of_file)
        if command and values.get("workers") == -1:  # as earlier runs stored auto
            values["workers"] = None
        of_earlier_runs = {"ema_warmup": False} if command else {}
        return {**of_earlier_runs, **read_values(leaves(of_file), values)}
    except ConfigError as error:
        each_line = error.message.replace("\n", f"\n{path}: ")
        raise ConfigError(f"{path}: {each_line}", error.hint) from error


def write_config(run: TrainingRun) -> None:
    """Writes the config, with everything that is needed to repeat the run."""
    import yaml

    write_whole(Path(run.out) / CONFIG_FILE, yaml.safe_dump(to_nested(run), sort_keys=False))


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[IO[str]]:
    """Locks a run folder until this process ends."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise CheckpointError(f"{folder} cannot be written: {why}") from error
    with lock:
        try:
            # A record lock: data loader workers do not inherit it, so it ends with this process.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            raise CheckpointError(
                f"another run is writing to {folder} (process {lock.read().strip() or 'unknown'})",
                "wait for it, or give this one another --name or --out",
            ) from error
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be locked: {error.strerror}") from error
        lock.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: what is needed later says it
            os.write(lock.fileno(), str(os.getpid()).encode())
        yield lock


def write_sources(run: TrainingRun, sources: dict[str, str]) -> None:
    """Writes the origin of each value, for the report; before any worker starts."""
    folder = Path(run.out)
    # With several machines another one may have locked the folder already.
    with hold_folder(folder) if run.machine.nnodes == 1 else contextlib.nullcontext():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SOURCES_FILE, sources)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically. Not a number is no JSON: whoever measures refuses it."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        content = parse(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def read_rows(path: Path, *, strict: bool = False) -> list[dict[str, Any]]:
    """Rows of an `eval.json`, none if it is missing.

    A damaged file is renamed; with `strict` it is an error.
    """
    if not path.exists():
        return []
    try:
        rows = parse(path.read_text())["rows"]
        if not all(isinstance(each, dict) for each in rows):
            raise TypeError("it holds no list of rows")
        return list(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if strict:
            raise CheckpointError(
                f"{path} cannot be read: {error}", "evaluate again, or move the file away"
            ) from error
    aside = path.with_suffix(".damaged")
    os.replace(path, aside)
    say(f"note: {path} was damaged (no list of rows); it was renamed to {aside.name}")
    return []


def is_same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two rows have the same weights and protocol."""
    return not differences(before, {name: now[name] for name in SAME}, free=())


def add_rows(path: Path, rows: Sequence[dict[str, Any]], decoded: int) -> None:
    """Adds rows to an `eval.json`; they replace rows of the same weights and protocol."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [old for old in read_rows(path) if not any(is_same(old, new) for new in rows)]
    # Earlier versions wrote NaN.
    kept = [old for old in kept if math.isfinite(old.get("loss", 0.0))]
    write_json(path, {"decoded": decoded, "rows": [*kept, *rows]})
