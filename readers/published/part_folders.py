"""Sets with a folder for each part, and in it one for each class: notMNIST, torchvision's Omniglot.

A few files of published archives are empty or cut: they are in Source.bad like those of any folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from readers.images.folder import ImageFile, image_files, scan, stamp
from readers.source import Source, cached, choose_classes
from utils import UserError


def read_part_folders(folder: str | Path, *, name: str, folders: Mapping[str, str], where: str,
                      parts: Sequence[str], normal: Sequence[str], anomalous: Sequence[str], size: int,
                      channels: int, padding: int, cache_dir: str) -> Source:
    """The images of the chosen classes as (N, C, S, S) uint8, `padding` black pixels around.

    `folders` names the folder of each part. Only those of `parts` are read; anomalous images come from the
    test part alone. Near-duplicates are not looked for: a letter in two typefaces is often nearly the same.
    """
    if not folder:
        raise UserError(f"--data is missing. {where}")
    root, files = Path(folder), []
    found = {p.name for part in parts if (root / folders[part]).is_dir()
             for p in (root / folders[part]).iterdir() if p.is_dir()}
    if not found:
        raise UserError(f"--data: {str(root)!r} has no folders of classes in "
                        f"{' or '.join(folders[part] for part in parts)}. {where}")
    usual, abnormal = choose_classes(sorted(found), normal, anomalous, False, name)
    for part in parts:
        chosen = (*usual, *(abnormal if part == 'test' else ()))
        places = [(c, root / folders[part] / c) for c in chosen]
        inside = [ImageFile(p.relative_to(root).as_posix(), str(p), c, part=part)
                  for c, place in places if place.is_dir() for p in image_files(place)]
        if not inside:
            raise UserError(f"--data: {str(root)!r} has no image of {', '.join(chosen[:10])} in "
                            f"{folders[part]}. {where}")
        files += inside
    files.sort(key=lambda f: f.id)

    def make(target: Path) -> dict:
        return {**scan(files, target, size=size - 2 * padding, border=padding, channels=channels, depth=8,
                       fit='pad', twins=False),
                'normal_classes': usual, 'anomalous_classes': abnormal}

    return cached(cache_dir, {'part folders': str(root.resolve()), 'size': size, 'channels': channels,
                              'padding': padding, 'normal': usual, 'anomalous': abnormal,
                              'files': [[f.id, *stamp(f.path)] for f in files]}, make)
