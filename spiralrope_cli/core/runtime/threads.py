"""Work in threads, some way ahead of who takes the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


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
