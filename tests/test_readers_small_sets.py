"""FashionMNIST, KMNIST, notMNIST, SVHN, smallNORB, Omniglot; flags of any set: dequantize, invert, static."""

import gzip
import io
import struct
from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import torch
from pytest import approx
from standins import image

from datasets import DataConfig, load_data
from distributions import Pixels
from readers.batches import train_batches
from readers.parts import dequantized, gray_levels
from readers.published import arrays, matlab
from readers.published.arrays import check_labels, read_matrix, read_svhn
from utils import UserError

SMALL = {'fashion_mnist': (28, 28, 1), 'kmnist': (28, 28, 1), 'notmnist': (28, 28, 1), 'svhn': (32, 32, 3),
         'smallnorb': (96, 96, 1)}


def fails(config, words):
    with pytest.raises(UserError, match=words) as error:
        load_data(config)
    assert '\n' not in str(error.value)


# ------------------------------------------------------------------------------------------------------- sets

@pytest.mark.parametrize('name', SMALL)
def test_pixels_and_parts_are_those_of_the_files(name, config):
    data = load_data(config(name, likelihood='discretized'))
    border = data.pixels.padding
    for part, first in ((data.train, 0), (data.test, 1000)):
        images = [image(first + i, *SMALL[name]).transpose(2, 0, 1) for i in range(len(part))]
        images = np.pad(images, ((0, 0), (0, 0), (border, border), (border, border)))
        values = np.rint(part.items(range(len(part))).x.numpy() * 255).astype(np.uint8)
        assert sorted(map(np.ndarray.tobytes, values)) == sorted(map(np.ndarray.tobytes, images))


@pytest.mark.parametrize('name, classes', [
    ('fashion_mnist', ['T-shirt', 'Trouser', 'Pullover', 'Dress']), ('kmnist', ['o', 'ki', 'su', 'tsu']),
    ('svhn', ['0', '1', '2', '3']), ('smallnorb', ['animal', 'human', 'airplane', 'truck'])])
def test_labels_have_their_published_names(name, classes, config):
    assert load_data(config(name)).train.class_names[:4] == classes


def test_letters_are_their_folders(config):
    data = load_data(config('notmnist', anomalous_classes=('C',), val_fraction=0.25))
    assert 'C' not in data.train.class_names + data.val.class_names
    assert {e.class_name for e in data.test.entries if e.label} == {'C'}
    assert all(e.id.split('/')[1] == e.class_name for e in data.test.entries)


def test_alphabets_of_omniglot_are_those_of_their_part_and_keep_their_size_on_request(config):
    data = load_data(config('omniglot_py', image_size=105, invert=True))
    assert set(data.train.class_names) == {'Greek'} and set(data.test.class_names) == {'Tengwar'}
    images = [255 - image(1000 + i, 105, 105, 1)[..., 0] for i in range(len(data.test))]
    values = np.rint(data.test.items(range(len(data.test))).x.numpy() * 255).astype(np.uint8)
    assert sorted(map(np.ndarray.tobytes, values[:, 0])) == sorted(map(np.ndarray.tobytes, images))
    assert load_data(config('omniglot_py')).shape == (1, 28, 28)


def test_binary_sets_are_28_pixels_on_request_and_toys_too(config):
    for name in ('fashion_mnist', 'kmnist', 'notmnist'):
        assert load_data(config(name)).pixels == Pixels('bernoulli', 1, 2)
        data = load_data(config(name, image_size=28))
        assert data.shape == (1, 28, 28) and data.pixels == Pixels('bernoulli', 1, 0)
    assert load_data(config('smallnorb')).shape == (1, 96, 96)
    x = load_data(config('smallnorb', image_size=28)).train.items([0]).x
    assert x.shape == (1, 1, 28, 28) and x.mean() == approx(image(0, 96, 96, 1).mean() / 255, abs=0.01)


def test_an_unreadable_letter_stops_or_is_left_out(config, tmp_path):
    data = config('notmnist')
    (tmp_path / 'notmnist' / 'notMNIST_large' / 'A' / 'empty.png').write_bytes(b'')
    fails(data, 'notMNIST_large/A/empty.png is empty .* --skip_corrupt')
    loaded = load_data(replace(data, skip_corrupt=True))
    assert len(loaded.train) == 24 and any('A/empty.png' in line for line in loaded.report)


def test_files_that_are_missing_are_named(config, tmp_path):
    for name, words in {'fashion_mnist': 'FashionMNIST/raw', 'kmnist': 'KMNIST/raw',
                        'notmnist': 'notMNIST_large', 'omniglot_py': 'images_background',
                        'smallnorb': 'training-dat.mat',
                        'svhn': 'train_32x32.mat'}.items():
        fails(DataConfig(dataset=name, data=str(tmp_path)), words)
        fails(DataConfig(dataset=name), '--data is missing')


def test_files_that_are_damaged_are_named(config, tmp_path):
    for name, pattern in {'svhn': 'train_32x32.mat', 'smallnorb': '*training-dat.mat',
                          'kmnist': '*/*/t10k-im*'}.items():
        data = config(name)
        path, = (tmp_path / name).glob(pattern)
        path.write_bytes(path.read_bytes()[:-100])
        fails(data, f'{path.name}.*again')


def test_matrices_worked_by_hand(tmp_path):
    path = tmp_path / 'a.mat.gz'
    path.write_bytes(gzip.compress(struct.pack('<2i3i2i', 0x1E3D4C54, 1, 2, 1, 1, 7, -3)))
    assert read_matrix(path, 1).tolist() == [7, -3]
    path = tmp_path / 'a.mat'
    path.write_bytes(struct.pack('<2i3i', 0x1E3D4C55, 2, 2, 3, 1) + bytes(range(6)))
    assert read_matrix(path, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    whole = path.read_bytes()
    for broken in (b'', whole[:-1], whole + b'x', b'no matrix at all', whole[:4], whole[:12]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match='again'):
            read_matrix(path, 2)


def test_ten_is_the_digit_zero(tmp_path):
    x = np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(32, 32, 3, 2)
    scipy.io.savemat(tmp_path / 'a.mat', {'X': x, 'y': np.uint8([[10], [9]])})
    images, labels = read_svhn('train', tmp_path / 'a.mat')
    assert labels.tolist() == [0, 9] and np.array_equal(images[1], x[..., 1])
    scipy.io.savemat(tmp_path / 'a.mat', {'X': x, 'y': np.uint8([[11], [9]])})
    with pytest.raises(UserError, match='has 2 labels from 9 to 11, expected 0 to 9'):
        check_labels(tmp_path / 'a.mat', *read_svhn('train', tmp_path / 'a.mat'), 10)
    for wrong in (images[..., 0, 0], images.astype(float), images[:1]):
        with pytest.raises(UserError, match='again'):
            check_labels(tmp_path / 'a.mat', wrong, labels, 10)


# ------------------------------------------------------------------------------------------------------ flags

@pytest.mark.parametrize('bits', [1, 5, 8])
def test_dequantized_values_lie_in_their_level_evenly(bits):
    values = np.arange(256, dtype=np.uint8)
    level = (values >> (8 - bits)).astype(int)
    low, high = (dequantized(values, 8, bits, torch.full((256,), u)).numpy() for u in (0.0, 1 - 2.0 ** -24))
    assert low == approx(level / 2 ** bits) and high == approx((level + 1) / 2 ** bits)
    assert (np.floor(high * np.float64(2 ** bits)) == level).all(), "never the next level"


def test_dequantized_images_by_draw_and_id(config):
    given = load_data(config('svhn'))
    data = load_data(config('svhn', dequantize=True))
    assert data.pixels == given.pixels, "a model is told the same levels"
    level = np.rint(given.train.items(range(24)).x.numpy() * 255)
    x = data.train.items(range(24)).x.double().numpy() * 256
    assert (np.floor(x) == level).all()
    assert (x - level).mean() == approx(0.5, abs=0.01) and (x - level).var() == approx(1 / 12, abs=0.002)
    first, second = data.train.items([5], 1).x, data.train.items([5], 2).x
    assert not torch.equal(first, second), "drawn anew every epoch"
    assert torch.equal(first, data.train.items([4, 5], 1).x[1:]), "whatever batch it is in"
    fixed = load_data(config('svhn', dequantize=True, binarize='static')).train
    assert torch.equal(fixed.items([5], 1).x, fixed.items([5], 2).x)
    assert torch.equal(fixed.items([5], 1).x, data.train.items([5]).x), "as in an evaluation"


def test_dequantized_border_is_black(config):
    x = load_data(config('kmnist', likelihood='discretized', dequantize=True)).train.items([0]).x[0, 0]
    assert x[:2].sum() == x[-2:].sum() == x[:, :2].sum() == x[:, -2:].sum() == 0 and (x[2:-2, 2:-2] > 0).all()


def test_binary_pixels_have_no_levels_to_dequantize(config):
    fails(config('kmnist', dequantize=True), '--likelihood discretized')


@pytest.mark.parametrize('bits', [3, 8])
def test_inverted_is_one_minus_x_within_the_border(config, bits):
    flags = {'likelihood': 'discretized', 'num_x_bits': bits}
    x, y = (load_data(config('kmnist', **flags, invert=invert)).test.items(range(9)).x
            for invert in (False, True))
    inside = (..., slice(2, -2), slice(2, -2))
    assert torch.allclose(y[inside], 1 - x[inside]) and y.sum() == approx(y[inside].sum())
    assert set(y.unique().tolist()) <= set(gray_levels(np.arange(256, dtype=np.uint8), 8, bits).tolist())


def test_an_inverted_binary_image_is_white_as_often_as_it_was_black(config):
    def mean(**flags):
        part = load_data(config('fashion_mnist', image_size=28, **flags)).train
        return torch.stack([part.items(range(24), draw).x for draw in range(1, 40)]).mean().item()

    assert mean() + mean(invert=True) == approx(1, abs=0.01)


def test_sixteen_bits_are_inverted_and_dequantized(tmp_path):
    from PIL import Image
    (tmp_path / 'a' / 'normal').mkdir(parents=True)
    for i in range(6):
        Image.fromarray(np.full((16, 16), 60_000 + i, np.uint16)).save(tmp_path / 'a' / 'normal' / f'{i}.png')
    data = load_data(DataConfig(dataset='folder', data=str(tmp_path / 'a'), image_size=16, num_x_bits=16,
                                cache_dir=str(tmp_path / 'c'), invert=True, dequantize=True))
    x = data.train.items(range(len(data.train))).x
    assert ((x * 65536).floor() <= 5535).all() and (x * 65536 > 5529).all()


def test_batches_of_worker_processes_are_the_same(config):
    part = load_data(config('svhn', dequantize=True, invert=True)).train
    alone, helped = (next(train_batches(part, 6, seed=1, workers=n)) for n in (0, 1))
    assert alone.id == helped.id and torch.equal(alone.x, helped.x)


# ---------------------------------------------------------------------------------------------- MATLAB files

def test_omniglot_stands_upright_and_has_alphabets(config):
    data = load_data(config('omniglot', likelihood='discretized'))
    assert data.train.class_names[:3] == ['0', '1', '2'] and data.pixels.padding == 2
    pixels = np.rint(data.train.items([5]).x[0, 0].numpy() * 255).astype(np.uint8)
    assert np.array_equal(pixels[2:30, 2:30], image(5, 28, 28, 1)[..., 0])
    assert pixels[:2].sum() == 0
    fails(replace(config('omniglot'), data='/nowhere'), 'chardata.mat')


def test_omniglot_gray_levels_are_rounded(tmp_path):
    columns = {key: np.full((784, 2), 127.6 / 255) for key in ('data', 'testdata')}
    alphabets = {key: np.eye(50)[:, :2] for key in ('target', 'testtarget')}
    scipy.io.savemat(tmp_path / 'chardata.mat', columns | alphabets)
    assert (arrays.read_omniglot('train', tmp_path / 'chardata.mat')[0] == 128).all()


def test_an_omniglot_file_that_is_damaged_is_named(config, tmp_path):
    load_data(config('omniglot'))
    path = tmp_path / 'omniglot' / 'chardata.mat'
    path.write_bytes(path.read_bytes()[:3000])
    fails(config('omniglot'), 'chardata.mat is not chardata.mat')
    scipy.io.savemat(path, {'data': np.zeros((784, 3))})
    fails(config('omniglot'), "chardata.mat is not chardata.mat .no 'target'")


def mat_bytes(values, **options):
    scipy.io.savemat(file := io.BytesIO(), values, **options)
    return file.getvalue()


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('kind', [*matlab.CLASSES.values(), 'bool'])
def test_matrices_are_those_that_scipy_reads(kind, packed):
    chance = np.random.default_rng(0)
    values = {'x': chance.integers(0, 100, (3, 4, 5)).astype(kind), 'empty': np.zeros((0, 3), kind),
              'a': np.array([[7]], kind), 'row': chance.integers(0, 2, (1, 9)).astype(kind), 'text': 'abc'}
    data = mat_bytes(values, do_compression=packed)
    expected, names = scipy.io.loadmat(io.BytesIO(data)), ('row', 'x', 'empty', 'a')
    for name, found in zip(names, matlab.matrices(data, *names), strict=True):
        assert found.dtype == expected[name].dtype and np.array_equal(found, expected[name]), name
        assert found.shape == expected[name].shape


def test_a_matrix_in_the_other_order_of_bytes():
    part = lambda kind, content: struct.pack('>2I', kind, len(content)) + content + bytes(-len(content) % 8)
    small = struct.pack('>2I', (4 << 16) | 2, 0x01020304)                       # a part of four bytes
    flags, shape = struct.pack('>2I', 11, 0), struct.pack('>2i', 2, 2)
    matrix = part(6, flags) + part(5, shape) + part(1, b'name') + small
    data = bytes(124) + b'\1\0MI' + part(14, matrix)
    found, = matlab.matrices(data, 'name')
    assert found.dtype == 'u2' and found.tolist() == [[1, 3], [2, 4]]


def test_what_is_no_matrix_of_numbers_is_said():
    whole = mat_bytes({'y': np.array([[5], [7]], np.uint8)})
    shape = struct.pack('<2i', 2, 1)
    for data, words in (
            (mat_bytes({'y': {'a': 1}}), 'it holds a struct where numbers are expected'),
            (mat_bytes({'y': np.array([[1j]])}), 'it holds a complex matrix where numbers'),
            (mat_bytes({'y': 'text'}), 'it holds a text where numbers'),
            (mat_bytes({'y': 1}, format='4'), 'no MATLAB file of version 5'),
            (whole[:-4], 'a part of it is cut off'),
            (whole.replace(b'\2\0\2\0\5\7', b'\x08\0\2\0\5\7'), 'it holds a part of an unknown type'),
            (whole.replace(shape, struct.pack('<2i', -2, -1)), r'a matrix of shape \(-2, -1\)'),
            (whole.replace(shape, struct.pack('<2i', 1 << 30, 1)), 'claims 8.00 GB of memory')):
        with pytest.raises(ValueError, match=words):
            matlab.matrices(data, 'y')
    with pytest.raises(KeyError, match='x'):
        matlab.matrices(whole, 'x')
