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
    """What lesions and predictions of one image have in common; sums over the images of a resample, (R,)."""
    lesion_voxels: Any       # pixels, of an image
    predicted_voxels: Any
    both_voxels: Any
    lesions: Any             # connected components, diagonal neighbors included
    found_lesions: Any       # with a predicted voxel
    regions: Any             # connected components of predicted voxels
    false_regions: Any       # without a lesion voxel


class Sample(NamedTuple):
    """What the metrics follow from, in R resamples of the images."""
    images: int
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
           lambda s: 2 * s.counts.both_voxels / (s.counts.predicted_voxels + s.counts.lesion_voxels)),
    Metric('fpr', 'FPR', "share of normal pixels above the threshold",
           lambda s: (s.counts.predicted_voxels - s.counts.both_voxels) / s.curve.total[:, 0],
           digits=4, higher_is_better=False),
    Metric('lesions_found', 'lesions found', "share of lesions with a pixel above the threshold",
           lambda s: s.counts.found_lesions / s.counts.lesions),
    Metric('false_regions', 'false regions', "regions above the threshold that touch no lesion, per image",
           lambda s: s.counts.false_regions / s.images, digits=2, higher_is_better=False),
    Metric('region_ppv', 'region PPV', "share of the regions above the threshold that touch a lesion",
           lambda s: 1 - s.counts.false_regions / s.counts.regions),
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
    masks = masks & counted
    images = [Pixels.of(*image) for image in zip(masks, maps, counted)]
    counts = np.array([count(*image) for image in zip((maps > threshold) & counted, masks)], float)   # (N, 7)
    everything = Pixels.ordered(*(np.concatenate(parts) for parts in zip(*images)))
    if not len(everything.lesion) or not len(everything.normal):
        raise UserError("pixel metrics need lesion pixels and normal pixels; the masks have only one kind.")
    has_lesion = masks.reshape(len(masks), -1).any(1)
    drawn = draw(has_lesion, num_bootstrap, seed)                                               # (1 + R, N)
    exact = Sample(len(masks), curve([everything], exact_edges(everything), np.ones((1, 1))),
                   Counts(*counts.sum(0)[:, None]))
    binned = Sample(len(masks), curve(images, bin_edges(everything), drawn), Counts(*(drawn @ counts).T))
    return Localization(estimates(exact, binned), float(threshold), len(masks), int(has_lesion.sum()),
                        int(exact.counts.lesions.item()), len(everything.lesion) / int(counted.sum()))


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
    def of(cls, mask: np.ndarray, values: np.ndarray, counted: np.ndarray) -> 'Pixels':
        """Those of one image: the mask of its lesions, the map, and which pixels count, (*S) each."""
        labels, _ = ndimage.label(mask, neighbors(mask.ndim))
        lesion = labels[mask]
        weight = 1 / np.maximum(np.bincount(lesion), 1)[lesion]
        return cls.ordered(values[mask], weight, values[counted & ~mask])

    @classmethod
    def ordered(cls, lesion: np.ndarray, weight: np.ndarray, normal: np.ndarray) -> 'Pixels':
        order = np.argsort(lesion, kind='stable')
        return cls(lesion[order], weight[order], np.sort(normal))


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


def count(predicted: np.ndarray, mask: np.ndarray) -> Counts:
    """The counts of one image, from its predicted pixels and the mask of its lesions, (*S) bool."""
    both = predicted & mask
    (lesions, number), (regions, num_regions) = (
        ndimage.label(pixels, neighbors(mask.ndim)) for pixels in (mask, predicted))
    found, true = (len(np.unique(labels[both])) for labels in (lesions, regions))
    return Counts(int(mask.sum()), int(predicted.sum()), int(both.sum()), number, found, num_regions,
                  num_regions - true)


def draw(has_lesion: np.ndarray, number: int, seed: int) -> np.ndarray:
    """How often each of N images counts: (1 + R, N). Row 0 has each once, the others are resamples.

    Images with lesions, (N,) bool, are drawn among themselves, the others too.
    """
    resamples = Resamples.draw(int((~has_lesion).sum()), int(has_lesion.sum()), number, seed)
    drawn = np.ones((1 + number, len(has_lesion)), np.float32)
    drawn[1:, ~has_lesion], drawn[1:, has_lesion] = resamples.normal, resamples.anomalous
    return drawn
