"""The log of a run folder: log.txt, metrics.jsonl, events for TensorBoard. A full disk is waited for."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import finite, naming_file, read_line, write_atomically

if TYPE_CHECKING:       # PyTorch is imported where it is used: a program answers --help without it
    import torch

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
WAIT_FOR_ROOM, ROOM_PAUSE = 300.0, 2.0           # seconds; shorter than other processes wait (--timeout)


def with_room(write: Callable[[], None]) -> None:
    """Calls `write`, and again while the disk is full, for WAIT_FOR_ROOM seconds at most."""
    until, told = time.monotonic() + WAIT_FOR_ROOM, False
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in NO_ROOM or time.monotonic() > until:
                raise
            if not told:
                print(f'WARNING: {error.filename}: {error.strerror}. Make room there: this is '
                      f'tried again for {WAIT_FOR_ROOM:.0f} s.', file=sys.stderr)
            told = True
            time.sleep(min(ROOM_PAUSE, WAIT_FOR_ROOM))


def append(path: Path, text: str) -> None:
    """Adds text to the end of a file: all of it, or nothing if the disk is full."""
    data = text.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        with naming_file(path):
            if os.write(descriptor, data) < len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


class RunLog:
    """log.txt, metrics.jsonl and TensorBoard events of a run folder; silent where not `active` (rank > 0)."""

    def __init__(self, folder: str | Path, active: bool = True, tensorboard: bool = True, step: int = 0):
        """`step` steps are done: what a killed run wrote beyond them, and will write again, is dropped.

        `logged` are the tags that it wrote of that step.
        """
        self.folder, self.active, self.writer, self.logged = Path(folder), active, None, set()
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.forget_after(step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def forget_after(self, step: int) -> None:
        """Drops from metrics.jsonl what was written beyond a step, and lines that are damaged: where there
        are any but the last, which a kill cuts off, the file is kept as metrics.jsonl.damaged.
        """
        path = self.folder / 'metrics.jsonl'
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        read = [read_line(line) for line in lines]
        kept = [line for line, values in zip(lines, read) if values and values['step'] <= step]
        self.logged = set().union(*(values for values in read if values and values['step'] == step))
        if damaged := read[:-1].count(None):
            copy = path.with_name(f'{path.name}.damaged')
            write_atomically(copy, lambda p: p.write_bytes(b''.join(lines)))
            self.say(f'{damaged} damaged lines are left out of {path}; the file as it was is kept as {copy}')
        if len(kept) < len(lines):
            write_atomically(path, lambda p: p.write_bytes(b''.join(kept)))

    def say(self, line: str) -> None:
        """Prints a line, and keeps it in log.txt with the time."""
        if not self.active:
            return
        from tqdm import tqdm
        line = line.encode(errors='backslashreplace').decode()          # of file names that are no UTF-8
        with contextlib.suppress(OSError):                              # output to a full disk
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        with_room(lambda: append(self.folder / 'log.txt', f'{time.strftime("%Y-%m-%d %H:%M:%S")} {line}\n'))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Appends one JSON line to metrics.jsonl and a scalar per value to TensorBoard."""
        if not self.active:
            return
        text = json.dumps({'step': step, 'time': round(time.time(), 3), **finite(values)}) + '\n'
        with_room(lambda: append(self.folder / 'metrics.jsonl', text))
        self.show(lambda writer: [writer.add_scalar(tag, value, step) for tag, value in values.items()])

    def image(self, step: int, tag: str, grid: torch.Tensor) -> None:
        """Shows an image (C, H, W) in [0, 1] in TensorBoard."""
        self.show(lambda writer: writer.add_image(tag, grid, step))

    def histogram(self, step: int, tag: str, values: torch.Tensor) -> None:
        """Shows how values of any shape are distributed in TensorBoard; leaves out what is not finite."""
        import torch
        values = values[torch.isfinite(values)]
        if len(values):
            self.show(lambda writer: writer.add_histogram(tag, values, step))

    def show(self, draw: Callable[[Any], Any]) -> None:
        """Calls `draw` with TensorBoard's writer, whose events end where the disk is full: metrics.jsonl has
        them.
        """
        try:
            if self.writer:
                draw(self.writer)
        except OSError as error:
            self.writer = None
            self.say(f'WARNING: no more events for TensorBoard ({error.strerror or error})')

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self.writer:
                self.writer.close()
