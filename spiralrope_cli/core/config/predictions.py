"""Config of `predict`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from spiralrope_cli.core.config.models import ARCH_OF_SOURCE, SIZE
from spiralrope_cli.core.config.option import (
    DATA,
    OUTPUT,
    PATH,
    SOURCE,
    WEIGHTS,
    Opt,
    check_fields,
)
from spiralrope_cli.core.config.plots import FigureFile

TOP_K = 5
SHEET_IMAGES = 64
"""Images of a contact sheet at most."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Options of `predict`."""

    source: Annotated[str, SOURCE]
    images: Annotated[
        tuple[str, ...],
        Opt(
            "Image files, folders of images at any depth, or patterns such as 'photos/**/*.jpg'.",
            metavar="IMAGES",
            argument=True,
            required=True,
            many=True,
        ),
    ]
    ema: Annotated[bool, Opt("Use EMA weights.", WEIGHTS, flag="--ema/--no-ema")] = False
    best: Annotated[
        bool, Opt("Use the checkpoint with the best raw acc@1, not the last.", WEIGHTS)
    ] = False
    top_k: Annotated[
        int | None, Opt(f"Classes per image; by default {TOP_K}, or all if fewer.", OUTPUT, ge=1)
    ] = None
    json: Annotated[bool, Opt("Print JSON on stdout.", OUTPUT)] = False
    out: Annotated[
        str,
        Opt(
            f"Contact sheet of the first {SHEET_IMAGES} images as the network sees them, "
            ".png or .svg.",
            OUTPUT,
            **{**PATH, "metavar": "FILE"},
        ),
    ] = ""
    crop_ratio: Annotated[
        float | None,
        Opt(
            "Resize to image size / this, then centre crop; by default as eval does.",
            DATA,
            gt=0,
            le=1,
        ),
    ] = None
    image_size: Annotated[
        tuple[int, int] | None,
        Opt("Side, or height x width, in pixels; by default as trained.", DATA, **SIZE),
    ] = None
    arch: Annotated[str, ARCH_OF_SOURCE] = ""
    rope: dict[str, Any] = field(default_factory=dict)  # options that override the source's

    def __post_init__(self) -> None:
        check_fields(self)
        FigureFile(out=self.out)  # raises for another suffix
