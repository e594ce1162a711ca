"""Layers of HVAE, LVAE and BIVA: weight normalization, padding as in TensorFlow, the residual block, latents.

B images, C channels in, O out, H x W pixels, k kernel size, s stride, Z latent channels; shapes are
(C, H, W). A layer is y = w x + b with w = g v / |v|: one length g and one norm |v| for each output channel
(Salimans and Kingma 2016).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributed import launch
from distributions import Normal, full_precision
from families.hvae.config import Block, HVAEConfig
from families.hvae.shapes import Shape

INIT_EPS = 1e-8            # of the variance, in the data-dependent initialization
MIN_STD = 1e-6             # of a latent


class PSwish(nn.Module):
    """x sigmoid(beta x) with a learned slope beta."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


ACTIVATIONS = {'Identity': nn.Identity, 'ReLU': nn.ReLU, 'LeakyReLU': nn.LeakyReLU, 'SELU': nn.SELU,
               'ELU': nn.ELU, 'SoftPlus': nn.Softplus, 'Tanh': nn.Tanh, 'Swish': nn.SiLU, 'PSwish': PSwish}


def softplus_ln2(x: Tensor) -> Tensor:
    """log(1 + 2^x) / ln 2: positive, and 1 at 0."""
    return F.softplus(x, beta=math.log(2))


def same_padding(x: Tensor, kernel: int, stride: int = 1) -> Tensor:
    """x with as many zeros around as give ceil(n / s) outputs; an odd one goes right or to the bottom."""
    totals = [max(0, (math.ceil(n / stride) - 1) * stride + kernel - n) for n in x.shape[:1:-1]]   # W, then H
    return F.pad(x, [part for total in totals for part in (total // 2, total - total // 2)])


def centered(shape: Sequence[int], larger: Sequence[int]) -> list[int]:
    """For F.pad, what puts (H, W) into the middle of a larger (H, W); negated, it cuts it out again."""
    return [(b - a) // 2 for a, b in zip(reversed(shape), reversed(larger)) for _ in range(2)]


# ----------------------------------------------------------------------------------------------------- layers

class Affine(nn.Module, ABC):
    """A weight-normalized layer; with `weightnorm=False` the plain weight w.

    `initialize_layers` sets g and b from the first batch, so that output channels have mean 0 and variance 1.
    """
    axis = 0                                # of v that counts output channels

    def __init__(self, size: tuple[int, ...], weightnorm: bool):
        super().__init__()
        self.weightnorm, self.initializing = weightnorm, False
        v = nn.Parameter(nn.init.kaiming_normal_(torch.empty(size), nonlinearity='relu'))
        if weightnorm:
            self.v = v
            self.g = nn.Parameter(torch.ones([n if a == self.axis else 1 for a, n in enumerate(size)]))
        else:
            self.w = v
        self.bias = nn.Parameter(torch.zeros(size[self.axis]))

    def weight(self) -> Tensor:
        if not self.weightnorm:
            return self.w
        others = [a for a in range(self.v.dim()) if a != self.axis]
        return self.g / torch.linalg.vector_norm(self.v, dim=others, keepdim=True) * self.v

    @abstractmethod
    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y (B, O, ...), before `finish`."""

    def finish(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        if self.initializing and self.weightnorm:
            self._initialize(x)
        return self.finish(self.apply_weight(x, self.weight(), self.bias))

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        self.g.fill_(1)
        y = self.apply_weight(x, self.weight(), None).transpose(0, 1).flatten(1)         # (O, values)
        count = y.shape[1] * launch.world()
        if count == 1:
            return                      # a single value has no variance
        mean = launch.mean_over_ranks(y.mean(1))
        variance = launch.mean_over_ranks((y - mean[:, None]).square().mean(1)) * (count / (count - 1))
        length = torch.rsqrt(variance + INIT_EPS)
        self.g.copy_(length.view_as(self.g))
        self.bias.copy_(-mean * length)


class Conv(Affine):
    """Convolution with padding as in TensorFlow: n pixels become ceil(n / s).

    With a mode other than 'convolutional', x is resized by `scale` instead, and s is 1.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, weightnorm: bool = True,
                 mode: str = 'convolutional', scale: float = 1.0):
        super().__init__((c_out, c_in, kernel, kernel), weightnorm)
        self.kernel, self.stride, self.mode, self.scale = kernel, stride, mode, scale

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.scale != 1:
            x = F.interpolate(x, [round(n * self.scale) for n in x.shape[2:]], mode=self.mode)
        if self.stride == 1 and self.kernel % 2:
            return F.conv2d(x, weight, bias, padding=self.kernel // 2)                   # alike on both sides
        return F.conv2d(same_padding(x, self.kernel, self.stride), weight, bias, self.stride)


class Pointwise(Conv):
    """1 x 1 convolution, which the published system calls a linear layer over channels."""

    def __init__(self, c_in: int, c_out: int, weightnorm: bool):
        super().__init__(c_in, c_out, 1, weightnorm=weightnorm)


class UpConv(Affine):
    """Transposed convolution: n pixels become n s once k - s are cut off, an odd one right or below."""
    axis = 1

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, weightnorm: bool = True):
        super().__init__((c_in, c_out, kernel, kernel), weightnorm)
        self.stride, self.surplus = stride, kernel - stride

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, self.stride)

    def finish(self, y: Tensor) -> Tensor:
        first = self.surplus // 2
        return F.pad(y, [-first, first - self.surplus] * 2)


class Dense(Affine):
    """Linear layer from all features of an image, in the order C, H, W: (B, ...) to (B, *shape_out)."""

    def __init__(self, shape_in: Sequence[int], shape_out: Sequence[int], weightnorm: bool = True):
        super().__init__((math.prod(shape_out), math.prod(shape_in)), weightnorm)
        self.shape_out = tuple(shape_out)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.flatten(1), weight, bias)

    def finish(self, y: Tensor) -> Tensor:
        return y.view(-1, *self.shape_out)


def initialize_layers(model: nn.Module, x: Tensor) -> None:
    """Sets g and b of all weight-normalized layers, in the order in which `model(x)` meets them."""
    layers = [m for m in model.modules() if isinstance(m, Affine)]
    for layer in layers:
        layer.initializing = True
    try:
        with torch.no_grad():
            model(x)
    finally:
        for layer in layers:
            layer.initializing = False


def resampling(c_in: int, c_out: int, kernel: int, ratio: int, *, up: bool, mode: str,
               weightnorm: bool = True) -> Affine:
    """A convolution that makes the image `ratio` times larger or smaller."""
    if ratio == 1:
        return Conv(c_in, c_out, kernel, weightnorm=weightnorm)
    if mode != 'convolutional':
        return Conv(c_in, c_out, kernel, 1, weightnorm, mode, ratio if up else 1 / ratio)
    return (UpConv if up else Conv)(c_in, c_out, kernel, ratio, weightnorm)


def skip_layer(skip: Shape, inner: Shape, kernel: int, mode: str, revives: bool) -> Affine | None:
    """What brings a skip connection to the shape of the features `inner` that it is added to.

    None where the shapes are equal, unless it `revives`: the published block then leaves the skip out.
    """
    (c_skip, side, _), (channels, wanted, _) = skip, inner
    if side != wanted:
        ratio = max(side, wanted) // min(side, wanted)
        return resampling(c_skip, channels, kernel, ratio, up=side < wanted, mode=mode)
    return Conv(c_skip, channels, 1) if revives or c_skip != channels else None


# ------------------------------------------------------------------------------------------------------ block

class ResBlock(nn.Module):
    """act, convolution, (+ skip), act, dropout, convolution of stride s, (gate), (+ the input)."""

    def __init__(self, shape_in: Shape, block: Block, config: HVAEConfig, *, up: bool = False,
                 residual: bool = True, skip: Shape | None = None, dropout: float = 0.0):
        """`block` is the entry of the configuration; with `up` its stride enlarges.

        `skip` is the shape of the connection that comes from elsewhere.
        """
        super().__init__()
        c_in, *size = shape_in
        channels, kernel, weightnorm = block.out_channels, block.kernel_size, block.weightnorm
        stride, make = block.stride, ACTIVATIONS[config.activation]
        mode = block.upsampling_mode if up else block.downsampling_mode
        self.residual, self.stride, self.grows = residual, stride, up and stride > 1
        self.shape = (channels, *(n * stride if up else n // stride for n in size))      # of the output

        self.activation_pre = make() if residual else nn.Identity()
        self.conv1 = Conv(c_in, channels, kernel, weightnorm=weightnorm)
        self.aux = skip and skip_layer(skip, (channels, *size), kernel, mode,
                                       revives=not config.compat_official)
        self.activation_aux = make() if skip else nn.Identity()
        if self.aux is None:
            self.activation_aux.requires_grad_(False)        # has no effect: it is there for checkpoints only
        self.activation_mid = make()
        self.dropout = nn.Dropout(dropout)
        c_out = channels * (2 if block.gated else 1)
        self.conv2 = resampling(channels, c_out, kernel, stride, up=up, mode=mode, weightnorm=weightnorm)
        self.gate = nn.GLU(dim=1) if block.gated else nn.Identity()
        self.recomputes = False

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._forward, x, skip, use_reentrant=False,
                              preserve_rng_state=self.dropout.p > 0)
        return self._forward(x, skip)

    def _forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        y = self.conv1(self.activation_pre(x))                                  # (B, C, H, W)
        if self.aux is not None:
            y = y + self.aux(self.activation_aux(skip))
        y = self.gate(self.conv2(self.dropout(self.activation_mid(y))))
        return y + self._shortcut(x) if self.residual and not self.grows else y

    def _shortcut(self, x: Tensor) -> Tensor:
        """x in the shape of the output: channels of zeros appended, or the last ones cut; pooled."""
        if x.shape[1] != self.shape[0]:
            x = F.pad(x, (0, 0, 0, 0, 0, self.shape[0] - x.shape[1]))
        return x if self.stride == 1 else F.avg_pool2d(same_padding(x, 3, self.stride), 3, self.stride)


class Chain(nn.ModuleList):
    """Blocks one after the other, all with the same skip connection."""

    @property
    def shape(self) -> Shape:
        return self[-1].shape

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, skip)
        return x


# ---------------------------------------------------------------------------------------------------- latents

class GaussianLatent(nn.Module):
    """Posterior and prior of one latent (Z, h, w); a dense one has h = w = 1."""

    def __init__(self, channels: int, kernel: int | None, features: Shape, above: Shape | None,
                 activation: str, weightnorm: bool = True, learn_prior: bool = False):
        """`features` and `above`: shapes that posterior and prior are made of; no `above` is the top's prior.

        `kernel` None is a dense latent.
        """
        super().__init__()
        self.shape = (channels, 1, 1) if kernel is None else (channels, *features[1:])

        def parameters(shape: Shape) -> Affine:
            return Dense(shape, (2 * channels, 1, 1), weightnorm) if kernel is None \
                else Conv(shape[0], 2 * channels, kernel, weightnorm=weightnorm)

        self.activation = ACTIVATIONS[activation]()
        self.to_posterior = parameters(features)
        if above is not None:
            self.to_prior = parameters(above)
        elif learn_prior:
            self.prior_logits = nn.Parameter(torch.zeros(2 * channels, *self.shape[1:]))
        else:
            self.register_buffer('prior_logits', torch.zeros(2 * channels, *self.shape[1:]))

    def posterior(self, features: Tensor) -> Normal:
        return normal(self.to_posterior(self.activation(features)))

    def prior(self, above: Tensor | None, batch: int) -> Normal:
        """Given the features above; the top has none, and as many copies as the batch."""
        return normal(self.prior_logits.expand(batch, -1, -1, -1) if above is None
                      else self.to_prior(self.activation(above)))


def normal(parameters: Tensor) -> Normal:
    """From (B, 2Z, h, w): means, then what standard deviations are made of."""
    mean, rho = full_precision(parameters).chunk(2, dim=1)
    return Normal(mean, softplus_ln2(rho).clamp(min=MIN_STD))
