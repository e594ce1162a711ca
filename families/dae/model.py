"""DAE: a U-Net that removes coarse noise from normal images, and with it lesions (Kascenas et al. 2022).

B images x (B, C, *S), S two or three spatial axes; y the output of the network. It is linear: y may leave
[0, 1]. An image is judged by x - y, y without any noise. The network is smaller than the published one, and
two levels of noise replace one.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributions import EIGHT_BITS, Pixels, Terms, full_precision
from families.dae.config import GROUPS, DAEConfig
from neural_operations import CONV, coarse_noise
from utils import UserError

POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}           # by the axes of S


def space_to_depth(x: Tensor) -> Tensor:
    """The 2^n neighbors of every second pixel as channels: (B, C, *S) to (B, 2^n C, *S/2), n axes in S."""
    axes = range(2, x.ndim)
    split = [size for side in x.shape[2:] for size in (side // 2, 2)]
    phases, places = [2 * a - 1 for a in axes], [2 * a - 2 for a in axes]
    return x.reshape(*x.shape[:2], *split).permute(0, 1, *phases, *places).flatten(1, x.ndim - 1)


def depth_to_space(x: Tensor) -> Tensor:
    """The inverse of `space_to_depth`: (B, 2^n C, *S/2) to (B, C, *S)."""
    n = x.ndim - 2
    interleaved = [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
    return x.unflatten(1, (-1, *[2] * n)).permute(0, 1, *interleaved).reshape(
        len(x), -1, *[2 * side for side in x.shape[2:]])


def block(conv: type[nn.Module], c_in: int, c_out: int) -> nn.Sequential:
    """Two convolutions at one resolution: (B, C, *s) to (B, C', *s)."""
    layers = [[conv(c, c_out, 3, padding=1), nn.GroupNorm(GROUPS, c_out), nn.SiLU()] for c in (c_in, c_out)]
    return nn.Sequential(*layers[0], *layers[1])


class DAE(nn.Module):
    """The contract's model without a likelihood: it reconstructs, of images or volumes of any size.

    The border that a data set puts around its images is seen by the network and counts nowhere.
    """

    Config = DAEConfig
    primary_score = DAEConfig.primary_score

    def __init__(self, shape: tuple[int, ...], config: DAEConfig, pixels: Pixels = EIGHT_BITS):
        """`shape` (C, H, W) of an image, its border of `pixels.padding` included, or (C, D, H, W)."""
        super().__init__()
        self.shape, self.config, self.pixels = tuple(shape), config, pixels
        self.axes = len(shape) - 1
        if self.axes not in CONV:
            raise UserError(f"this family reads images (C, H, W) or (C, D, H, W), not shape {self.shape}.")
        conv, widths, phases = CONV[self.axes], config.widths, shape[0] * 2 ** self.axes
        self.down = nn.ModuleList(block(conv, *pair) for pair in pairwise((phases, *widths)))
        self.up = nn.ModuleList(block(conv, coarse + fine, fine) for coarse, fine in pairwise(widths[::-1]))
        self.out = conv(widths[0], phases, 3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)                  # training starts from uniform gray

    def _denoise(self, x: Tensor) -> Tensor:
        """y (B, C, *S) of images x, whose edges are repeated up to a size that can be halved."""
        if tuple(x.shape[1:]) != self.shape:
            raise UserError(f"images of shape {tuple(x.shape[1:])}: this model is for {self.shape}.")
        factor = 2 ** len(self.config.widths)
        missing = [amount for side in self.shape[:0:-1] for amount in (0, -side % factor)]
        h, skips = space_to_depth(F.pad(x, missing, mode='replicate') - 0.5), []
        for level, down in enumerate(self.down):
            h = down(POOL[self.axes](h, 2) if level else h)
            skips.append(h)
        for up, skip in zip(self.up, skips[-2::-1]):
            h = up(torch.cat([F.interpolate(h, scale_factor=2), skip], 1))
        y = full_precision(depth_to_space(self.out(h))) + 0.5
        return y[(..., *map(slice, self.shape[1:]))]

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0) -> Terms:
        """Terms of images x (B, C, *S) in [0, 1]: error (B,), the loss; logits (B, C, *S), which are y.

        `temperature` scales the noise of the input, 0 is none. There is no latent group to `skip`.
        """
        if skip:
            raise UserError(f"skip {skip}: a denoising autoencoder has no latent groups to skip.")
        noisy = x if temperature == 0 else x + coarse_noise(x, temperature * self.config.coarse_noise,
                                                            self.config.noise_grids)
        y = self._denoise(noisy)
        return {'error': self.pixels.inside(x - y).abs().flatten(1).mean(1), 'logits': y}

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to minimize (scalar): the mean over the images; there is no schedule."""
        return terms['error'].mean(), {}

    # ------------------------------------------------------------------------------------------- capabilities

    def reconstruct(self, x: Tensor, skip: int = 0) -> Tensor:
        """y of images without noise, as images: (B, C, *S) in [0, 1], the border black."""
        y = self(x, skip=skip, temperature=0.0)['logits']
        return self.pixels.framed(self.pixels.inside(y).clamp(0, 1))

    def residual(self, x: Tensor) -> Tensor:
        """x - y, y as it is and not as an image, 0 on the border: (B, C, *S)."""
        return self.pixels.framed(self.pixels.inside(x - self(x, temperature=0.0)['logits']))
