"""What a disk can hold, asked before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from spiralrope_cli.core.errors import DiskError


def human_size(size: float) -> str:
    """Bytes in decimal units, as download pages show them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3f} TB" if size < 10 else f"{size:,.0f} TB"


def nearest_folder(path: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    absolute = path.absolute()
    return next(each for each in (absolute, *absolute.parents) if each.exists())


def check_space(*needs: tuple[Path, int], what: str, hint: str) -> None:
    """Refuses what the disks cannot hold.

    Args:
        needs: folders, there or not yet, and the bytes that each is to take.
        what: they are needed for.
        hint: what to do about it.

    Raises:
        DiskError: says where too little is free.
    """
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        there = nearest_folder(folder)
        disk = there.stat().st_dev
        by_disk[disk] = (there, by_disk.get(disk, (there, 0))[1] + size)
    for folder, size in by_disk.values():
        if size > (free := shutil.disk_usage(folder).free):
            raise DiskError(
                f"{folder} has {human_size(free)} free, and {human_size(size)} are needed "
                f"for {what}",
                hint,
            )
