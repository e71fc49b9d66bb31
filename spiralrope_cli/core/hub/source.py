"""What a SOURCE on the command line means: a run, a file, or published weights by name.

Without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from spiralrope_cli.core.config.hub import PUBLISHED_SUFFIXES
from spiralrope_cli.core.config.nested import read_config
from spiralrope_cli.core.config.resolve import RUNS_FOLDER
from spiralrope_cli.core.errors import CheckpointError, ConfigError
from spiralrope_cli.core.hub.catalog import Row, find
from spiralrope_cli.core.runtime.run_folder import (
    CHECKPOINTS,
    EMA_FILE,
    MODEL_FILE,
    inner_runs,
    run_configs,
    step_folder,
    steps_on_disk,
)

FILE_SUFFIXES = (*PUBLISHED_SUFFIXES, ".bin", ".safetensors")
CLASSIFIERS = ("pretrain", "finetune")


@dataclass(frozen=True)
class Source:
    """Weights that exist here, or that can be fetched."""

    given: str  # as the user named them
    place: Path | None  # a file, the folder of one checkpoint, or None until it is fetched
    run: Path | None = None  # its folder, None for a file
    row: Row | None = None  # of the catalogue, None for what is not published

    def file(self, ema: bool) -> Path:
        """Where the raw or the averaged weights are; one published file may hold both."""
        if self.place is None:
            raise CheckpointError(f"{self.given} is not here", f"spiralrope fetch {self.given}")
        if self.place.is_file():
            return self.place
        averaged = self.place / EMA_FILE
        return averaged if ema and averaged.is_file() else self.place / MODEL_FILE


def find_source(given: str, *, best: bool = False) -> Source:
    """The weights that a word names, without reading them.

    Args:
        given: a run folder, a checkpoint folder in it, a file, or a published name.
        best: a run's best checkpoint, not its last.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return _in_folder(given, path, best)
    if path.is_file():
        return Source(given, path)
    if path.suffix in FILE_SUFFIXES or len(path.parts) > 1:
        raise CheckpointError(f"{given} is no file and no folder", "look at its spelling")
    try:
        return Source(given, None, row=find(given))
    except ConfigError as unknown:
        raise ConfigError(
            f"{given} is no file, no run folder and no published name", unknown.hint
        ) from unknown


def _in_folder(given: str, folder: Path, best: bool) -> Source:
    if (folder / MODEL_FILE).is_file() and not (folder / CHECKPOINTS).is_dir():
        real = folder.resolve()
        of_run = real.parent.name == CHECKPOINTS and real.name.isdigit()
        return Source(given, real, run=real.parent.parent if of_run else None)
    steps = steps_on_disk(folder)
    if not steps:
        raise CheckpointError(
            f"{folder} holds no checkpoint",
            inner_runs(folder) or f"a run folder has {CHECKPOINTS}/ with numbered folders",
        )
    step = best_step(folder) if best else steps[-1]
    return Source(given, step_folder(folder, step), run=folder)


def best_step(run: Path) -> int:
    """Step of a run's best checkpoint, which only a run that validated has."""
    pointer = run / CHECKPOINTS / "best.json"
    try:
        step = int(json.loads(pointer.read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run} has no best checkpoint yet", "leave --best out") from error
    if step not in steps_on_disk(run):
        raise CheckpointError(f"the best checkpoint of {run}, step {step}, is gone")
    return step


def newest_run(commands: tuple[str, ...] = CLASSIFIERS, folder: Path | None = None) -> Path:
    """The run of certain commands that saved a checkpoint last."""
    folder = folder or Path(RUNS_FOLDER)
    saved: list[tuple[float, Path]] = []
    for config in run_configs(folder):
        if not (steps := steps_on_disk(config.parent)):
            continue
        try:
            command = read_config(config).get("command")
        except ConfigError:
            continue  # another kind of run, or another version's
        if command in commands:
            when = step_folder(config.parent, steps[-1]).stat().st_mtime
            saved.append((when, config.parent))
    if not saved:
        raise CheckpointError(
            f"no SOURCE is given and {folder}/ holds no {' or '.join(commands)} run",
            "name a run folder, a checkpoint file or published weights",
        )
    return max(saved)[1]
