"""How many images/s does one core read, decode and augment, beside timm's `create_loader`?

The recipe of `pretrain`, without mixing, on JPEG files of 500x375 that look like photographs to the
decoder. No loader workers: one process with one thread, by its CPU time.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from interleave import CPU, interleaved, median, prepare, ratio, show
from PIL import Image, ImageDraw
from timm.data import ImageDataset, create_loader

from spiralrope_cli.core.data.batches import TrainingData, classifier_data
from spiralrope_cli.core.resolve import resolve

WIDTH, HEIGHT, QUALITY = 500, 375, 90
NUM_IMAGES, BATCH, ROUNDS = 256, 64, 9
CLASSES = ("n01440764", "n01443537")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def photograph(seed: int) -> Image.Image:
    """Noise at all scales, as clouds, with sensor noise and a few sharp edges."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32) + generator.uniform(60, 180, 3)
    for cells in (2, 4, 8, 16, 32, 64, 128):
        coarse = generator.integers(0, 256, (cells * 3 // 4 + 1, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels += (np.asarray(smooth, np.float32) - 128) * 1.2 / cells**0.55
    pixels += generator.normal(0, 4, (HEIGHT, WIDTH, 1))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for _ in range(6):
        x, y, radius = (int(generator.integers(*ends)) for ends in ((WIDTH,), (HEIGHT,), (10, 80)))
        color = tuple(generator.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return image


def draw_images(root: Path) -> float:
    """Writes class folders; mean size of a file in kB."""
    sizes = []
    for split, count in (("train", NUM_IMAGES), ("val", len(CLASSES))):
        for number in range(count):
            path = root / split / CLASSES[number % len(CLASSES)] / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(number).save(path, "JPEG", quality=QUALITY)
            sizes.append(path.stat().st_size)
    return sum(sizes) / len(sizes) / 1000


def our_data(root: Path, augment_on: str) -> TrainingData:
    given = {"data": str(root), "out": str(root / "run"), "workers": 0, "augment_on": augment_on}
    given |= {"batch_size": BATCH, "micro_batch_size": BATCH, "mixup": 0.0, "cutmix": 0.0}
    run = resolve("pretrain", given).run
    return classifier_data(run, CPU, 0, 1, {})


def timm_loader(root: Path) -> object:
    return create_loader(
        ImageDataset(root / "train"),
        (3, 224, 224),
        BATCH,
        is_training=True,
        scale=(0.08, 1.0),
        color_jitter=0.3,
        auto_augment="3a",
        interpolation="bicubic",
        num_workers=0,
        device=CPU,
    )


def timed(batches: Iterator[object]) -> Callable[[], None]:
    """The next batches, as many as an epoch has."""
    return lambda: [None for _ in itertools.islice(batches, NUM_IMAGES // BATCH)] and None


def time_device(data: TrainingData) -> None:
    """What is left for the device: augmentation and normalisation of batches that are there."""
    [at] = data.batch_indices(0, 1)
    [batch] = data.read([at])
    batch = batch.on(DEVICE)

    def finish() -> None:
        data.finish(replace(batch, images=batch.images.clone()))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    seconds = median(interleaved({"device": finish}, ROUNDS)["device"])
    title = "the device's part of it" + (", on one core" if DEVICE == CPU else "")
    show(f"{title}, {DEVICE.type}", [("ours", f"{BATCH / seconds:.0f} images/s")])


def main() -> None:
    prepare()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kilobytes = draw_images(root)
        theirs, on_cpu, on_device = (
            timm_loader(root),
            our_data(root, "cpu"),
            our_data(root, "device"),
        )
        last = 1 + 2 * ROUNDS * NUM_IMAGES // BATCH
        steps = on_device.batch_indices(0, last)
        sides = {
            "timm, whole": timed(itertools.chain.from_iterable(itertools.repeat(theirs))),
            "ours, whole": timed(on_cpu.train_steps(0, last)),
            # What the workers do if the rest is done on a GPU: timm normalises there, and erases.
            "timm, workers": timed(itertools.chain.from_iterable(itertools.repeat(theirs.loader))),
            "ours, workers": timed(on_device.read(steps)),
        }
        seconds = interleaved(sides, ROUNDS, clock=time.process_time)
        rows = [
            (name, f"{NUM_IMAGES / median(each):.0f} images/s") for name, each in seconds.items()
        ]
        for what, part in (("on a CPU alone", "whole"), ("with a GPU", "workers")):
            faster = 1 / ratio(seconds, f"ours, {part}", f"timm, {part}")
            rows.append((f"RATIO ours / timm, {what}", f"{faster:.2f}"))
        show(f"one core, {WIDTH}x{HEIGHT} JPEG of {kilobytes:.0f} kB, DeiT's recipe", rows)
        time_device(our_data(root, "device"))


if __name__ == "__main__":
    main()
