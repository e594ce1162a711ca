"""Clocks, memory and tables of the benchmarks.

What is compared is measured in one process by turns, so that whatever else the machine does falls on both.
Every time is a median over rounds, with the lowest and the highest beside it.
"""

import argparse
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed import launch
from distributed.launch import LaunchConfig
from utils import write_json

CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
MB = 2 ** 20


def alternate(steps: Mapping[str, Callable[[], object]], rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each step, by turns, `rounds` times after one that does not count."""
    now, seconds = CLOCKS[clock], {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            synchronize()
            start = now()
            step()
            synchronize()
            if number:
                seconds[name].append(now() - start)
    return seconds


def synchronize() -> None:
    if launch.device().type == 'cuda':
        torch.cuda.synchronize()


def peak_memory(step: Callable[[], object]) -> float:
    """MB that a step takes at most beyond what is there before it; nan where the system does not tell."""
    if launch.device().type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MB
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')                     # sets the peak to what there is
        before = _status('VmRSS')
        step()
        return (_status('VmHWM') - before) / MB
    except (OSError, AttributeError):
        return float('nan')


def _status(name: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f'{name}:')))


def milliseconds(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Columns of a table: the medians, and of the first step the lowest and the highest."""
    first, *others = seconds
    low, middle, high = (1000 * f(seconds[first]) for f in (min, statistics.median, max))
    return {f'{first} ms': middle, 'from': low, 'to': high,
            **{f'{name} ms': 1000 * statistics.median(seconds[name]) for name in others}}


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two times that were measured in turn."""
    return statistics.median(a / b for a, b in zip(of, to))


def compared(steps: Mapping[str, Callable[[], Tensor]], flags: argparse.Namespace) -> dict[str, float]:
    """Columns of a table for ours and the plain way to compute the same numbers."""
    ours, plain = (steps[name]().double() for name in ('ours', 'plain'))
    seconds = alternate(steps, flags.rounds, flags.clock)
    return {**milliseconds(seconds), 'speedup': ratio(seconds['plain'], seconds['ours']),
            **{f'{name} MB': peak_memory(step) for name, step in steps.items()},
            'difference': float((ours - plain).abs().max())}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([show(row.get(name, '')) for name in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return '\n'.join('  '.join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))) for row in cells)


def show(value: Any) -> str:
    return f'{value:.3g}' if isinstance(value, float) and abs(value) < 100 else \
        f'{value:.0f}' if isinstance(value, float) else str(value)


def run(rows: Callable[[argparse.Namespace], Iterable[dict[str, Any]]], about: str,
        choices: Iterable[str], argv: Sequence[str] | None = None,
        draw: Callable[[Sequence[dict[str, Any]], str], None] | None = None) -> int:
    """The program of a benchmark: reads the flags, prints the table of `rows(flags)` and writes it as JSON.

    `choices` name the cases, all of which are measured if none is named. `draw(rows, file)` makes a figure.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('cases', nargs='*', help=f'some of {", ".join(choices)}')
    parser.add_argument('--rounds', type=int, default=5, help='measurements of each')
    parser.add_argument('--clock', choices=CLOCKS, default='wall',
                        help='cpu = time of this process, which other load hardly changes; for one thread')
    parser.add_argument('--num_threads', type=int, default=1, help='threads of a process')
    parser.add_argument('--device', default='auto', help='cpu, cuda or auto')
    parser.add_argument('--json', default='', help='also write the rows to this file')
    if draw:
        parser.add_argument('--figure', default='', help='also draw the rows to this file, such as x.svg')
    flags = parser.parse_args(argv)
    if unknown := set(flags.cases) - set(choices):
        parser.error(f'{", ".join(sorted(unknown))}: known are {", ".join(choices)}')
    flags.cases = flags.cases or list(choices)
    return launch.launch(partial(_run, rows, draw), flags,
                         LaunchConfig(device=flags.device, num_threads=flags.num_threads))


def _run(rows: Callable[[argparse.Namespace], Iterable[dict[str, Any]]], draw: Callable | None,
         flags: argparse.Namespace) -> int:
    where = (f'{launch.device().type}, {torch.get_num_threads()} thread(s), {processor()}, '
             f'torch {torch.__version__}')
    print(f'{where}; median of {flags.rounds}, {flags.clock} time', flush=True)
    found = []
    for row in rows(flags):
        print(*(f'{name} {show(value)}' for name, value in row.items()), file=sys.stderr, flush=True)
        found.append(row)
    print(table(found))
    if flags.json:
        write_json(flags.json, {'machine': where, 'clock': flags.clock, 'rows': found})
    if draw and flags.figure:
        draw(found, flags.figure)
    return 0


def processor() -> str:
    if launch.device().type == 'cuda':
        return torch.cuda.get_device_name()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.partition(': ')[2] for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor()
