"""Recipes: field name -> value; data set and architecture give the other values.

What a recipe gives is fitted to a small set of images or a short run; values of the user, and those
that work, stay as they are.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from spiralrope_cli.core.config.datasets import BUILT_IN, DIGITS, PHOTOGRAPHS
from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.models import BY_WEIGHTS
from spiralrope_cli.core.config.option import in_words, leaves
from spiralrope_cli.core.config.training import LINEAR_RULE_BATCH, OptimConfig
from spiralrope_cli.core.errors import ConfigError

# DeiT stage 1 on ImageNet-1K at 224 px: the recipe of the published DeiT-B run. That run was not
# repeated; its parts are tested one by one.
PRETRAIN: dict[str, Any] = {
    "seed": 0,
    "rotate": 2,
    "geometry": "crop",
    "crop_scale": 0.08,
    "hflip": 0.5,
    "translate": 0.0,
    "degrees": 0.0,
    "auto_augment": "3a",
    "color_jitter": 0.3,
    "random_erasing": 0.0,
    "repeated_aug": 1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_switch_prob": 0.5,
    "smoothing": 0.1,
    "epochs": 300,
    "max_steps": 0,
    "batch_size": 4096,
    "lr": 2e-4,
    "lr_rule": "linear",
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 20,
    "schedule": "cosine",
    "betas": (0.9, 0.95),
    "weight_decay": 0.3,
    "clip_grad": 0.0,
    "ema_decay": 0.9999,
    "ema_warmup": False,
    "freeze": "none",
    "log_every": 50,
    "validate_every": 1,
    "save_every": 1,
    "keep_last": 2,
    "keep_every": 0,
}

# DeiT stage 2, from the EMA weights of stage 1.
FINETUNE: dict[str, Any] = {
    **PRETRAIN,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.0,  # timm ignores it together with RandAugment
    "drop_path": 0.1,
    "epochs": 20,
    "batch_size": 512,
    "lr": 1e-5,
    "lr_rule": "none",
    "warmup_epochs": 5,
    "betas": (0.9, 0.999),
    "weight_decay": 0.1,
    "ema_decay": 0.99996,
}

# DiT on ImageNet-1K at 256 px: the recipe of the published runs. 80 epochs are 400K steps.
DIT: dict[str, Any] = {
    "seed": 0,
    "rotate": 0,
    "image_size": (256, 256),
    "vae": "ema",
    "hflip": 0.5,
    "class_dropout_prob": 0.1,
    "qk_norm": False,
    "epochs": 80,
    "max_steps": 0,
    "batch_size": 256,
    "lr": 1e-4,
    "lr_rule": "none",
    "min_lr": 0.0,
    "warmup_lr": 1e-6,
    "warmup_epochs": 0,
    "schedule": "constant",
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "clip_grad": 0.0,
    "ema_decay": 0.9999,
    "ema_warmup": False,
    "freeze": "none",
    "log_every": 100,
    "sample_every": 10_000,
    "save_every": 50_000,
    "keep_last": 2,
    "keep_every": 0,
}

PUBLISHED_MICRO_BATCH = {"pretrain": 256, "finetune": 64, "dit-train": 32}
"""Of the published runs; on a built-in set it is the batch size of its recipe."""

# Only the run of DeiT-B is documented; the other rates are from DeiT-III, and not verified.
DROP_PATH = {"deit-ti": 0.0, "deit-s": 0.05, "deit-b": 0.1, "deit-l": 0.4}

PUBLISHED_CLASSES = 1000
"""Classes of ImageNet-1K, the data of the published runs."""
FITTED = "fit"
"""Origin of a fitted value."""
STEPS_PER_EPOCH, SMALLEST_BATCH = 4, 8
"""A fitted batch leaves an epoch so many steps, unless it would be smaller than that."""


def recipe(command: str, arch: str, num_classes: int) -> dict[str, Any]:
    """The recipe of a training command; on other data than the published runs with EMA warm-up."""
    values = {"pretrain": PRETRAIN, "finetune": FINETUNE, "dit-train": DIT}[command]
    of_arch = {"drop_path": DROP_PATH.get(arch, 0.0)} if command == "pretrain" else {}
    return {**values, **of_arch, "ema_warmup": num_classes != PUBLISHED_CLASSES}


def shown_defaults(command: str) -> dict[str, str]:
    """Field name -> default for the help: that of the recipe, and of the digits if it differs."""
    dit = command == "dit-train"
    usual: dict[str, Any] = {"arch": "dit-b4", **DIT} if dit else {"arch": "deit-b", **PHOTOGRAPHS}
    usual |= recipe(command, usual["arch"], DIGITS.num_classes)
    digits: dict[str, Any] = {"arch": DIGITS.default_dit if dit else DIGITS.default_arch}
    digits |= DIGITS.defaults_of(command)
    of_weights = {**BY_WEIGHTS, "arch": "", "image_size": ""} if command == "finetune" else {}
    shown: dict[str, str] = {}
    for name, value in usual.items():
        if value is False or name == "max_steps":
            continue
        words = in_words(value)
        if name == "lr" and usual["lr_rule"] == "linear":
            words += f" × batch/{LINEAR_RULE_BATCH}"
        here = in_words(digits.get(name, value))
        if here != in_words(value):
            words += f"; digits {here}"
        shown[name] = words
    return {**shown, **of_weights}


def fit_to_run(values: dict[str, Any], sources: dict[str, str]) -> list[str]:
    """Fits batch, rate and warm-up of the recipe, in place; one note for each."""
    notes: list[str] = []
    known = leaves(OptimConfig)

    def of_recipe(*names: str) -> bool:
        return all(sources[name] in ("recipe", "data set") for name in names)

    def fit(name: str, value: Any, why: str) -> None:
        notes.append(f"{known[name].called} {value}, not the recipe's {values[name]}: {why}")
        values[name], sources[name] = value, FITTED

    num_train = values["num_train"]
    if of_recipe("batch_size") and values["batch_size"] > num_train > 0:
        batch = fitted_batch(num_train)
        fit("batch_size", batch, f"the set has {num_train} images")
        if of_recipe("lr", "lr_rule") and batch < LINEAR_RULE_BATCH and values["lr_rule"] != "none":
            fit("lr_rule", "none", f"a batch of {batch} would leave little of --lr")
    batch = max(values["batch_size"], 1)
    if of_recipe("warmup_epochs"):
        per_epoch, warmup = max(num_train // batch, 1), values["warmup_epochs"]
        total = values["max_steps"] or values["epochs"] * per_epoch
        shorter = min(warmup, total // (4 * per_epoch))
        too_long = values["schedule"] != "constant" and total <= warmup * per_epoch
        if shorter < warmup and too_long:
            fit("warmup_epochs", shorter, f"the run has {total} steps, {per_epoch} per epoch")
        elif values["max_steps"]:
            values["warmup_epochs"] = shorter
    return notes


def with_micro_batch(run: TrainingRun, size: int | None) -> TrainingRun:
    optim: Any = replace(run.optim, micro_batch_size=size)
    return replace(run, optim=optim)


def micro_batch_sizes(run: TrainingRun, world_size: int) -> list[int]:
    """The sizes into which the batch splits exactly, ascending."""
    most, _ = with_micro_batch(run, None).split_batch(world_size)  # raises if there is none
    sizes: list[int] = []
    for size in range(1, most + 1):
        with contextlib.suppress(ConfigError):
            if most % size == 0:
                sizes += with_micro_batch(run, size).split_batch(world_size)[:1]
    return sizes


def usual_micro_batch(run: TrainingRun, world_size: int) -> int:
    """That of the recipe; where the batch does not split into it, a smaller one, if not by much."""
    usual = PUBLISHED_MICRO_BATCH[run.command]
    if run.data in BUILT_IN:
        usual = BUILT_IN[run.data].defaults_of(run.command)["batch_size"]
    fitting = [size for size in micro_batch_sizes(run, world_size) if size <= usual]
    mine = run.optim.batch_size // world_size
    few = mine <= usual or not fitting or 4 * fitting[-1] < usual
    return usual if few else fitting[-1]


def with_usual_micro_batch(run: TrainingRun, world_size: int) -> TrainingRun:
    """The run with the micro-batch of its recipe in place of `auto`."""
    if run.optim.micro_batch_size is not None:
        return run
    return with_micro_batch(run, usual_micro_batch(run, world_size))


def fitted_batch(num_train: int) -> int:
    """The largest power of two that leaves an epoch several steps, where there is one."""
    wanted = max(num_train // STEPS_PER_EPOCH, min(SMALLEST_BATCH, num_train))
    return 1 << (wanted.bit_length() - 1)


def fit_channels(values: dict[str, Any]) -> None:
    """Fits mean and std to in_chans: repeats that of grey, or averages those of RGB."""
    for name in ("mean", "std"):
        given = tuple(values[name])
        if len(given) == 1:
            values[name] = given * values["in_chans"]
        elif values["in_chans"] == 1:
            values[name] = (round(sum(given) / len(given), 4),)
