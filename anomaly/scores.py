"""Anomaly scores of models with a likelihood: functions of a model's terms, larger = more anomalous.

B images, C channels, H x W pixels, L latent groups from the top (1) down to the image (L), S draws of the
latents. Terms, all in nats: recon = -log p(x|z) (B,); kl (B, L); log_q, log_p (B,). All scores of a batch
share its passes.
"""

import io
import lzma
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import UserError, flag, seed_noise

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class ScoreConfig:
    """Anomaly scores: which, how often sampled, and how judged."""
    scores: tuple = flag(('all',), "scores to compute: 'all', rows of the table such as nelbo, llr, "
                                   "complexity, or one member of a row such as llr_2, kl_1 (1 = top group)")
    primary_score: str = flag('', "score that the figures show, chosen before looking at any anomaly; "
                                  "'' = nelbo, or the first computed score where there is no nelbo")
    num_draws: int = flag(4, 'draws of the latents that every sampled score averages over')
    target_fpr: float = flag(0.05, 'share of normal images that may be called anomalous; sets the thresholds')
    num_bootstrap: int = flag(1000, 'resamples behind the 95 % intervals')
    num_cases: int = flag(6, 'most and least anomalous test images shown, of each; 0 = none')
    max_train_images: int = flag(1000, 'training images that the baselines (mean image, PCA) are fitted on')

    def __post_init__(self):
        if not 0 < self.target_fpr < 1:
            raise UserError(f"--target_fpr {self.target_fpr} is not between 0 and 1.")
        least_of = {'num_draws': 1, 'num_bootstrap': 1, 'num_cases': 0, 'max_train_images': 2}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)} is too small: at least {least}.")


# ------------------------------------------------------------------------------------- functions of the terms

def elbo(terms: Terms) -> Tensor:
    """Evidence lower bound on log p(x) with the analytic KL, in nats, one per image: (B,).

    From the terms of a pass with `skip=k` this is L>k (Havtorn et al. 2021, eq. 8): skipped groups have no
    KL.
    """
    return -terms['recon'] - terms['kl'].sum(1)


def log_weight(terms: Terms) -> Tensor:
    """log p(x, z) - log q(z|x) of the sampled z, nats: (B,). Its mean over z is the ELBO."""
    return -terms['recon'] - terms['log_q'] + terms['log_p']


def iw_bound(log_weights: Tensor) -> Tensor:
    """Importance-weighted bound on log p(x), nats (Burda et al. 2016, eq. 8): (K, B) log weights to (B,)."""
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))


def compressed_bits(x: Tensor, bits: int) -> Tensor:
    """Bits of each image (B, C, H, W), losslessly compressed at `bits` per value as the model sees it: (B,).

    The shorter of an optimised PNG (grey or RGB; other channel counts stacked, 9 to 16 bits as 16-bit grey)
    and LZMA without a header. Images of more than 16 bits per value are compressed at 16.
    """
    levels = 2 ** min(bits, 16) - 1
    # Few levels are spread over 0 to 255 for the PNG, which changes no value's identity, so no information.
    step, dtype = (255 / levels, np.uint8) if levels < 256 else (1, np.uint16)
    values = (x.detach().cpu().double().clamp(0, 1) * levels).round().mul(step).numpy().astype(dtype)
    return torch.tensor([8.0 * min(png_bytes(v), lzma_bytes(v)) for v in values], dtype=torch.float64)


def png_bytes(values: np.ndarray) -> int:
    """Size in bytes of (C, H, W) uint8 or uint16 values as an optimised PNG."""
    rgb = len(values) == 3 and values.dtype == np.uint8
    picture = Image.fromarray(np.moveaxis(values, 0, -1) if rgb else values.reshape(-1, values.shape[-1]))
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG', optimize=True)
    return buffer.tell()


def lzma_bytes(values: np.ndarray) -> int:
    """Size in bytes of the raw values under LZMA2, without container or header."""
    filters = [{'id': lzma.FILTER_LZMA2, 'preset': 6}]
    return len(lzma.compress(values.tobytes(), lzma.FORMAT_RAW, filters=filters))


# ------------------------------------------------------------------------------------------ passes of a batch

# capability that a score needs -> attribute of the model that shows it
CAPABILITIES = {'likelihood terms': 'num_groups', 'reconstruct': 'reconstruct', 'maps': 'maps'}


class Passes:
    """What one batch offers to the scores: the images, and every model pass, made once and only if asked for.

    Noise is a function of `noise` (any numbers or words: the seed, the part, the batch) and the draw. Passes
    that skip different numbers of groups share their noise, draw by draw: where a model samples from the top
    down, the groups above the skipped ones then take the same values in both, and the difference L - L>k has
    less variance around the same mean.
    """

    def __init__(self, model: Any, x: Tensor, *, draws: int = 1, iw_samples: int = 1, bits: int = 8,
                 file_bytes: Tensor | None = None, noise: tuple = (0,)):
        """`x` (B, C, H, W) in [0, 1]; `bits` per value; `file_bytes` (B,) the sizes of the files on disk."""
        self.model, self.x, self.draws, self.iw_samples, self.bits = model, x, draws, iw_samples, bits
        self.file_bytes, self.noise, self.memory = file_bytes, noise, {}

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """The value of `make`, which is called at the first request for `key` only, without gradients."""
        if key not in self.memory:
            with torch.no_grad():
                self.memory[key] = make()
        return self.memory[key]

    def terms(self, draw: int = 0, skip: int = 0) -> Terms:
        """The terms of one pass in float64 on the CPU, without logits."""
        def run() -> Terms:
            seed_noise(*self.noise, draw)
            terms = self.model(self.x, skip=skip)
            return {k: terms[k].detach().cpu().double() for k in ('recon', 'kl', 'log_q', 'log_p')}
        return self.once(('terms', draw, skip), run)

    def mean(self, function: Callable[[Terms], Tensor], skip: int = 0) -> Tensor:
        """The mean of a function of the terms over the draws."""
        return torch.stack([function(self.terms(draw, skip)) for draw in range(self.draws)]).mean(0)

    def log_weights(self) -> Tensor:
        """Log weights of K = `iw_samples` draws, the first of which serve the other scores too: (K, B)."""
        def run() -> Tensor:
            kept = set(self.memory)
            weights = []
            for draw in range(self.iw_samples):
                weights.append(log_weight(self.terms(draw)))
                if draw >= self.draws and ('terms', draw, 0) not in kept:
                    del self.memory['terms', draw, 0]
            return torch.stack(weights)
        return self.once(('log_weights',), run)

    def reconstruction(self) -> Tensor:
        """Mean of p(x|z) at the posterior means: (B, C, H, W) in [0, 1]."""
        def run() -> Tensor:
            seed_noise(*self.noise, 'reconstruct')
            return self.model.reconstruct(self.x).float()
        return self.once(('reconstruction',), run)

    def maps(self, skip: int = 0) -> dict[str, Tensor] | None:
        """'recon' (B, 1, H, W) and 'kl' (B, L, H, W), nats per pixel; None if the model has no maps."""
        if not hasattr(self.model, 'maps'):
            return None

        def run() -> dict[str, Tensor]:
            seed_noise(*self.noise, 'maps')
            return {k: v.float() for k, v in self.model.maps(self.x, skip=skip).items()}
        return self.once(('maps', skip), run)

    def features(self) -> Tensor:
        """-log p(x|z) and the KL of every group from the top down, means over the draws, nats: (B, 1 + L)."""
        return self.mean(lambda terms: torch.cat([terms['recon'][:, None], terms['kl']], 1))


# ------------------------------------------------------------------------------------------------- the scores

class Scores(NamedTuple):
    """One number per image (B,), and one per pixel (B, 1, H, W) or None. Larger = more anomalous."""
    image: Tensor
    map: Tensor | None = None


class AnomalyScore(Protocol):
    """What detect.py and the user ask of a score."""
    name: str
    about: str                                       # one line for the report
    needs: str                                       # the capability; '' = no model

    def fit(self, model: Any, normal: Iterable[Tensor]) -> None:
        """Learns from batches of normal images (B, C, H, W), where there is something to learn."""
    def __call__(self, model: Any, x: Tensor | None = None, with_map: bool = True) -> Scores:
        """Scores of the images. A `Passes` in place of the model shares its passes and needs no `x`."""


def as_passes(model: Any, x: Tensor | None) -> Passes:
    return model if isinstance(model, Passes) else Passes(model, x)


@dataclass(frozen=True)
class Score:
    """A score that learns nothing: a function of the passes, and perhaps one that gives its map."""
    name: str
    needs: str
    about: str
    image: Callable[[Passes], Tensor]                            # -> (B,)
    map: Callable[[Passes], Tensor | None] | None = None   # -> (B, 1, H, W), or None if the model has no maps

    def fit(self, model: Any, normal: Iterable[Tensor]) -> None:
        """Nothing to learn."""

    def __call__(self, model: Any, x: Tensor | None = None, with_map: bool = True) -> Scores:
        passes = as_passes(model, x)
        check_capability(self, passes.model)
        return Scores(self.image(passes), self.map(passes) if self.map and with_map else None)


class DensityScore:
    """A score that learns what is normal from `Passes.features` (N, 1 + L) of normal images.

    Fitted on validation images, not training images: the model has seen the latter, so their NELBO and KL are
    not those of a new normal image. The threshold needs scores of validation images that were not fitted on
    themselves, which is what `cross_fit` gives.
    """
    needs = 'likelihood terms'
    map = None

    def __init__(self, name: str, about: str):
        self.name, self.about, self.state = name, about, None

    def fit_features(self, features: np.ndarray) -> None:
        raise NotImplementedError

    def score_features(self, features: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def fit(self, model: Any, normal: Iterable[Tensor]) -> None:
        """Learns from batches of normal images (B, C, H, W)."""
        batches = [Passes(model, x, noise=(0, i)).features() for i, x in enumerate(normal)]
        self.fit_features(torch.cat(batches).numpy())

    def __call__(self, model: Any, x: Tensor | None = None, with_map: bool = True) -> Scores:
        if self.state is None:
            raise UserError(f"score {self.name} has not been fitted: call fit(model, normal_images) first.")
        passes = as_passes(model, x)
        check_capability(self, passes.model)
        return Scores(torch.from_numpy(self.score_features(passes.features().numpy())))


class Typicality(DensityScore):
    """|NELBO - mean NELBO of normal images|, nats (Nalisnick et al. 2019, with batches of one image)."""

    def fit_features(self, features: np.ndarray) -> None:
        self.state = {'mean': float(features.sum(1).mean())}

    def score_features(self, features: np.ndarray) -> np.ndarray:
        return np.abs(features.sum(1) - self.state['mean'])


class KLProfile(DensityScore):
    """Mahalanobis distance of (recon, KL of every group) from normal images, in standard deviations.

    The covariance is that of the standardised features, shrunk by Ledoit and Wolf (2004): there may be as
    many groups as validation images.
    """

    def fit_features(self, features: np.ndarray) -> None:
        from sklearn.covariance import ledoit_wolf
        if len(features) < 3:
            raise UserError(f"score {self.name} needs at least 3 normal images, not {len(features)}.")
        mean, std = features.mean(0), features.std(0)
        std[std <= 1e-9 * np.maximum(1, np.abs(mean))] = 1      # a collapsed group: one KL for all images
        covariance, _ = ledoit_wolf((features - mean) / std)
        # A constant feature has variance 0: the ridge keeps the inverse finite.
        precision = np.linalg.inv(covariance + 1e-9 * np.eye(len(mean)))
        self.state = {'mean': mean.tolist(), 'std': std.tolist(), 'precision': precision.tolist()}

    def score_features(self, features: np.ndarray) -> np.ndarray:
        mean, std, precision = (np.asarray(self.state[k]) for k in ('mean', 'std', 'precision'))
        z = (features - mean) / std                                          # (N, 1 + L)
        return np.sqrt(np.maximum(np.einsum('ni,ij,nj->n', z, precision, z), 0))


def cross_fit(score: DensityScore, features: np.ndarray, groups: list | None = None,
              folds: int = 50) -> np.ndarray:
    """Scores (N,) of normal images (N, F), each from a fit without it; then fits `score` on all.

    Images of one group (a patient) are left out together. One group at a time up to `folds` groups, so that
    the fits have nearly as many images as the final one, with which test images are scored; the rest errs
    towards fewer calls.
    """
    groups = list(range(len(features))) if groups is None else groups
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    fold = np.array([order[group] * min(folds, len(order)) // len(order) for group in groups])
    values = np.empty(len(features))
    for i in range(fold.max() + 1):
        # one patient alone leaves nothing to fit on
        score.fit_features(features[fold != i] if (fold != i).any() else features)
        values[fold == i] = score.score_features(features[fold == i])
    score.fit_features(features)
    return values


def nelbo_map(passes: Passes) -> Tensor | None:
    """Negative ELBO per pixel, nats: (B, 1, H, W); sums to the NELBO at posterior means."""
    maps = passes.maps()
    return maps and maps['recon'] + maps['kl'].sum(1, keepdim=True)


def llr_map(passes: Passes, k: int) -> Tensor | None:
    """log p(x|z), z from the posterior, minus the same with k groups from the prior, nats: (B, 1, H, W)."""
    return passes.maps() and passes.maps(k)['recon'] - passes.maps()['recon']


def absolute_error(passes: Passes) -> Tensor:
    """|x - reconstruction|, mean over channels: (B, 1, H, W)."""
    return (passes.x.float() - passes.reconstruction()).abs().mean(1, keepdim=True)


def kl_score(i: int) -> Score:
    """KL of group i, 1 = top."""
    return Score(f'kl_{i}', 'likelihood terms', f"KL of latent group {i} (1 = top), nats",
                 lambda passes: passes.mean(lambda terms: terms['kl'][:, i - 1]),
                 lambda passes: passes.maps() and passes.maps()['kl'][:, i - 1:i])


def llr_score(k: int) -> Score:
    """LLR>k (Havtorn et al. 2021, eq. 10), with the k groups nearest the image from the prior."""
    return Score(f'llr_{k}', 'likelihood terms', f"likelihood ratio LLR>{k} = L - L>{k}: what the {k} group"
                 f"{'s' if k > 1 else ''} nearest the image explain, nats",
                 lambda passes: passes.mean(elbo) - passes.mean(elbo, skip=k),
                 lambda passes: llr_map(passes, k))


# name -> scores for a model with L latent groups
SCORES: dict[str, Callable[[int], list[AnomalyScore]]] = {
    'reconstruction': lambda L: [Score(
        'reconstruction', 'reconstruct', "mean |x - reconstruction|",
        lambda passes: absolute_error(passes).double().mean((1, 2, 3)).cpu(), absolute_error)],
    'recon_nll': lambda L: [Score(
        'recon_nll', 'likelihood terms', "-log p(x|z), nats",
        lambda passes: passes.mean(lambda terms: terms['recon']),
        lambda passes: passes.maps() and passes.maps()['recon'])],
    'nelbo': lambda L: [Score(
        'nelbo', 'likelihood terms', "negative ELBO, nats", lambda passes: -passes.mean(elbo), nelbo_map)],
    'iw': lambda L: [Score(
        'iw', 'likelihood terms', "-log p(x), importance-weighted bound, nats",
        lambda passes: -iw_bound(passes.log_weights()))],
    'complexity': lambda L: [Score(
        'complexity', 'likelihood terms', "NELBO minus losslessly compressed size (PNG or LZMA), bits",
        lambda passes: -passes.mean(elbo) / math.log(2) - compressed_bits(passes.x, passes.bits))],
    'typicality': lambda L: [Typicality(
        'typicality', "|NELBO - mean NELBO of normal validation images|, nats")],
    'kl_profile': lambda L: [KLProfile(
        'kl_profile', "Mahalanobis distance of (recon, KL of every group) from normal validation images")],
    'kl': lambda L: [Score(
        'kl', 'likelihood terms', "KL, sum over groups, nats",
        lambda passes: passes.mean(lambda terms: terms['kl'].sum(1)),
        lambda passes: passes.maps() and passes.maps()['kl'].sum(1, keepdim=True))]
        + [kl_score(i) for i in range(1, L + 1) if L > 1],
    'llr': lambda L: [llr_score(k) for k in range(1, L)],
}


def check_capability(score: AnomalyScore, model: Any) -> None:
    """Raises UserError, naming the capability, if the model lacks what the score needs."""
    if score.needs and not hasattr(model, CAPABILITIES[score.needs]):
        raise UserError(f"score {score.name} needs a model with {score.needs}, which {type(model).__name__} "
                        f"has not. Leave it out of --scores.")


def choose_scores(names: Iterable[str], model: Any,
                  iw_samples: int = 1) -> tuple[list[AnomalyScore], list[str]]:
    """The scores that `names` ask for, in the table's order, and a line for each that 'all' had to leave out.

    A name is a row of SCORES or one member of a row (`llr_2`). Raises UserError for an unknown name, and for
    one that the model cannot give if it was asked for by name.
    """
    names, lines, chosen = tuple(names) or ('all',), [], []
    groups = getattr(model, 'num_groups', 0)
    known = {*SCORES, 'all'} | {score.name for row in SCORES.values() for score in row(groups)}
    for name in names:
        if name not in known:
            raise UserError(f"--scores {name}: no such score for a model with {groups} latent groups. "
                            f"Known: {', '.join(sorted(known))}.")
    for row, make in SCORES.items():
        rows = make(groups)
        if row in names and not rows:
            raise UserError(f"--scores {row} needs at least two latent groups, the model has {groups}.")
        for score in rows:
            asked = row in names or score.name in names
            if not asked and 'all' not in names:
                continue
            try:
                check_capability(score, model)
                if score.name == 'iw' and iw_samples < 1:
                    raise UserError("score iw needs --num_iw_samples of at least 1.")
            except UserError as error:
                if asked:
                    raise
                lines.append(f"left out: {error}")
                continue
            chosen.append(score)
    return chosen, lines
