"""Densities of features of normal images: what is far from them, or rare among them, is anomalous.

N images, D features each, K components of a mixture. A density learns with `fit(features)`, features (N, D),
and `score(features)` gives (N,), larger = more anomalous: `KNN(k=5).fit(normal).score(new)`. What was learned
is plain arrays: `state()`, and `from_state` on the same class gives the same scores, bit by bit. `energy` is
the score in torch, for gradients.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from utils import UserError

SIGNIFICANT = 0.05           # of tests whether training images differ
SMALLEST = 1e-12             # of a distance whose logarithm is taken
RIDGE = 1e-9                 # added to the variances of standardized features, as one may be constant
ROWS = 1024                  # that are scored at once: their distances to all normal images are in memory
GMM_RIDGE = 1e-3             # the same for a component of a mixture, which may have few images
CHOOSING_FOLDS = 5           # of the cross-validation that chooses a mixture, or a kernel and its bandwidth
MOST_TO_CHOOSE = 2000        # images with which it chooses a kernel: its time grows with their square
COVARIANCES = ('full', 'diag')
# Arguments of GMM as published in 3D (SADE).
SADE_RULE = {'components': (3, 4, 5), 'covariances': ('full',), 'quantile': 0.1, 'reg_covar': 1e-6,
             'max_iter': 100_000}


class Density(ABC):
    """What densities have in common. Features that are not finite are ignored by `fit` and score NaN."""
    learned: ClassVar[tuple[str, ...]] = ()     # attributes that `fit` sets, numbers and arrays
    least = 2                           # smallest number of images to learn from
    folds = 50                          # largest number of fits of `cross_fit`
    scale = True                        # whether `standardize` does so
    takes_training = True               # whether training images help: not where a cross-validation chooses

    @abstractmethod
    def learn(self, features: np.ndarray) -> None:
        """Learns from finite features (N, D) of normal images."""

    @abstractmethod
    def energy(self, features: Tensor) -> Tensor:
        """Scores (N,) of features (N, D), float64, differentiable; not finite where the features are not."""

    def fit(self, features: np.ndarray) -> Self:
        """Learns from features (N, D) of normal images. Raises UserError for too few."""
        features = np.asarray(features, np.float64)
        features = features[np.isfinite(features).all(1)]
        if len(features) < self.least:
            raise UserError(f"{type(self).__name__} learns from at least {self.least} normal images, not "
                            f"{len(features)}. Raise --val_fraction, or name other --scores.")
        self.learn(features)
        self.keep(vars(self))
        return self

    @torch.no_grad()
    def score(self, features: np.ndarray) -> np.ndarray:
        """Scores (N,) of features (N, D), float64, larger = more anomalous; NaN where they are not finite."""
        features = np.asarray(features, np.float64)
        values, known = np.full(len(features), np.nan), np.isfinite(features).all(1)
        if known.any():
            rows = torch.tensor(features[known]).split(ROWS)
            values[known] = torch.cat([self.energy(some) for some in rows]).numpy()
        return values

    def state(self) -> dict[str, np.ndarray]:
        """What was learned, as arrays."""
        return {name: getattr(self, name) for name in self.learned}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The density that has learned `state`: arrays, or lists as JSON keeps them. Raises KeyError."""
        density = cls()
        density.keep(state)
        return density

    def keep(self, values: Mapping[str, Any]) -> None:
        """Sets what is learned from numbers, lists or arrays, in one memory order: sums round alike."""
        for name in self.learned:
            setattr(self, name, np.array(values[name], order='C'))

    def tensor(self, name: str) -> Tensor:
        """What was learned by this name, float64."""
        return torch.tensor(getattr(self, name), dtype=torch.float64)

    def standardize(self, features: np.ndarray) -> np.ndarray:
        """Sets mean and std (D,), or without `scale` 0 and 1; returns what they make of features (N, D)."""
        self.mean, self.std = np.zeros(features.shape[1]), np.ones(features.shape[1])
        if self.scale:
            self.mean, self.std = features.mean(0), features.std(0)
            self.std[self.std <= 1e-9 * np.maximum(1, np.abs(self.mean))] = 1   # constant: a collapsed group
        return self.standardized(torch.from_numpy(features)).numpy()

    def standardized(self, features: Tensor) -> Tensor:
        return (features - self.tensor('mean')) / self.tensor('std')


class Typicality(Density):
    """|sum of the features - its mean over normal images| (Nalisnick et al. 2019, with batches of one image).

    For likelihood terms this is |NELBO - mean NELBO|, nats.
    """
    learned, least = ('mean',), 1

    def learn(self, features: np.ndarray) -> None:
        self.mean = features.sum(1).mean()

    def energy(self, features: Tensor) -> Tensor:
        return (features.sum(1) - self.tensor('mean')).abs()


@dataclass(eq=False)
class Mahalanobis(Density):
    """Mahalanobis distance from normal images, in standard deviations, or its logarithm.

    The covariance of the standardized features is shrunk (Ledoit and Wolf 2004), so that there may be as many
    features as images.
    """
    log: bool = False           # of logarithms, sums of scores are less dominated by the farthest images
    learned, least = ('mean', 'std', 'root', 'log'), 3

    def learn(self, features: np.ndarray) -> None:
        from sklearn.covariance import ledoit_wolf
        covariance, _ = ledoit_wolf(self.standardize(features))
        values, vectors = np.linalg.eigh(covariance + RIDGE * np.eye(len(self.mean)))
        self.root = vectors / np.sqrt(values) @ vectors.T                                  # of the precision

    def whitened(self, features: Tensor) -> Tensor:
        """Features (N, D) with about unit covariance on normal images."""
        return self.standardized(features) @ self.tensor('root')

    def distance(self, features: Tensor) -> Tensor:
        return self.whitened(features).norm(dim=1)

    def energy(self, features: Tensor) -> Tensor:
        distance = self.distance(features)
        return distance.clamp(min=SMALLEST).log() if self.log else distance


@dataclass(eq=False)
class WhitenedKNN(Mahalanobis):
    """Mean distance to the k nearest normal images, all if there are fewer, of whitened features."""
    k: int = 5
    learned = (*Mahalanobis.learned, 'reference', 'k')

    def learn(self, features: np.ndarray) -> None:
        super().learn(features)
        self.reference = self.whitened(torch.from_numpy(features)).numpy()                          # (N, D)

    def distance(self, features: Tensor) -> Tensor:
        return to_nearest(self.tensor('reference'), self.whitened(features), int(self.k)).mean(1)


@dataclass(eq=False)
class KNN(Density):
    """Euclidean distance to the k-th nearest normal image, or to the farthest if there are fewer than k."""
    k: int = 5
    scale: bool = True          # distances are between standardized features
    learned = ('mean', 'std', 'reference', 'k')

    def learn(self, features: np.ndarray) -> None:
        self.reference = self.standardize(features)                                                 # (N, D)

    def energy(self, features: Tensor) -> Tensor:
        return to_nearest(self.tensor('reference'), self.standardized(features), int(self.k))[:, -1]


def to_nearest(reference: Tensor, z: Tensor, k: int) -> Tensor:
    """Distances (N, k) from rows of z (N, D) to the nearest of `reference` (M, D), rising; all if M < k."""
    rows = distances(z.detach().nan_to_num(0, 0, 0), reference).topk(min(k, len(reference)), largest=False)
    return (z[:, None] - reference[rows.indices]).norm(dim=2)


def distances(z: Tensor, reference: Tensor) -> Tensor:
    """Distances (N, M) from rows of z (N, D) to those of `reference` (M, D)."""
    # Of differences, not products of matrices: exact, and a row does not depend on how many others there are.
    return torch.cdist(z, reference, compute_mode='donot_use_mm_for_euclid_dist')


@dataclass(eq=False)
class KDE(Density):
    """-log density of a kernel density estimate, nats, with a kernel on every normal image.

    Kernel and bandwidth, of which all pairs are tried, maximize the log density of left-out images in a
    cross-validation, which is determined by `seed`. As published, features are not scaled, and a bandwidth is
    in their unit.
    """
    kernels: Sequence[str] = ('gaussian', 'exponential')
    bandwidths: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    seed: int = 0
    learned, folds, takes_training = ('reference', 'kernel', 'bandwidth'), 10, False

    def learn(self, features: np.ndarray) -> None:
        self.reference = features                                                                   # (N, D)
        subset = np.random.default_rng(self.seed).permutation(len(features))[:MOST_TO_CHOOSE]
        self.kernel, self.bandwidth = cross_validated(
            self.reference[subset], list(itertools.product(self.kernels, self.bandwidths)), self.estimate,
            CHOOSING_FOLDS, self.seed)

    def estimate(self, z: np.ndarray, kernel: str, bandwidth: float) -> Any:
        """scikit-learn's estimate, fitted to features (N, D)."""
        from sklearn.neighbors import KernelDensity
        return KernelDensity(kernel=str(kernel), bandwidth=float(bandwidth)).fit(z)

    def energy(self, features: Tensor) -> Tensor:
        number, d = self.reference.shape
        u = distances(features, self.tensor('reference')) / self.tensor('bandwidth')
        if self.kernel == 'exponential':          # its integral is S^(d-1) (d - 1)!, S the area of the sphere
            log_kernel = -u - math.log(2 * math.pi ** (d / 2)) + math.lgamma(d / 2) - math.lgamma(d)
        else:
            log_kernel = -u ** 2 / 2 - d / 2 * math.log(2 * math.pi)
        return math.log(number) + d * self.tensor('bandwidth').log() - torch.logsumexp(log_kernel, dim=1)


@dataclass(eq=False)
class GMM(Density):
    """-log density of the standardized features under a Gaussian mixture, nats.

    The number of components and the type of their covariances maximize the log density of left-out images in
    a cross-validation, which is determined by `seed`: few images get a single component. (BIC would prefer
    components that have collapsed onto two or three images.) All pairs of `components` and `covariances`
    ('full' or 'diag') are tried, except for those with fewer than two images, or `images_per_feature` for
    each feature, per component; if none is left, fewer components of both types are tried. They are compared
    by the sum of the log density of left-out images, or by its `quantile`.
    """
    components: Sequence[int] = (1, 2, 3, 4, 5)
    covariances: Sequence[str] = COVARIANCES
    seed: int = 0
    quantile: float | None = None
    choosing_folds: int = CHOOSING_FOLDS
    images_per_feature: int = 0
    reg_covar: float = GMM_RIDGE        # this and the next are arguments of scikit-learn's GaussianMixture
    max_iter: int = 100
    learned, least, folds = ('mean', 'std', 'weights', 'centers', 'roots'), 4, 10
    takes_training = False

    def learn(self, features: np.ndarray) -> None:
        z = self.standardize(features)                                                                # (N, D)
        best = self.mixture(z, *self.choose(z))
        self.weights, self.centers, roots = best.weights_, best.means_, best.precisions_cholesky_
        self.roots = roots if roots.ndim == 3 else np.stack([np.diag(root) for root in roots])     # (K, D, D)

    def choose(self, z: np.ndarray) -> tuple[int, str]:
        """The number of components and the type of covariance."""
        pairs = list(itertools.product(self.components, self.covariances))
        if len(pairs) == 1:
            return pairs[0]
        left = len(z) - len(z) // min(self.choosing_folds, len(z))
        most = left // max(2, self.images_per_feature * z.shape[1])
        fewer = range(1, max(2, min(min(self.components), left // 2 + 1)))
        tried = [pair for pair in pairs if pair[0] <= most] or list(itertools.product(fewer, COVARIANCES))
        total = np.sum if self.quantile is None else lambda values: np.quantile(values, self.quantile)
        return cross_validated(z, tried, self.mixture, self.choosing_folds, self.seed, total)

    def mixture(self, z: np.ndarray, components: int, covariance: str) -> Any:
        """scikit-learn's mixture, fitted to standardized features (N, D)."""
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', ConvergenceWarning)      # left-out images decide
            return GaussianMixture(components, covariance_type=covariance, random_state=self.seed,
                                   reg_covar=self.reg_covar, max_iter=self.max_iter).fit(z)

    def energy(self, features: Tensor) -> Tensor:
        z, roots = self.standardized(features), self.tensor('roots')
        # R R' is the precision, R triangular: log N = log |R| - |R'(z - center)|^2 / 2 - D / 2 log(2 pi)
        white = torch.einsum('nkd,kde->nke', z[:, None] - self.tensor('centers'), roots)           # (N, K, D)
        log_det = roots.diagonal(dim1=1, dim2=2).log().sum(1)                                           # (K,)
        log_normal = log_det - 0.5 * white.square().sum(2) - 0.5 * z.shape[1] * math.log(2 * math.pi)
        return -torch.logsumexp(self.tensor('weights').log() + log_normal, dim=1)                       # (N,)


@dataclass(eq=False)
class PCAGMM(GMM):
    """GMM of the first principal components of the features, at most `dimensions`, scaled to variance 1.

    The features are not scaled before, so those with the largest variances dominate.
    """
    dimensions: int = 5
    learned = ('mean', 'axes', 'weights', 'centers', 'roots')

    def standardize(self, features: np.ndarray) -> np.ndarray:
        """Sets mean (D,) and axes (D, d); returns the principal components (N, d)."""
        self.mean = features.mean(0)
        _, spread, axes = np.linalg.svd(features - self.mean, full_matrices=False)
        spread = spread[:self.dimensions] / math.sqrt(len(features))
        varies = spread > 1e-9 * max(1, np.abs(self.mean).max())
        scale = np.where(varies, spread, 1)
        varies[0] = True                                              # keep one component, even if constant
        self.axes = axes[:len(varies)][varies].T / scale[varies]
        return self.standardized(torch.from_numpy(features)).numpy()

    def standardized(self, features: Tensor) -> Tensor:
        return (features - self.tensor('mean')) @ self.tensor('axes')


def cross_validated(z: np.ndarray, tried: list[tuple], make: Callable[..., Any], folds: int, seed: int,
                    total: Callable[[np.ndarray], float] = np.sum) -> tuple:
    """The arguments, among those `tried`, for which `make(z, *arguments)` gives left-out rows of z (N, D) the
    largest log density, `total` over a fold, summed over the folds.
    """
    folds = min(folds, len(z))
    fold = np.random.default_rng(seed).permutation(len(z)) * folds // len(z)
    return max(tried, key=lambda arguments: sum(
        total(make(z[fold != i], *arguments).score_samples(z[fold == i])) for i in range(folds)))


def are_alike(training: np.ndarray, validation: np.ndarray) -> bool:
    """Whether no feature of training images (M, D) is distributed otherwise than that of validation images
    (N, D): two-sided Mann-Whitney tests at 5 %, with Bonferroni's correction.

    A model has seen its training images: where it has fitted them better than others, they do not tell what
    is normal.
    """
    from scipy.stats import mannwhitneyu
    training, validation = (values[np.isfinite(values).all(1)] for values in (training, validation))
    if not len(training) or not len(validation):
        return False
    return bool(np.nan_to_num(mannwhitneyu(training, validation).pvalue, nan=1.0).min()
                > SIGNIFICANT / training.shape[1])


def cross_fit(density: Density, features: np.ndarray, groups: list | None = None,
              more: np.ndarray | None = None) -> np.ndarray:
    """Scores (N,) of the features (N, D) of normal images, each from a fit without it; then fits all.

    `more` features (M, D), of training images, take part in every fit.
    Images of one of the `groups` (N,), such as a patient, are left out together: one group at a time up to
    `folds` groups. The fits then have nearly as many images as the final one, which scores test images; what
    difference remains makes thresholds higher.
    """
    groups = list(range(len(features))) if groups is None else groups
    more = features[:0] if more is None else more
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    number = min(density.folds, len(order))
    fold = np.array([order[group] * number // len(order) for group in groups])
    values = np.empty(len(features))
    for i in range(number):
        # with a single patient nothing would be left to fit
        others = fold != i if (fold != i).any() or len(more) else fold == i
        density.fit(np.concatenate([more, features[others]]))
        values[fold == i] = density.score(features[fold == i])
    density.fit(np.concatenate([more, features]))
    return values
