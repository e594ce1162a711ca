"""Distributions that the model families share: the latent normal and the pixel likelihoods.

B images, C channels, S the spatial axes (H, W), M mixture components, K = 2^bits gray levels.
Images are in [0, 1]; a likelihood maps them to [-1, 1] itself. All log-probabilities are in nats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MIN_LOG_SCALE = -7.0     # of a logistic, on [-1, 1]: its width is then 1/8 of an 8-bit gray level
SOFT_CLAMP = 5.0         # means and log standard deviations stay within (-5, 5)
LEAST_KL = 1e-2          # nats; a smaller KL counts as this much where its logarithm is a statistic
LOG_FLOOR = 1e-3         # added to what a logarithm of a statistic is taken of
MIN_STD = 1e-2           # keeps the log-density of a latent bounded


@dataclass(frozen=True)
class Pixels:
    """What the pixels of a data set are, as far as a likelihood must know.

    likelihood  'bernoulli' for binary pixels, 'discretized' for gray levels and colors
    bits        gray levels are the 2^bits values k / (2^bits - 1)
    padding     width of the border that was added to the image and is left out of the likelihood
    """
    likelihood: str = 'discretized'
    bits: int = 8
    padding: int = 0

    def inside(self, x: Tensor) -> Tensor:
        """x (..., H, W) without the border."""
        p = self.padding
        return x[..., p:-p, p:-p] if p else x

    def framed(self, x: Tensor) -> Tensor:
        """x (..., H, W) with a border of zeros around it."""
        return F.pad(x, (self.padding,) * 4)


EIGHT_BITS = Pixels()
Terms = dict[str, Tensor]     # what a pass of a model gives for each image, by name: see model.Model


def soft_clamp(x: Tensor) -> Tensor:
    """Squeezes x smoothly into (-5, 5)."""
    return SOFT_CLAMP * torch.tanh(x / SOFT_CLAMP)


def full_precision(x: Tensor) -> Tensor:
    """x in float32 if autocast left it in half precision: densities and KL are not to be computed there."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def per_image(x: Tensor) -> Tensor:
    """Sums (B, ...) over all axes but the first: (B,), in float64 where no gradient is taken.

    Scores are differences of such sums: in float32 their last digits would depend on the order of summation,
    and with it on the size of the batch.
    """
    x = x.flatten(1)
    return x.sum(1) if torch.is_grad_enabled() else x.double().sum(1)


def likelihood_statistics(terms: Terms, likelihood: Any, logits: Tensor, x: Tensor) -> Tensor:
    """What DoSE (Morningstar et al. 2021) asks of a hierarchical VAE: (B, L + 4) float64.

    recon, nats, and the logarithms of the L KL of `terms`, whose spread grows with their size; of p(x|z) with
    these `logits` the mean log standard deviation of a pixel; the mean log |x - mean|, divided by that
    deviation and as it is. Where a likelihood explains an image too well, or its scale is unusual, the bound
    alone does not tell. x (B, C, *S) in [0, 1].
    """
    scale, error = likelihood.std(logits).double(), (x - likelihood.mean(logits)).double().abs()
    columns = [scale.clamp(min=LOG_FLOOR).log(), (error / scale.clamp(min=LOG_FLOOR) + LOG_FLOOR).log(),
               (error + LOG_FLOOR).log()]
    return torch.cat([terms['recon'][:, None].double(), terms['kl'].double().clamp(min=LEAST_KL).log(),
                      torch.stack([column.flatten(1).mean(1) for column in columns], 1)], 1)


def bits_per_dim(nats: float, num_dims: int) -> float:
    """Nats per image to bits per dimension."""
    return nats / (num_dims * math.log(2))


def log_mean_exp(x: Tensor, dim: int = 0) -> Tensor:
    """log of the mean of exp(x) along `dim`, without overflow."""
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


class Normal:
    """Diagonal normal with tensors `mean` and `std` of one shape."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    @classmethod
    def from_raw(cls, mean: Tensor, log_std: Tensor) -> 'Normal':
        """The latent normal of NVAE: network outputs softly clamped, std at least 0.01.

        A raw log_std of 0 is std 1.01.
        """
        return cls(soft_clamp(mean), torch.exp(soft_clamp(log_std)) + MIN_STD)

    def sample(self, temperature: float = 1.0) -> Tensor:
        """A reparameterized draw whose noise is scaled by `temperature`; 0 is the mean."""
        if temperature == 0:
            return self.mean
        return self.mean + temperature * self.std * torch.randn_like(self.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, elementwise."""
        return -0.5 * ((x - self.mean) / self.std) ** 2 - 0.5 * math.log(2 * math.pi) - torch.log(self.std)

    def kl(self, p: 'Normal') -> Tensor:
        """KL(self || p), elementwise."""
        ratio = self.std / p.std
        excess = ratio - 1          # ratio ** 2 - 1 would leave a small KL few digits in float32
        return 0.5 * (((self.mean - p.mean) / p.std) ** 2 + excess ** 2) + (excess - torch.log(ratio))


# ------------------------------------------------------------------------------------------------ likelihoods
# A likelihood turns the output of a decoder, `logits` (B, num_params, *S), into p(x|z). It has
#   num_params                      channels that the decoder must put out
#   log_prob(logits, x)             (B, 1, *S) summed over channels
#   mean(logits)                    (B, C, *S) in [0, 1]
#   std(logits)                     (B, C, *S) standard deviation of a value in [0, 1]
#   sample(logits)                  (B, C, *S) in [0, 1]

class Bernoulli:
    """Independent binary pixels."""

    def __init__(self, channels: int):
        self.num_params = channels

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(logits, x, reduction='none').sum(1, keepdim=True)

    def mean(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def std(self, logits: Tensor) -> Tensor:
        return (torch.sigmoid(logits) * torch.sigmoid(-logits)).sqrt()

    def sample(self, logits: Tensor) -> Tensor:
        return (torch.rand_like(logits) < torch.sigmoid(logits)).to(logits.dtype)


class DiscretizedNormal:
    """A normal on [-1, 1], its mass gathered into K gray levels that sum to one; channels are independent.

    `official=True` is the published decoder instead: a density on [-1, 1], which knows no gray levels.
    """

    def __init__(self, channels: int, bits: int = 8, official: bool = False):
        self.num_params, self.bits, self.official = 2 * channels, bits, official

    def _normal(self, logits: Tensor) -> Normal:
        return Normal.from_raw(*logits.chunk(2, dim=1))

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        normal, x = self._normal(logits), 2 * x - 1
        if self.official:
            return normal.log_prob(x).sum(1, keepdim=True)
        # float64: the difference of two nearly equal probabilities loses half of its digits.
        half = 1 / (2 ** self.bits - 1)
        distance, std = (x - normal.mean).double(), normal.std.double()
        # the lowest and the highest level take the tails
        lower = torch.where(x < -1 + half, -torch.inf, (distance - half) / std)
        upper = torch.where(x > 1 - half, torch.inf, (distance + half) / std)
        # log(Phi(b) - Phi(a)) = log(Phi(-a) - Phi(-b)); on the left side of the mean neither is close to 1.
        flip = distance > 0
        a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
        log_a = torch.special.log_ndtr(a.clamp(min=-1e4))
        log_b = torch.special.log_ndtr(b.clamp(-1e4, 1e4))
        gap = torch.where(a.isinf(), torch.inf, log_b - log_a).clamp(min=1e-300)
        return (log_b + torch.log(-torch.expm1(-gap))).to(logits.dtype).sum(1, keepdim=True)

    def mean(self, logits: Tensor) -> Tensor:
        return (self._normal(logits).mean.clamp(-1, 1) + 1) / 2

    def std(self, logits: Tensor) -> Tensor:
        return self._normal(logits).std / 2

    def sample(self, logits: Tensor) -> Tensor:
        x = self._normal(logits).sample().clamp(-1, 1)
        return to_levels((x + 1) / 2, None if self.official else self.bits)


class DiscretizedLogisticMixture:
    """Mixture of M logistics on [-1, 1], its mass gathered into K levels (PixelCNN++, Salimans et al. 2017).

    One or three channels; in color, green depends on red, and blue on both, linearly, in each component.
    `official=True` restores two habits of the published NVAE: with 8 bits gray levels 254 and 255 both take
    the right tail (they then sum to up to 1.4), and an approximation where a level holds less than 1e-5.
    """

    def __init__(self, channels: int, bits: int = 8, num_mixture: int = 10, official: bool = False):
        if channels not in (1, 3):
            raise ValueError(f"a logistic mixture for {channels} channels: 1 or 3 are supported. "
                             f"Use --num_mixture_dec 1 (a normal decoder) or fewer channels.")
        self.channels, self.bits, self.num_mixture, self.official = channels, bits, num_mixture, official
        self.num_params = num_mixture * (1 + 2 * channels + channels * (channels - 1) // 2)

    def _split(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """log weights (B, M, *S); means, log scales (B, C, M, *S); color coefficients (B, 3, M, *S)."""
        M, space = self.num_mixture, logits.shape[2:]
        log_weights = F.log_softmax(logits[:, :M], dim=1)
        rest = logits[:, M:].reshape(len(logits), self.channels, -1, *space)     # (B, C, 2M or 3M, *S)
        means, log_scales = rest[:, :, :M], rest[:, :, M:2 * M].clamp(min=MIN_LOG_SCALE)
        return log_weights, means, log_scales, torch.tanh(rest[:, :, 2 * M:]) if self.channels == 3 else None

    def _condition(self, means: Tensor, color: Tensor | None, x: Tensor) -> Tensor:
        """Means (B, C, M, *S) given the other channels of x (B, C, M or 1, *S) that come before."""
        if color is None:
            return means
        red, green = x[:, 0], x[:, 1]
        return torch.stack([means[:, 0], means[:, 1] + color[:, 0] * red,
                            means[:, 2] + color[:, 1] * red + color[:, 2] * green], dim=1)

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        log_weights, means, log_scales, color = self._split(logits)
        x = (2 * x - 1).unsqueeze(2)                                             # (B, C, 1, *S)
        half = 1 / (2 ** self.bits - 1)                                       # half the width of a gray level
        centered, inv_scale = x - self._condition(means, color, x), torch.exp(-log_scales)
        upper, lower = inv_scale * (centered + half), inv_scale * (centered - half)
        log_below, log_above = F.logsigmoid(upper), F.logsigmoid(-lower)     # all mass below, above the level
        if self.official:
            inside = self._official_inside(centered, upper, lower, log_scales)
            is_first, is_last = x < -0.999, x > 0.99
        else:
            # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a-b)): exact at any depth, in any tail
            inside = log_below + log_above + torch.log(-torch.expm1(-2 * half * inv_scale))
            is_first, is_last = x < -1 + half, x > 1 - half
        log_p = torch.where(is_first, log_below, torch.where(is_last, log_above, inside))
        return torch.logsumexp(log_p.sum(1) + log_weights, dim=1, keepdim=True)  # (B, 1, *S)

    def _official_inside(self, centered: Tensor, upper: Tensor, lower: Tensor, log_scales: Tensor) -> Tensor:
        mass = torch.sigmoid(upper) - torch.sigmoid(lower)
        middle = centered * torch.exp(-log_scales)
        log_density = middle - log_scales - 2 * F.softplus(middle) - math.log((2 ** self.bits - 1) / 2)
        return torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-10)), log_density)

    def mean(self, logits: Tensor) -> Tensor:
        log_weights, components, _ = self._components(logits)
        return ((log_weights.exp().unsqueeze(1) * components).sum(2) + 1) / 2    # (B, C, *S)

    def _components(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log weights (B, M, *S), means in [-1, 1] and log scales (B, C, M, *S) of the logistics."""
        log_weights, means, log_scales, color = self._split(logits)
        component = means
        for _ in range(self.channels - 1):     # red is known at once, then green, then blue
            component = self._condition(means, color, component)
        return log_weights, component.clamp(-1, 1), log_scales

    def std(self, logits: Tensor) -> Tensor:
        log_weights, components, log_scales = self._components(logits)
        weights = log_weights.exp().unsqueeze(1)
        mean = (weights * components).sum(2, keepdim=True)
        within = math.pi ** 2 / 3 * torch.exp(2 * log_scales)                    # variance of a logistic
        return (weights * (within + (components - mean) ** 2)).sum(2).sqrt() / 2

    def sample(self, logits: Tensor) -> Tensor:
        log_weights, means, log_scales, color = self._split(logits)
        gumbel = -torch.log(-torch.log(torch.rand_like(log_weights).clamp(1e-5, 1 - 1e-5)))
        component = (log_weights + gumbel).argmax(1, keepdim=True).unsqueeze(1)    # (B, 1, 1, *S)
        pick = lambda t: t.gather(2, component.expand(-1, t.shape[1], -1, *t.shape[3:]))       # (B, C, 1, *S)
        means, log_scales = pick(means), pick(log_scales)
        color = pick(color) if color is not None else None
        u = torch.rand_like(means).clamp(1e-5, 1 - 1e-5)
        noise = torch.exp(log_scales) * (torch.log(u) - torch.log1p(-u))
        x = means                              # red is drawn at once, then green given red, then blue
        for channel in range(self.channels):
            x = self._condition(means, color, x) if channel else x
            x = to_levels(((x + noise).clamp(-1, 1) + 1) / 2, None if self.official else self.bits) * 2 - 1
        return (x.squeeze(2) + 1) / 2


def to_levels(x: Tensor, bits: int | None) -> Tensor:
    """Rounds x in [0, 1] to the nearest of the 2^bits gray levels; None leaves it."""
    return x if bits is None else torch.round(x * (2 ** bits - 1)) / (2 ** bits - 1)


def pixel_likelihood(pixels: Pixels, channels: int, num_mixture: int, official: bool = False):
    """The likelihood that suits the pixels: Bernoulli, a mixture of logistics, or for one of 1 a normal."""
    if pixels.likelihood == 'bernoulli':
        return Bernoulli(channels)
    if num_mixture == 1:
        return DiscretizedNormal(channels, pixels.bits, official)
    return DiscretizedLogisticMixture(channels, pixels.bits, num_mixture, official)


# ------------------------------------------------------------------------------------------------------ noise

class RowNoise(TorchFunctionMode):
    """Inside `with RowNoise(seeds)`, each row of what `torch.randn_like` or `rand_like` draws follows from a
    seed of its own, and not from the other rows. All that is drawn has `rows` rows for each of the seeds.
    """
    FILL = {torch.randn_like: torch.Tensor.normal_, torch.rand_like: torch.Tensor.uniform_}

    def __init__(self, seeds: Sequence[int], rows: int = 1):
        super().__init__()
        self.seeds, self.rows, self.generators = seeds, rows, []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if function not in self.FILL:
            return function(*args, **(kwargs or {}))
        drawn = torch.empty_like(*args, **(kwargs or {}))
        if not self.generators:
            self.generators = [torch.Generator(drawn.device).manual_seed(seed) for seed in self.seeds]
        for rows, generator in zip(drawn.split(self.rows), self.generators, strict=True):
            self.FILL[function](rows, generator=generator)
        return drawn
