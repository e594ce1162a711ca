"""Data sets: the table, the flags, the split into parts, and the batches.

B images, C channels, *S = (H, W) pixels; label 0 normal, 1 anomalous. Models train on the normal images of
the part `train`, choose thresholds on the normal images of `val`, and are judged on `test`, normal and
anomalous.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distributions import Pixels
from readers.images import FITS, read_folder
from readers.mnist import read_mnist
from readers.phantom import write_phantoms
from readers.source import Entry, Source
from readers.split import (
    PARTS,
    count,
    find_duplicates,
    part_counts,
    some,
    split_parts,
    stored_parts,
    warnings,
    with_patients,
)
from utils import UserError, flag, mix_seed

# ------------------------------------------------------------------------------------------------------ table

@dataclass(frozen=True)
class DataSet:
    """One row of DATASETS: what is true of a data set whatever the run."""
    read: Callable[['DataConfig', 'DataSet'], Source]
    size: int                                # H and W that the model sees, padding included
    channels: int = 1
    bits: int = 16                           # most bits a grey level can have
    likelihood: str = 'discretized'          # or 'bernoulli'
    padding: int = 0                         # border of zeros that belongs to `size`, not to the image
    normal: tuple[str, ...] = ()             # names a normal class may have; () = all that is not anomalous
    masks: bool = False                      # a folder `masks` marks anomalies
    val_fraction: float = 0.15               # of the normal images that are not in a given test part
    test_fraction: float = 0.2
    val_always: bool = True                  # False: a validation part only where there are anomalies to find
    where: str = ''                          # for errors: the layout, and where the data comes from


def _read_folder(config: 'DataConfig', row: DataSet) -> Source:
    return read_folder(config.data, normal=row.normal, normal_wanted=config.normal_classes,
                       anomalous=config.anomalous_classes, size=config.image_size or row.size,
                       channels=config.channels or row.channels, depth=_depth(config), fit=config.fit,
                       masks=row.masks, cache_dir=config.cache_dir, where=row.where)


def _read_phantom(config: 'DataConfig', row: DataSet) -> Source:
    folder = write_phantoms(config.data or 'data/phantom', config.num_phantoms)
    return _read_folder(replace(config, data=str(folder)), row)


def _read_mnist(config: 'DataConfig', row: DataSet) -> Source:
    return read_mnist(config.data, normal=config.normal_classes, anomalous=config.anomalous_classes,
                      padding=_padding(config, row), cache_dir=config.cache_dir, where=row.where)


DATASETS = {
    'mnist': DataSet(
        _read_mnist, size=32, bits=8, likelihood='bernoulli', padding=2,
        val_fraction=0.1, test_fraction=0, val_always=False,
        where='Get it with torchvision.datasets.MNIST(FOLDER, download=True), then --data FOLDER.'),
    'covid': DataSet(
        _read_folder, size=64, normal=('Normal',),
        where='Expected Normal/images/*.png and beside it COVID, Lung_Opacity or "Viral Pneumonia", as in '
              'the COVID-19 Radiography Database '
              '(kaggle.com/datasets/tawsifurrahman/covid19-radiography-database).'),
    'folder': DataSet(
        _read_folder, size=64, normal=('normal', 'good'), masks=True,
        where='Expected a folder "normal" (or "good") and beside it one folder for each kind of anomaly.'),
    'phantom': DataSet(
        _read_phantom, size=64, normal=('Normal',), masks=True,
        where='Synthetic: it is made at the first run.'),
}


@dataclass(frozen=True)
class DataConfig:
    """Data: which images, at what size, in what parts"""
    dataset: str = flag('mnist', 'data set', choices=tuple(DATASETS))
    data: str = flag('', 'data folder (phantom: where to make it, default data/phantom)')
    image_size: int = flag(0, "height and width in pixels; 0 = the data set's own")
    channels: int = flag(0, "1 grey, 3 colour; 0 = the data set's own", choices=(0, 1, 3))
    num_x_bits: int = flag(8, 'bits per pixel, 1 to 16; above 8 keeps the depth of 16-bit files')
    fit: str = flag('pad', 'an image that is not square gets black borders, loses its ends, or is squeezed',
                    choices=FITS)
    normal_classes: tuple = flag((), "class names to train on; none given = the data set's own")
    anomalous_classes: tuple = flag((), 'class names to detect; none given = all others (mnist: none)')
    val_fraction: float = flag(-1.0, "fraction of the normal images for validation; -1 = the data set's own")
    test_fraction: float = flag(-1.0, "fraction of the normal images for testing; -1 = the data set's own")
    split_seed: int = flag(0, 'which random split')
    patient_pattern: str = flag('', "regular expression on the file name, group 1 = patient; '' = unknown")
    patient_metadata: str = flag('', "CSV file, as FILE:FILE_NAME_COLUMN:PATIENT_COLUMN; '' = unknown")
    skip_corrupt: bool = flag(False, 'leave out files that cannot be read, and report each; else stop')
    likelihood: str = flag('auto', "grey levels, or binary: a grey value is the chance of white; auto = the "
                                   "data set's own", choices=('auto', 'discretized', 'bernoulli'))
    binarize: str = flag('dynamic', 'binary data: draw each pixel anew every epoch, or once for ever',
                         choices=('dynamic', 'static'))
    num_phantoms: int = flag(1200, 'phantom: normal images to make; a quarter as many abnormal ones')
    num_workers: int = flag(0, 'processes that prepare batches; 0 = none besides the program')
    cache_dir: str = flag('', "folder for decoded images; '' = a folder in $XDG_CACHE_HOME or ~/.cache")


def _depth(config: DataConfig) -> int:
    """Bits at which decoded images are kept; --num_x_bits takes its grey levels from these."""
    return 16 if config.num_x_bits > 8 else 8


def _padding(config: DataConfig, row: DataSet) -> int:
    """Border around the images at the wanted size; a row with padding keeps its images unscaled."""
    size, own = config.image_size or row.size, row.size - 2 * row.padding
    if row.padding and (size < own or (size - own) % 2):
        raise UserError(f"--image_size {size}: {config.dataset} images are {own} x {own} with an equal "
                        f"border around: give 0, {own} or a larger even number.")
    return (size - own) // 2 if row.padding else 0


def _check(config: DataConfig, row: DataSet) -> None:
    """Raises UserError for flags that make no sense on their own or for this data set."""
    if not 1 <= config.num_x_bits <= row.bits:
        raise UserError(f"--num_x_bits {config.num_x_bits}: {config.dataset} has 1 to {row.bits}.")
    if config.image_size < 0:
        raise UserError(f"--image_size {config.image_size}: expected pixels, or 0 for the data set's own "
                        f"{row.size}.")
    if row.likelihood == 'bernoulli' and config.channels not in (0, row.channels):
        raise UserError(f"--channels {config.channels}: the binary images of {config.dataset} have "
                        f"{row.channels}.")
    val, test = _fractions(config, row)
    for name, value in {'val_fraction': val, 'test_fraction': test}.items():
        if not 0 <= value < 1:
            raise UserError(f"--{name} {value}: expected 0 to 1, or -1 for the data set's own.")
    if val + test >= 1:
        raise UserError(f"--val_fraction {val} and --test_fraction {test} leave nothing to train on: "
                        f"their sum must be below 1.")


def _fractions(config: DataConfig, row: DataSet) -> tuple[float, float]:
    val = config.val_fraction
    if val == -1:
        val = row.val_fraction if row.val_always or config.anomalous_classes else 0.0
    return val, row.test_fraction if config.test_fraction == -1 else config.test_fraction


# ------------------------------------------------------------------------------------------------------ parts

class Batch(NamedTuple):
    """x (B, C, H, W) float32 in [0, 1]; y (B,) int64, 0 normal, 1 anomalous; mask (B, 1, H, W) bool.

    `mask` is None where no image of the part has a mask file. Where some have, an image without one has an
    empty mask; `Part.entries[i].has_mask` tells an anomalous image whose mask is unknown from a normal one.
    """
    x: Tensor
    y: Tensor
    mask: Tensor | None
    id: list[str]


class Part(Dataset):
    """The images of one part, in the order of their ids; `part[i]` is its (x, y, mask, id) for evaluation."""

    def __init__(self, entries: Sequence[Entry], source: Source, pixels: Pixels, depth: int = 8,
                 static: bool = True):
        self.entries, self.pixels, self.depth, self.static = list(entries), pixels, depth, static
        self.images, self.masks = source.pixels, source.masks
        self.class_names = [e.class_name for e in self.entries]
        self.labels = torch.tensor([e.label for e in self.entries], dtype=torch.int64)
        self.rows = np.array([e.row for e in self.entries], np.int64)
        self.mask_rows = np.array([e.mask_row if e.label else -1 for e in self.entries], np.int64)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, str]:
        batch = self.items([range(len(self))[index]])
        return batch.x[0], batch.y[0], None if batch.mask is None else batch.mask[0], batch.id[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """What a DataLoader asks for: the (draw, index) of each image of a batch."""
        return self.items([index for _, index in keys], keys[0][0])

    def items(self, indices: Sequence[int], draw: int = 0) -> Batch:
        """These images as a batch; its randomness is that of `draw` and their ids. Evaluation is draw 0."""
        indices = np.asarray(indices, np.int64)
        ids = [self.entries[i].id for i in indices]
        values = self.images[self.rows[indices]]                                # (B, C, H, W) uint8 or uint16
        if self.pixels.likelihood == 'bernoulli':
            chance = grey_levels(values, self.depth, self.depth)
            x = (_uniform(chance.shape, 0 if self.static else draw, ids) < chance).float()
        else:
            x = grey_levels(values, self.depth, self.pixels.bits)
        return Batch(x, self.labels[indices], self._masks(self.mask_rows[indices]), ids)

    def _masks(self, rows: np.ndarray) -> Tensor | None:
        if not (self.mask_rows >= 0).any():
            return None
        masks = torch.zeros(len(rows), *self.masks.shape[1:], dtype=torch.bool)      # (B, 1, H, W)
        known = rows >= 0
        masks[torch.from_numpy(known)] = torch.from_numpy(self.masks[rows[known]].astype(bool))
        return masks


def grey_levels(values: np.ndarray, depth: int, bits: int) -> Tensor:
    """Integers of `depth` bits as grey levels k / (2^bits - 1), where k = floor(value / 2^(depth - bits))."""
    return torch.from_numpy((values >> (depth - bits)).astype(np.float32) / np.float32(2 ** bits - 1))


def _uniform(shape: Sequence[int], draw: int, ids: list[str]) -> Tensor:
    """Uniform numbers (B, *shape[1:]), each image's own whatever batch it is in."""
    u = torch.empty(shape)
    generator = torch.Generator()
    for image, name in zip(u, ids, strict=True):
        image.uniform_(generator=generator.manual_seed(mix_seed('binarize', draw, name)))
    return u


# ------------------------------------------------------------------------------------------------------- load

@dataclass(frozen=True)
class Data:
    """A data set, ready: `split` is JSON for split.json, `report` lines for the user."""
    train: Part
    val: Part
    test: Part
    shape: tuple[int, int, int]
    pixels: Pixels
    normal_classes: tuple[str, ...]
    anomalous_classes: tuple[str, ...]
    split: dict[str, Any]
    report: list[str]
    config: DataConfig


def load_data(config: DataConfig, split: dict[str, Any] | None = None) -> Data:
    """Reads and splits the data set that `config` names.

    Given the `split` that a run stored, the same files go to the same parts. Anomalous classes that it does
    not know join `test`; other new files are left out. Raises UserError for files that are unreadable,
    missing or changed.
    """
    if config.dataset not in DATASETS:
        raise UserError(f"--dataset {config.dataset!r} is unknown: choose one of {', '.join(DATASETS)}.")
    row = DATASETS[config.dataset]
    _check(config, row)
    if split and not config.normal_classes:
        config = replace(config, normal_classes=tuple(split['normal_classes']))
    source = row.read(config, row)
    report = list(source.notes)
    if source.bad:
        lines = [f'{name} {reason}' for name, reason in source.bad]
        if not config.skip_corrupt:
            total = len(lines) + len(source.entries)
            raise UserError(f"{count(len(lines), 'file')} of {total} cannot be used: {some(lines)}. Replace "
                            f"or remove them, or pass --skip_corrupt to leave them out.")
        report += [f'left out: {line}' for line in lines]

    entries = [replace(e, label=int(e.class_name in source.anomalous_classes)) for e in source.entries]
    entries = with_patients(entries, config.patient_metadata, config.patient_pattern, report)
    if split:
        parts = stored_parts(entries, split, report)
        entries = [e for e in entries if e.id in parts]
    else:
        parts = split_parts(entries, *_fractions(config, row), config.split_seed)
    if 'train' not in parts.values():
        raise UserError(f"{count(len(entries), 'image')} leave none to train on: add normal images, "
                        f"or lower --val_fraction and --test_fraction.")
    duplicates = find_duplicates(entries, source.twins, parts)

    likelihood = row.likelihood if config.likelihood == 'auto' else config.likelihood
    bits = 1 if likelihood == 'bernoulli' else config.num_x_bits
    pixels = Pixels(likelihood, bits, _padding(config, row))
    made = {part: Part([e for e in entries if parts[e.id] == part], source, pixels, _depth(config),
                       static=config.binarize == 'static') for part in PARTS}
    report += part_counts(entries, parts) + warnings(entries, parts, duplicates)
    stored = {'dataset': config.dataset, 'split_seed': config.split_seed,
              'normal_classes': list(source.normal_classes),
              'anomalous_classes': list(source.anomalous_classes), 'duplicates': duplicates,
              'files': [{'id': e.id, 'class': e.class_name, 'part': parts[e.id], 'sha256': e.sha256}
                        | ({'patient': e.patient} if e.patient else {}) for e in entries]}
    return Data(**made, shape=tuple(source.pixels.shape[1:]), pixels=pixels,
                normal_classes=source.normal_classes, anomalous_classes=source.anomalous_classes,
                split=stored, report=report, config=config)


# ---------------------------------------------------------------------------------------------------- batches

def steps_per_epoch(part: Part, batch_size: int, world: int = 1) -> int:
    """Joint batches, of batch_size images on each of `world` ranks, in an epoch; it drops what is left over.

    Raises UserError if there is not one.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: expected 1 or more.")
    if len(part) < batch_size * world:
        fits = len(part) // world
        todo = f'--batch_size that fits is {fits}' if fits else f'number of processes is {len(part)}'
        raise UserError(f"{count(len(part), 'image')} cannot fill a batch of {batch_size} on each of "
                        f"{world} process{'es' if world > 1 else ''}: the largest {todo}.")
    return len(part) // (batch_size * world)


def train_batches(part: Part, batch_size: int, *, seed: int, rank: int = 0, world: int = 1,
                  first_step: int = 0, workers: int = 0) -> Iterator[Batch]:
    """Shuffled batches for ever, from step `first_step` on.

    A batch depends on (seed, step, rank, world) alone, so a run resumes at any step. The batches of all
    ranks, one after the other, are the batch of one process with batch_size * world.
    """
    joint = batch_size * world
    steps = steps_per_epoch(part, batch_size, world)

    def keys() -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(first_step, steps)
        while True:
            generator = torch.Generator().manual_seed(mix_seed(seed, 'order', epoch))
            order = torch.randperm(len(part), generator=generator)[:steps * joint]
            order = order.view(steps, world, batch_size)
            draw = mix_seed(seed, 'draw', epoch)
            for indices in order[first:, rank].tolist():
                yield [(draw, index) for index in indices]
            epoch, first = epoch + 1, 0

    return _load(part, keys, workers)


def eval_batches(part: Part, batch_size: int, *, rank: int = 0, world: int = 1,
                 workers: int = 0) -> Iterator[tuple[int, Batch]]:
    """(number, batch): the images in order, batch i for rank i % world, each image once; the last short."""
    numbers = range(rank, -(-len(part) // batch_size), world)

    def keys() -> Iterator[list[tuple[int, int]]]:
        for i in numbers:
            yield [(0, index) for index in range(i * batch_size, min((i + 1) * batch_size, len(part)))]

    return zip(numbers, _load(part, keys, workers), strict=True)


class _Keys:
    """A batch sampler from a function that makes an iterator."""

    def __init__(self, make: Callable[[], Iterator[list[tuple[int, int]]]]):
        self.make = make

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.make()


def _as_is(batch: Batch) -> Batch:
    return batch


def _load(part: Part, keys: Callable[[], Iterator[list[tuple[int, int]]]], workers: int) -> Iterator[Batch]:
    if workers == 0:
        return map(part.__getitems__, keys())
    return iter(DataLoader(part, batch_sampler=_Keys(keys), num_workers=workers, collate_fn=_as_is))
