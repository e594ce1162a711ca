"""Folders of image files (PNG, JPEG, TIFF, BMP, DICOM), one folder a class.

    <root>/<class>/images/*.png     or    <root>/<class>/*.png            any depth below
    <root>/<class>/masks/*.png      or    <root>/masks/<class>/*.png      masks.py has the names
    <root>/train/<class>/...        <root>/test/<class>/...               parts as published
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from readers.cache import stamp
from readers.config import DataSet, ReaderConfig
from readers.images.decode import ImageLoader
from readers.images.files import places
from readers.images.layout import PART_FOLDERS, Layout
from readers.images.masks import with_masks
from readers.images.tables import is_arrays, is_table, read_array_file, table_items
from readers.items import Item, Listing, import_items
from readers.paths import MASKS, find_root, pass_over, passed_line, subfolders
from readers.source import Source, is_among
from readers.split import noted
from utils import UserError


def read_folder(config: ReaderConfig, row: DataSet) -> Source:
    """Every image of the chosen classes, as (N, C, S, S)."""
    if row.tables and is_arrays(config.data):
        return read_array_file(config, row)
    return read_images(config, row, *find_items(config, row))


def read_images(config: ReaderConfig, row: DataSet, root: Path, items: Sequence[Item], notes: list[str],
                loader: ImageLoader | None = None, near_duplicates: bool = True) -> Source:
    """Image files below `root`, by the `loader` of the flags or another; `notes` on what is passed over."""
    loader = loader or ImageLoader.of(config, row)
    items = [framed for item in items for framed in with_frames(item, loader)]
    key = {'images': str(root), **vars(loader),
           'files': [[item.id, item.class_name, item.part, item.patient, item.masks, item.stamp]
                     for item in items]}
    source = import_items(config, row, key, lambda: Listing(str(root), items, loader.shape,
                                                            near_duplicates=near_duplicates))
    return replace(source, notes=notes + source.notes)


def with_frames(item: Item, loader: ImageLoader) -> Iterator[Item]:
    """An image file, or each of its frames that --frames takes, with the function that loads it."""
    state = [*map(stamp, item.files)]
    for mark, place in places(item.path, loader.frames):
        yield replace(item, id=item.id + mark, stamp=state,
                      read=lambda item, place=place: loader.load(place, item.masks))


def read_part_folders(config: ReaderConfig, row: DataSet, folders: Mapping[str, str]) -> Source:
    """The images of the chosen classes, where there is a folder for each part, which `folders` names, and in
    it one for each class: notMNIST, torchvision's Omniglot.

    Near-duplicates are not searched for: a letter in two typefaces is often nearly the same.
    """
    found = Layout(find_root(config.data, row.where))
    for part in row.parts:
        if (found.root / folders[part]).is_dir():
            found.read_place(folders[part], part, {})
        if not any(placed.item.part == part for placed in found.images):
            raise UserError(f"--data: {config.data!r} has no images in folders of classes in "
                            f"{folders[part]}. {row.where}")
    return read_images(config, row, *items_of(found, row), near_duplicates=False)


def find_items(config: ReaderConfig, row: DataSet) -> tuple[Path, list[Item], list[str]]:
    """All images that a table names, or in class folders, with their parts where there is a folder for each,
    and with masks where these mark anomalies: (root, items, notes).

    Raises UserError if there is no folder, no normal class or a class folder without images.
    """
    from_table = row.tables and is_table(config.data)
    config.check_table(from_table)
    if from_table:
        return table_items(config, row)
    root = find_class_root(row.folder(config, row), config.normal_classes or row.normal, row.where)
    found = Layout(root, config.normal_classes or row.normal, config.anomalous_classes)
    found.read()
    return items_of(found, row)


def items_of(found: Layout, row: DataSet) -> tuple[Path, list[Item], list[str]]:
    """The images in folders of classes with their masks, where these mark anomalies: (root, items, notes)."""
    items, lost = with_masks(found.images, found.masks if row.masks else [], found.is_normal)
    found.notes += noted(sorted(lost), 'mask', 'not used, of no image or of several')
    if not row.masks:
        pass_over(found.passed, MASKS, *(mask.item.id for mask in found.masks))
    notes = found.notes + passed_line(found.passed) * (not row.phantoms)              # whose notes are ours
    return found.root.resolve(), sorted(items, key=lambda item: item.id), notes


def find_class_root(folder: str, normal: Sequence[str], where: str) -> Path:
    """`folder`, or the one folder below it, that has a normal class, itself or in the folder of a part."""
    def has_normal(place: Path) -> bool:
        return any(is_among(sub.name, normal) for sub in subfolders(place))

    def holds(place: Path) -> bool:
        return has_normal(place) or any(has_normal(sub) for sub in subfolders(place)
                                        if sub.name.lower() in PART_FOLDERS)

    root = find_root(folder, where, holds)
    if root is None:
        found = ', '.join(sub.name for sub in subfolders(Path(folder))) or 'no folders'
        raise UserError(f"--data: {folder} has no folder of normal images named {' or '.join(normal)}: "
                        f"found {found}. {where}")
    return root
