"""NCSN++ (Song et al. 2021) as SADE has it in 3D, and a matryoshka of two resolutions; in 2D and in 3D.

B images, C channels, S the two or three spatial axes; levels i = 0..L-1 with nf 2^i channels, sigma (B,) the
noise level that the network is given, E the width of its embedding.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributions import full_precision
from families.score.config import ATTENTION_GROUPS
from families.score.sde import expand
from neural_operations import CONV

LINEAR_INTERPOLATION = {2: 'bilinear', 3: 'trilinear'}
AVERAGE = {2: F.avg_pool2d, 3: F.avg_pool3d}
DROPOUT = {2: nn.Dropout2d, 3: nn.Dropout3d}                         # of whole channels
# Modules, so that heat-maps can exchange and watch them.
ACTIVATIONS = {'memswish': nn.SiLU, 'swish': nn.SiLU, 'relu': nn.ReLU, 'elu': nn.ELU,
               'lrelu': lambda: nn.LeakyReLU(0.2)}
NO_SCALE = 1e-10             # what a scale of 0 means: a layer that puts out almost nothing
ATTENTION_SCALE = 0.1


# ---------------------------------------------------------------------------------------------------- layers

@torch.no_grad()
def initialize(layer: nn.Module, scale: float) -> nn.Module:
    """Uniform weights of variance scale / mean of fan-in and fan-out, biases 0."""
    weight = layer.weight
    fan_out, fan_in = (n * weight[0, 0].numel() for n in weight.shape[:2])
    bound = math.sqrt(3 * (scale or NO_SCALE) / ((fan_in + fan_out) / 2))
    weight.uniform_(-bound, bound)
    if layer.bias is not None:
        layer.bias.zero_()
    return layer


def conv(dims: int, c_in: int, c_out: int, kernel: int = 3, *, dilation: int = 1,
         scale: float | None = 1.0, **options: Any) -> nn.Module:
    """A convolution that keeps the size at stride 1; `scale` None leaves torch's own initialization.

    `options` are stride and bias of nn.Conv2d and nn.Conv3d.
    """
    padding = dilation * (kernel - 1) // 2
    layer = CONV[dims](c_in, c_out, kernel, padding=padding, dilation=dilation, **options)
    return layer if scale is None else initialize(layer, scale)


def double(x: Tensor) -> Tensor:
    """Twice the size on every axis, linearly, in float32."""
    x = full_precision(x)
    return F.interpolate(x, scale_factor=2, mode=LINEAR_INTERPOLATION[x.ndim - 2], align_corners=False)


class Fourier(nn.Module):
    """sin and cos of log(sigma) at E random frequencies: (B,) to (B, 2 E)."""

    def __init__(self, width: int, scale: float, learnable: bool):
        super().__init__()
        self.W = nn.Parameter(torch.randn(width) * scale, requires_grad=learnable)

    def forward(self, sigma: Tensor) -> Tensor:
        angles = 2 * math.pi * torch.log(sigma)[:, None] * self.W
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class Positional(nn.Module):
    """sin and cos of the noise level, at E geometric frequencies from 1 to 1/10000: (B, 2 E)."""

    def __init__(self, width: int):
        super().__init__()
        exponents = torch.arange(width) / max(width - 1, 1)
        self.register_buffer('frequencies', 10000 ** -exponents, persistent=False)

    def forward(self, sigma: Tensor) -> Tensor:
        angles = sigma[:, None] * self.frequencies
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class NoiseEmbedding(nn.Module):
    """What all blocks learn of the noise: (B,) to (B, 4 E)."""

    def __init__(self, width: int, kind: str, scale: float, learnable: bool):
        super().__init__()
        self.features = Fourier(width, scale, learnable) if kind == 'fourier' else Positional(width)
        self.hidden = initialize(nn.Linear(2 * width, 4 * width), 1.0)
        self.out = initialize(nn.Linear(4 * width, 4 * width), 1.0)

    def forward(self, sigma: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(self.features(sigma))))


class Block(nn.Module):
    """A residual block that the noise modulates; `before` (a convolution) comes first, outside the skip."""

    def __init__(self, before: nn.Module | None):
        super().__init__()
        self.before = before
        self.recomputes = False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._forward, x, t, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, t)

    def _forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.residual(x if self.before is None else self.before(x), t)

    def _modulation(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta, each (B, C, 1, ...), from the activated embedding t."""
        gamma, beta = self.dense(t).chunk(2, dim=1)
        return tuple(value.reshape(*value.shape, *[1] * (x.ndim - 2)) for value in (gamma, beta))


class BigGANBlock(Block):
    """x + h: gamma and beta act between its two convolutions."""

    def __init__(self, dims: int, channels: int, embedding: int, act: str, kernel: int = 3,
                 before: nn.Module | None = None):
        super().__init__(before)
        groups = min(channels // 4, 32)
        self.act = ACTIVATIONS[act]()
        self.norm_0 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_0 = conv(dims, channels, channels, kernel)
        self.dense = initialize(nn.Linear(embedding, 2 * channels), 1.0)
        self.norm_1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_1 = conv(dims, channels, channels, kernel, scale=0.0)

    def residual(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv_0(self.act(self.norm_0(x)))
        gamma, beta = self._modulation(self.act(t), x)
        return x + self.conv_1(self.act(self.norm_1(gamma * h + beta)))


class SegResNetBlock(Block):
    """gamma (x + h) + beta."""

    def __init__(self, dims: int, channels: int, embedding: int, act: str, groups: int,
                 before: nn.Module | None, **options: Any):
        """`options` of both convolutions: see `conv`."""
        super().__init__(before)
        self.act = ACTIVATIONS[act]()
        self.norm_1 = nn.GroupNorm(groups, channels)
        self.norm_2 = nn.GroupNorm(groups, channels)
        self.conv_1 = conv(dims, channels, channels, **options)
        self.conv_2 = conv(dims, channels, channels, **{'scale': 0.0} | options)
        self.dense = initialize(nn.Linear(embedding, 2 * channels), 1.0)

    def residual(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv_1(self.act(self.norm_1(x)))
        h = x + self.conv_2(self.act(self.norm_2(h)))
        gamma, beta = self._modulation(F.silu(t), x)
        return gamma * h + beta


class SelfAttention(nn.Module):
    """One head over all positions, in float32, added to its input."""

    def __init__(self, dims: int, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(ATTENTION_GROUPS, channels, eps=1e-6)
        self.qkv = conv(dims, channels, 3 * channels, 1, scale=ATTENTION_SCALE)
        self.proj = conv(dims, channels, channels, 1, scale=ATTENTION_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (full_precision(part).flatten(2).transpose(1, 2)                          # (B, P, C)
                   for part in self.qkv(self.norm(x)).chunk(3, dim=1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.proj(attended.reshape(x.shape))


# -------------------------------------------------------------------------------------------------- networks

class NCSNpp(nn.Module):
    """The U-Net: images (B, C, *S) and sigma (B,) to (B, C, *S)."""

    def __init__(self, channels: int, dims: int, config: Any, divide_by_sigma: bool):
        """`config` has the flags of the network; with `divide_by_sigma` the output is divided by sigma."""
        super().__init__()
        self.divide_by_sigma = divide_by_sigma
        embedding = 4 * config.time_embedding_sz
        plain = config.resblock_type == 'segresnet' and not config.resblock_pp
        kernel, own = (3, {'bias': False, 'scale': None}) if plain \
            else (config.conv_size, {'scale': config.init_scale})
        act, convolutions = ('relu', own) if plain \
            else (config.act, {'kernel': config.conv_size, 'dilation': config.dilation})
        widths = [config.nf * 2 ** i for i in range(len(config.blocks_down))]

        def block(width: int, before: nn.Module | None = None) -> Block:
            if config.resblock_type == 'biggan':
                return BigGANBlock(dims, width, embedding, config.act, config.conv_size, before)
            return SegResNetBlock(dims, width, embedding, act, config.norm_num_groups, before,
                                  **convolutions)

        def level(i: int, number: int) -> nn.ModuleList:
            halving = conv(dims, widths[i - 1], widths[i], kernel, stride=2, **own) if i else None
            return nn.ModuleList(block(widths[i], None if j else halving) for j in range(number))

        self.stem = conv(dims, channels, config.nf, kernel, **own)
        self.dropout = DROPOUT[dims](config.dropout)
        self.down = nn.ModuleList(level(i, number) for i, number in enumerate(config.blocks_down))
        rising = widths[-2::-1]
        self.up = nn.ModuleList(nn.ModuleList(block(width) for _ in range(number))
                                for width, number in zip(rising, config.blocks_up))
        self.narrow = nn.ModuleList(conv(dims, 2 * width, width, 1, **own) for width in rising)
        self.head_norm = nn.GroupNorm(config.norm_num_groups, config.nf)
        self.head = conv(dims, config.nf, channels, 3, scale=None if plain else config.init_scale)
        self.embedding = NoiseEmbedding(config.time_embedding_sz, config.embedding_type,
                                        config.fourier_scale, config.learnable_embedding)
        self.attention = SelfAttention(dims, widths[-1]) if config.self_attention else nn.Identity()

    @property
    def last_block(self) -> nn.Module:
        return (self.up if len(self.up) else self.down)[-1][-1]

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        t = self.embedding(sigma)                                                           # (B, 4 E)
        h, kept = self.dropout(self.stem(x)), []                                            # (B, nf, *S)
        for blocks in self.down:
            for block in blocks:
                h = block(h, t)
            kept.append(h)                                                    # (B, nf 2^i, *S / 2^i)
        h = self.attention(kept.pop())
        for narrow, blocks in zip(self.narrow, self.up):
            h = (double(narrow(h)) + kept.pop()) / math.sqrt(2)
            for block in blocks:
                h = block(h, t)
        h = full_precision(self.head(self.head_norm(h)))                                    # (B, C, *S)
        return h / expand(sigma, h) if self.divide_by_sigma else h


class Matryoshka(nn.Module):
    """A level at full size around an inner NCSN++ trained at a lower one: (B, C, *S), sigma (B,).

    The image reaches the inner network at half of the full size, interpolated to the size that this was
    trained at; its noise level is larger there by the square root of the ratio of voxels.
    """

    def __init__(self, channels: int, shape: Sequence[int], config: Any, inner: NCSNpp,
                 inner_size: Sequence[int]):
        """`shape` the full size S, `inner_size` that of the inner network."""
        super().__init__()
        dims, nf, embedding = len(shape), config.nf, 4 * config.time_embedding_sz
        self.half, self.inner_size = tuple(n // 2 for n in shape), tuple(inner_size)
        self.sigma_factor = math.sqrt(math.prod(self.inner_size) / math.prod(self.half))

        def block(width: int, before: nn.Module | None = None) -> BigGANBlock:
            return BigGANBlock(dims, width, embedding, 'memswish', before=before)

        def quiet(c_in: int, c_out: int) -> nn.Module:
            return conv(dims, c_in, c_out, scale=0.0)

        self.inner = inner
        self.embedding = NoiseEmbedding(config.time_embedding_sz, config.embedding_type,
                                        config.fourier_scale, config.learnable_embedding)
        self.widen = quiet(nf, 2 * nf)
        self.outer_block = block(2 * nf)
        self.down_block = block(2 * nf, conv(dims, 2 * nf, 2 * nf, stride=2, scale=None))
        self.stem = quiet(channels, nf)
        self.to_image = quiet(2 * nf, channels)
        self.from_image = quiet(channels, 2 * nf)
        self.up_block = block(4 * nf)
        self.head = quiet(4 * nf, channels)

    @property
    def last_block(self) -> nn.Module:
        return self.up_block

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        t = self.embedding(sigma)
        kept = self.outer_block(self.widen(self.stem(x)), t)                                # (B, 2 nf, *S)
        h = self.to_image(self.down_block(kept, t))                                         # (B, C, *S / 2)
        h = full_precision(h) + AVERAGE[x.ndim - 2](x, 3, stride=2, padding=1)
        h = F.interpolate(h, self.inner_size, mode='nearest')
        h = F.interpolate(self.inner(h, sigma * self.sigma_factor), self.half, mode='nearest')
        h = torch.cat([double(self.from_image(h)), kept], dim=1)                            # (B, 4 nf, *S)
        h = full_precision(self.head(self.up_block(h, t)))
        return h / expand(sigma, h)
