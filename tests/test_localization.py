"""Pixel metrics, pixel thresholds and the treatment of maps, against answers known on paper."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from anomaly.config import MapConfig
from anomaly.maps import localization
from anomaly.maps.localization import FPR_LIMIT, localize
from anomaly.maps.postprocessing import final_maps, gaussian_blur, pixel_threshold
from readers.body import body
from utils import UserError

METRICS = [metric.name for metric in localization.METRICS]


def values(masks, maps, threshold=0.5, **options):
    """The values of the metrics, without intervals."""
    found = localize(masks, maps, threshold, **{'num_bootstrap': 2, **options}).metrics
    return {name: found[name].value for name in METRICS}


def boxes(shape, *places):
    """(N, *S) bool, True in each box (image, slice, slice, ...)."""
    masks = np.zeros(shape, bool)
    for place in places:
        masks[place] = True
    return masks


def noisy(seed=0, shape=(12, 16, 16), levels=None):
    """Masks with two lesions in half of the images, and a map that sees them through noise."""
    random = np.random.default_rng(seed)
    masks = np.zeros(shape, bool)
    for image in masks[:len(masks) // 2]:
        for _ in range(2):
            corner = [random.integers(0, side - 5) for side in shape[1:]]
            image[tuple(slice(c, c + random.integers(1, 6)) for c in corner)] = True
    maps = (random.standard_normal(shape) + 1.2 * masks).astype(np.float32)
    return masks, maps if levels is None else np.round(maps * levels) / levels


@pytest.mark.parametrize('shape, place', [
    ((3, 8, 8), (0, slice(2, 5), slice(1, 4))), ((2, 6, 6, 6), (1, slice(2, 4), slice(2, 4), slice(2, 4)))])
def test_a_perfect_map_is_perfect_in_two_and_three_dimensions(shape, place):
    masks = boxes(shape, place)
    found = localize(masks, masks.astype(np.float32), 0.5, num_bootstrap=20)
    for metric in localization.METRICS:
        assert list(found.metrics[metric.name].as_json().values()) == [float(metric.higher_is_better)] * 3
    assert found.lesions == found.images_with_lesions == 1 and found.images == shape[0]
    assert found.lesion_share == masks.mean() and found.threshold == 0.5
    assert list(json.loads(json.dumps(found.as_json(), allow_nan=False))) == [
        *METRICS, 'threshold', 'images', 'images_with_lesions', 'lesions', 'lesion_share']


def test_a_map_turned_round_finds_nothing():
    masks = boxes((2, 8, 8), (0, slice(2, 5), slice(1, 4)))
    found = values(masks, 1.0 - masks)
    assert found['auroc'] == found['aupro'] == found['dice'] == found['lesions_found'] == 0
    assert found['fpr'] == 1 and found['region_ppv'] == 0
    assert found['best_dice'] == pytest.approx(2 * 9 / (128 + 9))                   # everything is predicted


def test_noise_and_a_constant_map_are_chance():
    masks, _ = noisy(shape=(40, 32, 32))
    noise = np.random.default_rng(1).standard_normal(masks.shape)
    for maps, tolerance in ((noise, 0.03), (np.ones(masks.shape), 1e-12)):
        found = values(masks, maps)
        assert found['auroc'] == pytest.approx(0.5, abs=tolerance)
        assert found['aupro'] == pytest.approx(FPR_LIMIT / 2, abs=tolerance)
        assert found['auprc'] == pytest.approx(masks.mean(), abs=tolerance)


def test_aupro_of_two_lesions_worked_by_hand():
    """A lesion of 4 pixels and one of 1; 10 normal pixels, so that each is a tenth of the FPR."""
    masks = np.zeros((1, 3, 5), bool)
    maps = np.zeros((1, 3, 5))
    masks[0, 0, :4] = masks[0, 2, 4] = True
    maps[0, 0, :4] = [9, 9, 7, 0]           # half of the large lesion first, then a quarter
    maps[0, 2, 4] = 5                       # the small one at last
    maps[0, 1, 1], maps[0, 1, 2], maps[0, 0, 4] = 8, 6, 5
    # PRO by FPR: 1/4 at 0 to 1/10; 3/8 to 2/10; then up to 7/8 at 3/10, where one of each has the value 5
    area = 0.1 * 1 / 4 + 0.1 * 3 / 8 + 0.1 * (3 / 8 + 7 / 8) / 2
    found = values(masks, maps, threshold=5.5)
    assert found['aupro'] == pytest.approx(area / 0.3)
    # above 5.5: three pixels of the large lesion and two others, which touch it: one region
    assert found['dice'] == pytest.approx(2 * 3 / (5 + 5)) and found['fpr'] == pytest.approx(0.2)
    assert found['lesions_found'] == 0.5 and found['false_regions'] == 0 and found['region_ppv'] == 1
    assert found['best_dice'] == pytest.approx(2 * 4 / (5 + 7))                    # at 5: four of five, and 3


def test_dice_of_two_rectangles():
    masks, predicted = boxes((1, 10, 10), (0, slice(2, 6), slice(2, 6))), np.zeros((1, 10, 10))
    predicted[0, 4:8, 2:8] = 1                                                # 24 pixels, 8 of them on the 16
    assert values(masks, predicted)['dice'] == pytest.approx(2 * 8 / (16 + 24))
    assert values(masks, predicted, threshold=1)['dice'] == 0                   # predicted is above, not at


def test_regions_are_counted():
    lesions = [(0, slice(0, 2), slice(0, 2)), (0, 2, 2), (0, slice(6, 8), slice(6, 8)), (1, 4, 4)]
    masks = boxes((4, 9, 9), *lesions)       # the first two touch at a corner: one lesion; so three in all
    predicted = boxes(masks.shape, (0, 0, 0), (0, 1, 1), (0, 4, 0), (1, 4, slice(3, 6)), (2, 0, 0), (2, 0, 4))
    found = localize(masks, predicted.astype(float), 0.5, num_bootstrap=5)
    assert (found.lesions, found.images, found.images_with_lesions) == (3, 4, 2)
    assert found.metrics['lesions_found'].value == pytest.approx(2 / 3)
    assert found.metrics['false_regions'].value == 3 / 4
    assert found.metrics['region_ppv'].value == pytest.approx(2 / 5)


def test_nothing_predicted_has_no_ppv():
    masks, maps = noisy()
    found = localize(masks, maps, math.inf, num_bootstrap=5).as_json()
    assert found['region_ppv'] == {'value': None, 'low': None, 'high': None} and found['threshold'] is None
    assert found['dice']['value'] == found['false_regions']['value'] == 0


def test_a_ball_in_three_dimensions():
    axis = np.arange(-10, 11)
    distance = np.sqrt(sum(a ** 2 for a in np.meshgrid(axis, axis, axis, indexing='ij')))[None]
    masks = distance <= 4
    found = values(masks, -distance, threshold=-6.0)                         # everything nearer than 6
    assert found['auroc'] == found['aupro'] == found['best_dice'] == 1
    assert found['dice'] == pytest.approx(2 * 4 ** 3 / (4 ** 3 + 6 ** 3), rel=0.06)       # volumes of balls
    assert found['lesions_found'] == found['region_ppv'] == 1


@pytest.mark.parametrize('levels', [None, 2], ids=['distinct', 'ties'])
def test_pixels_against_scikit_learn(levels):
    masks, maps = noisy(levels=levels)
    found = values(masks, maps)
    assert found['auroc'] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert found['auprc'] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12)


@pytest.mark.parametrize('shape', [(6, 14, 14), (4, 7, 8, 9)])
@pytest.mark.parametrize('levels', [None, 2], ids=['distinct', 'ties'])
def test_aupro_and_best_dice_against_their_definitions(shape, levels):
    masks, maps = noisy(3, shape, levels)
    structure = np.ones((3,) * (len(shape) - 1))
    lesions = []
    for i, mask in enumerate(masks):
        labels, number = ndimage.label(mask, structure)
        lesions += [maps[i][labels == k] for k in range(1, number + 1)]
    normal, points, best = maps[~masks], [(0.0, 0.0)], 0.0
    for t in np.unique(maps)[::-1]:
        points.append(((normal >= t).mean(), np.mean([(lesion >= t).mean() for lesion in lesions])))
        best = max(best, 2 * (masks & (maps >= t)).sum() / (masks.sum() + (maps >= t).sum()))
    x, y = np.array(points).T
    limit = np.interp(FPR_LIMIT, x, y)
    area = np.trapezoid(np.r_[y[x < FPR_LIMIT], limit], np.r_[x[x < FPR_LIMIT], FPR_LIMIT])
    found = values(masks, maps)
    assert found['aupro'] == pytest.approx(area / FPR_LIMIT, abs=1e-9)
    assert found['best_dice'] == pytest.approx(best, abs=1e-12)


def test_intervals_are_those_of_resampled_images():
    masks, maps = noisy(shape=(20, 16, 16))
    found = localize(masks, maps, 1.5, num_bootstrap=200, seed=5)
    random, slow = np.random.default_rng(0), []
    for _ in range(100):
        rows = np.r_[random.integers(0, 10, 10), random.integers(10, 20, 10)]
        slow.append(values(masks[rows], maps[rows], 1.5, num_bootstrap=1))
    for name in METRICS:
        low, high = np.percentile([row[name] for row in slow], [2.5, 97.5])
        width = high - low
        assert found.metrics[name].low < found.metrics[name].value < found.metrics[name].high
        assert found.metrics[name].low == pytest.approx(low, abs=0.35 * width), name
        assert found.metrics[name].high == pytest.approx(high, abs=0.35 * width), name
    assert found == localize(masks, maps, 1.5, num_bootstrap=200, seed=5)


def test_bins_change_little(monkeypatch):
    masks, maps = noisy(shape=(20, 16, 16))
    monkeypatch.setattr(localization, 'BINS', 256)
    coarse = localize(masks, maps, 1.5, num_bootstrap=50).as_json()
    monkeypatch.setattr(localization, 'BINS', 10 ** 6)                       # more than there are pixels
    fine = localize(masks, maps, 1.5, num_bootstrap=50).as_json()
    for name in METRICS:
        assert coarse[name]['value'] == fine[name]['value']
        for end in ('low', 'high'):
            assert coarse[name][end] == pytest.approx(fine[name][end], abs=2e-3), name


def test_only_counted_pixels_count():
    masks, maps = noisy()
    counted = np.random.default_rng(2).random(masks.shape) < 0.5
    found = values(masks, maps, counted=counted)
    assert found['auroc'] == pytest.approx(roc_auc_score(masks[counted], maps[counted]), abs=1e-12)
    assert found['fpr'] == pytest.approx((maps[counted & ~masks] > 0.5).mean())
    maps[~counted] = 1e9
    assert values(masks, maps, counted=counted) == found


def test_what_is_not_finite_counts_as_the_most_anomalous():
    masks, maps = boxes((1, 4, 4), (0, 1, 1)), np.zeros((1, 4, 4))
    maps[0, 1, 1], maps[0, 0, 0] = np.nan, 3
    assert values(masks, maps)['auroc'] == 1
    maps[0, 1, 1], maps[0, 0, 0] = 3, np.inf
    assert values(masks, maps)['auroc'] == pytest.approx(14 / 15)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r'masks \(1, 4, 4\), maps \(1, 4, 5\).*expected one shape'):
        localize(np.zeros((1, 4, 4), bool), np.zeros((1, 4, 5)), 0.0)
    for masks in (np.zeros((1, 4, 4), bool), np.ones((1, 4, 4), bool)):
        with pytest.raises(UserError, match='need lesion pixels and normal pixels'):
            localize(masks, np.zeros((1, 4, 4)), 0.0)


# ------------------------------------------------------------------------------------------------ the maps

def test_the_pixel_threshold_is_the_least_that_keeps_the_promise():
    maps = np.random.default_rng(0).permutation(1000).reshape(10, 10, 10)
    assert pixel_threshold(maps, 0.005) == 994                               # 995 to 999 lie above: 5 of 1000
    assert pixel_threshold(maps, 0.0059) == 994
    assert pixel_threshold(maps, 0.0001) == 999
    assert pixel_threshold(maps, 0.01, counted=maps < 100) == 98
    assert pixel_threshold(np.minimum(maps, 990), 0.005) == 990              # none above where many are equal
    broken = maps.astype(float)
    broken[maps > 993] = np.nan                                            # 6, one more than may be predicted
    assert pixel_threshold(broken, 0.005) == math.inf
    with pytest.raises(UserError, match='lower --body_mask'):
        pixel_threshold(maps, 0.5, counted=maps < 0)


@pytest.mark.parametrize('dimensions', [2, 3])
def test_smoothing_spreads_a_point_within_its_image(dimensions):
    maps = torch.zeros((2, 1, *(31,) * dimensions))
    maps[(0, 0, *(15,) * dimensions)] = 1
    smoothed = gaussian_blur(maps, 2.0)
    assert smoothed[0].sum().item() == pytest.approx(1) and not smoothed[1].any()
    assert smoothed[0].max().item() == pytest.approx((2 * math.pi * 4) ** (-dimensions / 2), rel=0.01)
    assert gaussian_blur(maps, 0.0) is maps
    everywhere = torch.full_like(maps[0], 31.0 ** -dimensions)
    torch.testing.assert_close(gaussian_blur(maps, 1e6)[0], everywhere)          # at once, too


def disc(size, centre, radius):
    y, x = np.mgrid[:size, :size]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius ** 2


def test_the_body_is_a_disc_with_its_hole_and_without_the_label():
    whole, image = disc(64, (32, 30), 24), np.zeros((2, 1, 64, 64))
    image[0, 0][whole & ~disc(64, (32, 30), 10)] = 0.6                       # bright, with a dark hole
    image[0, 0, 2:5, 58:62] = 1.0                                            # a marker in the corner
    image[0, 0, 20, 0] = 0.04                                                # noise below the level
    inside = body(image, 0.05)
    np.testing.assert_array_equal(inside[0], whole)
    assert inside[1].all()                                                   # nothing is bright: all counts
    flat = SimpleNamespace(name='flat', map=lambda outputs: torch.ones(2, 1, 64, 64))
    maps, also = final_maps(SimpleNamespace(x=torch.from_numpy(image)), [flat], MapConfig(body_mask=0.05))
    np.testing.assert_array_equal(maps['flat'][0], whole)
    assert maps['flat'][1].all() and maps['flat'].dtype == np.float32 and (also == inside).all()


def test_two_legs_are_both_the_body_and_colours_are_averaged():
    image = np.zeros((1, 3, 40, 40))
    left, right = disc(40, (20, 9), 7), disc(40, (20, 30), 6)
    image[0, 0][left | right] = 0.9                                          # a mean of 0.3 over the channels
    np.testing.assert_array_equal(body(image, 0.2)[0], left | right)
    assert body(image, 0.4)[0].all()


def test_the_body_in_three_dimensions_has_its_cavity():
    image = np.zeros((1, 1, 9, 9, 9))
    image[0, 0, 1:8, 1:8, 1:8] = 1
    image[0, 0, 4, 4, 4] = 0
    assert body(image, 0.5).sum() == 7 ** 3
