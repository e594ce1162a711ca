"""What the conditional flow sees of an image: features of every voxel, where it is, and the image as a whole.

Spatial-MSMA (Mahmood et al. 2024). B images, C channels, S two or three spatial axes with V voxels in all, n
levels of noise, E numbers of a code.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.score.unet import AVERAGE, conv
from families.spatial_msma.config import HEADS

DROPOUT = 0.1                        # between its last two layers
POOLING_KERNEL, POOLING_STRIDE = 3, 2


def pool(maps: Tensor, kernel: int) -> Tensor:
    """Norms over neighborhoods of `kernel` voxels on each axis, zeros outside, of each map (B, n, *S)."""
    dims = maps.ndim - 2
    means = AVERAGE[dims](maps.square(), kernel, stride=1, padding=kernel // 2)
    return (means * kernel ** dims).sqrt()


class FeatureCache:
    """Features of images in the CPU's memory, by the content of the image, up to `limit` bytes (0 = none).

    What comes when the memory is full is computed again each time.
    """

    def __init__(self, limit: int):
        self.limit, self.used, self.memory = limit, 0, {}

    def get(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What `make` gives of an image x (C, *S), on the device of x."""
        if not self.limit:
            return make(x)
        key = hashlib.sha256(x.detach().cpu().contiguous().numpy()).digest()
        if key in self.memory:
            return self.memory[key].to(x.device)
        made = make(x)
        size = made.numel() * made.element_size()
        if self.used + size <= self.limit:
            self.memory[key] = made.cpu()
            self.used += size
        return made

    def clear(self, *_: object) -> None:
        """Forgets all; as a hook too, for when the weights behind the features change."""
        self.memory.clear()
        self.used = 0


class PositionCode(nn.Module):
    """sin and cos of the index of a voxel on each axis, one axis after the other: E numbers."""

    def __init__(self, width: int, size: Sequence[int]):
        super().__init__()
        self.width, self.size = width, tuple(size)
        each = 2 * math.ceil(width / (2 * len(size)))             # m numbers an axis; the last may lose some
        frequencies = 10000 ** (-torch.arange(0, each, 2) / each)                            # (m / 2,)
        for axis, n in enumerate(size):
            angles = torch.arange(n)[:, None] * frequencies
            table = torch.stack([torch.sin(angles), torch.cos(angles)], dim=2).flatten(1)    # (n, m)
            self.register_buffer(f'axis_{axis}', table, persistent=False)

    def forward(self, voxels: Tensor) -> Tensor:
        """The codes (P, E) of voxels (P,), counted with the last axis running fastest."""
        places = torch.unravel_index(voxels, self.size)
        return torch.cat([getattr(self, f'axis_{axis}')[place] for axis, place in enumerate(places)],
                         dim=1)[:, :self.width]


class ConvResidual(nn.Module):
    """Two convolutions around a skip; each channel is normalized over space, with weights of every voxel."""

    def __init__(self, channels: int, size: Sequence[int]):
        super().__init__()
        dims = len(size)
        self.norm1, self.norm2 = nn.LayerNorm(tuple(size)), nn.LayerNorm(tuple(size))
        self.conv1 = conv(dims, channels, channels)
        self.conv2 = conv(dims, channels, channels, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class GlobalContext(nn.Module):
    """Images (B, C, *S) on [-1, 1] as a whole, by attention over large patches: (B, E)."""

    def __init__(self, channels: int, size: Sequence[int], *, kernel: int, stride: int, embedding: int,
                 width: int):
        """`kernel` and `stride` of the patches; `embedding` the width of the attention, `width` E."""
        super().__init__()
        dims, grid = len(size), size
        for step in (stride, POOLING_STRIDE):
            grid = tuple((n - 1) // step + 1 for n in grid)
        self.conv_init = conv(dims, channels, channels, kernel, stride=stride)
        self.conv_pooler = conv(dims, channels, channels, POOLING_KERNEL, stride=POOLING_STRIDE)
        self.residual = ConvResidual(channels, grid)
        self.project = nn.Linear(channels, embedding, bias=False)
        self.position = PositionCode(embedding, grid)
        self.norm = nn.LayerNorm(embedding)
        self.attention = nn.MultiheadAttention(embedding, HEADS, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(embedding, width, bias=False), nn.GELU(), nn.Dropout(DROPOUT),
                                 nn.Linear(width, width, bias=False))
        self.norm_out = nn.LayerNorm(width)
        for layer in (self.project, self.ffn[0], self.ffn[3], self.attention.out_proj):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.residual(self.conv_pooler(self.conv_init(x)))
        tokens = h.flatten(2).transpose(1, 2)                                                # (B, T, C)
        code = self.position(torch.arange(tokens.shape[1], device=x.device)).to(x)
        x = self.norm(self.project(tokens) + code)                                # (B, T, embedding)
        h = self.attention(x, x, x, need_weights=False)[0]
        return self.norm_out(self.ffn(x + h)).mean(1)                                        # (B, E)
