"""Which files lie below a folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils import UserError


def files_below(root: str | Path, suffixes: Sequence[str], skip: str = '',
                without: str | Path = '') -> list[str]:
    """The files below `root` with these suffixes, in lower case, as sorted paths relative to it with '/'.

    Hidden files and folders, folders of the name `skip` and the folder `without` are left out. Raises
    UserError for a folder that cannot be read.
    """
    found, own = [], os.path.realpath(without) if without else ''

    def stop(error: OSError) -> None:
        raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}): check its "
                        f"permissions.")

    for place, folders, names in os.walk(root, onerror=stop):
        folders[:] = [f for f in folders if not f.startswith('.') and not (skip and f.lower() == skip)
                      and os.path.realpath(os.path.join(place, f)) != own]
        found += [Path(place, n).relative_to(root).as_posix() for n in names
                  if n.lower().endswith(tuple(suffixes)) and not n.startswith('.')]
    return sorted(found)


class Found(NamedTuple):
    """What is to be loaded of a folder, by id, and what `load` takes for each: a path or a subject; and how
    many files and folders of which `kinds` are `passed_over`.
    """
    ids: list[str]
    paths: list[Any]
    passed_over: int
    kinds: str = 'hidden, named masks, or links to folders'


def find_files(path: str | Path, without: str | Path = '') -> Found:
    """All files below a folder whatever they are, at any depth, or the one file; ids are relative names.

    Passed over are hidden files and folders, folders named `masks`, links to folders, and the folder
    `without`. Raises UserError if there is nothing.
    """
    root = str(path)
    if not os.path.lexists(root):
        raise UserError(f"--data: {root} does not exist. Give a folder of images, or an image file.")
    if not os.path.isdir(root):
        return Found([printable(os.path.basename(root))], [root], 0)
    found, passed_over, own = [], 0, os.path.realpath(without) if without else ''
    # A folder that may not be listed takes the place of its files: reading it says why.
    unlisted = lambda error: found.append(error.filename)
    for place, folders, names in os.walk(root, onerror=unlisted):
        entered = [f for f in folders if not f.startswith('.') and f.lower() != 'masks'
                   and not os.path.islink(os.path.join(place, f))
                   and os.path.realpath(os.path.join(place, f)) != own]
        files = [n for n in names if not n.startswith('.')]
        passed_over += len(folders) - len(entered) + len(names) - len(files)
        folders[:] = entered
        found += [os.path.join(place, n) for n in files]
    if not found:
        raise UserError(f"--data: there is no file below {root}. Give a folder of images, or an image file.")
    named = sorted((Path(os.path.relpath(f, root)).as_posix(), f) for f in found)
    return Found([printable(name) for name, _ in named], [f for _, f in named], passed_over)


def printable(name: str) -> str:
    """A file name as text that can be written: bytes that are no UTF-8 become \\xff."""
    return os.fsencode(name).decode('utf-8', 'backslashreplace')
