"""Images from elsewhere as anomalous classes: `--ood NAME=PATH[:CHANGE]`, from its words to the scores."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_images
from standins import image, make_standin

import evaluate
import train
from anomaly.out_of_distribution import with_ood
from datasets import DataConfig, load_data
from distributed import launch
from readers.batches import eval_batches
from readers.out_of_distribution import CHANGES, Wanted, parse
from scripts.create_lmdb import FolderConfig, pack, plan
from utils import UserError, read_flags

ONE_THREAD = ('--device', 'cpu', '--num_threads', '1')


def of_class(data, name):
    """The images of a class of the test part: (N, C, S, S)."""
    return data.test.items([i for i, c in enumerate(data.test.class_names) if c == name]).x


# ------------------------------------------------------------------------------------------------------ words

@pytest.mark.parametrize('text, expected', [
    ('a=/b', Wanted('a', '/b')), ('a=C:/b:rot90', Wanted('a', 'C:/b', ('rot90',))),
    ('a=/b=c:d', Wanted('a', '/b=c:d')), ('a=test:rot180:invert', Wanted('a', 'test', ('rot180', 'invert'))),
    ('a=./test', Wanted('a', './test'))])
def test_names_paths_and_changes(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize('text', ['', 'a', 'a=', '=b', 'a/b=c', 'a=test', 'a=test:turn', 'a=:flip'])
def test_words_that_mean_nothing(text):
    with pytest.raises(UserError, match='--ood'):
        parse(text)


# --------------------------------------------------------------------------------------------------- one set

def test_sets_are_brought_to_the_shape_of_the_run(config):
    names = ('fashion_mnist', 'notmnist', 'svhn', 'smallnorb', 'cifar10', 'omniglot', 'celeba_64', 'covid')
    given = load_data(config('mnist'))
    data = with_ood(given, [f'{name}={config(name).data}' for name in names])
    counts = {name: data.test.class_names.count(name) for name in names}
    assert counts == dict.fromkeys(names, 9) | {'covid': 33}, "the test parts; all images of a folder"
    assert data.anomalous_classes == names and data.test.labels.tolist() == [0] * 9 + [1] * 96
    assert len({e.id for e in data.test.entries}) == len(data.test)
    x = data.test.items(range(len(data.test))).x
    assert x.shape[1:] == (1, 32, 32) and set(x.unique().tolist()) == {0, 1}
    assert x[:, :, :2].sum() == x[:, :, -2:].sum() == x[..., :2].sum() == x[..., -2:].sum() == 0
    assert torch.equal(x[:9], given.test.items(range(9)).x) and given.split == data.split
    batches = [batch for _, batch in eval_batches(data.test, 7)]
    assert torch.equal(torch.cat([b.x for b in batches]), x)
    assert all(e.file_bytes > 0 for e in data.test.entries)


def test_pixels_are_those_of_the_set_and_binary_ones_have_its_means(config):
    data = load_data(config('mnist', likelihood='discretized'))
    fashion = f'fashion_mnist={config("fashion_mnist").data}'
    x = of_class(with_ood(data, [fashion]), 'fashion_mnist')
    expected = np.stack([image(1000 + i, 28, 28, 1)[..., 0] for i in range(9)])
    assert np.array_equal(np.rint(x[:, 0, 2:-2, 2:-2].numpy() * 255), expected)
    y = of_class(with_ood(load_data(config('mnist')), [fashion]), 'fashion_mnist')
    assert (y.mean() - x.mean()).abs() < 0.02


def test_only_the_test_files_are_needed(config, tmp_path):
    for file in ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'):
        (tmp_path / config('kmnist').data / 'KMNIST' / 'raw' / file).unlink()
    assert len(with_ood(load_data(config('mnist')), [f'kmnist={tmp_path / "kmnist"}']).test) == 18


@pytest.mark.parametrize('change, by_hand', [
    ('rot90', lambda x: x.transpose(-1, -2).flip(-2)), ('rot180', lambda x: x.flip((-1, -2))),
    ('rot270', lambda x: x.transpose(-1, -2).flip(-1)), ('flip', lambda x: x.flip(-1)),
    ('invert', lambda x: 1 - x), ('rot90:rot270', lambda x: x), ('invert:flip:invert', lambda x: x.flip(-1))])
def test_changes_by_hand(change, by_hand, config):
    given = load_data(config('svhn', anomalous_classes=('3',)))
    data = with_ood(given, [f'changed=test:{change}'])
    normal = given.test.items(np.flatnonzero(given.test.labels == 0)).x
    assert torch.allclose(of_class(data, 'changed'), by_hand(normal)), "the normal images alone"
    foreign = of_class(with_ood(given, [f'cifar10={config("cifar10").data}:{change}']), 'cifar10')
    cifar10 = torch.from_numpy(np.stack([image(1000 + i, 32, 32) for i in range(9)])).permute(0, 3, 1, 2)
    assert torch.allclose(foreign, by_hand(cifar10 / 255)), "before the border is made"
    assert set(change.split(':')) <= set(CHANGES)


def test_a_set_of_inliers_takes_the_place_of_the_runs_normal_images(config):
    given = load_data(config('svhn', anomalous_classes=('3',)))
    data = with_ood(given, [f'cifar10={config("cifar10").data}:inlier', 'turned=test:rot90'])
    classes = {e.class_name: (e.label, e.has_mask) for e in data.test.entries}
    assert classes == {'3': (1, False), 'cifar10': (0, True), 'turned': (1, False)}
    assert data.normal_classes[-1] == 'cifar10' and data.anomalous_classes == ('3', 'turned')
    assert data.test.items(range(len(data.test))).y.tolist() == data.test.labels.tolist()
    inverted = with_ood(given, [f'cifar10={config("cifar10").data}:invert:inlier'])
    assert torch.allclose(of_class(inverted, 'cifar10'), 1 - of_class(data, 'cifar10'))


def test_inverting_a_run_does_not_invert_what_is_told_from_it(config):
    data = load_data(config('kmnist', invert=True, likelihood='discretized'))
    mnist = f'mnist={config("mnist").data}'
    x = of_class(with_ood(data, [mnist]), 'mnist')
    assert np.array_equal(np.rint(x[0, 0, 2:-2, 2:-2].numpy() * 255), image(1000, 28, 28, 1)[..., 0])
    back = of_class(with_ood(data, ['again=test:invert']), 'again')
    assert torch.equal(back, load_data(config('kmnist', likelihood='discretized')).test.items(range(9)).x)


def test_bits_and_noise_are_those_of_the_run(config, tmp_path):
    make_images(tmp_path / 'deep' / 'normal', 12, seed=0)
    run = DataConfig(dataset='folder', data=str(tmp_path / 'deep'), num_x_bits=16, image_size=28,
                     cache_dir=str(tmp_path / 'cache'))
    mnist = f'mnist={config("mnist").data}'
    x = of_class(with_ood(load_data(run), [mnist]), 'mnist')
    expected = np.stack([image(1000 + i, 28, 28, 1)[..., 0] for i in range(9)]) / 255
    assert np.allclose(x[:, 0], expected, atol=1e-6), "8 bits are full scale in 16"
    x = of_class(with_ood(load_data(replace(run, num_x_bits=8, dequantize=True)), [mnist]), 'mnist')
    assert np.array_equal((x[:, 0] * 256).floor(), np.rint(expected * 255))


def test_some_of_a_set_are_drawn_by_seed(config):
    data = load_data(config('mnist'))
    sets = [f'kmnist={config("kmnist").data}', f'any={config("covid").data}', 'turned=test:rot90',
            f'celeba_64={config("celeba_64").data}']

    def ids(*how):
        return [e.id for e in with_ood(data, sets, *how).test.entries if e.label]

    assert len(ids(4, 0)) == 16 and ids(4, 0) == ids(4, 0) and ids(4, 0) != ids(4, 1)
    assert set(ids(4, 0)) < set(ids(6, 0)) < set(ids(0, 5)) and len(ids(0, 5)) == 9 + 33 + 9 + 9


def test_an_lmdb_is_its_folder(config, tmp_path):
    make_images(tmp_path / 'a' / 'normal', 4, seed=0)
    make_images(tmp_path / 'a' / 'ill', 3, seed=1)
    wanted = FolderConfig(dataset='folder', data=str(tmp_path / 'a'), cache_dir=str(tmp_path / 'cache'))
    pack(plan(wanted), tmp_path / 'a.lmdb', 1, False)
    wanted = FolderConfig(dataset='kmnist', data=config('kmnist').data, cache_dir=str(tmp_path / 'cache'))
    pack(plan(wanted), tmp_path / 'k.lmdb', 1, False)
    data = with_ood(load_data(config('mnist', likelihood='discretized')),
                    [f'a={tmp_path / "a"}', f'b={tmp_path / "a.lmdb"}', f'c={tmp_path / "k.lmdb"}',
                     f'kmnist={config("kmnist").data}'])
    assert len(of_class(data, 'a')) == 7 and torch.equal(of_class(data, 'a'), of_class(data, 'b'))
    assert len(of_class(data, 'c')) == 9 and torch.equal(of_class(data, 'c'), of_class(data, 'kmnist'))


def test_masks_of_the_run_stay_and_others_have_none(config, tmp_path):
    given = load_data(config('folder', image_size=16))
    data = with_ood(given, [f'svhn={config("svhn").data}'])
    a, b = (part.items(range(len(part))) for part in (given.test, data.test))
    assert a.mask.any() and torch.equal(b.mask[:len(a.id)], a.mask) and not b.mask[len(a.id):].any()
    assert data.test.items([len(data.test) - 1]).mask.shape == (1, 1, 16, 16)
    assert data.test[len(data.test) - 1][1] == 1 and data.test[0][3] == given.test[0][3]


def test_mistakes_are_one_clear_line(config, tmp_path):
    data = load_data(config('svhn', anomalous_classes=('3',)))
    (tmp_path / 'empty').mkdir()
    make_images(tmp_path / 'bad', 2, seed=0)
    (tmp_path / 'bad' / '000.png').write_bytes(b'x')
    for sets, words in {
            ('a=/no/where',): 'no folder of images', (f'a={tmp_path / "empty"}',): 'no image below',
            (f'3={tmp_path / "bad"}',): 'a class of this name', (f'mnist={tmp_path}',): 'MNIST/raw',
            ('a=test:flip', 'a=test:rot90'): 'a class of this name',
            (f'a={tmp_path / "bad"}',): '000.png .*--skip_corrupt'}.items():
        with pytest.raises(UserError, match=words) as error:
            with_ood(data, sets)
        assert '\n' not in str(error.value)
    skipping = replace(data, config=replace(data.config, skip_corrupt=True))
    assert len(of_class(with_ood(skipping, [f'a={tmp_path / "bad"}']), 'a')) == 1


def test_a_size_that_only_one_side_has_is_no_size(config):
    data = with_ood(load_data(config('imagenet_32')), [f'svhn={config("svhn").data}', 'turned=test:rot90'])
    assert {e.file_bytes for e in data.test.entries} == {0}
    assert of_class(data, 'svhn').shape == (9, 3, 32, 32)
    data = with_ood(load_data(config('mnist')), [f'kmnist={config("kmnist").data}'])
    sizes = [e.file_bytes for e in data.test.entries]
    assert sizes[:9] == sizes[9:], "the same pictures, in a frame or not"
    data = with_ood(load_data(config('mnist')), [f'svhn={config("svhn").data}'])
    sizes = [e.file_bytes for e in data.test.entries]
    assert 0 < max(sizes[9:]) < 2 * max(sizes[:9]), "grey and 28 x 28 like the others, not as it is published"


def test_images_of_the_runs_own_data_are_reported(config):
    data = load_data(config('kmnist'))
    assert any('9 images of kmnist are images of the run' in line
               for line in with_ood(data, [f'kmnist={data.config.data}']).report)


# --------------------------------------------------------------------------------------------------- programs

@pytest.fixture(scope='module')
def trained(train_flags, data_folder, tmp_path_factory):
    """A run on normal images alone, and a folder with two classes more than it knows."""
    root = tmp_path_factory.mktemp('ood')
    for name in ('run', 'all'):
        (root / name).mkdir()
        (root / name / 'normal').symlink_to(data_folder / 'normal')
    (root / 'all' / 'spot').symlink_to(data_folder / 'spot')
    make_images(root / 'all' / 'tilt', 7, seed=5)
    args = train.parse_args([*train_flags, '--data', str(root / 'run'), '--root', str(root), '--save', 'a',
                             '--max_steps', '2'])
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return root


def run(trained, out, *more):
    """The metrics and the rows of scores.csv of an evaluation in this process."""
    args = evaluate.parse_args(['--checkpoint', str(trained / 'eval-a'), '--save', str(out), '--eval_mode',
                                'anomaly', '--num_iw_samples', '2', '--num_draws', '1', '--num_bootstrap',
                                '9', *ONE_THREAD, *map(str, more)])
    assert launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args)) == 0
    with (out / 'scores.csv').open() as f:
        return json.loads((out / 'metrics.json').read_text())['anomaly'], list(csv.DictReader(f))


@pytest.mark.page
def test_scores_are_those_of_class_folders(trained, tmp_path):
    split = (trained / 'eval-a' / 'split.json').read_bytes()
    a, rows_a = run(trained, tmp_path / 'a', '--data', trained / 'all')
    b, rows_b = run(trained, tmp_path / 'b', '--ood', f'spot={trained / "all" / "spot"}',
                    f'tilt={trained / "all" / "tilt"}')
    assert b['counts']['test'] == {'normal': 10, 'spot': 10, 'tilt': 7}
    assert b['groups'] == ['spot', 'tilt', 'all']
    assert rows_a == rows_b and {row['class'] for row in rows_b} == {'normal', 'spot', 'tilt'}
    for name in a['scores']:
        assert a['scores'][name]['metrics'] == b['scores'][name]['metrics']
        assert a['scores'][name]['threshold'] == b['scores'][name]['threshold']
    assert (trained / 'eval-a' / 'split.json').read_bytes() == split
    report = (tmp_path / 'b' / 'report.html').read_text()
    assert 'tilt' in report and 'spot' in report


def test_published_and_turned_images_are_classes(trained, tmp_path):
    svhn = make_standin('svhn', tmp_path / 'svhn')
    result, rows = run(trained, tmp_path / 'out', '--ood', f'svhn={svhn}', 'upside_down=test:rot180',
                       '--max_ood', 6)
    assert result['counts']['test'] == {'normal': 10, 'svhn': 6, 'upside_down': 6}
    assert set(result['scores']['nelbo']['metrics']) == {'svhn', 'upside_down', 'all'}
    own = {row['id']: row for row in rows if row['class'] == 'normal'}
    for row in rows:
        if row['class'] == 'upside_down':       # what does not see where a pixel is
            same = own[row['id'].removeprefix('upside_down/')]
            assert float(row['mean_intensity']) == pytest.approx(float(same['mean_intensity']))
            assert row['file_size'] == same['file_size']


@pytest.mark.parametrize('flags, told', [
    (('--ood', 'a=/no/where'), '/no/where'), (('--ood', 'a'), 'NAME=PATH'),
    (('--max_ood', -1, '--ood', 'a=test:flip'), '--max_ood -1'),
    (('--eval_mode', 'sample', '--ood', 'a=test:flip'), '--ood is a flag of --eval_mode anomaly')])
def test_wrong_flags_are_one_line(trained, flags, told, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('sys.argv', ['evaluate.py', '--checkpoint', str(trained / 'eval-a'), '--save',
                                     str(tmp_path), '--eval_mode', 'anomaly', *map(str, flags), *ONE_THREAD])
    with pytest.raises(SystemExit) as end:
        evaluate.run_program(evaluate.main)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and len(errors.splitlines()) == 1 and told in errors, errors
