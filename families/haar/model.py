"""Multi-scale likelihood: Haar wavelets, and for each level a small network that predicts the details.

The wavelet transform makes an image half as large, LL, and three details of every 2 x 2 pixels that were
averaged. With the details of level l, D, and LL of level l, of which those of level l + 1 are made,

    p(x) = p(LL_L) prod_l p(D1_l | LL_l) p(D2_l | LL_l, D1_l) p(D3_l | LL_l, D1_l, D2_l)

The transform is orthonormal, so this is a density of the image. The coarsest LL is uniform, that is, not
modeled. B images, C channels, H x W pixels inside the border, h x w of a level, L levels, M = 2 components.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed import launch
from distributions import EIGHT_BITS, Pixels, Terms, full_precision, per_image
from families.haar.config import HaarConfig
from utils import UserError

DETAILS = 3                              # of 2 x 2 pixels: horizontal, vertical, diagonal
COMPONENTS = 2                           # logistics that the density of a detail is a mixture of
DILATIONS = (1, 2, 1, 2)                 # of the residual convolutions
MAX_LOG_SCALE = 7.0                      # of a logistic, and - 7 the least, in standard deviations of details
LEAST_WIDTH = 1e-6                       # of the interval of a detail: rounding may leave none
LEAST_STD = 1e-3                         # of the details of a level, in case the images are constant
CROPS = (36, 36, 24, 18, 9)              # pixels of LL in a training step by level; deeper ones as the last
BRIGHTENED, BRIGHTNESS = (2, 3, 4), 0.1  # levels whose crops are made brighter or darker, by up to this
BISECTIONS = 32                          # of the interval of a detail that is drawn
SMALL = 1e-3                             # added to deviations before their logarithm is taken


# --------------------------------------------------------------------------------------------------- wavelets

def decompose(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """LL and [D1, D2, D3], each (B, C, h, w), of x (B, C, 2h, 2w): the orthonormal Haar transform."""
    a, b, c, d = (x[..., row::2, column::2] for row in (0, 1) for column in (0, 1))
    return (a + b + c + d) / 2, [(a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2]


def compose(ll: Tensor, details: Sequence[Tensor]) -> Tensor:
    """The inverse of `decompose`."""
    horizontal, vertical, diagonal = details
    cells = [ll + horizontal + vertical + diagonal, ll - horizontal + vertical - diagonal,
             ll + horizontal - vertical - diagonal, ll - horizontal - vertical + diagonal]
    return F.pixel_shuffle(torch.stack(cells, dim=2).flatten(1, 2) / 2, 2)


def bounds(ll: Tensor, known: Sequence[Tensor], most: float) -> tuple[Tensor, Tensor]:
    """The interval of the next detail: smallest and largest value (B, C, h, w).

    It is what `ll` and the details `known` leave to it if the four cells a b / c d lie in [0, most]. The
    sums of columns a + c = LL + D1 and b + d = LL - D1 lie in [0, 2 most]; the differences a - c = D2 + D3
    and b - d = D2 - D3 are at most as large as these sums, or what they lack to 2 most.
    """
    if not known:
        largest = torch.minimum(ll, 2 * most - ll)
        return -largest, largest
    left, right = (torch.minimum(total, 2 * most - total) for total in (ll + known[0], ll - known[0]))
    if len(known) == 1:
        return -(left + right) / 2, (left + right) / 2
    return torch.maximum(-left - known[1], known[1] - right), torch.minimum(left - known[1], known[1] + right)


class Mixture(NamedTuple):
    """A mixture of M logistics for each detail, truncated to an interval."""
    log_weights: Tensor                                                                  # (B, C, M, h, w)
    means: Tensor
    log_scales: Tensor
    lower: Tensor                                                                        # (B, C, h, w)
    upper: Tensor

    def _log_mass(self, upper: Tensor) -> Tensor:
        """log of the integral of the mixture, as it is without truncation, from `lower` to `upper`."""
        inverse = torch.exp(-self.log_scales)
        below, above = ((end.unsqueeze(2) - self.means) * inverse for end in (upper, self.lower))
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)): exact in any tail
        inside = torch.log(-torch.expm1(-(upper - self.lower).unsqueeze(2) * inverse))
        log_mass = F.logsigmoid(below) + F.logsigmoid(-above) + inside
        return torch.logsumexp(self.log_weights + log_mass, dim=2)

    def nll(self, value: Tensor) -> Tensor:
        """-log density of values in the interval: (B, C, h, w)."""
        z = (value.unsqueeze(2) - self.means) * torch.exp(-self.log_scales)
        log_density = F.logsigmoid(z) + F.logsigmoid(-z) - self.log_scales
        return self._log_mass(self.upper) - torch.logsumexp(self.log_weights + log_density, dim=2)

    def quantile(self, u: Tensor) -> Tensor:
        """The values (B, C, h, w) up to which the shares u of the mass lie."""
        log_share = torch.log(u) + self._log_mass(self.upper)
        low, high = self.lower, self.upper
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = self._log_mass(middle) < log_share
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2

    def mean(self) -> Tensor:
        """That of the mixture without truncation: (B, C, h, w)."""
        return (self.log_weights.exp() * self.means).sum(2)

    def log_scale(self) -> Tensor:
        """Mean over the components: (B, C, h, w)."""
        return (self.log_weights.exp() * self.log_scales).sum(2)


# ----------------------------------------------------------------------------------------------------- models

class Level(nn.Module):
    """The densities of the details of one level, given LL and where in the image it lies.

    Details are divided by their standard deviation over training images.
    """

    def __init__(self, number: int, channels: int, width: int):
        """`number` l is 1 for the level next to the image: LL lies in [0, 2^l]."""
        super().__init__()
        self.scale = 2 ** number                                        # pixels along a side of a pixel of LL
        self.stem = nn.Conv2d(channels + 2, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in DILATIONS)
        self.heads = nn.ModuleList(nn.Conv2d(width + i * channels, 3 * COMPONENTS * channels, 1)
                                   for i in range(DETAILS))
        self.register_buffer('std', torch.ones(DETAILS))

    def features(self, ll: Tensor, position: Tensor) -> Tensor:
        """What the network knows of LL (B, C, h, w) at positions (B, 2, h, w): (B, F, h, w)."""
        h = self.stem(torch.cat([2 * ll / self.scale - 1, position], dim=1))
        for block in self.blocks:
            h = h + block(F.silu(h))
        return F.silu(h)

    def mixture(self, h: Tensor, ll: Tensor, known: Sequence[Tensor]) -> Mixture:
        """The density of the detail that follows those `known`, in its standard deviations."""
        number = len(known)
        scaled = [detail / std for detail, std in zip(known, self.std)]
        raw = full_precision(self.heads[number](torch.cat([h, *scaled], dim=1)))
        raw = raw.unflatten(1, (ll.shape[1], 3, COMPONENTS))                              # (B, C, 3, M, h, w)
        lower, upper = bounds(ll, known, self.scale / 2)
        upper = torch.maximum(upper, lower + LEAST_WIDTH)
        return Mixture(F.log_softmax(raw[:, :, 0], dim=2), raw[:, :, 1],
                       raw[:, :, 2].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE),
                       lower / self.std[number], upper / self.std[number])

    def forward(self, finer: Tensor, position: Tensor) -> list[tuple[Tensor, Mixture]]:
        """For each detail of `finer` (B, C, 2h, 2w) its value, in standard deviations, and its density."""
        ll, details = decompose(finer)
        h = self.features(ll, position)
        return [(details[i] / self.std[i], self.mixture(h, ll, details[:i])) for i in range(DETAILS)]

    def nll(self, finer: Tensor, position: Tensor) -> Tensor:
        """-log density of the details of `finer` (B, C, 2h, 2w), nats: (B, 3, C, h, w)."""
        return torch.stack([mixture.nll(value) + torch.log(std) for (value, mixture), std
                            in zip(self(finer, position), self.std)], dim=1)

    def statistics(self, finer: Tensor, position: Tensor) -> Tensor:
        """Four means over the details of an image (B, C, 2h, 2w): (B, 4).

        -log density, log scale, log of the deviation from the mean in scales, and in standard deviations.
        """
        rows = []
        for value, mixture in self(finer, position):
            deviation, log_scale = (value - mixture.mean()).abs(), mixture.log_scale()
            rows.append([mixture.nll(value), log_scale, torch.log(deviation / log_scale.exp() + SMALL),
                         torch.log(deviation + SMALL)])
        return torch.stack([per_image(torch.stack(each, dim=1)) / (DETAILS * each[0][0].numel())
                            for each in zip(*rows)], dim=1)

    def draw(self, ll: Tensor, position: Tensor, temperature: float) -> Tensor:
        """An image (B, C, 2h, 2w) whose LL is this; the lower the temperature, the nearer the medians."""
        h, details = self.features(ll, position), []
        for i in range(DETAILS):
            u = 0.5 + temperature * (torch.rand_like(ll) - 0.5)
            details.append(self.std[i] * self.mixture(h, ll, details).quantile(u))
        return compose(ll, details)


class Haar(nn.Module):
    """The contract's likelihood family without latents.

    Gray levels k become (k + u) / 2^bits, u uniform: the density, times the volume of a level, bounds their
    probability from below, in the mean over u (Theis et al. 2016). Rows and columns beyond the largest
    multiple of 2^L are uniform, and so is the coarsest LL; the border of a data set counts nowhere.
    """

    Config: type[HaarConfig] = HaarConfig
    primary_score = HaarConfig.primary_score
    num_groups = 0
    temperatures, num_shown = (1.0,), 16

    def __init__(self, shape: tuple[int, ...], config: HaarConfig, pixels: Pixels = EIGHT_BITS):
        """`shape` (C, H, W) of an image, its border of `pixels.padding` included.

        Raises UserError for a size that cannot be halved as often as `config` says.
        """
        super().__init__()
        self.shape, self.config, self.pixels = tuple(shape), config, pixels
        self.inner = tuple(side - 2 * pixels.padding for side in shape[1:])
        self.gray_levels = 2 ** (1 if pixels.likelihood == 'bernoulli' else pixels.bits)
        coarsest = 2 ** config.levels
        if min(self.inner) < coarsest:
            raise UserError(f"images of {' x '.join(map(str, self.inner))} cannot be halved {config.levels} "
                            f"times: sides must be at least {coarsest}. Raise --image_size or lower "
                            f"--levels.")
        self.sides = tuple(side // coarsest * coarsest for side in self.inner)         # what is decomposed
        self.start = tuple((side - own) // 2 for side, own in zip(self.inner, self.sides))
        self.levels = nn.ModuleList(Level(number, shape[0], config.width)
                                    for number in range(1, config.levels + 1))
        # nats of a pixel: the volume of its gray level, and its share of the uniform coarsest LL
        self.pixel_nats = shape[0] * math.log(self.gray_levels)
        self.coarse_nats = shape[0] * math.log(coarsest) / coarsest ** 2

    # ---------------------------------------------------------------------------------------- parts of images

    def _dequantize(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """Images (B, C, *S) of gray levels, without their border, as numbers in [0, 1): (B, C, H, W)."""
        x = self.pixels.inside(x)
        noise = 0.5 + temperature * (torch.rand_like(x) - 0.5) if temperature else 0.5
        return (torch.round(x * (self.gray_levels - 1)) + noise) / self.gray_levels

    def _position(self, start: Tensor, level: Level, h: int, w: int) -> Tensor:
        """Coordinates in [-1, 1] of h x w pixels of LL, the first at pixel `start` (B, 2): (B, 2, h, w)."""
        axes = [2 * (start[:, axis, None] + (torch.arange(n, device=start.device) + 0.5) * level.scale)
                / self.inner[axis] - 1 for axis, n in enumerate((h, w))]
        return torch.stack([axes[0][:, :, None].expand(-1, h, w), axes[1][:, None].expand(-1, h, w)], dim=1)

    def _whole(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The arguments of each level for the whole of x (B, C, H, W): what it decomposes, and where."""
        (top, left), (height, width) = self.start, self.sides
        finer, parts = x[..., top:top + height, left:left + width], []
        start = x.new_tensor(self.start).expand(len(x), 2)
        for level in self.levels:
            ll, _ = decompose(finer)
            parts.append((finer, self._position(start, level, *ll.shape[2:])))
            finer = ll
        return parts

    def _crops(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The same for a random part of each image and level, which may begin at any pixel."""
        parts, width = [], self.inner[1]
        noise = torch.rand_like(x.new_zeros(len(x), len(self.levels), 3))
        for number, (level, u) in enumerate(zip(self.levels, noise.unbind(1)), 1):
            crop = CROPS[min(number, len(CROPS)) - 1]
            sides = [min(crop, side // level.scale) * level.scale for side in self.inner]
            start = torch.stack([(u[:, axis] * (self.inner[axis] - side + 1)).floor()
                                 for axis, side in enumerate(sides)], dim=1)                         # (B, 2)
            i, j = (start[:, axis, None].long() + torch.arange(side, device=x.device)
                    for axis, side in enumerate(sides))                                    # (B, side)
            pixels = (width * i[:, None, :, None] + j[:, None, None]).expand(-1, x.shape[1], -1, -1)
            part = x.flatten(2).gather(2, pixels.flatten(2)).unflatten(2, sides)           # (B, C, *sides)
            if number in BRIGHTENED:                                   # no brighter than white
                factor = 1 + BRIGHTNESS * (2 * u[:, 2, None, None, None] - 1)
                part = part * torch.minimum(factor, 1 / part.amax((1, 2, 3), keepdim=True))
            half = level.scale // 2
            finer = half * F.avg_pool2d(part, half)
            parts.append((finer, self._position(start, level, *(side // level.scale for side in sides))))
        return parts

    # ----------------------------------------------------------------------------------------------- contract

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0,
                prior_temperature: float = 1.0) -> Terms:
        """Terms of images x (B, C, *S) in [0, 1], nats.

        recon (B,) = -log p(x); kl (B, 0) and log_q, log_p (B,) of no latents; level_nats (B, L), means over
        the details of a level. In training, levels see a random part of each image, and recon is an estimate
        from these. `temperature` scales the dequantization noise; there is no latent group to `skip`, and no
        prior whose noise `prior_temperature` could scale.
        """
        if skip:
            raise UserError(f"skip {skip}: this model has no latent groups to skip.")
        values = self._dequantize(x, temperature)
        parts = self._crops(values) if self.training else self._whole(values)
        nats = torch.stack([per_image(nll) / nll[0].numel() for nll in
                            (level.nll(*part) for level, part in zip(self.levels, parts))], dim=1)
        pixels, inside = math.prod(self.inner), math.prod(self.sides)
        counts = [DETAILS * self.shape[0] * inside / level.scale ** 2 for level in self.levels]
        recon = (nats * nats.new_tensor(counts)).sum(1) + pixels * self.pixel_nats + inside * self.coarse_nats
        none = torch.zeros_like(recon)
        return {'recon': recon, 'kl': nats[:, :0], 'log_q': none, 'log_p': none, 'level_nats': nats}

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the levels of the nats of a detail, to minimize (scalar); there is no schedule.

        In training, 'train/nelbo_iter' is estimated from the crops.
        """
        nats = terms['level_nats'].mean(0)
        logs = {'train/nelbo_iter': terms['recon'].mean()}
        logs |= {f'train/level_{number}_iter': value for number, value in enumerate(nats, 1)}
        return nats.mean(), {name: value.detach() for name, value in logs.items()}

    # ------------------------------------------------------------------------------------------- capabilities

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets the standard deviations of the details to those of training images x, of all processes."""
        for level, (finer, _) in zip(self.levels, self._whole(self._dequantize(x))):
            squares = torch.stack([detail.square().mean() for detail in decompose(finer)[1]])
            level.std.copy_(launch.mean_over_ranks(squares).sqrt().clamp(min=LEAST_STD))

    def statistics(self, x: Tensor) -> Tensor:
        """Four statistics of each level from the finest up (see Level.statistics): (B, 4 L)."""
        parts = self._whole(self._dequantize(x))
        return torch.cat([level.statistics(*part) for level, part in zip(self.levels, parts)], dim=1)

    def maps(self, x: Tensor, skip: int = 0) -> dict[str, Tensor]:
        """-log p(x) by place, nats a pixel: recon (B, 1, *S), kl (B, 0, *S), with noise of 1/2.

        The nats of a detail are spread evenly over the pixels that it is of. Sums to the terms.
        """
        if skip:
            raise UserError(f"skip {skip}: this model has no latent groups to skip.")
        where = torch.zeros_like(x[:, :1, :1, :1]) + self.coarse_nats * 4 ** len(self.levels)
        parts = self._whole(self._dequantize(x, 0.0))
        for level, part in zip(reversed(self.levels), reversed(parts)):
            where = where + level.nll(*part).sum((1, 2)).unsqueeze(1)                      # (B, 1, h, w)
            where = F.interpolate(where, scale_factor=2.0) / 4
        (top, left), (height, width) = self.start, self.sides
        beyond = (left, self.inner[1] - left - width, top, self.inner[0] - top - height)
        recon = self.pixels.framed(F.pad(where, beyond) + self.pixel_nats)
        return {'recon': recon, 'kl': recon[:, :0]}

    def sample(self, n: int, temperature: float = 1.0, mean: bool = False) -> Tensor:
        """n images (n, C, *S) in [0, 1]. The coarsest LL is drawn from what it is modeled by, a uniform.

        The noise of all draws is drawn towards the median by `temperature`; with `mean` details are medians.
        """
        x = next(self.parameters()).new_zeros(n, self.shape[0], *self.inner)
        x = 0.5 + temperature * (torch.rand_like(x) - 0.5)
        (top, left), (height, width) = self.start, self.sides
        inside = x[..., top:top + height, left:left + width]
        coarsest = 2 ** len(self.levels)
        ll = coarsest * inside[..., ::coarsest, ::coarsest]
        start = x.new_tensor(self.start).expand(n, 2)
        for level in reversed(self.levels):
            ll = level.draw(ll, self._position(start, level, *ll.shape[2:]), 0.0 if mean else temperature)
        inside.copy_(ll)
        gray = torch.floor(x * self.gray_levels).clamp(0, self.gray_levels - 1)
        return self.pixels.framed(gray / (self.gray_levels - 1)).float()
