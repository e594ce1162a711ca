"""The importer: the one way from what a reader lists to the pixels that a model sees.

A reader lists Items and says how each is loaded. The importer chooses the classes, loads on all cores, writes
the cache, finds near-duplicates and collects notes. New images are loaded by the same functions (Preparation
in readers/parts.py), so that every check on pixels holds for both. N images, C channels, *S the size.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from readers.cache import cached_files, check_room
from readers.config import DataSet, ReaderConfig
from readers.duplicates import near_duplicates
from readers.parallel import attempt
from readers.paths import printable
from readers.source import CLASSES_SHOWN, DTYPES, Array, Entry, Source, is_among
from readers.split import noted
from storage.limits import most_bytes
from utils import UserError

DECODERS = ('gdcm', 'jpeg_ls', 'libjpeg', 'openjpeg', 'pylibjpeg')      # of pydicom: modules
LEARNED = ('train', 'val')           # parts from which a model learns: their anomalous images are left out


class Loaded(NamedTuple):
    """An image or a volume as the model sees it, before --num_x_bits is applied."""
    pixels: np.ndarray                   # (C, *S) uint8 or uint16
    mask: np.ndarray | None = None       # (1, *S) uint8, 1 = anomalous
    sha256: str = ''                     # of the file; of the pixels where there is no file
    num_bytes: int = 0                   # size of the file; as a PNG where there is no file
    grids: tuple = ()                    # of a volume: the Grid of the model and that of its first file
    repairs: tuple[str, ...] = ()        # what was changed or looks wrong: words that go on from '3 images'
    class_name: str = ''                 # where the content decides it; '' = as listed
    body: np.ndarray | None = None       # of a volume, (*S) bool: what was kept


@dataclass(frozen=True)
class Item:
    """One image, or one person at one time, that a reader has found and not yet opened."""
    id: str
    class_name: str
    part: str = ''                               # 'train', 'val' or 'test' where the data set says so
    patient: str = ''
    path: str = ''                               # '' where it is not a file
    masks: tuple[Any, ...] = ()                  # paths, names or boxes (images/masks.py) of what marks it
    others: tuple[str, ...] = ()                 # of a subject: the files of its further channels
    body: tuple[str, ...] = ()                   # of a subject: the file that marks what to keep
    stamp: Any = ()                              # another one after the content has changed
    read: Callable[['Item'], Loaded] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a file name that is no UTF-8, which the id of a file of a run has to be."""
        if not self.id.isascii() and printable(self.id) != self.id:
            raise UserError(f"the file name {printable(self.id)} is no UTF-8: rename it.")

    @property
    def files(self) -> list[str]:
        """The paths of all its files."""
        masks = [mask for mask in self.masks if isinstance(mask, str)]
        return [self.path, *self.others, *self.body, *masks]

    def load(self) -> Loaded:
        """The image, as the model sees it. Raises Unreadable."""
        return self.read(self)


@dataclass
class Listing:
    """What a reader has found. `measure` is called with the chosen items before any is loaded: it gives the
    shape and the items to load, and may add to `bad` and `notes`.
    """
    name: str                                    # for errors: where the classes are
    items: Sequence[Item]
    shape: tuple[int, ...] = ()                  # (C, *S)
    classes: Collection[str] = ()                # further ones, which no item is known to have yet
    bad: list[tuple[str, str]] = field(default_factory=list)      # (id, reason)
    notes: list[str] = field(default_factory=list)
    near_duplicates: bool = True                 # search for them
    threads: int = 0                             # that load at once; 0 = one per core
    kind: str = 'image'                          # or 'subject'
    flags: dict[str, Any] = field(default_factory=dict)           # with which stored volumes were prepared
    measure: Callable[[list[Item]], tuple[tuple[int, ...], list[Item]]] | None = None


def import_items(config: ReaderConfig, row: DataSet, key: dict[str, Any],
                 read: Callable[[], Listing]) -> Source:
    """The items of the chosen classes that `read()` lists, as pixels (N, C, *S) of config.depth bits.

    All of it comes from the cache if `key`, JSON of what is read and how, and the classes asked for are those
    of an earlier run. Files that cannot be read are in Source.bad. Raises UserError for wrong classes.
    """
    key = {**key, 'depth': config.depth, 'normal': row.normal, 'normal_classes': config.normal_classes,
           'anomalous_classes': config.anomalous_classes, 'masks': row.masks}

    def make(target: Path) -> dict[str, Any]:
        listing = read()
        if twice := [name for name, n in Counter(item.id for item in listing.items).items() if n > 1]:
            raise UserError(f"--data: {listing.name} holds {twice[0]!r} twice, which names one image.")
        found = sorted({*listing.classes, *(item.class_name for item in listing.items)})
        normal, anomalous = choose_classes(found, config, row, listing.name)
        items = chosen_items(listing, normal, anomalous, row)
        made = write_pixels(items, listing, target, config.depth)
        entries = [astuple(e) for e in made.pop('entries') if e.class_name in normal + anomalous]
        return {**made, 'entries': entries, 'bad': listing.bad, 'notes': listing.notes,
                'normal_classes': normal, 'anomalous_classes': anomalous, 'flags': listing.flags,
                'able': able()}

    return cached_files(config.cache_dir, key, make, _source)


def able() -> list:
    """What decides which files can be read, besides the files: --max_gb and the decoders that are there."""
    return [most_bytes(), *(name for name in DECODERS if find_spec(name))]


def _source(folder: Path, fields: dict[str, Any]) -> Source | None:
    """What is in a cache folder; None if some files could not be read then and perhaps can be now."""
    if fields.pop('able') != able() and fields['bad']:
        return None
    masks = folder / 'masks.npy'
    return Source(entries=[Entry(*values) for values in fields.pop('entries')],
                  pixels=Array(folder / 'pixels.npy'), masks=Array(masks) if masks.exists() else None,
                  normal_classes=tuple(fields.pop('normal_classes')),
                  anomalous_classes=tuple(fields.pop('anomalous_classes')), **fields)


# ---------------------------------------------------------------------------------------------------- classes

def choose_classes(found: Sequence[str], config: ReaderConfig, row: DataSet,
                   where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The normal and the anomalous classes among `found`, with the spelling found.

    Where the data set has names for normal classes, all others are anomalous unless some are named; else all
    are normal that are not named as anomalous. Raises UserError for a class that is not there or is both.
    """
    named = config.normal_classes or row.normal
    usual = pick(found, config.normal_classes, 'normal', where) or \
        [name for name in found if is_among(name, row.normal)]
    if named and not usual:
        raise UserError(f"--data: {where} has no class of normal {'subjects' if row.dims == 3 else 'images'} "
                        f"named {' or '.join(named)}: found {', '.join(found[:CLASSES_SHOWN])}. Name the "
                        f"normal ones with --normal_classes.")
    abnormal = pick(found, config.anomalous_classes, 'anomalous', where)
    if not named:
        usual = [name for name in found if name not in abnormal]
    if row.normal and not config.anomalous_classes:
        abnormal = [name for name in found if name not in usual]
    if both := set(usual) & set(abnormal):
        raise UserError(f"class {min(both)!r} is both normal and anomalous: take it out of --normal_classes "
                        f"or of --anomalous_classes.")
    return tuple(usual), tuple(abnormal)


def pick(found: Sequence[str], names: Sequence[str], kind: str, where: str) -> list[str]:
    """The classes among `found` that the user names. Raises UserError for one that is not there."""
    for name in names:
        if not is_among(name, found):
            shown = [*found[:CLASSES_SHOWN], *['others'] * (len(found) > CLASSES_SHOWN)]
            raise UserError(f"{kind} class {name!r} is not in {where}: found {', '.join(shown)}. Check "
                            f"--data, or name the classes with --{kind}_classes.")
    return [name for name in found if is_among(name, names)]


def chosen_items(listing: Listing, normal: Sequence[str], anomalous: Sequence[str],
                 row: DataSet) -> list[Item]:
    """The items of these classes.

    Of images, masks count where they mark anomalies, and anomalous ones never come from a published training
    or validation part: no model has seen their writers. Subjects keep both; key files decide about the parts.
    """
    items = [item for item in listing.items if item.class_name in (*normal, *anomalous)]
    if row.dims == 2:
        left = [item.id for item in items if item.class_name in anomalous and item.part in LEARNED]
        spare = [item.id for item in items if item.class_name in normal and item.masks and row.masks]
        items = [item if item.class_name in anomalous and row.masks else replace(item, masks=())
                 for item in items if item.class_name in normal or item.part not in LEARNED]
        listing.notes += [
            *noted(left, 'image',
                   'of anomalous classes in a published part for training or validation left out'),
            *noted(spare, 'image', 'of normal classes with a mask, which is not used')]
    if not items and not listing.bad:
        raise UserError(f"--data: {listing.name} has no image of the classes "
                        f"{', '.join((*normal, *anomalous)[:CLASSES_SHOWN])}: choose others.")
    return items


# ----------------------------------------------------------------------------------------------------- pixels

def write_pixels(items: list[Item], listing: Listing, target: Path, depth: int) -> dict[str, Any]:
    """Loads every item into `target`/pixels.npy and masks.npy; returns entries and pairs of near-duplicates.

    What cannot be read, and notes on repairs, go to the listing.
    """
    shape = listing.shape
    if listing.measure:
        shape, items = listing.measure(items)
    if not items:
        return {'entries': []}
    with_mask = {item.id: i for i, item in enumerate(item for item in items if item.masks)}
    pixels_shape, masks_shape = (len(items), *shape), (len(with_mask), 1, *shape[1:])
    check_room(target, int(np.prod(pixels_shape)) * depth // 8 + int(np.prod(masks_shape)))
    new = np.lib.format.open_memmap
    pixels = new(target / 'pixels.npy', 'w+', np.dtype(DTYPES[depth]), pixels_shape)
    masks = new(target / 'masks.npy', 'w+', np.uint8, masks_shape) if with_mask else None

    def load(row: int) -> tuple[Entry, tuple[str, ...]]:
        item = items[row]
        loaded, mask_row = item.load(), with_mask.get(item.id, -1)
        pixels[row] = loaded.pixels
        if mask_row >= 0:
            masks[mask_row] = loaded.mask
        entry = Entry(item.id, item.path, loaded.class_name or item.class_name, loaded.sha256,
                      loaded.num_bytes, row, mask_row, item.part, item.patient,
                      grids=tuple(grid.as_json() for grid in loaded.grids))
        return entry, loaded.repairs

    results = attempt(load, range(len(items)), f'reading {listing.kind}s', listing.threads)
    listing.bad += [(item.id, r) for item, r in zip(items, results, strict=True) if isinstance(r, str)]
    good = [r for r in results if not isinstance(r, str)]
    for repair in dict.fromkeys(words for _, repairs in good for words in repairs):
        listing.notes += noted([e.id for e, repairs in good if repair in repairs], listing.kind, repair)
    # Rows that could not be read are black, which counts as similar to nothing.
    pairs = near_duplicates(pixels) if listing.near_duplicates else []
    for array in (pixels, masks):
        if array is not None:
            array.flush()
    return {'entries': [entry for entry, _ in good],
            'near_duplicates': [(items[i].id, items[j].id, c) for i, j, c in pairs]}
