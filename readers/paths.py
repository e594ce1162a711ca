"""Which files lie below a folder, and their bytes."""

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from readers.images.masks import is_of_masks, masks_beside
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
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}): check its "
                        f"permissions.") from None


def walk(root: str | Path, unlisted: Callable[[OSError], None], skip: Callable[[str], bool] = lambda _: False,
         without: str | Path = '') -> tuple[list[str], Passed]:
    """All files below `root` at any depth, and what is passed over: what is hidden, links to folders, folders
    of masks, that is those whose name `skip` names, and the folder `without`.

    `unlisted` is told of each folder that cannot be read.
    """
    found, passed, own = [], {}, os.path.realpath(without) if without else ''
    for place, folders, names in os.walk(root, onerror=unlisted):
        kinds = {f: _kind(os.path.join(place, f), f, skip, own) for f in folders}
        kinds |= {n: HIDDEN for n in names if n.startswith('.')}
        for name, kind in kinds.items():
            if kind:
                pass_over(passed, kind, os.path.relpath(os.path.join(place, name), root))
        folders[:] = [f for f in folders if not kinds[f]]
        found += [os.path.join(place, n) for n in names if n not in kinds]
    return found, passed


def _kind(path: str, name: str, skip: Callable[[str], bool], own: str) -> str:
    """Why a folder is not entered; '' if it is."""
    if name.startswith(UNSEEN):
        return HIDDEN
    if os.path.islink(path):
        return LINKS
    if skip(name):
        return MASKS
    return OWN if own and os.path.realpath(path) == own else ''


def pass_over(passed: Passed, kind: str, *names: str) -> None:
    """Notes files or folders of a kind that are left aside."""
    passed.setdefault(kind, []).extend(printable(name) for name in names)


def passed_line(passed: Passed) -> list[str]:
    """One line that counts what was passed over, with an example of each kind; none if there is nothing."""
    kinds = [f'{kind} ({len(names):,}, such as {min(names)})' for kind, names in passed.items() if names]
    return [f"passed over: {'; '.join(kinds)}"] if kinds else []


def files_below(root: str | Path, wanted: Callable[[str], bool], passed: Passed,
                skip: Callable[[str], bool] = lambda _: False, without: str | Path = '') -> list[str]:
    """The paths that `walk` finds and that are `wanted`, relative to `root`, with '/' and sorted; what it
    passes over, and other files, go to `passed`. Raises UserError for a folder that cannot be read.
    """
    files, others = walk(root, stop_at, skip, without)
    start = len(os.path.join(root, ''))
    names = {path[start:].replace(os.sep, '/'): wanted(path) for path in sorted(files)}
    for kind, left in {**others, FOREIGN: [name for name in names if not names[name]]}.items():
        pass_over(passed, kind, *left)
    found = sorted(name for name in names if names[name])
    check_names(found, root)
    return found


def check_names(names: Iterable[str], root: str | Path) -> None:
    """Raises UserError for a name that is no UTF-8, as the id of a file of a run has to be."""
    if odd := next((name for name in names if printable(name) != name), None):
        raise UserError(f"the file name {printable(odd)} in {root} is no UTF-8: rename it.")


def stop_at(error: OSError) -> None:
    """Raises UserError for a folder that cannot be read."""
    raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}): check its permissions.")


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


def find_files(path: str | Path, without: str | Path = '') -> Found:
    """All files below a folder whatever they are, but for masks and what `walk` passes over, or the one file;
    ids are relative names. Raises UserError if there is nothing.
    """
    root = str(path)
    if not os.path.lexists(root):
        raise UserError(f"--data: {root} does not exist. Give a folder of images, or an image file.")
    if not os.path.isdir(root):
        return Found({printable(os.path.basename(root)): root}, {})
    unlisted: list[str] = []         # a folder that may not be listed takes the place of its files
    found, passed = walk(root, lambda error: unlisted.append(error.filename), is_of_masks, without)
    named = {Path(os.path.relpath(f, root)).as_posix(): f for f in found + unlisted}
    if beside := masks_beside(named):
        pass_over(passed, MASKS, *beside)
    if not (names := sorted({*named} - beside)):
        raise UserError(f"--data: there is no file below {root}. Give a folder of images, or an image file.")
    return Found({printable(name): named[name] for name in names}, passed)


def printable(name: str) -> str:
    """A file name as text that can be written: bytes that are no UTF-8 become \\xff."""
    return os.fsencode(name).decode('utf-8', 'backslashreplace')
