"""Which files lie below a folder, and their bytes."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from readers.source import MOST_PIXELS, Unreadable
from utils import UserError

# What a search leaves aside: the names of each kind, for one line.
Passed = dict[str, list[str]]
HIDDEN, LINKS, OWN = 'hidden files and folders', 'links to folders', 'folders of results'
MASKS, FOREIGN = 'masks and folders of masks', 'files of other kinds'
UNSEEN = ('.', '__MACOSX')                           # how names begin of what no user put there
LONGEST_START = 132                                # of a kind of file: that of DICOM
MOST_BYTES = 8 * MOST_PIXELS                        # of an image file: the largest image as doubles


def first_bytes(path: str | Path) -> bytes | None:
    """How a file begins; None of a folder, a device, or what cannot be opened."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, 'rb') as file:
            return file.read(LONGEST_START)
    except OSError:
        return None


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
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(UNSEEN))
    except OSError as error:
        stop_at(error)


def stop_at(error: OSError) -> None:
    """Raises UserError for a folder that cannot be read."""
    raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}): check its "
                    f"permissions.") from None


def files_below(root: str | Path, passed: Passed, below: str = '', *, deep: bool = True,
                without: str | Path = '', unlisted: Callable[[OSError], None] = stop_at) -> list[str]:
    """The files in the folder `below` of `root`, and if `deep` at any depth below that: sorted names relative
    to `root`, with '/'. What is hidden, links to folders, and the folder `without` go to `passed`.

    `unlisted` is told of each folder that cannot be read.
    """
    found, own = [], os.path.realpath(without) if without else ''
    for place, folders, names in os.walk(os.path.join(root, below), onerror=unlisted):
        inside = relative_name(place, root)
        above = '' if inside == '.' else f'{inside}/'
        kinds = {name: HIDDEN for name in (*folders, *names) if name.startswith(UNSEEN)}
        paths = {name: os.path.join(place, name) for name in folders if deep and name not in kinds}
        kinds |= {name: LINKS for name, path in paths.items() if os.path.islink(path)}
        kinds |= {name: OWN for name, path in paths.items() if own and os.path.realpath(path) == own}
        for name, kind in kinds.items():
            pass_over(passed, kind, above + name)
        folders[:] = [name for name in paths if name not in kinds]
        found += [above + name for name in names if name not in kinds]
    return sorted(found)


def relative_name(path: str, root: str | Path) -> str:
    return os.path.relpath(path, root).replace(os.sep, '/')


def pass_over(passed: Passed, kind: str, *names: str) -> None:
    """Notes files or folders of a kind that are left aside."""
    if names:
        passed.setdefault(kind, []).extend(names)


def passed_line(passed: Passed) -> list[str]:
    """One line that counts what was passed over, with an example of each kind; none if there is nothing."""
    kinds = [f'{kind} ({len(names):,}, such as {printable(min(names))})' for kind, names in passed.items()]
    return [f"passed over: {'; '.join(kinds)}"] if kinds else []


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
    """What `load` takes for each image or subject of a folder, by id, and what is passed over."""
    files: dict[str, Any]
    passed_over: Passed


def printable(name: str) -> str:
    """A file name as text that can be written: bytes that are no UTF-8 become \\xff."""
    return os.fsencode(name).decode('utf-8', 'backslashreplace')
