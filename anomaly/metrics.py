"""How well scores tell normal from anomalous: AUROC, AUPRC, FPR at a TPR, intervals, thresholds, percentiles.

n normal and m anomalous images, R resamples, U distinct scores of anomalous images. Anomalous is the positive
class; larger score = more anomalous. Point estimates are scikit-learn's, on float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from utils import UserError

METRICS = ('auroc', 'auprc', 'fpr80', 'fpr95')
CHUNK = 2 ** 17          # resampled counts worked on at once: they stay in the processor's cache


def fpr_at_tpr(labels: np.ndarray, scores: np.ndarray, tpr: float) -> float:
    """False-positive rate at the first ROC vertex with a true-positive rate of at least `tpr`."""
    false_positive, true_positive, _ = roc_curve(labels, scores, drop_intermediate=False)
    # 1e-12: 0.8 times a number of images is not exact in binary, and a vertex at exactly 80 % counts.
    return float(false_positive[np.argmax(true_positive >= tpr - 1e-12)])


def point_estimates(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """AUROC, AUPRC (average precision), FPR at 80 % and 95 % TPR; labels 0 normal, 1 anomalous."""
    scores = np.asarray(scores, np.float64)
    return {'auroc': float(roc_auc_score(labels, scores)),
            'auprc': float(average_precision_score(labels, scores)),
            'fpr80': fpr_at_tpr(labels, scores, 0.80), 'fpr95': fpr_at_tpr(labels, scores, 0.95)}


@dataclass(frozen=True)
class Resamples:
    """How often each image is drawn: normal (R, n), anomalous (R, m). The same for all scores: paired."""
    normal: np.ndarray
    anomalous: np.ndarray

    @classmethod
    def draw(cls, n: int, m: int, number: int, seed: int) -> 'Resamples':
        """Stratified bootstrap: n of the n normal and m of the m anomalous images, with replacement."""
        random = np.random.default_rng(seed)

        def counts(size: int) -> np.ndarray:
            # One byte a count: that an image is drawn 256 times has a probability below 1e-500.
            drawn = np.empty((number, size), np.uint8)
            for row in drawn:
                row[:] = np.bincount(random.integers(0, size, size), minlength=size)
            return drawn
        return cls(counts(n), counts(m))


def bootstrap(normal: np.ndarray, anomalous: np.ndarray, resamples: Resamples) -> dict[str, np.ndarray]:
    """The four metrics on every resample: each (R,). Equal to `point_estimates` of the resampled scores.

    Scores are sorted once; a resample only changes how often each counts, so curves are cumulative sums of
    counts. All metrics change at anomalous scores only, so curves are followed at their U distinct values.
    """
    n, m = len(normal), len(anomalous)
    falling_normal, falling = np.argsort(-normal, kind='stable'), np.argsort(-anomalous, kind='stable')
    values = anomalous[falling]
    starts = np.flatnonzero(np.r_[True, np.diff(values) != 0])                  # first of each distinct value
    # how many normal scores are above each value (U,), and how many at or above it
    above = np.searchsorted(-normal[falling_normal], -values[starts], 'left')
    at = np.searchsorted(-normal[falling_normal], -values[starts], 'right')
    results: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    rows = max(1, CHUNK // (n + m))
    for first in range(0, len(resamples.normal), rows):
        positive = resamples.anomalous[first:first + rows].take(falling, 1)                     # (r, m)
        if len(starts) < m:
            positive = np.add.reduceat(positive, starts, 1, dtype=np.int32)                   # (r, U)
        true_positive = positive.cumsum(1, dtype=np.int32)
        # how often the 0 .. n normal images with the highest scores are drawn: (r, n + 1)
        drawn = np.zeros((len(positive), n + 1), np.int32)
        resamples.normal[first:first + rows].take(falling_normal, 1).cumsum(1, out=drawn[:, 1:])
        false_positive = drawn.take(at, 1)                                               # (r, U)
        # Mann-Whitney: an anomalous image beats the normal ones below it, and ties with half of its equals.
        beaten_by = false_positive + drawn.take(above, 1)
        results['auroc'].append(1 - 0.5 * (positive * beaten_by).sum(1, dtype=np.int64) / (n * m))
        precision = true_positive / np.maximum(true_positive + false_positive, 1)
        results['auprc'].append(np.einsum('ru,ru->r', positive, precision) / m)
        for name, tpr in (('fpr80', 0.80), ('fpr95', 0.95)):
            vertex = np.argmax(true_positive >= tpr * m - 1e-9 * m, axis=1)
            results[name].append(false_positive[np.arange(len(vertex)), vertex] / n)
    return {name: np.concatenate(chunks) for name, chunks in results.items()}


def evaluate_score(normal: np.ndarray, anomalous: np.ndarray,
                   resamples: Resamples) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Each metric's value and 95 % interval, {'auroc': {'value', 'low', 'high'}}, and its resamples (R,)."""
    normal, anomalous = np.asarray(normal, np.float64), np.asarray(anomalous, np.float64)
    labels = np.r_[np.zeros(len(normal), int), np.ones(len(anomalous), int)]
    values = point_estimates(labels, np.concatenate([normal, anomalous]))
    resampled = bootstrap(normal, anomalous, resamples)
    intervals = {name: np.percentile(resampled[name], [2.5, 97.5]) for name in METRICS}
    return {name: {'value': values[name], 'low': float(intervals[name][0]), 'high': float(intervals[name][1])}
            for name in METRICS}, resampled


def paired_difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """95 % interval of a - b, a metric of two scores on the same resamples (R,), and what it says of a."""
    low, high = np.percentile(a - b, [2.5, 97.5])
    outcome = 'better' if low > 0 else 'worse' if high < 0 else 'undecided'
    return {'low': float(low), 'high': float(high), 'outcome': outcome}


def make_finite(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores with NaN and infinities made larger than every finite one (N,), and where they were (N,).

    An image whose score cannot be computed is not one to be called normal, and dropping it would flatter the
    model.
    """
    scores = np.asarray(scores, np.float64)
    bad = ~np.isfinite(scores)
    if bad.any():
        top = scores[~bad].max() if (~bad).any() else 0.0
        scores = np.where(bad, top + max(1.0, abs(top)), scores)
    return scores, bad


# ------------------------------------------------------------------------------------------------- thresholds

def smallest_sample(target_fpr: float) -> int:
    """The least number of normal validation images with which a threshold can promise `target_fpr`."""
    return math.ceil(1 / target_fpr - 1 - 1e-9)


def threshold(validation: np.ndarray, target_fpr: float) -> float:
    """The score above which an image is called anomalous, from normal validation scores alone.

    The ceil((n + 1) (1 - target_fpr))-th smallest of n scores: a new normal image exceeds it with a
    probability of at most `target_fpr`, if it is exchangeable with them (split conformal prediction, Vovk et
    al. 2005). With fewer than `smallest_sample` scores it is the largest, which promises 1 / (n + 1) only.
    NaN and infinities count as the largest (see `make_finite`), so the threshold may be infinite.
    """
    if not len(validation):
        raise UserError("no normal validation images: a threshold needs some. Raise --val_fraction.")
    validation = np.asarray(validation, np.float64)
    ordered = np.sort(np.where(np.isfinite(validation), validation, np.inf))
    rank = math.ceil((len(ordered) + 1) * (1 - target_fpr) - 1e-9)
    return float(ordered[min(rank, len(ordered)) - 1])


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
    if not total:
        return 0.0, 1.0
    z, share = 1.959963984540054, count / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)
