"""A folder of results is whole or not there: it is made beside the old one, then takes its place."""

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from storage.locks import clear_leftovers
from utils import UserError, sync, temporary_name

RESULT = 'metrics.json'                 # is in every folder of results
AT_CWD, EXCHANGE = -100, 2              # of renameat2(2)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a folder that begins with what is in `out` and takes its place at the end of the block. An
    exception, or a kill at any moment, leaves `out` as it was.

    A folder that cannot be exchanged is yielded itself, and its files are replaced one by one: the current
    folder, a mount, one that holds something else than results, one in a folder that may not be written.
    """
    out = out.resolve()
    before = out.parent / f'.{out.name}.before'
    if before.exists():                                      # a kill between the two renames of `_exchange`
        shutil.rmtree(before) if out.exists() else os.rename(before, out)
    new = out.parent / temporary_name(out.name)
    try:
        if not can_be_exchanged(out):
            raise PermissionError
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out.parent)
        shutil.copytree(out, new, symlinks=True, copy_function=_link) if out.exists() else new.mkdir()
    except OSError:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {out} ({error.strerror}). Name a folder with --save.") from None
        yield out
        return
    try:
        yield new
        sync(new)
        _exchange(new, out, before)
        sync(out.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def can_be_exchanged(out: Path) -> bool:
    if not out.exists():
        return True
    here = Path.cwd()
    return out.is_dir() and not os.path.ismount(out) and out not in (here, *here.parents) \
        and (not any(out.iterdir()) or (out / RESULT).is_file())


def _link(source: str, target: str) -> None:
    """A second name of a file, which is replaced and never changed; a copy where there are no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(new: Path, out: Path, before: Path) -> None:
    """Puts `new` where `out` is; what was there is then at `new` or gone."""
    if not out.exists():
        os.rename(new, out)
        return
    rename = getattr(ctypes.CDLL(None), 'renameat2', None)
    if rename and rename(AT_CWD, os.fsencode(new), AT_CWD, os.fsencode(out), EXCHANGE) == 0:
        return
    os.rename(out, before)                                   # a system that cannot exchange in one operation
    os.rename(new, out)
    shutil.rmtree(before)
