"""The lists of labels beside a flat `val/` of ImageNet, and reading one in an archive."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from spiralrope_cli.core.errors import DataError

LABEL_FILES = ("val.txt", "LOC_val_solution.csv")
DEVKIT = "ILSVRC2012_devkit_t12"
KIT_FILES = ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")
DAMAGED = (
    *(ValueError, LookupError, TypeError, AttributeError, EOFError),
    *(gzip.BadGzipFile, zlib.error, tarfile.TarError),
)
"""What reading a list of another form or a cut archive raises."""


def unpacked(path: Path, name: str) -> bytes:
    """A file of an archive that was downloaded and not unpacked."""
    with tarfile.open(path) as tar:
        file = tar.extractfile(name)
        return file.read() if file else b""


def labels_beside(path: Path) -> tuple[Path | None, dict[str, str]]:
    """The list of labels beside or in `path`, and name of a file without suffix -> its class."""
    places = (path.parent, path)
    for listed in (place / name for place in places for name in LABEL_FILES):
        if listed.is_file():
            lines = re.findall(r"^(\S+?)[\s,]+(\w+)", listed.read_text(), re.MULTILINE)
            return listed, {Path(name).stem: label for name, label in lines}
    for kit in (*places, path.parent / DEVKIT / "data"):
        if all((kit / name).is_file() for name in KIT_FILES):
            return kit / KIT_FILES[0], _of_kit(kit, lambda kit, name: (kit / name).read_bytes())
    if (kit := path.parent / f"{DEVKIT}.tar.gz").is_file():
        return kit, _of_kit(kit, lambda kit, name: unpacked(kit, f"{DEVKIT}/data/{name}"))
    return None, {}


def _of_kit(kit: Path, read: Callable[[Path, str], bytes]) -> dict[str, str]:
    """Labels of the development kit, whose class numbers are not in the order of their names."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        truth, meta = (read(kit, name) for name in KIT_FILES)
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        names = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        return {
            f"ILSVRC2012_val_{place:08d}": names[int(number)]
            for place, number in enumerate(truth.split(), 1)
        }
    except (*DAMAGED, OSError, MatReadError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{kit} is not ImageNet's development kit: {reason}") from error
