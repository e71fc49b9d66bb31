"""`predict`: the most probable classes of image files, in constant memory.

Modules that load torch are imported inside functions, so that usage errors are fast.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.config.datasets import BUILT_IN, PHOTOGRAPHS
from spiralrope_cli.core.config.evals import SHEET_IMAGES, TOP_K, Prediction
from spiralrope_cli.core.config.models import RopeConfig, given_rope
from spiralrope_cli.core.config.option import build, idle_lines
from spiralrope_cli.core.config.runs import check_divides
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data.listing import IMAGE_SUFFIXES, ImageList, count_files, images_below
from spiralrope_cli.core.errors import CheckpointError, ConfigError, DataError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.runtime.launch import say_notes
from spiralrope_cli.core.runtime.progress import counted, say, say_result

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spiralrope_cli.core.weights import Weights

LONGEST_NAME = 60
"""Letters of an image's name up to which the columns of the table are aligned."""


@dataclass(frozen=True)
class Guess:
    """A class of an image."""

    number: int
    name: str
    probability: float


def predict(given: dict[str, Any]) -> None:
    """Prints the classes of each image; `given` is field name -> value."""
    options: Prediction = build(Prediction, {**given, "rope": given_rope(given)})
    machine: MachineConfig = build(MachineConfig, {**given, "nproc": 1, "skip_bad": True})
    source = find_source(options.source, best=options.best)
    files = list_images(options.images)
    if options.out and any(same_file(options.out, file) for file in files):
        raise ConfigError(f"--out {options.out} is one of IMAGES", "choose another --out")

    from spiralrope_cli.core.weights import fetch_source, read_weights

    weights = read_weights(
        fetch_source(source), ema=options.ema, rope=options.rope, arch=options.arch, dit=False
    )
    chosen = set(options.rope)
    say_notes([*weights.notes, *idle_lines(RopeConfig, weights.rope.inert_options(chosen), chosen)])
    num_classes = weights.options["num_classes"]
    if (options.top_k or 0) > num_classes:
        raise ConfigError(f"--top-k {options.top_k}: {source.given} has {num_classes} classes")
    check_divides(
        options.image_size or weights.options["image_size"], weights.options["patch_size"]
    )
    num_bad = work(options, machine, weights, files)
    if num_bad:
        raise DataError(f"{num_bad} of {len(files)} image(s) could not be read")


# ---- settle
def list_images(given: Sequence[str]) -> list[str]:
    """Files, the images of folders, and what patterns match; each once."""
    found: list[str] = []
    for word in map(os.path.expanduser, given):
        if os.path.isdir(word):
            inside, others = images_below(Path(word))
            if not inside:
                known = f"known suffixes: {' '.join(IMAGE_SUFFIXES)}"
                raise DataError(f"IMAGES {word} holds no images{count_files(others)}", known)
        elif os.path.exists(word):
            inside = [word]
        else:
            inside = sorted(filter(os.path.isfile, glob.iglob(word, recursive=True)))
            if not inside:
                raise DataError(f"IMAGES {word} does not exist")
        found += inside
    unique: dict[str, str] = {}
    for path in found:
        unique.setdefault(os.path.abspath(path), path)
    return list(unique.values())


def same_file(one: str, other: str) -> bool:
    """Whether both exist and are one file."""
    return os.path.exists(one) and os.path.samefile(one, other)


def eval_preprocessing(options: Prediction, weights: Weights) -> dict[str, Any]:
    """Image size, crop ratio, mean and std, as `eval` has them for these weights."""
    from spiralrope_cli.core.weights import mean_std

    data = BUILT_IN.get(str(weights.config.get("data")))
    defaults = data.defaults if data else PHOTOGRAPHS
    return {
        "image_size": options.image_size or weights.options["image_size"],
        "crop_ratio": options.crop_ratio or defaults["crop_ratio"],
        "interpolation": "bicubic",
        **mean_std(weights, defaults, weights.options["in_chans"]),
    }


# ---- work
def work(options: Prediction, machine: MachineConfig, weights: Weights, files: list[str]) -> int:
    """Predicts and prints, batch by batch; number of images that could not be read."""
    import torch

    from spiralrope_cli.core.data.augment import Normalise, eval_transform
    from spiralrope_cli.core.data.batches import EVAL_BATCH
    from spiralrope_cli.core.data.image_sets import names_of
    from spiralrope_cli.core.data.loader import BatchIndices, ImageFiles, load
    from spiralrope_cli.core.load import at_size, build_network
    from spiralrope_cli.core.models.factory import cast_matmuls
    from spiralrope_cli.core.runtime import device as devices

    device = devices.pick_device(machine)
    precision, _ = devices.pick_precision(machine.precision, device)
    devices.prepare_device(device, precision)
    how, num_classes = eval_preprocessing(options, weights), weights.options["num_classes"]
    network = build_network(weights, device, **at_size(weights, how["image_size"], options.rope))
    cast_matmuls(network, devices.DTYPES[precision])
    names = names_of(str(weights.config.get("data", "")), num_classes, weights.class_names)
    top_k = options.top_k or min(TOP_K, num_classes)

    transform = eval_transform(how["image_size"], how["crop_ratio"])
    numbered = ImageList.of((file, number) for number, file in enumerate(files))
    images = ImageFiles(numbered, transform, grey=weights.options["in_chans"] == 1)
    normalise = Normalise(how["mean"], how["std"], device)
    starts = range(0, len(files), EVAL_BATCH)
    spans = (list(range(first, min(first + EVAL_BATCH, len(files)))) for first in starts)
    bad: dict[str, str] = {}
    batches = load(images, machine, device, bad, (BatchIndices(span, []) for span in spans))
    about = {
        "source": options.source,
        "weights": "EMA" if weights.ema else "raw",
        "arch": weights.arch,
        "rope": asdict(weights.rope),
        **how,
        "precision": precision,
        "device": device.type,
    }
    num_bad = 0
    sheet: list[tuple[Tensor, Guess]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(contextlib.closing(batches))
        # On a terminal the lines themselves show how far it is.
        bar = counted("images", len(files), shown=not sys.stdout.isatty())
        advance = stack.enter_context(bar)
        show = stack.enter_context(as_json(about) if options.json else as_table(files))
        for batch in batches:
            for path, reason in bad.items():
                say(f"image {path} cannot be read: {reason}")
                show(path, (), reason)
            num_bad += len(bad)
            bad.clear()
            advance(len(batch.at.indices))
            if not len(batch.labels):  # none of these could be read
                continue
            shown = batch.images[: SHEET_IMAGES - len(sheet)].to("cpu", torch.uint8, copy=True)
            for row, guesses in enumerate(best(network, normalise(batch.images), names, top_k)):
                show(files[int(batch.labels[row])], guesses)
                if row < len(shown):
                    sheet.append((shown[row], guesses[0]))
    if options.out and sheet:
        draw_sheet(sheet, options, len(files) - num_bad)
    return num_bad


def best(
    network: nn.Module, images: Tensor, names: Sequence[str], top_k: int
) -> Iterator[list[Guess]]:
    """The most probable classes of each image; raises if an output is not finite."""
    logits = network(images).float()
    if not logits.isfinite().all():
        raise CheckpointError("outputs are not finite", "try --precision fp32, or other weights")
    found = logits.softmax(1).topk(top_k)
    for row in zip(found.indices.tolist(), found.values.tolist(), strict=True):
        yield [Guess(number, names[number], value) for number, value in zip(*row, strict=True)]


# ---- report
Show = Callable[..., None]
"""Called with the path of an image, its classes, and why it cannot be read, if it cannot."""


@contextlib.contextmanager
def as_table(files: Sequence[str]) -> Iterator[Show]:
    """Prints one line per class, and the image before the first."""
    width = min(max(map(len, files)), LONGEST_NAME)

    def show(path: str, guesses: Sequence[Guess], reason: str = "") -> None:
        for place, guess in enumerate(guesses):
            image = "" if place else path
            say_result(f"{image:<{width}}  {guess.probability:6.1%}  {guess.name}")

    yield show


@contextlib.contextmanager
def as_json(about: dict[str, Any]) -> Iterator[Show]:
    """Prints one JSON document, with one line per image."""
    separator = "\n"
    sys.stdout.write(f'{json.dumps(about)[:-1]}, "images": [')

    def show(path: str, guesses: Sequence[Guess], reason: str = "") -> None:
        nonlocal separator
        found = {"error": reason} if reason else {"classes": [asdict(each) for each in guesses]}
        sys.stdout.write(separator + json.dumps({"image": path, **found}, allow_nan=False))
        separator = ",\n"

    yield show
    sys.stdout.write("\n]}\n")  # not after an error


def draw_sheet(sheet: Sequence[tuple[Tensor, Guess]], options: Prediction, count: int) -> None:
    """Writes the contact sheet, with the most probable class below each image."""
    import torch

    from spiralrope_cli.core.plots.curves import save_figure
    from spiralrope_cli.core.plots.images import samples_figure

    images = torch.stack([image for image, _ in sheet]).expand(-1, 3, -1, -1)
    labels = [f"{guess.name} {guess.probability:.0%}" for _, guess in sheet]
    of = f"{len(sheet)} of {count} images" if len(sheet) < count else f"{count} image(s)"
    save_figure(samples_figure(images, labels, f"{options.source}: {of}"), Path(options.out))
    say(f"contact sheet: {options.out}")
