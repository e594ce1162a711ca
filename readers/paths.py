"""Which files lie below a folder, and their bytes."""

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from readers.source import MOST_PIXELS, Unreadable
from utils import UserError

MOST_BYTES = 8 * MOST_PIXELS                        # of an image file: the largest image as doubles


def find_root(data: str, where: str, holds: Callable[[Path], bool] = lambda _: True) -> Path | None:
    """The folder `data`, or the one folder in it, that `holds` a data set; None if none does.

    Raises UserError if no folder is given or there, or if several hold one; `where` says where to get it.
    """
    if not data:
        raise UserError(f"--data is missing. {where}")
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"--data: the folder {data!r} does not exist. {where}")
    roots = [folder] if holds(folder) else [sub for sub in subfolders(folder) if holds(sub)]
    if len(roots) > 1:
        raise UserError(f"--data: {folder} holds several data sets: name one of "
                        f"{', '.join(r.name for r in roots)}.")
    return roots[0] if roots else None


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted, without hidden ones."""
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(('.', '__MACOSX')))
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}): check its "
                        f"permissions.") from None


def walk(root: str | Path, skip: str, without: str | Path,
         unlisted: Callable[[OSError], None]) -> tuple[list[str], int]:
    """All files below `root` at any depth, and how many files and folders are passed over: hidden ones,
    folders of the name `skip`, links to folders, and the folder `without`.

    `unlisted` is told of each folder that cannot be read.
    """
    found, passed_over, own = [], 0, os.path.realpath(without) if without else ''
    for place, folders, names in os.walk(root, onerror=unlisted):
        entered = [f for f in folders if not f.startswith('.') and not (skip and f.lower() == skip)
                   and not os.path.islink(os.path.join(place, f))
                   and os.path.realpath(os.path.join(place, f)) != own]
        files = [n for n in names if not n.startswith('.')]
        passed_over += len(folders) - len(entered) + len(names) - len(files)
        folders[:] = entered
        found += [os.path.join(place, n) for n in files]
    return found, passed_over


def files_below(root: str | Path, suffixes: Sequence[str], skip: str = '',
                without: str | Path = '') -> list[str]:
    """The files that `walk` finds with these suffixes, in lower case, as sorted paths relative to `root` with
    '/'. Raises UserError for a folder that cannot be read.
    """
    def stop(error: OSError) -> None:
        raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}): check its "
                        f"permissions.")

    files, _ = walk(root, skip, without, stop)
    return sorted(Path(f).relative_to(root).as_posix() for f in files if f.lower().endswith(tuple(suffixes)))


def file_content(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file. Raises Unreadable if there are none to be had, or more than `most`."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise Unreadable('is a folder')
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable('is a device or a pipe')                   # which may never end
        if status.st_size > most:
            raise Unreadable(f'has {status.st_size:,} bytes, over {most:,}: make it smaller')
        return Path(path).read_bytes()
    except OSError as error:
        raise Unreadable(f'cannot be opened ({error.strerror or type(error).__name__})') from None


class Found(NamedTuple):
    """What is to be loaded of a folder, by id, and what `load` takes for each: a path or a subject; and how
    many files and folders of which `kinds` are `passed_over`.
    """
    ids: list[str]
    paths: list[Any]
    passed_over: int
    kinds: str = 'hidden, named masks, or links to folders'


def find_files(path: str | Path, without: str | Path = '') -> Found:
    """All files below a folder whatever they are, but for folders named `masks` and those that `walk` passes
    over, or the one file; ids are relative names. Raises UserError if there is nothing.
    """
    root = str(path)
    if not os.path.lexists(root):
        raise UserError(f"--data: {root} does not exist. Give a folder of images, or an image file.")
    if not os.path.isdir(root):
        return Found([printable(os.path.basename(root))], [root], 0)
    unlisted: list[str] = []         # a folder that may not be listed takes the place of its files
    found, passed_over = walk(root, 'masks', without, lambda error: unlisted.append(error.filename))
    if not (found := found + unlisted):
        raise UserError(f"--data: there is no file below {root}. Give a folder of images, or an image file.")
    named = sorted((Path(os.path.relpath(f, root)).as_posix(), f) for f in found)
    return Found([printable(name) for name, _ in named], [f for _, f in named], passed_over)


def printable(name: str) -> str:
    """A file name as text that can be written: bytes that are no UTF-8 become \\xff."""
    return os.fsencode(name).decode('utf-8', 'backslashreplace')
