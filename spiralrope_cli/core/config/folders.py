"""Folders of ours, by the files in them; and the names of classes.

The names of class folders give the class numbers. Weights carry the names, so that their class
numbers can be compared with those of other data. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from spiralrope_cli.core.errors import ConfigError, DataError

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
CURVES_FILE, REPORT_FILE = "curves.png", "report.html"
SOURCES_FILE, ENVIRONMENT_FILE = "sources.json", "environment.json"
PIPELINE_FILE, SWEEP_FILE, FID_FILE = "pipeline.json", "sweep.json", "fid.json"
EVAL_FILE, SIZES_FILE = "eval.json", "eval-sizes.png"
SAMPLES_FILE, SAMPLES, NPZ_FILE = "samples.png", "samples", "samples.npz"
METADATA_FILE, PART_FILE = "samples.json", "samples.npz.part"
MODEL_FILE, EMA_FILE, TRAINER_FILE = "model.safetensors", "ema.safetensors", "trainer.pt"

# What it is -> files of which it has all, and what takes it. Any folder may have a config.yaml.
MARKS: dict[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    "a folder of samples": (
        ((METADATA_FILE, NPZ_FILE), (METADATA_FILE, PART_FILE)),
        "fid and plot samples take it",
    ),
    "a training run": (
        ((CONFIG_FILE, CHECKPOINTS), (CONFIG_FILE, SOURCES_FILE)),
        "dit-sample samples images from the run of a DiT; eval takes that of a DeiT",
    ),
    "the folder of a pipeline": (
        tuple(
            (PIPELINE_FILE, stage) for stage in ("pretrain", "finetune", "dit-train", "dit-sample")
        ),
        "name a stage in it, such as dit-train or dit-sample",
    ),
    "the folder of a sweep": (((SWEEP_FILE, REPORT_FILE),), "name a run in it"),
    "a folder of latents": ((("00000.safetensors",),), "dit-train --latents takes it"),
}

IMAGENET_CLASSES, IMAGENET_NAME = 1000, re.compile(r"n\d{8}")
"""Published weights carry no names; in such folders their order is right."""


# --- Folders of ours


def own_folder(folder: Path) -> tuple[str, str]:
    """What a folder of ours is, and what takes it; both empty for any other folder."""
    for kind, (marks, hint) in MARKS.items():
        if any(all((folder / name).exists() for name in names) for names in marks):
            return kind, hint
    return "", ""


def refuse_own(folder: Path, given: str) -> None:
    """Refuses a folder of ours that was `given` as a folder of images: it has curves and grids."""
    kind, hint = own_folder(folder)
    if kind and not (folder / "train").is_dir():
        raise DataError(f"{given} is {kind}, not a folder of images", hint)


def nearest_folder(path: Path) -> Path:
    """A path, or its nearest parent that exists."""
    absolute = path.absolute()
    return next(each for each in (absolute, *absolute.parents) if each.exists())


def check_writable(given: str, option: str = "--out", *, folder: bool = False) -> None:
    """Raises if the file or folder that an option names cannot be written; creates nothing."""
    path = Path(given)
    there = nearest_folder(path if folder else path.parent)
    if path.is_dir() and not folder:
        why = "it is a folder"
    elif not there.is_dir():
        why = "it is a file" if there == path.absolute() else f"{there} is a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        why = f"nothing can be written to {there}"
    else:
        return
    raise ConfigError(f"{option} {given} cannot be written: {why}", "choose another")


def samples_in(folder: Path) -> Path:
    """The images of a folder of samples, or of a pipeline that has them; else the folder itself."""
    kind, _ = own_folder(folder)
    drawn = folder / "dit-sample"
    if "pipeline" in kind and drawn.is_dir():
        kind, folder = "samples", drawn
    if "samples" not in kind:
        return folder
    if not (folder / NPZ_FILE).exists():
        raise DataError(f"{folder} is not finished", "the same dit-sample command goes on with it")
    return folder / NPZ_FILE


# --- Class names


def class_difference(before: Sequence[str], now: Sequence[str]) -> str:
    """Which class numbers mean something else; empty where none do, or names are not known."""
    if not (before and now):
        return ""
    if len(before) != len(now):
        return f"{len(before)} classes, now {len(now)}"
    changed = [n for n, (was, name) in enumerate(zip(before, now, strict=True)) if was != name]
    if not changed:
        return ""
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"class {changed[0]} was {before[changed[0]]!r}, now {now[changed[0]]!r}{more}"


def nameless_note(source: str, known: Sequence[str], names: Sequence[str]) -> list[str]:
    """A note where weights do not say which classes they know; `names` are those of the data."""
    imagenet = len(names) == IMAGENET_CLASSES and all(map(IMAGENET_NAME.fullmatch, names))
    if known or imagenet:
        return []
    return [f"{source} has no class names to compare with those of the data"]


def numbering_note(names: Sequence[str]) -> list[str]:
    """A note where class folders are called by numbers that are not those of their classes."""
    if all(name.isdecimal() for name in names):
        for number, name in enumerate(names):
            if int(name) != number:
                return [
                    f"class folders are numbers, and are sorted as text: class {number} is {name!r}"
                ]
    return []
