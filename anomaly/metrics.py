"""Metrics of anomaly scores, their bootstrap intervals, and the thresholds that normal images give.

n normal and m anomalous images, R resamples, U distinct scores of anomalous images. Anomalous is the positive
class; a larger score is more anomalous.

A metric is one row of METRICS: tables, pages and files follow the rows. Maps and segmentations have tables of
the same class `Metric` in maps/localization.py and maps/segmentation.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from utils import UserError, finite

CHUNK = 2 ** 17          # resampled counts that are worked on at once: they stay in the processor's cache


@dataclass(frozen=True)
class Metric:
    """A row of a table of metrics. `function` maps what the table measures to one value a resample (R,)."""
    name: str                                  # its key in metrics.json
    title: str                                 # the head of its column
    about: str                                 # one line for the report
    function: Callable[..., np.ndarray]
    digits: int = 3                            # after the decimal point
    higher_is_better: bool = True


@dataclass(frozen=True)
class Estimate:
    """A metric of the test images with its 95 % bootstrap interval; NaN where it does not exist."""
    value: float
    low: float = math.nan
    high: float = math.nan
    resamples: np.ndarray | None = field(default=None, repr=False, compare=False)          # (R,)
    images: int | None = None                  # that it is a mean over, where these are not all

    @classmethod
    def of(cls, value: float, resamples: np.ndarray, images: int | None = None) -> 'Estimate':
        """The value with the 2.5 and 97.5 percentiles of its finite resamples (R,), if there are any."""
        known = resamples[np.isfinite(resamples)]
        low, high = np.percentile(known, [2.5, 97.5]).tolist() if len(known) else (math.nan, math.nan)
        return cls(float(value), low, high, resamples, images)

    def __sub__(self, other: 'Estimate') -> 'Estimate':
        """The difference of two estimates from the same resamples: its interval is that of the pairs."""
        return Estimate.of(self.value - other.value, self.resamples - other.resamples)

    @property
    def negated(self) -> 'Estimate':
        """The AUROC of the negated score."""
        return Estimate.of(1 - self.value, 1 - self.resamples)

    def as_json(self) -> dict[str, float | None]:
        """Value and interval, None where they do not exist; `images` where it is known."""
        counted = {} if self.images is None else {'images': self.images}
        return finite({'value': self.value, 'low': self.low, 'high': self.high, **counted})


# ------------------------------------------------------------------------------------------------ the metrics

class Curves(NamedTuple):
    """ROC curves of R resamples: numbers of images at the U distinct anomalous scores, largest score first.

    Nothing is lost: the true-positive rate, and with it every metric below, changes at anomalous scores only.
    """
    positive: np.ndarray          # (R, U) anomalous images with this very score
    true_positive: np.ndarray     # (R, U) anomalous images with this score or a larger one
    false_positive: np.ndarray    # (R, U) normal images with this score or a larger one
    above: np.ndarray             # (R, U) normal images with a larger score
    normal: int                   # n
    anomalous: int                # m


def auroc(curves: Curves) -> np.ndarray:
    """Area under the ROC curve (R,): the share of pairs in which the anomalous score is larger, ties half."""
    beaten_by = curves.above + curves.false_positive
    lost = 0.5 * np.einsum('ru,ru->r', curves.positive, beaten_by, dtype=np.float64)
    return 1 - lost / (curves.normal * curves.anomalous)


def average_precision(curves: Curves) -> np.ndarray:
    """Mean precision at the scores of the anomalous images (R,)."""
    precision = curves.true_positive / np.maximum(curves.true_positive + curves.false_positive, 1)
    return np.einsum('ru,ru->r', curves.positive, precision) / curves.anomalous


def fpr_at_tpr(curves: Curves, tpr: float) -> np.ndarray:
    """False-positive rate at the first ROC vertex with a true-positive rate of at least `tpr` (R,)."""
    # 1e-9: 0.8 times a number of images is not exact in binary, and a vertex at exactly 80 % counts.
    vertex = np.argmax(curves.true_positive >= (tpr - 1e-9) * curves.anomalous, axis=1)
    return curves.false_positive[np.arange(len(vertex)), vertex] / curves.normal


METRICS = (
    Metric('auroc', 'AUROC', "area under the ROC curve; chance is 0.5", auroc),
    Metric('auprc', 'AUPRC', "average precision; chance is the share of anomalous images", average_precision),
    Metric('fpr80', 'FPR80', "share of normal images above the score that 80 % of the anomalous ones reach",
           partial(fpr_at_tpr, tpr=0.80), higher_is_better=False),
    Metric('fpr95', 'FPR95', "share of normal images above the score that 95 % of the anomalous ones reach",
           partial(fpr_at_tpr, tpr=0.95), higher_is_better=False),
)


# ----------------------------------------------------------------------------------------------- resampling

@dataclass(frozen=True)
class Resamples:
    """How often each image counts: normal (1 + R, n), anomalous (1 + R, m). Row 0 is the sample itself, each
    image once, the others are resamples. The same for all scores: paired.
    """
    normal: np.ndarray
    anomalous: np.ndarray

    @classmethod
    def draw(cls, n: int, m: int, number: int = 0, seed: int = 0) -> 'Resamples':
        """Stratified bootstrap: n of the n normal and m of the m anomalous images, with replacement."""
        random = np.random.default_rng(seed)

        def counts(size: int) -> np.ndarray:
            # One byte a count: that an image is drawn 256 times has a probability below 1e-500.
            drawn = np.ones((1 + number, size), np.uint8)
            for row in drawn[1:]:
                row[:] = np.bincount(random.integers(0, size, size), minlength=size)
            return drawn
        return cls(counts(n), counts(m))


def roc_curves(normal: np.ndarray, anomalous: np.ndarray, resamples: Resamples) -> Iterator[Curves]:
    """The curves of the scores (n,) and (m,) and of all their resamples, some at a time.

    Scores are sorted once; a resample only changes how often each counts.
    """
    n, m = len(normal), len(anomalous)
    falling_normal, falling = np.argsort(-normal, kind='stable'), np.argsort(-anomalous, kind='stable')
    values = anomalous[falling]
    starts = np.flatnonzero(np.r_[True, np.diff(values) != 0])                  # first of each distinct value
    # how many normal scores are larger than each value (U,), and how many at least as large
    larger = np.searchsorted(-normal[falling_normal], -values[starts], 'left')
    reached = np.searchsorted(-normal[falling_normal], -values[starts], 'right')
    rows = max(1, CHUNK // (n + m))
    for first in range(0, len(resamples.normal), rows):
        positive = resamples.anomalous[first:first + rows].take(falling, 1)                     # (r, m)
        if len(starts) < m:
            positive = np.add.reduceat(positive, starts, 1, dtype=np.int32)                     # (r, U)
        # how often the 0 .. n normal images with the largest scores are drawn: (r, n + 1)
        drawn = np.zeros((len(positive), n + 1), np.int32)
        resamples.normal[first:first + rows].take(falling_normal, 1).cumsum(1, out=drawn[:, 1:])
        yield Curves(positive, positive.cumsum(1, dtype=np.int32), drawn.take(reached, 1),
                     drawn.take(larger, 1), n, m)


def evaluate_score(normal: np.ndarray, anomalous: np.ndarray, resamples: Resamples,
                   metrics: Sequence[Metric] = METRICS) -> dict[str, Estimate]:
    """Each metric of a score of n normal (n,) and m anomalous images (m,), all finite, by its name."""
    scores = (np.asarray(values, np.float64) for values in (normal, anomalous))
    chunks = [[metric.function(curves) for metric in metrics] for curves in roc_curves(*scores, resamples)]
    values = map(np.concatenate, zip(*chunks))                                        # (1 + R,) a metric
    return {metric.name: Estimate.of(found[0], found[1:]) for metric, found in zip(metrics, values)}


def make_finite(scores: np.ndarray) -> np.ndarray:
    """Scores with NaN and infinities made larger than every finite one (N,).

    An image whose score cannot be computed is not one to be called normal, and dropping it would flatter the
    model.
    """
    scores = np.asarray(scores, np.float64)
    bad = ~np.isfinite(scores)
    if bad.any():
        top = scores[~bad].max() if (~bad).any() else 0.0
        scores = np.where(bad, top + max(1.0, abs(top)), scores)
    return scores


def flagged(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Which images are called anomalous: those with a score above the threshold, or not finite (N,) bool."""
    return ~np.isfinite(scores) | (scores > threshold)


# ------------------------------------------------------------------------------------------------- thresholds

def smallest_sample(target_fpr: float) -> int:
    """The least number of normal validation images with which a threshold can promise `target_fpr`."""
    return math.ceil(1 / target_fpr - 1 - 1e-9)


def threshold_rank(number: int, target_fpr: float) -> int:
    """The rank of the threshold among `number` validation scores, 1 being the lowest."""
    return min(math.ceil((number + 1) * (1 - target_fpr) - 1e-9), number)


def promised(number: int, target_fpr: float) -> float:
    """The false-positive rate that a threshold from `number` validation scores can promise at most."""
    return max(target_fpr, 1 / (number + 1))


def expected_calls(number: int, target_fpr: float, total: int) -> tuple[int, int]:
    """The 95 % interval of how many of `total` new normal images exceed a threshold from `number` validation
    scores. The count depends on both samples and follows a beta-binomial distribution.
    """
    from scipy.stats import betabinom
    rank = threshold_rank(number, target_fpr)
    return tuple(map(int, betabinom(total, number + 1 - rank, rank).interval(0.95)))


def threshold(validation: np.ndarray, target_fpr: float) -> float:
    """The score above which an image is flagged, from normal validation scores alone.

    The ceil((n + 1) (1 - target_fpr))-th smallest of n scores: a new normal image exceeds it with a
    probability of at most `target_fpr`, if it is exchangeable with them (split conformal prediction, Vovk et
    al. 2005). With fewer than `smallest_sample` scores it is the largest, which promises 1 / (n + 1) only.
    NaN and infinities count as the largest (see `make_finite`), so the threshold may be infinite.
    """
    if not len(validation):
        raise UserError("no normal validation images: a threshold needs some. Raise --val_fraction.")
    validation = np.asarray(validation, np.float64)
    ordered = np.sort(np.where(np.isfinite(validation), validation, np.inf))
    return float(ordered[threshold_rank(len(ordered), target_fpr) - 1])


def percentile(scores: np.ndarray, validation: np.ndarray) -> np.ndarray:
    """Per cent of normal validation scores below each score; equal ones count half: (N,) in 0 to 100.

    NaN and infinities count as the largest.
    """
    scores, validation = (np.where(np.isfinite(v), v, np.inf) for v in (scores, validation))
    ordered = np.sort(validation)
    below, up_to = np.searchsorted(ordered, scores, 'left'), np.searchsorted(ordered, scores, 'right')
    return 50.0 * (below + up_to) / len(ordered)


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); (0, 1) of nothing."""
    from scipy.stats import binomtest
    return tuple(binomtest(count, total).proportion_ci(method='wilson')) if total else (0.0, 1.0)
