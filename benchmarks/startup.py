"""Starts of the programs: help, a mistake, the first step of a training, in processes of their own.

    python -m benchmarks.startup [help ...] [--clock cpu] [--json FILE]

The baseline is Python with PyTorch, which no training can do without: `imports` it takes, in the same order.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.measure import milliseconds, ratio, run

TINY = '''--arch_instance res_bnswish --num_groups_per_scale 1 --num_channels_enc 4 --num_channels_dec 4
    --batch_size 4 --max_steps 1 --epochs 1 --image_every 0 --device cpu --num_threads 1'''
CASES = {   # name: command
    'help': 'train.py --help', 'evaluate_help': 'evaluate.py --help',
    'mistake': 'train.py --bach_size 4',
    'dry_run': f'train.py --dry_run --dataset mnist {TINY}',
    'phantom': f'train.py --dataset phantom --num_phantoms 64 --data {{folder}} '
               f'--root {{folder}} {TINY}'}
BASELINE = ['-c', 'import torch']


def started(words: list[str], clock: str) -> Callable[[], float]:
    """Seconds of a process that runs Python with these words: on the wall, or of the processor."""
    def start() -> float:
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter() - wall if clock == 'wall' else \
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return start


def rows(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in flags.cases:
        with tempfile.TemporaryDirectory() as folder:
            words = CASES[case].format(folder=folder).split()
            starts = {'start': started(words, flags.clock), 'imports': started(BASELINE, flags.clock)}
            taken = [{name: start() for name, start in starts.items()} for _ in range(flags.rounds + 1)][1:]
        seconds = {name: [each[name] for each in taken] for name in starts}
        yield {'case': case, **milliseconds(seconds),
               'of imports': ratio(seconds['start'], seconds['imports'])}


if __name__ == '__main__':
    sys.exit(run(rows, __doc__, CASES))
