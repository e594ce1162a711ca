"""How well anomaly maps localize lesions: pixel AUROC, AUPRC, AUPRO and Dice, and which lesions are found.

N images, *S = (H, W) pixels or (D, H, W) voxels, R resamples of the images. A curve has U levels, the largest
first. Larger values of a map are more anomalous, and pixels above the threshold are predicted to be lesion.
The pixels of all images are pooled, so a large lesion weighs more than a small one, except in AUPRO and in
the share of lesions that are found.
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
    """What the metrics follow from, in R resamples of the images: pixels at U levels, or bins of values."""
    images: int
    counts: Counts           # at the threshold from validation images
    lesion: np.ndarray       # (R, U) lesion pixels at each level
    weight: np.ndarray       # (R, U) their weights, 1 / pixels of the lesion: each lesion weighs 1
    normal: np.ndarray       # (R, U) normal pixels at each level

    @property
    def total(self) -> np.ndarray:
        """All normal pixels: (R,)."""
        return self.normal.sum(1)


def area(sample: Sample, rise: np.ndarray, limit: float) -> np.ndarray:
    """Area (R,) below a curve over false-positive rates from 0 to `limit`, divided by `limit`.

    The curve rises at each level by `rise` (R, U), in a straight line, to 1 in all.
    """
    end = sample.normal.cumsum(1) / sample.total[:, None]
    start = np.pad(end, ((0, 0), (1, 0)))[:, :-1]
    first, last = np.minimum(start, limit), np.minimum(end, limit)
    slope_area = (last - first) ** 2 / (2 * np.maximum(end - start, 1e-300))
    return (rise * ((slope_area + limit - last) / limit)).sum(1) / rise.sum(1)


def average_precision(sample: Sample) -> np.ndarray:
    found = sample.lesion.cumsum(1)
    predicted = np.maximum(found + sample.normal.cumsum(1), 1)
    return (sample.lesion * found / predicted).sum(1) / found[:, -1]


def best_dice(sample: Sample) -> np.ndarray:
    found = sample.lesion.cumsum(1)
    return (2 * found / (found + sample.normal.cumsum(1) + found[:, -1:])).max(1)


METRICS = (
    Metric('auroc', 'AUROC', "of pixels, lesion against normal; chance is 0.5",
           lambda s: area(s, s.lesion, 1.0)),
    Metric('auprc', 'AUPRC', "average precision of pixels; chance is the share of lesion pixels",
           average_precision),
    Metric('aupro', 'AUPRO', "mean share of a lesion that is found, over FPRs up to 0.3; chance is 0.15",
           lambda s: area(s, s.weight, FPR_LIMIT)),
    Metric('best_dice', 'best Dice', "largest Dice at any threshold: optimistic, as these masks choose it",
           best_dice),
    Metric('dice', 'Dice', "Dice at the threshold",
           lambda s: 2 * s.counts.both_voxels / (s.counts.predicted_voxels + s.counts.lesion_voxels)),
    Metric('fpr', 'FPR', "share of normal pixels above the threshold",
           lambda s: (s.counts.predicted_voxels - s.counts.both_voxels) / s.total,
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
    validation images (`pixel_threshold`); `counted` (N, *S) bool leaves out the other pixels.

    Intervals are those of `draw`. For the four metrics of a curve they come from the maps in BINS bins of
    equal numbers of pixels, half of them lesions'; what the bins change in the value itself is subtracted.
    Raises UserError for shapes that differ, and without lesion pixels or without normal ones.
    """
    masks, counted = np.asarray(masks, bool), np.ones(masks.shape, bool) if counted is None else counted
    if not masks.shape == maps.shape == counted.shape:
        raise UserError(f"masks {masks.shape}, maps {maps.shape}, counted pixels {counted.shape}: expected "
                        f"one shape, (images, height, width) or (images, depth, height, width).")
    maps = maps if np.isfinite(maps).all() else make_finite(maps)
    masks = masks & counted
    images = [split(*image) for image in zip(masks, maps, counted)]
    lesion, _, normal = pooled = [np.concatenate(parts) for parts in zip(*images)]
    if not len(lesion) or not len(normal):
        raise UserError("pixel metrics need lesion pixels and normal pixels; the masks have only one kind.")
    exact = np.union1d(lesion, np.nextafter(lesion, np.inf))            # separate each from all other values
    bins = np.unique([np.sort(values)[np.linspace(0, len(values) - 1, BINS // 2).astype(int)]
                      for values in (lesion, normal)])
    counts = np.array([count(*image) for image in zip((maps > threshold) & counted, masks)], float)   # (N, 7)
    has_lesion = masks.reshape(len(masks), -1).any(1)
    drawn = draw(has_lesion, num_bootstrap, seed)                                               # (1 + R, N)
    sample = Sample(len(masks), Counts(*counts.sum(0)[:, None]),
                    *levels(pooled, exact)[:, None])
    binned = np.stack([levels(image, bins) for image in images], 1).astype(drawn.dtype)         # (3, N, U)
    resamples = Sample(len(masks), Counts(*(drawn @ counts).T), *np.float64(drawn @ binned))
    metrics = {}
    with np.errstate(invalid='ignore'):                                  # 0 / 0: nothing is predicted
        for metric in METRICS:
            value, (first, *others) = metric.function(sample).item(), metric.function(resamples)
            metrics[metric.name] = Estimate.of(value, np.array(others) + (value - first))
    return Localization(metrics, float(threshold), len(masks), int(has_lesion.sum()),
                        int(sample.counts.lesions.item()), len(lesion) / int(counted.sum()))


def split(mask: np.ndarray, values: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, ...]:
    """From the lesion mask, the map and the pixels that count of one image, (*S) each: the m values on
    lesions, their weights, and the n values beside them.
    """
    lesion = ndimage.label(mask, neighbors(mask.ndim))[0][mask]
    return values[mask], 1 / np.bincount(lesion)[lesion], values[counted & ~mask]


def levels(image: Sequence[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """(3, U) lesion pixels, their weights, and normal pixels, between rising edges: U = len(edges) + 1."""
    lesion, weight, normal = image
    return np.stack([np.bincount(np.searchsorted(edges, values, 'right'), weights, len(edges) + 1)[::-1]
                     for values, weights in ((lesion, None), (lesion, weight), (normal, None))])


def count(predicted: np.ndarray, mask: np.ndarray) -> Counts:
    """The counts of one image, from its predicted pixels and the mask of its lesions, (*S) bool."""
    both = predicted & mask
    (lesions, number), (regions, num_regions) = (
        ndimage.label(pixels, neighbors(mask.ndim)) for pixels in (mask, predicted))
    found, true = (len(np.unique(labels[both])) for labels in (lesions, regions))
    return Counts(int(mask.sum()), int(predicted.sum()), int(both.sum()), number, found, num_regions,
                  num_regions - true)


def draw(has_lesion: np.ndarray, number: int, seed: int) -> np.ndarray:
    """How often each of N images counts: (1 + R, N). Row 0 has each once, the others are bootstrap resamples
    of the images with lesions, (N,) bool, and of the others, each among themselves.
    """
    resamples = Resamples.draw(int((~has_lesion).sum()), int(has_lesion.sum()), number, seed)
    drawn = np.empty((1 + number, len(has_lesion)), np.float32)
    drawn[:, ~has_lesion], drawn[:, has_lesion] = resamples.normal, resamples.anomalous
    return drawn
