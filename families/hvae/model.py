"""HVAE, LVAE and BIVA, as in "Hierarchical VAEs Know What They Don't Know" (Havtorn et al. 2021).

B images, C channels, H x W pixels; L stages, stage 1 nearest the image, S draws of an image in training, N
latent variables in all. Stage i has u, h, b, t features of inference, d of generation, z latents, q posterior
and p prior; td and bu the top-down and bottom-up latents of BIVA (Maaloe et al. 2019). In an HVAE z_i is
inferred from z_{i-1}, in an LVAE (Sonderby et al. 2016) from the features h_i and d_{i+1}, in BIVA there is
one of each kind.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributions import EIGHT_BITS, Pixels, Terms, likelihood_statistics, log_mean_exp, per_image
from families.hvae.config import HVAEConfig
from families.hvae.layers import GaussianLatent, centered, initialize_layers
from families.hvae.likelihoods import PixelHead, choose_likelihood
from families.hvae.shapes import Shape, stage_specs
from families.hvae.stages import BidirectionalStage, Drawn, LadderStage, Stage
from neural_operations import check_latents, repeated
from utils import UserError

# Parts of a stage that serve inference alone; the others generate.
INFERENCE = {'encode', 'bottom_up', 'top_down', 'join', 'merge', 'lift', 'to_posterior'}


def kl_weight(progress: float, config: HVAEConfig) -> float:
    """Warm-up of the KL term: linear, then 1."""
    return min(1.0, progress / config.kl_anneal_portion) if config.kl_anneal_portion else 1.0


def free_nats(progress: float, config: HVAEConfig) -> float:
    """Nats of KL that are free: constant in the first half of their portion of the run, then linear to 0."""
    if config.free_nats_portion == 0:
        return config.free_nats
    return config.free_nats * min(1.0, max(0.0, 2 - 2 * progress / config.free_nats_portion))


class HVAE(nn.Module):
    """The contract's model; terms are those of a likelihood family. A latent group is a stage."""

    Config = HVAEConfig
    stage_class: type[Stage] = Stage
    takes_draws = True

    def __init__(self, shape: tuple[int, ...], config: HVAEConfig, pixels: Pixels = EIGHT_BITS):
        """`shape` (C, H, W) of an image, its border of `pixels.padding` included, which no layer sees.

        Raises UserError for a size that the strides do not divide, and for a likelihood that does not suit.
        """
        super().__init__()
        self.shape, self.config, self.pixels = tuple(shape), config, pixels
        if len(shape) != 3:
            raise UserError(f"this family reads images (C, H, W), not shape {self.shape}.")
        self.inner = (shape[0], *(side - 2 * pixels.padding for side in shape[1:]))   # without the border
        self.padded = (shape[0], *(config.padded_shape or self.inner[1:]))          # as the network sees it
        if any(side < 0 or side % 2 for side in (a - b for a, b in zip(self.padded, self.inner))):
            raise UserError(f"--padded_shape {' '.join(map(str, self.padded[1:]))} for images of "
                            f"{' x '.join(map(str, self.inner[1:]))}: give sides that are larger by even "
                            f"numbers.")
        blocks, latents = config.stages()
        compat, is_biva = config.compat_official, self.stage_class.is_bidirectional
        specs = stage_specs(self.padded, blocks, latents, ladder=self.stage_class.is_ladder,
                            bidirectional=is_biva, reverses=not (compat and is_biva))
        self.stages = nn.ModuleList(self.stage_class(spec, config) for spec in specs)        # stage 1 first
        self.num_groups = len(specs)
        kind = choose_likelihood(config.likelihood_module, shape[0], pixels, compat)
        features = self.stages[0].generate[-1].shape
        self.head = PixelHead(kind, (features[0], *self.inner[1:]), shape[0], pixels, config.activation,
                              blocks[-1][-1].weightnorm, compat)
        self.likelihood = self.head.likelihood
        self.register_buffer('data_initialized', torch.tensor(False))
        # The channels of a latent share the free nats: each position has them once, and each dense latent.
        shares = [torch.full(shape, 1 / shape[0]).flatten() for shape in self.variable_shapes]
        self.register_buffer('free_share', torch.cat(shares), persistent=False)         # (N,)

    @property
    def variable_shapes(self) -> list[Shape]:
        """(Z, h, w) of every latent, from the top down; in a stage of BIVA the top-down one first."""
        return [latent.shape for stage in reversed(self.stages) for latent in stage.children()
                if isinstance(latent, GaussianLatent)]

    @property
    def latent_shapes(self) -> list[Shape]:
        """(Z, h, w) of each stage's latents, from the top down; the two of BIVA are concatenated."""
        shapes = iter(self.variable_shapes)
        pairs = [[next(shapes) for _ in range(self._num_latents(i))]
                 for i in reversed(range(self.num_groups))]
        return [(sum(z for z, *_ in pair), *pair[0][1:]) for pair in pairs]

    def _num_latents(self, i: int) -> int:
        """Latents of stage i + 1."""
        return 2 if self.stage_class.is_bidirectional and i + 1 < self.num_groups else 1

    # ----------------------------------------------------------------------------------------- the two passes

    def _up(self, x: Tensor, skip: int, temperature: float, draws: int = 1) -> list[Any]:
        """What each stage keeps of images x (B, C, *inner), stage 1 first; None of skipped stages. What
        stage 1 infers before it draws is repeated for several draws.
        """
        x = F.pad(x, centered(self.inner[1:], self.padded[1:]))
        carried = (x, x, None) if self.stage_class.is_bidirectional else (x, None)
        kept = []
        for i, stage in enumerate(self.stages):
            carried, own = stage.up(carried, i < skip, temperature, 1 if i else draws)
            kept.append(None if i < skip else own)
        return kept

    def _down(self, batch: int, kept: list[Any] | None, temperature: float, given: Sequence[Tensor] = (),
              prior_temperature: float = 1.0) -> tuple[Tensor, list[list[Drawn]]]:
        """Logits, and the latents of each stage from the top down.

        Without anything `kept` of images, the first stages from the top are `given` and the others drawn from
        the prior. For images, stages of which nothing is kept are drawn from it with noise that is also
        scaled by `prior_temperature`.
        """
        d, skips, drawn = None, deque(), []
        for i, stage in reversed(list(enumerate(self.stages))):
            done, number = len(drawn), self._num_latents(i)
            parts = given[done].chunk(number, dim=1) if done < len(given) else [None] * number
            own = kept and kept[i]
            noise = temperature * prior_temperature if kept and own is None else temperature
            drawn.append(stage.down(d, batch, own, parts, noise))
            d = stage.decode(torch.cat([latent.z for latent in drawn[-1]], dim=1), skips)
        d = F.pad(d, [-n for n in centered(self.inner[1:], self.padded[1:])])
        return self.head(d), drawn

    def _inner(self, x: Tensor, skip: int = 0) -> Tensor:
        """Images without their border. UserError for another shape, and for stages that are not there."""
        if tuple(x.shape[1:]) != self.shape:
            raise UserError(f"images of shape {tuple(x.shape[1:])}: this model is for {self.shape}.")
        if not 0 <= skip <= self.num_groups:
            raise UserError(f"skip {skip}: give 0 to {self.num_groups}, the number of stages.")
        return self.pixels.inside(x)

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0,
                prior_temperature: float = 1.0, draws: int = 1) -> Terms:
        """Terms of the bound for images x (B, C, H, W) in [0, 1], in nats.

        recon (B,) = -log p(x|z); kl (B, L) from the top stage down; log_q, log_p (B,) of the drawn latents;
        the KL is log q - log p at these, never analytic. kl_latents (B, M) is the same for each latent (BIVA
        has M = 2 L - 1, top-down before bottom-up), kl_channels (B, L, Z) for each channel, with zeros where
        a stage has fewer. logits (B, num_params, *inner) leave the border out. In training all are means over
        S draws, but for the logits, which are those of the first; recon_draws (B, S) and kl_elements
        (B, S, N) are for the objective.

        `skip` stages nearest the image are drawn from the prior; where inference passes through their
        latents, it takes the posterior means. `temperature` scales the noise, 0 is none, and
        `prior_temperature` that of the skipped stages once more. Of several `draws` the terms are (draws B,
        ...), draw by draw.
        """
        number = self.config.train_samples if self.training else 1
        x = self._inner(x, skip).repeat_interleave(number, dim=0)                           # (B S, C, *inner)
        kept, x = self._up(x, skip, temperature, draws), repeated(x, draws)
        logits, drawn = self._down(len(x), kept, temperature, prior_temperature=prior_temperature)
        by_draw = lambda value: value.unflatten(0, (-1, number))                            # to (B, S, ...)
        recon = by_draw(-per_image(self.likelihood.log_prob(logits, x)))
        latents = [z for stage in drawn for z in stage]
        kl = [z.log_q - z.log_p for z in latents]                                  # a latent: (B S, Z, h, w)
        stages = [torch.cat([z.log_q - z.log_p for z in stage], dim=1) for stage in drawn]
        total = lambda values: by_draw(sum(per_image(value) for value in values)).mean(1)
        widest = max(z.shape[1] for z in stages)
        channels = [F.pad(by_draw(z.flatten(2).sum(2)).mean(1), (0, widest - z.shape[1])) for z in stages]
        return {'recon': recon.mean(1), 'logits': by_draw(logits)[:, 0],
                'log_q': total(z.log_q for z in latents), 'log_p': total(z.log_p for z in latents),
                'kl': torch.stack([total([z]) for z in stages], dim=1),
                'kl_latents': torch.stack([total([z]) for z in kl], dim=1),
                'kl_channels': torch.stack(channels, dim=1), 'recon_draws': recon,
                'kl_elements': by_draw(torch.cat([z.flatten(1) for z in kl], dim=1))}

    # ---------------------------------------------------------------------------------------------- objective

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to minimize in nats (scalar), and what to log; `progress` in [0, 1] drives all schedules.

        Each latent variable is charged at least its share of the free nats. With importance weighting the
        loss of an image is minus the logarithm of the mean over its draws of exp(-loss) (Burda et al. 2016).
        """
        weight, free = kl_weight(progress, self.config), free_nats(progress, self.config)
        kl = terms['kl_elements']                                                            # (B, S, N)
        if free > 0:
            kl = torch.maximum(kl, free * self.free_share)
        loss = terms['recon_draws'] + weight * kl.sum(2)                                     # (B, S)
        loss = -log_mean_exp(-loss, dim=1) if self.config.train_importance_weighted else loss.mean(1)
        logs = {'train/nelbo_iter': (terms['recon'] + terms['kl'].sum(1)).mean().detach(),
                'train/recon_iter': terms['recon'].mean().detach(),
                'train/kl_iter': terms['kl'].sum(1).mean().detach(),
                'kl_coeff/coeff': torch.tensor(weight), 'kl_coeff/free_nats': torch.tensor(free)}
        logs |= {f'kl_vals/layer_{i}': value for i, value in enumerate(terms['kl'].mean(0).detach())}
        return loss.mean(), logs

    def initialize(self, x: Tensor) -> None:
        """Data-dependent initialization from x (B, C, H, W), two or more images: once in a model's life."""
        if not self.data_initialized:
            initialize_layers(self, x)
        self.data_initialized.fill_(True)

    # ------------------------------------------------------------------------------------------- capabilities

    def _mean(self, logits: Tensor) -> Tensor:
        return self.pixels.framed(self.likelihood.mean(logits))

    def reconstruct(self, x: Tensor, skip: int = 0) -> Tensor:
        """Mean of p(x|z) at the posterior means: (B, C, H, W) in [0, 1]."""
        return self._mean(self(x, skip=skip, temperature=0.0)['logits'])

    def maps(self, x: Tensor, skip: int = 0) -> dict[str, Tensor]:
        """Where the bound is lost, nats a pixel at the posterior means: recon (B, 1, H, W), kl (B, L, H, W).

        The KL of a latent is spread evenly over the pixels under its position, of a dense one over the image;
        what falls on padding, over the image too. Maps sum to the terms, and are 0 on the border.
        """
        inner = self._inner(x, skip)
        logits, drawn = self._down(len(x), self._up(inner, skip, 0.0), 0.0)
        margin, maps = centered(self.inner[1:], self.padded[1:]), []
        for stage in drawn:
            kl = sum((z.log_q - z.log_p).sum(1, keepdim=True) for z in stage)                # (B, 1, h, w)
            area = self.padded[1] // kl.shape[2] * (self.padded[2] // kl.shape[3])
            kl = F.interpolate(kl, self.padded[1:], mode='nearest') / area
            inside = F.pad(kl, [-n for n in margin])
            outside = kl.sum((2, 3), keepdim=True) - inside.sum((2, 3), keepdim=True)
            maps.append(inside + outside / (self.inner[1] * self.inner[2]))
        return {'recon': self.pixels.framed(-self.likelihood.log_prob(logits, inner)),
                'kl': self.pixels.framed(torch.cat(maps, dim=1))}

    def statistics(self, x: Tensor) -> Tensor:
        """`distributions.likelihood_statistics` at the posterior means: (B, L + 4)."""
        terms = self(x, temperature=0.0)
        return likelihood_statistics(terms, self.likelihood, terms['logits'], self.pixels.inside(x))

    def latents(self, x: Tensor, temperature: float = 0.0) -> list[Tensor]:
        """Latents of images x (B, C, H, W) in [0, 1], from the top stage down: each (B, Z, h, w).

        `temperature` scales the noise of the posterior; 0 takes its means.
        """
        _, drawn = self._down(len(x), self._up(self._inner(x), 0, temperature), temperature)
        return [torch.cat([latent.z for latent in stage], dim=1) for stage in drawn]

    def decode(self, latents: Sequence[Tensor], temperature: float = 0.0) -> Tensor:
        """Mean of p(x|z) for latents of the top stages, one or more: (B, C, H, W) in [0, 1].

        The stages that are not given are drawn from the prior, its noise scaled by `temperature`. Raises
        UserError for latents of another shape than `latent_shapes`.
        """
        check_latents(latents, self.latent_shapes)
        return self._mean(self._down(len(latents[0]), None, temperature, given=latents)[0])

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The weights that the posteriors depend on, and p(x, z) does not."""
        return [p for name, p in self.named_parameters() if INFERENCE & set(name.split('.'))]

    def prior_logits(self, n: int, temperature: float = 1.0) -> Tensor:
        """Logits (n, num_params, *inner), latents drawn from the prior, noise scaled by `temperature`."""
        return self._down(n, None, temperature)[0]

    def sample(self, n: int, temperature: float = 1.0, mean: bool = False) -> Tensor:
        """Draws n images (n, C, H, W) in [0, 1] from the model; with `mean`, the mean of p(x|z) of n latents.

        `temperature` scales the noise of the latents. Binary images are returned as probabilities.
        """
        logits = self.prior_logits(n, temperature)
        if mean or self.pixels.likelihood == 'bernoulli':
            return self._mean(logits)
        return self.pixels.framed(self.likelihood.sample(logits))


class LVAE(HVAE):
    """A ladder: the posterior of a stage sees the features of generation above it."""
    stage_class = LadderStage


class BIVA(HVAE):
    """Bidirectional inference: two latents a stage but at the top, one bottom-up and one top-down."""
    stage_class = BidirectionalStage
