"""Files of any folder, without classes or labels, made ready for a model as its own data were: images here,
volumes in readers/volumes/new_volumes.py.

B images, C channels, S x S pixels as the model sees them, border included.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributions import Pixels
from readers.images.folder import decode, file_content, to_integers
from readers.parts import Batch, Part
from readers.source import Entry, Source
from readers.volumes.nifti import Grid
from utils import UserError


class Found(NamedTuple):
    """What of a folder is to be loaded, by id, and what `load` takes of each: a path, or a subject. How many
    files and folders are `passed_over`, and what these are.
    """
    ids: list[str]
    paths: list[Any]
    passed_over: int
    kinds: str = 'hidden, named masks, or links to folders'


class Loaded(NamedTuple):
    """An image as its file has it, at the size of the model: pixels (C, *S) uint8 or uint16; of a volume the
    grid of the model and that of its first file, and what was put right, in words that go on from 'n files'.
    """
    pixels: np.ndarray
    grids: tuple[Grid, ...] = ()
    repairs: tuple[str, ...] = ()


def as_batch(loaded: Sequence[Loaded], ids: Sequence[str], pixels: Pixels, depth: int,
             **options: bool) -> Batch:
    """Images of `depth` bits as those of a run in an evaluation, with the `options` of a Part; what is random
    follows from ids.
    """
    entries = [Entry(name, '', '', '', 0, row) for row, name in enumerate(ids)]
    source = Source(entries, np.stack([x.pixels for x in loaded]), None, (), ())
    return Part(entries, source, pixels, depth, **options).items(range(len(entries)))


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


@dataclass(frozen=True)
class Preparation:
    """What a run does to an image before its model sees it: for files that are not in its data set. Depth 8
    or 16 bits.
    """
    shape: tuple[int, int, int]              # (C, S, S)
    pixels: Pixels
    depth: int
    fit: str
    dequantize: bool = False
    invert: bool = False

    def find(self, path: str | Path, without: str | Path = '') -> Found:
        """The files below a folder but for `without`, or the one file. Raises UserError if there is none."""
        return find_files(path, without)

    def load(self, path: str) -> Loaded:
        """The image in a file. Raises Unreadable."""
        channels, size, _ = self.shape
        border = self.pixels.padding
        x = to_integers(decode(file_content(path)), size - 2 * border, channels, self.depth, self.fit)
        return Loaded(np.pad(x, ((0, 0), (border, border), (border, border))))

    def batch(self, images: Sequence[Loaded], ids: Sequence[str]) -> Batch:
        """Images that `load` gave, as the run's own."""
        return as_batch(images, ids, self.pixels, self.depth, dequantize=self.dequantize, invert=self.invert)
