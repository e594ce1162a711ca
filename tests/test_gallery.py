"""Which test images are shown, and that their pictures are what they should be."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from toy_volumes import LESION, SHAPE, one_case

from anomaly.judge import ScoreRow
from anomaly.maps.overlays import VIEWS, cuts, focus, map_scale, overlay, sheet, stack
from anomaly.maps.postprocessing import Spread
from anomaly.report import gallery as cards
from anomaly.report.gallery import (
    LARGEST,
    case_figure,
    choose_cases,
    gallery,
    outcome,
    outline_path,
    picture_source,
    short_number,
    shorten,
    volume_views,
)
from anomaly.scoring import Case, Table


def test_cases_are_extremes_mistakes_and_every_so_many_th_by_rank():
    # 100 images in rising order of score: even places normal, odd ones anomalous
    scores, labels = np.arange(100.0), np.arange(100) % 2
    chosen = choose_cases(scores, labels, 0, 15)
    assert chosen == sorted(chosen, reverse=True) and len(chosen) == 15
    assert {99, 98, 97} <= {*chosen} and {0, 1, 2} <= {*chosen}            # a fifth of 15 at either end
    assert {98, 96, 94} <= {*chosen} and {1, 3, 5} <= {*chosen}      # highest normal, lowest anomalous images
    others = sorted({*chosen} - {99, 98, 97, 96, 94, 0, 1, 2, 3, 5})
    assert len(others) == 5 and all(15 <= gap <= 20 for gap in np.diff(others))
    assert choose_cases(scores, labels, 2, 0) == [99, 98, 1, 0]
    assert choose_cases(scores, labels, 0, 0) == []
    assert {*range(6), *range(94, 100)} <= {*choose_cases(scores, labels, 6, 15)}


def test_few_images_odd_scores_and_one_class():
    assert choose_cases(np.array([1.0, 3, 2]), np.zeros(3, int), 6, 60) == [1, 2, 0]
    assert choose_cases(np.array([1.0, np.nan, 2, -np.inf]), np.array([0, 0, 1, 1]), 1, 0) == [1, 0]
    assert choose_cases(np.array([5.0, 5, 5, 5]), np.array([0, 1, 0, 1]), 1, 0) == [0, 3]     # in order


def test_outcomes_and_numbers():
    assert [outcome(y, flagged) for y in (1, 0) for flagged in (True, False)] == ['tp', 'fn', 'fp', 'tn']
    assert [short_number(v) for v in (0.0123456, 18954.69, 99999.7, 1234567.8, np.nan)] == [
        '0.012346', '18955', '100000', '1234568', 'not finite']
    assert shorten('Normal/images/Normal-1.png') == 'Normal-1' and len(shorten('x' * 60)) <= 23


def decoded(source):
    kind, data = source.split(',')
    assert kind == 'data:image/webp;base64'
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize('shape', [(64, 64, 3), (64, 128, 3)])
def test_small_pictures_are_exact_and_large_ones_are_reduced(shape):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture = decoded(picture_source(values / 255))
    assert np.array_equal(np.asarray(picture.convert('RGB')), values)
    assert not picture.info.get('exif') and not picture.info.get('xmp')
    assert max(decoded(picture_source(np.kron(values, np.ones((8, 8, 1))) / 255)).size) == LARGEST


def test_map_scale():
    assert map_scale([np.array([[0.0, 2]])])['vmin'] == 0
    signed = map_scale([np.array([[-3.0, 2]])])
    assert signed['vmin'] == -signed['vmax'] and signed['vmax'] == pytest.approx(3, abs=0.1)
    assert map_scale([]) and map_scale([np.zeros((2, 2))])['vmax'] > 0


def test_the_outline_runs_between_lesion_and_other_pixels():
    mask = np.zeros((4, 5), bool)
    mask[1, 2:4] = True                                              # two pixels wide, one high
    edges = set(re.findall(r'M(\d+) (\d+)([hv])1', outline_path(mask)))
    assert edges == {('2', '1', 'h'), ('3', '1', 'h'), ('2', '2', 'h'), ('3', '2', 'h'),
                     ('2', '1', 'v'), ('4', '1', 'v')}
    assert outline_path(np.zeros((3, 3), bool)) == ''
    assert len(re.findall('M', outline_path(np.ones((3, 3), bool)))) == 12         # the border of the image


NELBO = ScoreRow('nelbo', 'model', 'negative ELBO', threshold=1.0, primary=True)


def scored(number, reconstruction=True, maps=True, masks=True):
    """Images of scores 0, 1, ..., the second half anomalous; all of them are cases."""
    entries = [SimpleNamespace(id=f'a/{i}.png', class_name='odd' if i >= number // 2 else 'normal',
                               label=int(i >= number // 2)) for i in range(number)]
    picture = np.full((1, 8, 8), 0.5, np.float32)
    cases = [Case(i, picture, picture if reconstruction else None, picture[0] if maps else None,
                  picture[0] > i if masks else None) for i in reversed(range(number))]
    return Table(entries, {'nelbo': np.arange(float(number))}, cases=cases)


def test_cards_say_score_percentile_and_outcome_at_the_threshold():
    test = scored(6)
    test.values['nelbo'][4] = np.nan
    found = gallery(NELBO, scored(4), test)
    assert [(c['score'], c['percentile'], c['outcome']) for c in found['cards']] == [
        ('5', '100', 'tp'), ('not finite', '100', 'tp'), ('3', '88', 'tp'), ('2', '62', 'fp'),
        ('1', '38', 'tn'), ('0', '12', 'tn')]
    assert [p['title'] for p in found['cards'][0]['pictures']] == ['input', 'reconstruction', 'map']
    assert found['classes'] == ['normal', 'odd'] and found['scale']['low'] == '0'
    assert found['cards'][-1]['lesion_path'] and not found['cards'][0]['lesion_path']


def test_models_without_reconstructions_and_maps_have_cards_with_what_they_have():
    found = gallery(NELBO, scored(4), scored(4, False, False, False))
    assert [p['title'] for p in found['cards'][0]['pictures']] == ['input'] and found['scale'] is None
    figure = case_figure(NELBO, scored(4), scored(4, False, False, False), 2)
    assert len(figure.axes) == 4                                     # two most, two least, one picture each
    captions = [panel.get_title(loc='left') for panel in figure.axes]
    assert 'flagged' in captions[0] and 'flagged' not in captions[-1]


# --------------------------------------------------------------------------------------------------- volumes

# of the voxel LESION on a grid of SHAPE: where radiologists see it in axial, coronal and sagittal slices
PLACES = [(12 - 1 - 3, 10 - 1 - 7), (8 - 1 - 5, 10 - 1 - 7), (8 - 1 - 5, 12 - 1 - 3)]
LOOK = {'cmap': 'inferno', 'vmin': 0, 'vmax': 1}


def test_slices_through_a_voxel_show_it_where_radiologists_look_for_it():
    case = one_case()
    assert focus(case.map, SHAPE) == LESION and focus(None, SHAPE) == focus(case.map * 0, SHAPE) == (5, 6, 4)
    found = [tuple(np.argwhere(cut[0])[0]) for cut in cuts(case.image, LESION)]
    assert found == PLACES
    # letters are on the side that they name: the largest index along an axis is R, A and S
    for view in VIEWS:
        for axis, letters in enumerate(('LR', 'PA', 'IS')):
            side = np.zeros(SHAPE)
            side[(slice(None),) * axis + (-1,)] = 1
            picture = stack(side, view)[0]
            edges = picture[:, 0], picture[:, -1], picture[0], picture[-1]        # left, right, top, bottom
            for letter, edge in zip(view.letters, edges):
                assert letter not in letters or edge.all() == (letter == letters[1])


def test_a_sheet_holds_the_slices_row_by_row():
    slices = np.arange(5 * 2 * 3).reshape(5, 2, 3)
    joined = sheet(slices)
    assert joined.shape == (4, 9) and not joined[2:, 6:].any()
    assert all(np.array_equal(joined[i // 3 * 2:, i % 3 * 3:][:2, :3], slices[i]) for i in range(5))


@pytest.mark.parametrize('step', [1, 3])
def test_the_starting_slice_of_every_sheet_is_the_one_with_the_bright_voxel(monkeypatch, step):
    monkeypatch.setattr(cards, 'MOST_SLICES', -(-max(SHAPE) // step))
    shown = volume_views(one_case(channels=2), LOOK, np.array([1.0, 2, 3]), 1e6)
    assert shown['step'] == step
    assert [view['aspect'] for view in shown['views']] == pytest.approx([10 / 24, 10 / 24, 24 / 24])
    for view, (name, across), place in zip(shown['views'], [('axial', 2), ('coronal', 1), ('sagittal', 0)],
                                           PLACES):
        assert (view['name'], view['start'], view['total']) == (name, LESION[across], SHAPE[across])
        number = (view['last'] - view['first']) // step + 1
        assert number == len(range(LESION[across] % step, SHAPE[across], step))
        assert [s['title'] for s in view['sheets']] == [f'{kind}, channel {i}' for kind in (
            'input', 'reconstruction') for i in (1, 2)] + ['map']
        row, column = view['row'] * view['height'] + place[0], view['column'] * view['width'] + place[1]
        for picture in view['sheets']:
            values = np.asarray(decoded(picture['source']).convert('L'), int)
            assert values.shape == (view['rows'] * view['height'], view['columns'] * view['width'])
            assert np.unravel_index(values.argmax(), values.shape) == (row, column)
        assert f'M{column} {row}h1' in view['outline'] and view['outline'].count('M') == 4


def test_slices_start_at_the_maximum_of_the_map_that_is_drawn():
    case = one_case()
    drawn = np.roll(case.map, 1, 2)                            # beside normal images another voxel stands out
    views = volume_views(case._replace(relative=drawn), LOOK, np.ones(3), 1e6)['views']
    assert [view['start'] for view in views] == [LESION[2] + 1, LESION[1], LESION[0]]


def test_slices_are_left_out_until_a_volume_fits_but_not_the_starting_one():
    noise = np.random.default_rng(0).random((1, *SHAPE), np.float32)
    shown = lambda most: volume_views(Case(0, noise, None, None, None), LOOK, np.ones(3), most)
    size = lambda shown: sum(len(s['source']) for view in shown['views'] for s in view['sheets'])
    full = shown(1e6)
    some, least = shown(0.6 * size(full)), shown(1)
    assert full['step'] == 1 < some['step'] < least['step'] == 12 and size(some) <= 0.6 * size(full)
    for view in least['views']:
        assert view['first'] == view['last'] == view['start'] and (view['columns'], view['rows']) == (1, 1)


def test_an_overlay_of_a_volume_has_three_slices_a_row():
    case, times = one_case(), round(256 / 12)
    picture = np.asarray(overlay(case._replace(mask=None, above=case.map > 0.5), LOOK), int)
    # axial 12 x 10, coronal 8 x 10 and sagittal 8 x 12; rows of input, reconstruction and map
    assert picture.shape == (3 * 12 * times + 8, (10 + 10 + 12) * times + 8, 3)
    left, middle = 0, times // 2
    for view, (row, column) in zip(VIEWS, PLACES):
        at = row * times + middle, left + column * times + middle
        assert (picture[at] == 255).all() and (picture[12 * times + 4 + at[0], at[1]] == 128).all()
        assert (picture[at[0] - times, at[1]] == 0).all()
        assert (picture[2 * (12 * times + 4) + row * times, left + column * times] == 255).all()   # outlined
        left += SHAPE[view.columns] * times + 4


def test_pictures_show_millimetres():
    """Slices 2 mm thick of pixels of 1 mm: a coronal or sagittal picture is twice as high as its voxels."""
    case, mm = one_case(), (1.0, 1.0, 2.0)
    picture = np.asarray(overlay(Case(0, case.image, None, None, None), LOOK, spacing=mm))
    times = round(256 / 16)
    assert picture.shape == (16 * times, (10 + 10 + 12) * times + 8, 3), "12 x 10, 16 x 10 and 16 x 12 mm"
    grid = [SHAPE, np.diag([*mm, 1]).tolist()]
    test = SimpleNamespace(entries=[SimpleNamespace(id='a', class_name='odd', label=1, grids=(grid, grid))],
                           cases=[case], values={'nelbo': np.ones(1)})
    panel = case_figure(NELBO, test, test, 1).axes[0]
    assert np.array_equal(panel.images[0].get_array(), np.asarray(overlay(
        case, map_scale([case.map]), spacing=mm)))


def test_the_figure_of_cases_shows_overlays_with_lesions_and_a_color_scale():
    entries = [SimpleNamespace(id='a', class_name='odd', label=1)]
    case = one_case(channels=2)
    case = case._replace(mask=case.map > 0.5)
    test = SimpleNamespace(entries=entries, cases=[case], values={'nelbo': np.ones(1)})
    figure = case_figure(NELBO, test, test, 1)
    most, least, bar = figure.axes
    for panel in (most, least):
        assert np.array_equal(panel.images[0].get_array(), np.asarray(overlay(case, map_scale([case.map]))))
    assert bar.get_ylabel() == 'map'


def test_lesions_are_outlined_in_the_input_and_in_the_map_of_an_overlay():
    image = np.zeros((1, 8, 8), np.float32)
    mask = np.zeros((8, 8), bool)
    mask[2:5, 2:5] = True
    picture = np.asarray(overlay(Case(0, image, image, image[0], mask), LOOK))
    cyan = (picture == (0x39, 0xe0, 0xd0)).all(-1)
    first, second, third = cyan[:, :256], cyan[:, 260:516], cyan[:, 520:]
    assert first.any() and np.array_equal(first, third) and not second.any()
    assert first[64:160, 64:160].sum() == first.sum() < 96 ** 2


def test_a_map_is_shown_in_standard_deviations_above_normal_images():
    """By hand: variances 1 and 0, each mixed with their mean, 1/2, as if it stood for 5 more of 4 images."""
    spread = Spread.of(np.array([[[1.0, 3]], [[-1, 3]], [[1, 3]], [[-1, 3]]]))
    assert spread.mean.tolist() == [[0, 3]]
    assert spread.std[0] ** 2 == pytest.approx([(4 * 1 + 5 * 0.5) / 9, 5 * 0.5 / 9])
    assert spread.relative(np.array([[2.0, 2.9]]))[0] == pytest.approx([2 / spread.std[0, 0], 0])
    assert Spread.of(np.ones((3, 1, 2))).relative(np.array([[3.0, 1]])).tolist() == [[2, 0]]
