"""How well anomaly maps find lesions: pixel AUROC, AUPRC, AUPRO and Dice, and which lesions are found.

N images, S pixels, which may be (H, W) or (D, H, W), M lesion pixels, R resamples. A curve is followed at U
levels, by falling value. Larger values of a map = more anomalous; a pixel is called above the threshold. The
pixels of all images are pooled, so a large lesion counts more than a small one, but not in AUPRO and in what
is found.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from anomaly.metrics import Resamples, make_finite
from readers.body import neighbors
from utils import UserError, finite

FPR_LIMIT = 0.3         # AUPRO: the largest false-positive rate (Bergmann et al. 2021, section 6)
BINS = 1024             # of the maps' values, behind the intervals; the values themselves are exact


class Pixels(NamedTuple):
    """The pixels of one image or of several that count, by rising value: m on lesions, n beside them."""
    lesion: np.ndarray       # (m,) values of the map
    weight: np.ndarray       # (m,) 1 / pixels of the lesion that it belongs to: each lesion weighs 1
    normal: np.ndarray       # (n,) values of the map

    @classmethod
    def ordered(cls, lesion: np.ndarray, weight: np.ndarray, normal: np.ndarray) -> 'Pixels':
        order = np.argsort(lesion, kind='stable')
        return cls(lesion[order], weight[order], np.sort(normal))


class Curve(NamedTuple):
    """How many pixels lie at and above U falling levels. (..., U) each, `total` (..., 1)."""
    lesion: np.ndarray       # lesion pixels of each level
    weight: np.ndarray       # their weights
    above: np.ndarray        # normal pixels above it
    reached: np.ndarray      # normal pixels above or in it
    total: np.ndarray        # all normal pixels


def localize(masks: np.ndarray, maps: np.ndarray, threshold: float, *, counted: np.ndarray | None = None,
             num_bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Metrics of the anomaly maps of one score against lesion masks, of normal and of anomalous images.

    `masks` (N, *S) bool, `maps` (N, *S) float, NaN and infinities above all others; `threshold` from normal
    validation images (`maps.pixel_threshold`); `counted` (N, *S) bool leaves out the other pixels, None =
    none. Lesions are the connected regions of a mask, diagonal neighbours included. Ready for JSON: each
    metric {'value', 'low', 'high'}, None where it does not exist (a PPV of no call), and counts.

    - auroc, auprc: of pixels; equal to scikit-learn's roc_auc_score and average_precision_score.
    - aupro: area under the mean share of a lesion that is called, against the share of normal pixels that
      is, up to FPR_LIMIT and divided by it (Bergmann et al. 2021): 1 is perfect, chance is FPR_LIMIT / 2.
    - best_dice: the largest Dice that any threshold reaches, found on these very masks: optimistic.
    - dice, fpr: at `threshold`; fpr is the share of normal pixels called.
    - lesions_found: share of lesions with a called pixel. false_regions: connected called regions an image
      that touch no lesion. region_ppv: share of called regions that touch one.

    Intervals are the 2.5 and 97.5 percentiles of a bootstrap over images, with lesions and without each
    among themselves. The same draws serve all maps of the same masks. For the four metrics of a curve they
    come from the maps in BINS bins of equal numbers of pixels, half of them lesions'.
    Raises UserError for shapes that differ, and without lesion pixels or without normal ones.
    """
    masks, counted = np.asarray(masks, bool), np.ones(masks.shape, bool) if counted is None else counted
    if not masks.shape == maps.shape == counted.shape:
        raise UserError(f"masks {masks.shape}, maps {maps.shape}, counted pixels {counted.shape}: expected "
                        f"one shape, (images, height, width) or (images, depth, height, width).")
    maps = maps if np.isfinite(maps).all() else make_finite(maps)[0]
    masks = masks & counted
    structure = neighbors(masks.ndim - 1)
    lesions = [ndimage.label(mask, structure) for mask in masks]
    images = [pixels(*image) for image in zip(lesions, maps, counted)]
    called = (maps > threshold) & counted
    counts = np.array([count(*image) for image in zip(lesions, called, counted)], float)      # (N, 8)
    total = counts.sum(0)
    if not total[LESION_PIXELS] or not total[NORMAL_PIXELS]:
        raise UserError("pixel metrics need lesion pixels and normal pixels; the masks have only one kind.")
    everything = Pixels.ordered(*(np.concatenate(parts) for parts in zip(*images)))
    values = curve_metrics(exact_curve(everything)) | call_metrics(total, len(masks))
    drawn = draw(counts[:, LESIONS] > 0, num_bootstrap, seed)                             # (1 + R, N)
    rows = curve_metrics(resampled_curve(images, bin_edges(everything), drawn))
    rows |= call_metrics(drawn @ counts, len(masks))
    return finite({
        **{name: with_interval(float(value), rows[name]) for name, value in values.items()},
        'threshold': float(threshold), 'images': len(masks), 'lesions': int(total[LESIONS]),
        'images_with_lesions': int((counts[:, LESIONS] > 0).sum()),
        'lesion_share': float(total[LESION_PIXELS] / (total[LESION_PIXELS] + total[NORMAL_PIXELS]))})


def pixels(lesions: tuple[np.ndarray, int], values: np.ndarray, counted: np.ndarray) -> Pixels:
    """The pixels of one image; `lesions` are its labels (*S), 0 beside lesions, and their number."""
    labels, _ = lesions
    on_lesion = labels > 0
    owners = labels[on_lesion]
    return Pixels.ordered(values[on_lesion], 1 / np.bincount(owners)[owners] if owners.size else np.zeros(0),
                          values[counted & ~on_lesion])


# ---------------------------------------------------------------------------------------- over all thresholds

def curve_metrics(curve: Curve) -> dict[str, np.ndarray]:
    """AUROC, AUPRC, AUPRO and the best Dice of curves (..., U): each (...)."""
    found = curve.lesion.cumsum(-1)                                                           # (..., U)
    lesions = found[..., -1:]
    fpr_above, fpr = curve.above / curve.total, curve.reached / curve.total
    precision = found / np.maximum(found + curve.reached, 1)
    dice = 2 * found / (found + curve.reached + lesions)
    return {'auroc': area(fpr_above, fpr, curve.lesion, 1.0),
            'auprc': (curve.lesion * precision).sum(-1) / lesions[..., 0],
            'aupro': area(fpr_above, fpr, curve.weight, FPR_LIMIT), 'best_dice': dice.max(-1)}


def area(start: np.ndarray, end: np.ndarray, rise: np.ndarray, limit: float) -> np.ndarray:
    """Area under a curve from 0 to `limit`, as a share of the rectangle below 1: (...).

    At each of U levels (..., U) the curve rises by `rise`, in a straight line from x = `start` to `end`, and
    it is flat between the levels; its total rise is taken as 1.
    """
    first, last = np.minimum(start, limit), np.minimum(end, limit)
    slope_area = (last - first) ** 2 / (2 * np.maximum(end - start, 1e-300))
    return (rise * (slope_area + limit - last)).sum(-1) / (limit * rise.sum(-1))


def exact_curve(pixels: Pixels) -> Curve:
    """The curve at every distinct value of a lesion pixel: all metrics change or peak there. U <= M."""
    lesion = pixels.lesion[::-1]
    starts = np.flatnonzero(np.r_[True, np.diff(lesion) != 0])                 # first of each distinct value
    above, reached = (len(pixels.normal) - np.searchsorted(pixels.normal, lesion[starts], side)
                      for side in ('right', 'left'))
    return Curve(np.diff(np.r_[starts, len(lesion)]), np.add.reduceat(pixels.weight[::-1], starts), above,
                 reached, np.array([len(pixels.normal)]))


def bin_edges(pixels: Pixels) -> np.ndarray:
    """At most BINS - 1 distinct rising values: quantiles of the lesion pixels and of the normal ones."""
    return np.unique(np.concatenate([values[np.linspace(0, len(values) - 1, BINS // 2).astype(int)]
                                     for values in (pixels.lesion, pixels.normal)]))


def resampled_curve(images: list[Pixels], edges: np.ndarray, drawn: np.ndarray) -> Curve:
    """The curves (R, U) of resamples in which image i counts `drawn[:, i]` times, one level a bin."""
    lesion, weight, normal = (np.zeros((len(images), len(edges) + 1), np.float32) for _ in range(3))
    for i, image in enumerate(images):
        for table, values, each in ((lesion, image.lesion, None), (weight, image.lesion, image.weight),
                                    (normal, image.normal, None)):
            # how many values, or how much weight, lie below each edge, and in all
            below = np.r_[0, np.searchsorted(values, edges), len(values)]
            below = below if each is None else np.r_[0, np.cumsum(each)][below]
            table[i] = np.diff(below)[::-1]
    lesion, weight, normal = (np.float64(drawn @ table) for table in (lesion, weight, normal))
    reached = normal.cumsum(-1)
    return Curve(lesion, weight, reached - normal, reached, reached[:, -1:])


# ------------------------------------------------------------------------------------------- at one threshold

# columns of the counts of an image
TRUE_PIXELS, CALLED_PIXELS, LESION_PIXELS, NORMAL_PIXELS, LESIONS, FOUND, REGIONS, TRUE_REGIONS = range(8)


def count(lesions: tuple[np.ndarray, int], called: np.ndarray, counted: np.ndarray) -> tuple[int, ...]:
    """The counts of one image, from the labels (*S) and number of its lesions and its called pixels (*S)."""
    labels, number = lesions
    mask = labels > 0
    regions, number_called = ndimage.label(called, neighbors(called.ndim))
    both = mask & called
    return (both.sum(), called.sum(), mask.sum(), counted.sum() - mask.sum(),
            number, len(np.unique(labels[both])), number_called, len(np.unique(regions[both])))


def call_metrics(counts: np.ndarray, images: int) -> dict[str, np.ndarray]:
    """Metrics of the called pixels and regions, from sums of counts (..., 8) over `images` images: (...)."""
    c = np.moveaxis(counts, -1, 0)
    with np.errstate(invalid='ignore'):                                        # 0 / 0: nothing is called
        return {'dice': 2 * c[TRUE_PIXELS] / (c[CALLED_PIXELS] + c[LESION_PIXELS]),
                'fpr': (c[CALLED_PIXELS] - c[TRUE_PIXELS]) / c[NORMAL_PIXELS],
                'lesions_found': c[FOUND] / c[LESIONS],
                'false_regions': (c[REGIONS] - c[TRUE_REGIONS]) / images,
                'region_ppv': c[TRUE_REGIONS] / c[REGIONS]}


# ------------------------------------------------------------------------------------------------- resampling

def draw(has_lesion: np.ndarray, number: int, seed: int) -> np.ndarray:
    """How often each of N images counts: (1 + R, N). Row 0 has each once, the others are resamples.

    Images with lesions, (N,) bool, are drawn among themselves, the others too.
    """
    resamples = Resamples.draw(int((~has_lesion).sum()), int(has_lesion.sum()), number, seed)
    drawn = np.ones((1 + number, len(has_lesion)), np.float32)
    drawn[1:, ~has_lesion], drawn[1:, has_lesion] = resamples.normal, resamples.anomalous
    return drawn


def with_interval(value: float, rows: np.ndarray) -> dict[str, float]:
    """A metric and its interval from rows (1 + R,) of `draw`; what the bins change in row 0 is taken out."""
    resampled = rows[1:][np.isfinite(rows[1:])] + (value - rows[0])
    low, high = np.percentile(resampled, [2.5, 97.5]) if resampled.size else (np.nan, np.nan)
    return {'value': value, 'low': float(low), 'high': float(high)}
