"""How well anomaly maps localize lesions: pixel AUROC, AUPRC, AUPRO and Dice, and which lesions are found.

N images, *S = (H, W) pixels or (D, H, W) voxels, M lesion pixels, R resamples of the images. A curve has U
levels, the largest first. Larger values of a map are more anomalous, and pixels above the threshold are
predicted to be lesion. The pixels of all images are pooled, so a large lesion weighs more than a small one,
except in AUPRO and in the share of lesions that are found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from anomaly.metrics import Estimate, Metric, Resamples, make_finite
from readers.body import neighbors
from utils import UserError, finite

FPR_LIMIT = 0.3         # AUPRO: the largest false-positive rate (Bergmann et al. 2021, section 6)
BINS = 1024             # of the maps' values, behind the intervals; the values themselves are exact


# ------------------------------------------------------------------------------------------------ the metrics

class Curve(NamedTuple):
    """Pixels at and above U falling levels, or bins of values, in R resamples: (R, U), `total` (R, 1)."""
    lesion: np.ndarray       # lesion pixels at each level
    weight: np.ndarray       # their weights
    above: np.ndarray        # normal pixels above it
    reached: np.ndarray      # normal pixels above or at it
    total: np.ndarray        # all normal pixels


class Counts(NamedTuple):
    """Sums over the images of a resample, (R,) each, or the counts of one image."""
    images: Any
    true_pixels: Any         # predicted lesion pixels
    predicted_pixels: Any
    lesion_pixels: Any
    normal_pixels: Any
    lesions: Any
    found_lesions: Any       # with a predicted pixel
    regions: Any             # connected regions of predicted pixels
    true_regions: Any        # that touch a lesion


class Sample(NamedTuple):
    """What the metrics follow from, in R resamples."""
    curve: Curve             # over all thresholds
    counts: Counts           # at the threshold from validation images


def area(curve: Curve, rise: np.ndarray, limit: float) -> np.ndarray:
    """Area (R,) below a curve over false-positive rates from 0 to `limit`, divided by `limit`.

    The curve rises at each level by `rise` (R, U), in a straight line, to 1 in all.
    """
    start, end = curve.above / curve.total, curve.reached / curve.total
    first, last = np.minimum(start, limit), np.minimum(end, limit)
    slope_area = (last - first) ** 2 / (2 * np.maximum(end - start, 1e-300))
    return (rise * (slope_area + limit - last)).sum(1) / (limit * rise.sum(1))


def average_precision(curve: Curve) -> np.ndarray:
    found = curve.lesion.cumsum(1)
    return (curve.lesion * found / np.maximum(found + curve.reached, 1)).sum(1) / found[:, -1]


def best_dice(curve: Curve) -> np.ndarray:
    found = curve.lesion.cumsum(1)
    return (2 * found / (found + curve.reached + found[:, -1:])).max(1)


METRICS = (
    Metric('auroc', 'AUROC', "of pixels, lesion against normal; chance is 0.5",
           lambda s: area(s.curve, s.curve.lesion, 1.0)),
    Metric('auprc', 'AUPRC', "average precision of pixels; chance is the share of lesion pixels",
           lambda s: average_precision(s.curve)),
    Metric('aupro', 'AUPRO', "mean share of a lesion that is found, over FPRs up to 0.3; chance is 0.15",
           lambda s: area(s.curve, s.curve.weight, FPR_LIMIT)),
    Metric('best_dice', 'best Dice', "largest Dice at any threshold: optimistic, as these masks choose it",
           lambda s: best_dice(s.curve)),
    Metric('dice', 'Dice', "Dice at the threshold",
           lambda s: 2 * s.counts.true_pixels / (s.counts.predicted_pixels + s.counts.lesion_pixels)),
    Metric('fpr', 'FPR', "share of normal pixels above the threshold",
           lambda s: (s.counts.predicted_pixels - s.counts.true_pixels) / s.counts.normal_pixels,
           digits=4, higher_is_better=False),
    Metric('lesions_found', 'lesions found', "share of lesions with a pixel above the threshold",
           lambda s: s.counts.found_lesions / s.counts.lesions),
    Metric('false_regions', 'false regions', "regions above the threshold that touch no lesion, per image",
           lambda s: (s.counts.regions - s.counts.true_regions) / s.counts.images,
           digits=2, higher_is_better=False),
    Metric('region_ppv', 'region PPV', "share of the regions above the threshold that touch a lesion",
           lambda s: s.counts.true_regions / s.counts.regions),
)


@dataclass(frozen=True)
class MapMetrics:
    """Metrics of the maps of one score against lesion masks, and the numbers behind them."""
    metrics: Mapping[str, Estimate]
    threshold: float
    images: int
    images_with_lesions: int
    lesions: int

    def as_json(self) -> dict[str, Any]:
        """The metrics by name, and the numbers, but not the rows of images."""
        numbers = {name: value for name, value in vars(self).items() if name not in ('metrics', 'rows')}
        return finite({**{name: estimate.as_json() for name, estimate in self.metrics.items()}, **numbers})


@dataclass(frozen=True)
class Localization(MapMetrics):
    """Metrics of pooled pixels."""
    lesion_share: float                        # of the pixels


def localize(masks: np.ndarray, maps: np.ndarray, threshold: float, *, counted: np.ndarray | None = None,
             num_bootstrap: int = 1000, seed: int = 0) -> Localization:
    """METRICS of the anomaly maps of one score against lesion masks, of normal and of anomalous images.

    `masks` (N, *S) bool, `maps` (N, *S) float, NaN and infinities above all others; `threshold` from normal
    validation images (`pixel_threshold`); `counted` (N, *S) bool leaves out the other pixels. Lesions and
    regions are connected, diagonal neighbors included. AUROC and AUPRC equal scikit-learn's.

    Intervals are the 2.5 and 97.5 percentiles of a bootstrap over images, with lesions and without each
    among themselves. The same draws serve all maps of the same masks. For the four metrics of a curve they
    come from the maps in BINS bins of equal numbers of pixels, half of them lesions'; what the bins change in
    the value itself is subtracted. Raises UserError for shapes that differ, and without lesion pixels or
    without normal ones.
    """
    masks, counted = np.asarray(masks, bool), np.ones(masks.shape, bool) if counted is None else counted
    if not masks.shape == maps.shape == counted.shape:
        raise UserError(f"masks {masks.shape}, maps {maps.shape}, counted pixels {counted.shape}: expected "
                        f"one shape, (images, height, width) or (images, depth, height, width).")
    maps = maps if np.isfinite(maps).all() else make_finite(maps)[0]
    lesions = [ndimage.label(mask, neighbors(mask.ndim)) for mask in masks & counted]
    images = [pixels(labels, *image) for (labels, _), *image in zip(lesions, maps, counted)]
    predicted = (maps > threshold) & counted
    counts = np.array([count(*image) for image in zip(lesions, predicted, counted)], float)       # (N, 9)
    total = Counts(*counts.sum(0))
    if not total.lesion_pixels or not total.normal_pixels:
        raise UserError("pixel metrics need lesion pixels and normal pixels; the masks have only one kind.")
    has_lesion = Counts(*counts.T).lesions > 0
    everything = Pixels.ordered(*(np.concatenate(parts) for parts in zip(*images)))
    exact = Sample(curve([everything], exact_edges(everything), np.ones((1, 1))), total)
    drawn = draw(has_lesion, num_bootstrap, seed)                                               # (1 + R, N)
    binned = Sample(curve(images, bin_edges(everything), drawn), Counts(*(drawn @ counts).T))
    return Localization(estimates(exact, binned), float(threshold), len(masks), int(has_lesion.sum()),
                        int(total.lesions), total.lesion_pixels / (total.lesion_pixels + total.normal_pixels))


def estimates(exact: Sample, drawn: Sample) -> dict[str, Estimate]:
    """Each metric with its interval; the first of the 1 + R samples that are drawn has every image once."""
    found = {}
    with np.errstate(invalid='ignore'):                                  # 0 / 0: nothing is predicted
        for metric in METRICS:
            value, resamples = metric.function(exact).item(), metric.function(drawn)
            found[metric.name] = Estimate.of(value, resamples[1:] + (value - resamples[0]))
    return found


# ------------------------------------------------------------------------------------------ curves and counts

class Pixels(NamedTuple):
    """The pixels of one image or of several that count, by rising value: m on lesions, n beside them."""
    lesion: np.ndarray       # (m,) values of the map
    weight: np.ndarray       # (m,) 1 / pixels of the lesion that it belongs to: each lesion weighs 1
    normal: np.ndarray       # (n,) values of the map

    @classmethod
    def ordered(cls, lesion: np.ndarray, weight: np.ndarray, normal: np.ndarray) -> 'Pixels':
        order = np.argsort(lesion, kind='stable')
        return cls(lesion[order], weight[order], np.sort(normal))


def pixels(labels: np.ndarray, values: np.ndarray, counted: np.ndarray) -> Pixels:
    """The pixels of one image; its lesions have the `labels` (*S) from 1 on, other pixels 0."""
    on_lesion = labels > 0
    owners = labels[on_lesion]
    return Pixels.ordered(values[on_lesion], 1 / np.bincount(owners)[owners] if owners.size else np.zeros(0),
                          values[counted & ~on_lesion])


def exact_edges(pixels: Pixels) -> np.ndarray:
    """Rising values that separate each distinct value of a lesion pixel from all other values."""
    values = np.unique(pixels.lesion)
    return np.union1d(values, np.nextafter(values, np.inf))


def bin_edges(pixels: Pixels) -> np.ndarray:
    """At most BINS - 1 distinct rising values: quantiles of the lesion pixels and of the normal ones."""
    return np.unique(np.concatenate([values[np.linspace(0, len(values) - 1, BINS // 2).astype(int)]
                                     for values in (pixels.lesion, pixels.normal)]))


def curve(images: Sequence[Pixels], edges: np.ndarray, drawn: np.ndarray) -> Curve:
    """The curves of resamples in which image i counts `drawn[:, i]` times, U = len(edges) + 1 levels."""
    tables = np.zeros((3, len(images), len(edges) + 1), drawn.dtype)
    for i, image in enumerate(images):
        for table, values, weight in zip(tables, (image.lesion, image.lesion, image.normal),
                                         (None, image.weight, None)):
            # how many values, or how much weight, lie below each edge, and in all
            below = np.r_[0, np.searchsorted(values, edges), len(values)]
            below = below if weight is None else np.r_[0, np.cumsum(weight)][below]
            table[i] = np.diff(below)[::-1]
    lesion, weight, normal = np.float64(drawn @ tables)                                        # (R, U) each
    return Curve(lesion, weight, normal.cumsum(1) - normal, normal.cumsum(1), normal.sum(1, keepdims=True))


def count(lesions: tuple[np.ndarray, int], predicted: np.ndarray, counted: np.ndarray) -> Counts:
    """The counts of one image, from the labels (*S) and number of its lesions and its predicted pixels."""
    labels, number = lesions
    mask = labels > 0
    regions, num_regions = ndimage.label(predicted, neighbors(predicted.ndim))
    both = mask & predicted
    return Counts(1, both.sum(), predicted.sum(), mask.sum(), counted.sum() - mask.sum(), number,
                  len(np.unique(labels[both])), num_regions, len(np.unique(regions[both])))


def draw(has_lesion: np.ndarray, number: int, seed: int) -> np.ndarray:
    """How often each of N images counts: (1 + R, N). Row 0 has each once, the others are resamples.

    Images with lesions, (N,) bool, are drawn among themselves, the others too.
    """
    resamples = Resamples.draw(int((~has_lesion).sum()), int(has_lesion.sum()), number, seed)
    drawn = np.ones((1 + number, len(has_lesion)), np.float32)
    drawn[1:, ~has_lesion], drawn[1:, has_lesion] = resamples.normal, resamples.anomalous
    return drawn
