"""Config of `predict`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spiralrope_cli.core.config.models import ARCH_OF_SOURCE, SIZE
from spiralrope_cli.core.config.option import PATH, SOURCE, check_fields, option
from spiralrope_cli.core.config.plots import FigureFile

TOP_K = 5
SHEET_IMAGES = 64
"""Images of a contact sheet at most."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Options of `predict`."""

    source: str = option(SOURCE)
    images: tuple[str, ...] = option(
        "Image files, folders of images at any depth, or patterns such as 'photos/**/*.jpg'.",
        metavar="IMAGES",
        argument=True,
        required=True,
        many=True,
    )
    ema: bool = option("Use EMA weights.", "Weights", flag="--ema/--no-ema", default=False)
    best: bool = option(
        "Use the checkpoint with the best raw acc@1, not the last.", "Weights", default=False
    )
    top_k: int | None = option(
        f"Classes per image; by default {TOP_K}, or all if fewer.", "Output", ge=1, default=None
    )
    json: bool = option("Print JSON on stdout.", "Output", default=False)
    out: str = option(
        f"Contact sheet of the first {SHEET_IMAGES} images as the network sees them, .png or .svg.",
        "Output",
        **{**PATH, "metavar": "FILE"},
        default="",
    )
    crop_ratio: float | None = option(
        "Resize to image size / this, then centre crop; by default as eval does.",
        "Data and augmentation",
        gt=0,
        le=1,
        default=None,
    )
    image_size: tuple[int, int] | None = option(
        "Side, or height x width, in pixels; by default as trained.",
        "Data and augmentation",
        **SIZE,
        default=None,
    )
    arch: str = option(ARCH_OF_SOURCE, default="")
    rope: dict[str, Any] = field(default_factory=dict)  # options that override the source's

    def __post_init__(self) -> None:
        check_fields(self)
        FigureFile(out=self.out)  # raises for another suffix
