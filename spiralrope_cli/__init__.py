"""Spiral RoPE: rotary position embedding with many directions in the image plane.

The names below are imported on first use, so `import spiralrope_cli` loads neither torch nor timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spiralrope_cli.core.config.models import RopeConfig
    from spiralrope_cli.core.diffusion.gaussian import GaussianDiffusion
    from spiralrope_cli.core.load import load_model
    from spiralrope_cli.core.models.deit import DeiT
    from spiralrope_cli.core.models.dit import DiT
    from spiralrope_cli.core.models.factory import create_model
    from spiralrope_cli.core.rope import SpiralRoPE

__all__ = [
    "DeiT",
    "DiT",
    "GaussianDiffusion",
    "RopeConfig",
    "SpiralRoPE",
    "__version__",
    "create_model",
    "load_model",
]

_HOME_OF = {
    "DeiT": "spiralrope_cli.core.models.deit",
    "DiT": "spiralrope_cli.core.models.dit",
    "GaussianDiffusion": "spiralrope_cli.core.diffusion.gaussian",
    "RopeConfig": "spiralrope_cli.core.config.models",
    "SpiralRoPE": "spiralrope_cli.core.rope",
    "create_model": "spiralrope_cli.core.models.factory",
    "load_model": "spiralrope_cli.core.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
