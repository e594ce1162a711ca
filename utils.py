"""What every program shares: flags made from dataclasses, seeds, the run folder, checkpoints, user errors.

Knows no images. Imports neither PyTorch nor NumPy before they are needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import operator
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:       # PyTorch is imported where it is used: a program answers --help without it
    import torch

T = TypeVar('T')


class UserError(ValueError):
    """A mistake that the user can put right: programs print its one line and exit with status 2."""


# ------------------------------------------------------------------------------------------------------ flags

def flag(default: Any, help: str, *, basic: bool = False, needs: str = '', **options: Any) -> Any:
    """A dataclass field that is a command-line flag; `help` states its unit and any special value.

    `basic` flags stand in --help, the others in --help_all. A flag that does nothing without another one
    `needs` it: 'ema_decay' (it is on), 'sampler=pc' (it has this value), 'flip or augment' (either).
    `options` are limits, that a value must be at least `least`, at most `most`, above `above` and below
    `below` (of a tuple each value), arguments of `add_argument` (choices, nargs, type, metavar), and
    `aliases`, further names of the flag.
    """
    if isinstance(default, list | dict | set):
        raise TypeError(f"flag default {default!r} is mutable: use a tuple")
    limits = {name: options.pop(name) for name in LIMITS if name in options}
    return dataclasses.field(default=default, metadata={
        'help': help, 'limits': limits, 'basic': basic, 'needs': needs, **options})


LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    'least': ('at least', operator.ge), 'most': ('at most', operator.le),
    'above': ('above', operator.gt), 'below': ('below', operator.lt)}


def flags(cls: type[T]) -> type[T]:
    """Decorator: a frozen dataclass of flags, which raises UserError for a value outside its limits or
    choices before its own `__post_init__`, or that of its base, looks at what else must hold.
    """
    own = getattr(cls, '__post_init__', None)

    def __post_init__(self: Any) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if own is not None:
            own(self)
    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True)(cls)


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError for a value of a flag outside its limits or choices."""
    choices, limits = field.metadata.get('choices'), field.metadata.get('limits', {})
    for one in value if isinstance(value, tuple | list) else (value,):
        if one is None:
            continue
        if choices is not None and one not in choices:
            raise UserError(f"--{field.name} {one}: choose one of {', '.join(map(str, choices))}.")
        if not all(LIMITS[name][1](one, limit) for name, limit in limits.items()):
            wanted = ' and '.join(f'{LIMITS[name][0]} {limit:g}' for name, limit in limits.items())
            raise UserError(f"--{field.name} {one}: it must be {wanted}.")


def read_flags(config: type[T], values: argparse.Namespace | dict[str, Any]) -> T:
    """The dataclass `config` from a namespace or dict: missing ones keep their default, others are left."""
    values = values if isinstance(values, dict) else vars(values)
    known = {f.name: f for f in dataclasses.fields(config)}
    picked = {k: tuple(v) if isinstance(known[k].default, tuple) else v
              for k, v in values.items() if k in known}
    return config(**picked)


# ------------------------------------------------------------------------------------------------------ seeds

def mix_seed(*parts: int | str) -> int:
    """One 63-bit seed from several numbers or words; (seed, step, rank) never meets (seed, rank, step)."""
    digest = hashlib.sha256('/'.join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], 'big') >> 1


def seed_noise(*parts: int | str) -> None:
    """Seeds torch's noise on every device from `parts`.

    Noise is a function of a counter (the run's seed, the step, the rank), never of a state carried along: a
    resumed run draws what the uninterrupted run draws, and nothing has to be saved.
    """
    import torch
    torch.manual_seed(mix_seed(*parts))


# ------------------------------------------------------------------------------------------------- run folder

def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary file beside `path`, syncs it to disk and renames it: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        write(temporary)
        with temporary.open('rb') as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; numbers that are not finite become null."""
    write_atomically(path, lambda p: p.write_text(json.dumps(finite(value), indent=1) + '\n'))


def write_csv(path: str | Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a table as UTF-8 CSV with Unix line ends, atomically; None and NaN become empty cells.

    An apostrophe goes before text that a spreadsheet would take for a formula, such as a file name '=1+1'.
    """
    import csv
    def write(temporary: Path) -> None:
        with temporary.open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(header)
            writer.writerows([None if cell != cell else plain_cell(cell) for cell in row] for row in rows)
    write_atomically(path, write)


def plain_cell(cell: Any) -> Any:
    """The cell, or behind an apostrophe if it is text, but no number, that begins like a formula."""
    if not isinstance(cell, str) or not cell.startswith(('=', '+', '-', '@', '\t', '\r')):
        return cell
    try:
        float(cell)
        return cell
    except ValueError:
        return f"'{cell}"


def write_npz(path: str | Path, **arrays: Any) -> None:
    """Writes named arrays as a compressed npz file, atomically."""
    import numpy as np
    def write(temporary: Path) -> None:
        with temporary.open('wb') as f:
            np.savez_compressed(f, **arrays)
    write_atomically(path, write)


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, which strict JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Reads a JSON file. Raises UserError naming the file if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a JSON file ({error}). Delete it or restore it.") from None


class RunLog:
    """log.txt, metrics.jsonl and TensorBoard events of a run folder; silent where not `active` (rank > 0)."""

    def __init__(self, folder: str | Path, active: bool = True, tensorboard: bool = True, step: int = 0):
        """`step` steps are done: what a killed run wrote beyond them, and will write again, is dropped."""
        self.folder, self.active, self.writer = Path(folder), active, None
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget_after(step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def _forget_after(self, step: int) -> None:
        path = self.folder / 'metrics.jsonl'
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step]
            if len(kept) < len(lines):
                write_atomically(path, lambda p: p.write_text(''.join(kept)))

    def say(self, line: str) -> None:
        """Prints a line, and keeps it in log.txt with the time."""
        if not self.active:
            return
        from tqdm import tqdm
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        with (self.folder / 'log.txt').open('a') as f:
            f.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {line}\n')

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Appends one JSON line to metrics.jsonl and a scalar per value to TensorBoard."""
        if not self.active:
            return
        with (self.folder / 'metrics.jsonl').open('a') as f:
            f.write(json.dumps({'step': step, 'time': round(time.time(), 3), **finite(values)}) + '\n')
        if self.writer:
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def image(self, step: int, tag: str, grid: torch.Tensor) -> None:
        """Shows an image (C, H, W) in [0, 1] in TensorBoard."""
        if self.writer:
            self.writer.add_image(tag, grid, step)

    def histogram(self, step: int, tag: str, values: torch.Tensor) -> None:
        """Shows how values of any shape are distributed in TensorBoard; leaves out what is not finite."""
        import torch
        values = values[torch.isfinite(values)]
        if self.writer and len(values):
            self.writer.add_histogram(tag, values, step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


# ----------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Writes `content` atomically: a kill at any moment leaves the last whole checkpoint in place."""
    import torch
    path = Path(path)
    for left_by_a_kill in path.parent.glob(f'.{path.name}.*.tmp'):
        left_by_a_kill.unlink(missing_ok=True)
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running code from it (`weights_only=True`, Namespace allowed).

    Raises UserError if the file is missing, damaged, or holds anything but data.
    """
    import torch
    path = Path(path)
    if path.is_dir():
        path = path / 'checkpoint.pt'
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}. Name the checkpoint.pt of a run.") from None
    except pickle.UnpicklingError as error:
        foreign = re.search(r'GLOBAL (\S+)', str(error))
        what = f"holds a {foreign[1]}, which is code and not data" if foreign else "is damaged"
        raise UserError(f"checkpoint {path} {what}; it is not loaded. Take another copy.") from None
    except Exception as error:      # a damaged file can mislead the reader into any of them
        raise UserError(f"checkpoint {path} cannot be read: it is damaged or no checkpoint "
                        f"({type(error).__name__}: {str(error).split(chr(10))[0][:120]}).") from None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not the dictionary of a run.")
    return content


def fingerprint(model: torch.nn.Module) -> str:
    """16 hexadecimal digits that tell these weights from any others."""
    import torch
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- programs

def run_program(main: Callable[[], int | None]) -> None:
    """Runs `main` as a command-line program: a UserError is one line on stderr and status 2, Ctrl-C 130."""
    try:
        status = main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        status = 130
    sys.exit(status or 0)
