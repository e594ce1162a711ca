"""Densities of features of normal images: what is far from them, or rare among them, is anomalous.

N images, D features each, K components of a mixture. A density learns with `fit(features)`, features (N, D),
and `score(features)` gives (N,), larger = more anomalous. It stands alone
(`KNN(k=5).fit(normal).score(new)`) or, in a `DensityScore`, learns from features of images:
likelihood terms (N, 1 + L), see `Passes.features`, or norms of scores (N, n). What was learned is plain
arrays: `state()`, and `from_state` on the same class gives the same scores, bit by bit.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from anomaly.passes import Passes, Scores, as_passes, check_capability
from utils import UserError

RIDGE = 1e-9                 # variance added to standardised features, so that a constant one has an inverse
GMM_RIDGE = 1e-3             # the same for a component of a mixture, which may hold few images
CHOOSING_FOLDS = 5           # of the cross-validation that chooses a mixture


class Density:
    """What densities share. Rows that are not finite teach nothing and score NaN, which detect.py calls."""
    learned: tuple[str, ...] = ()       # attributes that `fit` sets, numbers and arrays
    least = 2                           # images to learn from
    folds = 50                          # fits that `cross_fit` makes at most

    def learn(self, features: np.ndarray) -> None:
        """Learns from finite features (N, D) of normal images."""
        raise NotImplementedError

    def rate(self, features: np.ndarray) -> np.ndarray:
        """Scores (N,) of finite features (N, D)."""
        raise NotImplementedError

    @property
    def fitted(self) -> bool:
        return all(hasattr(self, name) for name in self.learned)

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

    def score(self, features: np.ndarray) -> np.ndarray:
        """How far from normal features (N, D) are: (N,) float64, larger = more anomalous; NaN stays NaN."""
        features = np.asarray(features, np.float64)
        values, known = np.full(len(features), np.nan), np.isfinite(features).all(1)
        if known.any():
            values[known] = self.rate(features[known])
        return values

    def state(self) -> dict[str, np.ndarray]:
        """What was learned, as arrays."""
        return {name: getattr(self, name) for name in self.learned}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The density that has learned `state`: arrays, or lists as JSON keeps them. Raises UserError."""
        density = cls()
        for name in cls.learned:
            if name not in state:
                raise UserError(f"this is not what {cls.__name__} learned: {name} is missing among "
                                f"{', '.join(state) or 'nothing'}. Fit it again.")
        density.keep(state)
        return density

    def keep(self, values: Mapping[str, Any]) -> None:
        """Sets what is learned, from numbers, lists or arrays: in one order of memory, to round alike."""
        for name in self.learned:
            setattr(self, name, np.array(values[name], order='C'))

    def standardise(self, features: np.ndarray) -> np.ndarray:
        """Sets mean and standard deviation (D,); returns the features with mean 0 and variance 1."""
        self.mean, self.std = features.mean(0), features.std(0)
        self.std[self.std <= 1e-9 * np.maximum(1, np.abs(self.mean))] = 1  # constant, as of a collapsed group
        return self.standardised(features)

    def standardised(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) / self.std


class Typicality(Density):
    """|sum of features - mean sum of normal images|: of likelihood terms, |NELBO - mean NELBO| in nats.

    Nalisnick et al. 2019, with batches of one image.
    """
    learned, least = ('mean',), 1

    def learn(self, features: np.ndarray) -> None:
        self.mean = features.sum(1).mean()

    def rate(self, features: np.ndarray) -> np.ndarray:
        return np.abs(features.sum(1) - self.mean)


class Mahalanobis(Density):
    """Mahalanobis distance from normal images, in standard deviations.

    The covariance is that of the standardised features, shrunk by Ledoit and Wolf (2004): there may be as
    many features as images.
    """
    learned, least = ('mean', 'std', 'precision'), 3

    def learn(self, features: np.ndarray) -> None:
        from sklearn.covariance import ledoit_wolf
        covariance, _ = ledoit_wolf(self.standardise(features))
        self.precision = np.linalg.inv(covariance + RIDGE * np.eye(len(self.mean)))                   # (D, D)

    def rate(self, features: np.ndarray) -> np.ndarray:
        z = self.standardised(features)                                                               # (N, D)
        return np.sqrt(np.maximum(np.einsum('ni,ij,nj->n', z, self.precision, z), 0))


class KNN(Density):
    """Euclidean distance to the k-th nearest normal image, of fewer than k to the farthest of them."""
    learned = ('mean', 'std', 'reference', 'k')

    def __init__(self, k: int = 5, scale: bool = True):
        """With `scale`, distances are between standardised features: all count alike, whatever their unit."""
        if k < 1:
            raise UserError(f"k-NN with k = {k}: give at least 1.")
        self.k, self.scale = k, scale

    def learn(self, features: np.ndarray) -> None:
        self.mean, self.std = np.zeros(features.shape[1]), np.ones(features.shape[1])
        self.reference = self.standardise(features) if self.scale else features                       # (N, D)

    def rate(self, features: np.ndarray) -> np.ndarray:
        from sklearn.neighbors import NearestNeighbors
        neighbours = NearestNeighbors(n_neighbors=min(int(self.k), len(self.reference))).fit(self.reference)
        return neighbours.kneighbors(self.standardised(features))[0][:, -1]


class GMM(Density):
    """-log density of a mixture of normals of the standardised features, nats.

    The number of components and the shape of their covariances are those with the largest log density of
    left-out images, by cross-validation: few images get one plain component, many what they show. (BIC would
    reward components that have collapsed onto two or three images.) Follows from `seed`.
    """
    learned, least, folds = ('mean', 'std', 'weights', 'centres', 'roots'), 4, 10

    def __init__(self, components: Iterable[int] = (1, 2, 3, 4, 5),
                 covariances: Iterable[str] = ('full', 'diag'), seed: int = 0):
        """All pairs of `components` and `covariances` ('full' or 'diag') are tried."""
        self.components, self.covariances, self.seed = tuple(components), tuple(covariances), seed

    def learn(self, features: np.ndarray) -> None:
        z = self.standardise(features)                                                                # (N, D)
        best = self.mixture(z, *self.choose(z))
        self.weights, self.centres, roots = best.weights_, best.means_, best.precisions_cholesky_
        self.roots = roots if roots.ndim == 3 else np.stack([np.diag(root) for root in roots])     # (K, D, D)

    def choose(self, z: np.ndarray) -> tuple[int, str]:
        """Components and covariance of the mixture that expects left-out images best."""
        pairs = [(k, c) for k in self.components for c in self.covariances]
        if len(pairs) == 1:
            return pairs[0]
        folds = min(CHOOSING_FOLDS, len(z))
        fold = np.random.default_rng(self.seed).permutation(len(z)) * folds // len(z)
        # A component needs two images at the least. With the fewest of all, the first pair is what there is.
        most = (len(z) - len(z) // folds) // 2
        tried = [pair for pair in pairs if pair[0] <= most] or pairs[:1]
        return max(tried, key=lambda pair: sum(
            self.mixture(z[fold != i], *pair).score_samples(z[fold == i]).sum() for i in range(folds)))

    def mixture(self, z: np.ndarray, components: int, covariance: str) -> Any:
        """scikit-learn's mixture, fitted to standardised features (N, D)."""
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', ConvergenceWarning)      # left-out images judge what was reached
            return GaussianMixture(components, covariance_type=covariance, reg_covar=GMM_RIDGE,
                                   random_state=self.seed).fit(z)

    def rate(self, features: np.ndarray) -> np.ndarray:
        from scipy.special import logsumexp
        z = self.standardised(features)
        # R R' is the precision, R triangular: log N = log |R| - |R'(z - centre)|^2 / 2 - D / 2 log(2 pi)
        white = np.einsum('nkd,kde->nke', z[:, None] - self.centres, self.roots)                   # (N, K, D)
        log_det = np.log(np.diagonal(self.roots, axis1=1, axis2=2)).sum(1)                              # (K,)
        log_normal = log_det - 0.5 * (white ** 2).sum(2) - 0.5 * z.shape[1] * math.log(2 * math.pi)   # (N, K)
        return -logsumexp(np.log(self.weights) + log_normal, axis=1)


def cross_fit(density: Density, features: np.ndarray, groups: list | None = None,
              folds: int | None = None) -> np.ndarray:
    """Scores (N,) of normal images (N, D), each from a fit without it; then fits `density` on all.

    Images of one group (a patient) are left out together. One group at a time up to `folds` groups (None:
    those of the density), so that the fits have nearly as many images as the final one, with which test
    images are scored; the rest errs towards fewer calls.
    """
    groups = list(range(len(features))) if groups is None else groups
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    number = min(folds or density.folds, len(order))
    fold = np.array([order[group] * number // len(order) for group in groups])
    values = np.empty(len(features))
    for i in range(number):
        # one patient alone leaves nothing to fit on
        density.fit(features[fold != i] if (fold != i).any() else features)
        values[fold == i] = density.score(features[fold == i])
    density.fit(features)
    return values


class DensityScore:
    """A score that learns what is normal from features of normal images: likelihood terms, or others.

    Fitted on validation images, not training images: the model has seen the latter, so their NELBO and KL are
    not those of a new normal image. The threshold needs scores of validation images that were not fitted on
    themselves, which is what `cross_fit` gives.
    """
    map = None

    def __init__(self, name: str, about: str, density: Density, needs: str = 'likelihood terms',
                 features: Callable[[Passes], Tensor] = Passes.features):
        """`features` (B, D) of the passes; they are the same for all scores that need the same."""
        self.name, self.about, self.density, self.needs, self.features = name, about, density, needs, features

    def fit(self, model: Any, normal: Iterable[Tensor]) -> None:
        """Learns from batches of normal images (B, C, H, W)."""
        batches = [self.features(Passes(model, x, noise=(0, i))) for i, x in enumerate(normal)]
        self.density.fit(torch.cat(batches).numpy())

    def load(self, fitted: Mapping[str, Mapping]) -> None:
        """Takes what was learned from 'fitted' of thresholds.json. Raises UserError if it is not there."""
        if self.name not in fitted:
            raise UserError(f"score {self.name} was not fitted in that evaluation, but "
                            f"{', '.join(fitted) or 'none'}. Run it again with --scores {self.name}.")
        self.density = self.density.from_state(fitted[self.name])

    def __call__(self, model: Any, x: Tensor | None = None, with_map: bool = True) -> Scores:
        if not self.density.fitted:
            raise UserError(f"score {self.name} has not been fitted: call fit(model, normal_images) first.")
        passes = as_passes(model, x)
        check_capability(self, passes.model)
        return Scores(torch.from_numpy(self.density.score(self.features(passes).numpy())))
