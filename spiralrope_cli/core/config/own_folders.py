"""Folders that this package wrote, recognised where another command gets them.

Images in a run folder are curves and grids, not a data set. Standard library only.
"""

from __future__ import annotations

from pathlib import Path

from spiralrope_cli.core.errors import DataError

# What it is -> files of which it has all, and what takes it. Any folder may have a config.yaml.
MARKS: dict[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    "a folder of samples": (
        (("samples.json", "samples.npz"), ("samples.json", "samples.npz.part")),
        "fid and plot samples take it",
    ),
    "a training run": (
        (("config.yaml", "checkpoints"), ("config.yaml", "sources.json")),
        "dit-sample draws images from the run of a DiT; eval takes that of a DeiT",
    ),
    "the folder of a pipeline": (
        tuple(
            ("pipeline.json", stage)
            for stage in ("pretrain", "finetune", "dit-train", "dit-sample")
        ),
        "name a stage in it, such as dit-train or dit-sample",
    ),
    "the folder of a sweep": ((("sweep.json", "report.html"),), "name a run in it"),
    "a folder of latents": ((("00000.safetensors",),), "dit-train --latents takes it"),
}


def own_folder(folder: Path) -> tuple[str, str]:
    """What a folder of ours is, and what takes it; both empty for any other folder."""
    for kind, (marks, hint) in MARKS.items():
        if any(all((folder / name).exists() for name in names) for names in marks):
            return kind, hint
    return "", ""


def refuse_own(folder: Path, given: str) -> None:
    """Refuses a folder of ours that was `given` as a folder of images.

    Raises:
        DataError: says what it is and what takes it.
    """
    kind, hint = own_folder(folder)
    if kind and not (folder / "train").is_dir():
        raise DataError(f"{given} is {kind}, not a folder of images", hint)


def samples_in(folder: Path) -> Path:
    """The images of a folder of samples, or of a pipeline that has them; else the folder itself."""
    kind, _ = own_folder(folder)
    drawn = folder / "dit-sample"
    if "pipeline" in kind and drawn.is_dir():
        kind, folder = "samples", drawn
    if "samples" not in kind:
        return folder
    if not (folder / "samples.npz").exists():
        raise DataError(f"{folder} is not finished", "the same dit-sample command goes on with it")
    return folder / "samples.npz"
