"""Stages of HVAE, LVAE and BIVA: how latents are inferred on the way up and down, and how generation goes on.

B images, L stages, stage 1 nearest the image. In stage i: u what it hands up, h, b and t features of
inference, d of generation; z latents, q posterior and p prior; td and bu the top-down and bottom-up latents
of BIVA.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distributions import Normal
from families.hvae.config import Block, ConvLatent, HVAEConfig
from families.hvae.layers import Chain, Dense, GaussianLatent, ResBlock
from families.hvae.shapes import Shape, StageSpec
from neural_operations import repeated
from utils import UserError


class Drawn(NamedTuple):
    """A latent (B, Z, h, w), and its log-densities under q and p, elementwise; 0 if drawn from the prior."""
    z: Tensor
    log_q: Tensor
    log_p: Tensor


def draw(p: Normal, inferred: tuple[Normal, Tensor] | None, given: Tensor | None,
         temperature: float) -> Drawn:
    """The latent of the posterior where one was `inferred`; else the `given` one, or one from the prior."""
    if inferred is not None:
        q, z = inferred
        return Drawn(z, q.log_prob(z), p.log_prob(z))
    z = p.sample(temperature) if given is None else given
    return Drawn(z, torch.zeros_like(z), torch.zeros_like(z))


def infer(q: Normal, skipped: bool, temperature: float) -> tuple[Normal, Tensor]:
    """The posterior and a draw from it; in the place of the draw its mean, for a `skipped` stage.

    The noise is drawn in both cases, so that passes that skip different numbers of stages can share it.
    """
    z = q.sample(temperature)
    return q, q.mean if skipped else z


class Stage(nn.Module):
    """A stage of an HVAE: blocks of inference, a latent, blocks of generation."""
    is_ladder, is_bidirectional = False, False      # see `stage_specs`

    def __init__(self, spec: StageSpec, config: HVAEConfig):
        super().__init__()
        self.spec, self.config = spec, config
        self.build_inference()
        self.project = self.as_features(spec.projected, 2 if self.is_bidirectional and not spec.top else 1)
        shape, blocks = spec.projected, []
        for block, handed in zip(spec.generative, spec.skips):
            skip = self.declared(handed, shape, block) if config.skip_stochastic else None
            blocks.append(self.block(shape, block, skip=skip, up=True, residual=bool(blocks),
                                     dropout=config.p_dropout))
            shape = blocks[-1].shape
        self.generate = nn.ModuleList(blocks)

    # ----------------------------------------------------------------------------------------------- building

    @property
    def before_latents(self) -> str:
        return self.config.activation

    def block(self, shape: Shape, block: Block, **options: Any) -> ResBlock:
        return ResBlock(shape, block, self.config, **options)

    def chain(self, shape: Shape, skip: Shape | None) -> Chain:
        """The stage's blocks of inference, from features of this shape."""
        blocks = []
        for block in self.spec.blocks:
            blocks.append(self.block(shape, block, skip=skip, residual=not self.spec.first or bool(blocks),
                                     dropout=self.config.q_dropout))
            shape = blocks[-1].shape
        return Chain(blocks)

    def merge_block(self) -> ResBlock:
        """Brings d_{i+1} to the features of inference; published, it leaves d_{i+1} out."""
        spec = self.spec
        skip = spec.shape if self.config.compat_official else spec.above
        return self.block(spec.shape, replace(spec.blocks[-1], stride=1), skip=skip,
                          dropout=self.config.p_dropout)

    def new_latent(self) -> GaussianLatent:
        spec, latent = self.spec, self.spec.latent
        kernel = latent.kernel_size if isinstance(latent, ConvLatent) else None
        return GaussianLatent(latent.latent_features, kernel, spec.shape, spec.above, self.before_latents,
                              latent.weightnorm, latent.learn_prior or self.config.learn_prior)

    def as_features(self, shape: Shape, count: int = 1) -> nn.Module:
        """From one latent, or `count` of them, to features of this shape: a linear layer for dense ones."""
        latent = self.spec.latent
        if isinstance(latent, ConvLatent):
            return nn.Identity()
        return Dense([count * latent.latent_features], shape)

    def declared(self, handed: Shape | None, shape: Shape, block: Block) -> Shape | None:
        """The shape for which a generative block is built to take its skip; published, that of the stage."""
        if not self.config.compat_official or handed is None:
            return handed
        alive = self.spec.shape != (block.out_channels, *shape[1:])
        if alive and handed != self.spec.shape:
            raise UserError(f"--compat_official: a generative block expects a skip connection of shape "
                            f"{self.spec.shape} and is handed {handed}. Give all stages the same number of "
                            f"blocks and channels, or leave --compat_official out.")
        return self.spec.shape

    def encoder(self) -> Chain:
        """Blocks of inference, which see h_{i-1} past the latents too."""
        skips = self.config.skip_stochastic and not self.spec.first
        return self.chain(self.spec.handed_up, self.spec.below if skips else None)

    def build_inference(self) -> None:
        self.encode = self.encoder()
        self.latent = self.new_latent()
        if not self.spec.top:
            self.lift = self.as_features(self.spec.shape)
        elif self.config.compat_official:
            # Published checkpoints hold this layer, and nothing uses it.
            self.lift = self.as_features(self.spec.shape).requires_grad_(False)

    # ------------------------------------------------------------------------------------------------ passing

    def up(self, carried: tuple[Tensor, ...], skipped: bool, temperature: float,
           draws: int = 1) -> tuple[tuple, Any]:
        """What the stage below handed up, to what this one hands up, and what it keeps for the way down. Its
        features are repeated for this many draws.
        """
        u, below = carried
        h = repeated(self.encode(u, below), draws)
        q, z = infer(self.latent.posterior(h), skipped, temperature)
        return (z if self.spec.top else self.lift(z), h), (q, z)

    def down(self, d: Tensor | None, batch: int, kept: Any, given: Sequence[Tensor | None],
             temperature: float) -> list[Drawn]:
        """The latents, given the features above. What was `kept` on the way up is None for a prior's draw."""
        return [draw(self.latent.prior(d, batch), kept, given[0], temperature)]

    def decode(self, z: Tensor, skips: deque[Tensor]) -> Tensor:
        """Features of generation (B, C, H, W) from latents; `skips` is the queue of `stage_specs`."""
        d = self.project(z)
        for block in self.generate:
            d = block(d, None if self.spec.top else skips.popleft())
            skips.append(d)
        return d


class LadderStage(Stage):
    """A stage of an LVAE: inference is deterministic on the way up and meets generation on the way down."""
    is_ladder = True

    def build_inference(self) -> None:
        self.encode = self.encoder()
        self.merge = self.merge_block()
        self.latent = self.new_latent()

    def up(self, carried, skipped, temperature, draws=1):
        u, below = carried
        h = repeated(self.encode(u, below), draws)
        return (h, h), h

    def down(self, d, batch, kept, given, temperature):
        inferred = None if kept is None \
            else infer(self.latent.posterior(self.merge(kept, d)), False, temperature)
        return [draw(self.latent.prior(d, batch), inferred, given[0], temperature)]


class BidirectionalStage(Stage):
    """A stage of BIVA: a latent inferred on the way up, as in an HVAE, and one down, as in an LVAE."""
    is_bidirectional = True

    @property
    def before_latents(self) -> str:
        return 'ELU' if self.config.compat_official else self.config.activation

    def build_inference(self) -> None:
        spec, compat = self.spec, self.config.compat_official
        # published: only the top has these skips
        skips = self.config.skip_stochastic and not spec.first and (spec.top or not compat)
        both = (2 * spec.below[0], *spec.below[1:])
        self.bottom_up = self.chain(spec.handed_up, both if skips else None)
        self.top_down = self.chain(spec.below, spec.shape)
        if spec.top:
            joint = (2 * spec.shape[0], *spec.shape[1:])
            self.join = self.block(joint, replace(spec.blocks[-1], stride=1), dropout=self.config.q_dropout)
            self.latent = self.new_latent()
        else:
            self.lift = self.as_features(spec.shape)
            self.merge = self.merge_block()
            self.td_latent, self.bu_latent = self.new_latent(), self.new_latent()

    def up(self, carried, skipped, temperature, draws=1):
        u, t_below, b_below = carried
        b = self.bottom_up(u, torch.cat([b_below, t_below], dim=1) if b_below is not None else None)
        t, b = (repeated(features, draws) for features in (self.top_down(t_below, b), b))
        if self.spec.top:
            inferred = infer(self.latent.posterior(self.join(torch.cat([b, t], dim=1))), skipped, temperature)
            return (), inferred
        inferred = infer(self.bu_latent.posterior(b), skipped, temperature)
        return (self.lift(inferred[1]), t, b), (inferred, t)

    def down(self, d, batch, kept, given, temperature):
        if self.spec.top:
            return super().down(d, batch, kept, given, temperature)
        bottom_up, top_down = None, None
        if kept is not None:
            bottom_up, t = kept
            top_down = infer(self.td_latent.posterior(self.merge(t, d)), False, temperature)
        return [draw(latent.prior(d, batch), inferred, z, temperature) for latent, inferred, z in
                zip((self.td_latent, self.bu_latent), (top_down, bottom_up), given)]
