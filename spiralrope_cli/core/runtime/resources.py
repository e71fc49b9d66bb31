"""Free memory, of the machine and of its container or job, and free disk space."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from pathlib import Path

from spiralrope_cli.core.config.folders import nearest_folder
from spiralrope_cli.core.errors import DiskError, SpiralRopeError
from spiralrope_cli.core.runtime.progress import human_size

CGROUPS = Path("/sys/fs/cgroup")
LIMIT_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of a control group of version 2 and of version 1: limit, use, and cached files in this use."""


def check_memory(needed: int, what: str) -> None:
    """Raises if there is too little free memory, where Linux tells how much there is."""
    if needed > (free := free_memory()):
        raise SpiralRopeError(
            f"{human_size(free)} of memory are free, and about {human_size(needed)} are needed for "
            f"{what}",
            "use fewer of them, or smaller ones",
        )


def free_memory() -> float:
    """Bytes, infinite if unknown."""
    free = math.inf
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()):
            free = 1024 * int(found[1])
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for kind in {*controllers.split(",")} & LIMIT_FILES.keys():
                # In a container the path may be that of the host; the limit is then at the root.
                group = CGROUPS / kind / path.strip("/")
                above = (group, *group.parents)[: len(Path(path).parts)]
                free = min(free, *(_left(each, *LIMIT_FILES[kind]) for each in above))
    return free


def _left(group: Path, limit: str, used: str, cached: str) -> float:
    """Bytes below the limit of a control group; cached files are dropped when it is reached."""
    try:
        most, now = int((group / limit).read_text()), int((group / used).read_text())
        found = re.search(rf"^{cached} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # none, or the word max
        return math.inf
    return max(0, most - now + (int(found[1]) if found else 0))


def check_space(*needs: tuple[Path, int], what: str, hint: str) -> None:
    """Raises if the disks have too little space for these (folder, bytes)."""
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
