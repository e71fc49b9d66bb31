from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from spiralrope_cli.core.config.models import deit_size, dit_size, is_dit
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.rope import Grid


def create_model(
    arch: str, *, rope: RopeConfig | None = None, num_classes: int = 1000, **options: Any
) -> DeiT | DiT:
    """A freshly initialised network by name.

    Args:
        arch: `deit-ti` to `deit-l`, or `dit-ti2` to `dit-xl8`, which may be written `DiT-XL/8`.
        rope: options of the rotary embedding, by default `RopeConfig()`.
        num_classes: outputs of a DeiT; classes of a DiT, without the null class.
        options: of `create_deit`: image_size, patch_size, in_chans, pretrain_grid, drop_path;
            or of `create_dit`: input_size, in_chans, pretrain_grid, label_dropout, qk_norm.

    Raises:
        ConfigError: an unknown name (the nearest is suggested), another network's option, or
            sizes that do not fit.
    """
    create: Callable[..., DeiT | DiT] = create_dit if is_dit(arch) else create_deit
    known = list(inspect.signature(create).parameters)
    for name in options:
        if name not in known:
            raise ConfigError(f"{arch} has no option {name}", f"it has {', '.join(known[1:])}")
    return create(arch, rope=rope, num_classes=num_classes, **options)


def create_deit(
    arch: str,
    *,
    rope: RopeConfig | None = None,
    num_classes: int = 1000,
    image_size: Grid = 224,
    patch_size: int = 16,
    in_chans: int = 3,
    pretrain_grid: Grid | None = None,
    drop_path: float = 0.0,
) -> DeiT:
    """A freshly initialised classifier by name.

    Args:
        arch: `deit-ti`, `deit-s`, `deit-b` or `deit-l`.
        rope: options of the rotary embedding, by default `RopeConfig()`.
        num_classes: outputs.
        image_size: side or (height, width) in pixels.
        patch_size: side of a patch in pixels.
        in_chans: channels of the images.
        pretrain_grid: patch grid that positions refer to; by default the model's own.
        drop_path: stochastic depth rate.

    Raises:
        ConfigError: an unknown name (the nearest is suggested), or sizes that do not fit.
    """
    size = deit_size(arch)
    return DeiT(
        size.dim,
        size.depth,
        size.heads,
        rope=rope if rope is not None else RopeConfig(),
        image_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        pretrain_grid=pretrain_grid,
        drop_path=drop_path,
    )


def create_dit(
    arch: str,
    *,
    rope: RopeConfig | None = None,
    num_classes: int = 1000,
    input_size: Grid = 32,
    in_chans: int = 4,
    pretrain_grid: Grid | None = None,
    label_dropout: float = 0.1,
    qk_norm: bool = False,
) -> DiT:
    """A freshly initialised diffusion transformer by name.

    Args:
        arch: `dit-ti2` to `dit-xl8`; the digit is the patch side. `DiT-XL/8` is `dit-xl8`.
        rope: options of the rotary embedding, by default `RopeConfig()`.
        num_classes: classes, without the null class of guidance.
        input_size: side or (height, width) of the latent: pixels / 8 through the VAE.
        in_chans: channels of the latent.
        pretrain_grid: patch grid that positions refer to; by default the model's own.
        label_dropout: share of labels that are made null in training.
        qk_norm: normalises queries and keys.

    Raises:
        ConfigError: an unknown name (the nearest is suggested), or sizes that do not fit.
    """
    size = dit_size(arch)
    return DiT(
        size.dim,
        size.depth,
        size.heads,
        rope=rope if rope is not None else RopeConfig(),
        input_size=input_size,
        patch_size=size.patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        pretrain_grid=pretrain_grid,
        label_dropout=label_dropout,
        qk_norm=qk_norm,
    )
