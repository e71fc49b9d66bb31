"""The network that a run trains: fresh, from other weights, or from its own checkpoint."""

from __future__ import annotations

from dataclasses import asdict

from torch import nn

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.load import start_from
from spiralrope_cli.core.models.build import create_model
from spiralrope_cli.core.runtime.job import Job
from spiralrope_cli.core.runtime.seeds import seed_everything
from spiralrope_cli.core.training import loop
from spiralrope_cli.core.training.optim import freeze_but
from spiralrope_cli.core.training.state import TrainState
from spiralrope_cli.core.weights import starting_weights


def build(config: TrainingRun, job: Job, step: int) -> tuple[TrainState, nn.Module]:
    """Model, averages and optimizer at a step, and the model as it is called."""
    seed_everything(config.seed, "init")
    model = create_model(config.arch, rope=config.rope, **asdict(config.model))
    if config.source and not step:
        start_from(starting_weights(config), model)
    if config.optim.freeze != "none":
        freeze_but(model, config.optim.freeze)
    model.grad_checkpointing = config.machine.grad_checkpointing
    return loop.prepare(config, job, model, step)
