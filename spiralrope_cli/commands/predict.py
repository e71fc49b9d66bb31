from __future__ import annotations

from typing import Any

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config.evals import Prediction
from spiralrope_cli.core.config.models import BY_WEIGHTS, RopeConfig
from spiralrope_cli.core.config.training import MachineConfig


@command(
    Prediction,
    RopeConfig,
    MachineConfig,
    leave_out=(
        *("nproc", "nnodes", "rdzv_endpoint", "max_restarts", "compile"),
        *("grad_checkpointing", "shard"),
        *("skip_bad", "resume", "tracker"),
    ),
    defaults=BY_WEIGHTS,
)
def predict(given: dict[str, Any]) -> None:
    """Predict the classes of your own images with a DeiT.

    Prints the most probable classes of each image, by name. SOURCE is a run, a file or published
    weights. Images are resized, cropped and normalised as in eval. Those that cannot be read are
    named on stderr; the exit code is then 1.

    Examples:
      spiralrope predict deit-b photo.jpg              ImageNet's classes
      spiralrope predict runs/birds photos/ --ema --top-k 1
      spiralrope predict runs/birds 'photos/**/*.jpg' --json > classes.json
      spiralrope predict deit-b photos/ --out sheet.png
    """
    from spiralrope_cli.core.jobs.predict import predict as job

    job(given)
