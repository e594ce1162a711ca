"""Work on several cores, by threads: decoding, hashing and resizing release Python's lock.

Threads are safe beside CUDA, in spawned ranks and in notebooks, where new processes are not.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from distributed.progress import progress
from readers.source import Unreadable

AHEAD = 4                # results per thread that wait in memory
S = TypeVar('S')
T = TypeVar('T')


def cores() -> int:
    """The processor cores that this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)


def in_order(work: Callable[[S], T], items: Iterable[S], threads: int = 0) -> Iterator[T | str]:
    """What `work` makes of each item, or the reason if it raised Unreadable: in order, a few ahead.

    `threads` 0 = one per core.
    """
    from PIL import Image

    def attempt(item: S) -> T | str:
        try:
            return work(item)
        except Unreadable as error:
            return str(error)

    threads = threads or cores()
    Image.init()                                 # load all decoders before threads ask for them at once
    waiting: deque[Future] = deque()
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter('ignore')          # Pillow warns of odd metadata and of large images
        for item in items:
            waiting.append(pool.submit(attempt, item))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def attempt(work: Callable[[S], T], items: Sequence[S], title: str, threads: int = 0) -> list[T | str]:
    """All of `in_order`, which says how far it is."""
    return list(progress(in_order(work, items, threads), title, len(items), 'item'))
