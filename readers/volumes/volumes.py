"""Volumes (NIfTI) as a model sees them: found by subjects.py, read by nifti.py.

A volume comes to the model's grid in one interpolation: reorientation, cropping, spacing and padding are one
affine, and so is the way back. C channels, *S = (D, H, W) voxels of the model, which run to the right, to the
front and upwards (RAS+).
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy import ndimage

from readers.body import body, otsu
from readers.config import VolumeConfig
from readers.duplicates import near_duplicates
from readers.images.folder import Unreadable, cores, stamp
from readers.source import DTYPES, Entry, Source, cached, check_room, choose_classes, same_name
from readers.split import count, some
from readers.volumes.nifti import Grid, Nifti, read_nifti, resample
from readers.volumes.subjects import AUTO, KEYS, NORMAL, Subject, find_subjects, with_classes, with_keys
from utils import UserError

LESION = 'lesion'                          # the class of a subject with a label, of which no folder says more
SPREAD = 0.01                              # relative difference of voxel sizes that counts as none
MOST_THREADS = 4                           # that read at once: of large volumes each takes a gigabyte

T = TypeVar('T')


# ------------------------------------------------------------------------------------------------ one subject

class Volume(NamedTuple):
    """A subject as a model sees it: pixels (C, *S) uint8 or uint16 and mask (1, *S) uint8 0 or 1, None
    without a label; the body (*S) bool; ml of labelled lesion in the file; its grid and that of the first
    file; hash and size of its files; what was put right, in words that go on from 'n subjects'.
    """
    pixels: np.ndarray
    mask: np.ndarray | None
    body: np.ndarray
    lesion_ml: float
    grid: Grid
    own: Grid
    sha256: str
    num_bytes: int
    repairs: list[str]


@dataclass(frozen=True)
class VolumePreparation:
    """What is done to each subject. `channels`: how many a subject must have; `depth` 8 or 16 bits; `window`:
    () = by percentiles; `usual`: the mm along RAS to which a file of another spacing is brought where
    `spacing` is 0, () = as it is.
    """
    channels: int
    depth: int
    body: str
    crop: tuple[int, ...]
    spacing: float
    percentiles: tuple[float, float]
    window: tuple[float, ...] = ()
    usual: tuple[float, ...] = ()

    @classmethod
    def of(cls, config: VolumeConfig, modalities: Sequence[str], depth: int) -> 'VolumePreparation':
        """As the flags say."""
        return cls(len(modalities) or 1, depth, config.volume_mask, tuple(config.crop), config.spacing,
                   tuple(config.percentiles), tuple(config.window))

    def outline(self, subject: Subject) -> Grid:
        """The voxels that a model should see: cropped, at the wanted spacing, as far as the body goes. Raises
        Unreadable.
        """
        first = self.first(subject)
        grid = first.grid
        if self.crop:
            start, end = np.array(self.crop[:3]), np.minimum(self.crop[3:], grid.shape)
            if (end <= start).any():
                raise Unreadable(f'has {grid.shape} voxels along RAS, none of them in --crop')
            grid = grid.box(start, end - start)
        foreign = self.usual and apart(grid.spacing, self.usual)
        grid = grid.spaced(self.spacing or (np.array(self.usual) if foreign else 0))
        body = self._body(subject, first)
        if body is None:
            return grid
        inside = resample(*body, grid, order=0)
        if not inside.any():
            raise Unreadable('has an empty body mask' + ' within --crop' * bool(self.crop))
        box = ndimage.find_objects(inside)[0]
        return grid.box([s.start for s in box], [s.stop - s.start for s in box])

    def load(self, subject: Subject, grid: Grid) -> Volume:
        """A subject on the model's grid: its outline, `centred` in the model's shape. Raises Unreadable."""
        first = self.first(subject)
        files = [first, *(self._read(path, first) for path in subject.files[1:])]
        channels = [values for file in files for values in file.values]
        if len(channels) != self.channels:
            raise Unreadable(f'has {count(len(channels), "channel")}, {self.channels} expected: as many as '
                             f'--modalities names')
        body = self._body(subject, first)
        inside = np.ones(grid.shape, bool) if body is None else resample(*body, grid, order=0) > 0
        sources = [file.grid for file in files for _ in file.values]
        pixels = np.stack([self._scaled(values, source, grid, inside) for values, source
                           in zip(channels, sources, strict=True)])                      # (C, *S)
        label, lesion_ml = self.lesions(subject, first), 0.0
        mask = None
        if label:
            mask = resample(*label, grid, order=0)[None]
            voxel = abs(np.linalg.det(label[1].affine[:3, :3]))                          # mm^3
            lesion_ml = round(float(label[0].sum() * voxel / 1000), 6)
        repairs = [words for words, happened in {
            'had voxels that were not finite: they are 0': any(f.repaired for f in files),
            'without a place in mm (neither sform nor qform): axes are taken to run as NIfTI says for these':
                not all(f.placed for f in files)}.items() if happened]
        digest = files[0].sha256 if len(files) == 1 else \
            hashlib.sha256(''.join(f.sha256 for f in files).encode()).hexdigest()
        return Volume(pixels, mask, inside, lesion_ml, grid, first.own, digest,
                      sum(f.num_bytes for f in files), repairs)

    def first(self, subject: Subject) -> Nifti:
        """The file of its first channel, which gives the grid. Raises Unreadable."""
        return self._read(subject.files[0])

    def _read(self, path: str, like: Nifti | None = None) -> Nifti:
        try:
            return read_nifti(path, like)
        except Unreadable as error:
            raise Unreadable(f'has a file {os.path.basename(path)} that {error}') from None

    def _body(self, subject: Subject, first: Nifti) -> tuple[np.ndarray, Grid] | None:
        """The inside (X, Y, Z) uint8 0 or 1 with its grid; None if all is inside."""
        if self.body == AUTO:
            values = first.values[0]
            return body(values[None, None], otsu(values), largest=True)[0].astype(np.uint8), first.grid
        if not subject.body:
            return None
        mask = self._read(subject.body, first)
        return (mask.values > 0).any(0).astype(np.uint8), mask.grid

    def _scaled(self, values: np.ndarray, source: Grid, grid: Grid, inside: np.ndarray) -> np.ndarray:
        """One channel (*S) as integers; percentiles are over all voxels, as published, the padding's too."""
        darkest = self.window[0] if self.window else float(values.min())     # air: 0 in MRI, -1024 in CT
        x = np.where(inside, resample(values, source, grid, fill=darkest), np.float32(darkest))
        low, high = self.window or np.percentile(x, self.percentiles)
        if not high > low:
            raise Unreadable(f'shows the same value everywhere in a channel (percentiles {low:g} and '
                             f'{high:g}): it is empty, or lies elsewhere than the first channel')
        dtype = DTYPES[self.depth]
        return np.rint(np.clip((x - low) / (high - low), 0, 1) * np.iinfo(dtype).max).astype(dtype)

    def lesions(self, subject: Subject, first: Nifti) -> tuple[np.ndarray, Grid] | None:
        """What is labelled as lesion (X, Y, Z) uint8 0 or 1 with its grid, None without a label; `first` is
        the first file of the subject. Raises Unreadable.
        """
        if not subject.label:
            return None
        label = self._read(subject.label, first)
        return (label.values > 0).any(0).astype(np.uint8), label.grid


# ------------------------------------------------------------------------------------------------------- scan

def read_volumes(folder: str | Path, config: VolumeConfig, *, modalities: Sequence[str], labels: str,
                 normal: Sequence[str], normal_wanted: Sequence[str], anomalous: Sequence[str], side: int,
                 depth: int, cache_dir: str, where: str) -> Source:
    """Every subject of the chosen classes below `folder`, as (N, C, *S) of `depth` 8 or 16 bits.

    `normal` are the names that a class folder of normal subjects may have, `normal_wanted` the classes that
    the user took instead (may be empty); `side` is that of a cube, 0 = as the flags or the largest subject
    say. Files that cannot be read are in Source.bad.
    """
    if not folder or not (root := Path(folder)).is_dir():
        raise UserError(f"--data: the folder {str(folder)!r} does not exist. {where}" if folder else
                        f"--data is missing. {where}")
    notes: list[str] = []
    subjects, bad, by_label = _chosen(root, config, modalities, labels, normal_wanted or normal, where, notes)
    found = sorted({s.class_name for s in subjects} | ({LESION} if by_label else set()))
    usual = normal_wanted or [c for c in found if any(same_name(c, n) for n in normal)]
    if not usual:
        raise UserError(f"--data: {root} has no class of normal subjects named {' or '.join(normal)}: found "
                        f"{', '.join(found)}. Name the normal ones with --normal_classes.")
    usual, abnormal = choose_classes(found, usual, anomalous, True, str(root))
    subjects = [s for s in subjects if s.class_name in usual + abnormal]
    prepared = VolumePreparation.of(config, modalities, depth)
    stamps = [[s.id, s.class_name, s.part, *((path, *stamp(path)) for path in s.all_files)] for s in subjects]
    flags = {f.name: getattr(config, f.name) for f in fields(VolumeConfig) if f.name != 'augment'}
    key = {'volumes': str(root.resolve()), **flags, 'channels': list(modalities), 'label': labels,
           'side': side, 'depth': depth, 'normal': usual, 'anomalous': abnormal, 'files': stamps}

    def make(target: Path) -> dict:
        shape = tuple(config.volume_shape) or (side,) * 3
        made = scan(subjects, prepared, target, shape, config.pad_multiple)
        entries, lesions = made.pop('entries'), made.pop('lesion_ml')
        if by_label:
            ill = {e.id for e in entries if e.class_name == NORMAL and lesions[e.id] > config.lesion_load}
            entries = [replace(e, class_name=LESION) if e.id in ill else e for e in entries]
        entries = [e for e in entries if e.class_name in usual + abnormal]
        return {**made, 'entries': entries, 'normal_classes': usual, 'anomalous_classes': abnormal}

    source = cached(cache_dir, key, make)
    return replace(source, notes=notes + source.notes, bad=bad + source.bad)


def _chosen(root: Path, config: VolumeConfig, modalities: Sequence[str], labels: str, normal: Sequence[str],
            where: str, notes: list[str]) -> tuple[list[Subject], list[tuple[str, str]], bool]:
    """The subjects below `root` with their classes and parts, (id, reason) of those that lack a file, and
    whether labels decide who is normal: no folder says so.
    """
    found, bad = find_subjects(root, modalities, labels, config.volume_mask)
    subjects = with_classes(found, normal, where)
    in_folders = subjects is not found
    if config.labels and not any(s.label for s in subjects):
        raise UserError(f"--labels {labels}: no subject in {root} has a file of it.")
    in_one_file = len(modalities) != 1 and len(found[0].files) == 1
    if in_one_file and (deep := [s.id for s in subjects if s.id.count('/') > in_folders]):
        raise UserError(f"--data: {deep[0]} lies in a folder of a channel or a subject: name the channels "
                        f"with --modalities. {where}")
    keys = Path(config.key_files or root)
    if config.key_files and not any(keys.glob(f'*{KEYS}')):
        raise UserError(f"--key_files {keys}: there is no file NAME{KEYS} in it.")
    subjects = with_keys(subjects, keys, notes)
    by_label = not in_folders and any(s.label for s in subjects)
    unknown = [s.id for s in subjects if by_label and s.class_name == NORMAL and not s.label]
    if unknown:
        notes.append(f'{count(len(unknown), "subject")} without a file of {labels} count as without lesion: '
                     f'{some(unknown)}')
    return subjects, bad, by_label


def scan(subjects: list[Subject], prepared: VolumePreparation, target: Path, shape: tuple[int, ...],
         multiple: int) -> dict:
    """Brings every subject to one shape, into `target`/pixels.npy and masks.npy; returns the other fields of
    a Source, and the ml of labelled lesion by id. A `shape` of zeros is that of the largest, rounded up.
    """
    outlines = attempt(prepared.outline, subjects, 'measuring volumes')
    bad = [(s.id, o) for s, o in zip(subjects, outlines, strict=True) if isinstance(o, str)]
    subjects = [s for s, o in zip(subjects, outlines, strict=True) if not isinstance(o, str)]
    outlines = [o for o in outlines if not isinstance(o, str)]
    if not subjects:
        return {'entries': [], 'bad': bad, 'lesion_ml': {}}
    expect_one_spacing(subjects, outlines)
    sizes = np.array([o.shape for o in outlines])                                        # (N, 3)
    if not min(shape):
        shape = tuple((-(-sizes.max(0) // multiple) * multiple).tolist())
    with_mask = {s.id: i for i, s in enumerate(s for s in subjects if s.label)}
    dtype, voxels = DTYPES[prepared.depth], int(np.prod(shape))
    check_room(target, voxels * (len(subjects) * prepared.channels * prepared.depth // 8 + len(with_mask)))
    new = np.lib.format.open_memmap
    pixels = new(target / 'pixels.npy', 'w+', dtype, (len(subjects), prepared.channels, *shape))
    masks = new(target / 'masks.npy', 'w+', np.uint8, (len(with_mask), 1, *shape)) if with_mask else None

    def read(row: int) -> tuple[Entry, float, list[str]]:
        subject = subjects[row]
        volume = prepared.load(subject, outlines[row].centred(shape))
        pixels[row] = volume.pixels
        if subject.label:
            masks[with_mask[subject.id]] = volume.mask
        entry = Entry(id=subject.id, path=subject.files[0], class_name=subject.class_name,
                      sha256=volume.sha256, file_bytes=volume.num_bytes, row=row,
                      mask_row=with_mask.get(subject.id, -1), part=subject.part,
                      grids=(volume.grid.as_json(), volume.own.as_json()))
        return entry, volume.lesion_ml, volume.repairs

    results = attempt(read, range(len(subjects)), 'reading volumes')
    bad += [(s.id, r) for s, r in zip(subjects, results, strict=True) if isinstance(r, str)]
    good = [r for r in results if not isinstance(r, str)]
    notes = [f"volumes of {' x '.join(map(str, shape))} voxels to the right, front and up, "
             f"{' x '.join(f'{mm:.3g}' for mm in outlines[0].spacing)} mm apart"]
    if cut := [s.id for s, size in zip(subjects, sizes, strict=True) if (size > shape).any()]:
        notes.append(f'{count(len(cut), "subject")} larger than that lose their ends: {some(cut)}')
    for repair in dict.fromkeys(words for _, _, repairs in good for words in repairs):
        ids = [e.id for e, _, repairs in good if repair in repairs]
        notes.append(f'{count(len(ids), "subject")} {repair}: {some(ids)}')
    pairs = near_duplicates(pixels)                     # rows that could not be read are black, like nothing
    pixels.flush()
    if masks is not None:
        masks.flush()
    return {'entries': [e for e, _, _ in good], 'lesion_ml': {e.id: ml for e, ml, _ in good}, 'bad': bad,
            'twins': [(subjects[i].id, subjects[j].id, c) for i, j, c in pairs], 'notes': notes}


def attempt(work: Callable[[Any], T], items: Sequence[Any], title: str) -> list[T | str]:
    """What `work` makes of each item, or why it could not: a few at once, on threads."""
    from tqdm import tqdm

    def one(item: Any) -> T | str:
        try:
            return work(item)
        except Unreadable as error:
            return str(error)

    with ThreadPoolExecutor(min(MOST_THREADS, cores())) as pool:
        return list(tqdm(pool.map(one, items), title, len(items), unit='subject', disable=None, leave=False))


def apart(spacings: np.ndarray, usual: Sequence[float]) -> np.ndarray:
    """Which spacings (..., 3) are another than the `usual` one (3,): (...) bool."""
    return (np.abs(spacings / np.asarray(usual) - 1) > SPREAD).any(-1)


def expect_one_spacing(subjects: list[Subject], outlines: list[Grid]) -> None:
    """Raises UserError if voxels are of different sizes."""
    spacings = np.array([o.spacing for o in outlines])                                   # (N, 3), mm
    others = apart(spacings, spacings[0])
    if others.any():
        other = int(np.argmax(others))
        words = [f"{subjects[i].id} {' x '.join(f'{mm:.3g}' for mm in spacings[i])}" for i in (0, other)]
        raise UserError(f"--data: voxels are of different sizes in mm ({words[0]}, {words[1]}): give one "
                        f"with --spacing.")
