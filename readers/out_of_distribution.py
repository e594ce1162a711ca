"""Images from elsewhere that are to be told from a run's own: what `--ood NAME=PATH[:CHANGE]` names.

B images, C channels, *S = (H, W) pixels or (D, H, W) voxels; S x S pixels as the model sees them, with its
border.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from readers.config import DataSet, ReaderConfig
from readers.images.decode import ImageLoader, png_bytes
from readers.images.files import image_files
from readers.images.folder import read_images
from readers.items import Item
from readers.lesions import IMAGE_MM, SIMULATIONS
from readers.parts import LEFT_RIGHT
from readers.paths import MASKS, Passed, pass_over, passed_line
from readers.source import Entry, Images, Source
from readers.volumes.nifti import entry_grids
from utils import UserError, mix_seed

OWN = 'test'               # in place of a path: the run's own normal test images
INVERT = 'invert'          # light for dark: a Part does it, before it makes an image binary
INLIER = 'inlier'          # the images of the set are the normal ones of the test
ENHANCED = 'enhanced'      # of the run's own images with known lesions; the other changes are of normal ones
# of (B, C, *S); the two axes are as long as each other where a quarter is turned
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'rot90': lambda x: np.rot90(x, 1, (2, 3)),                 # counter-clockwise; of volumes seen from above
    'rot180': lambda x: np.rot90(x, 2, (2, 3)),
    'rot270': lambda x: np.rot90(x, 3, (2, 3)),
    'flip': lambda x: np.flip(x, LEFT_RIGHT[x.ndim]),          # left for right
}
CHANGES = (*TURNS, *SIMULATIONS, INVERT, INLIER)


@dataclass(frozen=True)
class Wanted:
    """One set of images: the class that they are to be, where they lie, what is done to them."""
    name: str
    path: str
    changes: tuple[str, ...] = ()

    @property
    def of_pixels(self) -> tuple[str, ...]:
        return tuple(c for c in self.changes if c not in (INVERT, INLIER))

    @property
    def gives_masks(self) -> bool:
        return any(c in SIMULATIONS for c in self.changes)

    @property
    def label(self) -> int:
        return int(INLIER not in self.changes)

    @property
    def inverted(self) -> bool:
        return self.changes.count(INVERT) % 2 == 1


def parse(text: str) -> Wanted:
    """'fashion=/data/fashion:rot90:invert'. A path may hold colons. Raises UserError."""
    name, _, path = text.partition('=')
    changes: list[str] = []
    while path.rpartition(':')[2] in CHANGES and ':' in path:
        path, _, change = path.rpartition(':')
        changes.insert(0, change)
    if not name or not path or '/' in name:
        raise UserError(f"--ood {text!r}: expected NAME=PATH, or NAME=PATH:CHANGE with a change of "
                        f"{', '.join(CHANGES)}.")
    if path.startswith(f'{OWN}:') or (path == OWN and not changes):
        raise UserError(f"--ood {text!r}: the run's own test images need a change of {', '.join(CHANGES)}; a "
                        f"folder of this name is ./{OWN}.")
    if path != OWN and ENHANCED in changes:
        raise UserError(f"--ood {text!r}: {ENHANCED} is of the run's own images with known lesions: "
                        f"NAME={OWN}:{ENHANCED}.")
    return Wanted(name, path, tuple(changes))


def read_folder(wanted: Wanted, most: int, seed: int, loader: ImageLoader, config: ReaderConfig) -> Source:
    """All image files below a folder, of whatever class folders, as (N, C, S, S).

    At most `most` images, drawn by `seed`; 0 = all. Raises UserError if there is none.
    """
    name, folder = wanted.name, Path(wanted.path)
    passed: Passed = {}
    images, masks = image_files(folder, passed) if folder.is_dir() else ([], [])
    if not images:
        why = f'there is no image below {folder}' if folder.is_dir() else \
            f'{folder} is no folder of images and no LMDB of scripts/create_lmdb.py'
        raise UserError(f"--ood {name}: {why}. Correct the path; for a published data set take its name of "
                        f"--dataset as the name.")
    pass_over(passed, MASKS, *masks)
    items = [Item(image, name, path=str(folder / image)) for image in images]
    row = DataSet(read_folder, size=loader.size)                # without names of classes: all are taken
    return read_images(config, row, folder.resolve(), drawn(items, most, seed), passed_line(passed), loader,
                       near_duplicates=False)


def drawn(items: Sequence[Any], most: int, seed: int) -> list[Any]:
    """`most` of the items, drawn by `seed` and their ids, in their order; 0 = all."""
    if not most or len(items) <= most:
        return list(items)
    chosen = sorted(range(len(items)), key=lambda i: mix_seed(seed, 'ood', items[i].id))[:most]
    return [items[i] for i in sorted(chosen)]


class Changed:
    """Images of `entries` turned, or with lesions, in the bits of the run and with its border: (N, C, *S).

    An image is found under the row of its entry, and `masks` (N, 1, *S) uint8 0 or 1 under the same row.
    """

    def __init__(self, images: Images, entries: Sequence[Entry], wanted: Wanted, known: Any = None, *,
                 depth: int = 8, border: int = 0, seed: int = 0):
        """`known` are the masks that the entries name (Source.masks), None = none. Simulated lesions follow
        from (seed, NAME, id). Raises UserError for a turn that does not fit the shape.
        """
        self.images, self.known, self.wanted = images, known, wanted
        self.depth, self.border, self.seed = depth, border, seed
        self.entries, self.last = {e.row: self.placed(e) for e in entries}, None
        count, channels, *sides = images.shape
        if sides[0] != sides[1] and (quarters := [c for c in wanted.changes if c in ('rot90', 'rot270')]):
            raise UserError(f"--ood {wanted.name}: {quarters[0]} makes another shape of volumes of "
                            f"{' x '.join(map(str, sides))} voxels to the right, front and up. Take rot180 "
                            f"or flip.")
        self.shape = (count, channels, *(side + 2 * border for side in sides))
        self.masks = ChangedMasks(self)

    def as_class(self, sized: bool) -> list[Entry]:
        """The entries as images of the class that is wanted, under ids of their own; masks are where images
        are. Sizes of files are those as a PNG where there is no file, or if not `sized` unknown (0).
        """
        name, masks = self.wanted.name, self.wanted.gives_masks
        return [replace(e, id=f'{name}/{e.id}', class_name=name, label=self.wanted.label, part=OWN,
                        mask_row=e.row if masks or e.mask_row >= 0 else -1,
                        file_bytes=(e.file_bytes or self.png_bytes(e.row)) if sized else 0)
                for e in self.entries.values()]

    def placed(self, entry: Entry) -> Entry:
        """The entry of a volume with the grid that it has after the turns: maps go back to the file's own."""
        if not entry.grids:
            return entry
        model, own = entry_grids(entry)
        for change in self.wanted.of_pixels:
            model = model.turned(TURNS[change]) if change in TURNS else model
        return replace(entry, grids=(model.as_json(), own.as_json()))

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.changed(rows)[0]

    def changed(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, C, *S) and masks (B, 1, *S) of these rows; a batch asks for one after the other."""
        if self.last is None or self.last[0] != tuple(rows):
            self.last = tuple(rows), self.change(rows)
        return self.last[1]

    def change(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        x = self.images[rows]                                                    # (B, C, *S)
        if self.depth == 16 and x.dtype == np.uint8:
            x = x.astype(np.uint16) * 257                                        # 255 becomes 65535
        masks = np.zeros((len(x), 1, *x.shape[2:]), np.uint8)
        for mask, row in zip(masks, rows):
            if (mask_row := self.entries[row].mask_row) >= 0:
                mask[...] = self.known[[mask_row]][0]
        for number, change in enumerate(self.wanted.of_pixels):
            if change in TURNS:
                x, masks = TURNS[change](x), TURNS[change](masks)
            else:
                pairs = [self.simulated(change, number, *item) for item in zip(rows, x, masks)]
                x, masks = (np.stack(arrays) for arrays in zip(*pairs))
        around = ((0, 0), (0, 0), *[(self.border, self.border)] * (x.ndim - 2))
        return np.pad(x, around), np.pad(masks, around)

    def simulated(self, change: str, number: int, row: int, values: np.ndarray,
                  mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One image (C, *S) and its mask (1, *S) after a change, the `number`-th that is made."""
        entry, most = self.entries[row], np.iinfo(values.dtype).max
        sides = values.shape[1:]
        spacing = entry_grids(entry)[0].spacing if entry.grids else np.full(len(sides), IMAGE_MM / max(sides))
        random = np.random.default_rng(mix_seed(self.seed, 'simulated', self.wanted.name, number, entry.id))
        x, lesion = SIMULATIONS[change](values / most, mask[0] > 0, spacing, random)
        return np.rint(x * most).astype(values.dtype), lesion[None].astype(np.uint8)

    def png_bytes(self, row: int) -> int:
        """The size of one image without its border as a PNG, of 8 bits."""
        (height, width), border = self.shape[2:], self.border
        x = self[[row]][0, :, border:height - border, border:width - border]                       # (C, H, W)
        return png_bytes(x if x.dtype == np.uint8 else (x >> 8).astype(np.uint8), optimize=False)


class ChangedMasks:
    """The masks of a `Changed`: `masks[rows]` is (B, 1, *S) uint8."""

    def __init__(self, images: Changed):
        self.images, (count, _, *sides) = images, images.shape
        self.shape = (count, 1, *sides)

    def __getitem__(self, rows: Sequence[int]) -> np.ndarray:
        return self.images.changed(rows)[1]
