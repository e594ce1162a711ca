"""notMNIST: `<data>/notMNIST_large/A/*.png` to J is the training part, `<data>/notMNIST_small` the test part.

Letters of many typefaces, 28 x 28. A few files of the published archives are empty or cut: they are in
Source.bad like those of any folder.
"""

from collections.abc import Sequence
from pathlib import Path

from readers.images import ImageFile, image_files, scan, stamp
from readers.source import Source, cached, choose_classes
from utils import UserError

FOLDERS = {'train': 'notMNIST_large', 'test': 'notMNIST_small'}
CLASSES = tuple('ABCDEFGHIJ')


def read_notmnist(folder: str | Path, *, where: str, parts: Sequence[str], normal: Sequence[str],
                  anomalous: Sequence[str], size: int, channels: int, padding: int, cache_dir: str) -> Source:
    """The letters of the chosen classes, 'A' to 'J', as (N, C, S, S) uint8, `padding` black pixels around.

    Only the folders of `parts` are read; anomalous letters come from the test part alone. Near-duplicates are
    not looked for: one letter in two typefaces is often nearly the same.
    """
    if not folder:
        raise UserError(f"--data is missing. {where}")
    usual, abnormal = choose_classes(CLASSES, normal, anomalous, False, 'notMNIST')
    root, files = Path(folder), []
    for part in parts:
        found = []
        for letter in (*usual, *(abnormal if part == 'test' else ())):
            place = root / FOLDERS[part] / letter
            found += [ImageFile(p.relative_to(root).as_posix(), str(p), letter, part=part)
                      for p in (image_files(place) if place.is_dir() else ())]
        if not found:
            raise UserError(f"--data: {str(root)!r} has no image of the letters "
                            f"{', '.join(usual + abnormal)} in {FOLDERS[part]}. {where}")
        files += found
    files.sort(key=lambda f: f.id)

    def make(target: Path) -> dict:
        return {**scan(files, target, size=size - 2 * padding, border=padding, channels=channels, depth=8,
                       fit='pad', twins=False),
                'normal_classes': usual, 'anomalous_classes': abnormal}

    return cached(cache_dir, {'notmnist': str(root.resolve()), 'size': size, 'channels': channels,
                              'padding': padding, 'normal': usual, 'anomalous': abnormal,
                              'files': [[f.id, *stamp(f.path)] for f in files]}, make)
