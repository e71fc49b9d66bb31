"""Optional loggers beside `metrics.jsonl`."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiralrope_cli.core.errors import ConfigError

Track = Callable[[int, dict[str, float]], None]


def check_tracker(kind: str) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        ConfigError: says what to install.
    """
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ConfigError(f"--tracker {kind} is not installed", f"pip install 'spiralrope[{kind}]'")


def open_tracker(
    kind: str, folder: Path, config: dict[str, Any]
) -> tuple[Track, Callable[[], None]]:
    """A function that takes (step, values), and one that closes it."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return write, writer.close
    if kind == "wandb":
        import wandb

        # The id lies in the folder, so that a resumed run goes on and a new one does not.
        kept = folder / "wandb-id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        session = wandb.init(
            project="spiralrope",
            name=folder.name,
            id=kept.read_text(),
            dir=str(folder),
            config=config,
            resume="allow",
        )
        return lambda step, values: session.log(values, step=step), session.finish
    return lambda step, values: None, lambda: None
