"""Likelihoods that HVAE, LVAE and BIVA can be given, by their published names, and the layer before them.

B images, C channels, H x W pixels; x and means are in [0, 1], log-probabilities in nats. d are the features
that generation ends with; `logits` (B, num_params, H, W) are the parameters of p(x|z).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributions import (
    MIN_LOG_SCALE,
    Bernoulli,
    DiscretizedLogisticMixture,
    Normal,
    Pixels,
    full_precision,
    pixel_likelihood,
)
from families.hvae.layers import ACTIVATIONS, Conv, Dense, Pointwise, softplus_ln2
from families.hvae.shapes import Shape
from utils import UserError

NUM_MIXTURE = 10


class PixelNormal:
    """A density on [0, 1]: normal, with mean and standard deviation of each value."""

    def __init__(self, channels: int):
        self.num_params = 2 * channels

    def _normal(self, logits: Tensor) -> Normal:
        mean, rho = logits.chunk(2, dim=1)
        return Normal(mean, softplus_ln2(rho))

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        return self._normal(logits).log_prob(x).sum(1, keepdim=True)

    def mean(self, logits: Tensor) -> Tensor:
        return self._normal(logits).mean.clamp(0, 1)

    def std(self, logits: Tensor) -> Tensor:
        return self._normal(logits).std

    def sample(self, logits: Tensor) -> Tensor:
        return self._normal(logits).sample().clamp(0, 1)


class PixelBeta:
    """A density on (0, 1), infinite at both ends.

    With `bits`, values are first moved to the middle of their gray level, (2^bits - 1) x + 1/2 of 2^bits,
    where the density is finite. Without, as published, black and white pixels have none.
    """

    def __init__(self, channels: int, bits: int | None):
        self.num_params, self.bits = 2 * channels, bits

    def _beta(self, logits: Tensor) -> torch.distributions.Beta:
        return torch.distributions.Beta(*F.softplus(logits).chunk(2, dim=1), validate_args=False)

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        if self.bits is not None:
            x = ((2 ** self.bits - 1) * x + 0.5) / 2 ** self.bits
        return self._beta(logits).log_prob(x).sum(1, keepdim=True)

    def mean(self, logits: Tensor) -> Tensor:
        return self._beta(logits).mean

    def std(self, logits: Tensor) -> Tensor:
        return self._beta(logits).stddev

    def sample(self, logits: Tensor) -> Tensor:
        return self._beta(logits).sample()


class DiscretizedLogistic:
    """One logistic, its mass gathered into 256 bins of [0, 1], with 1e-7 added to each."""
    BINS, FLOOR = 256, 1e-7

    def __init__(self, channels: int):
        self.num_params = 2 * channels

    def _split(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Means on [0, 1] and log-scales, (B, C, H, W) each."""
        mean, log_scale = logits.chunk(2, dim=1)
        return mean + 0.5, (log_scale - 1).clamp(min=MIN_LOG_SCALE)

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = self._split(logits)
        level = torch.floor((self.BINS - 1) * x + 0.5)                                   # 0 to 255
        below = lambda edge: torch.sigmoid((edge / self.BINS - mean) * torch.exp(-log_scale))
        upper = torch.where(level == self.BINS - 1, 1.0, below(level + 1))
        lower = torch.where(level == 0, 0.0, below(level))
        return torch.log(upper - lower + self.FLOOR).sum(1, keepdim=True)

    def mean(self, logits: Tensor) -> Tensor:
        return self._split(logits)[0].clamp(0, 1)

    def std(self, logits: Tensor) -> Tensor:
        return math.pi / math.sqrt(3) * torch.exp(self._split(logits)[1])

    def sample(self, logits: Tensor) -> Tensor:
        mean, log_scale = self._split(logits)
        u = torch.rand_like(mean).clamp(1e-5, 1 - 1e-5)
        return (mean + torch.exp(log_scale) * torch.logit(u)).clamp(0, 1)


class PublishedMixture(DiscretizedLogisticMixture):
    """The mixture of ten logistics for color, as PixelCNN++ computes it.

    Bins are centered on x, on the grid or not; where one holds less than 1e-5, its density is its mass.
    """

    def __init__(self, channels: int):
        super().__init__(channels, 8, NUM_MIXTURE, official=True)

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        log_weights, means, log_scales, color = self._split(logits)
        x = (2 * x - 1).unsqueeze(2)                                                     # (B, C, 1, H, W)
        centered, half = x - self._condition(means, color, x), 1 / 255
        upper, lower = (torch.exp(-log_scales) * (centered + edge) for edge in (half, -half))
        log_p = torch.where(x < -0.999, F.logsigmoid(upper), torch.where(
            x > 0.999, F.logsigmoid(-lower), self._official_inside(centered, upper, lower, log_scales)))
        return torch.logsumexp(log_p.sum(1) + log_weights, dim=1, keepdim=True)


# ------------------------------------------------------------------------------------------------ table, head

@dataclass(frozen=True)
class Kind:
    """A likelihood: for which pixels, what makes its parameters of d, whether d is activated first."""
    pixels: str
    layer: str                                         # a row of `PixelHead.LAYERS`
    activated: bool
    make: Callable[[int, Pixels, bool], Any]           # (channels, pixels, compat) -> distribution
    channels: int | None = None                        # of images that it is for; None = any
    bits: int | None = None


_bernoulli = lambda c, pixels, compat: Bernoulli(c)
_normal = lambda c, pixels, compat: PixelNormal(c)
_beta = lambda c, pixels, compat: PixelBeta(c, None if compat else pixels.bits)
_logistic = lambda c, pixels, compat: DiscretizedLogistic(c)
_mixture = lambda c, pixels, compat: PublishedMixture(c)
# Gray levels that sum to one; for channel counts that the mixture lacks, a normal.
_exact = lambda c, pixels, compat: pixel_likelihood(pixels, c, NUM_MIXTURE if c in (1, 3) else 1)

EXACT = Kind('discretized', 'conv1', False, _exact)
LIKELIHOODS = {
    'auto': None,
    'BernoulliLikelihoodConv2d': Kind('bernoulli', 'conv3', True, _bernoulli),
    'BernoulliLikelihoodDense': Kind('bernoulli', 'dense', True, _bernoulli),
    'BernoulliLikelihoodIdentity': Kind('bernoulli', 'identity', False, _bernoulli),
    'GaussianLikelihoodConv2d': Kind('discretized', 'conv3', True, _normal),
    'GaussianLikelihoodDense': Kind('discretized', 'dense', True, _normal),
    'BetaLikelihoodConv2d': Kind('discretized', 'conv3', True, _beta),
    'DiscretizedLogisticLikelihoodConv2d': Kind('discretized', 'conv3', False, _logistic, bits=8),
    'DiscretizedLogisticMixLikelihoodConv2d': Kind('discretized', 'conv1', False, _mixture, 3, 8),
    'DiscretizedLogisticMixLikelihoodDense': Kind('discretized', 'pointwise', False, _mixture, 3, 8),
}


def choose_likelihood(name: str, channels: int, pixels: Pixels, compat: bool) -> Kind:
    """The row that `name` stands for. Raises UserError if it does not suit the pixels."""
    if name == 'auto':
        if pixels.likelihood == 'bernoulli':
            name = 'BernoulliLikelihoodConv2d'
        elif compat:
            name = f"DiscretizedLogistic{'Mix' if channels == 3 else ''}LikelihoodConv2d"
        else:
            return EXACT
    kind = LIKELIHOODS[name]
    needs = (('--likelihood', pixels.likelihood, kind.pixels), ('channels', channels, kind.channels),
             ('bits a pixel', pixels.bits, kind.bits))
    for what, came, wanted in needs:
        if wanted is not None and came != wanted:
            raise UserError(f"--likelihood_module {name} is for data of {what} {wanted}, these have {came}. "
                            f"Choose another one, or auto.")
    return kind


class PixelHead(nn.Module):
    """From d to the parameters of the likelihood, and the likelihood itself."""
    LAYERS = {   # (shape of d, parameters, weightnorm) -> layer
        'conv3': lambda shape, n, weightnorm: Conv(shape[0], n, 3, weightnorm=weightnorm),
        'conv1': lambda shape, n, weightnorm: Conv(shape[0], n, 1, weightnorm=weightnorm),
        'pointwise': lambda shape, n, weightnorm: Pointwise(shape[0], n, weightnorm),
        'dense': lambda shape, n, weightnorm: Dense(shape, (n, *shape[1:]), weightnorm),
        'identity': lambda shape, n, weightnorm: nn.Identity(),
    }

    def __init__(self, kind: Kind, shape: Shape, channels: int, pixels: Pixels, activation: str,
                 weightnorm: bool, compat: bool):
        """`shape` of d, `channels` of an image."""
        super().__init__()
        self.likelihood = kind.make(channels, pixels, compat)
        if kind.layer == 'identity' and shape[0] != self.likelihood.num_params:
            raise UserError(f"--likelihood_module BernoulliLikelihoodIdentity takes the last features as "
                            f"logits: they have {shape[0]} channels, the image {channels}. Set out_channels "
                            f"of the first block of stage 1, or choose another likelihood.")
        self.activation = ACTIVATIONS[activation]() if kind.activated else nn.Identity()
        self.net = self.LAYERS[kind.layer](shape, self.likelihood.num_params, weightnorm)

    def forward(self, d: Tensor) -> Tensor:
        return full_precision(self.net(self.activation(d)))


