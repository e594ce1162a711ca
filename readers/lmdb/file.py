"""LMDB files: read with one open environment a process, written in transactions that make room as they go.

A path is the folder that holds data.mdb, or the file itself.
"""

import itertools
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import lmdb
from tqdm import tqdm

from utils import UserError

PAGE_SIZE_AT, LAST_PAGE_AT = 40, 136     # bytes into an LMDB, and into each of its first two pages
BLOCK = 256                             # records in a transaction of make_lmdb: what a kill can lose
FIRST_MAP = 64 << 20                    # bytes; doubled whenever a transaction does not fit
_open: dict[str, lmdb.Environment] = {}      # by real path: LMDB forbids opening a file twice in one process


def _close_all() -> None:
    for environment in _open.values():
        environment.close()
    _open.clear()


# A child made by fork must not use what its parent opened: it lets go of that and opens its own.
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_close_all)


def is_lmdb(path: str | Path) -> bool:
    """Whether there is an LMDB at `path`: a folder with data.mdb, or a file that begins like one."""
    path = Path(path)
    file = path / 'data.mdb' if path.is_dir() else path
    if not file.is_file():
        return False
    try:
        with file.open('rb') as f:
            return f.read(20)[16:20] == bytes.fromhex('dec0efbe')       # the magic number of its first page
    except OSError:
        return False


def check_whole(path: str | Path) -> None:
    """Raises UserError if an LMDB ends before its last page: reading there ends the process (SIGBUS).

    Of the two pages that describe it (MDB_meta in LMDB's mdb.c), the one of the later transaction counts.
    """
    path = Path(path, 'data.mdb') if Path(path).is_dir() else Path(path)
    with path.open('rb') as file:
        head = file.read(PAGE_SIZE_AT + 4).ljust(PAGE_SIZE_AT + 4, b'\0')
        page_size, = struct.unpack_from('<I', head, PAGE_SIZE_AT)
        described = []
        for start in (0, page_size):
            file.seek(start + LAST_PAGE_AT)
            last, transaction = struct.unpack('<QQ', file.read(16).ljust(16, b'\0'))
            described.append((transaction, last))
        expected, found = (max(described)[1] + 1) * page_size, file.seek(0, os.SEEK_END)
    if found < max(expected, 2 * page_size, 1):
        raise UserError(f"{path} is cut off: it has {found:,} of {expected:,} bytes. Copy or make it anew.")


class Lmdb:
    """A read-only LMDB. It opens at first use in each process, so it pickles, forks and spawns freely."""

    def __init__(self, path: str | Path):
        """Raises UserError if there is no LMDB at `path`, or if it is cut off."""
        self.path = str(path)
        if not is_lmdb(path):
            raise UserError(f"{path} is not an LMDB: expected a folder with data.mdb, or such a file.")
        check_whole(path)

    def _begin(self) -> lmdb.Transaction:
        real = os.path.realpath(self.path)
        try:
            if real not in _open:
                _open[real] = lmdb.open(real, subdir=os.path.isdir(real), readonly=True, lock=False,
                                        readahead=False, meminit=False)
            return _open[real].begin()
        except lmdb.Error as error:
            raise UserError(f"{self.path} cannot be opened ({error}): it is damaged or still being written. "
                            f"Make it anew.") from None

    def __len__(self) -> int:
        with self._begin() as transaction:
            return transaction.stat()['entries']

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None if it is not there. Raises UserError if the file is damaged."""
        try:
            with self._begin() as transaction:
                return transaction.get(key)
        except lmdb.Error as error:
            raise UserError(f"{self.path}: record {key!r} cannot be read ({error}): the file is damaged.") \
                from None

    def keys(self) -> Iterator[bytes]:
        """All keys, in their order; values are not read."""
        with self._begin() as transaction, transaction.cursor() as cursor:
            yield from cursor.iternext(keys=True, values=False)


class Closing(AbstractContextManager):
    """Closed at the end of a `with` block."""

    def __exit__(self, *_: object) -> None:
        self.close()


class LmdbWriter(Closing):
    """Puts records into a new or existing LMDB; what a finished `put` wrote survives a kill."""

    def __init__(self, path: str | Path, subdir: bool = True):
        """`subdir`: a folder with data.mdb, as the published scripts leave it; else one file."""
        self.path = str(path)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            # An existing file keeps its size: the map is never made smaller than what it holds.
            self.environment = lmdb.open(self.path, subdir=subdir, map_size=FIRST_MAP, meminit=False)
        except (lmdb.Error, OSError) as error:
            raise UserError(f"{path} cannot be written as an LMDB ({error}): choose another place.") from None

    def put(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Writes all (key, value) in one transaction: all of them or none."""
        items = list(items)
        while True:
            try:
                with self.environment.begin(write=True) as transaction:
                    for key, value in items:
                        transaction.put(key, value)
                return
            except lmdb.MapFullError:
                self.environment.set_mapsize(2 * self.environment.info()['map_size'])
            except (lmdb.Error, OSError) as error:
                raise UserError(f"cannot write {self.path} ({error}): make room there or choose another "
                                f"place.") from None

    def get(self, key: bytes) -> bytes | None:
        with self.environment.begin() as transaction:
            return transaction.get(key)

    def close(self) -> None:
        self.environment.sync(True)
        self.environment.close()


def unfinished(path: str | Path) -> Path:
    """Where the LMDB `path` grows."""
    path = Path(path)
    return path.with_name(path.name + '.unfinished')


def make_lmdb(path: str | Path, values: Callable[[int], Iterator[bytes]], total: int | None = None) -> int:
    """Writes the records that `values(first)` gives, from number `first` on, to their end; returns how many.

    Keys are '0', '1', ... in ASCII, as published. The LMDB grows under another name and is renamed when all
    is in it: a stopped run goes on where it was, and no reader takes half a data set for a whole one. A
    finished LMDB is left as it is. `total` is the number of records where it is known. Raises UserError if
    something else is at `path`, if `values` do not end at `total`, or if an earlier run left something else
    than these.
    """
    path, growing = Path(path), unfinished(path)
    if path.exists():
        if not is_lmdb(path):
            raise UserError(f"{path} is there and is not an LMDB: remove it or choose another place.")
        print(f'{path} is there already: nothing to do (remove it to make it anew)')
        return len(Lmdb(path))
    with LmdbWriter(growing) as writer:
        done = writer.environment.stat()['entries']
        if done and next(values(done - 1), None) != writer.get(str(done - 1).encode()):
            raise UserError(f"{growing} holds other images than these: remove it to begin anew.")
        try:
            with tqdm(desc=path.name, total=total, initial=done, unit='image', disable=None) as bar:
                rest = values(done)
                while block := list(itertools.islice(rest, BLOCK)):
                    writer.put((str(done + i).encode(), value) for i, value in enumerate(block))
                    done += len(block)
                    bar.update(len(block))
        except (KeyboardInterrupt, UserError):
            print(f'unfinished: {growing} holds {done:,} records; the same command goes on there',
                  file=sys.stderr)
            raise
    if done == 0 or total not in (None, done):
        expected = 'some' if total is None else f'{total:,}'
        raise UserError(f"{growing} has {done:,} records, expected {expected}: remove it and begin anew.")
    os.replace(growing, path)
    print(f'{path}: {done:,} records')
    return done
