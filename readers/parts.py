"""The images of one part, ready as batches.

B images, C channels, *S = (H, W) pixels or (D, H, W) voxels; label 0 normal, 1 anomalous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distributions import Pixels
from readers.images.decode import ImageLoader
from readers.items import Loaded
from readers.published.records import LazyImages, Records, columns
from readers.source import Entry, Source
from readers.volumes.augment import augmented
from utils import mix_seed

if TYPE_CHECKING:
    from readers.volumes.volumes import VolumeLoader  # and SciPy, which images do without

# Number of axes of a batch -> the axis from left to right: the last of an image, the first of a volume (RAS).
LEFT_RIGHT = {4: 3, 5: 2}


class Batch(NamedTuple):
    """x (B, C, *S) float32 in [0, 1]; y (B,) int64, 0 normal, 1 anomalous; mask (B, 1, *S) bool.

    `mask` is None where no image of the part has a mask file. Where some have, an image without one has an
    empty mask; `Part.entries[i].has_mask` tells an anomalous image whose mask is unknown from a normal one.
    """
    x: Tensor
    y: Tensor
    mask: Tensor | None
    id: list[str]


@dataclass(frozen=True)
class Transform:
    """How the integers of decoded images become what a model sees."""
    pixels: Pixels                   # what the model knows of them
    depth: int = 8                   # bits of the integers, 8 or 16
    static: bool = True              # binary and dequantized pixels are drawn once, not in every epoch
    flip: bool = False               # training images are mirrored at random
    dequantize: bool = False
    invert: bool = False
    augment: bool = False            # training volumes are changed at random

    def x(self, values: np.ndarray, ids: Sequence[str], draw: int) -> Tensor:
        """Images (B, C, *S) in [0, 1], without mirroring and augmentation."""
        border = self.pixels.padding                           # stays black whatever is done to the image
        inside = np.pad(np.ones([side - 2 * border for side in values.shape[2:]], bool), border)      # *S
        if self.invert:
            values = np.where(inside, ~values, values)            # ~v is the largest value - v
        noise = 0 if self.static else draw
        if self.pixels.likelihood == 'bernoulli':
            chance = gray_levels(values, self.depth, self.depth)
            return (_uniform(chance.shape, 'binarize', noise, ids) < chance).float()
        if self.dequantize:
            u = _uniform(values.shape, 'dequantize', noise, ids)
            return dequantized(values, self.depth, self.pixels.bits, u) * torch.from_numpy(inside)
        return gray_levels(values, self.depth, self.pixels.bits)

    def randomize(self, x: Tensor, masks: Tensor | None, ids: Sequence[str],
                  draw: int) -> tuple[Tensor, Tensor | None]:
        """Training images and masks, mirrored and augmented."""
        if self.flip:
            mirrored = torch.tensor([mix_seed('flip', draw, name) % 2 == 1 for name in ids])
            for images in (x,) if masks is None else (x, masks):
                images[mirrored] = images[mirrored].flip(LEFT_RIGHT[x.ndim])
        if self.augment:                         # which moves volumes away from their masks
            return torch.stack([augmented(volume, mix_seed('augment', draw, name))
                                for volume, name in zip(x, ids, strict=True)]), None
        return x, masks


class Part(Dataset):
    """The images of one part, in the order of their ids; `part[i]` is its (x, y, mask, id) for evaluation."""

    def __init__(self, entries: Sequence[Entry], source: Source, transform: Transform):
        self.entries = entries if isinstance(entries, Records) else list(entries)
        self.images, self.masks, self.transform = source.pixels, source.masks, transform
        self.crops = isinstance(self.images, LazyImages) and self.images.decoding.crop
        labels, self.rows, self.mask_rows = columns(self.entries)
        self.labels, self.has_masks = torch.from_numpy(labels), bool((self.mask_rows >= 0).any())

    @property
    def class_names(self) -> list[str]:
        return [e.class_name for e in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, str]:
        batch = self.items([range(len(self))[index]])
        return batch.x[0], batch.y[0], None if batch.mask is None else batch.mask[0], batch.id[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """What a DataLoader asks for: the (draw, index) of each image of a batch."""
        return self.items([index for _, index in keys], keys[0][0])

    def items(self, indices: Sequence[int], draw: int = 0) -> Batch:
        """These images as a batch; its randomness is that of `draw` and their ids.

        Draw 0 is evaluation: nothing is mirrored or augmented, and where images are larger than asked for,
        their center is cut out.
        """
        indices = np.asarray(indices, np.int64)
        ids, rows = [self.entries[i].id for i in indices], self.rows[indices]
        if draw and self.crops:
            values = self.images.cropped(rows, [_place(draw, name) for name in ids])
        else:
            values = self.images[rows]                                          # (B, C, *S) uint8 or uint16
        x, masks = self.transform.x(values, ids, draw), self._masks(self.mask_rows[indices])
        if draw:
            x, masks = self.transform.randomize(x, masks, ids, draw)
        return Batch(x, self.labels[indices], masks, ids)

    def _masks(self, rows: np.ndarray) -> Tensor | None:
        if not self.has_masks:
            return None
        masks = torch.zeros(len(rows), *self.masks.shape[1:], dtype=torch.bool)      # (B, 1, *S)
        known = rows >= 0
        masks[torch.from_numpy(known)] = torch.from_numpy(self.masks[rows[known]].astype(bool))
        return masks


@dataclass(frozen=True)
class Preparation:
    """What a run does to new files, without classes or labels, before its model sees them."""
    loader: ImageLoader | VolumeLoader           # finds and loads files, in the shape of the model
    transform: Transform

    def batch(self, loaded: Sequence[Loaded], ids: Sequence[str]) -> Batch:
        """What the loader gave, as the run's own in an evaluation; what is random follows from ids."""
        entries = [Entry(name, '', '', '', 0, row) for row, name in enumerate(ids)]
        source = Source(entries, np.stack([x.pixels for x in loaded]), None, (), ())
        return Part(entries, source, self.transform).items(range(len(entries)))

    def images(self, paths: Sequence[str | Path]) -> Batch:
        """Image files as a batch, as they would be in an evaluation of the run. Raises Unreadable."""
        loaded = [self.loader.load(str(path)) for path in paths]
        return self.batch(loaded, [Path(path).name for path in paths])


class Selection(Part):
    """Images of parts, each with its own images and what is done to them, one part after the other."""

    def __init__(self, chosen: Sequence[tuple[Part, Sequence[int]]]):
        """`chosen` are parts, and of each the places of its images."""
        self.parts, places = zip(*((part, np.asarray(of_part, np.int64)) for part, of_part in chosen))
        self.places = np.concatenate(places)
        self.owners = np.repeat(np.arange(len(places)), [len(of_part) for of_part in places])
        self.entries = [part.entries[i] for part, of_part in chosen for i in of_part]
        self.labels = torch.cat([part.labels[of_part] for part, of_part in zip(self.parts, places)])
        self.has_masks = any(part.has_masks for part in self.parts)

    def items(self, indices: Sequence[int], draw: int = 0) -> Batch:
        indices = np.asarray(indices, np.int64)
        order = np.argsort(self.owners[indices], kind='stable')                 # those of one part together
        owners, places = self.owners[indices[order]], self.places[indices[order]]
        batches = [self.parts[k].items(places[owners == k], draw) for k in np.unique(owners)]
        back = torch.from_numpy(np.argsort(order))
        x, masks = torch.cat([batch.x for batch in batches])[back], None
        if self.has_masks:
            masks = torch.cat([torch.zeros(len(batch.x), 1, *x.shape[2:], dtype=torch.bool)
                               if batch.mask is None else batch.mask for batch in batches])[back]
        return Batch(x, self.labels[indices], masks, [self.entries[i].id for i in indices])


class SomeOf(Selection):
    """Some images of a part, in the order in which they are named."""

    def __init__(self, part: Part, ids: Sequence[str]):
        """Raises KeyError for an id that the part does not have."""
        places = {entry.id: i for i, entry in enumerate(part.entries)}
        super().__init__([(part, [places[name] for name in ids])])


def dequantized(values: np.ndarray, depth: int, bits: int, u: Tensor) -> Tensor:
    """Integers of `depth` bits as (k + u) / 2^bits in [0, 1); k is the gray level, u uniform in [0, 1)."""
    level = torch.from_numpy((values >> (depth - bits)).astype(np.float32))
    end = (level + 1) / 2 ** bits
    # In float32 a u near 1 may round up to the next level.
    return torch.minimum((level + u) / 2 ** bits, torch.nextafter(end, torch.zeros_like(end)))


def gray_levels(values: np.ndarray, depth: int, bits: int) -> Tensor:
    """Integers of `depth` bits as gray levels k / (2^bits - 1), where k = floor(value / 2^(depth - bits))."""
    return torch.from_numpy((values >> (depth - bits)).astype(np.float32) / np.float32(2 ** bits - 1))


def _uniform(shape: Sequence[int], purpose: str, draw: int, ids: list[str]) -> Tensor:
    """Uniform numbers (B, *shape[1:]), each image's own whatever batch it is in."""
    u = torch.empty(shape)
    generator = torch.Generator()
    for image, name in zip(u, ids, strict=True):
        image.uniform_(generator=generator.manual_seed(mix_seed(purpose, draw, name)))
    return u


def _place(draw: int, name: str) -> tuple[float, float]:
    """Two uniform numbers in [0, 1): where to cut a picture out of an image."""
    number = mix_seed('crop', draw, name)
    return number % 2 ** 31 / 2 ** 31, (number >> 31) % 2 ** 31 / 2 ** 31
