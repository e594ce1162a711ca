"""Makes an LMDB of images in the published layout: keys '0', '1', ... in ASCII.

It grows under another name, `<name>.unfinished`, and is renamed when all is in it. A stopped run goes on
where it was, and no reader takes half a data set for a whole one.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from readers.lmdb.file import Lmdb, LmdbWriter, is_lmdb
from utils import UserError

BLOCK = 256                  # records in a transaction: what a kill can lose


def unfinished(path: str | Path) -> Path:
    """Where the LMDB `path` grows."""
    path = Path(path)
    return path.with_name(path.name + '.unfinished')


def make_lmdb(path: str | Path, values: Callable[[int], Iterator[bytes]], total: int | None = None) -> int:
    """Writes the records that `values(first)` gives, from number `first` on, to their end; returns how many.

    `total` is their number where it is known. A finished LMDB is left as it is. Raises UserError if something
    else is at `path`, if `values` do not end at `total`, or if an earlier run left something else than these.
    """
    from tqdm import tqdm
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
