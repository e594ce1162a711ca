"""Anomaly scores of models with a likelihood: functions of the passes of a batch, larger = more anomalous.

B images, C channels, H x W pixels, L latent groups from the top (1) down to the image (L), k groups skipped,
counted from the image up. L>k is the bound with these k groups from the prior, LLR>k = L - L>k. Passes and
bounds are those of passes.py, densities those of density.py; all scores of a batch share its passes.
"""

import lzma
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from anomaly.attribution import density_map
from anomaly.config import ScoreConfig
from anomaly.density import GMM, KDE, KNN, PCAGMM, SADE_RULE, Density, DensityScore, Mahalanobis, Typicality
from anomaly.flow_density import Flow
from anomaly.passes import (
    Passes,
    Scores,
    as_passes,
    check_capability,
    elbo,
    has_capability,
    iw_bound,
    log_weight,
)
from anomaly.regret import likelihood_regret
from neural_operations import foreground
from readers.images.png import png_bytes
from utils import UserError

# what the other floors and users take from here
__all__ = ['SCORES', 'AnomalyScore', 'Passes', 'Score', 'ScoreConfig', 'Scores', 'choose_scores', 'elbo',
           'iw_bound', 'log_weight']

LESION_SHARE = 0.01        # of the foreground: a lesion is small, and would be lost in a mean over all


# ----------------------------------------------------------------------------------------- compressed size

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


def lzma_bytes(values: np.ndarray) -> int:
    """Size in bytes of the raw values under LZMA2, without container or header."""
    filters = [{'id': lzma.FILTER_LZMA2, 'preset': 6}]
    return len(lzma.compress(values.tobytes(), lzma.FORMAT_RAW, filters=filters))


# ------------------------------------------------------------------------------------------------- the scores

class AnomalyScore(Protocol):
    """What detect.py and the user ask of a score."""
    name: str
    about: str                                       # one line for the report
    needs: str                                       # the capability; '' = no model

    def fit(self, model: Any, normal: Iterable[Tensor]) -> None:
        """Learns from batches of normal images (B, C, H, W), where there is something to learn."""
    def __call__(self, model: Any, x: Tensor | None = None, with_map: bool = True) -> Scores:
        """Scores of the images. A `Passes` in place of the model shares its passes and needs no `x`."""


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


def bound_map(passes: Passes, k: int = 0) -> Tensor | None:
    """-L>k per pixel at posterior means, nats: (B, 1, H, W); sums to the bound there, k = 0 to the NELBO."""
    maps = passes.maps(k)
    return maps and maps['recon'] + maps['kl'].sum(1, keepdim=True)


def llr_map(passes: Passes, k: int) -> Tensor | None:
    """log p(x|z), z from the posterior, minus the same with k groups from the prior, nats: (B, 1, H, W)."""
    return passes.maps() and passes.maps(k)['recon'] - passes.maps()['recon']


def absolute_error(passes: Passes) -> Tensor:
    """|x - reconstruction|, mean over channels: (B, 1, H, W)."""
    return passes.residual().abs().mean(1, keepdim=True)


def body_mean(passes: Passes, kind: str) -> Tensor:
    """Mean of a repair's error over the foreground of the image: (B,) float64."""
    inside = foreground(passes.x).flatten(1).double()                                            # (B, pixels)
    errors = passes.repair_error(kind).flatten(1).double()
    return ((errors * inside).sum(1) / inside.sum(1)).cpu()


def repair_score(kind: str, about: str) -> Score:
    """What the model would change of an image (B, C, *S): 'inpainting' or 'restoration'."""
    return Score(kind, kind, about, lambda passes: body_mean(passes, kind),
                 lambda passes: passes.repair_error(kind))


NORMS = 'the norms of the score at many levels of noise'


def msma_score(name: str, about: str, density: Density) -> DensityScore:
    """A density of the norms of the score at many levels of noise (Mahmood et al. 2021)."""
    return DensityScore(name, about, density, 'score norms', Passes.score_norms, density_map)


def kl_score(i: int) -> Score:
    """KL of group i, 1 = top."""
    return Score(f'kl_{i}', 'likelihood terms', f"KL of latent group {i} (1 = top), nats",
                 lambda passes: passes.mean(lambda terms: terms['kl'][:, i - 1]),
                 lambda passes: passes.maps() and passes.maps()['kl'][:, i - 1:i])


def groups_nearest(k: int) -> str:
    return f"the {k} group{'s' if k > 1 else ''} nearest the image"


def lk_score(k: int) -> Score:
    """-L>k (Havtorn et al. 2021, eq. 8), with the k groups nearest the image from the prior."""
    return Score(f'lk_{k}', 'likelihood terms', f"-L>{k}: the negative bound, {groups_nearest(k)} from the "
                 f"prior, nats", lambda passes: -passes.bound(k), lambda passes: bound_map(passes, k))


def llr_score(k: int) -> Score:
    """LLR>k (Havtorn et al. 2021, eq. 10): the bound minus that with the k groups from the prior."""
    return Score(f'llr_{k}', 'likelihood terms', f"likelihood ratio LLR>{k} = L - L>{k}: what "
                 f"{groups_nearest(k)} explain{'s' if k == 1 else ''}, nats",
                 lambda passes: passes.bound() - passes.bound(k), lambda passes: llr_map(passes, k))


def highest_voxels(passes: Passes, share: float) -> Tensor:
    """Mean -log p over this share of the foreground, its least likely voxels, float64 on the CPU: (B,)."""
    means = []
    for nll, inside in zip(passes.voxel_nll(), foreground(passes.x)):
        values = nll[inside].double()
        means.append(values.topk(max(1, round(share * len(values)))).values.mean().cpu())
    return torch.stack(means)


# name -> scores for a model with L latent groups
SCORES: dict[str, Callable[[int], list[AnomalyScore]]] = {
    'reconstruction': lambda L: [Score(
        'reconstruction', 'reconstructions', "mean |x - reconstruction|",
        lambda passes: absolute_error(passes).double().flatten(1).mean(1).cpu(), absolute_error)],
    'recon_nll': lambda L: [Score(
        'recon_nll', 'likelihood terms', "-log p(x|z), nats",
        lambda passes: passes.mean(lambda terms: terms['recon']),
        lambda passes: passes.maps() and passes.maps()['recon'])],
    'nelbo': lambda L: [Score(
        'nelbo', 'likelihood terms', "negative ELBO, nats", lambda passes: -passes.mean(elbo), bound_map)],
    'iw': lambda L: [Score(
        'iw', 'likelihood terms', "-log p(x), importance-weighted bound, nats",
        lambda passes: -iw_bound(passes.log_weights()))],
    'complexity': lambda L: [Score(
        'complexity', 'likelihood terms', "NELBO minus losslessly compressed size (PNG or LZMA), bits",
        lambda passes: -passes.mean(elbo) / math.log(2) - compressed_bits(passes.x, passes.bits))],
    'regret': lambda L: [Score(
        'regret', 'encoder parameters', "likelihood regret: what the bound gains when the encoder is fitted "
        "to the image alone, nats", likelihood_regret)],
    'typicality': lambda L: [DensityScore(
        'typicality', "|NELBO - mean NELBO of normal validation images|, nats", Typicality())],
    'kl_profile': lambda L: [DensityScore(
        'kl_profile', "Mahalanobis distance of (recon, KL of every group) from normal validation images",
        Mahalanobis())],
    'kl_knn': lambda L: [DensityScore(
        'kl_knn', "distance of (recon, KL of every group) to the 5th nearest normal validation image",
        KNN(k=5))],
    'kl_gmm': lambda L: [DensityScore(
        'kl_gmm', "-log density of (recon, KL of every group) under a mixture of normals fitted to normal "
        "validation images, nats", GMM())],
    'msma': lambda L: [
        msma_score('msma_gmm', f"-log density of {NORMS} under a mixture of normals fitted to normal "
                   "validation images, nats", GMM(**SADE_RULE, images_per_feature=2)),
        msma_score('msma_knn', f"distance of {NORMS} to the 5th nearest normal validation image",
                   KNN(k=5, scale=False)),
        msma_score('msma_kde', f"-log density of {NORMS}, a kernel on each normal validation image, nats",
                   KDE()),
        msma_score('msma_pca_gmm', f"-log density of 5 principal components of {NORMS} under a mixture of "
                   "normals, nats", PCAGMM(**SADE_RULE, images_per_feature=2)),
        msma_score('msma_flow', f"-log density of {NORMS} under an autoregressive flow, nats", Flow())],
    'inpainting': lambda L: [repair_score(
        'inpainting', "mean |inpainted - x| of the body, half of a checkerboard foretold from the rest")],
    'restoration': lambda L: [repair_score(
        'restoration', "mean |restored - x| of the body, noised by a quarter of the steps and denoised")],
    'ode_nll': lambda L: [Score(
        'ode_nll', 'ODE likelihood', "-log p(x) by the probability flow, nats",
        lambda passes: passes.ode_nll())],
    'voxel_nll': lambda L: [
        Score('voxel_nll', 'voxel densities', "-log density of the norms of the score around a voxel, nats: "
              "mean over the least likely 1 % of the foreground",
              lambda passes: highest_voxels(passes, LESION_SHARE), Passes.voxel_nll),
        Score('voxel_nll_mean', 'voxel densities', "the same, mean over the foreground, nats",
              lambda passes: highest_voxels(passes, 1.0))],
    'kl': lambda L: [Score(
        'kl', 'likelihood terms', "KL, sum over groups, nats",
        lambda passes: passes.mean(lambda terms: terms['kl'].sum(1)),
        lambda passes: passes.maps() and passes.maps()['kl'].sum(1, keepdim=True))]
        + [kl_score(i) for i in range(1, L + 1) if L > 1],
    'lk': lambda L: [lk_score(k) for k in range(1, L)],
    'llr': lambda L: [llr_score(k) for k in range(1, L)],
}
# rows that 'all' leaves out: they take many times the passes of others
ON_REQUEST = ('regret', 'ode_nll', 'inpainting', 'restoration')


def choose_scores(names: Iterable[str], model: Any,
                  iw_samples: int = 1) -> tuple[list[AnomalyScore], list[str]]:
    """The scores that `names` ask for, in the table's order, and lines that say what 'all' had to leave out.

    A name is a row of SCORES or one member of a row (`llr_2`). Raises UserError for an unknown name, and for
    one that the model cannot give if it was asked for by name.
    """
    names, lines, chosen = tuple(names) or ('all',), [], []
    lacking: dict[str, list[str]] = {}                       # capability -> scores that need it
    groups = getattr(model, 'num_groups', 0)
    members = {row: [s.name for s in make(groups) if s.name != row] for row, make in SCORES.items()}
    known = {'all', *members, *(name for row in members.values() for name in row)}
    for name in names:
        if name not in known:
            ranges = [' to '.join(dict.fromkeys((row[0], row[-1]))) for row in members.values() if row]
            raise UserError(f"--scores {name}: no such score for a model with {groups} latent groups. "
                            f"Known: {', '.join(['all', *members, *ranges])}.")
    for row, make in SCORES.items():
        rows = make(groups)
        if row in names and not rows:
            raise UserError(f"--scores {row} needs at least two latent groups, the model has {groups}.")
        for score in rows:
            asked = row in names or score.name in names
            if not asked and ('all' not in names or row in ON_REQUEST):
                continue
            if asked:
                check_capability(score, model)
            if not has_capability(score, model):
                lacking.setdefault(score.needs, []).append(score.name)
            elif score.name == 'iw' and iw_samples < 1:
                if asked:
                    raise UserError("score iw needs --num_iw_samples of at least 1.")
                lines.append("left out: iw, which needs --num_iw_samples of at least 1")
            else:
                chosen.append(score)
    lines += [f"left out, as this model has no {needs}: {', '.join(scores)}"
              for needs, scores in lacking.items()]
    return chosen, lines
