"""TensorBoard and Weights & Biases, in which a run also shows its values, samples and config."""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spiralrope_cli.core.config.option import to_nested
from spiralrope_cli.core.errors import ConfigError, TrainingError, first_line
from spiralrope_cli.core.storage import CONFIG_FILE

if TYPE_CHECKING:
    from spiralrope_cli.core.config.dit_runs import TrainingRun

OFFLINE = "WANDB_MODE=offline keeps the run on this machine; wandb sync uploads it later"


def check_tracker(kind: str) -> None:
    """Raises if a tracker is not installed."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ConfigError(f"--tracker {kind} is not installed", f"pip install 'spiralrope[{kind}]'")


def log_in(kind: str) -> None:
    """Logs in to W&B before workers start; on a terminal it asks for the API key."""
    if kind != "wandb":
        return
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    try:
        wandb.Settings(mode=cast(Any, mode))  # raises for a mode that does not exist
        if mode == "online":
            wandb.login()
    except ValueError as error:
        raise ConfigError(f"--tracker wandb: WANDB_MODE is {mode or 'empty'}", OFFLINE) from error
    except wandb.Error as error:
        raise ConfigError(f"--tracker wandb: {first_line(error)}", OFFLINE) from error


def open_tracker(run: TrainingRun, step: int) -> TensorBoardLogger | WandbLogger | None:
    """The tracker of a run that goes on after `step`."""
    if run.machine.tracker == "tensorboard":
        return TensorBoardLogger(Path(run.out), step)
    return WandbLogger(run) if run.machine.tracker == "wandb" else None


class TensorBoardLogger:
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A killed run may have logged steps after its last checkpoint; they come again.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        config = (folder / CONFIG_FILE).read_text()
        self._writer.add_text("config", f"```yaml\n{config}```", step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()  # a resumed run does not log again what is before its checkpoint

    def log_image(self, step: int, tag: str, path: Path) -> None:
        """An image file."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """TensorBoard knows no failed runs."""
        self._writer.close()


class WandbLogger:
    """A W&B run; its id is kept in the run folder, so that a resumed run continues it.

    W&B keeps the first values of a step that comes twice. They are equal, time apart.
    """

    def __init__(self, run: TrainingRun) -> None:
        import wandb

        folder = Path(run.out)
        kept = folder / "wandb-id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        # The stages of pipelines have the same names in all of them.
        name = "/".join(folder.parts[-2:]) if folder.name == run.command else folder.name
        chosen = os.environ.get  # arguments would win over the user's environment
        try:
            self._run = wandb.init(
                project=chosen("WANDB_PROJECT", "spiralrope"),
                name=chosen("WANDB_NAME", name),
                id=chosen("WANDB_RUN_ID", kept.read_text()),
                dir=chosen("WANDB_DIR", run.out),
                resume="allow",
                config=to_nested(run),
                allow_val_change=True,  # a resumed run may have other workers, for example
            )
        except wandb.Error as error:
            raise TrainingError(f"--tracker wandb: {first_line(error)}", OFFLINE) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars by name."""
        self._run.log(values, step=step)

    def log_image(self, step: int, tag: str, path: Path) -> None:
        """An image file."""
        import wandb

        self._run.log({tag: wandb.Image(str(path))}, step=step)

    def close(self, *, failed: bool) -> None:
        """Uploads the rest."""
        self._run.finish(exit_code=int(failed))
