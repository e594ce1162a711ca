"""What every program shares: flags made from dataclasses, seeds, files of a run folder, user errors.

Knows no images. Imports neither PyTorch nor NumPy before they are needed.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import operator
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar('T')
# What values of another kind than ours, in a file that is damaged or not ours, may lead to.
WRONG_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
SPREADSHEETS = (b'PK\3\4', b'\xd0\xcf\x11\xe0')          # how .xlsx and .ods, and .xls, begin


class UserError(ValueError):
    """A mistake that the user can put right: programs print its one line and exit with status 2."""


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """A UserError of the block says what it is about: '<what>: <message>'; or as it is, where this is ''."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from None


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
    cls.__post_init__ = __post_init__      # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError for a value of a flag outside its limits or choices."""
    choices, limits = field.metadata.get('choices'), field.metadata.get('limits', {})
    for one in value if isinstance(value, tuple | list) else (value,):
        if one is None:
            continue
        if choices is not None and one not in choices:
            near = difflib.get_close_matches(str(one), [*map(str, choices)], n=1)
            raise UserError(f"--{field.name} {one}: choose one of {', '.join(map(str, choices))}"
                            + (f"; did you mean {near[0]}?" if near else '.'))
        if not all(LIMITS[name][1](one, limit) for name, limit in limits.items()):
            wanted = ' and '.join(f'{LIMITS[name][0]} {limit:g}' for name, limit in limits.items())
            raise UserError(f"--{field.name} {one}: it must be {wanted}.")


def read_flags(config: type[T], values: argparse.Namespace | dict[str, Any]) -> T:
    """The dataclass `config` from a namespace or dict: missing ones keep their default, others are left."""
    values = values if isinstance(values, dict) else vars(values)
    known = {f.name: f for f in dataclasses.fields(config)}      # type: ignore[arg-type]
    picked = {k: tuple(v) if isinstance(known[k].default, tuple) and isinstance(v, list) else v
              for k, v in values.items() if k in known}
    for name, value in picked.items():
        check_kind(known[name], value)
    return config(**picked)


def check_kind(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError for a value of another type than the default: files may hold anything."""
    default = field.default
    if value is None or default is None or isinstance(default, dataclasses._MISSING_TYPE):
        return
    kinds = (int, float) if type(default) is float else type(default)
    if not isinstance(value, kinds) or (isinstance(value, bool) != isinstance(default, bool)):
        raise UserError(f"--{field.name} {str(value)[:40]!r}: expected a {type(default).__name__}.")


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

def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` on a temporary file beside `path`, renames it and syncs file and folder: never half a
    file, and none that is gone after a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        with naming_file(path):
            write(temporary)
            sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """An OSError of the block says what it is about; one of a write to an open file names none."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def temporary_name(name: str) -> str:
    """A hidden name that no other process on any host takes, and that says whose it is."""
    return f'.{name[:60]}.{socket.gethostname()[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp'


TEMPORARY = re.compile(r'\..+\.(?P<host>[^/]*)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp')


def sync(path: Path) -> None:
    """Brings a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():            # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def check_regular(path: str | Path) -> None:
    """Raises UserError for a device or a pipe, which may never end."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a device or a pipe: name a file.")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; numbers that are not finite become null."""
    write_atomically(path, lambda p: p.write_text(strict_json(value, indent=1) + '\n'))


def strict_json(value: Any, **options: Any) -> str:
    """`value` as JSON, numbers that are not finite as null; `options` of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:                                # rare, and to look for it first takes as long again
        return json.dumps(finite(value), **options)


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
    check_regular(path)
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        reason = 'too deep' if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} is not a JSON file ({reason[:200]}). Delete it or restore it.") from None


def read_line(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is damaged or cut off."""
    try:
        values = json.loads(line)
        return values if line.endswith(b'\n') and isinstance(values['step'], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8 or UTF-16, without its byte order mark. Raises UserError."""
    check_regular(path)
    try:
        data = Path(path).read_bytes()
        wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        text = data.decode('utf-16' if wide else 'utf-8-sig')
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    except UnicodeDecodeError:
        text = '\0'
    if data.startswith(SPREADSHEETS):
        raise UserError(f"{path} is a spreadsheet or an archive, no text: save a spreadsheet as CSV (UTF-8).")
    if '\0' in text:
        raise UserError(f"{path} is no text in UTF-8, nor in UTF-16 with its mark: save it as UTF-8.")
    return text


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
