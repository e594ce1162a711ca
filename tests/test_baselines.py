"""Trivial baselines: statistics known on paper, and for each a difference of classes that it must find."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from test_scores import outputs_of, seeded

from anomaly import image_statistics
from anomaly.baselines import BASELINES, compressed_bits, fit_baselines
from anomaly.outputs import Outputs
from utils import UserError


def outputs(x):
    return Outputs(None, x, file_bytes=torch.arange(len(x)))


# --------------------------------------------------------------------------------- statistics known on paper

def test_a_wave_has_its_power_in_the_band_of_its_frequency():
    place = np.arange(64) / 64
    for periods in (4, 12, 30):
        wave = 0.5 + 0.4 * np.sin(2 * np.pi * periods * place)[:, None] * np.ones(64)
        edges = np.geomspace(1 / 64, math.sqrt(0.5), 9)
        band = np.flatnonzero(edges <= periods / 64)[-1]
        assert image_statistics.bands(wave).argmax() == image_statistics.bands(wave.T).argmax() == band
    flat = image_statistics.bands(np.full((5, 6, 7), 0.3))
    assert flat == pytest.approx(np.log(1e-9) * np.ones(8))


def test_haar_energies_by_hand():
    board = np.indices((64, 64)).sum(0) % 2.0                 # blocks of 0 and 1: variance 1/4, at one level
    nothing = math.log(1e-9)
    assert image_statistics.haar_energies(board) == pytest.approx(
        [math.log(0.25), nothing, nothing, nothing, nothing], abs=1e-6)
    coarse = board.repeat(2, 0).repeat(2, 1)[:99]             # the odd row is left out
    assert image_statistics.haar_energies(coarse)[:2] == pytest.approx([nothing, math.log(0.25)], abs=1e-6)
    assert len(image_statistics.haar_energies(np.zeros((4, 9, 16)))) == 2


def test_histogram_frame_and_tiny_image_by_hand():
    image = np.zeros((40, 40))
    image[2:-2, 2:-2] = 1.0                                   # the outer 5 % are two pixels
    assert image_statistics.frame_histogram(image) == pytest.approx([0] * 7 + [1, 0])
    white = 36 ** 2 / 1600
    assert image_statistics.histogram(image) == pytest.approx([0, 0, 1, 1, 1, 1, 1, 1 - white, white])
    levels = np.arange(32.0 * 32).reshape(32, 32) / 1024
    assert image_statistics.tiny(levels) == pytest.approx(
        levels.reshape(16, 2, 16, 2).mean((1, 3)).ravel())
    assert image_statistics.tiny(np.arange(27.0).reshape(3, 3, 3)).tolist() == list(range(27))
    assert image_statistics.tiny(np.full((9, 20, 31), 0.25)) == pytest.approx(np.full(6 ** 3, 0.25))


# ------------------------------------------------------------------------------------- what each must find

def texture(number, seed, sigma=2.0):
    """Smooth images of uniform exposure (N, 1, 32, 32), mean 0.5."""
    fields = np.random.default_rng(seed).normal(size=(number, 1, 32, 32))
    smooth = gaussian_filter(fields, sigma, axes=(2, 3), mode='wrap')
    smooth -= smooth.mean((2, 3), keepdims=True)
    return torch.from_numpy(0.5 + 0.1 * smooth / smooth.std((2, 3), keepdims=True)).float()


def framed(x, value):
    x = x.clone()
    outer = torch.from_numpy(image_statistics.frame(x.shape[2:]))
    x[:, :, outer] = value
    return x


def with_lesion(x):
    x = x.clone()
    x[:, :, 12:16, 12:16] += 0.5
    return x


DIFFERENCES = {
    'bands': lambda x: texture(len(x), 2, sigma=1.8),             # the exposure is the same
    'haar_energy': lambda x: texture(len(x), 2, sigma=1.5),
    'histogram': lambda x: 0.5 + 1.15 * (x - 0.5),
    'border_only': lambda x: framed(x, 0.45),
    'tiny_image': lambda x: x + 0.1 * torch.linspace(-1, 1, 32),
    'pca_top': with_lesion,
    'trivial_knn': lambda x: 0.5 + 1.1 * (texture(len(x), 2, sigma=1.9) - 0.5),
}


@pytest.fixture(scope='module')
def fitted():
    return {score.name: score for score in fit_baselines(texture(150, 0))}


@pytest.mark.parametrize('name', DIFFERENCES)
def test_each_finds_what_it_is_there_for(fitted, name):
    normal = texture(60, 1)
    values = fitted[name].image(outputs(torch.cat([normal, DIFFERENCES[name](normal)])))
    assert values.shape == (120,) and values.isfinite().all()
    assert roc_auc_score([0] * 60 + [1] * 60, values) > 0.95
    again = fitted[name].image(outputs(texture(60, 3)))
    assert 0.3 < roc_auc_score([0] * 60 + [1] * 60, torch.cat([values[:60], again])) < 0.7, "normal again"


def test_the_exposure_does_not_tell_what_the_spectrum_does(fitted):
    normal = texture(60, 1)
    x = torch.cat([normal, normal[:, :, torch.randperm(32, generator=torch.Generator().manual_seed(0))]])
    auroc = {name: roc_auc_score([0] * 60 + [1] * 60, fitted[name].image(outputs(x)))
             for name in ('bands', 'histogram')}
    assert auroc['bands'] == 1 and auroc['histogram'] == pytest.approx(0.5)     # the same pixels elsewhere


def test_the_map_of_the_smoothed_residual_has_its_maximum_in_the_lesion(fitted):
    found = fitted['pca_top'].map(outputs(with_lesion(texture(8, 1))))
    assert found.shape == (8, 1, 32, 32) and found.dtype == torch.float32
    rows, columns = np.unravel_index(found.flatten(1).argmax(1).numpy(), (32, 32))
    assert all(12 <= place < 16 for place in (*rows, *columns))


@pytest.mark.parametrize('shape', [(1, 32, 32), (3, 8, 12, 10)], ids=['image', 'volume'])
def test_scores_do_not_depend_on_the_batch(shape):
    x = torch.rand(30, *shape, generator=torch.Generator().manual_seed(0))
    for score in fit_baselines(x[:20]):
        together = score.image(outputs(x[20:]))
        sizes = Outputs(None, x[23:24], file_bytes=torch.tensor([3]))
        assert together.dtype == torch.float64 and together[3].item() == score.image(sizes).item(), score.name


def test_as_many_images_as_a_covariance_needs():
    assert len(fit_baselines(torch.rand(3, 1, 4, 4))) == len(BASELINES)
    with pytest.raises(UserError, match=r'has 2 images.* at least 3'):
        fit_baselines(torch.rand(2, 1, 4, 4))


def test_baselines_worked_by_hand():
    dark, bright, grey = (torch.full((1, 1, 2, 3), v) for v in (0.0, 1.0, 0.5))
    fitted = {name: make(torch.cat([dark, grey, bright])).image for name, make in BASELINES.items()}
    baseline = lambda name, x, **known: fitted[name](outputs_of(None, x, **known)).item()
    assert baseline('mean_intensity', bright) == 1
    assert baseline('intensity_deviation', dark) == 0.5
    assert baseline('mean_image', bright) == pytest.approx(math.sqrt(6) / 2)
    assert baseline('file_size', grey, file_bytes=torch.tensor([99.0])) == 99
    # the one direction in which normal images differ is brightness: a bright pixel is off that line
    spot = grey.clone()
    spot[0, 0, 0, 0] = 1.0
    assert baseline('pca', grey) == pytest.approx(0, abs=1e-9)
    assert baseline('pca', spot) == pytest.approx(0.5 * math.sqrt(5 / 6))
    noise = torch.rand(1, 1, 20, 20, generator=seeded(0))
    assert baseline('png_size', noise) > baseline('png_size', torch.zeros(1, 1, 20, 20))
    assert baseline('png_size', noise, bits=12) > 1.4 * baseline('png_size', noise, bits=8)


@pytest.mark.parametrize(('channels', 'bits'), [(1, 1), (1, 5), (1, 8), (1, 12), (3, 8), (3, 16), (2, 8)])
def test_noise_compresses_to_about_its_own_bits_and_a_flat_image_to_few(channels, bits):
    noise = torch.rand(1, channels, 64, 64, generator=seeded(0))
    values = channels * 64 * 64
    assert 0.99 * values * bits < compressed_bits(noise, bits).item() < 1.5 * values * bits + 1000
    assert compressed_bits(torch.full_like(noise, 0.5), bits).item() < 3000


def test_fewer_bits_compress_better():
    noise = torch.rand(1, 1, 32, 32, generator=seeded(0))
    assert compressed_bits(noise, 2) < compressed_bits(noise, 5) < compressed_bits(noise, 8)
