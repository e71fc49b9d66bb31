"""The four pictures of `plot`: runs, what a Spiral RoPE does, attention, and images.

Each story settles what is drawn and into which file, draws it, and prints the file's path. Curves
come without torch, and so does a refusal of the options: what loads torch is imported where the
drawing starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spiralrope_cli.core.config.datasets import PHOTOGRAPHS
from spiralrope_cli.core.config.models import check_divides, deit_size, is_dit
from spiralrope_cli.core.config.pipelines import SAMPLE
from spiralrope_cli.core.config.plots import (
    AttentionPlot,
    PictureFile,
    RopePlot,
    RunPlot,
    SamplesPlot,
    notes,
)
from spiralrope_cli.core.config.resolve import RUNS_FOLDER
from spiralrope_cli.core.errors import CheckpointError, ConfigError, DataError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.plots.curves import draw_curves
from spiralrope_cli.core.plots.style import save
from spiralrope_cli.core.runtime.progress import METRICS_FILE, say, say_result
from spiralrope_cli.core.runtime.run_folder import CONFIG_FILE, NPZ_FILE, PIPELINE_FILE, find_run

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from spiralrope_cli.core.data.image_sets import ImageInput
    from spiralrope_cli.core.weights import Weights


def draw_run(plot: RunPlot, file: PictureFile) -> None:
    """Loss, accuracy or bound, learning rate and speed of training runs.

    Raises:
        CheckpointError: no such run.
        DataError: a run that has logged nothing.
    """
    named = list(dict.fromkeys(find_run(given) for given in plot.runs))
    folders = [folder for folder in named if (folder / METRICS_FILE).is_file()] or named
    for folder in named:
        if folder not in folders:
            say(f"note: {folder} is left out: it has no {METRICS_FILE}")
    more = f"-and-{len(folders) - 1}-more" if len(folders) > 1 else ""
    path = file.named(f"run-{folders[0].resolve().name}{more}")
    draw_curves(folders, path, plot.over)
    say_result(str(path))


def draw_rope(plot: RopePlot, given: set[str], file: PictureFile) -> None:
    """Directions, frequencies, the clamp's reach and centre scores.

    Args:
        plot: what is drawn.
        given: names of the RoPE options that the user gave.
        file: where it goes.
    """
    path = file.named("rope-" + "-".join(f"r{rope.rotate}" for rope in plot.ropes))
    for note in notes(plot, given):
        say(f"note: {note}")

    from spiralrope_cli.core.plots.rope import rope

    save(rope(plot), path)
    say_result(str(path))


def draw_attention(plot: AttentionPlot, file: PictureFile) -> None:
    """Where a token of a DeiT looks in a picture: a map for each head.

    Raises:
        CheckpointError: no weights there, or those of a diffusion transformer.
        ConfigError: a layer, head or patch that there is not.
        DataError: no picture.
    """
    path = file.named(f"attention-{Path(plot.source).resolve().stem}-{Path(plot.image).stem}")
    if path.resolve() == Path(plot.image).resolve():
        raise ConfigError(f"--out {file.out} is IMAGE itself", "name another file")
    source = find_source(plot.source, best=plot.best)

    from spiralrope_cli.core.load import at_size, build
    from spiralrope_cli.core.models.attention_maps import attention_from
    from spiralrope_cli.core.plots.attention import attention
    from spiralrope_cli.core.weights import here, read_weights

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
    save(figure, path)
    say_result(str(path))


def look_at(image: str, weights: Weights, size: tuple[int, int]) -> tuple[np.ndarray, Tensor]:
    """A picture to draw, and as the network takes it: resized and cropped as `eval` does.

    Returns:
        [height, width] or [height, width, 3] uint8, and [1, channels, height, width].

    Raises:
        DataError: it cannot be decoded.
    """
    import torch

    from spiralrope_cli.core.data.augment import eval_transform
    from spiralrope_cli.core.data.files import ImageFiles
    from spiralrope_cli.core.weights import mean_std

    channels = weights.options["in_chans"]
    files = ImageFiles([(image, 0)], eval_transform(size, 1.0), grey=channels == 1)
    pixels, _, unreadable = files[0, None]
    if unreadable is not None:
        raise DataError(f"IMAGE {image} cannot be read: {unreadable.reason}")
    known = mean_std(weights, PHOTOGRAPHS, channels)
    mean, std = (torch.tensor(known[name]).view(-1, 1, 1) for name in ("mean", "std"))
    images = (torch.from_numpy(pixels.copy()).float() / 255 - mean) / std
    return pixels[0] if channels == 1 else pixels.transpose(1, 2, 0), images[None]


def draw_samples(plot: SamplesPlot, file: PictureFile) -> None:
    """The first images of a set as a grid, with their classes where those are known.

    Raises:
        CheckpointError: no such folder and no such run.
        DataError: no images there, or damaged ones.
    """
    path = file.named(f"samples-{Path(plot.source).resolve().stem}")

    import torch

    from spiralrope_cli.core.data.image_sets import images_in
    from spiralrope_cli.core.data.images import image_batches
    from spiralrope_cli.core.plots.samples import fitted, samples

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
    save(samples(levels, labels, title, plot.columns or None), path)
    say_result(str(path))


def place_of(given: str) -> Path:
    """The `.npz` or folder of images that a word names.

    Raises:
        CheckpointError: no such folder and no such run.
        DataError: a run that has no images, or not yet.
    """
    from spiralrope_cli.core.data.sample_files import FACTS_FILE

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


def labels_of(images: ImageInput, part: range) -> list[str]:
    """The class of each image in words; none where nobody knows."""
    from spiralrope_cli.core.data.image_sets import NpzImages, names_of
    from spiralrope_cli.core.data.npz import read_array, read_headers
    from spiralrope_cli.core.data.sample_files import facts_in
    from spiralrope_cli.core.runtime.seeds import drawn_class

    if not isinstance(images, NpzImages):
        inside = [Path(images.files[number]).relative_to(images.path).parts for number in part]
        return [parts[0] for parts in inside] if all(len(parts) > 1 for parts in inside) else []
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
