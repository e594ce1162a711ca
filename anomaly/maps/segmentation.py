"""Segmentations of lesions from anomaly maps, and how well they agree with lesion masks.

*S = (D, H, W) voxels, or (H, W) pixels; N images, R resamples. A segmentation is what lies above the
threshold of a map inside the eroded body, without small components, dilated: as in Spatial-MSMA (Mahmood et
al. 2024), which in addition subtracts each map's own minimum first. Volumes are compared one by one; each
with a lesion weighs the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from anomaly.config import MapConfig
from anomaly.maps.localization import Counts, MapMetrics, count, draw
from anomaly.maps.postprocessing import Maps
from anomaly.metrics import Estimate, Metric
from readers.body import body, distance_to
from readers.volumes.nifti import spacing
from utils import write_csv

# ------------------------------------------------------------------------------------------------ the metrics

def millimeters(name: str, title: str, about: str, function: Callable[..., float]) -> Metric:
    return Metric(name, title, f'{about}, mm', function, digits=2, higher_is_better=False)


# Each function takes the Counts c of an image with a lesion and the `surface_distances` d from the lesions
# and to them; NaN where a metric does not exist.
METRICS = (
    Metric('dice', 'Dice', "Dice", lambda c, d: 2 * c.both_voxels / (c.lesion_voxels + c.predicted_voxels)),
    Metric('tpr', 'TPR', "share of lesions with a segmented voxel", lambda c, d: c.found_lesions / c.lesions),
    Metric('fnr', 'FNR', "share of lesions without one", lambda c, d: 1 - c.found_lesions / c.lesions,
           higher_is_better=False),
    Metric('ppv', 'PPV', "found lesions / (found lesions and regions without a lesion)",
           lambda c, d: c.found_lesions / (c.found_lesions + c.false_regions) if c.regions else math.nan),
    Metric('iol', 'IOL', "share of the lesions' voxels that is segmented",
           lambda c, d: c.both_voxels / c.lesion_voxels),
    millimeters('hd95', 'HD95', "Hausdorff distance, 95th percentile",
                lambda c, d: max(np.percentile(one, 95) for one in d)),
    millimeters('hd99', 'HD99', "Hausdorff distance, 99th percentile",
                lambda c, d: max(np.percentile(one, 99) for one in d)),
    millimeters('msd', 'MSD', "mean surface distance", lambda c, d: np.concatenate(d).mean()),
    # As published, from the lesions to the segmentation alone: false regions do not change these.
    millimeters('hd95_directed', 'HD95 >', "HD95 from the lesions", lambda c, d: np.percentile(d[0], 95)),
    millimeters('hd99_directed', 'HD99 >', "HD99 from the lesions", lambda c, d: np.percentile(d[0], 99)),
    millimeters('msd_directed', 'MSD >', "MSD from the lesions", lambda c, d: d[0].mean()),
)


@dataclass(frozen=True)
class Segmentation(MapMetrics):
    """Means over the images with a lesion for which a metric exists, of the segmentations by one score."""
    left_out_share: float                      # of the lesions' voxels: outside the eroded body, or too few
    rows: Sequence[Mapping[str, Any]]          # an image: id, class, label, left_out_voxels, Counts, METRICS


# ------------------------------------------------------------------------------------------------ one image

def segment(values: np.ndarray, image: np.ndarray, threshold: float, config: MapConfig) -> np.ndarray:
    """The segmentation (*S) bool by a map (*S) of an image (C, *S) in [0, 1] at a pixel threshold."""
    inside = body(image[None], config.body_mask or None, config.seg_erosion)[0]
    return segment_inside(inside, values, threshold, config)


def segment_inside(inside: np.ndarray, values: np.ndarray, threshold: float, config: MapConfig) -> np.ndarray:
    """The same from the eroded body (*S) bool. Values that are not a number are above every threshold."""
    above = ~(values <= threshold) & inside
    return distance_to(without_small(above, config.seg_min_voxels)) <= config.seg_dilation


def without_small(mask: np.ndarray, min_voxels: int) -> np.ndarray:
    """The components of (*S) bool that have at least `min_voxels`; 18 neighbors, 8 in 2D, as published."""
    labels, _ = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, 2))
    return mask & (np.bincount(labels.ravel()) >= min_voxels)[labels]


def surface_distances(first: np.ndarray, second: np.ndarray,
                      spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """From each voxel of the surface of `first` (*S) bool to the nearest one of the surface of `second`, and
    the other way. `spacing` of voxels gives the unit. A surface is the voxels with a neighbor outside, across
    a face. NaN where one of the two has none.
    """
    if not (first.any() and second.any()):
        return np.array([math.nan]), np.array([math.nan])
    box = ndimage.find_objects((first | second).astype(np.uint8))[0]       # nothing beyond it matters
    masks = [np.pad(mask[box], 1) for mask in (first, second)]
    first, second = (mask & ~ndimage.binary_erosion(mask) for mask in masks)
    return distance_to(second, spacing)[first], distance_to(first, spacing)[second]


def compare(segmented: np.ndarray, lesion: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """The Counts and METRICS of one segmentation against the lesion mask, both (*S) bool.

    Without a lesion no metric exists: NaN. `spacing` gives the unit of distances.
    """
    counts, distances = count(segmented, lesion), surface_distances(lesion, segmented, spacing)
    return counts._asdict() | {
        metric.name: float(metric.function(counts, distances)) if counts.lesions else math.nan
        for metric in METRICS}


# --------------------------------------------------------------------------------------------------- a part

def judge(maps: Maps, name: str, entries: Sequence[Any], threshold: float, config: MapConfig, *,
          num_bootstrap: int, seed: int) -> Segmentation:
    """Compares the segmentations by the maps of score `name` with the lesion masks, inside of `maps.inside`
    and without components that are too small to be segmented. Entries are found by the ids of the maps.
    """
    by_id, rows = {entry.id: entry for entry in entries}, []
    for values, mask, inside, i in zip(maps.values[name], maps.masks, maps.inside, maps.ids, strict=True):
        entry = by_id[i]
        lesion = without_small(mask & inside, config.seg_min_voxels)
        found = compare(segment_inside(inside, values, threshold, config), lesion,
                        spacing(entry)[:mask.ndim])
        rows.append({'id': entry.id, 'class': entry.class_name, 'label': entry.label,
                     'left_out_voxels': int(mask.sum() - lesion.sum()), **found})
    left_out = sum(row['left_out_voxels'] for row in rows)
    voxels = left_out + sum(row['lesion_voxels'] for row in rows)
    return Segmentation(summarize(rows, num_bootstrap, seed), float(threshold), len(rows),
                        sum(row['lesions'] > 0 for row in rows), sum(row['lesions'] for row in rows),
                        left_out / max(voxels, 1), rows)


def summarize(rows: Sequence[Mapping[str, float]], num_bootstrap: int, seed: int) -> dict[str, Estimate]:
    """The mean of each metric over the rows with a lesion in which it exists, `images` of them."""
    has_lesion = np.array([row['lesions'] > 0 for row in rows])
    drawn = draw(has_lesion, num_bootstrap, seed)[:, has_lesion].astype(np.float64)         # (1 + R, n)
    found = {}
    for metric in METRICS:
        values = np.array([row[metric.name] for row in rows])[has_lesion]                   # (n,)
        exists = np.isfinite(values)
        with np.errstate(invalid='ignore'):                                    # 0 / 0: in no image
            mean, *resamples = drawn @ np.where(exists, values, 0) / (drawn @ exists)
        found[metric.name] = Estimate.of(mean, np.array(resamples), int(exists.sum()))
    return found


def write_segmentation(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """segmentation.csv: a row for each image; metrics that do not exist are empty."""
    columns = ('id', 'class', 'label', 'left_out_voxels', *Counts._fields, *(m.name for m in METRICS))
    write_csv(path, columns, ([row[column] for column in columns] for row in rows))
