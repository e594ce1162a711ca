"""How far a loop has come: a bar in a terminal, a line a minute in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from distributed import launch

MINUTE = 60.0               # seconds between two lines of a log
T = TypeVar('T')


def progress(items: Iterable[T], title: str, total: int, unit: str = 'batch') -> Iterator[T]:
    """The items, of which there are `total`; the main process shows on standard error how many are done."""
    if not launch.is_main():
        yield from items
    elif sys.stderr.isatty():
        from tqdm import tqdm
        yield from tqdm(items, title, total, unit=unit, leave=False)
    else:
        told = time.monotonic()
        for number, item in enumerate(items, 1):
            yield item
            if is_due(told):
                told = time.monotonic()
                print(f'{title}: {unit} {number:,} of {total:,}', file=sys.stderr, flush=True)


def is_due(told: float) -> bool:
    """Whether a log should hear again, to which something was told at this time of time.monotonic()."""
    return time.monotonic() - told >= MINUTE
