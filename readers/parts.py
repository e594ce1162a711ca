"""The images of one part, ready as batches.

B images, C channels, H x W pixels; label 0 normal, 1 anomalous.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distributions import Pixels
from readers.records import LazyImages, Records, columns
from readers.source import Entry, Source
from utils import mix_seed


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
                 static: bool = True, flip: bool = False):
        self.entries = entries if isinstance(entries, Records) else list(entries)
        self.pixels, self.depth, self.static, self.flip = pixels, depth, static, flip
        self.images, self.masks = source.pixels, source.masks
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

        Draw 0 is evaluation: nothing is mirrored, and where images are larger than asked for, their centre is
        cut out.
        """
        indices = np.asarray(indices, np.int64)
        ids = [self.entries[i].id for i in indices]
        rows = self.rows[indices]
        if draw and self.crops:
            values = self.images.cropped(rows, [_place(draw, name) for name in ids])
        else:
            values = self.images[rows]                                          # (B, C, H, W) uint8 or uint16
        if self.pixels.likelihood == 'bernoulli':
            chance = grey_levels(values, self.depth, self.depth)
            x = (_uniform(chance.shape, 0 if self.static else draw, ids) < chance).float()
        else:
            x = grey_levels(values, self.depth, self.pixels.bits)
        masks = self._masks(self.mask_rows[indices])
        if draw and self.flip:
            mirrored = torch.tensor([mix_seed('flip', draw, name) % 2 == 1 for name in ids])
            for images in (x,) if masks is None else (x, masks):
                images[mirrored] = images[mirrored].flip(-1)
        return Batch(x, self.labels[indices], masks, ids)

    def _masks(self, rows: np.ndarray) -> Tensor | None:
        if not self.has_masks:
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


def _place(draw: int, name: str) -> tuple[float, float]:
    """Two uniform numbers in [0, 1): where to cut a picture out of an image."""
    number = mix_seed('crop', draw, name)
    return number % 2 ** 31 / 2 ** 31, (number >> 31) % 2 ** 31 / 2 ** 31
