"""Checkpoint folders that are whole or absent, whenever the process dies.

RUN/checkpoints/0000120/model.safetensors   raw weights, config in the metadata
RUN/checkpoints/0000120/ema.safetensors     averaged weights, likewise
RUN/checkpoints/0000120/trainer.pt          optimizer, step and best metrics
RUN/checkpoints/best.json, last.json        which step is which
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from spiralrope_cli.core.atomic import flush, write_whole
from spiralrope_cli.core.errors import CheckpointError, is_disk_full
from spiralrope_cli.core.runtime.run_folder import (
    CHECKPOINTS,
    EMA_FILE,
    MODEL_FILE,
    TRAINER_FILE,
    check_space,
    step_folder,
    steps_on_disk,
)
from spiralrope_cli.core.training.step import TrainState

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
"""What safetensors, torch and a damaged pickle raise."""


def save(
    run_folder: Path, state: TrainState, metadata: dict[str, str], keep_last: int, keep_every: int
) -> Path:
    """Writes the checkpoint of the state's step, then prunes older ones.

    Raises:
        CheckpointError: it could not be written; what lay there before is untouched.
    """
    final = step_folder(run_folder, state.step)
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(run_folder)
    if not final.exists():
        unfinished = final.with_name(UNFINISHED + final.name)
        try:
            unfinished.mkdir()
            _write(unfinished, state, metadata)
            os.rename(unfinished, final)
            flush(final.parent)
        except (OSError, RuntimeError, SafetensorError) as error:
            refusal = _cannot_write(final, error)  # reads the free space while it is still full
            shutil.rmtree(unfinished, ignore_errors=True)
            raise refusal from error
    write_whole(final.with_name("last.json"), json.dumps({"step": state.step}), durable=True)
    if state.best:
        write_whole(final.with_name("best.json"), json.dumps(state.best), durable=True)
    prune(run_folder, keep_last, keep_every, state.best.get("step"))
    return final


def _write(folder: Path, state: TrainState, metadata: dict[str, str]) -> None:
    for name, module in ((MODEL_FILE, state.model), (EMA_FILE, state.ema.module)):
        save_model(module, str(folder / name), {**metadata, "weights": Path(name).stem})
    optimizer = state.optimizer.state_dict()
    trainer = {"optimizer": optimizer, "step": state.step, "best": state.best}
    torch.save(trainer, folder / TRAINER_FILE)
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def _cannot_write(path: Path, error: Exception) -> CheckpointError:
    free = shutil.disk_usage(path.parent).free
    if is_disk_full(error) or free < 2**20:
        return CheckpointError(
            f"no space left for checkpoint {path} ({free / 2**20:.0f} MiB free)",
            "free some, or choose another --out; the same command then resumes",
        )
    return CheckpointError(f"checkpoint {path} could not be written: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def remove_unfinished(run_folder: Path) -> None:
    """Removes what a killed save left behind; only the holder of the run folder may call it."""
    for leftover in (run_folder / CHECKPOINTS).glob(UNFINISHED + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(run_folder: Path, keep_last: int, keep_every: int, best: int | None) -> None:
    """Removes all but the newest, the best, and the multiples that are kept for good."""
    steps = steps_on_disk(run_folder)
    for step in steps[:-keep_last]:
        if step != best and not (keep_every and step % keep_every == 0):
            # Renamed first: a removal that is cut short must not leave half a checkpoint.
            doomed = step_folder(run_folder, step)
            hidden = doomed.with_name(UNFINISHED + doomed.name)
            os.rename(doomed, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def restore(run_folder: Path, step: int, state: TrainState) -> None:
    """Puts the checkpoint of a step into the state.

    Raises:
        CheckpointError: a file is missing, damaged or of another model.
    """
    folder = step_folder(run_folder, step)
    try:
        load_model(state.model, str(folder / MODEL_FILE))
        load_model(state.ema.module, str(folder / EMA_FILE))
        trainer = torch.load(folder / TRAINER_FILE, map_location="cpu", weights_only=True)
        state.optimizer.load_state_dict(trainer["optimizer"])
    except UNREADABLE as error:
        raise CheckpointError(
            f"checkpoint {folder} cannot be read: {_first_line(error)}",
            "remove that folder to resume from the one before it",
        ) from error
    state.step, state.best = trainer["step"], trainer["best"]


def needed_bytes(model: nn.Module) -> int:
    """Size of one checkpoint: raw, averaged and two moments, in float32."""
    return 4 * sum(4 * parameter.numel() for parameter in model.parameters())


def check_fits(run_folder: Path, model: nn.Module) -> None:
    """Refuses a run whose first checkpoint would not fit on the disk.

    Raises:
        DiskError: too little is free.
    """
    hint = "free some, or choose another --out"
    check_space((run_folder, needed_bytes(model)), what="a checkpoint", hint=hint)
