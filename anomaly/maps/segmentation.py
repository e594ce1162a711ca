"""Segmentations of lesions from anomaly maps, and how well they meet the lesions' masks.

*S voxels, (D, H, W), or (H, W) pixels; N images, R resamples. A segmentation is what a map calls inside the
eroded body, without small pieces, dilated; as in Spatial-MSMA (Mahmood et al. 2024), where besides each map's
own minimum is taken off it first. Volumes are judged one by one, each with a lesion counts the same.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from anomaly.maps.localization import draw, with_interval
from anomaly.maps.postprocessing import Maps
from readers.body import body, distance_to, neighbors
from readers.volumes.nifti import entry_grids
from utils import finite, write_atomically

METRICS = ('dice', 'tpr', 'fnr', 'ppv', 'iol', 'hd95', 'hd99', 'msd', 'hd95_directed', 'hd99_directed',
           'msd_directed')
COUNTS = ('lesion_voxels', 'left_out_voxels', 'called_voxels', 'lesions', 'found', 'regions', 'false_regions')


# ------------------------------------------------------------------------------------------------ one image

def segment(values: np.ndarray, image: np.ndarray, threshold: float,
            settings: Mapping[str, Any]) -> np.ndarray:
    """What a map (*S) of an image (C, *S) in [0, 1] calls a lesion above `threshold`: (*S) bool.

    `settings` are those of thresholds.json, or the flags of ScoreConfig as a dict: body_mask, seg_erosion,
    seg_min_voxels and seg_dilation are read. `threshold` is a score's pixel_threshold.
    """
    inside = body(image[None], settings['body_mask'] or None, settings['seg_erosion'])[0]
    return call(values, inside, threshold, settings['seg_min_voxels'], settings['seg_dilation'])


def call(values: np.ndarray, inside: np.ndarray, threshold: float, min_voxels: int,
         dilation: float) -> np.ndarray:
    """The same, from where the segmentation may begin, (*S) bool. What is not a number is called."""
    return distance_to(without_small(~(values <= threshold) & inside, min_voxels)) <= dilation


def without_small(mask: np.ndarray, min_voxels: int) -> np.ndarray:
    """The pieces of (*S) bool that have at least `min_voxels`; 18 neighbours, of an image 8, as published."""
    labels, _ = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, 2))
    return mask & (np.bincount(labels.ravel()) >= min_voxels)[labels]


def surface_distances(called: np.ndarray, lesion: np.ndarray,
                      spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """From each voxel of the surface of the lesion to the nearest one of the call's surface, and from each of
    the call's to the lesion's. Neither may be empty; `spacing` of voxels gives the unit.

    A surface is the voxels with a neighbour outside, across a face.
    """
    box = ndimage.find_objects((called | lesion).astype(np.uint8))[0]       # nothing beyond it matters
    surfaces = []
    for mask in (called, lesion):
        mask = np.pad(mask[box], 1)
        surfaces.append(mask & ~ndimage.binary_erosion(mask))
    called, lesion = surfaces
    return distance_to(called, spacing)[lesion], distance_to(lesion, spacing)[called]


def compare(called: np.ndarray, lesion: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """METRICS and counts of one segmentation against the lesions' mask, both (*S) bool.

    Lesions and regions are connected pieces, diagonal neighbours included. NaN where a metric does not exist:
    all of them without a lesion; PPV and distances if nothing is called.

    - dice; iol, the share of the lesions' voxels that is called.
    - tpr: share of lesions with a called voxel; fnr = 1 - tpr; ppv: found lesions / (found lesions and
      regions without a lesion).
    - hd95, hd99: Hausdorff distance, the larger of the two ways' 95th or 99th percentile of distances between
      surfaces, in the unit of `spacing`; msd: mean of the distances of both ways. `_directed` is from the
      lesions to the call, as published: false regions do not change it.
    """
    structure, both = neighbors(called.ndim), called & lesion
    (lesions, number), (regions, num_regions) = (ndimage.label(mask, structure) for mask in (lesion, called))
    found, true = (len(np.unique(labels[both])) for labels in (lesions, regions))
    false = num_regions - true
    row = dict.fromkeys(METRICS, math.nan) | {
        'lesion_voxels': int(lesion.sum()), 'called_voxels': int(called.sum()), 'lesions': number,
        'found': found, 'regions': num_regions, 'false_regions': false}
    if number:
        overlap = int(both.sum())
        row |= {'dice': 2 * overlap / (row['lesion_voxels'] + row['called_voxels']), 'tpr': found / number,
                'fnr': 1 - found / number, 'iol': overlap / row['lesion_voxels']}
    if number and num_regions:
        there, back = surface_distances(called, lesion, spacing)
        row['ppv'] = found / (found + false)
        for percent in (95, 99):
            directed = float(np.percentile(there, percent))
            row[f'hd{percent}_directed'] = directed
            row[f'hd{percent}'] = max(directed, float(np.percentile(back, percent)))
        row |= {'msd_directed': float(there.mean()), 'msd': float(np.concatenate([there, back]).mean())}
    return row


# --------------------------------------------------------------------------------------------------- a part

def judge(maps: Maps, name: str, entries: Sequence[Any], threshold: float, config: Any, *,
          seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of the segmentations from the map of score `name`, and a row an image with `compare` and its
    entry's id, class and label. `config` is a ScoreConfig; entries are found by the ids of the maps.

    Lesions outside of `maps.inside` are left out, and pieces that are too small to be called; how many voxels
    of them is counted. Of each metric the mean over the images with a lesion for which it exists, so many
    `images`; its interval is the 2.5 and 97.5 percentiles of a bootstrap over images. Ready for JSON.
    """
    by_id, rows = {entry.id: entry for entry in entries}, []
    for values, mask, inside, i in zip(maps.values[name], maps.masks, maps.inside, maps.ids, strict=True):
        entry = by_id[i]
        grids = getattr(entry, 'grids', ())
        spacing = entry_grids(entry)[0].spacing if grids else np.ones(mask.ndim)
        lesion = without_small(mask & inside, config.seg_min_voxels)
        called = call(values, inside, threshold, config.seg_min_voxels, config.seg_dilation)
        rows.append({'id': entry.id, 'class': entry.class_name, 'label': entry.label,
                     'left_out_voxels': int(mask.sum() - lesion.sum()), **compare(called, lesion, spacing)})
    counts = {name: sum(row[name] for row in rows) for name in COUNTS}
    all_voxels = counts['lesion_voxels'] + counts['left_out_voxels']
    return finite({**summarize(rows, config.num_bootstrap, seed), 'threshold': float(threshold),
                   'images': len(rows), 'images_with_lesions': sum(row['lesions'] > 0 for row in rows),
                   'lesions': counts['lesions'],
                   'left_out_share': counts['left_out_voxels'] / max(all_voxels, 1)}), rows


def summarize(rows: Sequence[Mapping[str, float]], num_bootstrap: int, seed: int) -> dict[str, dict]:
    """{'value', 'low', 'high', 'images'} of each metric, over the rows with a lesion in which it exists."""
    has_lesion = np.array([row['lesions'] > 0 for row in rows])
    drawn = draw(has_lesion, num_bootstrap, seed)[:, has_lesion].astype(np.float64)         # (1 + R, n)
    table = np.array([[row[name] for name in METRICS] for row, chosen in zip(rows, has_lesion) if chosen])
    table = table.reshape(-1, len(METRICS))                                                 # (n, metrics)
    exists = np.isfinite(table)
    with np.errstate(invalid='ignore'):                                        # 0 / 0: in no image
        means = drawn @ np.where(exists, table, 0) / (drawn @ exists)
    return {name: {**with_interval(float(means[0, k]), means[:, k]), 'images': int(exists[:, k].sum())}
            for k, name in enumerate(METRICS)}


def write_segmentation(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """segmentation.csv: a row an image; metrics that do not exist are empty."""
    columns = ('id', 'class', 'label', *COUNTS, *METRICS)

    def write(temporary: Path) -> None:
        with temporary.open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(columns)
            writer.writerows(['' if row[c] != row[c] else row[c] for c in columns] for row in rows)
    write_atomically(path, write)
