"""Work in threads, some way ahead of who takes the results."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not tell which cores a process may use.


def cores_per_process() -> int:
    """This process's share of the cores, beside the others of this machine's job."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def in_order(
    tasks: Iterable[Callable[[], T]],
    threads: int,
    depth: int,
    prepare: Callable[[], object] | None = None,
) -> Generator[T, None, None]:
    """The tasks' results in their order; who stops early should close it.

    Args:
        tasks: what to call; taken one by one, in this thread.
        threads: how many are called at the same time.
        depth: how many results may wait, at most.
        prepare: called once in every thread, before its first task.
    """
    with ThreadPoolExecutor(threads, "spiralrope", prepare) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
