"""Checkpoint folders: complete or absent, even if the process is killed.

RUN/checkpoints/0000120/model.safetensors   raw weights; the config is in the metadata
RUN/checkpoints/0000120/ema.safetensors     averaged weights; the same metadata
RUN/checkpoints/0000120/trainer.pt          optimizer, step and best metrics
RUN/checkpoints/best.json, last.json        steps of the best and the last checkpoint
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from spiralrope_cli.core.errors import SPACE, CheckpointError, errno_of, first_line, system_error
from spiralrope_cli.core.runtime.launch import check_space
from spiralrope_cli.core.runtime.run_folder import step_folder, steps_on_disk
from spiralrope_cli.core.storage import (
    CHECKPOINTS,
    EMA_FILE,
    MODEL_FILE,
    TRAINER_FILE,
    check_zip,
    flush,
    read_safetensors,
    with_checksum,
    write_whole,
)
from spiralrope_cli.core.training.step import TrainState, parts_of, total_norm, whole

UNFINISHED = ".unfinished-"
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    SafetensorError,
    UnpicklingError,
)
"""What safetensors and torch raise for a missing or damaged file."""


def contents(state: TrainState) -> dict[str, dict[str, Any]]:
    """What the files of a checkpoint hold; for a sharded state all processes must call it."""
    return {
        MODEL_FILE: whole(state.model.state_dict()),
        EMA_FILE: whole(state.ema.module.state_dict()),
        TRAINER_FILE: {
            "optimizer": whole(state.optimizer.state_dict()),
            "step": state.step,
            "best": state.best,
        },
    }


def save(
    run_folder: Path,
    files: dict[str, dict[str, Any]],
    metadata: dict[str, str],
    keep_last: int,
    keep_every: int,
) -> Path:
    """Writes the checkpoint with these `contents`; only then removes older ones."""
    step, best = files[TRAINER_FILE]["step"], files[TRAINER_FILE]["best"]
    final = step_folder(run_folder, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(run_folder)
    if not final.exists():
        unfinished = final.with_name(UNFINISHED + final.name)
        try:
            unfinished.mkdir()
            _write(unfinished, files, metadata)
            os.rename(unfinished, final)
            flush(final.parent)
        except (OSError, RuntimeError, SafetensorError) as error:
            refusal = _cannot_write(final, error)  # before rmtree: it reports the free space
            shutil.rmtree(unfinished, ignore_errors=True)
            raise refusal from error
    write_whole(final.with_name("last.json"), json.dumps({"step": step}), durable=True)
    if best:
        write_whole(final.with_name("best.json"), json.dumps(best), durable=True)
    prune(run_folder, keep_last, keep_every, best.get("step"))
    return final


def _write(folder: Path, files: dict[str, dict[str, Any]], metadata: dict[str, str]) -> None:
    for name in (MODEL_FILE, EMA_FILE):
        own = with_checksum(files[name], {**metadata, "weights": Path(name).stem})
        save_file(files[name], str(folder / name), own)
    torch.save(files[TRAINER_FILE], folder / TRAINER_FILE)
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def _cannot_write(path: Path, error: Exception) -> CheckpointError:
    free = shutil.disk_usage(path.parent).free
    if errno_of(error) in SPACE or free < 2**20:
        return CheckpointError(
            f"no space left for checkpoint {path} ({free / 2**20:.0f} MiB free)",
            "free some, or choose another --out; the same command then resumes",
        )
    cause = system_error(error, path.name) or CheckpointError(first_line(error))
    return CheckpointError(f"checkpoint {path} could not be written: {cause.message}", cause.hint)


def remove_unfinished(run_folder: Path) -> None:
    """Removes unfinished folders of a killed save; the caller must hold the lock of the run."""
    for leftover in (run_folder / CHECKPOINTS).glob(UNFINISHED + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(run_folder: Path, keep_last: int, keep_every: int, best: int | None) -> None:
    """Removes all but the newest, the best, and every `keep_every` steps."""
    steps = steps_on_disk(run_folder)
    for step in steps[:-keep_last]:
        if step != best and not (keep_every and step % keep_every == 0):
            # Renamed first: an interrupted removal must not leave half a checkpoint.
            doomed = step_folder(run_folder, step)
            hidden = doomed.with_name(UNFINISHED + doomed.name)
            os.rename(doomed, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def restore(run_folder: Path, step: int, state: TrainState) -> None:
    """Loads the checkpoint of a step into the state."""
    folder = step_folder(run_folder, step)
    try:
        for module, name in ((state.model, MODEL_FILE), (state.ema.module, EMA_FILE)):
            stored = read_safetensors(folder / name)[0]
            module.load_state_dict(parts_of(stored, module.state_dict()))
        norms = [total_norm(m.parameters()) for m in (state.model, state.ema.module)]
        if not all(map(torch.isfinite, norms)):
            raise ValueError("its weights are not finite")
        check_zip(folder / TRAINER_FILE)
        # Mapped: the processes of a machine share what they read.
        trainer = torch.load(
            folder / TRAINER_FILE, map_location="cpu", weights_only=True, mmap=True
        )
        optimizer, groups = trainer["optimizer"], state.optimizer.param_groups
        for number, parameter in enumerate(p for group in groups for p in group["params"]):
            if moments := optimizer["state"].get(number):
                # What stays on the CPU, as step counts do, would else stay mapped to the file.
                on_cpu = parameter.device.type == "cpu"
                moments = {n: m.clone() if on_cpu or not m.ndim else m for n, m in moments.items()}
                like = dict.fromkeys(moments, parameter)
                optimizer["state"][number] = parts_of(moments, like)
        state.optimizer.load_state_dict(optimizer)
        state.step, state.best = trainer["step"], trainer["best"]
    except UNREADABLE as error:
        raise CheckpointError(
            f"checkpoint {folder} cannot be read: {first_line(error)}",
            "remove that folder to resume from the one before it",
        ) from error


def needed_bytes(model: nn.Module) -> int:
    """Size of one checkpoint: raw and averaged weights and two moments, in float32."""
    return 4 * sum(4 * parameter.numel() for parameter in model.parameters())


def check_fits(run_folder: Path, model: nn.Module) -> None:
    """Raises `DiskError` if the first checkpoint does not fit on the disk."""
    hint = "free some, or choose another --out"
    check_space((run_folder, needed_bytes(model)), what="a checkpoint", hint=hint)
