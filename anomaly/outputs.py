"""Outputs of a model for one batch, each computed once and only if a score asks for it; bounds on log p(x).

B images, C channels, *S = (H, W) or (D, H, W), L latent groups from the top (1) down to the image (L), Z
channels each; D draws of the latents over which scores average, M importance samples of a bound, k groups
nearest the image that a forward pass skips, that is, takes from the prior. Terms of a forward pass, all in
nats: recon = -log p(x|z) (B,); kl (B, L), in some families also kl_channels (B, L, Z); log_q, log_p (B,) of
the drawn latents, to which skipped groups add nothing.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.maps.postprocessing import gaussian_blur
from anomaly.scores import Scoring
from distributions import LEAST_KL, RowNoise, Terms, log_mean_exp
from utils import UserError, mix_seed, seed_noise

LEAST_SPREAD = 1e-2        # of a latent over positions, whose prior has a standard deviation of about 1
SUITABLE_BATCH = {'cpu': 64, 'cuda': 512}       # images of a pass, where several draws may be one batch
TERMS = ('recon', 'kl', 'kl_channels', 'log_q', 'log_p')


# ------------------------------------------------------------------------------------- functions of the terms

def elbo(terms: Terms) -> Tensor:
    """Evidence lower bound on log p(x), nats: (B,). From the terms of a forward pass with `skip=k` it is L>k
    (Havtorn et al. 2021, eq. 8): skipped groups have no KL.
    """
    return -terms['recon'] - terms['kl'].sum(1)


def log_weight(terms: Terms) -> Tensor:
    """log p(x, z) - log q(z|x) of the sampled z, nats: (B,). Its mean over z is the ELBO, or L>k."""
    return -terms['recon'] - terms['log_q'] + terms['log_p']


def as_float64(terms: Terms) -> Terms:
    """Those of TERMS that there are, in float64 on the CPU, without logits."""
    return {name: terms[name].detach().cpu().double() for name in TERMS if name in terms}


# ------------------------------------------------------------------------------------------ passes and noise

def passes(model: Any, x: Tensor, seeds: Sequence[Sequence[int]], most: int = 0,
           **options: Any) -> Iterator[Terms]:
    """Those of TERMS that a forward pass of images x (B, C, *S) gives with each of the `seeds`: one for the
    noise of all images, or one an image. A model that takes several draws at once encodes an image once for
    them; `most` images pass at once, repeated ones counted, 0 = as many as suit the device.
    """
    most = most or SUITABLE_BATCH.get(x.device.type, 0)
    together = max(1, most // len(x)) if getattr(model, 'takes_draws', False) else 1
    for some in (seeds[first:first + together] for first in range(0, len(seeds), together)):
        with RowNoise([seed for draw in some for seed in draw], rows=len(x) // len(some[0])):
            terms = model(x, **options, **({'draws': len(some)} if len(some) > 1 else {}))
        terms = {name: terms[name].unflatten(0, (len(some), -1)) for name in TERMS if name in terms}
        yield from ({name: values[draw] for name, values in terms.items()} for draw in range(len(some)))


def content_id(image: Tensor) -> str:
    """32 hexadecimal digits that identify the values of an image (C, *S), wherever its file lies."""
    return hashlib.sha256(image.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:32]


# ----------------------------------------------------------------------------------------- outputs of a batch

class Outputs:
    """The images of one batch, and what a model says of them.

    The noise of every forward pass follows from the seed, the purpose and number of the pass, and the content
    of each image: an image has one score, whatever its batch, its rank, its file name and the mode. With
    `llr_noise` 'shared', L and L>k take the same noise.
    """

    def __init__(self, model: Any, x: Tensor, scoring: Scoring | None = None, bits: int = 8,
                 file_bytes: Tensor | None = None, densities: Mapping[str, Any] | None = None,
                 ids: Sequence[str] | None = None):
        """`x` (B, C, *S) in [0, 1] on the device of the model; `bits` per value; `file_bytes` (B,) sizes of
        the files on disk; `densities` of normal images by the name of their score; `ids` in place of the
        content.
        """
        self.model, self.x, self.scoring = model, x, scoring or Scoring()
        self.bits, self.file_bytes, self.densities = bits, file_bytes, densities or {}
        self._ids, self._made = ids, {}

    @property
    def ids(self) -> Sequence[str]:
        """What identifies each of the B images."""
        if self._ids is None:
            self._ids = [content_id(image) for image in self.x]
        return self._ids

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """The value of `make`, which is called without gradients at the first request for `key` only."""
        if key not in self._made:
            with torch.no_grad():
                self._made[key] = make()
        return self._made[key]

    def noise(self, *purpose: int | str) -> AbstractContextManager:
        """Context in which all noise follows from the seed, the purpose and each image."""
        return RowNoise([mix_seed(self.scoring.seed, *purpose, i) for i in self.ids])

    def forward(self, numbers: Sequence[int], skip: int = 0) -> Iterator[Terms]:
        """Terms of these forward passes in float64 on the CPU, without logits."""
        separate = skip and self.scoring.llr_noise == 'separate'
        prior: dict[str, Any] = {'prior_temperature': float(self.scoring.llr_prior == 'draw')} if skip else {}
        purpose = ('skip', skip) if separate else ()
        seeds = [[mix_seed(self.scoring.seed, *purpose, number, i) for i in self.ids] for number in numbers]
        return map(as_float64, passes(self.model, self.x, seeds, skip=skip, **prior))

    def terms(self, numbers: Sequence[int], skip: int = 0) -> list[Terms]:
        """Terms of these forward passes, each made once. The first D are the draws."""
        missing = [number for number in numbers if ('terms', number, skip) not in self._made]
        with torch.no_grad():
            for number, terms in zip(missing, self.forward(missing, skip)):
                if number >= self.scoring.num_draws:            # of importance samples, which are many
                    terms.pop('kl_channels', None)
                self._made['terms', number, skip] = terms
        return [self._made['terms', number, skip] for number in numbers]

    def mean(self, function: Callable[[Terms], Tensor], skip: int = 0) -> Tensor:
        """Mean over the draws of a function of the terms."""
        return torch.stack([*map(function, self.terms(range(self.scoring.num_draws), skip))]).mean(0)

    def nelbo(self) -> Tensor:
        """Negative ELBO, mean over the draws, nats: (B,)."""
        return -self.mean(elbo)

    def log_weights(self, numbers: Sequence[int], skip: int = 0) -> Tensor:
        """Log weights of these forward passes, nats: (M, B). The first D passes are the draws."""
        return torch.stack([*map(log_weight, self.terms(numbers, skip))])

    def iw_bound(self, numbers: Sequence[int], skip: int = 0) -> Tensor:
        """Importance-weighted bound (Burda et al. 2016, eq. 8) from forward passes `numbers`, nats: (B,)."""
        return log_mean_exp(self.log_weights(numbers, skip), 0)

    def bound(self, skip: int = 0) -> Tensor:
        """L, or with `skip=k` L>k, from M importance samples, mean over D such draws: (B,) nats.

        M is `iw_samples_elbo` for L and `iw_samples_lk` for L>k. One sample is `elbo`: an analytic KL has the
        mean of log q - log p and less variance. Several need the log weights.
        """
        draws = self.scoring.num_draws
        samples = self.scoring.iw_samples_lk if skip else self.scoring.iw_samples_elbo
        if samples == 1:
            return self.mean(elbo, skip)
        # Sample s of draw d is pass d + s D, so that draw d is among its own samples.
        return torch.stack([self.iw_bound(range(draw, samples * draws, draws), skip)
                            for draw in range(draws)]).mean(0)

    def reconstruction(self) -> Tensor:
        """Mean of p(x|z) at the posterior means: (B, C, *S) in [0, 1]."""
        return self.ask('reconstruct').float()

    def residual(self) -> Tensor:
        """x - reconstruction, or the model's own `residual`, whose output may leave [0, 1]: (B, C, *S)."""
        if hasattr(self.model, 'residual'):
            return self.ask('residual').float()
        return self.x.float() - self.reconstruction()

    def steady_residual(self) -> Tensor:
        """The residual (B, C, *S). With `residual_shift` above 0, its mean with the residual of the image
        without that many pixels at the start of every axis, as networks with pooling are not
        shift-equivariant.
        """
        residual, shift = self.residual(), self.scoring.residual_shift
        if not shift:
            return residual
        axes, inside, framed = self.x.ndim - 2, self.model.pixels.inside, self.model.pixels.framed
        if shift >= (shortest := min(inside(self.x).shape[2:])):
            raise UserError(f"--residual_shift {shift}: the images have {shortest} pixels along a side, of "
                            f"which a shift must leave some.")
        ends, starts = ((..., *[part] * axes) for part in (slice(shift, None), slice(None, -shift)))
        x, mean = inside(self.x), inside(residual).clone()
        moved = F.pad(x, (0, shift) * axes, mode='replicate')[ends]
        copy = type(self)(self.model, framed(moved), self.scoring, self.bits, ids=self._ids).residual()
        mean[ends] = (mean[ends] + inside(copy)[starts]) / 2
        return framed(mean)

    def smooth_residual(self) -> Tensor:
        """|residual|, smoothed before the modulus, so that noise cancels; mean over channels: (B, 1, *S)."""
        def make() -> Tensor:
            smooth = gaussian_blur(self.steady_residual(), self.scoring.residual_smoothing)
            return smooth.abs().mean(1, keepdim=True)
        return self.once(('smooth_residual',), make)

    def maps(self, skip: int = 0) -> dict[str, Tensor]:
        """'recon' (B, 1, *S) and 'kl' (B, L, *S), nats per pixel."""
        return {name: values.float() for name, values in self.ask('maps', skip=skip).items()}

    def likelihood_features(self) -> Tensor:
        """-log p(x|z) and the KL of every group from the top down, nats: (B, 1 + L)."""
        return self.feature(lambda terms: torch.cat([terms['recon'][:, None], terms['kl']], 1))

    def log_kl(self, channels: bool = False) -> Tensor:
        """Logarithms of the KL of every group (B, L), or where the terms tell `channels` apart, of every
        latent channel (B, L Z), each at least LEAST_KL nats: a KL spreads in proportion to its size.
        """
        kl = self.feature(lambda terms: terms['kl_channels' if channels and 'kl_channels' in terms else 'kl'])
        return kl.clamp(min=LEAST_KL).log().flatten(1)

    def latent_features(self) -> Tensor:
        """The logarithms of the KL of every latent channel, and of the standard deviation of its posterior
        mean over the positions, float64 on the CPU: (B, n).
        """
        spread = [z.double().cpu().flatten(2).std(2, correction=0) for z in self.ask('latents')]
        return torch.cat([self.log_kl(channels=True), (torch.cat(spread, 1) + LEAST_SPREAD).log()], 1)

    def feature(self, function: Callable[[Terms], Tensor]) -> Tensor:
        """A function of the terms, from which a density learns: at the posterior means, where a group does
        not pay for the noise of those above it, or the mean over the draws, as `density_features` says.
        """
        if self.scoring.density_features == 'draws':
            return self.mean(function)
        return function(self.once(('means',), lambda: as_float64(self.model(self.x, temperature=0.0))))

    def statistics(self) -> Tensor:
        """The model's statistics for DoSE, float64 on the CPU: (B, n). Score norms are computed once."""
        if hasattr(self.model, 'score_norms'):
            return self.score_norms().log()
        return self.ask('statistics').double().cpu()

    def score_norms(self) -> Tensor:
        """Norms of the model's score at n levels of noise, float64 on the CPU: (B, n)."""
        return self.ask('score_norms', **self.scoring.msma).double().cpu()

    def regret(self) -> Tensor:
        """Likelihood regret: ELBO after minus before its encoder is fitted to the image alone, nats: (B,)."""
        return self.once(('regret',), lambda: torch.cat([
            regret(self.model, image, self.scoring, name)
            for image, name in zip(self.x.split(1), self.ids, strict=True)]))

    def ask(self, method: str, **options: Any) -> Any:
        """What a method of the model says of the images."""
        def make() -> Any:
            with self.noise(method):
                return getattr(self.model, method)(self.x, **options)
        return self.once((method, *options.items()), make)


def regret(model: Any, image: Tensor, scoring: Scoring, name: str) -> Tensor:
    """Likelihood regret of one image (1, C, H, W), nats: (1,) float64 on the CPU (Xiao, Yan, Amit 2020).

    What the bound gains when a copy of the encoder is fitted to this image alone by steps of Adam, each with
    noise of its own, as the posterior would be fitted to noise that stays. Both bounds take the same D draws,
    so that their difference varies less.
    """
    model = deepcopy(model).eval().requires_grad_(False)         # eval: batch norms stay as they are
    encoder = [parameter.requires_grad_(True) for parameter in model.encoder_parameters()]
    optimizer = torch.optim.Adam(encoder, lr=scoring.regret_learning_rate)

    def bound(*draw: int | str) -> Tensor:
        seed_noise(scoring.seed, 'regret', name, *draw)
        return elbo(model(image))

    def mean_bound() -> Tensor:
        return torch.stack([bound(draw).double().cpu() for draw in range(scoring.num_draws)]).mean(0)

    before = mean_bound()
    for step in range(scoring.regret_steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            (-bound('step', step)).sum().backward()
        optimizer.step()
    return mean_bound() - before
