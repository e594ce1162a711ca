"""Training batches from a warm cache, prepared by the program itself and by one or two worker processes.

    python -m benchmarks.loading [image_64 ...] [--clock cpu] [--json FILE]

The time is that of ten epochs, workers started and ended: on the wall, or of the processor, workers included.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from benchmarks.measure import milliseconds, ratio, run
from datasets import DataConfig, load_data
from readers.batches import train_batches
from train import parse_args
from utils import read_flags

BATCH, EPOCHS, WORKERS = 8, 10, (0, 1, 2)
CASES = {   # name: flags of the data
    'image_64': '--dataset phantom --num_phantoms 200',
    'image_256': '--dataset phantom --num_phantoms 200 --image_size 256',
    'volume_64': '--dataset brain_phantom --num_phantoms 20',
    'volume_64_augmented': '--dataset brain_phantom --num_phantoms 20 --augment'}


def epochs(part: Any, clock: str, workers: int) -> float:
    """Seconds of the batches of EPOCHS: on the wall, or of the processor."""
    steps, before, wall = EPOCHS * (len(part) // BATCH), used(), time.perf_counter()
    batches = train_batches(part, BATCH, seed=0, workers=workers)
    for _ in islice(batches, steps):
        pass
    batches.close()                                            # ends the workers, which are counted then
    return time.perf_counter() - wall if clock == 'wall' else used() - before


def used() -> float:
    """Processor time of this process, and of those that it has started and that have ended."""
    return sum(one.ru_utime + one.ru_stime for one in map(
        resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def rows(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in flags.cases:
        with tempfile.TemporaryDirectory() as folder:
            words = [*CASES[case].split(), '--data', folder, '--cache_dir', f'{folder}/cache']
            part = load_data(read_flags(DataConfig, parse_args(words))).train
            cases: dict[str, Callable[[], float]] = {
                f'{workers} workers': partial(epochs, part, flags.clock, workers) for workers in WORKERS}
            taken = [{name: one() for name, one in cases.items()} for _ in range(flags.rounds + 1)][1:]
        seconds = {name: [each[name] for each in taken] for name in cases}
        first, *others = seconds.values()
        yield {'case': case, 'images': EPOCHS * (len(part) // BATCH * BATCH), **milliseconds(seconds),
               **{f'{name} / 0': ratio(other, first) for name, other in zip([*seconds][1:], others)}}


if __name__ == '__main__':
    sys.exit(run(rows, __doc__, CASES))
