"""NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat and Kautz 2020).

B images, C channels, H x W pixels; L latent groups, i = 0 at the top (coarsest, drawn first), Z channels
each; s features of the encoder, d state of the decoder, z latents; p prior and q posterior of a group. Scales
count from the image: scale 0 is the finest latent resolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed import launch
from distributions import (
    EIGHT_BITS,
    Normal,
    Pixels,
    Terms,
    full_precision,
    likelihood_statistics,
    per_image,
    pixel_likelihood,
)
from families.nvae.config import ARCHITECTURES, NVAEConfig
from families.nvae.flows import FlowCell
from families.nvae.layers import Cell, WeightNormConv2d, initialize_from_data
from families.nvae.regularizers import SpectralRegularizer, batch_norm_regularizer
from neural_operations import check_latents, coarse_noise, repeated
from utils import UserError

ACTIVE_KL = 0.1        # nats per image; a latent channel with less is counted as unused


def groups_per_scale(config: NVAEConfig) -> list[int]:
    """Latent groups at each scale, finest first."""
    groups = [config.num_groups_per_scale]
    for _ in range(config.num_latent_scales - 1):
        halved = max(config.min_groups_per_scale, groups[-1] // 2)
        groups.append(halved if config.ada_groups else groups[-1])
    return groups


def kl_weight(progress: float, config: NVAEConfig) -> float:
    """Warm-up of the KL term: constant, then linear, then 1."""
    if config.kl_anneal_portion == 0:
        return 1.0
    risen = (progress - config.kl_const_portion) / config.kl_anneal_portion
    return max(min(risen, 1.0), config.kl_const_coeff)


def balance_coefficients(config: NVAEConfig) -> Tensor:
    """alpha (L,) of "balancing the KL terms": a scale's number of variables, shared by its groups."""
    groups = groups_per_scale(config)[::-1]                                # coarsest first
    alpha = torch.cat([torch.full((n,), 4.0 ** i / n) for i, n in enumerate(groups)])
    return alpha / alpha.min()


def balanced_kl(kl: Tensor, alpha: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The KL term of the objective (B,), and the factor of each group (L,), from kl (B, L).

    While the weight is below 1, a group with little information per variable is charged less, so that it is
    not switched off; then all count alike. The mean KL is that of the batches of all processes.
    """
    if weight >= 1:
        return kl.sum(1), torch.ones_like(alpha)
    gamma = (launch.mean_over_ranks(kl.detach().abs().mean(0)) + 0.01) / alpha
    gamma = gamma / gamma.mean()
    return weight * (kl * gamma).sum(1), gamma


class Group(nn.Module):
    """One latent group: its encoder cells, posterior, prior, flows, and its decoder cells."""

    def __init__(self, config: NVAEConfig, scale: int, factor: int, top: bool, towers: bool):
        """`factor` times the first width is the width at this scale; a plain VAE has no `towers`."""
        super().__init__()
        self.scale = scale
        arch, n_latent = ARCHITECTURES[config.arch_instance], config.num_latent_per_group
        c_enc, c_dec = factor * config.num_channels_enc, factor * config.num_channels_dec
        cells = lambda n, channels, ops: nn.Sequential(*[Cell(channels, 'normal', ops, config.use_se)
                                                         for _ in range(n)])
        self.encode = cells(config.num_cell_per_cond_enc if towers else 0, c_enc, arch.enc)
        self.posterior = WeightNormConv2d(c_enc, 2 * n_latent, 3)
        self.flows = nn.Sequential(*[FlowCell(n_latent) for _ in range(config.num_nf)])
        if not top:
            self.decode = cells(config.num_cell_per_cond_dec, c_dec, arch.dec)
            self.prior = nn.Sequential(nn.ELU(), WeightNormConv2d(c_dec, 2 * n_latent))
            self.into_encoder = WeightNormConv2d(c_dec, c_enc)
        self.into_decoder = WeightNormConv2d(n_latent + (c_dec if towers else 0), c_dec)


class NVAE(nn.Module):
    """The contract's model; terms are those of a likelihood family."""

    Config = NVAEConfig
    takes_draws = True

    def __init__(self, shape: tuple[int, ...], config: NVAEConfig, pixels: Pixels = EIGHT_BITS):
        """`shape` (C, H, W) of an image. Raises UserError for a size that the scales cannot halve."""
        super().__init__()
        self.shape, self.config, self.pixels = tuple(shape), config, pixels
        self._check()
        arch, counts = ARCHITECTURES[config.arch_instance], groups_per_scale(config)
        scales, first = len(counts), 2 ** config.num_preprocess_blocks      # width factor at scale 0
        self.is_vanilla = counts == [1]                                     # a VAE without hierarchy
        self.num_groups = sum(counts)
        self.likelihood = pixel_likelihood(pixels, shape[0], config.num_mixture_dec, config.compat_official)

        self.stem = WeightNormConv2d(shape[0], config.num_channels_enc, 3)
        self.pre_process = self._blocks(config.num_channels_enc, config.num_preprocess_blocks,
                                        config.num_preprocess_cells, 'down', arch.pre)
        scale_of_group = [scale for scale in reversed(range(scales)) for _ in range(counts[scale])]
        self.groups = nn.ModuleList(
            Group(config, scale, first * 2 ** scale, top=i == 0, towers=not self.is_vanilla)
            for i, scale in enumerate(scale_of_group))
        # down[s] leads from scale s to s + 1, up[s] back
        self.down = nn.ModuleList(
            Cell(first * 2 ** s * config.num_channels_enc, 'down', arch.enc, config.use_se)
            for s in range(scales - 1))
        self.up = nn.ModuleList(
            Cell(first * 2 ** (s + 1) * config.num_channels_dec, 'up', arch.dec, config.use_se)
            for s in range(scales - 1))
        top = first * 2 ** (scales - 1)
        c_top = top * config.num_channels_enc
        self.top_features = nn.Sequential(nn.ELU(), WeightNormConv2d(c_top, c_top), nn.ELU())
        self.latent_shape = (config.num_latent_per_group, shape[1] // top, shape[2] // top)      # of group 0
        if not self.is_vanilla:
            self.initial_state = nn.Parameter(
                torch.rand(top * config.num_channels_dec, *self.latent_shape[1:]))
        self.post_process = self._blocks(first * config.num_channels_dec, config.num_postprocess_blocks,
                                         config.num_postprocess_cells, 'up', arch.post)
        self.image_head = nn.Sequential(nn.ELU(), WeightNormConv2d(config.num_channels_dec,
                                                                   self.likelihood.num_params, 3))

        self.register_buffer('alpha', balance_coefficients(config), persistent=False)
        self.register_buffer('data_initialized', torch.tensor(False))
        self.spectral = SpectralRegularizer([m for m in self.modules() if isinstance(m, nn.Conv2d)]) \
            if config.weight_decay_norm > 0 else None

    def _check(self) -> None:
        config, (_, *size) = self.config, self.shape
        halvings = config.num_preprocess_blocks + config.num_latent_scales - 1
        if len(size) != 2:
            raise UserError(f"nvae reads images (C, H, W), not shape {self.shape}.")
        if config.num_postprocess_blocks != config.num_preprocess_blocks:
            raise UserError(f"--num_preprocess_blocks {config.num_preprocess_blocks} and "
                            f"--num_postprocess_blocks {config.num_postprocess_blocks}: they must agree, or "
                            f"the output is not of the size of the image. Set both alike.")
        if any(side % 2 ** halvings for side in size):
            raise UserError(f"size {' x '.join(map(str, size))} cannot be halved {halvings} times "
                            f"({config.num_preprocess_blocks} blocks and {config.num_latent_scales} scales): "
                            f"it must be a multiple of {2 ** halvings}. Change --image_size or lower "
                            f"--num_latent_scales.")

    def _blocks(self, channels: int, blocks: int, cells: int, change: str,
                ops: tuple[str, ...]) -> nn.Sequential:
        """Blocks of cells, one of which changes the resolution: the last on the way down, the first up."""
        layers = []
        for _ in range(blocks):
            kinds = ['normal'] * (cells - 1)
            for kind in kinds + ['down'] if change == 'down' else ['up'] + kinds:
                layers.append(Cell(channels, kind, ops, self.config.use_se))
                channels = {'normal': channels, 'down': 2 * channels, 'up': channels // 2}[kind]
        return nn.Sequential(*layers)

    # ----------------------------------------------------------------------------------------- the two passes

    def _encode(self, x: Tensor) -> list[Tensor]:
        """Features for each group's posterior, top group first, from the bottom up."""
        if self.training and self.config.coarse_noise:
            x = x + coarse_noise(x, self.config.coarse_noise)
        s = self.pre_process(self.stem(2 * x - 1))                          # (B, F, H/2^P, W/2^P)
        features: list[Tensor] = [s] * self.num_groups
        for i in reversed(range(self.num_groups)):
            group = self.groups[i]
            s = features[i] = group.encode(s)
            if i > 0 and self.groups[i - 1].scale != group.scale:
                s = self.down[group.scale](s)
        features[0] = self.top_features(features[0])
        return features

    def _decode(self, batch: int, features: list[Tensor] | None, skip: int, temperature: float,
                given: Sequence[Tensor] = (),
                prior_temperature: float = 1.0) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """The last state d, and for each group from the top down its KL, log q, log p elementwise, and z.

        The first `num_groups - skip` groups are drawn from the posterior if there are features, the others
        from the prior, with noise scaled by `prior_temperature` too, but for the first ones that are `given`;
        these and the prior's have zeros.
        """
        d, groups = None if self.is_vanilla else self.initial_state.expand(batch, -1, -1, -1), []
        for i, group in enumerate(self.groups):
            if i == 0:
                zeros = self.stem.weight.new_zeros(batch, *self.latent_shape)
                p_mean, p_log_std = zeros, zeros
            else:
                d = group.decode(d)
                p_mean, p_log_std = full_precision(group.prior(d)).chunk(2, dim=1)
            p = Normal.from_raw(p_mean, p_log_std)
            if features is not None and i < self.num_groups - skip:
                s = features[0] if i == 0 else features[i] + group.into_encoder(d)
                mean, log_std = full_precision(group.posterior(s)).chunk(2, dim=1)
                # Residual normal: the posterior is an offset from the prior, added before the soft clamp.
                q = Normal.from_raw(p_mean + mean, p_log_std + log_std) if self.config.res_dist \
                    else Normal.from_raw(mean, log_std)
                z = q.sample(temperature)
                log_q = q.log_prob(z)                                       # flows keep volume: log-det 0
                z = full_precision(group.flows(z))
                log_p = p.log_prob(z)
                kl = log_q - log_p if self.config.num_nf else q.kl(p)
            else:
                z = given[i] if i < len(given) else p.sample(temperature * prior_temperature)
                kl = log_q = log_p = torch.zeros_like(z)
            d = group.into_decoder(z if self.is_vanilla else torch.cat([d, z.to(d.dtype)], dim=1))
            if i + 1 < self.num_groups and self.groups[i + 1].scale != group.scale:
                d = self.up[group.scale - 1](d)
            groups.append((kl, log_q, log_p, z))
        return d, groups

    def _logits(self, d: Tensor) -> Tensor:
        return full_precision(self.image_head(self.post_process(d)))

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0,
                prior_temperature: float = 1.0, draws: int = 1) -> Terms:
        """Terms of the bound for images x (B, C, H, W) in [0, 1], in nats.

        recon (B,) = -log p(x|z); kl (B, L) from the top group down; log_q, log_p (B,) of the drawn latents;
        logits; kl_channels (B, L, Z), the KL of each latent channel.
        `skip` groups nearest the image are drawn from the prior; `temperature` scales the noise, 0 is none,
        and `prior_temperature` that of the skipped groups once more. Of several `draws` the terms are
        (draws B, ...), draw by draw, and the encoder is passed once.
        """
        if not 0 <= skip <= self.num_groups:
            raise UserError(f"skip {skip}: give 0 to {self.num_groups}, the number of groups.")
        features, x = [repeated(s, draws) for s in self._encode(x)], repeated(x, draws)
        d, groups = self._decode(len(x), features, skip, temperature, prior_temperature=prior_temperature)
        logits = self._logits(d)
        log_px = self.pixels.inside(self.likelihood.log_prob(logits, x))    # (B, 1, H, W)
        kl = torch.stack([kl.flatten(2).sum(2) for kl, *_ in groups], dim=1)             # (B, L, Z)
        return {'recon': -per_image(log_px), 'kl': kl.sum(2), 'kl_channels': kl, 'logits': logits,
                'log_q': sum(per_image(log_q) for _, log_q, _, _ in groups),
                'log_p': sum(per_image(log_p) for _, _, log_p, _ in groups)}

    # ---------------------------------------------------------------------------------------------- objective

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to minimize in nats (scalar), and what to log; `progress` in [0, 1] drives all schedules."""
        config = self.config
        weight = kl_weight(progress, config)
        kl, gamma = balanced_kl(terms['kl'], self.alpha, weight)
        loss = (terms['recon'] + kl).mean()
        logs = {'train/nelbo_iter': (terms['recon'] + terms['kl'].sum(1)).mean().detach(),
                'train/recon_iter': terms['recon'].mean().detach(),
                'train/kl_iter': terms['kl'].sum(1).mean().detach(),
                'kl_coeff/coeff': torch.tensor(weight)}
        logs |= {f'kl_coeff/layer_{i}': g for i, g in enumerate(gamma)}
        logs |= {f'kl_vals/layer_{i}': value for i, value in enumerate(terms['kl'].mean(0).detach())}
        active = (terms['kl_channels'].detach().mean(0) > ACTIVE_KL).sum(1).float()    # channels in use: (L,)
        logs |= {f'kl/active_{i}': n for i, n in enumerate(active)} | {'kl/total_active': active.sum()}
        if self.spectral is not None:
            spectral, batch_norm = self.spectral(), batch_norm_regularizer(self)
            strength = config.weight_decay_norm
            if config.weight_decay_norm_anneal:
                strength = config.weight_decay_norm_init ** (1 - weight) * strength ** weight
            loss = loss + strength * (spectral + batch_norm)
            logs |= {'train/norm_loss': spectral.detach(), 'train/bn_loss': batch_norm.detach(),
                     'train/norm_coeff': torch.tensor(strength)}
        return loss, logs

    def initialize(self, x: Tensor) -> None:
        """Data-dependent initialization of res_elu cells from x (B, C, H, W): once in a model's life."""
        if not self.data_initialized and any(getattr(m, 'data_init', False) for m in self.modules()):
            initialize_from_data(self, lambda: self(x))
        self.data_initialized.fill_(True)

    # ------------------------------------------------------------------------------------------- capabilities

    def reconstruct(self, x: Tensor, skip: int = 0) -> Tensor:
        """Mean of p(x|z) at the posterior means: (B, C, H, W) in [0, 1]."""
        return self.likelihood.mean(self(x, skip=skip, temperature=0.0)['logits'])

    def maps(self, x: Tensor, skip: int = 0) -> dict[str, Tensor]:
        """Where the bound is lost, nats a pixel at the posterior means: recon (B, 1, H, W), kl (B, L, H, W).

        A group's KL is spread evenly over the pixels under each latent position, so maps sum to the terms.
        """
        d, groups = self._decode(len(x), self._encode(x), skip, temperature=0.0)
        kl = []
        for group_kl, *_ in groups:
            area = x.shape[2] // group_kl.shape[2] * (x.shape[3] // group_kl.shape[3])
            kl.append(F.interpolate(group_kl.sum(1, keepdim=True), x.shape[2:], mode='nearest') / area)
        log_px = self.likelihood.log_prob(self._logits(d), x)
        return {'recon': -self.pixels.framed(self.pixels.inside(log_px)), 'kl': torch.cat(kl, dim=1)}

    def statistics(self, x: Tensor) -> Tensor:
        """`distributions.likelihood_statistics` at the posterior means: (B, L + 4)."""
        terms = self(x, temperature=0.0)
        return likelihood_statistics(terms, self.likelihood, self.pixels.inside(terms['logits']),
                                     self.pixels.inside(x))

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(Z, h, w) of each group, from the top down."""
        channels, height, width = self.latent_shape
        finer = [2 ** (self.groups[0].scale - group.scale) for group in self.groups]
        return [(channels, height * times, width * times) for times in finer]

    def latents(self, x: Tensor, temperature: float = 0.0) -> list[Tensor]:
        """Latents of images x (B, C, H, W) in [0, 1], from the top group down: each (B, Z, h, w).

        `temperature` scales the noise of the posterior; 0 takes its means.
        """
        return [z for *_, z in self._decode(len(x), self._encode(x), 0, temperature)[1]]

    def decode(self, latents: Sequence[Tensor], temperature: float = 0.0) -> Tensor:
        """Mean of p(x|z) for latents of the top groups, one or more: (B, C, H, W) in [0, 1].

        The groups that are not given are drawn from the prior, its noise scaled by `temperature`. Raises
        UserError for latents of another shape than `latent_shapes`.
        """
        check_latents(latents, self.latent_shapes)
        return self.likelihood.mean(self._logits(
            self._decode(len(latents[0]), None, 0, temperature, given=latents)[0]))

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The weights that only the posteriors depend on: likelihood and prior stay if they change."""
        parts = [self.stem, self.pre_process, self.down, self.top_features]
        for group in self.groups:
            parts += [group.encode, group.posterior, group.flows]
            if hasattr(group, 'into_encoder'):                  # the top group has none
                parts.append(group.into_encoder)
        return [parameter for part in parts for parameter in part.parameters()]

    def prior_logits(self, n: int, temperature: float = 1.0) -> Tensor:
        """Logits (n, num_params, H, W), latents drawn from the prior, noise scaled by `temperature`."""
        return self._logits(self._decode(n, None, 0, temperature)[0])

    def sample(self, n: int, temperature: float = 1.0, mean: bool = False) -> Tensor:
        """Draws n images (n, C, H, W) in [0, 1] from the model; with `mean`, the mean of p(x|z) of n latents.

        `temperature` scales the noise of the latents. Binary images are returned as probabilities.
        """
        logits = self.prior_logits(n, temperature)
        if mean or self.pixels.likelihood == 'bernoulli':
            return self.likelihood.mean(logits)
        return self.likelihood.sample(logits)

