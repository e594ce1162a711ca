"""Anomaly maps and segmentations of volumes as NIfTI files, each on the grid of its subject's first file.

*S = (D, H, W) voxels of the model. Only the grid is taken from the subject's files, as NIfTI headers can hold
names.
"""

import gzip
import re
import zlib
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from readers.volumes.nifti import Grid, entry_grids, to_input_grid
from utils import write_atomically

MARK = b'anomaly detection'        # in the header of every file that is written here, and of no other
HEADER, DESCRIPTION = 348, slice(148, 228)      # bytes of a NIfTI header, and of its description
LONGEST = 80                       # characters of an id in a file name


def plain(name: str) -> str:
    """The last characters of an id; '_' replaces those that some file systems do not allow."""
    return re.sub(r'[^A-Za-z0-9.-]+', '_', name)[-LONGEST:]


def file_names(ids: Sequence[str]) -> list[str]:
    """A file name for each id, such as 'ward_7', with a number where two would be the same."""
    names: dict[str, str] = {}                                       # in lower case -> name
    for name in map(plain, ids):
        choices = chain([name], (f'{name}_{number}' for number in count(2)))
        name = next(choice for choice in choices if choice.casefold() not in names)
        names[name.casefold()] = name
    return list(names.values())


def write_map(path: Path, values: np.ndarray, model: Grid, own: Grid) -> None:
    """A map or segmentation (*S) on the grid `model` as a .nii.gz on the grid `own`: see `to_input_grid`."""
    image = to_input_grid(values, model, own)
    image.header['descrip'] = MARK
    content = gzip.compress(image.to_bytes(), 1, mtime=0)        # without the time: equal maps, equal files
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_cases(folder: Path, cases: Iterable[Any], entries: Sequence[Any], score: str) -> None:
    """Writes the maps of the cases that have one and are volumes; `entries` are those of their part."""
    remove_maps(folder)
    mapped = [case for case in cases if case.map is not None and getattr(entries[case.place], 'grids', ())]
    names = file_names([entries[case.place].id for case in mapped])
    for case, name in zip(mapped, names, strict=True):
        write_map(folder / f'{name}_{plain(score)}.nii.gz', case.map, *entry_grids(entries[case.place]))


def remove_maps(folder: Path) -> None:
    """Removes the files in `folder` that an earlier run wrote, and no others."""
    for path in folder.glob('*.nii.gz'):
        try:
            with gzip.open(path) as file:
                ours = file.read(HEADER)[DESCRIPTION].rstrip(b'\0') == MARK
        except (OSError, EOFError, zlib.error):
            ours = False
        if ours:
            path.unlink()
