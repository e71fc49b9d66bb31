"""Images side by side, with their classes where those are known."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from spiralrope_cli.core.config.pipelines import SAMPLE
from spiralrope_cli.core.config.plots import SamplesPlot
from spiralrope_cli.core.config.resolve import RUNS_FOLDER
from spiralrope_cli.core.data.class_names import names_of
from spiralrope_cli.core.data.image_sets import image_batches
from spiralrope_cli.core.data.inputs import ImageInput, NpzImages, images_in
from spiralrope_cli.core.data.npz import read_array, read_headers
from spiralrope_cli.core.data.sample_files import FACTS_FILE, NPZ_FILE, facts_in
from spiralrope_cli.core.errors import CheckpointError, DataError
from spiralrope_cli.core.figures.samples import samples
from spiralrope_cli.core.figures.style import save
from spiralrope_cli.core.jobs.sample_dit import drawn_class
from spiralrope_cli.core.runtime.run_folder import CONFIG_FILE, PIPELINE_FILE, find_run


def draw_samples(plot: SamplesPlot, target: Path) -> None:
    """The first images of a set as a grid, as a .png or .svg.

    Raises:
        DataError: no images there, or damaged ones.
    """
    images = images_in(place_of(plot.source), "SOURCE")
    part = range(min(plot.num, len(images)))
    pictures: dict[int, Tensor] = {}
    for batch in image_batches(images, part, len(part), threads=-1, pin_memory=False):
        for unreadable in batch.unreadable:
            raise DataError(f"image {unreadable.path} cannot be read: {unreadable.reason}")
        together = (picture for group in batch.groups for picture in group)
        pictures.update(zip(batch.numbers, together, strict=True))
    levels = torch.stack([fitted(pictures[number], pictures[0]) for number in part])
    labels = labels_of(images, part) if plot.labels else []
    title = f"{plot.source}: {len(part)} of {len(images)} images"
    save(samples(levels, labels, title, plot.columns or None), target)


def place_of(given: str) -> Path:
    """The `.npz` or folder of images that a word names.

    Raises:
        CheckpointError: no such folder and no such run.
        DataError: a run that has no images, or not yet.
    """
    path = Path(given).expanduser()
    if not path.exists() and path.suffix != ".npz":
        try:
            path = find_run(given)
        except CheckpointError as error:
            message = f"{given} is no .npz, no folder of images and no run below {RUNS_FOLDER}/"
            raise CheckpointError(message, error.hint) from error
    if (path / PIPELINE_FILE).is_file():
        path = path / SAMPLE
    if (path / NPZ_FILE).is_file():
        return path / NPZ_FILE
    if (path / FACTS_FILE).is_file():
        raise DataError(f"{path} is not finished", "the same dit-sample command goes on with it")
    if (path / CONFIG_FILE).is_file():
        raise DataError(f"{path} is a training run", f"spiralrope dit-sample {given} draws images")
    return path


def fitted(picture: Tensor, like: Tensor) -> Tensor:
    """[3, h, w] uint8 within the size of another picture, on white."""
    (height, width), (tall, wide) = picture.shape[1:], like.shape[1:]
    if (height, width) == (tall, wide):
        return picture
    scale = min(tall / height, wide / width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    smooth = F.interpolate(picture[None].float(), size, mode="bilinear", antialias=True)[0]
    left, top = (wide - size[1]) // 2, (tall - size[0]) // 2
    around = (left, wide - size[1] - left, top, tall - size[0] - top)
    return F.pad(smooth.round().to(torch.uint8), around, value=255)


def labels_of(images: ImageInput, part: range) -> list[str]:
    """The class of each image in words; none where nobody knows."""
    if isinstance(images, NpzImages):
        return _labels_in(images, part)
    inside = [Path(images.files[number]).relative_to(images.path).parts for number in part]
    return [parts[0] for parts in inside] if all(len(parts) > 1 for parts in inside) else []


def _labels_in(images: NpzImages, part: range) -> list[str]:
    facts = facts_in(images.path)
    dealt, count = facts.get("classes"), facts.get("num_classes", 0)
    if dealt:
        numbers = [dealt[number % len(dealt)] for number in part]
    elif count:
        numbers = [drawn_class(facts["seed"], count, number) for number in part]
    else:
        # ADM's samples carry their labels so.
        header = read_headers(images.path).get("arr_1")
        if header is None or header.dtype.kind not in "iu" or header.shape != (len(images),):
            return []
        numbers = read_array(images.path, "arr_1")[: len(part)].tolist()
        count = 0
    names = names_of(facts.get("data", ""), count)
    return [names[number] if number < len(names) else str(number) for number in numbers]
