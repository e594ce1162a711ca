"""Distances between normals that are known on paper, and moments of features in any batches and ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.linalg
import torch
from test_fid import CPU, D, moments
from torch import nn

from distributed import launch
from evaluation.fid import Moments, frechet_distance
from utils import UserError


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_equal_covariances_are_as_far_apart_as_their_means():
    mu, sigma = moments(random(50, 8))
    assert frechet_distance(mu, sigma, mu + 3, sigma) == pytest.approx(8 * 9, abs=1e-8)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize('directions', [12, 5])
def test_normals_with_the_same_axes(directions):
    """|dmu|^2 + sum (s1 - s2)^2, in any rotation, also where most axes have no spread at all."""
    axes = torch.linalg.qr(random(12, 12))[0]
    s1, s2 = random(12, seed=1).abs(), random(12, seed=2).abs() * 100
    s1[directions:], s2[:12 - directions] = 0, 0
    mu1, mu2 = random(12, seed=3), random(12, seed=4)
    expected = (mu1 - mu2).square().sum() + (s1 - s2).square().sum()
    value = frechet_distance(mu1, axes * s1 ** 2 @ axes.T, mu2, axes * s2 ** 2 @ axes.T)
    assert value == pytest.approx(expected.item(), abs=1e-8)


def test_fewer_images_than_features():
    """100 images of 512 features: 0 to itself, and tr(sigma) to the same spread doubled."""
    mu, sigma = moments(random(100, 512) * random(512, seed=1) * 10)
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-6
    assert frechet_distance(mu, sigma, mu, 4 * sigma) == pytest.approx(sigma.trace().item(), rel=1e-12)


def test_images_that_are_all_alike():
    zero = torch.zeros(4, 4)
    assert frechet_distance(zero[0], zero, zero[0], torch.eye(4)) == 4
    assert frechet_distance(zero[0], zero, zero[0], zero) == 0


class Pass(nn.Module):
    """Features as they are, for torchmetrics."""
    num_features = D

    def forward(self, x):
        return x


def test_against_scipy_and_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    a, b = random(200, D), random(300, D, seed=1) @ random(D, D, seed=2) + 0.5
    (mu1, sigma1), (mu2, sigma2) = moments(a), moments(b)
    value = frechet_distance(mu1, sigma1, mu2, sigma2)
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy()).real
    assert value == pytest.approx((mu1 - mu2).square().sum().item() + (sigma1 + sigma2).trace().item()
                                  - 2 * np.trace(root), abs=1e-8)
    other = FrechetInceptionDistance(feature=Pass())
    other.set_dtype(torch.float64)
    other.update(a, real=True)
    other.update(b, real=False)
    assert value == pytest.approx(other.compute().item(), abs=1e-8)


def in_batches(features, *sizes):
    made = Moments(features.shape[1], CPU)
    for batch in features.split(sizes) if sizes else ():
        made.add(batch)
    return made


@pytest.mark.parametrize('offset', [0, 1e7])
def test_moments_of_batches_are_those_of_all_at_once(offset):
    """Also with a mean far above the spread, where sums of squares would keep no digit of it."""
    features = random(60, D) * 0.01 + offset
    mean, covariance, number = in_batches(features, 30, 1, 29).pooled()
    mu, sigma = moments(features)
    assert number == 60
    assert torch.allclose(mean, mu, rtol=1e-14) and torch.allclose(covariance, sigma, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize('sizes', [((13, 7), (3, 1)), ((10, 10), (), (4,)), ((24,), ())])
def test_moments_of_ranks_are_those_of_one_set(sizes, monkeypatch):
    """Two or three ranks, threads here, with unequal numbers of batches, also with none."""
    meet, shared = threading.Barrier(len(sizes)), {}

    def sum_over_ranks(value):
        shared[threading.get_ident()] = value
        meet.wait()
        total = sum(shared.values())
        meet.wait()
        return total
    monkeypatch.setattr(launch, 'sum_over_ranks', sum_over_ranks)
    features = random(24, D)
    features[20:] += 5                                   # what an average of covariances would not see
    shares = features.split([sum(size) for size in sizes])
    ranks = [in_batches(share, *size) for share, size in zip(shares, sizes, strict=True)]
    with ThreadPoolExecutor(len(sizes)) as threads:
        results = list(threads.map(Moments.pooled, ranks))
    mu, sigma = moments(features)
    for mean, covariance, number in results:
        assert number == 24
        assert torch.allclose(mean, mu, rtol=1e-14) and torch.allclose(covariance, sigma, rtol=1e-13)


@pytest.mark.parametrize('number', [0, 1])
def test_a_single_image_has_no_spread(number):
    made = Moments(D, CPU)
    if number:
        made.add(random(number, D))
    with pytest.raises(UserError, match=f'^{number} image.* at least 2'):
        made.pooled()
