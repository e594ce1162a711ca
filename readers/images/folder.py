"""Folders of image files (PNG, JPEG, TIFF, BMP, DICOM), one folder a class.

    <root>/<class>/images/*.png     or    <root>/<class>/*.png            any depth below
    <root>/<class>/masks/*.png      or    <root>/masks/<class>/*.png      same stem; not zero = anomalous
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from readers.cache import stamp
from readers.config import DataSet, ReaderConfig
from readers.images.decode import SUFFIXES, ImageLoader
from readers.items import Item, Listing, Loaded, import_items
from readers.paths import files_below, find_root, subfolders
from readers.source import Source, same_name
from utils import UserError


def read_folder(config: ReaderConfig, row: DataSet) -> Source:
    """Every image of the chosen classes, as (N, C, S, S)."""
    root, items, notes = find_items(row.folder(config, row), config, row)
    source = read_images(items, ImageLoader.of(config, row), config, row, str(root))
    return replace(source, notes=notes + source.notes)


def read_images(items: Sequence[Item], loader: ImageLoader, config: ReaderConfig, row: DataSet,
                name: str, near_duplicates: bool = True) -> Source:
    """Image files; `name` says in errors where their classes are."""
    def read(item: Item) -> Loaded:
        return loader.load(item.path, item.mask)

    items = [replace(item, read=read, stamp=(stamp(item.path), stamp(item.mask))) for item in items]
    key = {'images': name, 'size': loader.size, 'channels': loader.channels, 'fit': loader.fit,
           'border': loader.border,
           'files': [[item.id, item.class_name, item.part, item.stamp] for item in items]}
    return import_items(config, row, key, lambda: Listing(name, items, loader.shape,
                                                          near_duplicates=near_duplicates))


def read_part_folders(config: ReaderConfig, row: DataSet, folders: Mapping[str, str]) -> Source:
    """The images of the chosen classes, where there is a folder for each part, which `folders` names, and in
    it one for each class: notMNIST, torchvision's Omniglot.

    Near-duplicates are not searched for: a letter in two typefaces is often nearly the same.
    """
    root, items = find_root(config.data, row.where), []
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


def find_items(folder: str, config: ReaderConfig, row: DataSet) -> tuple[Path, list[Item], list[str]]:
    """All images in class folders, with masks where these mark anomalies: (root, items, notes)."""
    root, classes, notes = find_classes(folder, config.normal_classes or row.normal, row.where)
    items = [item for name, found in classes.items()
             for item in (with_masks(root, name, found) if row.masks else found)]
    return root.resolve(), sorted(items, key=lambda item: item.id), notes


def find_classes(folder: str, normal: Sequence[str],
                 where: str) -> tuple[Path, dict[str, list[Item]], list[str]]:
    """The classes in `folder`, or in the one folder below it that has a normal class: (root, {class: files},
    notes).

    Raises UserError if there is no folder, no normal class or a class folder without images; `where` says
    where the data set comes from.
    """
    def has_normal(place: Path) -> bool:
        return any(same_name(sub.name, name) for sub in subfolders(place) for name in normal)

    root, classes, notes = find_root(folder, where, has_normal), {}, []
    if root is None:
        found = ', '.join(sub.name for sub in subfolders(Path(folder))) or 'no folders'
        raise UserError(f"--data: {folder} has no folder of normal images named {' or '.join(normal)}: "
                        f"found {found}. {where}")
    for sub in subfolders(root):
        if sub.name.lower() == 'masks':
            continue
        images = next((s for s in subfolders(sub) if s.name.lower() == 'images'), sub)
        files = image_files(images)
        is_normal = any(same_name(sub.name, name) for name in normal)
        if not files and images is sub and next(sub.iterdir(), None) and not is_normal:
            notes.append(f"folder {sub.name} holds no {', '.join(SUFFIXES)} file: it is not taken for a "
                         f"class")
            continue
        if not files:
            raise UserError(f"class folder {images} holds no image ({', '.join(SUFFIXES)}): fill it or "
                            f"remove it.")
        classes[sub.name] = [Item(f.relative_to(root).as_posix(), sub.name, path=str(f)) for f in files]
    return root, classes, notes


def image_files(folder: Path) -> list[Path]:
    """All image files below `folder`, without hidden ones and those below a folder `masks`."""
    return [folder / name for name in files_below(folder, SUFFIXES, skip='masks')]


def with_masks(root: Path, class_name: str, files: list[Item]) -> list[Item]:
    """The files of a class, each with its mask where one of the same stem is there."""
    masks = {}
    for folder in (root / 'masks' / class_name, root / class_name / 'masks'):
        if folder.is_dir():
            masks |= {_stem(p.relative_to(folder).as_posix()): str(p) for p in image_files(folder)}
    prefix = re.compile(re.escape(class_name) + r'/(images/)?', re.IGNORECASE)
    return [replace(f, mask=masks.get(_stem(prefix.sub('', f.id, count=1)), '')) for f in files]


def _stem(name: str) -> str:
    """'sub/scan1_mask.png' -> 'sub/scan1'."""
    return re.sub(r'_mask$', '', os.path.splitext(name)[0])
