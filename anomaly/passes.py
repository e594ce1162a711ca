"""The passes of a model over one batch, made once and only if a score asks, and the bounds on log p(x).

B images, C channels, H x W pixels, L latent groups from the top (1) down to the image (L); D draws of the
latents that scores average over, S samples behind an importance-weighted bound, k the groups nearest the
image that a pass skips, i.e. draws from the prior. Terms of a pass, all in nats: recon = -log p(x|z) (B,);
kl (B, L); log_q, log_p (B,) of the drawn latents, to which skipped groups add nothing.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distributions import RowNoise
from utils import UserError, mix_seed, seed_noise

Terms = dict[str, Tensor]
TERMS = ('recon', 'kl', 'log_q', 'log_p')

# capability that a score needs -> attribute of the model that shows it
CAPABILITIES = {'likelihood terms': 'num_groups', 'reconstructions': 'reconstruct', 'maps': 'maps',
                'encoder parameters': 'encoder_parameters', 'score norms': 'score_norms',
                'ODE likelihood': 'log_likelihood', 'voxel densities': 'voxel_nll',
                'inpainting': 'inpainting_map', 'restoration': 'restoration_map'}


# ------------------------------------------------------------------------------------- functions of the terms

def elbo(terms: Terms) -> Tensor:
    """Evidence lower bound on log p(x), in nats, one per image: (B,).

    With the KL of the terms, which is analytic where a family has it so. From the terms of a pass with
    `skip=k` this is L>k (Havtorn et al. 2021, eq. 8): skipped groups have no KL.
    """
    return -terms['recon'] - terms['kl'].sum(1)


def log_weight(terms: Terms) -> Tensor:
    """log p(x, z) - log q(z|x) of the sampled z, nats: (B,). Its mean over z is the ELBO, or L>k."""
    return -terms['recon'] - terms['log_q'] + terms['log_p']


def iw_bound(log_weights: Tensor) -> Tensor:
    """Importance-weighted bound on log p(x), nats (Burda et al. 2016, eq. 8): (S, B) log weights to (B,)."""
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))


# ------------------------------------------------------------------------------------------ passes of a batch

class Passes:
    """What one batch offers to the scores: the images, and every model pass, made once and only if asked for.

    Noise is a function of `noise` (any numbers or words: the seed, the part, the batch), of k and of the
    number of the pass. With `llr_noise` 'shared' it does not depend on k: pass by pass, L and L>k then take
    the same noise, and where a model draws from the top down, the groups above the skipped ones the same
    values.
    """

    def __init__(self, model: Any, x: Tensor, *, draws: int = 1, iw_samples: int = 1,
                 iw_samples_elbo: int = 1, iw_samples_lk: int = 1, llr_noise: str = 'separate',
                 regret_steps: int = 20, regret_learning_rate: float = 1e-4,
                 msma: dict[str, Any] | None = None, msma_map: str = 'none', bits: int = 8,
                 file_bytes: Tensor | None = None, noise: tuple = (0,), ids: Sequence[str] = ()):
        """`x` (B, C, H, W) in [0, 1]; `bits` per value; `file_bytes` (B,) the sizes of the files on disk;
        `ids` B names, or none.

        The counts are those of the flags of the same names (ScoreConfig), `draws` is num_draws; `msma` are
        the arguments of the model's `score_norms`.
        """
        self.msma_map = msma_map
        self.model, self.x, self.draws, self.iw_samples, self.bits = model, x, draws, iw_samples, bits
        self.iw_samples_elbo, self.iw_samples_lk, self.llr_noise = iw_samples_elbo, iw_samples_lk, llr_noise
        self.regret_steps, self.regret_learning_rate = regret_steps, regret_learning_rate
        self.msma, self.file_bytes, self.noise, self.ids, self.memory = msma or {}, file_bytes, noise, ids, {}

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """The value of `make`, which is called at the first request for `key` only, without gradients."""
        if key not in self.memory:
            with torch.no_grad():
                self.memory[key] = make()
        return self.memory[key]

    def seeded(self, *purpose: int | str) -> AbstractContextManager:
        """The noise of one pass, which is to be made inside the block."""
        seed_noise(*self.noise, *purpose)
        return RowNoise([mix_seed(*self.noise, *purpose, i) for i in self.ids]) if self.ids else nullcontext()

    def run(self, number: int, skip: int) -> Terms:
        """The terms of pass `number` in float64 on the CPU, without logits."""
        separate = skip and self.llr_noise == 'separate'
        with self.seeded(*(('skip', skip) if separate else ()), number):
            terms = self.model(self.x, skip=skip)
        return {name: terms[name].detach().cpu().double() for name in TERMS}

    def terms(self, draw: int = 0, skip: int = 0) -> Terms:
        """The terms of one of the D draws: recon, kl, log_q, log_p."""
        return self.once(('terms', draw, skip), lambda: self.run(draw, skip))

    def mean(self, function: Callable[[Terms], Tensor], skip: int = 0) -> Tensor:
        """The mean of a function of the terms over the draws."""
        return torch.stack([function(self.terms(draw, skip)) for draw in range(self.draws)]).mean(0)

    def log_weight(self, number: int, skip: int = 0) -> Tensor:
        """log weight of pass `number`, nats: (B,). The first D passes are the draws; others keep no terms."""
        def make() -> Tensor:
            is_draw = number < self.draws
            return log_weight(self.terms(number, skip) if is_draw else self.run(number, skip))
        return self.once(('log_weight', number, skip), make)

    def log_weights(self) -> Tensor:
        """Log weights of the first `iw_samples` passes, which serve the other scores too: (S, B)."""
        return torch.stack([self.log_weight(number) for number in range(self.iw_samples)])

    def bound(self, skip: int = 0) -> Tensor:
        """L, or with `skip=k` L>k, from S importance samples, mean over D such draws: (B,) nats.

        S is `iw_samples_elbo` for L and `iw_samples_lk` for L>k. One sample is `elbo`: an analytic KL has the
        mean of log q - log p and less variance. Several need the log weights.
        """
        samples = self.iw_samples_lk if skip else self.iw_samples_elbo
        if samples == 1:
            return self.mean(elbo, skip)
        # Sample s of draw d is pass d + s D, so that draw d is among its own samples.
        return torch.stack([
            iw_bound(torch.stack([self.log_weight(d + s * self.draws, skip) for s in range(samples)]))
            for d in range(self.draws)]).mean(0)

    def reconstruction(self) -> Tensor:
        """Mean of p(x|z) at the posterior means: (B, C, H, W) in [0, 1]."""
        def make() -> Tensor:
            with self.seeded('reconstruct'):
                return self.model.reconstruct(self.x).float()
        return self.once(('reconstruction',), make)

    def residual(self) -> Tensor:
        """x - reconstruction, or the model's own `residual`, whose output may leave [0, 1]: (B, C, H, W)."""
        if not hasattr(self.model, 'residual'):
            return self.x.float() - self.reconstruction()
        return self.once(('residual',), lambda: self.model.residual(self.x).float())

    def maps(self, skip: int = 0) -> dict[str, Tensor] | None:
        """'recon' (B, 1, H, W) and 'kl' (B, L, H, W), nats per pixel; None if the model has no maps."""
        if not hasattr(self.model, 'maps'):
            return None

        def make() -> dict[str, Tensor]:
            with self.seeded('maps'):
                return {name: values.float() for name, values in self.model.maps(self.x, skip=skip).items()}
        return self.once(('maps', skip), make)

    def features(self) -> Tensor:
        """-log p(x|z) and the KL of every group from the top down, means over the draws, nats: (B, 1 + L)."""
        return self.mean(lambda terms: torch.cat([terms['recon'][:, None], terms['kl']], 1))

    def score_norms(self) -> Tensor:
        """Norms of the model's score at n levels of noise, float64 on the CPU: (B, n)."""
        return self.once(('score_norms',), lambda: self.model.score_norms(self.x, **self.msma).double().cpu())

    def repair_error(self, kind: str) -> Tensor:
        """The model's own map of what 'inpainting' or 'restoration' changes: (B, 1, *S)."""
        def make() -> Tensor:
            with self.seeded(kind):
                return getattr(self.model, f'{kind}_map')(self.x).float()
        return self.once((kind,), make)

    def ode_nll(self) -> Tensor:
        """-log p(x) by the model's probability flow, nats, float64 on the CPU: (B,)."""
        def make() -> Tensor:
            with self.seeded('ode'):
                return -self.model.log_likelihood(self.x).double().cpu()
        return self.once(('ode_nll',), make)

    def voxel_nll(self) -> Tensor:
        """-log p of the features of every voxel, nats: (B, 1, *S)."""
        return self.once(('voxel_nll',), lambda: self.model.voxel_nll(self.x).float())


# ----------------------------------------------------------------------------------------- what a score gives

class Scores(NamedTuple):
    """One number per image (B,), and one per pixel (B, 1, H, W) or None. Larger = more anomalous."""
    image: Tensor
    map: Tensor | None = None


def as_passes(model: Any, x: Tensor | None) -> Passes:
    return model if isinstance(model, Passes) else Passes(model, x)


def has_capability(score: Any, model: Any) -> bool:
    """Whether the model has what the score needs."""
    return not score.needs or hasattr(model, CAPABILITIES[score.needs])


def check_capability(score: Any, model: Any) -> None:
    """Raises UserError, naming the capability, if the model lacks what the score needs."""
    if not has_capability(score, model):
        raise UserError(f"score {score.name} needs a model with {score.needs}, which {type(model).__name__} "
                        f"has not. Leave it out of --scores.")
