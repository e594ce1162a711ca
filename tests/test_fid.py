"""FID: feature networks, and the programs from end to end."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import evaluate
import evaluation.fid as fid
import train
from datasets import DataConfig, load_data
from distributed import launch
from distributions import Pixels
from evaluation import sampling
from evaluation.fid import FidConfig, Moments, load_features
from evaluation.sampling import samples
from families.nvae.model import NVAE
from model import build_model, describe, load_model
from scripts import precompute_fid_statistics as script
from storage.checkpoint import save_checkpoint
from utils import UserError, read_flags

CPU = torch.device('cpu')
ONE_THREAD = ('--device', 'cpu', '--num_threads', '1')
D = 6                                                    # features of the tiny network


def moments(features):
    """(mean, covariance) of features (N, D), by numpy."""
    features = np.asarray(features, np.float64)
    return torch.from_numpy(features.mean(0)), torch.from_numpy(np.cov(features, rowvar=False))


# --------------------------------------------------------------------------------------------------- networks

class Tiny(nn.Module):
    """Smooth features of images with one channel."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer('weight', torch.randn(D, 1, 5, 5, generator=generator))

    def forward(self, x):
        return torch.relu(torch.conv2d(x, self.weight, stride=2)).mean(dim=(2, 3))


def save_network(network, path, side=16):
    """As TorchScript, or as torch.export if the name says so; the format of docs/fid.md."""
    example = torch.zeros(2, 1, side, side)
    if path.suffix == '.pt2':
        any_number = ({0: torch.export.Dim('batch')},)
        torch.export.save(torch.export.export(network, (example,), dynamic_shapes=any_number), path)
    else:
        with pytest.warns(FutureWarning, match='deprecated'):
            torch.jit.trace(network, example).save(path)
    return str(path)


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    """Files of the tiny network: by torch.jit, and by torch.export."""
    folder = tmp_path_factory.mktemp('networks')
    return [save_network(Tiny().eval(), folder / name) for name in ('net.pt', 'net.pt2')]


def network_flags(path):
    return FidConfig(fid_features=str(path))


@pytest.mark.parametrize('index, kind', [(0, 'TorchScript'), (1, 'torch.export')])
def test_own_networks_see_eight_bits(networks, index, kind):
    features = load_features(network_flags(networks[index]), (1, 16, 16), CPU)
    assert features.identity.keys() == {'kind', 'sha256', 'dimensions'} and features.dimensions == D
    assert features.kind == kind and len(features.sha256) == 64
    x = torch.rand(7, 1, 16, 16)
    expected = Tiny()((x * 255).round() / 255)
    assert torch.allclose(features(x), expected.double(), atol=1e-6) and features(x).dtype == torch.float64
    assert not torch.allclose(Tiny()(x).double(), features(x), atol=1e-6)
    assert torch.allclose(features(x[:1]), expected[:1].double(), atol=1e-6)


@pytest.mark.parametrize('change, told', [
    (lambda x: x.flatten(1) * torch.nan, 'not finite'),
    (lambda x: x[:, :, 0, 0].sum(1), r'into \(3,\): expected \(3, D\)'),
    (lambda x: x.flatten(1)[:1], r'into \(1, 256\): expected \(3, D\)'),
    (lambda x: x.flatten(1) - x.flatten(1).mean(0), 'in eval mode'),
    (lambda x: x.flatten(1) @ torch.ones(9, 2), r'fails on images \(B, C, H, W\) = \(3, 1, 16, 16\)'),
])
def test_networks_that_will_not_do_are_refused_before_the_work_begins(change, told, tmp_path, monkeypatch):
    monkeypatch.setitem(fid.FORMATS, 'TorchScript', lambda file, device: change)
    save_network(Tiny(), tmp_path / 'net.pt')
    with pytest.raises(UserError, match=told) as error:
        load_features(network_flags(tmp_path / 'net.pt'), (1, 16, 16), CPU)
    assert '\n' not in str(error.value)


def test_an_export_for_one_batch_size_and_other_channels(networks, tmp_path):
    example = torch.zeros(2, 1, 16, 16)
    torch.export.save(torch.export.export(Tiny(), (example,)), tmp_path / 'fixed.pt2')
    with pytest.raises(UserError, match='any B'):
        load_features(network_flags(tmp_path / 'fixed.pt2'), (1, 16, 16), CPU)
    for path in networks:
        with pytest.raises(UserError, match=r'fails on images \(B, C, H, W\) = \(3, 3, 16, 16\)') as error:
            load_features(network_flags(path), (3, 16, 16), CPU)
        assert '\n' not in str(error.value)


def test_wrong_files(networks, tmp_path):
    def told(**flags):
        with pytest.raises(UserError) as error:
            load_features(FidConfig(**flags), (1, 16, 16), CPU)
        assert '\n' not in str(error.value)
        return str(error.value)
    cut = tmp_path / 'cut.pt'
    cut.write_bytes((ROOT / networks[0]).read_bytes()[:-999])
    torch.save({'a': torch.zeros(2)}, tmp_path / 'weights.pt')
    assert fid.INCEPTION_URL in told() and '0 are given' in told()
    assert '2 are given' in told(inception_weights='a', fid_features='b')
    assert 'No such file' in told(fid_features='/no/where')
    assert fid.INCEPTION_URL in told(inception_weights='/no/where')
    assert 'damaged' in told(fid_features=str(cut))
    assert 'cannot be read as TorchScript' in told(fid_features=str(tmp_path / 'weights.pt'))
    with pytest.raises(UserError, match='model draws without bounds'):
        load_features(network_flags(networks[0]), (1, 16, 16), CPU)(torch.full((2, 1, 16, 16), torch.nan))


class Trap:
    def __reduce__(self):
        return print, ('sprung',)


def test_inception(tmp_path, monkeypatch, capfd):
    """The library's own features of the images as 8-bit RGB, with nothing run or fetched besides."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    class Unloaded(library.FeatureExtractorInceptionV3):         # with the random weights it is built with
        def load_state_dict(self, *_):
            pass

    def refuse(*_, **__):
        raise AssertionError('a download')
    monkeypatch.setattr(library, 'load_state_dict_from_url', refuse)
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    inception = Unloaded('inception-v3-compat', ['2048'], empty)
    for module in inception.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(2.0)                        # else features vanish with depth
    weights = inception.state_dict()
    path = tmp_path / 'weights.pth'
    torch.save(weights, path)
    features = load_features(FidConfig(inception_weights=str(path)), (1, 16, 16), CPU)
    assert features.identity == {'kind': 'inception-v3-compat', 'sha256': fid.hashlib.sha256(
        path.read_bytes()).hexdigest(), 'dimensions': 2048}
    for channels in (1, 3):
        x = torch.rand(2, channels, 16, 16)
        expected = inception((x * 255).round().to(torch.uint8).expand(2, 3, 16, 16))[0].double()
        torch.testing.assert_close(features(x), expected, rtol=1e-5, atol=1e-6)      # other layouts in memory
        assert expected.std(0).max() > 1e-4

    def told(content):
        torch.save(content, path)
        with pytest.raises(UserError, match='Expected the weights from https') as error:
            load_features(FidConfig(inception_weights=str(path)), (1, 16, 16), CPU)
        assert '\n' not in str(error.value)
        return str(error.value)
    assert 'holds more than weights' in told({'a': Trap()})
    assert 'not a dictionary of weights' in told([1, 2]) and 'not a dictionary' in told({'epoch': 3})
    assert 'another network' in told({'a': torch.zeros(2)})
    assert 'another network' in told(weights | {'fc.weight': torch.zeros(2)})
    assert 'sprung' not in capfd.readouterr().out


# --------------------------------------------------------------------------------------------------- programs

@pytest.fixture(scope='module')
def trained(train_flags, tmp_path_factory):
    """The folder of a run of 8 steps on 32 images."""
    root = tmp_path_factory.mktemp('runs')
    args = train.parse_args([*train_flags, '--root', str(root), '--save', 'a'])
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return root / 'eval-a'


NUMBERS = ('--num_samples', 40, '--batch_size', 12)      # 4 batches of samples, 3 of training images


def run(checkpoint, out, network, *more):
    """The FID of a checkpoint, in this process or in those it starts: what metrics.json holds."""
    args = evaluate.parse_args(['--checkpoint', str(checkpoint), '--save', str(out), *ONE_THREAD,
                                '--eval_mode', 'evaluate_fid', '--fid_features', str(network),
                                *map(str, (*NUMBERS, *more))])
    assert launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return json.loads((out / 'metrics.json').read_text())['fid']


def by_hand(trained, data_flags, temperature, mean=True, number=40):
    """The same FID from all images at once, by the formula as it is published."""
    model = load_model(trained)
    drawn = torch.cat([x for _, x in samples(model, number, 12, temperature, seed=1, mean=mean)])
    split = json.loads((trained / 'split.json').read_text())
    real = load_data(data_flags, split).train.items(range(32)).x
    (mu1, sigma1), (mu2, sigma2) = (moments(Tiny()((x * 255).round() / 255)) for x in (drawn, real))
    roots = torch.linalg.eigvals(sigma1 @ sigma2).sqrt().real.sum()
    return ((mu1 - mu2).square().sum() + (sigma1 + sigma2).trace() - 2 * roots).item()


@pytest.fixture
def data_flags(data_folder, cache):
    return DataConfig(dataset='folder', data=str(data_folder), image_size=16, cache_dir=str(cache))


def test_fid_by_hand(trained, networks, data_flags, tmp_path, capsys):
    result = run(trained, tmp_path, networks[0])
    assert result['fid'] == pytest.approx(by_hand(trained, data_flags, 0.7), rel=1e-5)
    assert result == {'fid': result['fid'], 'num_images': 40, 'num_reference': 32, 'reference': 'train part',
                      'reference_network': 'same', 'images': 'mean', 'temperature': 0.7, 'seed': 1,
                      'readjust_bn': False, 'batch_size': 12, 'features': result['features']}
    assert result['features']['kind'] == 'TorchScript' and result['features']['dimensions'] == D
    assert 'FID ' in capsys.readouterr().out
    exported = run(trained, tmp_path, networks[1])
    assert exported['fid'] == pytest.approx(result['fid'], rel=1e-4)
    assert exported['features']['sha256'] != result['features']['sha256']


def test_temperature_draws_and_seed_are_used(trained, networks, data_flags, tmp_path):
    warm = run(trained, tmp_path, networks[0], '--temp', 1.0)
    drawn = run(trained, tmp_path, networks[0], '--fid_images', 'sample')
    assert warm['fid'] == pytest.approx(by_hand(trained, data_flags, 1.0), rel=1e-5)
    assert warm['temperature'] == 1
    assert drawn['fid'] == pytest.approx(by_hand(trained, data_flags, 0.7, mean=False), rel=1e-5)
    assert drawn['images'] == 'sample'
    again, other = (run(trained, tmp_path, networks[0], '--seed', seed)['fid'] for seed in (1, 2))
    values = {warm['fid'], drawn['fid'], again, other}
    assert len(values) == 4 and run(trained, tmp_path, networks[0])['fid'] == again


def test_readjusted_batch_norm(trained, networks, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sampling, 'readjust_batch_norm', lambda model, temp, seed: calls.append((temp, seed)))
    assert run(trained, tmp_path, networks[0], '--readjust_bn', '--temp', 0.5)['readjust_bn'] is True
    assert calls == [(0.5, 1)]


def test_two_processes_give_the_number_of_one(trained, networks, tmp_path, capfd, forked_processes):
    """Of 3 batches of training images and of 3 of samples rank 0 has 2."""
    flags = (networks[0], '--num_samples', 25)
    one = run(trained, tmp_path, *flags)
    capfd.readouterr()
    two = run(trained, tmp_path, *flags, '--num_process_per_node', 2)
    assert two == one | {'fid': pytest.approx(one['fid'], abs=1e-9)} and one['num_images'] == 25
    assert capfd.readouterr().out.count('FID ') == 1, "only the main process speaks"


def test_few_images_are_said(trained, networks, data_flags, tmp_path, capsys):
    precompute(data_flags, tmp_path, networks[0], '--max_samples', 5)
    assert f'5 images for {D} features (train part): too few' in capsys.readouterr().out
    run(trained, tmp_path, networks[0], '--num_samples', 3, '--batch_size', 3, '--fid_dir', tmp_path)
    told = capsys.readouterr().out
    assert f'3 images for {D} features (samples): too few' in told
    assert f'5 images for {D} features ({tmp_path / "folder.npz"}): too few' in told


# -------------------------------------------------------------------------------------------- kept statistics

def precompute(data_flags, out, network, *more):
    args = script.parse_args(['--dataset', data_flags.dataset, '--data', data_flags.data, '--cache_dir',
                              data_flags.cache_dir, '--fid_dir', str(out), '--fid_features', str(network),
                              '--image_size', str(data_flags.image_size), *ONE_THREAD, *map(str, more)])
    assert launch.launch(script.work, args, read_flags(launch.LaunchConfig, args)) == 0
    with np.load(out / f'{data_flags.dataset}.npz') as stored:
        return dict(stored)


@pytest.fixture
def stored(data_flags, networks, tmp_path):
    """A folder with the statistics of the 32 training images."""
    precompute(data_flags, tmp_path / 'stats', networks[0], '--batch_size', 12)
    return tmp_path / 'stats'


def test_kept_statistics_are_those_of_the_training_images(trained, networks, data_flags, stored, tmp_path):
    with np.load(stored / 'folder.npz') as file:
        mu, sigma, made_of = file['mu'], file['sigma'], json.loads(str(file['made_of']))
    expected = moments(Tiny()(load_data(data_flags).train.items(range(32)).x))
    assert mu.dtype == sigma.dtype == np.float64
    assert np.allclose(mu, expected[0]) and np.allclose(sigma, expected[1], atol=1e-9)
    assert made_of['num_images'] == 32 and made_of['shape'] == [1, 16, 16] and made_of['part'] == 'train'
    now = run(trained, tmp_path, networks[0])
    kept = run(trained, tmp_path, networks[0], '--fid_dir', stored)
    assert kept == now | {'fid': pytest.approx(now['fid'], abs=1e-9), 'reference': str(stored / 'folder.npz')}


def test_at_most_so_many_images_spread_over_the_part(data_flags, networks, tmp_path):
    part = load_data(data_flags).train
    few = precompute(data_flags, tmp_path, networks[0], '--max_samples', 8)
    expected = Tiny()(part.items(range(0, 32, 4)).x).mean(0)
    assert np.allclose(few['mu'], expected, atol=1e-6) and json.loads(str(few['made_of']))['num_train'] == 32


def test_published_statistics_are_taken_and_noted(trained, networks, stored, tmp_path, capsys):
    with np.load(stored / 'folder.npz') as file:
        published = {'mu': file['mu'], 'sigma': file['sigma']}
    expected = run(trained, tmp_path, networks[0], '--fid_dir', stored)['fid']
    np.savez(stored / 'folder.npz', **published)
    result = run(trained, tmp_path, networks[0], '--fid_dir', stored)
    assert (result['fid'], result['num_reference']) == (expected, None)
    assert result['reference_network'] == 'unknown'
    assert 'does not say which network' in capsys.readouterr().out


def fails(run_it, *words):
    """The one line of the UserError, which has all these words."""
    with pytest.raises(UserError) as error:
        run_it()
    line = str(error.value)
    assert '\n' not in line and all(word in line for word in words), line


def test_statistics_that_do_not_fit_are_refused(trained, networks, stored, tmp_path, capsys):
    path = stored / 'folder.npz'

    def evaluated(*more):
        return lambda: run(trained, tmp_path, networks[0], '--fid_dir', stored, *more)
    fails(lambda: run(trained, tmp_path, networks[1], '--fid_dir', stored), 'another network', 'TorchScript')
    evaluated('--split_seed', 3)()
    assert 'other images: --split_seed 0 (here 3).' in capsys.readouterr().out
    made_of = json.loads(str(np.load(path)['made_of'])) | {'shape': [1, 32, 32]}
    mu, sigma = np.load(path)['mu'], np.load(path)['sigma']
    np.savez(path, mu=mu, sigma=sigma, made_of=json.dumps(made_of))
    fails(evaluated(), '(1, 32, 32)', '--image_size')
    np.savez(path, mu=mu[1:], sigma=sigma)
    fails(evaluated(), f'({D - 1},)', f'({D},)')
    np.savez(path, mu=mu * np.nan, sigma=sigma)
    fails(evaluated(), 'finite')
    whole = path.read_bytes()
    for content in (whole[:200], b'', b'nonsense'):
        path.write_bytes(content)
        fails(evaluated(), 'damaged', 'scripts/precompute_fid_statistics.py')
    np.savez(path, mu=np.array([Trap()]), sigma=sigma)
    fails(evaluated(), 'damaged')
    path.unlink()
    fails(evaluated(), 'there is no', 'python scripts/precompute_fid_statistics.py', '--dataset folder',
          '--image_size 16')
    assert 'sprung' not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ binary data

@pytest.fixture
def digits(tmp_path):
    """MNIST of constant grey digits: 30 to train on, each of its own grey level."""
    raw = tmp_path / 'mnist' / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for part, number in (('train', 40), ('t10k', 4)):
        grey = np.arange(60, 60 + number, dtype=np.uint8).reshape(-1, 1, 1) * np.ones((1, 28, 28), np.uint8)
        for name, array in ((f'{part}-images-idx3', grey), (f'{part}-labels-idx1', grey[:, 0, 0] * 0)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes()
            (raw / f'{name}-ubyte').write_bytes(header + array.tobytes())
    return DataConfig(dataset='mnist', data=str(tmp_path / 'mnist'), cache_dir=str(tmp_path / 'cache'))


class Levels(nn.Module):
    """Of 32 x 32 images: the grey level in the middle, its square, and the most in the border of 2."""

    def forward(self, x):
        middle = x[:, 0, 16, 16]
        border = torch.cat([x[:, 0, :2], x[:, 0, -2:]], 1).flatten(1).amax(1)
        return torch.stack([middle, middle ** 2, border], 1)


def test_binary_data_are_compared_as_gray_levels_without_the_border(digits, tmp_path, monkeypatch):
    network = save_network(Levels(), tmp_path / 'levels.pt2', side=32)
    mu = precompute(digits, tmp_path, network)['mu']
    real = load_data(replace(digits, likelihood='discretized')).train
    level = real.items(range(len(real))).x[:, 0, 16, 16]
    assert len(level.unique()) == len(real) > 30, "grey, neither binary nor flipped away"
    assert np.allclose(mu, [level.mean(), level.square().mean(), 0], atol=1e-6)

    config = NVAE.Config(num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=1)
    model = build_model('nvae', (1, 32, 32), config, Pixels('bernoulli', 1, 2))
    save_checkpoint(tmp_path / 'checkpoint.pt', {
        'weights': model.state_dict(), 'description': describe(model),
        'args': {'dataset': 'mnist', 'data': digits.data, 'cache_dir': digits.cache_dir, 'batch_size': 8}})
    seen, add = [], Moments.add
    monkeypatch.setattr(Moments, 'add', lambda self, x: seen.append(x) or add(self, x))
    now = run(tmp_path, tmp_path, network, '--fid_images', 'sample')
    assert now['images'] == 'mean', "binary models are drawn as probabilities"
    assert len(torch.cat(seen)) == len(real) + 40 and (torch.cat(seen)[:, 2] == 0).all()
    drawn = torch.cat(seen)[-40:, 0]
    assert ((drawn > 0) & (drawn < 1)).all()
    kept = run(tmp_path, tmp_path, network, '--fid_dir', tmp_path)
    assert kept['fid'] == pytest.approx(now['fid'], abs=1e-9)


# ----------------------------------------------------------------------------------------------- as a program

def test_the_script_runs_from_any_folder_under_two_processes(data_flags, networks, stored, tmp_path):
    """The numbers of one process."""
    words = [sys.executable, ROOT / 'scripts' / 'precompute_fid_statistics.py',
             '--dataset', 'folder', '--data', data_flags.data, '--cache_dir', data_flags.cache_dir,
             '--image_size', '16', *ONE_THREAD, '--batch_size', '12', '--fid_features', networks[0],
             '--fid_dir', 'here', '--num_process_per_node', '2']
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f'32 images, {D} features' in done.stdout and done.stdout.count('.npz') == 1
    with np.load(tmp_path / 'here' / 'folder.npz') as two, np.load(stored / 'folder.npz') as one:
        assert np.allclose(two['mu'], one['mu'], rtol=1e-13)
        assert np.allclose(two['sigma'], one['sigma'], rtol=1e-9)
        assert str(two['made_of']) == str(one['made_of'])


def test_mistakes_at_the_script(data_flags, networks, tmp_path):
    (tmp_path / 'file').touch()
    fails(lambda: precompute(replace(data_flags, data='/no/where'), tmp_path, networks[0]), '/no/where')
    for folder in (tmp_path / 'file', Path('/proc')):
        fails(partial(precompute, data_flags, folder, networks[0]), f'--fid_dir {folder} cannot be written')
    fails(lambda: precompute(data_flags, tmp_path, tmp_path / 'file'), 'damaged, or neither')
    assert not list(tmp_path.glob('*.npz'))


@pytest.mark.parametrize('flags, told', [
    ({'fid_dir': ''}, '--fid_dir is needed'), ({'max_samples': 1}, '--max_samples 1'),
    ({'batch_size': 0}, '--batch_size 0')])
def test_flags_of_the_script(flags, told):
    with pytest.raises(UserError, match=told):
        script.StatisticsConfig(**{'fid_dir': 'x'} | flags)
