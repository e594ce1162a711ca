"""Volumes (NIfTI) as a model sees them: found by subjects.py, read by nifti.py.

A volume comes to the model's grid in one interpolation: reorientation, cropping, spacing and padding are one
affine, and so is the way back. C channels, *S = (D, H, W) voxels of the model, which run to the right, to the
front and upwards (RAS+).
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from readers.body import body, otsu
from readers.cache import stamp
from readers.config import DataSet, ReaderConfig, VolumeConfig, volume_flags
from readers.items import Item, Listing, Loaded, import_items
from readers.parallel import attempt
from readers.paths import Found, Passed, find_root, passed_line, printable
from readers.source import Source, Unreadable, to_integers
from readers.split import count, noted
from readers.volumes.nifti import Grid, Nifti, read_nifti, resample
from readers.volumes.series import members, series_in
from readers.volumes.subjects import AUTO, NORMAL, find_subjects, owner, with_classes, with_keys
from utils import UserError

LESION = 'lesion'                          # the class of a subject with a label, where no folder says more
SPREAD = 0.01                              # relative difference of voxel sizes that counts as none
MOST_THREADS = 4                           # that read at once: of large volumes each takes a gigabyte
NO_PLACE = 'without a place in mm (neither sform nor qform): axes are taken to run as NIfTI says for these'
NOT_FINITE = 'had voxels that were not finite: they are 0'
OUTSIDE = 'with labels that mark nothing of what the model sees'
CUT = 'larger than the model sees lose their ends'
FRAMES_ALONE = ', or leave one DICOM file of several frames in each folder'


@dataclass(frozen=True)
class VolumeLoader:
    """What is done to every subject, whether of a run's data set or new."""
    config: VolumeConfig
    modalities: tuple[str, ...]
    labels: str
    depth: int                             # bits of a voxel, 8 or 16
    shape: tuple[int, ...] = ()            # *S of the model
    usual: tuple[float, ...] = ()          # mm along RAS of a run whose --spacing is 0; () = as the files are
    by_label: bool = False                 # labels decide who is anomalous, as no folder does

    @classmethod
    def of(cls, config: ReaderConfig, row: DataSet) -> 'VolumeLoader':
        """As the flags say."""
        return cls(config, tuple(config.modalities or row.modalities), config.labels or row.labels,
                   config.depth)

    @property
    def channels(self) -> int:
        return len(self.modalities) or 1

    def find(self, path: str | Path, without: str | Path = '') -> Found:
        """The subjects below a folder as in training, but for the folder `without`; or the one of a file.
        Raises UserError if there is none, or if one file comes without its mask.
        """
        mask = self.config.volume_mask
        root, mask = Path(path), '' if mask == AUTO else mask
        if not root.exists():
            raise UserError(f"--data: {root} does not exist. Give a folder of NIfTI files, or one file.")
        if not root.is_dir() or (self.config.dicom_series and '.' in series_in(root, os.listdir(root))[0]):
            if mask:
                raise UserError(f"--data {root}: the run keeps what is inside the mask {mask!r} of each "
                                f"subject (--volume_mask). Give the folder that holds both files.")
            name, _ = owner(root.name, [*filter(None, (*self.modalities, self.labels, mask))])
            return Found({printable(name): Item(printable(root.name), NORMAL, path=str(root))}, {})
        passed: Passed = {}
        subjects, bad = find_subjects(root, self.config, self.modalities, self.labels, passed, without)
        found = {s.id: replace(s, masks=()) for s in subjects} | {name: Unreadable(why) for name, why in bad}
        return Found({printable(name): found[name] for name in sorted(found)}, passed)

    def load(self, subject: Item | Unreadable, outline: Grid | None = None) -> Loaded:
        """A subject in the shape of the model; `outline` where it is known already. Raises Unreadable."""
        if isinstance(subject, Unreadable):
            raise subject
        outline = outline or self.outline(subject)
        loaded = self.on_grid(subject, outline.centered(self.shape))
        cut = any(have > kept for have, kept in zip(outline.shape, self.shape, strict=True))
        return loaded._replace(repairs=(*loaded.repairs, CUT)) if cut else loaded

    def outline(self, subject: Item) -> Grid:
        """What a model should see: cropped, at its spacing, as far as the body goes. Raises Unreadable."""
        first, crop = self.first(subject), self.config.crop
        grid = first.grid
        if crop:
            start, end = np.array(crop[:3]), np.minimum(crop[3:], grid.shape)
            if (end <= start).any():
                raise Unreadable(f'has {grid.shape} voxels along RAS, none of them in --crop')
            grid = grid.box(start, end - start)
        foreign = self.usual and apart(grid.spacing, self.usual)
        grid = grid.spaced(self.config.spacing or (np.array(self.usual) if foreign else 0))
        inside = self._body(subject, first)
        if inside is None:
            return grid
        inside = resample(*inside, grid, order=0)
        if not inside.any():
            raise Unreadable('has an empty body mask' + ' within --crop' * bool(crop))
        box = ndimage.find_objects(inside)[0]
        return grid.box([s.start for s in box], [s.stop - s.start for s in box])

    def on_grid(self, subject: Item, grid: Grid) -> Loaded:
        """A subject on any grid. Raises Unreadable."""
        first = self.first(subject)
        files = [first, *(self._read(path, first) for path in subject.others)]
        channels = [(values, file.grid) for file in files for values in file.values]
        if len(channels) != self.channels:
            names = f' ({", ".join(self.modalities)})' * bool(self.modalities)
            raise Unreadable(f'has {count(len(channels), "channel")}, {self.channels} expected{names}: as '
                             f'many as --modalities names, in a file of each or in one')
        inside = self._body(subject, first)
        inside = np.ones(grid.shape, bool) if inside is None else resample(*inside, grid, order=0) > 0
        pixels = np.stack([self._scaled(*channel, grid, inside) for channel in channels])    # (C, *S)
        label, mask, class_name = self.marked(subject.masks, first), None, ''
        if label:
            mask = resample(*label, grid, order=0)[None]
            ml = float(label[0].sum() * abs(np.linalg.det(label[1].affine[:3, :3])) / 1000)
            if self.by_label and subject.class_name == NORMAL and round(ml, 6) > self.config.lesion_load:
                class_name = LESION
        digest = files[0].sha256 if len(files) == 1 else \
            hashlib.sha256(''.join(f.sha256 for f in files).encode()).hexdigest()
        repairs = {NOT_FINITE: any(f.repaired for f in files), NO_PLACE: not all(f.placed for f in files),
                   OUTSIDE: label is not None and label[0].any() and not mask.any()}
        return Loaded(pixels, mask, digest, sum(f.num_bytes for f in files), (grid, first.own),
                      tuple(words for words, happened in repairs.items() if happened), class_name, inside)

    def first(self, subject: Item) -> Nifti:
        """The file of its first channel, which gives the grid. Raises Unreadable."""
        return self._read(subject.path)

    def _read(self, path: str, like: Nifti | None = None) -> Nifti:
        try:
            return read_nifti(path, like)
        except Unreadable as error:
            raise Unreadable(f'has a file {os.path.basename(path)} that {error}') from None

    def _body(self, subject: Item, first: Nifti) -> tuple[np.ndarray, Grid] | None:
        """The inside (X, Y, Z) uint8 0 or 1 with its grid; None if all is inside."""
        if self.config.volume_mask == AUTO:
            values = first.values[0]
            return body(values[None, None], otsu(values), largest=True)[0].astype(np.uint8), first.grid
        return self.marked(subject.body, first)

    def _scaled(self, values: np.ndarray, source: Grid, grid: Grid, inside: np.ndarray) -> np.ndarray:
        """One channel (*S) as integers; percentiles are over all voxels, as published, the padding's too."""
        window = self.config.window
        darkest = window[0] if window else float(values.min())               # air: 0 in MRI, -1024 in CT
        x = np.where(inside, resample(values, source, grid, fill=darkest), np.float32(darkest))
        low, high = window or np.percentile(x, self.config.percentiles)
        if not high > low:
            raise Unreadable(f'shows the same value everywhere in a channel (percentiles {low:g} and '
                             f'{high:g}): it is empty, or lies elsewhere than the first channel')
        return to_integers(np.clip((x - low) / (high - low), 0, 1), self.depth)

    def marked(self, masks: Sequence[str], first: Nifti) -> tuple[np.ndarray, Grid] | None:
        """What the one file of `masks` marks (X, Y, Z) uint8 0 or 1 with its grid, None without a file;
        `first` is the first file of the subject. Raises Unreadable.
        """
        if not masks:
            return None
        file = self._read(masks[0], first)
        return (file.values > 0).any(0).astype(np.uint8), file.grid


# ----------------------------------------------------------------------------------------------------- import

def read_volumes(config: ReaderConfig, row: DataSet) -> Source:
    """Every subject of the chosen classes, as (N, C, *S)."""
    root, loader, notes = find_root(row.folder(config, row), row.where), VolumeLoader.of(config, row), []
    subjects, bad, by_label = find_all(root, config, row, loader, notes)
    loader = replace(loader, by_label=by_label)
    items = [replace(s, stamp=[(file, *stamp(file)) for path in s.files for file in members(path)])
             for s in subjects]
    side = config.image_size or row.size
    key = {'volumes': str(root.resolve()), **volume_flags(config, 'augment'), 'channels': loader.modalities,
           'label': loader.labels, 'side': side,
           'files': [[item.id, item.class_name, item.part, item.stamp] for item in items]}

    def read() -> Listing:
        listing = Listing(str(root), items, classes=[LESION] * by_label, threads=MOST_THREADS, kind='subject')
        listing.measure = lambda chosen: measure(chosen, loader, side, listing)
        return listing

    source = import_items(config, row, key, read)
    return replace(source, notes=notes + source.notes, bad=bad + source.bad)


def find_all(root: Path, config: ReaderConfig, row: DataSet, loader: VolumeLoader,
             notes: list[str]) -> tuple[list[Item], list[tuple[str, str]], bool]:
    """The subjects below `root` with their classes and parts, (id, reason) of those that lack a file, and
    whether labels decide who is normal: no folder says so.
    """
    passed: Passed = {}
    found, bad = find_subjects(root, config, loader.modalities, loader.labels, passed)
    subjects = with_classes(found, config.normal_classes or row.normal, row.where)
    in_folders = subjects is not found
    if config.labels and not any(s.masks for s in subjects):
        raise UserError(f"--labels {loader.labels}: no subject in {root} has a file of it.")
    in_one_file = len(loader.modalities) != 1 and not found[0].others
    if in_one_file and (deep := [s.id for s in subjects if s.id.count('/') > in_folders]):
        raise UserError(f"--data: {deep[0]} lies in a folder of a channel or a subject: name the channels "
                        f"with --modalities{FRAMES_ALONE * config.dicom_series}. {row.where}")
    subjects = with_keys(subjects, config, root, notes)
    by_label = not in_folders and any(s.masks for s in subjects)
    unknown = [s.id for s in subjects if by_label and s.class_name == NORMAL and not s.masks]
    notes += noted(unknown, 'subject', f'without a file of {loader.labels} count as without lesion')
    notes += passed_line(passed) * (not row.phantoms)
    return subjects, bad, by_label


def measure(items: list[Item], loader: VolumeLoader, side: int,
            listing: Listing) -> tuple[tuple[int, ...], list[Item]]:
    """The shape (C, *S) that all volumes are brought to, and the items that can be: a cube of `side`, as the
    flags say, or the shape of the largest, rounded up.
    """
    outlines = attempt(loader.outline, items, 'measuring volumes', MOST_THREADS)
    listing.bad += [(item.id, o) for item, o in zip(items, outlines, strict=True) if isinstance(o, str)]
    outlines = {item.id: o for item, o in zip(items, outlines, strict=True) if not isinstance(o, str)}
    if not outlines:
        return (), []
    expect_one_spacing(outlines)
    multiple, shape = loader.config.pad_multiple, tuple(loader.config.volume_shape) or (side,) * 3
    if not min(shape):
        largest = np.max([o.shape for o in outlines.values()], axis=0)
        shape = tuple((-(-largest // multiple) * multiple).tolist())
    spacing = next(iter(outlines.values())).spacing
    listing.notes.append(f"volumes of {' x '.join(map(str, shape))} voxels to the right, front and up, "
                         f"{in_mm(spacing)} mm apart")
    placed = replace(loader, shape=shape)
    measured = [replace(item, read=lambda item: placed.load(item, outlines[item.id]))
                for item in items if item.id in outlines]
    return (loader.channels, *shape), measured


def apart(spacings: np.ndarray, usual: Sequence[float]) -> np.ndarray:
    """Which spacings (..., 3) are another than the `usual` one (3,): (...) bool."""
    return (np.abs(spacings / np.asarray(usual) - 1) > SPREAD).any(-1)


def expect_one_spacing(outlines: dict[str, Grid]) -> None:
    """Raises UserError if voxels are of different sizes; `outlines` by the ids of subjects."""
    spacings = {name: grid.spacing for name, grid in outlines.items()}                   # (3,), mm
    first = next(iter(spacings))
    if other := next((name for name in spacings if apart(spacings[name], spacings[first])), None):
        words = ', '.join(f'{name} {in_mm(spacings[name])}' for name in (first, other))
        raise UserError(f"--data: voxels are of different sizes in mm ({words}): give one with --spacing.")


def in_mm(spacing: Sequence[float]) -> str:
    """'1 x 1 x 3'."""
    return ' x '.join(f'{mm:.3g}' for mm in spacing)
