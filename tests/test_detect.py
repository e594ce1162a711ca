"""The whole pipeline on a model and images that are known, from one process and from two."""

import csv
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_scores import LinearGaussian, seeded

from anomaly import scoring
from anomaly.config import Judging, MapConfig
from anomaly.detect import Settings, detect
from anomaly.judge import compare_normal
from anomaly.metrics import threshold
from anomaly.normal import Normal
from anomaly.outputs import Outputs
from anomaly.runs import Run
from anomaly.scores import SCORES, Scoring
from distributed import launch
from distributions import Pixels
from readers.parts import Batch
from utils import UserError


def settings(batch_size=8, **flags):
    """The flags of a command."""
    return Settings.read({'num_iw_samples': 3, **flags}, batch_size=batch_size,
                         command='evaluate.py --eval_mode anomaly <x>')


FLAGS = {'num_draws': 2, 'num_bootstrap': 50, 'num_cases': 2, 'num_gallery': 6}
CONFIG = settings(4, **FLAGS)                 # so that two ranks share the pictures
FEW_FLAGS = {'scores': ('nelbo', 'typicality', 'kl_knn'), 'num_draws': 2, 'num_bootstrap': 20, 'num_cases': 2,
             'num_gallery': 0}
FEW = settings(**FEW_FLAGS)


class Part:
    """Images in memory with the interface of readers.parts.Part."""

    def __init__(self, x, classes, masks=None):
        self.x, self.masks = x, masks
        self.entries = [SimpleNamespace(id=f'{name}/images/{name}-{i}.png', class_name=name,
                                        label=int(name != 'Normal'), file_bytes=1000 + 7 * i,
                                        has_mask=name == 'Normal' or masks is not None)
                        for i, name in enumerate(classes)]

    def __len__(self):
        return len(self.entries)

    @property
    def labels(self):
        return torch.tensor([entry.label for entry in self.entries])

    @property
    def has_masks(self):
        return self.masks is not None

    def __getitems__(self, keys):
        return self.items([i for _, i in keys])

    def items(self, rows, draw=0):
        return Batch(self.x[rows], torch.tensor([self.entries[i].label for i in rows]),
                     None if self.masks is None else self.masks[rows], [self.entries[i].id for i in rows])


def make_data(seed=0, masks=False, val=30, classes=('COVID', 'Other')):
    """Normal images around 0.3 and anomalous ones with a bright quarter."""
    def normal(n, seed):
        return (0.3 + 0.1 * torch.randn(n, 1, 4, 4, generator=seeded(seed))).clamp(0, 1)
    test = normal(20 + 8 * len(classes), seed + 2)
    test[20:, :, :2, :2] += 0.5
    marks = torch.zeros(test.shape, dtype=torch.bool)
    marks[20:, :, :2, :2] = True
    names = ['Normal'] * 20 + [name for name in classes for _ in range(8)]
    return SimpleNamespace(
        train=Part(normal(30, seed), ['Normal'] * 30), val=Part(normal(val, seed + 1), ['Normal'] * val),
        test=Part(test.clamp(0, 1), names, marks if masks else None), shape=(1, 4, 4),
        pixels=SimpleNamespace(bits=8, padding=0), anomalous_classes=classes,
        report=['a <b>line</b> of the reader'],
        split={'split_seed': 3, 'duplicates': [{'kind': 'near'}, {'kind': 'exact'}, {'kind': 'near'}]},
        config=SimpleNamespace(dataset='toy', fit='pad', frames='refuse'))


def make_model():
    return LinearGaussian(tau2=0.01, sigma2=0.01)


def run(out, data=None, model=None, config=CONFIG, run_folder=None, **options):
    only = Run('', str(run_folder or out), model or make_model(), data or make_data())
    return detect([only], out, config, **{'log': lambda line: None, **options})


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp('run'), []
    (folder / 'out').mkdir()
    (folder / 'eval-x').mkdir()
    (folder / 'out' / 'metrics.json').write_text('{"likelihood": {"nelbo": 5}}')
    result = run(folder / 'out', make_data(masks=True), run_folder=folder / 'eval-x', log=lines.append)
    return SimpleNamespace(out=folder / 'out', run=folder / 'eval-x', result=result, lines=lines)


def test_everything_is_written(finished):
    names = {p.relative_to(finished.out).as_posix() for p in finished.out.rglob('*') if p.is_file()}
    figures = {f'figures/{name}.{kind}' for name in ('roc', 'pr', 'histograms', 'levels', 'cases')
               for kind in ('png', 'svg')}
    assert names == {'scores.csv', 'metrics.json', 'thresholds.json', 'normal_maps.npz', 'report.html',
                     *figures}
    assert (finished.run / 'thresholds.json').read_text() == (finished.out / 'thresholds.json').read_text()


def test_metrics_json_is_strict_and_keeps_what_others_wrote(finished):
    def refuse(name):
        raise AssertionError(name)
    stored = json.loads((finished.out / 'metrics.json').read_text(), parse_constant=refuse)
    assert stored['likelihood'] == {'nelbo': 5}
    assert stored['anomaly'] == json.loads(json.dumps(finished.result))
    assert stored['anomaly']['counts'] == {'train': {'Normal': 30}, 'val': {'Normal': 30},
                                           'test': {'Normal': 20, 'COVID': 8, 'Other': 8}}
    assert list(stored['anomaly']['scores']['nelbo']['metrics']) == ['COVID', 'Other', 'all']


def test_every_image_has_one_row_with_its_percentile_and_call(finished):
    rows = rows_of(finished.out / 'scores.csv')
    kept = json.loads((finished.out / 'thresholds.json').read_text())
    assert [row['part'] for row in rows] == ['val'] * 30 + ['test'] * 36
    assert [row['label'] for row in rows if row['part'] == 'test'] == ['0'] * 20 + ['1'] * 16
    for name in ('nelbo', 'llr_1', 'kl_profile', 'png_size'):
        validation = np.array([float(row[name]) for row in rows if row['part'] == 'val'])
        limit = kept['scores'][name]['threshold']                       # from validation alone
        assert limit == pytest.approx(threshold(validation, 0.05), rel=1e-5)     # the file has six digits
        assert kept['scores'][name]['normal_validation'] == pytest.approx(sorted(validation), rel=1e-5)
        for row in rows:
            score = float(row[name])
            if score != pytest.approx(limit, rel=1e-5):
                assert row[f'{name}_flagged'] == str(int(score > limit))
            below = 100 * ((validation < score).mean() + (validation <= score).mean()) / 2
            assert float(row[f'{name}_percentile']) == pytest.approx(below, abs=0.01)


def test_the_data_are_described(finished):
    assert finished.result['split_seed'] == 3 and finished.result['duplicates'] == {'near': 2, 'exact': 1}
    table = finished.result['normal_parts']
    assert table.keys() == finished.result['scores'].keys()
    assert all(row['low'] <= row['value'] <= row['high'] for row in table.values())


def test_normal_parts_are_compared_by_hand():
    values = {'same': ([1, 2, 3, 4], [1, 2, 3, 4]), 'apart': ([1, 2, 3, 4], [5, 6, 7, np.inf]),
              'half': ([1, 2, 3, 4], [3, 3, 3, 3])}
    validation = SimpleNamespace(entries=[0] * 4,
                                 values={n: np.array(v[0], float) for n, v in values.items()})
    test = SimpleNamespace(labels=np.array([0] * 4 + [1]),
                           values={n: np.array([*v[1], 0], float) for n, v in values.items()})
    found = compare_normal(validation, test, 20, 0)
    # of 4 x 4 pairs, 'half' wins those with 1 and 2 and ties with 3
    assert {name: row['value'] for name, row in found.items()} == {'same': 0.5, 'apart': 1, 'half': 10 / 16}
    assert found['apart']['low'] == 1
    test.labels[:] = 1
    assert compare_normal(validation, test, 20, 0) == {}


def test_a_run_folder_that_may_not_be_written_keeps_its_thresholds(tmp_path, monkeypatch):
    (tmp_path / 'eval-x').mkdir()
    monkeypatch.setattr('os.access', lambda path, mode: False)
    run(tmp_path / 'out', config=FEW, run_folder=tmp_path / 'eval-x')
    assert (tmp_path / 'out' / 'thresholds.json').exists()
    assert not (tmp_path / 'eval-x' / 'thresholds.json').exists()


def test_what_densities_learned_is_kept_and_read_again(finished):
    path, model = finished.run / 'thresholds.json', make_model()
    assert list(json.loads(path.read_text())['fitted']) == ['typicality', 'kl_profile', 'kl_knn', 'kl_gmm']
    normal = Normal.load(path, model, 'nothing')
    table = scoring.Table([], {}, {name: np.array([[1.0, 2, 3], [4, 5, 6]])[:, :width] for name, width in (
        ('typicality', 3), ('kl_profile', 2), ('kl_knn', 2), ('kl_gmm', 2))})
    scores = normal.scores(('typicality', 'kl_profile', 'kl_knn', 'kl_gmm'), model)
    values = normal.apply(table, scores).values
    assert len(values) == 4 and all(np.isfinite(column).all() for column in values.values())
    normal.save(finished.out / 'again.json')
    assert (finished.out / 'again.json').read_bytes() == path.read_bytes()
    (finished.out / 'again.json').unlink()


def test_pixel_thresholds_come_from_all_validation_pixels_and_are_kept(finished):
    model, maps = make_model(), []
    for x in make_data().val.x.split(8):
        maps.append(SCORES['recon_nll'](2)[0].map(Outputs(model, x)))
    values = torch.cat(maps).flatten().sort().values                         # 480, of which 2 may lie above
    kept = json.loads((finished.run / 'thresholds.json').read_text())
    assert kept['scores']['recon_nll']['pixel_threshold'] == values[-3].item()
    assert finished.result['scores']['recon_nll']['pixels']['threshold'] == values[-3].item()
    assert kept['judging']['target_pixel_fpr'] == 0.005
    assert 'pixel_threshold' not in kept['scores']['png_size']


@pytest.mark.page
def test_smoothing_and_the_body_change_maps_alone(finished, tmp_path):
    result = run(tmp_path, make_data(masks=True), config=settings(
        4, **FLAGS, map_smoothing=1.0, body_mask=0.3, scores=('recon_nll',)))
    before, after = (r['scores']['recon_nll'] for r in (finished.result, result))
    assert before['metrics'] == after['metrics'] and before['threshold'] == after['threshold']
    assert before['pixel_threshold'] != after['pixel_threshold']
    assert before['pixels']['lesion_share'] < after['pixels']['lesion_share']      # all lesion pixels count
    assert 'gray level 0.3' in (tmp_path / 'report.html').read_text()


def test_images_whose_lesions_are_unknown_are_left_out(tmp_path):
    data = make_data(masks=True)
    data.test.masks[20:25] = False                                           # empty: nobody has drawn them
    pixels = run(tmp_path, data, config=FEW)['scores']['nelbo']['pixels']
    assert (pixels['images'], pixels['images_with_lesions']) == (31, 11)
    result = run(tmp_path / 'none', make_data(), config=FEW)
    assert 'pixels' not in result['scores']['nelbo'] and 'pixel_threshold' in result['scores']['nelbo']


def test_too_many_maps_for_the_memory_are_a_random_part_of_whole_images(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, 'MAX_MAP_VALUES', 10 * 4 * 16)       # of nelbo and three baselines
    config = settings(**{**FEW_FLAGS, 'scores': ('nelbo', 'typicality')})
    result = run(tmp_path / 'a', make_data(masks=True), config=config)
    assert result['scores']['nelbo']['pixels']['images'] == 10
    told = 'test: the maps of 4 scores are kept for a random 10 of 36 images'
    assert any(told in line for line in result['warnings'])
    assert not any('train: the maps' in line for line in result['warnings']), "of these there are none"
    again = run(tmp_path / 'b', make_data(masks=True), config=config)
    assert result['scores'] == again['scores']


@pytest.mark.parametrize('scores, skips, maps', [
    (('lk_1',), [1] * 2, [1]), (('nelbo',), [0] * 2, [0]),
    (('llr_1', 'nelbo'), [0] * 6 + [1] * 2, [0, 1]), (('reconstruction',), [], [])])
def test_no_pass_is_made_that_no_chosen_score_needs(tmp_path, scores, skips, maps):
    model = make_model()
    run(tmp_path, model=model, config=settings(scores=scores, num_draws=2, iw_samples_elbo=3,
                                                  num_bootstrap=5, num_cases=0, num_gallery=0))
    # batches of 8 of 30 validation and 36 test images; the maps are those behind the pixel thresholds
    assert sorted(model.calls) == sorted(skips * (4 + 5) + maps * 4)


def test_flags_reach_the_outputs(tmp_path, monkeypatch):
    config = settings(scores=('lk_1',), num_draws=1, iw_samples_elbo=5, iw_samples_lk=2, num_cases=0,
                      num_gallery=0, llr_noise='shared', regret_steps=7, regret_learning_rate=0.5,
                      num_bootstrap=5, seed=4)
    given = []

    def watched(model, x, scoring, bits, *others):
        given.append((scoring, bits))
        return Outputs(model, x, scoring, bits, *others)
    monkeypatch.setattr(scoring, 'Outputs', watched)
    run(tmp_path, config=config)
    wanted = Scoring(num_draws=1, num_iw_samples=3, iw_samples_elbo=5, iw_samples_lk=2, llr_noise='shared',
                     regret_steps=7, regret_learning_rate=0.5, seed=4)
    assert given == [(wanted, 8)] * (4 + 5)


@pytest.mark.page
def test_the_settings_that_scores_depend_on_are_written(tmp_path):
    config = settings(scores=('llr_1',), num_draws=1, iw_samples_lk=2, llr_noise='shared', num_bootstrap=5)
    result = run(tmp_path, config=config)
    kept = json.loads((tmp_path / 'thresholds.json').read_text())
    for where in (result, kept['scoring']):
        assert (where['iw_samples_elbo'], where['iw_samples_lk'], where['llr_noise']) == (1, 2, 'shared')
    assert 'llr_noise shared' in (tmp_path / 'report.html').read_text()


def test_too_few_validation_images_for_a_density_are_one_line(tmp_path):
    with pytest.raises(UserError, match='score kl_gmm: GMM learns from at least 4 normal images, not 2'):
        run(tmp_path, make_data(val=3), config=settings(scores=('kl_gmm',)))


def test_a_good_score_finds_the_anomalies_and_the_verdict_says_so(finished):
    table = finished.result['scores']
    assert table['nelbo']['metrics']['all']['auroc']['value'] == 1
    assert table['nelbo']['flagged']['all'] == [16, 16] and table['nelbo']['flagged']['normal'][1] == 20
    pixels = table['recon_nll']['pixels']
    assert pixels['auroc']['low'] <= pixels['auroc']['value'] <= pixels['auroc']['high']
    assert pixels['auroc']['value'] > 0.8 and pixels['lesions_found']['value'] > 0.5
    assert pixels['lesion_share'] == pytest.approx(16 * 4 / (36 * 16))
    assert (pixels['images'], pixels['images_with_lesions'], pixels['lesions']) == (36, 16, 16)
    assert 'pixels' not in table['iw'] and 'pixel_threshold' not in table['iw']
    assert {v['group'] for v in finished.result['verdict']} == {'COVID', 'Other', 'all'}
    assert any('the best trivial baseline' in line for line in finished.lines)
    assert any(line.startswith('  nelbo *') for line in finished.lines)


def score_on_a_rank(out):
    run(out, make_data(masks=True))
    return 0


def test_two_ranks_give_what_one_gives(finished, tmp_path, forked_processes):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = launch.launch(score_on_a_rank, tmp_path,
                               launch.LaunchConfig(num_process_per_node=2, device='cpu', num_threads=1))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert status == 0
    for name in ('scores.csv', 'thresholds.json', 'figures/cases.png'):
        assert (tmp_path / name).read_bytes() == (finished.out / name).read_bytes(), name
    found = json.loads((tmp_path / 'metrics.json').read_text())['anomaly']['scores']
    assert found == json.loads(json.dumps(finished.result['scores'])) and 'pixels' in found['kl']


def test_the_threshold_does_not_depend_on_test_images(tmp_path):
    data = make_data()
    run(tmp_path / 'a', data, config=FEW)
    data.test.x = data.test.x.flip(0) * 0.5
    run(tmp_path / 'b', data, config=FEW)
    before, after = ((tmp_path / name / 'thresholds.json').read_bytes() for name in 'ab')
    assert before == after


class Broken(LinearGaussian):
    """Gives NaN for images that hold a pixel of exactly 0.875."""

    def forward(self, x, skip=0, temperature=1.0, prior_temperature=1.0):
        terms = super().forward(x, skip, temperature)
        bad = (x == 0.875).flatten(1).any(1)
        return {**terms, 'recon': torch.where(bad, torch.nan, terms['recon'])}


def test_a_score_that_is_nan_is_named_flagged_and_kept_out_of_json(tmp_path):
    data, lines = make_data(), []
    data.test.x[3, 0, 3, 3] = 0.875
    run(tmp_path, data, Broken(tau2=0.01, sigma2=0.01), FEW, log=lines.append)
    row = rows_of(tmp_path / 'scores.csv')[30 + 3]
    assert math.isnan(float(row['nelbo']))
    assert row['nelbo_flagged'] == '1' and row['nelbo_percentile'] == '100.00'
    assert any('nelbo: 1 test image' in line and data.test.entries[3].id in line for line in lines)
    assert 'NaN' not in (tmp_path / 'metrics.json').read_text()


class Autoencoder(torch.nn.Module):
    pixels = Pixels()

    def reconstruct(self, x):
        return torch.full_like(x, 0.3)


def test_an_autoencoder_gets_the_scores_that_it_can(tmp_path):
    lines = []
    result = run(tmp_path, model=Autoencoder(), log=lines.append)
    assert result['primary_score'] == 'reconstruction'
    computed = [n for n, row in result['scores'].items() if row['kind'] == 'model']
    assert computed == ['reconstruction', 'residual_top', 'residual_top5', 'residual_mean']
    assert any('cannot give' in line and 'likelihood terms' in line for line in lines)


@pytest.mark.figures
def test_one_class_and_few_validation_images(tmp_path):
    lines, earlier = [], ('figures/cases.png', 'figures/levels.svg', 'segmentation.csv', 'figures/mine.png')
    (tmp_path / 'figures').mkdir()
    for name in earlier:
        (tmp_path / name).touch()
    result = run(tmp_path, make_data(val=12, classes=('COVID',)), config=settings(
        scores=('nelbo', 'complexity'), num_bootstrap=20, num_cases=0, num_gallery=0), log=lines.append)
    assert [v['group'] for v in result['verdict']] == ['COVID']
    assert any('12 normal validation images cannot promise' in line and '19' in line for line in lines)
    assert [name for name in earlier if (tmp_path / name).exists()] == ['figures/mine.png']


@pytest.mark.page
def test_a_test_part_without_anomalies_gives_scores_and_calls_only(tmp_path):
    lines = []
    result = run(tmp_path, make_data(classes=()), config=FEW, log=lines.append)
    assert result['scores']['nelbo']['metrics'] == {} and result['verdict'] == []
    assert len(rows_of(tmp_path / 'scores.csv')) == 50 and (tmp_path / 'report.html').exists()
    assert any('lacks normal or anomalous images' in line for line in lines)


def test_mistakes_of_the_user_are_named(tmp_path):
    data = make_data()
    data.val = Part(data.val.x[:0], [])
    with pytest.raises(UserError, match='the val part is empty'):
        run(tmp_path, data)
    data = make_data()
    data.val.entries[4].label = 1
    with pytest.raises(UserError, match=r'Normal-4\.png'):
        run(tmp_path, data)
    with pytest.raises(UserError, match='--primary_score best'):
        run(tmp_path, config=settings(primary_score='best'))
    with pytest.raises(UserError, match='--scores cleverness'):
        run(tmp_path, config=settings(scores=('cleverness',)))


def test_pictures_are_those_of_the_scores():
    """A second look at a few images shows what the first pass over all of them saw."""
    data, model, score = make_data(masks=True), make_model(), SCORES['nelbo'](2)[0]

    known = Normal('nelbo', Scoring(), MapConfig(), Judging(), {}, {}, {})

    def look(part, batch_size):
        batches = scoring.part_batches(part, batch_size, 'pictures')
        found = scoring.pictures(model, batches, score, known)
        return {entry.id: case for entry, case in found}
    every, few = look(data.test, 8), look(Part(data.test.x[33:], ['Other'] * 3, data.test.masks[33:]), 2)
    assert len(every) == 36
    for i, entry in enumerate(data.test.entries):
        assert np.array_equal(every[entry.id].image, data.test.x[i].numpy())
        assert every[entry.id].mask.any() == (i >= 20)
    for one, entry in zip(few.values(), data.test.entries[33:]):
        np.testing.assert_allclose(one.map, every[entry.id].map, rtol=1e-5)      # batches round differently


@pytest.mark.parametrize('batch_size', [1, 7, 50])
def test_scores_do_not_depend_on_the_batch_size(finished, tmp_path, batch_size):
    run(tmp_path, make_data(masks=True), config=settings(batch_size, **FLAGS))
    rows, known = (rows_of(folder / 'scores.csv') for folder in (tmp_path, finished.out))
    for one, other in zip(rows, known, strict=True):
        for name, value in other.items():
            assert one[name] == value or float(one[name]) == pytest.approx(float(value), rel=1e-5), name
