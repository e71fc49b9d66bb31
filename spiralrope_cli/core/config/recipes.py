"""Recipes: field name -> value; data set and architecture give the other values."""

from __future__ import annotations

from typing import Any

from spiralrope_cli.core.config.datasets import DIGITS, PHOTOGRAPHS
from spiralrope_cli.core.config.models import BY_WEIGHTS
from spiralrope_cli.core.config.option import in_words
from spiralrope_cli.core.config.training import LINEAR_RULE_BATCH

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
    "micro_batch_size": 256,
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
    "micro_batch_size": 64,
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
    "micro_batch_size": 32,
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
    "freeze": "none",
    "log_every": 100,
    "sample_every": 10_000,
    "save_every": 50_000,
    "keep_last": 2,
    "keep_every": 0,
}

# Only the run of DeiT-B is documented; the other rates are from DeiT-III, and not verified.
DROP_PATH = {"deit-ti": 0.0, "deit-s": 0.05, "deit-b": 0.1, "deit-l": 0.4}


def recipe(command: str, arch: str) -> dict[str, Any]:
    """The recipe of a training command for an architecture."""
    if command == "pretrain":
        return {**PRETRAIN, "drop_path": DROP_PATH.get(arch, 0.0)}
    return {"finetune": FINETUNE, "dit-train": DIT}[command]


def shown_defaults(command: str) -> dict[str, str]:
    """Field name -> default for the help: that of the recipe, and of the digits if it differs."""
    dit = command == "dit-train"
    usual: dict[str, Any] = {"arch": "dit-b4", **DIT} if dit else {"arch": "deit-b", **PHOTOGRAPHS}
    usual |= recipe(command, usual["arch"])
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
