"""How a run trains, and where: optimizer, schedule and length; processes, device and precision.

And what `doctor` checks before one.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spiralrope_cli.core.config.datasets import DATA_SETS
from spiralrope_cli.core.config.models import is_dit, size_of
from spiralrope_cli.core.config.option import FILE, PATH, Opt, check_fields, option
from spiralrope_cli.core.errors import ConfigError, in_one
from spiralrope_cli.core.storage import check_writable, own_folder

RUNS_FOLDER = "runs"
"""Where run folders lie unless --out names one."""
MOST_PROCESSES = 1024
"""Workers, or data loader workers of one; more is a slip of the keyboard."""

MOST_OF_FIRST = 0.05
"""Fraction of the first weights above which averaged ones are not those of a training."""
LINEAR_RULE_BATCH = 512
"""The linear rule multiplies the base learning rate by total batch / this."""


def number_or_auto(text: str) -> int | None:
    """A number; None for `auto`."""
    return None if text == AUTO else int(text)


AUTO = "auto"
MICRO_BATCH = Opt(
    "Images per process and forward pass (gradient accumulation). auto, the default: on a GPU the "
    "most that fit, found once before training; else the recipe's.",
    "Run",
    ge=1,
    free=True,
    metavar="N|auto",
    read=number_or_auto,
    expects="auto, or a whole number, 1 or more",
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule and EMA."""

    panel = "Recipe"
    epochs: int = option("Number of epochs.", "Run", ge=1)
    max_steps: int = option(
        "Number of optimizer steps, in place of --epochs.", "Run", ge=0, was="--steps"
    )
    batch_size: int = option("Total images per optimizer step.", "Run", ge=1)
    micro_batch_size: int | None = option(MICRO_BATCH, default=None)  # None: auto
    lr: float = option("Learning rate before linear batch scaling.", ge=0)
    lr_rule: Literal["linear", "none"] = option(
        f"linear: multiply --lr by batch size / {LINEAR_RULE_BATCH}; none: do not."
    )
    min_lr: float = option("Final learning rate of the cosine schedule.", ge=0)
    warmup_lr: float  # first learning rate of the warm-up
    warmup_epochs: int = option("Epochs of linear warm-up.", ge=0)
    schedule: Literal["cosine", "constant", "published"] = option(
        "cosine: per step; published: per epoch, one epoch late."
    )
    betas: tuple[float, float]  # of AdamW
    weight_decay: float = option("AdamW weight decay; not for norms, biases, embeddings.", ge=0)
    clip_grad: float = option("Clip gradients to this norm; 0: none.", ge=0)
    ema_decay: float = option("Decay of the EMA weights, per step.", ge=0, lt=1)
    ema_warmup: bool = option(
        "Warm up the EMA decay, as timm does. Off for data of 1000 classes, as published.",
        flag="--ema-warmup/--no-ema-warmup",
    )
    freeze: Literal["none", "attn-only", "head-only"] = option(
        "Train all; attention, position embedding and head; or only the head."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}; each must be in [0, 1)")

    def inert_options(self) -> list[tuple[str, str]]:
        """Fields that have no effect, with the reason."""
        inert = [("epochs", "--max-steps is given")] if self.max_steps else []
        if self.schedule == "constant":
            inert += [(name, "--schedule is constant") for name in ("min_lr", "warmup_epochs")]
        return inert

    @property
    def peak_lr(self) -> float:
        """The learning rate after batch scaling."""
        scale = self.batch_size / LINEAR_RULE_BATCH if self.lr_rule == "linear" else 1.0
        return self.lr * scale

    def check_length(self, num_train: int, data: str) -> None:
        """Raises if the batch is larger than the training set, or the warm-up is too long."""
        errors = []
        if self.batch_size > num_train:
            errors += [
                ConfigError(
                    f"--batch-size {self.batch_size} is more than the {num_train} "
                    f"training images of {data}",
                    # A power of two has whole mixing groups, and splits over most machines.
                    f"use fewer, for example {1 << (num_train.bit_length() - 1)}",
                )
            ]
        if self.schedule == "published" and self.max_steps:
            hint = "use --epochs"
            errors += [ConfigError("--schedule published counts epochs, not --max-steps", hint)]
        # Of a batch that does not fit, epochs are compared, as if they had one step each.
        per_epoch = num_train // self.batch_size or 1
        total_steps = self.max_steps or self.epochs * per_epoch
        if self.schedule != "constant" and total_steps <= self.warmup_epochs * per_epoch:
            errors += [
                ConfigError(
                    f"--warmup-epochs {self.warmup_epochs} is as long as the whole run of "
                    f"{total_steps} steps, or longer ({per_epoch} steps per epoch)",
                    "use fewer warm-up epochs, or a longer run",
                )
            ]
        if errors:
            raise in_one(errors)

    def split_batch(self, world_size: int, num_train: int) -> tuple[int, int]:
        """Micro-batch size per process, and number of gradient accumulation steps.

        With `auto` all images of a process. Raises if the batch does not split exactly; the message
        names the nearest that do.
        """
        batch = self.batch_size
        micro = min(self.micro_batch_size or batch, max(batch // world_size, 1))
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


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Where and how a run is executed. Only `precision` and `compile` change its rounding."""

    panel = "Machine"
    free = True
    nproc: int = option(
        "Processes on this machine; by default one per GPU, or one on CPU.",
        ge=0,
        le=MOST_PROCESSES,
        default=0,
    )
    nnodes: int = option("Number of machines.", ge=1, default=1)
    rdzv_endpoint: str = option(
        "Rendezvous endpoint of several machines.",
        metavar="HOST:PORT",
        pattern=r"(.+:\d+)?",
        expects="HOST:PORT",
        default="",
    )
    max_restarts: int = option(
        "Restarts at most, after a process was killed or crashed.", ge=0, default=0
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = option(
        "Device; by default a GPU if there is one, else the CPU.", default="auto"
    )
    precision: Literal["auto", "bf16", "tf32", "fp32"] = option(
        "auto: bf16 if the device supports it, else fp32; a resumed run keeps its own. "
        "tf32: of NVIDIA GPUs, elsewhere fp32.",
        default="auto",
    )
    compile: Literal["auto", "on", "off"] = option(
        "Compile the blocks by torch.compile: other rounding, less time after a wait. "
        "auto: in a long run on a GPU.",
        bare={"--compile": ("on",), "--no-compile": ("off",)},
        read=lambda text: {"true": "on", "false": "off"}.get(text.lower(), text),
        default="auto",
    )
    grad_checkpointing: bool = option(
        "Activation checkpointing: less memory, slower.", default=False
    )
    shard: bool = option(
        "Split weights, EMA and optimizer state over the processes (FSDP2): less memory each, "
        "more communication.",
        default=False,
    )
    workers: int | None = option(
        "Processes that read images, for each process that computes. auto, the default: beside "
        "a GPU all cores but one, at most 16; on a CPU at most 4.",
        ge=0,
        le=MOST_PROCESSES,
        metavar="N|auto",
        read=number_or_auto,
        expects=f"auto, or a whole number in [0, {MOST_PROCESSES}]",
        default=None,
    )  # None: auto
    skip_bad: bool = option(
        "Skip and count unreadable images instead of stopping.",
        "Data and augmentation",
        default=False,
    )
    resume: Literal["auto", "must", "never"] = option(
        "Resume from the newest checkpoint. auto: if there is one; must: it must exist.",
        "Run",
        expects="auto, must or never; the same command, or --config RUN/config.yaml --out RUN, "
        "resumes a run",
        default="auto",
    )
    tracker: Literal["none", "tensorboard", "wandb"] = option(
        "Also log to a tracker.", "Run", default="none"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise ConfigError(
                f"--nnodes is {self.nnodes} without --rdzv-endpoint",
                "name the first machine, such as --rdzv-endpoint host:29500",
            )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Further options of a training command."""

    panel = "Run"
    name: str = option("Suffix of the run folder's name.", default="")
    config: str = option(
        "config.yaml of a run to repeat; options override it.",
        **FILE,
        default="",
    )
    dry_run: bool = option("Print the plan and stop.", default=False)

    def check_folder(self, out: str, kind: str) -> None:
        """Raises if --out contradicts --name, cannot be written, or is of another `kind`."""
        if self.name and out:
            raise ConfigError(
                f"--name {self.name} and --out {out} both name the run folder", "use one of them"
            )
        if not out:
            return
        check_writable(out, folder=True)
        there, _ = own_folder(Path(out))
        if there not in ("", kind):
            raise ConfigError(
                f"--out {out} is {there}", "choose another, for example a new folder inside it"
            )


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """The config of `doctor`: this machine, and the run to check."""

    arch: str = option(
        "Architecture of the run, deit-... or dit-...; by default that of the data set.",
        "Model",
        metavar="NAME",
        complete="archs",
        default="",
    )
    data: str = option(
        "Built-in name or folder; by default $SPIRALROPE_DATA, else digits.",
        "Data and augmentation",
        metavar="NAME|FOLDER",
        complete=DATA_SETS,
        default="",
    )
    runs: str = option("Folder that holds the run folders.", "Run", **PATH, default=RUNS_FOLDER)
    num_samples: int = option(
        "Number of images of dit-sample; by default 50000, or 200 for a built-in data set.",
        "Run",
        ge=0,
        was="--num",
        default=0,
    )
    batch_size: int | None = option("Total images per optimizer step.", "Run", ge=1, default=None)
    micro_batch_size: int | None = option(MICRO_BATCH, default=None)
    offline: bool = option("Do not contact the Hub.", "Display", default=False)
    as_json: bool = option("Print JSON on stdout.", "Display", flag="--json", default=False)
    options: dict[str, Any] = field(default_factory=dict)  # given options of the training command
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_samples and not self.dit:
            raise ConfigError(
                f"--num-samples {self.num_samples} has no effect: only a DiT samples images",
                "give a DiT with --arch, or leave --num-samples out",
            )
        if self.arch:
            size_of(self.arch)

    @property
    def dit(self) -> bool:
        """Whether the run to check is that of a DiT."""
        return is_dit(self.arch)
