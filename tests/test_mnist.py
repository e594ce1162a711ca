"""MNIST from its own files: parts, border, binarization, and batches of its digits on any number of ranks."""

import gzip
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx
from ranks import as_rank
from test_datasets import same, take

from datasets import DataConfig, load_data
from distributions import Pixels
from readers.batches import train_batches
from utils import UserError


@pytest.fixture
def mnist(tmp_path):
    """40 + 20 digits of noise in MNIST's files, the test files packed and the training files not."""
    raw = tmp_path / 'mnist' / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for name, count, pack in (('train', 40, False), ('t10k', 20, True)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28)).astype(np.uint8)
        images[:, :5], images[:, 5:9] = 0, 255
        files = {f'{name}-images-idx3-ubyte': struct.pack('>4I', 0x803, count, 28, 28) + images.tobytes(),
                 f'{name}-labels-idx1-ubyte': struct.pack('>2I', 0x801, count)
                 + bytes(i % 10 for i in range(count))}
        for file, data in files.items():
            (raw / (file + '.gz' * pack)).write_bytes(gzip.compress(data) if pack else data)
    return DataConfig(data=str(tmp_path / 'mnist'), cache_dir=str(tmp_path / 'cache'))


def test_mnist_parts_shape_and_padding(mnist):
    data = load_data(mnist)
    assert (len(data.train), len(data.val), len(data.test)) == (40, 0, 20)
    assert data.shape == (1, 32, 32) and data.pixels == Pixels('bernoulli', 1, 2)
    x = data.train.items(range(40)).x
    assert set(x.unique().tolist()) == {0, 1}
    assert (x[:, :, 2:7] == 0).all() and (x[:, :, 7:11, 2:30] == 1).all()
    assert (x[:, :, 7:11, [0, 1, 30, 31]] == 0).all()
    assert all(e.file_bytes > 60 for e in data.test.entries)
    assert load_data(replace(mnist, image_size=28)).pixels.padding == 0
    with pytest.raises(UserError, match='28 x 28'):
        load_data(replace(mnist, image_size=31))


def test_mnist_with_a_digit_left_out(mnist):
    data = load_data(replace(mnist, anomalous_classes=('7',)))
    assert (len(data.train), len(data.val), len(data.test)) == (32, 4, 20)
    assert '7' not in data.train.class_names + data.val.class_names
    assert data.test.labels.sum() == 2


def test_mnist_that_is_missing_or_cut(mnist, tmp_path):
    with pytest.raises(UserError, match='MNIST/raw'):
        load_data(replace(mnist, data=str(tmp_path)))
    path = tmp_path / 'mnist' / 'MNIST' / 'raw' / 'train-images-idx3-ubyte'
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r'train-images-idx3-ubyte is not a whole IDX file .*31350'):
        load_data(mnist)


def test_dynamic_binarization_is_new_every_epoch_and_static_is_not(mnist):
    def epochs(how):
        part = load_data(replace(mnist, binarize=how)).train
        batches = train_batches(part, 40, seed=0)
        return [dict(zip(b.id, b.x, strict=True)) for b in (next(batches), next(batches))]

    first, second = epochs('dynamic')
    assert all((first[k] != second[k]).any() for k in first)
    mean = torch.stack(list(first.values()))[:, :, 11:30, 2:30].mean()
    assert mean == approx(0.5, abs=0.02)                # the mean grey level of the noise
    first, second = epochs('static')
    assert all(torch.equal(first[k], second[k]) for k in first)
    part = load_data(mnist).test
    assert torch.equal(part.items([3, 5]).x[1], part.items([5]).x[0])


def test_likelihood_flag_makes_digits_grey_and_images_binary(mnist, tmp_path):
    grey = load_data(replace(mnist, likelihood='discretized'))
    assert grey.pixels == Pixels('discretized', 8, 2)
    assert len(grey.train.items(range(40)).x.unique()) > 100
    (tmp_path / 'a' / 'normal').mkdir(parents=True)
    Image.fromarray(np.full((64, 64), 191, np.uint8)).save(tmp_path / 'a' / 'normal' / '0.png')
    for i in range(1, 9):
        Image.fromarray(np.full((64, 64), i, np.uint8)).save(tmp_path / 'a' / 'normal' / f'{i}.png')
    data = load_data(DataConfig(dataset='folder', data=str(tmp_path / 'a'), cache_dir=str(tmp_path / 'c'),
                                likelihood='bernoulli', val_fraction=0.0, test_fraction=0.0))
    assert data.pixels == Pixels('bernoulli', 1, 0)
    x = data.train.items([[e.id for e in data.train.entries].index('normal/0.png')]).x
    assert set(x.unique().tolist()) == {0, 1} and x.mean().item() == approx(191 / 255, abs=0.03)


@pytest.mark.parametrize('world', [2, 3])
def test_the_ranks_together_see_the_batch_of_one_process(mnist, world):
    part = load_data(mnist).train
    one = take(12, train_batches(part, 2 * world, seed=5))
    ranks = []
    for rank in range(world):
        with as_rank(rank, world):
            ranks.append(take(12, train_batches(part, 2, seed=5)))
    for step, batch in enumerate(one):
        assert [name for r in range(world) for name in ranks[r][step].id] == batch.id
        assert torch.equal(torch.cat([ranks[r][step].x for r in range(world)]), batch.x)


@pytest.mark.parametrize('workers', [0, 2])
def test_training_resumes_at_any_step(mnist, workers):
    part = load_data(mnist).train
    whole = take(15, train_batches(part, 9, seed=1))                     # 4 steps an epoch
    for step in (1, 4, 11):
        resumed = train_batches(part, 9, seed=1, first_step=step, workers=workers)
        assert all(same(a, b) for a, b in zip(take(3, resumed), whole[step:step + 3], strict=True))
