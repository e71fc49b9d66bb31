from __future__ import annotations

from spiralrope_cli.core.config.models import deit_size
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.rope import Grid


def create_model(
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
    """A freshly initialised network by name.

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
