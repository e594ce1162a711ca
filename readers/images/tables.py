"""Data sets that one file describes: a table of images, or the images themselves as arrays.

    path,class,part,mask,patient,label,x,y,width,height      CSV or TSV; columns of other names: --columns
    [{"path": "a.png", "class": "normal"}, ...]              JSON: such rows, or
    {"train": {"0": ["a.png"]}, "test": {"1": ["b.png"]}}    files by part and label (MedIAnomaly)
    train_images, train_labels, val_images, ...              npz (MedMNIST)
"""

import csv
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from readers.cache import stamp
from readers.config import BOXES, COLUMNS, DataSet, ReaderConfig
from readers.images.files import SUFFIXES
from readers.images.layout import PART_FOLDERS
from readers.images.masks import Box, fold
from readers.items import Item
from readers.paths import Passed, files_below, pass_over, passed_line, relative_name
from readers.published.arrays import import_arrays
from readers.source import Source, is_among, reason
from readers.split import LEFT_OUT, PARTS, count, noted
from storage.arrays import read_npz
from utils import UserError, read_text

ARRAYS = '.npz'
SUFFIXES_OF_TABLES = ('.csv', '.tsv', '.json', ARRAYS, '.xlsx', '.xls', '.ods')     # read_text refuses three
LABELS = {'0': 0, 'normal': 0, 'good': 0, 'false': 0, '1': 1, 'anomalous': 1, 'anomaly': 1, 'true': 1}
ANOMALOUS = 'anomalous'                     # the class of an image of label 1, where no column says more
MISSING = ('nan', 'na', 'n/a', '<na>', 'none', 'null')             # as pandas, R and databases write it
UNNAMED = 'images that the table does not name'

T = TypeVar('T')
Row = Mapping[str, str]                     # of a table: what its columns hold, by the names in COLUMNS


def is_table(path: str) -> bool:
    return path.lower().endswith(SUFFIXES_OF_TABLES) and os.path.isfile(path)


def is_arrays(path: str) -> bool:
    return is_table(path) and path.lower().endswith(ARRAYS)


def table_items(config: ReaderConfig, row: DataSet) -> tuple[Path, list[Item], list[str]]:
    """The images that --data and --tables name, with class, part, masks and patient: (root, items, notes).

    Raises UserError for a table that cannot be read, and for images that are not there unless --skip_corrupt.
    """
    table, more = Path(config.data), [pair.rpartition('=') for pair in config.tables]
    parts = {table: 'train' if any(part for part, _, _ in more) else ''}
    parts |= {Path(path): part for part, _, path in more}
    images = [Path(config.images)] if config.images else []
    files = Files([*dict.fromkeys([*images, *(path.parent for path in parts)])], len(images))
    found, lost, empty = by_image(parts, config, config.normal_classes or row.normal, files)
    if (lost and not config.skip_corrupt) or not found:
        raise UserError(f"{table}: {count(len(lost), 'row')} of images that are not below {files.roots[0]}"
                        f"{', such as ' + lost[0] if lost else ''}. Name their folder with --images, or pass "
                        f"--skip_corrupt to leave them out.")
    items = [one_image(rows, config.normal_classes or row.normal) for rows in found.values()]
    mixed = [name for name, rows in found.items() if len({item.class_name for item in rows} - {''}) > 1]
    notes = [*noted(lost, 'row', 'of images that are not there', LEFT_OUT),
             *noted(empty, 'row', 'without an image or a class', LEFT_OUT),
             *noted(mixed, 'image', 'of several classes count as their first anomalous one')]
    pass_over(files.passed, UNNAMED, *files.unused())
    items = sorted(items, key=lambda item: item.id)
    return files.roots[0].resolve(), items, notes + passed_line(files.passed)


def by_image(tables: Mapping[Path, str], config: ReaderConfig, normal: Sequence[str],
             files: 'Files') -> tuple[dict[str, list[Item]], list[str], list[str]]:
    """The rows of each image in tables of these parts, the paths of rows whose image is not there, and the
    numbers of rows that say nothing. Raises UserError for a row that contradicts itself or another.

    A row without a class, as of a table of masks or boxes, adds to the other rows of its image.
    """
    found: dict[str, list[Item]] = {}
    lost, empty = [], []
    for table, part in tables.items():
        for number, values in enumerate(read_rows(table, config), 1):
            where = f'{table}, row {number}'
            class_name, path = class_of(values, normal, where), files.find(values['path'], table.parent)
            mask = files.find(values['mask'], table.parent) if values['mask'] else box_of(values, where)
            if not (values['path'] and (class_name or values['mask'] or mask)):
                empty.append(f'row {number} of {table.name}')
            elif not path:
                lost.append(values['path'])
            elif values['mask'] and not mask:
                raise UserError(f"{where}: there is no mask {values['mask']!r} below {files.roots[0]}.")
            else:
                own = known(PART_FOLDERS, values['part'], 'part', where) if values['part'] else part
                item = Item(files.id_of(path), class_name, own, values['patient'], path,
                            (mask,) if mask else ())
                found.setdefault(item.id, []).append(item)
    for name, rows in list(found.items()):
        full = [item for item in rows if item.class_name]
        if len({(item.part, item.patient) for item in full}) > 1:
            raise UserError(f"{config.data}: {name} has rows of different parts or patients.")
        if not full:
            empty.append(name)
            del found[name]
    return found, lost, empty


def one_image(rows: Sequence[Item], normal: Sequence[str]) -> Item:
    """An image with several rows in the tables: its first anomalous class and all its masks."""
    full = [item for item in rows if item.class_name]
    ill = (item for item in full if not is_among(item.class_name, normal))
    masks = dict.fromkeys(mask for item in rows for mask in item.masks)
    return replace(next(ill, full[0]), masks=tuple(masks))


def box_of(values: Row, where: str) -> Box | None:
    """The box that a row names; None if it names none. Raises UserError for one that is incomplete."""
    for names in BOXES:
        words = [values[name] for name in names]
        if any(words):
            try:
                left, top, right, bottom = map(float, words)
            except ValueError:
                raise UserError(f"{where}: {', '.join(names)} are {', '.join(map(repr, words))}: expected "
                                f"four numbers, or none.") from None
            return Box(left, top, right, bottom) if names == BOXES[0] else \
                Box(left, top, right - left, bottom - top)
    return None


def class_of(values: Row, normal: Sequence[str], where: str) -> str:
    """The class of a row, '' if it has none: the first of several, as in 'Mass|Nodule'; the normal one where
    the label is 0. Raises UserError for an odd label, and for one that contradicts the class.
    """
    class_name = values['class'].split('|')[0].strip()
    if not values['label']:
        return class_name
    label = known(LABELS, values['label'].removesuffix('.0'), 'label', where)
    if label and is_among(class_name, normal):
        raise UserError(f"{where}: the label {values['label']!r} says anomalous, the class {class_name!r} is "
                        f"normal: correct one of them, or name another column with --columns.")
    return (class_name or ANOMALOUS) if label else normal[0]


def known(table: Mapping[str, T], word: str, what: str, where: str) -> T:
    """What a table says of a word in a row. Raises UserError for a word that is not in it."""
    if word.lower() not in table:
        raise UserError(f"{where}: the {what} {word!r} is none of {', '.join(table)}.")
    return table[word.lower()]


# ------------------------------------------------------------------------------------------------------ rows

def read_table(table: Path) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The rows of a CSV, TSV or JSON file, and the names of all columns. Raises UserError."""
    text = read_text(table)
    try:
        if table.suffix.lower() == '.json':
            rows = list(json_rows(json.loads(text)))
        else:
            first = text.partition('\n')[0]
            delimiter = max(',;\t', key=first.count)
            rows = list(csv_rows(csv.DictReader(io.StringIO(text, newline=''), delimiter=delimiter)))
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"the table {table} cannot be read ({reason(error)}).") from None
    return rows, list(dict.fromkeys(name for row in rows for name in row if name))


def read_rows(table: Path, config: ReaderConfig) -> Iterator[Row]:
    """The rows of a table by the names in COLUMNS. Raises UserError if it lacks a column."""
    rows, names = read_table(table)
    places, given = columns(config, names, table), (*config.normal_classes, *config.anomalous_classes)
    for row in rows:
        values = {name: cell(row.get(place), given) for name, place in places.items()}
        if config.class_columns:
            values['class'] = next((name for name in config.class_columns if is_one(row.get(name))), '')
        yield values


def csv_rows(table: csv.DictReader) -> Iterator[Row]:
    """The rows of a table. Raises ValueError if it is not known which column a cell is of."""
    names = [name for name in table.fieldnames or () if name]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(f'it has two columns {twice[0]!r}')
    for number, row in enumerate(table, 1):
        if any(map(str.strip, row.pop(None, ()))):
            raise ValueError(f'row {number} has more cells than there are columns: put quotes around a cell '
                             f'that holds the delimiter')
        yield row


def cell(value: Any, given: Sequence[str] = ()) -> str:
    """What a cell says: nothing, where a program wrote `nan` or such, unless a class `given` is so called."""
    text = '' if value is None else str(value).strip()
    return '' if text.lower() in MISSING and not is_among(text, given) else text


def json_rows(found: Any) -> Iterator[dict[str, Any]]:
    """Rows from a list of them, or from file names by part and by label or class."""
    if isinstance(found, list) and all(isinstance(row, dict) for row in found):
        yield from found
        return
    for part, classes in found.items() if isinstance(found, dict) else [('', None)]:
        if not isinstance(classes, dict) or not all(isinstance(files, list) for files in classes.values()):
            raise ValueError('expected a list of rows, or {part: {class: [files]}}')
        for name, files in classes.items():
            key = 'label' if name in LABELS else 'class'
            yield from ({'path': path, key: name, 'part': part} for path in files)


def columns(config: ReaderConfig, names: Sequence[str], table: Path) -> dict[str, str]:
    """The column of the table that holds each of COLUMNS, '' if none does. Raises UserError."""
    wanted = dict(pair.split('=', 1) for pair in config.columns)
    first = table == Path(config.data)                   # further tables may have fewer columns
    for name in (*wanted.values(), *config.class_columns):
        if name not in names and first:
            raise UserError(f"--data: {table} has no column {name!r}: found {', '.join(names) or 'none'}.")
    own = {name: next((place for place in names if place.strip().lower() == name), '') for name in COLUMNS}
    places = own | {name: place for name, place in wanted.items() if place in names}
    for box in BOXES:                                    # width and height alone are those of the image
        if not all(places[name] for name in box):
            places |= dict.fromkeys(box, '')
    classed = places['class'] or places['label'] or config.class_columns or not first
    if not (places['path'] and classed):
        raise UserError(f"--data: {table} has no column of {'a class' if places['path'] else 'paths'}: found "
                        f"{', '.join(names) or 'none'}. Say which with --columns path=... class=...")
    return places


def is_one(value: Any) -> bool:
    try:
        return float(value) == 1
    except (TypeError, ValueError):
        return False


@dataclass
class Files:
    """The files below some folders, found by what a table calls them."""
    roots: Sequence[Path]                                    # the folders of the tables among them
    first: int = 0                                           # as many of them go before that of a table
    used: dict[str, str] = field(default_factory=dict)       # file -> the folders that a table gave it
    passed: Passed = field(default_factory=dict)             # below the first one
    tables: dict[Path, dict[str, list[str]]] = field(default_factory=dict)

    def find(self, name: str, near: Path) -> str:
        """The file of a path, with its suffix or without, perhaps below more folders than there are here, or
        of a mere file name; of those in several folders the one beside the table, which lies in `near`; '' if
        there is none, or if several have the name. Raises UserError for a file that has been found in other
        folders before, as patient1/scan.png and patient2/scan.png.
        """
        if not (steps := PurePosixPath(name.replace('\\', '/')).parts):
            return ''
        keys = [fold('/'.join(steps[k:])) for k in range(len(steps))]
        keys += [f'*{keys[0]}'] if len(steps) == 1 else []
        above = ''.join(f'/{fold(step)}' for step in steps[:-1])
        for root in dict.fromkeys((*self.roots[:self.first], near, *self.roots)):
            for key in keys:
                if len(found := self.table(root).get(key, ())) == 1:
                    before = self.used.setdefault(found[0], above)
                    if not (above.endswith(before) or before.endswith(above)):
                        raise UserError(f"--data: {name!r} and a file of this name in {before!r} would both "
                                        f"be {found[0]}: name the folder that holds both with --images.")
                    return found[0]
        return ''

    def table(self, root: Path) -> dict[str, list[str]]:
        """Paths of the files below a root by their relative names and, after a *, by their file names."""
        if root not in self.tables:
            table = self.tables[root] = defaultdict(list)
            for file in files_below(root, self.passed if root == self.roots[0] else {}):
                name = fold(file)
                for key in {name, os.path.splitext(name)[0]}:
                    table[key].append(os.path.join(root, file))
                    table[f"*{key.rpartition('/')[2]}"].append(os.path.join(root, file))
        return self.tables[root]

    def id_of(self, path: str) -> str:
        """The name of a file below the first root, or else below the folder that holds all of them."""
        inside = Path(path).is_relative_to(self.roots[0])
        return relative_name(path, self.roots[0] if inside else
                             os.path.commonpath(map(os.path.abspath, self.roots)))

    def unused(self) -> list[str]:
        """Images below the first root that were never asked for."""
        paths = {path for found in self.table(self.roots[0]).values() for path in found}
        return sorted(self.id_of(path) for path in paths - {*self.used} if path.lower().endswith(SUFFIXES))


# ----------------------------------------------------------------------------------------------------- arrays

NONE = 'none'                               # the class of an image with several labels, all of them 0


def read_array_file(config: ReaderConfig, row: DataSet) -> Source:
    """The images of an npz file with `train_images`, `train_labels` and so on, as (N, C, S, S); classes are
    the numbers in it. If an image has several labels of 0 and 1, the first 1 counts; `none` is the class
    without any.
    """
    path = Path(config.data)
    config.check_table(False)

    def parts() -> Iterator[tuple[str, np.ndarray, list[str]]]:
        arrays = read_npz(path)
        given = [part for part in PARTS if f'{part}_images' in arrays and f'{part}_labels' in arrays]
        if not given:
            raise UserError(f"--data: {path} holds {', '.join(arrays) or 'nothing'}: expected train_images, "
                            f"train_labels and perhaps those of val and test.")
        for part in given:
            images, labels = arrays[f'{part}_images'], arrays[f'{part}_labels']
            flat = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
            if images.dtype != np.uint8 or not flat or labels.dtype.kind not in 'iu' \
                    or labels.shape[:1] != images.shape[:1]:
                raise UserError(f"--data: {path} has {part}_images {images.dtype} {images.shape} with labels "
                                f"{labels.dtype} {labels.shape}: expected images in 2D, uint8.")
            yield part, images, [name_of(label.reshape(-1)) for label in labels]

    return import_arrays(config, row, {'npz': str(path.resolve()), 'stamp': stamp(path)}, str(path), parts)


def name_of(label: np.ndarray) -> str:
    if len(label) == 1:
        return str(label[0])
    return str(label.argmax()) if label.any() else NONE
