"""`plot run`, `rope`, `attention` and `samples`: settle, draw, print the path.

Modules that load torch are imported inside functions, so that curves and usage errors are fast.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.config.datasets import PHOTOGRAPHS
from spiralrope_cli.core.config.models import RopeConfig, check_rotate, given_rope, is_dit, size_of
from spiralrope_cli.core.config.option import build, idle_lines
from spiralrope_cli.core.config.plots import (
    DEIT_GRID,
    DIT_LATENT,
    ROPE_PANELS,
    AttentionPlot,
    RopePlot,
    RunPlot,
    SamplesPlot,
)
from spiralrope_cli.core.config.runs import check_divides
from spiralrope_cli.core.config.training import RUNS_FOLDER
from spiralrope_cli.core.errors import CheckpointError, ConfigError, DataError
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.plots.curves import curves_figure, save_figure
from spiralrope_cli.core.runtime.launch import check_memory, say_notes
from spiralrope_cli.core.runtime.progress import METRICS_FILE, say, say_result
from spiralrope_cli.core.runtime.run_folder import find_run, run_configs

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

    from spiralrope_cli.core.data.image_sets import ImageInput
    from spiralrope_cli.core.weights import Weights


DRAWN_BYTES = 40
"""Bytes of memory per byte of a grid, most of them matplotlib's."""


def report(figure: Figure, path: Path) -> None:
    """Writes the figure, and prints its path."""
    save_figure(figure, path)
    say_result(str(path))


# ---- plot run
def draw_run(given: dict[str, Any]) -> None:
    """Loss, accuracy or bound, learning rate and speed of training runs."""
    plot: RunPlot = build(RunPlot, given)
    # The folder of a pipeline or a sweep stands for the runs in it.
    named = []
    for folder in map(find_run, plot.runs):
        inside = [config.parent for config in sorted(run_configs(folder))]
        logged = [each for each in inside if (each / METRICS_FILE).is_file()]
        named += [folder] if (folder / METRICS_FILE).is_file() else logged or [folder]
    named = list(dict.fromkeys(named))
    folders = [folder for folder in named if (folder / METRICS_FILE).is_file()] or named
    skipped = [folder for folder in named if folder not in folders]
    say_notes(f"{folder} is skipped: it has no {METRICS_FILE}" for folder in skipped)
    more = f"-and-{len(folders) - 1}-more" if len(folders) > 1 else ""
    report(curves_figure(folders, plot.over), plot.named(f"run-{folders[0].resolve().name}{more}"))


# ---- plot rope
def draw_rope(given: dict[str, Any]) -> None:
    """Directions, frequencies, clamped positions and scores."""
    weights = weights_of_rope(given) if "source" in given else None
    plot, notes = settle_rope(given, weights)
    say_notes(notes)

    from spiralrope_cli.core.plots.rope import rope_figure
    from spiralrope_cli.core.rope import change_from_axial

    freqs = mixed_frequencies(plot, weights) if plot.ropes[0].mixed else None
    for rope in plot.ropes:
        if rope.rotate > 1:
            change = change_from_axial(plot.grid, plot.head_dim, rope, plot.pretrain_grid)
            say(f"rotate {rope.rotate} changes queries by {change:.1%} against axial RoPE")
    name = "rope-" + "-".join(rope.name.replace("rotate ", "r") for rope in plot.ropes)
    report(rope_figure(plot, freqs), plot.named(name))


def weights_of_rope(given: dict[str, Any]) -> Weights:
    """The weights of SOURCE, which must have a rotary embedding."""
    from spiralrope_cli.core.weights import read_weights

    for name, word in (("rotates", "--rotate"), ("head_dim", "--head-dim")):
        if name in given:
            raise ConfigError(f"{word} and SOURCE exclude each other", "leave one of them out")
    source = find_source(given["source"])
    weights = read_weights(source, rope=given_rope(given), arch=given.get("arch", ""))
    if not weights.rope.enabled:
        raise ConfigError(f"{source.given} was trained without RoPE", "name other weights")
    return weights


def settle_rope(given: dict[str, Any], weights: Weights | None) -> tuple[RopePlot, list[str]]:
    """The config, and a note for each given option that has no effect in any row."""
    chosen, arch, notes = given_rope(given), given.get("arch", RopePlot.arch), []
    rotates = dict.fromkeys(given.get("rotates", RopePlot.rotates))
    kind = chosen.get("rope_kind", RopeConfig.rope_kind)
    for rotate in given.get("rotates", ()):
        check_rotate({"rotate": rotate}, kind)
    if kind != "spiral":
        rotates = {0: None}
    ropes = tuple(dict.fromkeys(RopeConfig(**{"rotate": each, **chosen}) for each in rotates))
    if weights:
        from spiralrope_cli.core.load import network_on_meta

        arch, ropes, notes = weights.arch, (weights.rope,), [*weights.notes]
    size = size_of(arch)
    side = max(1, DIT_LATENT // size.patch_size) if is_dit(arch) else DEIT_GRID
    own = network_on_meta(weights).grid if weights else (side, side)
    grid = given.get("grid", own)
    trained = weights.options.get("pretrain_grid") or own if weights else grid
    values = {
        "head_dim": size.head_dim,
        "grid": grid,
        "pretrain_grid": trained,
        **given,
        "arch": arch,
    }
    possible = [panel for panel in ROPE_PANELS if panel != "clamp" or not ropes[0].mixed]
    panels = tuple(dict.fromkeys(given.get("panels", possible)))
    if not {*panels} <= {*possible}:
        raise ConfigError("--show clamp: RoPE-Mixed clamps no position", "leave it out")
    plot: RopePlot = build(RopePlot, {**values, "ropes": ropes, "panels": panels})
    inert = [dict(rope.inert_options({*chosen})) for rope in plot.ropes]
    idle = {name: why for name, why in inert[0].items() if all(name in row for row in inert)}
    if "scaling" in chosen and plot.grid == plot.pretrain_grid:
        idle["scaling"] = "--grid and --pretrain-grid are equal"
    if "layer" in given and not ropes[0].mixed:
        notes.append("--layer has no effect: only --rope-kind mixed differs between layers")
    return plot, [*notes, *idle_lines(RopeConfig, idle.items(), {*chosen})]


def mixed_frequencies(plot: RopePlot, weights: Weights | None) -> Tensor:
    """[2, H, D/2] learned frequencies of a layer; without weights those of a new network."""
    import torch

    from spiralrope_cli.core.infer import MIXED_FREQS
    from spiralrope_cli.core.rope import first_mixed_frequencies

    size = size_of(plot.arch)
    if plot.layer >= size.depth:
        raise ConfigError(f"--layer {plot.layer}: {plot.arch} has layers 0 to {size.depth - 1}")
    torch.manual_seed(0)
    first = first_mixed_frequencies(plot.head_dim, size.depth, size.heads)
    freqs = weights.state[MIXED_FREQS].double() if weights else first
    return freqs[:, plot.layer]


# ---- plot attention
def draw_attention(given: dict[str, Any]) -> None:
    """Attention maps of one query token of a DeiT, one per head."""
    plot: AttentionPlot = build(AttentionPlot, {**given, "rope": given_rope(given)})
    path = plot.named(f"attention-{Path(plot.source).resolve().stem}-{Path(plot.image).stem}")
    if path.resolve() == Path(plot.image).resolve():
        raise ConfigError(f"--out {plot.out} is IMAGE itself", "choose another --out")
    source = find_source(plot.source, best=plot.best)

    from spiralrope_cli.core.load import at_size, build_network
    from spiralrope_cli.core.plots.images import attention_figure, attention_from
    from spiralrope_cli.core.weights import fetch_source, read_weights

    source = fetch_source(source)
    weights = read_weights(source, ema=plot.ema, rope=plot.rope, arch=plot.arch, dit=False)
    say_notes(weights.notes)
    size, side = plot.image_size or weights.options["image_size"], weights.options["patch_size"]
    check_divides(size, side)
    shape, grid = size_of(weights.arch), (size[0] // side, size[1] // side)
    plot.check_fits(shape.depth, shape.heads, grid)
    image, batch = read_image(plot.image, weights, size)

    layers, heads = plot.layers or (shape.depth - 1,), plot.heads or tuple(range(shape.heads))
    token, where = 0, "the class token"
    if plot.patch is not None:
        row, column = plot.patch
        token, where = 1 + row * grid[1] + column, f"the patch in row {row}, column {column}"
    model = build_network(weights, **at_size(weights, size, plot.rope))
    maps = attention_from(model, batch, token, layers)[:, 0, list(heads)]
    if not maps.isfinite().all():
        raise CheckpointError(f"attention of {source.given} is not finite", "use other weights")
    figure = attention_figure(
        image,
        maps.numpy(),
        grid=grid,
        layers=layers,
        heads=heads,
        patch=plot.patch,
        title=f"{weights.arch}: attention from {where}",
    )
    report(figure, path)


def read_image(file: str, weights: Weights, size: tuple[int, int]) -> tuple[np.ndarray, Tensor]:
    """An image, resized and cropped as in `eval`: to draw, and as input of the network.

    Returns:
        [height, width] or [height, width, 3] uint8, and [1, channels, height, width].
    """
    import torch

    from spiralrope_cli.core.data.augment import eval_transform
    from spiralrope_cli.core.data.loader import ImageFiles
    from spiralrope_cli.core.weights import mean_std

    channels = weights.options["in_chans"]
    files = ImageFiles([(file, 0)], eval_transform(size, 1.0), grey=channels == 1)
    pixels, _, unreadable, _ = files[0, None]
    if pixels is None:
        raise DataError(f"IMAGE {file} cannot be read: {unreadable[0].reason}")
    known = mean_std(weights, PHOTOGRAPHS, channels)
    mean, std = (torch.tensor(known[name]).view(-1, 1, 1) for name in ("mean", "std"))
    batch = (torch.from_numpy(pixels.copy()).float() / 255 - mean) / std
    return pixels[0] if channels == 1 else pixels.transpose(1, 2, 0), batch[None]


# ---- plot samples
def draw_grid(given: dict[str, Any]) -> None:
    """A grid of the first images of a set, with their classes if known."""
    plot: SamplesPlot = build(SamplesPlot, given)

    import torch

    from spiralrope_cli.core.data.image_sets import images_in
    from spiralrope_cli.core.data.images import image_batches, num_bytes
    from spiralrope_cli.core.plots.images import fit_to_size, samples_figure

    images = images_in(find_images(plot.source), "SOURCE")
    part = range(min(plot.num_samples, len(images)))
    # Each is drawn in the size of the first.
    drawn = max(num_bytes(images, part), len(part) * num_bytes(images, part[:1]))
    check_memory(DRAWN_BYTES * drawn, f"{len(part)} images of {plot.source}")
    pixels: dict[int, Tensor] = {}
    for batch in image_batches(images, part, len(part)):
        for unreadable in batch.unreadable:
            raise DataError(f"image {unreadable.path} cannot be read: {unreadable.reason}")
        decoded = (image for group in batch.groups for image in group)
        pixels.update(zip(batch.numbers, decoded, strict=True))
    height, width = pixels[0].shape[1:]
    shown = torch.stack([fit_to_size(pixels[number], (height, width)) for number in part])
    labels = labels_of(images, part) if plot.labels else []
    title = f"{plot.source}: {len(part)} of {len(images)} images"
    figure = samples_figure(shown, labels, title, plot.columns or None)
    report(figure, plot.named(f"samples-{Path(plot.source).resolve().stem}"))


def find_images(given: str) -> Path:
    """The `.npz` or folder of images of SOURCE."""
    path = Path(os.path.expanduser(given))
    if not path.exists() and path.suffix != ".npz":
        try:
            path = find_run(given)
        except CheckpointError as error:
            message = f"{given} is not an .npz, a folder of images or a run in {RUNS_FOLDER}/"
            raise CheckpointError(message, error.hint) from error
    return path


def labels_of(images: ImageInput, part: range) -> list[str]:
    """The class name of each image; empty if the classes are unknown."""
    from spiralrope_cli.core.data.image_sets import NpzImages
    from spiralrope_cli.core.data.listing import place_in
    from spiralrope_cli.core.data.npz import read_headers, stream_rows
    from spiralrope_cli.core.data.sample_files import npz_metadata, sample_labels

    if not isinstance(images, NpzImages):
        inside = [Path(place_in(images.path, images.files[number])).parts for number in part]
        return [parts[0] for parts in inside] if all(len(parts) > 1 for parts in inside) else []
    metadata = npz_metadata(images.path)
    if metadata.get("classes") or metadata.get("num_classes"):
        return sample_labels(metadata, part)
    # ADM's script stores labels as arr_1.
    header = read_headers(images.path).get("arr_1")
    if header is None or header.dtype.kind not in "iu" or header.shape != (len(images),):
        return []
    return list(map(str, next(stream_rows(images.path, "arr_1", header, part, len(part)))))
