"""Optimizer, schedule and length of a training run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from spiralrope_cli.core.config.checks import at_least, in_range, one_of
from spiralrope_cli.core.errors import ConfigError

SCHEDULES = ("cosine", "constant", "published")
LR_RULES = ("linear", "none")
FREEZES = ("none", "attn-only", "head-only")

LINEAR_RULE_BATCH = 512
"""The linear rule multiplies the base learning rate by total batch / this."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule and averages.

    Attributes:
        epochs: length in passes over the training set.
        steps: length in optimizer steps in place of epochs, 0 to go by epochs.
        batch_size: images per optimizer step, over all processes and accumulation.
        micro_batch_size: images at a time per process, at most.
        lr: base learning rate.
        lr_rule: `linear` multiplies lr by batch_size / 512, `none` takes it as it is.
        min_lr: where the cosine ends.
        warmup_lr: where the warm-up starts.
        warmup_epochs: length of the linear warm-up.
        schedule: `cosine` per step, `constant`, or `published`, per epoch as the old code.
        betas: of AdamW.
        weight_decay: on matrices alone.
        clip_grad: largest gradient norm, 0 for none.
        ema_decay: of the averaged weights, per optimizer step.
        freeze: what is trained: all, or `attn-only` (with head, position), or `head-only`.
    """

    epochs: int
    steps: int
    batch_size: int
    micro_batch_size: int
    lr: float
    lr_rule: str
    min_lr: float
    warmup_lr: float
    warmup_epochs: int
    schedule: str
    betas: tuple[float, float]
    weight_decay: float
    clip_grad: float
    ema_decay: float
    freeze: str

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("lr_rule", self.lr_rule, LR_RULES)
        one_of("freeze", self.freeze, FREEZES)
        for name in ("epochs", "batch_size", "micro_batch_size"):
            at_least(name, getattr(self, name), 1)
        for name in ("steps", "warmup_epochs", "lr", "min_lr", "weight_decay", "clip_grad"):
            at_least(name, getattr(self, name), 0)
        for beta in self.betas:
            in_range("betas", beta, 0, 1)
        in_range("ema_decay", self.ema_decay, 0, 1)

    @property
    def peak_lr(self) -> float:
        """The learning rate after the rule."""
        scale = self.batch_size / LINEAR_RULE_BATCH if self.lr_rule == "linear" else 1.0
        return self.lr * scale

    def steps_per_epoch(self, num_train: int) -> int:
        """Optimizer steps per epoch; what is left of a shuffled epoch is dropped."""
        return num_train // self.batch_size

    def total_steps(self, num_train: int) -> int:
        """Optimizer steps of a run."""
        return self.steps or self.epochs * self.steps_per_epoch(num_train)

    def check_length(self, num_train: int, data: str) -> None:
        """Refuses a batch, or a warm-up, that a training set and a run are too short for.

        Raises:
            ConfigError: names the option and what fits.
        """
        if self.batch_size > num_train:
            raise ConfigError(
                f"--batch-size {self.batch_size} is more than the {num_train} "
                f"training images of {data}",
                f"use at most {num_train}",
            )
        if self.schedule == "published" and self.steps:
            raise ConfigError("--schedule published counts epochs, not --steps", "use --epochs")
        per_epoch, total_steps = self.steps_per_epoch(num_train), self.total_steps(num_train)
        if self.schedule != "constant" and total_steps <= self.warmup_epochs * per_epoch:
            raise ConfigError(
                f"--warmup-epochs {self.warmup_epochs} leaves nothing of a run of "
                f"{total_steps} steps ({per_epoch} per epoch)",
                "use fewer warm-up epochs, or a longer run",
            )

    def split_batch(self, world_size: int, num_train: int) -> tuple[int, int]:
        """How a step is shared out.

        Returns:
            images at a time per process, and how many times before the optimizer steps.

        Raises:
            ConfigError: the total batch cannot be met exactly; the nearest that can are named.
        """
        batch = self.batch_size
        micro = min(self.micro_batch_size, max(batch // world_size, 1))
        unit = micro * world_size
        if batch % unit:
            around = {max(1, batch // unit) * unit, (batch // unit + 1) * unit}
            near = sorted(size for size in around if size <= num_train)
            raise ConfigError(
                f"--batch-size {batch} does not split into {world_size} process(es) x "
                f"{micro} images",
                (f"the nearest that do: {', '.join(map(str, near))}; or " if near else "")
                + "change --micro-batch-size or --nproc",
            )
        return micro, batch // unit
