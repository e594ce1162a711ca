"""Anomaly scores: one row of SCORES each, and the flags that they depend on. Larger = more anomalous.

B images, C channels, *S = (H, W) or (D, H, W), L latent groups from the top (1) down to the image (L), k
groups skipped, counted from the image up. L>k is the bound with these k groups from the prior, at its mode
as published or drawn; LLR>k = L - L>k. A score is a function of the Outputs of a model for one batch
(outputs.py); all scores of a batch share its forward passes.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from utils import UserError, flag, flags

if TYPE_CHECKING:
    from torch import Tensor

    from anomaly.density import Density
    from anomaly.outputs import Outputs

LESION_FRACTION = 0.01     # of an image: a lesion is small and would be lost in a mean over all pixels
WIDE_LESION_FRACTION = 0.05
SMALLEST_RESIDUAL = 1e-6   # of gray levels from 0 to 1, so that the log is finite
MSMA_MAPS = ('none', 'gradient', 'gradient_input', 'guided', 'gradcam')
NEED_CAPTUM = ('guided', 'gradcam')
LIKELIHOOD_DENSITIES = ('typicality', 'kl_profile', 'kl_knn', 'kl_gmm', 'latent_knn')

# capability that a score needs -> attribute of the model that shows it
CAPABILITIES = {'likelihood terms': 'num_groups', 'reconstructions': 'reconstruct',
                'encoder parameters': 'encoder_parameters', 'score norms': 'score_norms',
                'ODE likelihood': 'log_likelihood', 'voxel densities': 'voxel_nll',
                'statistics': 'statistics', 'latents': 'latents', 'inpainting': 'inpainting_map',
                'restoration': 'restoration_map'}


# ------------------------------------------------------------------------------------------------------ flags

@flags
class Selection:
    """Anomaly scores"""
    scores: tuple = flag((), "scores to compute: 'all', rows of the table such as nelbo, llr or complexity, "
                             "or one member of a row such as llr_2 or kl_1 (1 = top group); 'all' excludes "
                             "the slow scores regret, ode_nll, inpainting and restoration (default: all; "
                             "with --compare the primary scores)", basic=True)
    primary_score: str = flag('', "score shown in the figures, to be chosen before looking at any anomaly; "
                                  "'a+b' is the sum of the z-scores of a and b over normal validation "
                                  "images; '' = that of the model family, else nelbo, else the first "
                                  "computed", basic=True)

    @property
    def names(self) -> tuple[str, ...]:
        """`scores`, and the primary score where it is a sum, which is computed in any case."""
        return (*(self.scores or ('all',)), *([self.primary_score] if '+' in self.primary_score else ()))


@flags
class Scoring:
    """Computation of the scores

    All that a score depends on besides the model and the image; `seed` is that of the command. `scores` are
    the rows of SCORES that a flag is for.
    """
    num_draws: int = flag(4, 'draws of the latents over which every sampled score averages', least=1,
                          basic=True, scores='recon_nll nelbo complexity regret kl lk llr of_draws')
    num_iw_samples: int = flag(16, 'iw: importance samples per image', least=1, scores='iw')
    iw_samples_elbo: int = flag(1, 'llr: importance samples for each draw of L; 1 = the ELBO', least=1,
                                scores='llr')
    iw_samples_lk: int = flag(1, 'llr, lk: importance samples for each draw of L>k; 1 = the ELBO', least=1,
                              scores='llr lk')
    llr_noise: str = flag('separate', 'llr: noise of L and of L>k: separate, as published, or shared',
                          choices=('separate', 'shared'), scores='llr')
    llr_prior: str = flag('mode', 'llr, lk: skipped groups at the mode of the prior, as published, or drawn '
                                  'from it', choices=('mode', 'draw'), scores='llr lk')
    density_features: str = flag('means', 'typicality, kl_profile, kl_knn, kl_gmm, latent_knn: likelihood '
                                          'and KL at the posterior means, or averaged over the draws',
                                 choices=('means', 'draws'), scores=' '.join(LIKELIHOOD_DENSITIES))
    residual_smoothing: float = flag(1.0, 'residual: standard deviation in pixels of the Gaussian that '
                                          'smooths the residual; 0 = none', least=0, below=math.inf,
                                     scores='residual')
    residual_shift: int = flag(0, 'residual: average the residuals of the image and of a copy shifted by '
                                  'this number of pixels along every axis; 0 = the image alone', least=0,
                               scores='residual')
    regret_steps: int = flag(20, 'regret: Adam steps on the encoder for each image', least=1, scores='regret')
    regret_learning_rate: float = flag(1e-4, 'regret: learning rate of Adam', above=0, scores='regret')
    msma_levels: int = flag(20, 'msma: number of noise levels', least=1, scores='msma')
    msma_min_timestep: float = flag(0.01, 'msma: time of the lowest noise level, 0 to 1', above=0, most=1,
                                    scores='msma')
    msma_max_timestep: float = flag(1.0, 'msma: time of the highest noise level, 0 to 1', above=0, most=1,
                                    scores='msma')
    msma_schedule: str = flag('geometric', "msma: spacing of the noise levels; thinned = a subset of the "
                                           "sampler's steps", choices=('geometric', 'linear', 'thinned'),
                              scores='msma')
    msma_denoise: bool = flag(False, 'msma: remove the finest noise from the image first', scores='msma')
    msma_map: str = flag('none', "msma: anomaly map: magnitude of the gradient of the density's score with "
                                 "respect to the image, gradient times image, guided backpropagation, or "
                                 "GradCAM (the last two need captum); none = no map", choices=MSMA_MAPS,
                         scores='msma')
    seed: int = field(default=1, kw_only=True)

    def __post_init__(self):
        if self.msma_map in NEED_CAPTUM and importlib.util.find_spec('captum') is None:
            raise UserError(f"--msma_map {self.msma_map} needs captum: pip install -r "
                            f"requirements-medical.txt. Without it there are gradient and gradient_input.")
        if not self.msma_min_timestep < self.msma_max_timestep:
            raise UserError(f"--msma_min_timestep {self.msma_min_timestep} --msma_max_timestep "
                            f"{self.msma_max_timestep}: the first must be below the second.")

    @property
    def msma(self) -> dict[str, Any]:
        """Arguments of a model's `score_norms`."""
        return {'number': self.msma_levels, 'min_timestep': self.msma_min_timestep,
                'max_timestep': self.msma_max_timestep, 'schedule': self.msma_schedule,
                'denoised': self.msma_denoise}


def row_of(name: str) -> str:
    """The row of SCORES that a score belongs to: 'kl' of kl_2, kl_knn of itself."""
    return max((row for row in SCORES if name == row or name.startswith(f'{row}_')), key=len, default='')


def used_flags(names: Sequence[str], scoring: Scoring) -> list[Field]:
    """The fields of Scoring on which one of these scores depends, but for those of all."""
    rows = {row_of(name) for name in names}
    if scoring.density_features == 'draws' and not rows.isdisjoint(LIKELIHOOD_DENSITIES):
        rows.add('of_draws')
    return [one for one in fields(Scoring) if not rows.isdisjoint(one.metadata.get('scores', '').split())]


def check_used(scoring: Scoring, names: Sequence[str]) -> None:
    """Raises UserError for a flag that was set although none of the scores `names` depends on it."""
    used = used_flags(names, scoring)
    for one in fields(scoring):
        rows = [row for row in one.metadata.get('scores', '').split() if row in SCORES]
        if rows and one not in used and getattr(scoring, one.name) != one.default:
            raise UserError(f"--{one.name} does nothing, as no score {' or '.join(rows)} is computed: name "
                            f"one with --scores, or leave --{one.name} out.")


# ------------------------------------------------------------------------------------------------------ score

@dataclass(frozen=True)
class Score:
    """A score of an image: a function of the Outputs, a density of features on normal images, or a sum.

    A density is fitted to validation images, not training images: the model has seen the latter, so that
    their NELBO and KL are not those of a new normal image. normal.py fits it; its score follows from the
    features.
    """
    name: str
    needs: str                                            # capability of the model; '' = no model
    about: str                                            # one line for the report
    image: Callable[[Outputs], Tensor] | None = None      # -> (B,); None for a density
    map: Callable[[Outputs], Tensor] | None = None        # -> (B, 1, *S), where `has_map`
    features: Callable[[Outputs], Tensor] | None = None   # -> (B, D), what the density learns from
    density: Density | None = None                        # unfitted
    terms: tuple[str, ...] = ()                           # scores whose z-scores it adds up

    def flag_names(self, model: Any) -> tuple[str, ...]:
        """The names by which flags know it. DoSE of a score-based model is a density of norms, as MSMA is."""
        return (self.name, 'msma') if self.needs == 'statistics' and hasattr(model, 'score_norms') else (
            self.name,)

    def explained(self, model: Any, scoring: Scoring) -> str:
        """One line for the report, with the values of the flags on which it depends."""
        values = [f'{one.name} {getattr(scoring, one.name)}'
                  for one in used_flags(self.flag_names(model), scoring)]
        return f"{self.about} ({', '.join(values)})" if values else self.about

    def has_map(self, model: Any, scoring: Scoring) -> bool:
        """Whether it has a map for this model; a density has one where --msma_map asks for it."""
        return self.map is not None and (self.density is None or (
            scoring.msma_map != 'none' and hasattr(model, 'score_norm'))) and (
            self.needs != 'likelihood terms' or hasattr(model, 'maps'))


# -------------------------------------------------------------------------------------- functions of outputs

def bound_map(outputs: Outputs, k: int = 0) -> Tensor:
    """-L>k per pixel at posterior means, nats: (B, 1, *S); sums to the bound there, k = 0 to the NELBO."""
    return outputs.maps(k)['recon'] + outputs.maps(k)['kl'].sum(1, keepdim=True)


def absolute_error(outputs: Outputs) -> Tensor:
    """|x - reconstruction|, mean over channels: (B, 1, *S)."""
    return outputs.residual().abs().mean(1, keepdim=True)


def complexity(outputs: Outputs) -> Tensor:
    """NELBO minus losslessly compressed size (Serra et al. 2020), bits: (B,)."""
    from anomaly.baselines import compressed_bits
    return outputs.nelbo() / math.log(2) - compressed_bits(outputs.x, outputs.bits)


def highest(values: Tensor, inside: Tensor | None, fraction: float) -> Tensor:
    """Mean of this fraction of the values (B, 1, *S) `inside`, None = all, the highest: (B,) float64, CPU."""
    import torch
    chosen = [value.double() for value in (
        values.flatten(1) if inside is None else [value[where] for value, where in zip(values, inside)])]
    return torch.stack([one.topk(max(1, round(fraction * len(one)))).values.mean().cpu() for one in chosen])


def highest_voxels(outputs: Outputs, fraction: float) -> Tensor:
    """Mean -log p over this fraction of the foreground, its least likely voxels: (B,)."""
    return highest(outputs.ask('voxel_nll'), outputs.model.foreground(outputs.x), fraction)


def highest_residual(outputs: Outputs, fraction: float) -> Tensor:
    """Mean of the largest smoothed residuals, this fraction of an image, of a volume's foreground: (B,)."""
    from neural_operations import foreground
    is_volume = outputs.x.ndim == 5                         # most of its voxels are air, where nothing is
    return highest(outputs.smooth_residual(), foreground(outputs.x) if is_volume else None, fraction)


def msma_map(name: str, outputs: Outputs) -> Tensor:
    """Heat-map of the fitted density `name` of score norms, as --msma_map says: (B, 1, *S)."""
    from anomaly.attribution import density_map
    return density_map(outputs.densities[name], outputs)


# ------------------------------------------------------------------------------------------------ rows

def repair_score(kind: str, about: str) -> Score:
    """What the model would change of an image: 'inpainting' or 'restoration'."""
    from neural_operations import foreground
    error = lambda outputs: outputs.ask(f'{kind}_map')
    return Score(kind, kind, about, map=error,
                 image=lambda outputs: highest(error(outputs), foreground(outputs.x), 1.0))


def residual_scores() -> list[Score]:
    smooth = "absolute value of the smoothed x - reconstruction"
    return [
        Score('residual_top', 'reconstructions', f"{smooth}: mean of the highest 1 %",
              lambda outputs: highest_residual(outputs, LESION_FRACTION),
              lambda outputs: outputs.smooth_residual()),
        Score('residual_top5', 'reconstructions', f"{smooth}: mean of the highest 5 %",
              lambda outputs: highest_residual(outputs, WIDE_LESION_FRACTION)),
        Score('residual_mean', 'reconstructions', f"{smooth}: log of the mean",
              lambda outputs: highest_residual(outputs, 1.0).clamp(min=SMALLEST_RESIDUAL).log())]


def unfitted(kind: str, **options: Any) -> Density:
    """A class of density.py, which is imported when scores are chosen, and PyTorch with it."""
    from anomaly import density
    return getattr(density, kind)(**options)


def msma_scores() -> list[Score]:
    """Densities of the norms of the score at many levels of noise (Mahmood et al. 2021)."""
    from anomaly.density import GMM, KDE, KNN, PCAGMM, SADE_RULE
    from anomaly.flow_density import Flow
    norms = 'the norms of the score at many levels of noise'
    rows = {
        'msma_gmm': (f"-log density of {norms} under a Gaussian mixture fitted to normal validation images, "
                     f"nats", GMM(**SADE_RULE, images_per_feature=2)),
        'msma_knn': (f"distance of {norms} to the 5th nearest normal image",
                     KNN(k=5, scale=False)),
        'msma_kde': (f"-log density of {norms} under a kernel density estimate on normal validation images, "
                     f"nats", KDE()),
        'msma_pca_gmm': (f"-log density of 5 principal components of {norms} under a Gaussian mixture, nats",
                         PCAGMM(**SADE_RULE, images_per_feature=2)),
        'msma_flow': (f"-log density of {norms} under an autoregressive flow, nats", Flow())}
    return [Score(name, 'score norms', about, map=partial(msma_map, name),
                  features=lambda outputs: outputs.score_norms(), density=density)
            for name, (about, density) in rows.items()]


def kl_score(i: int) -> Score:
    """KL of group i, 1 = top."""
    return Score(f'kl_{i}', 'likelihood terms', f"KL of latent group {i} (1 = top), nats",
                 lambda outputs: outputs.mean(lambda terms: terms['kl'][:, i - 1]),
                 lambda outputs: outputs.maps()['kl'][:, i - 1:i])


def groups_nearest(k: int) -> str:
    return f"the {k} group{'s' if k > 1 else ''} nearest the image"


def lk_score(k: int) -> Score:
    """-L>k (Havtorn et al. 2021, eq. 8), with the k groups nearest the image from the prior."""
    return Score(f'lk_{k}', 'likelihood terms', f"-L>{k}: the negative bound, {groups_nearest(k)} from the "
                 f"prior, nats", lambda outputs: -outputs.bound(k), lambda outputs: bound_map(outputs, k))


def llr_score(k: int) -> Score:
    """LLR>k (Havtorn et al. 2021, eq. 10): the bound minus that with the k groups from the prior. Its map is
    log p(x|z), z from the posterior, minus the same with these groups from the prior, nats.
    """
    return Score(f'llr_{k}', 'likelihood terms', f"likelihood ratio LLR>{k} = L - L>{k}: what "
                 f"{groups_nearest(k)} explain{'s' if k == 1 else ''}, nats",
                 lambda outputs: outputs.bound() - outputs.bound(k),
                 lambda outputs: outputs.maps(k)['recon'] - outputs.maps()['recon'])


# name -> scores for a model with L latent groups
SCORES: dict[str, Callable[[int], list[Score]]] = {
    'reconstruction': lambda L: [Score(
        'reconstruction', 'reconstructions', "mean |x - reconstruction|",
        lambda outputs: absolute_error(outputs).double().flatten(1).mean(1).cpu(), absolute_error)],
    'residual': lambda L: residual_scores(),
    'recon_nll': lambda L: [Score(
        'recon_nll', 'likelihood terms', "-log p(x|z), nats",
        lambda outputs: outputs.mean(lambda terms: terms['recon']),
        lambda outputs: outputs.maps()['recon'])],
    'nelbo': lambda L: [Score(
        'nelbo', 'likelihood terms', "negative ELBO, nats", lambda outputs: outputs.nelbo(), bound_map)],
    'iw': lambda L: [Score(
        'iw', 'likelihood terms', "-log p(x), importance-weighted bound, nats",
        lambda outputs: -outputs.iw_bound(range(outputs.scoring.num_iw_samples)))],
    'complexity': lambda L: [Score(
        'complexity', 'likelihood terms', "NELBO minus losslessly compressed size (PNG or LZMA), bits",
        complexity)],
    'regret': lambda L: [Score(
        'regret', 'encoder parameters', "likelihood regret: gain of the bound when the encoder is fitted to "
        "the image alone, nats", lambda outputs: outputs.regret())],
    'typicality': lambda L: [Score(
        'typicality', 'likelihood terms', "|NELBO - mean NELBO of normal images|, nats",
        features=lambda outputs: outputs.likelihood_features(), density=unfitted('Typicality'))],
    'kl_profile': lambda L: [Score(
        'kl_profile', 'likelihood terms', "Mahalanobis distance of the log KL of every group from normal "
        "images", features=lambda outputs: outputs.log_kl(), density=unfitted('Mahalanobis'))][:L],
    'kl_knn': lambda L: [Score(
        'kl_knn', 'likelihood terms', "distance of the log KL of every latent channel to the 2nd nearest "
        "normal image", features=lambda outputs: outputs.log_kl(channels=True),
        density=unfitted('KNN', k=2))][:L],
    'kl_gmm': lambda L: [Score(
        'kl_gmm', 'likelihood terms', "-log density of the log KL of every group under a Gaussian mixture "
        "fitted to normal validation images, nats", features=lambda outputs: outputs.log_kl(),
        density=unfitted('GMM'))][:L],
    'latent_knn': lambda L: [Score(                          # each channel counts alike
        'latent_knn', 'latents', "distance of the log KL and the log spread over positions of every latent "
        "channel to the 2nd nearest normal image",
        features=lambda outputs: outputs.latent_features(), density=unfitted('KNN', k=2))][:L],
    'dose': lambda L: [                                      # DoSE, Morningstar et al. 2021
        Score('dose', 'statistics', "density of statistics: log mean distance of the model's statistics, "
              "whitened, to the 5 nearest normal images",
              features=lambda outputs: outputs.statistics(), density=unfitted('WhitenedKNN', k=5, log=True)),
        Score('dose_mahalanobis', 'statistics', "log Mahalanobis distance of the model's statistics from "
              "normal images", features=lambda outputs: outputs.statistics(),
              density=unfitted('Mahalanobis', log=True))],
    'msma': lambda L: msma_scores(),
    'inpainting': lambda L: [repair_score(
        'inpainting', "mean |inpainted - x| of the foreground, each half of a checkerboard inpainted from "
        "the other")],
    'restoration': lambda L: [repair_score(
        'restoration', "mean |restored - x| of the foreground, noised by a quarter of the steps and "
        "denoised")],
    'ode_nll': lambda L: [Score(
        'ode_nll', 'ODE likelihood', "-log p(x) by the probability flow ODE, nats",
        lambda outputs: -outputs.ask('log_likelihood').double())],
    'voxel_nll': lambda L: [
        Score('voxel_nll', 'voxel densities', "-log density of the norms of the score around a voxel, nats: "
              "mean over the least likely 1 % of the foreground",
              lambda outputs: highest_voxels(outputs, LESION_FRACTION),
              lambda outputs: outputs.ask('voxel_nll')),
        Score('voxel_nll_mean', 'voxel densities', "the same, mean over the foreground, nats",
              lambda outputs: highest_voxels(outputs, 1.0))],
    'kl': lambda L: [Score(
        'kl', 'likelihood terms', "KL, sum over groups, nats",
        lambda outputs: outputs.mean(lambda terms: terms['kl'].sum(1)),
        lambda outputs: outputs.maps()['kl'].sum(1, keepdim=True))][:L]
        + [kl_score(i) for i in range(1, L + 1) if L > 1],
    'lk': lambda L: [lk_score(k) for k in range(1, L)],
    'llr': lambda L: [llr_score(k) for k in range(1, L)],
}
# rows that 'all' leaves out: they take many times the forward passes of others
ON_REQUEST = ('regret', 'ode_nll', 'inpainting', 'restoration')
