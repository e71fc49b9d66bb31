"""Where a token of a DeiT looks in a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spiralrope_cli.core.config.datasets import PHOTOGRAPHS
from spiralrope_cli.core.config.models import check_divides, deit_size, is_dit
from spiralrope_cli.core.config.plots import AttentionPlot
from spiralrope_cli.core.data.files import ImageFiles, eval_transform
from spiralrope_cli.core.errors import CheckpointError, DataError
from spiralrope_cli.core.figures.attention import attention
from spiralrope_cli.core.figures.style import save
from spiralrope_cli.core.hub.source import Source
from spiralrope_cli.core.jobs.eval_plan import colours
from spiralrope_cli.core.jobs.start import at_size
from spiralrope_cli.core.load import build
from spiralrope_cli.core.models.attention_maps import attention_from
from spiralrope_cli.core.runtime.console import say
from spiralrope_cli.core.weights import Weights, here, read_weights


def draw_attention(source: Source, plot: AttentionPlot, target: Path) -> None:
    """Attention maps of one token over a picture, as a .png or .svg.

    Raises:
        CheckpointError: no weights there, or those of a diffusion transformer.
        ConfigError: a layer, head or patch that there is not.
        DataError: no picture.
    """
    weights = read_weights(here(source), ema=plot.ema, rope=plot.rope)
    if is_dit(weights.arch):
        raise CheckpointError(
            f"{source.given} holds {weights.arch}, a diffusion transformer",
            "plot attention takes a DeiT, which looks at pictures",
        )
    for note in weights.notes:
        say(f"note: {note}")
    size, side = plot.image_size or weights.options["image_size"], weights.options["patch_size"]
    check_divides(size, side)
    shape, grid = deit_size(weights.arch), (size[0] // side, size[1] // side)
    plot.check_fits(shape.depth, shape.heads, grid)
    picture, images = look_at(plot.image, weights, size)

    layers, heads = plot.layers or (shape.depth - 1,), plot.heads or tuple(range(shape.heads))
    token, where = 0, "the class token"
    if plot.patch is not None:
        row, column = plot.patch
        token, where = 1 + row * grid[1] + column, f"the patch in row {row}, column {column}"
    model = build(weights, **at_size(weights, size, plot.rope))
    maps = attention_from(model, images, token, layers)[:, 0, list(heads)]
    figure = attention(
        picture,
        maps.numpy(),
        grid=grid,
        layers=layers,
        heads=heads,
        patch=plot.patch,
        title=f"{weights.arch}: attention from {where}",
    )
    save(figure, target)


def look_at(image: str, weights: Weights, size: tuple[int, int]) -> tuple[np.ndarray, Tensor]:
    """A picture to draw, and as the network takes it: resized and cropped as `eval` does.

    Returns:
        [height, width] or [height, width, 3] uint8, and [1, channels, height, width].

    Raises:
        DataError: it cannot be decoded.
    """
    channels = weights.options["in_chans"]
    files = ImageFiles([(image, 0)], eval_transform(size, 1.0), grey=channels == 1)
    pixels, _, unreadable = files[0, None]
    if unreadable is not None:
        raise DataError(f"IMAGE {image} cannot be read: {unreadable.reason}")
    known = colours(weights, PHOTOGRAPHS, channels)
    mean, std = (torch.tensor(known[name]).view(-1, 1, 1) for name in ("mean", "std"))
    images = (torch.from_numpy(pixels.copy()).float() / 255 - mean) / std
    return pixels[0] if channels == 1 else pixels.transpose(1, 2, 0), images[None]
