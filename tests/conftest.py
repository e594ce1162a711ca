"""Small worlds that several tests share: a data folder, a run trained on it, a way to start programs."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')     # tests run side by side; threads would wait for each other
# Where Python is told not to keep what it compiles, every program that a test starts would compile PyTorch
# anew: 4 seconds. Workers of pytest find the folder in their environment.
if sys.dont_write_bytecode:
    compiled = tempfile.TemporaryDirectory(prefix='compiled-')
    sys.dont_write_bytecode, sys.pycache_prefix = False, compiled.name
    os.environ |= {'PYTHONDONTWRITEBYTECODE': '', 'PYTHONPYCACHEPREFIX': compiled.name}

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
TINY_NVAE = '''
    --num_channels_enc 4 --num_preprocess_blocks 1 --num_preprocess_cells 1
    --num_channels_dec 4 --num_postprocess_blocks 1 --num_postprocess_cells 1
    --num_latent_scales 2 --num_groups_per_scale 1 --num_latent_per_group 2 --num_mixture_dec 2
    --use_se --res_dist --weight_decay_norm 1e-2'''.split()

# Modules whose fixtures take long. They come first, as workers of pytest take over the last tests of one
# another, and each of two that share a module makes its fixtures.
EARLY = [f'test_{name}' for name in (
    'hosts', 'parallel', 'tutorial', 'detect', 'report', 'report_browser', 'predict', 'recipes', 'compare',
    'evaluate', 'latents')]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.module.__name__ not in EARLY)


def make_images(folder, count, seed, spot=False):
    """Blurry grey 16 x 16 images; with `spot` a bright square in each."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        smooth = np.kron(rng.uniform(60, 160, (4, 4)), np.ones((4, 4))) + rng.normal(0, 4, (16, 16))
        if spot:
            smooth[5:11, 5:11] += 80
        Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).save(folder / f'{i:03d}.png')


@pytest.fixture(scope='session')
def data_folder(tmp_path_factory):
    """50 normal images and 10 with a bright spot, in the `folder` layout."""
    folder = tmp_path_factory.mktemp('images')
    make_images(folder / 'normal', 50, seed=0)
    make_images(folder / 'spot', 10, seed=1, spot=True)
    return folder


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='session')
def train_flags(data_folder, cache):
    """Flags of a run of 2 epochs of 4 steps, a few hundred weights."""
    return [
        *TINY_NVAE,
        '--dataset',
        'folder',
        '--data',
        str(data_folder),
        '--cache_dir',
        str(cache),
        '--image_size',
        '16',
        '--batch_size',
        '8',
        '--epochs',
        '2',
        '--warmup_epochs',
        '1',
        '--num_threads',
        '1',
        '--log_every',
        '1',
        '--image_every',
        '0',
        '--val_iw_samples',
        '2',
        '--device',
        'cpu',
        '--checkpoint_activations',     # else every run first estimates its memory
        'off',
    ]


@pytest.fixture(scope='session')
def undisturbed(train_flags, tmp_path_factory):
    """Flags of a run of 24 steps on two processes that saves every third, and its last checkpoint."""
    from processes import end, start

    folder = tmp_path_factory.mktemp('undisturbed')
    flags = [*train_flags, '--batch_size', '4', '--epochs', '6', '--val_every', '100', '--save_every', '3']
    process = start([sys.executable, 'train.py', *flags, '--root', folder, '--num_process_per_node', '2'],
                    folder / 'log')
    assert end(process) == [0], (folder / 'log').read_text()
    return flags, folder / 'eval-exp' / 'checkpoint.pt'


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """Drawing takes longer than all the rest: tests that look at a report or its figures have that mark."""
    has = request.node.get_closest_marker
    kept = lambda drawn, out: {name: '' for name, figure in drawn.items() if figure is not None}
    drawn = {'figures.keep': kept, 'comparison.keep': kept} | dict.fromkeys(
        (f'comparison.{name}' for name in ('forest_figure', 'difference_figure', 'curve_figure')),
        lambda *given: '')
    drawn = {} if has('figures') else drawn if has('page') else drawn | {'page.write': lambda *given: ''}
    for name, stand_in in drawn.items():
        monkeypatch.setattr(f'anomaly.report.{name}', stand_in)


@pytest.fixture
def program():
    """program('train.py', *flags) runs a program of the project to its end."""

    def run(*words, env=None, check=True, timeout=120):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})},
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def forked_processes(monkeypatch):
    """`launch` forks its processes from one that has imported PyTorch: each starts seconds earlier."""
    from processes import fork_processes
    fork_processes(monkeypatch)


@pytest.fixture
def same_weights():
    """same_weights(a, b): two checkpoints hold equal weights, optimizer state and averages, bit for bit."""

    def flat(value, name=''):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from flat(item, f'{name}/{key}')

    def compare(a, b):
        a, b = (
            dict(
                flat(
                    {key: torch.load(path, weights_only=True)[key] for key in ('weights', 'optimizer', 'ema')}
                )
            )
            for path in (a, b)
        )
        assert a.keys() == b.keys() and a
        return all(torch.equal(a[name], b[name]) for name in a)

    return compare


@pytest.fixture
def config(tmp_path):
    """config(name) is a DataConfig of a stand-in, made at the first call."""
    from standins import make_standin

    from datasets import DataConfig

    def make(name, **flags):
        folder = tmp_path / name
        data = folder if folder.exists() else make_standin(name, folder)
        return DataConfig(dataset=name, data=str(data), cache_dir=str(tmp_path / 'cache'), **flags)
    return make
