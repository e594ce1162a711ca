"""Changes of training volumes: what each leaves alone, and what it does, worked out on paper."""

import math

import pytest
import torch
from pytest import approx

from readers.volumes import augment
from readers.volumes.augment import (
    CHANGES,
    add_noise,
    augmented,
    move,
    ring,
    scale,
    shift,
    shift_histogram,
    spike,
)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(seed=0, shape=(2, 8, 10, 12)):
    return torch.rand(shape, generator=random(seed))


@pytest.fixture
def drawn(monkeypatch):
    """drawn(f): numbers between low and high are f(low, high), not random."""
    return lambda f: monkeypatch.setattr(augment, 'uniform', lambda _, low, high: f(low, high))


def highest(low, high):
    return high


def middle(low, high):
    return (low + high) / 2


def test_each_change_happens_once_in_ten_and_follows_from_the_seed(monkeypatch):
    happened = []
    changes = tuple(lambda x, _, i=i: happened.append(i) or x for i in range(len(CHANGES)))
    monkeypatch.setattr(augment, 'CHANGES', changes)
    for seed in range(1000):
        augmented(noise(shape=(1, 2, 2, 2)), seed)
    for i in range(len(CHANGES)):
        assert happened.count(i) / 1000 == approx(0.1, abs=0.04)              # 4 standard errors
    monkeypatch.undo()
    assert torch.equal(augmented(noise(), 9), augmented(noise(), 9))


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
def test_a_change_keeps_the_shape_and_is_small(change, monkeypatch):
    smooth = torch.linspace(0, 1, 24).view(1, 24, 1, 1).expand(2, 24, 16, 16).contiguous()
    changed = change(smooth, random(1))
    assert changed.shape == smooth.shape and not torch.equal(changed, smooth)
    assert (changed - smooth)[:, 6:-6, 6:-6, 6:-6].abs().mean() < 0.25
    monkeypatch.setattr(augment, 'CHANGES', (change,))
    monkeypatch.setattr(augment, 'CHANCE', 1.0)
    final = augmented(smooth, 1)
    assert final.min() >= 0 and final.max() <= 1


def test_shift_and_scale_of_intensities(drawn):
    drawn(highest)
    x = noise()
    torch.testing.assert_close(shift(x, random()), x + 0.05 * x.std())
    torch.testing.assert_close(scale(x, random()), 1.05 * x)


def test_a_histogram_shift_rises_from_0_to_1(drawn):
    x = torch.linspace(0, 1, 101).view(1, 101, 1, 1)
    for seed in range(20):
        y = shift_histogram(x, random(seed)).flatten()
        assert y[0] == 0 and y[-1] == approx(1) and (y.diff() >= -1e-6).all()
    drawn(middle)
    torch.testing.assert_close(shift_histogram(x, random()), x)               # each point stays in the middle


def test_a_translation_moves_by_voxels(drawn, monkeypatch):
    x = noise()
    drawn(middle)
    torch.testing.assert_close(move(x, random()), x, atol=1e-5, rtol=0)       # angles and shifts of 0
    numbers = iter([0, 0, 0, 2, 0, -3])                                       # three angles, then D, H, W
    drawn(lambda low, high: next(numbers))
    y = move(x, random())
    torch.testing.assert_close(y[:, :6, :, 3:], x[:, 2:, :, :9], atol=1e-5, rtol=0)
    assert y[:, 6:].max() < 1e-5 and y[..., :3].max() < 1e-5


def test_a_quarter_turn_takes_one_axis_to_another(drawn):
    x = noise(shape=(1, 6, 9, 6))
    numbers = iter([0, math.pi / 2, 0, 0, 0, 0])                              # about H: D goes to W
    drawn(lambda low, high: next(numbers))
    torch.testing.assert_close(move(x, random()), x.rot90(-1, (1, 3)), atol=1e-5, rtol=0)


def test_a_spike_changes_one_spatial_frequency(drawn):
    drawn(middle)
    x = noise(shape=(1, 7, 9, 11))
    before, after = (torch.fft.fftn(v, dim=(1, 2, 3)) for v in (x, spike(x, random(3))))
    # The real part of a wave alone is half that wave and half its mirror image.
    assert 1 <= ((after - before).abs() > 1e-3).sum() <= 2


def test_rician_noise_of_nothing_has_the_mean_of_rayleigh(drawn):
    drawn(highest)
    y = add_noise(torch.zeros(1, 40, 40, 40), random())
    assert y.mean().item() == approx(0.01 * math.sqrt(math.pi / 2), rel=0.01)


def test_ringing_loses_the_highest_frequencies_and_keeps_the_mean(drawn):
    drawn(highest)
    n = 16
    x, y, z = torch.meshgrid(*[torch.arange(n)] * 3, indexing='ij')
    fastest = 0.5 * (-1.0) ** (x + y + z)                                     # the corner of all frequencies
    slow = 0.5 + 0.2 * torch.cos(2 * math.pi * x / n)
    torch.testing.assert_close(ring((slow + fastest)[None], random())[0], slow, atol=1e-5, rtol=0)
