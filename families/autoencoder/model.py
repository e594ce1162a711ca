"""AE and VAE: two small convolutional networks that reconstruct images, or volumes, through few numbers.

The published tutorial of anomaly detection on MedNIST, hands against the rest; the VAE is that of Kingma and
Welling 2014. B images x (B, C, *S), S two or three spatial axes, D numbers in an image without its border, Z
latents z, y the output of the decoder. It is linear: y may leave [0, 1]. An AE is judged by |x - y|, a VAE by
its KL.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributions import EIGHT_BITS, Normal, Pixels, Terms, full_precision
from families.autoencoder.config import AEConfig, VAEConfig
from neural_operations import Conv3d, ConvTranspose3d, check_latents, coarse_noise, repeated
from utils import UserError

# ------------------------------------------------------------------------------------------------------- loss

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5            # pixels
CONVOLVE = {2: F.conv2d, 3: F.conv3d}
SSIM_C1, SSIM_C2 = 0.01 ** 2, 0.03 ** 2      # of images in [0, 1]


def dissimilarity(x: Tensor, y: Tensor) -> Tensor:
    """1 - SSIM (Wang et al. 2004, eq. 13) at each place of its window inside the images.

    (B, C, *S) and the same to (B, C, *S) with each side 10 shorter.
    """
    distance = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    bell = torch.softmax(-distance ** 2 / (2 * SSIM_SIGMA ** 2), dim=0)
    channels, axes = x.shape[1], range(2, x.ndim)

    def local(t: Tensor) -> Tensor:
        """Means in the window, which is a product of one bell an axis."""
        for axis in axes:
            shape = [SSIM_WINDOW if a == axis else 1 for a in axes]
            t = CONVOLVE[len(axes)](t, bell.reshape(shape).expand(channels, 1, *shape), groups=channels)
        return t

    with torch.autocast(x.device.type, enabled=False):       # differences of means of squares need all digits
        mean_x, mean_y = local(x), local(y)
        var_x, var_y = local(x * x) - mean_x ** 2, local(y * y) - mean_y ** 2
        covariance = local(x * y) - mean_x * mean_y
    return 1 - ((2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
                / ((mean_x ** 2 + mean_y ** 2 + SSIM_C1) * (var_x + var_y + SSIM_C2)))


# name -> (x, y) to (B, C, *s), whose mean is the loss of an image
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'l2': lambda x, y: (x - y) ** 2,
    'l1': lambda x, y: (x - y).abs(),
    'ssim': dissimilarity,
}
# Loss of a VAE -> log of the integral of exp(-loss / scale) over one number: a normal, a Laplace.
LOG_NORMALIZERS = {'l2': lambda scale: 0.5 * math.log(math.pi * scale),
                   'l1': lambda scale: math.log(2 * scale)}


# ----------------------------------------------------------------------------------------------------- models

class Layers(NamedTuple):
    """What blocks are made of."""
    conv: type[nn.Module]
    transposed: type[nn.Module]
    norm: type[nn.Module]


LAYERS = {2: Layers(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),                       # by the axes of S
          3: Layers(Conv3d, ConvTranspose3d, nn.BatchNorm3d)}


def halve(layers: Layers, c_in: int, c_out: int) -> nn.Sequential:
    """A block of the encoder: (B, C, *S) to (B, C', *S/2)."""
    return nn.Sequential(layers.conv(c_in, c_out, 3, stride=2, padding=1, bias=False), layers.norm(c_out),
                         nn.LeakyReLU())


def double(layers: Layers, c_in: int, c_out: int) -> nn.Sequential:
    """A block of the decoder: (B, C, *S) to (B, C', *2S)."""
    return nn.Sequential(
        layers.transposed(c_in, c_out, 3, stride=2, padding=1, output_padding=1, bias=False),
        layers.norm(c_out), nn.LeakyReLU())


class AE(nn.Module):
    """The contract's model without a likelihood: it reconstructs.

    The border that a data set puts around its images is seen by the network and counts nowhere. Binary images
    are regressed on like gray ones.
    """

    Config: type[AEConfig] = AEConfig
    primary_score = AEConfig.primary_score
    code_parts = 1                       # vectors of Z numbers that the encoder gives

    def __init__(self, shape: tuple[int, ...], config: AEConfig, pixels: Pixels = EIGHT_BITS):
        """`shape` (C, H, W) of an image, its border of `pixels.padding` included, or (C, D, H, W).

        Raises UserError for a size that cannot be halved as often as `config` says.
        """
        super().__init__()
        self.shape, self.config, self.pixels = tuple(shape), config, pixels
        if len(shape) - 1 not in LAYERS:
            raise UserError(f"this family reads images (C, H, W) or (C, D, H, W), not shape {self.shape}.")
        layers, sides = LAYERS[len(shape) - 1], ' x '.join(map(str, shape[1:]))
        number, factor = config.num_layers, 2 ** config.num_layers
        if any(side % factor for side in shape[1:]):
            raise UserError(f"images of {sides} cannot be halved {number} times: sides must be multiples of "
                            f"{factor}. Resize with --image_size, or lower --num_layers.")
        self.inner = (shape[0], *(side - 2 * pixels.padding for side in shape[1:]))      # without the border
        if config.loss == 'ssim' and min(self.inner[1:]) < SSIM_WINDOW:
            raise UserError(f"--loss ssim looks at {SSIM_WINDOW} pixels along each axis, the images have "
                            f"{' x '.join(map(str, self.inner[1:]))}: raise --image_size or take l2.")
        channels = [config.width * 2 ** i for i in range(number)]
        smallest = (channels[-1], *(side // factor for side in shape[1:]))
        self.latent_shapes = [(config.latent_dim, 1, 1)]
        self.encoder = nn.Sequential(
            *map(partial(halve, layers), [shape[0], *channels[:-1]], channels), nn.Flatten(),
            nn.Linear(math.prod(smallest), self.code_parts * config.latent_dim, bias=False))
        self.decoder = nn.Sequential(
            nn.Linear(config.latent_dim, math.prod(smallest), bias=False), nn.Unflatten(1, smallest),
            *map(partial(double, layers), channels[::-1], [*channels[-2::-1], channels[0]]),
            layers.conv(channels[0], shape[0], 1, bias=False))

    def _encode(self, x: Tensor) -> Tensor:
        """What the encoder gives of images x: (B, Z), or (B, 2 Z) of a VAE. In training they are noisy."""
        if tuple(x.shape[1:]) != self.shape:
            raise UserError(f"images of shape {tuple(x.shape[1:])}: this model is for {self.shape}.")
        if self.training and self.config.input_noise:
            x = x + self.config.input_noise * torch.randn_like(x)
        if self.training and self.config.coarse_noise:
            x = x + coarse_noise(x, self.config.coarse_noise)
        return full_precision(self.encoder(x))

    def _decode(self, z: Tensor) -> Tensor:
        """y (B, C, *S) of latents z (B, Z)."""
        return full_precision(self.decoder(z))

    def _errors(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of each number of an image: (B, C, *s)."""
        return LOSSES[self.config.loss](self.pixels.inside(x), self.pixels.inside(y))

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0) -> Terms:
        """Terms of images x (B, C, *S) in [0, 1]: error (B,), the loss; logits (B, C, *S), which are y.

        Nothing is drawn, so `temperature` changes nothing, and there is no latent group to `skip`.
        """
        if skip:
            raise UserError(f"skip {skip}: an autoencoder has no latent groups to skip.")
        y = self._decode(self._encode(x))
        return {'error': self._errors(x, y).flatten(1).mean(1), 'logits': y}

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to minimize (scalar): the mean over the images; there is no schedule."""
        return terms['error'].mean(), {}

    # ------------------------------------------------------------------------------------------- capabilities

    def _image(self, y: Tensor) -> Tensor:
        """y as an image: (B, C, *S) in [0, 1], its border black."""
        return self.pixels.framed(self.pixels.inside(y).clamp(0, 1))

    def reconstruct(self, x: Tensor, skip: int = 0) -> Tensor:
        """y as an image, of a VAE at the posterior means: (B, C, *S) in [0, 1]."""
        return self._image(self(x, skip=skip, temperature=0.0)['logits'])

    def residual(self, x: Tensor) -> Tensor:
        """x - y, y as it is and not as an image, 0 on the border: (B, C, *S)."""
        return self.pixels.framed(self.pixels.inside(x - self(x, temperature=0.0)['logits']))

    def latents(self, x: Tensor, temperature: float = 0.0) -> list[Tensor]:
        """The one group of latents of images x (B, C, *S) in [0, 1]: [(B, Z, 1, 1)]."""
        return [self._encode(x)[..., None, None]]

    def decode(self, latents: Sequence[Tensor], temperature: float = 0.0) -> Tensor:
        """Images of latents [(B, Z, 1, 1)]: (B, C, *S) in [0, 1]. Raises UserError for another shape."""
        check_latents(latents, self.latent_shapes)
        return self._image(self._decode(latents[0].flatten(1)))


class VAE(AE):
    """The contract's likelihood family with one latent group and a standard normal prior.

    With the mean error of an image and its KL, the published loss is error + kl_weight KL / Z. Times
    Z / kl_weight it is, but for a constant, the negative ELBO under

        p(x|z) = prod exp(-error of a number / s) / normalizer,      s = kl_weight D / Z

    a normal of variance s / 2 about y, or with --loss l1 a Laplace of scale s. So training minimizes the
    negative ELBO of the terms. Of 1 - SSIM there is no such density: it is left to the AE. Being a density,
    recon cannot be compared with the probabilities of gray levels of other families, nor between values of
    kl_weight. At the published weight the standard deviation is 5.7, far wider than an image: images are
    therefore means y, and that noise is never drawn.
    """

    Config: type[AEConfig] = VAEConfig
    primary_score = VAEConfig.primary_score
    code_parts = 2                       # means and log variances
    num_groups = 1
    takes_draws = True

    def __init__(self, shape: tuple[int, ...], config: VAEConfig, pixels: Pixels = EIGHT_BITS):
        super().__init__(shape, config, pixels)
        self.scale = config.kl_weight * math.prod(self.inner) / config.latent_dim
        self.log_normalizer = LOG_NORMALIZERS[config.loss](self.scale)

    def _posterior(self, x: Tensor) -> tuple[Normal, Tensor]:
        """q(z|x), and its KL from the prior, nats: (B, Z)."""
        mean, log_var = self._encode(x).chunk(2, dim=1)
        kl = 0.5 * (mean ** 2 + (torch.expm1(log_var) - log_var))    # Kingma and Welling 2014, appendix B
        return Normal(mean, torch.exp(0.5 * log_var)), kl

    def _prior(self, n: int) -> Normal:
        mean = next(self.parameters()).new_zeros(n, self.config.latent_dim)
        return Normal(mean, torch.ones_like(mean))

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0,
                prior_temperature: float = 1.0, draws: int = 1) -> Terms:
        """Terms of the bound for images x (B, C, *S) in [0, 1], in nats.

        recon (B,) = -log p(x|z); kl (B, 1), analytic; log_q, log_p (B,) of the drawn latents; kl_channels
        (B, 1, Z), the KL of each latent; logits (B, C, *S), which are y; error (B,), the mean error.
        `skip=1` draws the latents from the prior; `temperature` scales the noise, 0 is none, and
        `prior_temperature` that of the prior once more. Of several `draws` the terms are (draws B, ...), draw
        by draw, and the encoder is passed once.
        """
        if skip not in (0, 1):
            raise UserError(f"skip {skip}: give 0 or 1, this model has one latent group.")
        posterior, kl = self._posterior(x)
        posterior = Normal(repeated(posterior.mean, draws), repeated(posterior.std, draws))
        x, kl = repeated(x, draws), repeated(kl, draws)
        prior = self._prior(len(x))
        drawn_from, scale = (prior, temperature * prior_temperature) if skip else (posterior, temperature)
        z = drawn_from.sample(scale)                                                     # (B, Z)
        log_q, log_p = posterior.log_prob(z).sum(1), prior.log_prob(z).sum(1)            # (B,)
        if skip:
            kl, log_q, log_p = map(torch.zeros_like, (kl, log_q, log_p))
        kl, y = kl.unsqueeze(1), self._decode(z)
        error = self._errors(x, y).flatten(1).mean(1)
        recon = math.prod(self.inner) * (error / self.scale + self.log_normalizer)
        return {'recon': recon, 'kl': kl.sum(2), 'kl_channels': kl, 'log_q': log_q, 'log_p': log_p,
                'logits': y, 'error': error}

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The published loss to minimize (scalar), and with it the bound in nats; there is no schedule."""
        error, kl = terms['error'].mean(), terms['kl'].sum(1).mean()
        loss = error + self.config.kl_weight * kl / self.config.latent_dim
        recon = terms['recon'].mean()
        logs = {'train/nelbo_iter': recon + kl, 'train/recon_iter': recon, 'train/kl_iter': kl,
                'train/error_iter': error, 'train/kl_per_latent_iter': kl / self.config.latent_dim}
        return loss, {name: value.detach() for name, value in logs.items()}

    # ------------------------------------------------------------------------------------------- capabilities

    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """What validations log besides the bound: the published loss and its parts, of each image (B,)."""
        terms = self(x)
        error, kl = terms['error'], terms['kl'].sum(1) / self.config.latent_dim
        return {'loss': error + self.config.kl_weight * kl, 'error': error, 'kl_per_latent': kl}

    def maps(self, x: Tensor, skip: int = 0) -> dict[str, Tensor]:
        """Where the bound is lost, nats a pixel at the posterior means: recon (B, 1, *S), kl (B, 1, *S).

        The latents belong to no place: their KL is spread evenly. Maps sum to the terms, and are 0 on the
        border.
        """
        terms = self(x, skip=skip, temperature=0.0)
        recon = (self._errors(x, terms['logits']) / self.scale + self.log_normalizer).sum(1, keepdim=True)
        kl = terms['kl'].reshape(-1, 1, *[1] * (recon.ndim - 2)) / math.prod(self.inner[1:])
        return {'recon': self.pixels.framed(recon), 'kl': self.pixels.framed(kl.expand_as(recon))}

    def latents(self, x: Tensor, temperature: float = 0.0) -> list[Tensor]:
        """The one group of latents of images x (B, C, *S) in [0, 1]: [(B, Z, 1, 1)].

        `temperature` scales the noise of the posterior; 0 takes its means.
        """
        return [self._posterior(x)[0].sample(temperature)[..., None, None]]

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The weights that the posterior depends on, and p(x, z) does not."""
        return list(self.encoder.parameters())

    def sample(self, n: int, temperature: float = 1.0, mean: bool = False) -> Tensor:
        """n images (n, C, *S) in [0, 1] of latents from the prior, its noise scaled by `temperature`.

        They are means of p(x|z) with or without `mean`.
        """
        return self._image(self._decode(self._prior(n).sample(temperature)))
