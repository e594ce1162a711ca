"""Sets with a folder for each part, and in it one for each class: notMNIST, torchvision's Omniglot.

A few files of published archives are empty or cut off: they are in Source.bad like those of any folder.
"""

from collections.abc import Mapping
from pathlib import Path

from readers.config import DataSet, ReaderConfig
from readers.images.decode import ImageLoader
from readers.images.folder import image_files, read_images
from readers.items import Item
from readers.source import Source
from utils import UserError


def read_part_folders(config: ReaderConfig, row: DataSet, folders: Mapping[str, str]) -> Source:
    """The images of the chosen classes as (N, C, S, S) uint8; `folders` names the folder of each part.

    Near-duplicates are not searched for: a letter in two typefaces is often nearly the same.
    """
    if not config.data:
        raise UserError(f"--data is missing. {row.where}")
    root, items = Path(config.data), []
    for part in row.parts:
        place = root / folders[part]
        classes = [p for p in place.iterdir() if p.is_dir()] if place.is_dir() else []
        found = [Item(p.relative_to(root).as_posix(), folder.name, part=part, path=str(p))
                 for folder in classes for p in image_files(folder)]
        if not found:
            raise UserError(f"--data: {config.data!r} has no images in folders of classes in "
                            f"{folders[part]}. {row.where}")
        items += found
    items.sort(key=lambda item: item.id)
    return read_images(items, ImageLoader.of(config, row), config, row, str(root.resolve()),
                       near_duplicates=False)
