"""LMDB files: read by a process of their own, written in transactions that make room as they go.

A path is the folder that holds data.mdb, or the file itself.
"""

import itertools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lmdb
from tqdm import tqdm

from readers.lmdb import child
from readers.paths import first_bytes
from readers.source import Unreadable
from utils import UserError

MAGIC = bytes.fromhex('dec0efbe')        # in the first page
BLOCK = 256                             # records in a transaction of make_lmdb: what a kill can lose
FIRST_MAP = 64 << 20                    # bytes; doubled whenever a transaction does not fit
MOST_ENDS = 20                          # reading processes that a file may end before the rest is given up


def data_file(path: str | Path) -> Path:
    return Path(path, 'data.mdb') if Path(path).is_dir() else Path(path)


def is_lmdb(path: str | Path) -> bool:
    """Whether there is an LMDB at `path`: a file that begins like one."""
    return (first_bytes(data_file(path)) or b'')[16:20] == MAGIC


class Closing(AbstractContextManager):
    """Closed at the end of a `with` block."""

    def __exit__(self, *_: object) -> None:
        self.close()


class Lmdb(Closing):
    """The values of an LMDB, fetched by a child process: a damaged file may end that. For any threads.

    The child starts at first use in each process, so this pickles, forks and spawns freely.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._start()

    def _start(self) -> None:
        self._child, self._ends, self._lock, self._process = None, 0, threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    def _ask(self, *request: Any) -> Any:
        """The child's answer. Raises Unreadable if the file is damaged there."""
        if self._process != os.getpid():                # after a fork the child is that of the other process
            self._start()
        with self._lock:
            if self._ends == MOST_ENDS:
                raise Unreadable(f'was not tried: {MOST_ENDS} others ended the process that reads')
            self._child = self._child or subprocess.Popen(
                [sys.executable, '-P', child.__file__, self.path], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            try:
                pickle.dump(request, self._child.stdin)
                self._child.stdin.flush()
                answer = pickle.load(self._child.stdout)
            except (BrokenPipeError, EOFError, pickle.UnpicklingError):
                self._ends += 1
                self._end()
                answer = 'it ends the process that reads'
        if isinstance(answer, str):
            raise Unreadable(f'cannot be read ({answer})')
        return answer

    def __len__(self) -> int:
        return self._ask('length')

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None if it is not there. Raises Unreadable if the file is damaged there."""
        return self._ask('get', key)

    def check_whole(self) -> None:
        """Raises Unreadable if the file ends before its last page: reading there would end the child."""
        self._ask('check_whole')

    def keys(self) -> list[bytes]:
        """All keys, in their order. Raises Unreadable."""
        return self._ask('keys')

    def close(self) -> None:
        if self._process == os.getpid():
            self._end()

    __del__ = close

    def _end(self) -> None:
        if self._child:
            self._child.kill()
            self._child.communicate()              # takes it off the table of processes, closes the pipes
            self._child = None


@contextmanager
def refused(path: str | Path) -> Iterator[None]:
    """A damaged LMDB is the user's to repair: raises UserError for Unreadable."""
    try:
        yield
    except Unreadable as error:
        raise UserError(f"{path} {error}: it is damaged or still being written. Make it anew.") from None


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
        with refused(path), Lmdb(path) as records:
            return len(records)
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
