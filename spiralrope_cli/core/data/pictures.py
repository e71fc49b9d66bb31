"""Opens single image files, and carries along what cannot be decoded."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from spiralrope_cli.core.config.datasets import list_images
from spiralrope_cli.core.errors import UnreadableImageError

BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)


@dataclass(frozen=True)
class Unreadable:
    """A picture that could not be decoded, carried out of a loader process in one piece."""

    path: str
    reason: str

    def error(self) -> UnreadableImageError:
        """The error that ends a run without --skip-bad."""
        return UnreadableImageError(
            f"image {self.path} cannot be read: {self.reason}",
            "remove it, or go on without such images by --skip-bad",
        )


def open_picture(
    path: str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image | Unreadable:
    """A decoded and converted picture, or why there is none."""
    try:
        with Image.open(path) as image:
            return convert(image)
    except BROKEN_IMAGE as error:
        reason = str(error).replace(path, "").strip(" '") or type(error).__name__
        return Unreadable(path, reason)
    except Image.DecompressionBombError:
        return Unreadable(path, "it is too large")


def decode_some(folders: Iterable[Path | None], most: int) -> tuple[int, list[Unreadable]]:
    """Decodes some pictures of each folder of classes, evenly spread, and at most so many.

    Returns:
        how many, and those of them that cannot be decoded.
    """
    chosen: list[str] = []
    for folder in folders:
        paths = [path for path, _ in list_images(folder)] if folder else []
        count = min(most, len(paths))
        chosen += [paths[number * len(paths) // count] for number in range(count)]
    opened = [open_picture(path, lambda image: image.convert("RGB")) for path in chosen]
    return len(chosen), [each for each in opened if isinstance(each, Unreadable)]
