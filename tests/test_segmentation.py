"""Segmentations from maps: shapes with known answers, and the way from volumes to segmentation.csv."""

import csv
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import directed_hausdorff
from test_detect import Part, settings
from test_detect import run as detected

from anomaly.config import MapConfig
from anomaly.maps import segmentation
from anomaly.maps.segmentation import (
    compare,
    segment,
    segment_inside,
    summarize,
    surface_distances,
    without_small,
)
from anomaly.report import figures
from datasets import DataConfig
from distributions import Pixels
from readers.body import body
from readers.volumes.nifti import Grid

MM = (1.0, 1.0, 1.0)
METRICS = [metric.name for metric in segmentation.METRICS]


def box(*corners, shape=(20, 20, 20), side=4):
    """Cubes, or squares, of `side` voxels from these corners on: (*S) bool."""
    mask = np.zeros(shape, bool)
    for corner in corners:
        mask[tuple(slice(c, c + side) for c in corner)] = True
    return mask


def ball(centre, radius, shape=(24, 24, 24)):
    place = np.moveaxis(np.indices(shape), 0, -1)
    return ((place - centre) ** 2).sum(-1) <= radius ** 2


# ------------------------------------------------------------------------------------------- shapes on paper

@pytest.mark.parametrize('mask', [ball((11, 12, 10), 5), box((3, 3), shape=(9, 9)), box((0, 0, 16))])
def test_a_shape_is_itself(mask):
    found = compare(mask, mask, (1.0,) * mask.ndim)
    assert {name: found[name] for name in METRICS} == {
        **dict.fromkeys(METRICS, 0), 'dice': 1, 'tpr': 1, 'ppv': 1, 'iol': 1}


def test_cubes_that_are_shifted_by_three_voxels_of_two_millimetres():
    lesion, predicted = box((4, 4, 4)), box((7, 4, 4))
    found = compare(predicted, lesion, (2.0, 1.0, 1.0))
    assert found['hd99'] == found['hd99_directed'] == found['hd95'] == 6
    assert found['dice'] == found['iol'] == 16 / 64
    # Surface are two layers of 16 voxels and the rims, 12, of two between; the last is the call's first.
    assert found['msd_directed'] == pytest.approx((16 * 6 + 12 * 4 + 12 * 2 + 16 * 0) / 56)
    assert found['msd'] == pytest.approx(found['msd_directed'])                       # by symmetry
    assert compare(predicted, lesion, MM)['hd99'] == 3


def test_a_ball_in_a_larger_one_of_the_same_centre():
    small, large = ball((12, 12, 12), 4), ball((12, 12, 12), 9)
    found = compare(large, small, MM)
    assert found['hd99'] == pytest.approx(5, abs=0.5) and found['msd'] == pytest.approx(5, abs=0.6)
    assert found['iol'] == 1 and found['dice'] == pytest.approx(2 * 4 ** 3 / (4 ** 3 + 9 ** 3), rel=0.05)


def test_a_missed_and_a_false_piece():
    lesion, predicted = box((1, 1, 1), (12, 12, 12)), box((1, 1, 1), (12, 1, 1))
    found = compare(predicted, lesion, MM)
    counts = ('lesions', 'found_lesions', 'regions', 'false_regions')
    assert [found[name] for name in counts] == [2, 1, 2, 1]
    assert found['tpr'] == found['fnr'] == found['ppv'] == found['iol'] == found['dice'] == 0.5
    # each voxel of the missed cube has its nearest call 11 voxels below in y and in z, and so the other way
    assert found['hd95_directed'] == pytest.approx(math.hypot(11, 11), abs=4)
    only_false = compare(box((1, 1, 1), (12, 1, 1)), box((1, 1, 1)), MM)
    assert only_false['hd99_directed'] == only_false['msd_directed'] == 0     # does not see it
    assert only_false['hd99'] == 11 and only_false['ppv'] == 0.5 and only_false['tpr'] == 1
    assert compare(box((1, 1, 1)), box((5, 5, 5)), MM)['dice'] == 0                # they touch at a corner
    assert compare(box((1, 1, 1)), box((5, 5, 5)), MM)['ppv'] == 0


def test_nothing_predicted_and_no_lesion():
    nothing = np.zeros((20, 20, 20), bool)
    found = compare(nothing, box((4, 4, 4)), MM)
    assert (found['dice'], found['tpr'], found['fnr'], found['iol']) == (0, 0, 1, 0)
    assert all(math.isnan(found[name]) for name in METRICS if name not in ('dice', 'tpr', 'fnr', 'iol'))
    found = compare(box((4, 4, 4)), nothing, MM)
    assert all(math.isnan(found[name]) for name in METRICS)
    assert (found['false_regions'], found['predicted_voxels'], found['lesions']) == (1, 64, 0)


def test_distances_against_scipy():
    random = np.random.default_rng(0)
    predicted, lesion = (random.random((9, 8, 7)) < 0.1 for _ in range(2))
    spacing = np.array([1.0, 2.5, 0.5])

    def surface(mask):
        """Voxels with a face towards the outside, by hand."""
        around = np.pad(mask, 1)
        inner = np.logical_and.reduce([np.roll(around, step, axis) for axis in range(3) for step in (-1, 1)])
        return np.argwhere(mask & ~inner[1:-1, 1:-1, 1:-1]) * spacing

    there, back = surface_distances(lesion, predicted, spacing)
    assert there.max() == pytest.approx(directed_hausdorff(surface(lesion), surface(predicted))[0])
    assert back.max() == pytest.approx(directed_hausdorff(surface(predicted), surface(lesion))[0])
    assert len(there) == len(surface(lesion)) and len(back) == len(surface(predicted))


# ----------------------------------------------------------------------------------------- from maps to calls

def test_the_body_loses_its_rim_but_not_its_holes():
    image = np.full((1, 2, 24, 24, 24), 0.1)
    image[0, 1][ball((12, 12, 12), 8)] = 0.5                     # one channel is enough
    image[0, 1, 12, 12, 12] = 0.1
    np.testing.assert_array_equal(body(image, None, 0)[0], ball((12, 12, 12), 8))
    inside = body(image, None, 2)[0]
    # the head ends at 4; beside its pole, at (4, 13, 12), it is outside: 1.4 voxels from 5, 2.2 from 6
    assert inside[12, 12, 12] and inside[6, 12, 12] and not inside[5, 12, 12]
    assert body(image, 0.2, 0)[0].sum() == ball((12, 12, 12), 8).sum()           # the mean is 0.3
    assert body(image, 0.9, 2)[0].all()                      # no body: all; no rim at the edge


def test_small_pieces_go_and_the_others_grow():
    values = np.zeros((9, 9, 9))
    values[1, 1, 1] = values[1, 2, 2] = values[2, 3, 2] = 2      # joined over edges: one piece of 3
    values[6, 6, 6] = values[7, 7, 7] = values[5, 5, 5] = 2      # joined over corners alone: three pieces
    inside = np.ones(values.shape, bool)
    config = MapConfig(seg_min_voxels=3, seg_dilation=0.0)
    single = replace(config, seg_min_voxels=1)
    kept = segment_inside(inside, values, 1.0, config)
    assert kept.sum() == 3 and kept[1, 1, 1] and not kept[5:, 5:, 5:].any()
    assert not segment_inside(inside, values, 2.0, single).any()             # above the threshold, not at it
    grown = replace(single, seg_dilation=1.0)
    one = segment_inside(np.ones((9, 9), bool), 2.0 * np.diag(np.arange(9) == 4), 1.0, grown)
    assert one.sum() == 5 and one[4, 3] and not one[3, 3]        # a ball of 1: across faces
    values[0, 0, 0] = np.nan
    assert segment_inside(inside, values, 1.0, single)[0, 0, 0]
    assert not segment_inside(~inside, values, 1.0, grown).any()
    assert without_small(box((0, 0), (5, 5), shape=(9, 9), side=2), 4).sum() == 8


def test_a_map_becomes_a_segmentation():
    image = np.zeros((1, 24, 24, 24))
    image[0][ball((12, 12, 12), 9)] = 0.5
    values = np.where(ball((12, 12, 12), 3) | ~ball((12, 12, 12), 7), 1.0, 0.0)     # a lesion, and the rim
    config = MapConfig(body_mask=0.0, seg_erosion=2.5, seg_min_voxels=3, seg_dilation=0.0)
    np.testing.assert_array_equal(segment(values, image, 0.5, config), ball((12, 12, 12), 3))
    assert segment(values, image, 0.5, replace(config, seg_erosion=0.0))[12, 12, 4]
    assert not segment(values, image, math.inf, config).any()


def test_means_are_over_images_with_a_lesion_for_which_the_metric_exists():
    rows = [compare(box((4, 4, 4)), box((4, 4, 4)), MM), compare(box((7, 4, 4)), box((4, 4, 4)), MM),
            compare(np.zeros((20, 20, 20), bool), box((4, 4, 4)), MM),
            compare(box((4, 4, 4)), np.zeros((20, 20, 20), bool), MM)]
    found = summarize(rows, 200, 0)
    assert found['dice'].value == pytest.approx((1 + 0.25 + 0) / 3) and found['dice'].images == 3
    assert found['hd99'].value == pytest.approx((0 + 3) / 2) and found['hd99'].images == 2
    assert found['dice'].low == 0 and found['dice'].high == 1
    assert summarize(rows[2:3], 5, 0)['ppv'].as_json() == {
        'value': None, 'low': None, 'high': None, 'images': 0}
    assert summarize(rows[3:], 5, 0)['dice'].images == 0


# --------------------------------------------------------------------------------------------- the whole way

def volumes(order):
    """Balls as heads; of the six test volumes four have a bright box, one of them outside of the inner head.

    `order` is that of the test part's files.
    """
    random = np.random.default_rng(0)

    def heads(number):
        noise = 0.02 * random.standard_normal((number, 1, 16, 16, 16))
        return np.where(ball((8, 8, 8), 7, (16,) * 3), 0.4 + noise, 0).astype(np.float32)
    test, masks = heads(6), np.zeros((6, 1, 16, 16, 16), bool)
    for i, corner in enumerate([(6, 6, 6), (8, 7, 5), (5, 8, 8), (7, 7, 0)]):
        masks[2 + i, 0][box(corner, shape=(16,) * 3, side=3)] = True
    test[masks] += 0.4
    names = ['normal', 'normal', 'tumour', 'tumour', 'tumour', 'tumour']
    part = Part(torch.from_numpy(test), names, torch.from_numpy(masks))
    grid = Grid((16,) * 3, np.diag([2.0, 2.0, 2.0, 1.0])).as_json()
    for entry in part.entries:
        entry.label, entry.grids = int(entry.class_name != 'normal'), (grid, grid)
    part.x, part.masks = part.x[order], part.masks[order]
    part.entries = [part.entries[i] for i in order]
    made = {}
    for name, number in (('train', 4), ('val', 4)):
        made[name] = Part(torch.from_numpy(heads(number)), ['normal'] * number)
        for entry in made[name].entries:
            entry.label, entry.has_mask = 0, True
    return SimpleNamespace(**made, test=part, shape=(1, 16, 16, 16), anomalous_classes=('tumour',), report=[],
                           pixels=SimpleNamespace(bits=8, padding=0), config=DataConfig(dataset='brain'),
                           split={'split_seed': 0, 'duplicates': []})


class Brightness(torch.nn.Module):
    """Rebuilds a head of even brightness, so that its map is how much brighter a voxel is."""
    pixels = Pixels()

    def reconstruct(self, x):
        return torch.where(x > 0, torch.full_like(x, 0.4), x)


FLAGS = {'scores': ('reconstruction',), 'num_bootstrap': 20, 'num_cases': 0, 'num_gallery': 0,
         'target_pixel_fpr': 0.001}
CONFIG = settings(4, seed=0, **FLAGS, seg_dilation=0.0)


def segmented(out, order, config=CONFIG):
    printed = []
    result = detected(out, volumes(order), Brightness(), config, log=printed.append)
    with (out / 'segmentation.csv').open() as file:
        return result, {row['id']: row for row in csv.DictReader(file)}, printed


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp('segmented')
    with pytest.MonkeyPatch.context() as patch:                  # drawing takes its time
        patch.setattr(figures, 'keep', lambda drawn, out: dict.fromkeys(drawn, ''))
        for name in ('curve_figure', 'histogram_figure'):
            patch.setattr(figures, name, lambda *args: '')
        result, rows, printed = segmented(out, range(6))
    return SimpleNamespace(out=out, result=result, rows=rows, printed=printed)


def test_a_volume_is_segmented(finished):
    found = finished.result['scores']['reconstruction']['segmentation']
    rows = [row for row in finished.rows.values() if row['class'] == 'tumour']
    assert len(finished.rows) == 6 and found['images'] == 6 and found['lesions'] == 3
    assert [row['lesion_voxels'] for row in rows] == ['27', '27', '27', '0'] and rows[3]['dice'] == ''
    assert rows[3]['left_out_voxels'] == '27' and found['left_out_share'] == 1 / 4
    assert found['images_with_lesions'] == found['dice']['images'] == 3
    for name in METRICS:                                         # the lesions, to the voxel
        assert found[name]['value'] == pytest.approx(float(name in ('dice', 'tpr', 'ppv', 'iol'))), name
    assert 'segmentation' not in finished.result['scores']['png_size']
    dark = finished.result['scores']['mean_image']['segmentation']
    assert dark['dice']['value'] > 0.5
    lines = finished.printed[next(i for i, line in enumerate(finished.printed) if 'segmentations:' in line):]
    assert 'segmentations: 3 lesions in 3 of 6 test volumes; 25 %' in lines[0]
    assert any(line.split()[:3] == ['reconstruction', '*', '1.000'] for line in lines)
    page = (finished.out / 'report.html').read_text()
    assert 'segmentations of lesions' in page and page.count('0 of 3</td>') >= 2


def test_the_threshold_is_that_of_voxels_inside_of_normal_validation_volumes(finished):
    kept = json.loads((finished.out / 'thresholds.json').read_text())
    assert [kept['maps'][name] for name in ('seg_erosion', 'seg_min_voxels', 'seg_dilation')] == [2, 3, 0]
    x = volumes(range(6)).val.x.numpy()
    inside, values = body(x, None, 2), np.abs(x - 0.4)[:, 0]
    threshold = kept['scores']['reconstruction']['pixel_threshold']
    assert (values[inside] > threshold).sum() == int(0.001 * inside.sum()) > 0
    assert finished.result['scores']['reconstruction']['segmentation']['threshold'] == threshold


def test_labels_are_found_by_id_in_whatever_order_files_come(finished, tmp_path):
    result, rows, _ = segmented(tmp_path, [3, 0, 5, 2, 1, 4])
    assert rows == finished.rows and list(rows) == sorted(rows)
    for name in METRICS:
        values = [r['scores']['reconstruction']['segmentation'][name]['value']
                  for r in (result, finished.result)]
        assert values[0] == pytest.approx(values[1])


def test_distances_are_in_millimetres(tmp_path):
    config = settings(4, seed=0, **FLAGS, seg_dilation=1.0)
    found = segmented(tmp_path, range(6), config)[0]['scores']['reconstruction']['segmentation']
    # a cube that grew by one voxel of 2 mm across its faces
    assert found['hd99_directed']['value'] == found['hd99']['value'] == 2
    assert found['iol']['value'] == 1 and found['dice']['value'] == pytest.approx(2 * 27 / (27 + 27 + 54))
