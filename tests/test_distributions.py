"""Likelihoods and the latent normal, against closed forms."""

import math

import pytest
import torch
from pytest import approx

from distributions import (
    Bernoulli,
    DiscretizedLogisticMixture,
    DiscretizedNormal,
    Normal,
    Pixels,
    bits_per_dim,
    log_mean_exp,
    pixel_likelihood,
    to_levels,
)


def normal(mean, std):
    return Normal(torch.tensor(float(mean)), torch.tensor(float(std)))


def test_kl_of_two_normals_worked_by_hand():
    assert normal(1, 1).kl(normal(0, 2)).item() == approx(math.log(2) + (1 + 1) / 8 - 1 / 2)


def test_a_small_kl_keeps_its_digits():
    q, p = normal(0.5, 1.01 * (1 - 1e-3)), normal(0.5, 1.01)
    exact = (q.std.double() / p.std.double()).pow(2)
    assert q.kl(p).item() == approx(((exact - 1 - exact.log()) / 2).item(), rel=1e-3)       # 1e-6 nats


def test_kl_is_the_mean_log_ratio():
    torch.manual_seed(0)
    q, p = normal(0.3, 0.7), normal(-0.2, 1.5)
    q.mean = q.mean.expand(400_000)
    z = q.sample()
    assert (q.log_prob(z) - p.log_prob(z)).mean().item() == approx(normal(0.3, 0.7).kl(p).item(), abs=4e-3)


def test_raw_zero_is_the_prior_with_std_1_01_and_the_clamp_bounds_everything():
    assert Normal.from_raw(torch.zeros(()), torch.zeros(())).std.item() == approx(1.01)
    far = Normal.from_raw(torch.tensor([1e4, -1e4]), torch.tensor([1e4, -1e4]))
    assert far.mean.tolist() == approx([5, -5])
    assert far.std.tolist() == approx([math.exp(5) + 0.01, math.exp(-5) + 0.01])


def test_temperature_scales_the_noise_and_zero_is_the_mean():
    q = Normal(torch.full((200_000,), 2.0), torch.full((200_000,), 3.0))
    torch.manual_seed(0)
    assert q.sample(0.5).std().item() == approx(1.5, rel=0.01)
    assert torch.equal(q.sample(0), q.mean)


def test_log_mean_exp_of_equal_values_is_the_value():
    assert log_mean_exp(torch.full((7, 2), -1000.0)).tolist() == approx([-1000.0, -1000.0])


def test_bits_per_dim():
    assert bits_per_dim(math.log(2) * 30, 10) == approx(3.0)


# --------------------------------------------------------- a discretized likelihood sums to 1 over all levels


def total_mass(likelihood, channels, bits, params, stride=1):
    """Sum of p(x) over all grey levels of one pixel; for colour over all triples of levels."""
    levels = torch.arange(0, 2**bits, stride, dtype=torch.float64) / (2**bits - 1)
    x = torch.cartesian_prod(*[levels] * channels).view(-1, channels, 1, 1)
    log_p = likelihood.log_prob(params.expand(len(x), -1, 1, 1), x)
    return log_p.exp().sum().item()


def random_params(likelihood, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(1, likelihood.num_params, 1, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize('spread', [0.3, 2.0, 8.0])
@pytest.mark.parametrize('bits', [1, 5, 8, 12, 16])
def test_grey_mixture_sums_to_one(bits, spread):
    likelihood = DiscretizedLogisticMixture(1, bits, num_mixture=4)
    assert total_mass(likelihood, 1, bits, random_params(likelihood, bits, spread)) == approx(1, abs=1e-9)


@pytest.mark.parametrize('bits', [2, 4])
def test_colour_mixture_sums_to_one(bits):
    likelihood = DiscretizedLogisticMixture(3, bits, num_mixture=3)
    assert total_mass(likelihood, 3, bits, random_params(likelihood, bits, 2.0)) == approx(1, abs=1e-9)


@pytest.mark.parametrize('bits', [1, 5, 8, 16])
@pytest.mark.parametrize('spread', [0.5, 4.0])
def test_normal_decoder_sums_to_one(bits, spread):
    likelihood = DiscretizedNormal(1, bits)
    assert total_mass(likelihood, 1, bits, random_params(likelihood, bits, spread)) == approx(1, abs=1e-9)


def test_the_published_8_bit_mixture_does_not_sum_to_one_for_bright_pixels():
    """Levels 254 and 255 both take the right tail there; ours does not."""
    bright = torch.tensor([0.0, 1.0, -5.0], dtype=torch.float64).view(1, 3, 1, 1)
    official = DiscretizedLogisticMixture(1, 8, num_mixture=1, official=True)
    ours = DiscretizedLogisticMixture(1, 8, num_mixture=1)
    assert total_mass(official, 1, 8, bright) > 1.3
    assert total_mass(ours, 1, 8, bright) == approx(1, abs=1e-12)


def test_one_logistic_by_hand():
    """Level 100 of 8 bits under a logistic of mean 0, scale e^-2: a difference of two sigmoids."""
    params = torch.tensor([0.0, 0.0, -2.0], dtype=torch.float64).view(1, 3, 1, 1)
    x = torch.full((1, 1, 1, 1), 100 / 255, dtype=torch.float64)
    upper, lower = (math.exp(2) * (2 * 100 / 255 - 1 + side / 255) for side in (1, -1))
    expected = math.log(1 / (1 + math.exp(-upper)) - 1 / (1 + math.exp(-lower)))
    assert DiscretizedLogisticMixture(1, 8, 1).log_prob(params, x).item() == approx(expected, rel=1e-10)


@pytest.mark.parametrize('likelihood', [DiscretizedLogisticMixture(1, 8, 1), DiscretizedNormal(1, 8)])
def test_float32_agrees_with_float64_far_from_the_mean_and_has_finite_gradients(likelihood):
    x = torch.arange(0, 256.0).view(-1, 1, 1, 1) / 255
    narrow = {3: [0.0, 0.9, -6.5], 2: [0.9, -6.0]}[likelihood.num_params]
    params = torch.tensor(narrow).view(1, -1, 1, 1).requires_grad_()
    single = likelihood.log_prob(params.expand(256, -1, 1, 1), x)
    double = likelihood.log_prob(params.detach().double().expand(256, -1, 1, 1), x.double())
    torch.testing.assert_close(single.detach().double(), double, rtol=1e-3, atol=1e-3)
    single.sum().backward()
    assert torch.isfinite(params.grad).all()


@pytest.mark.parametrize('channels, mixtures', [(1, 5), (3, 3), (1, 1), (3, 1)])
def test_samples_have_the_mean_of_the_distribution_and_lie_on_the_gray_levels(channels, mixtures):
    likelihood = pixel_likelihood(Pixels(bits=5), channels, mixtures)
    generator = torch.Generator().manual_seed(3)
    params = 0.3 * torch.randn(1, likelihood.num_params, 1, 1, generator=generator)
    scales = slice(mixtures, None) if mixtures > 1 else slice(channels, None)
    params[:, scales] -= 0.5  # narrow enough that clipping to [0, 1] is rare
    torch.manual_seed(0)
    many = params.expand(20_000, -1, 1, 1)
    x = likelihood.sample(many)
    assert torch.allclose(x * 31, (x * 31).round(), atol=1e-4)
    assert x.min() >= 0 and x.max() <= 1
    levels = torch.arange(32.0) / 31
    if channels == 1:
        p = likelihood.log_prob(params.expand(32, -1, 1, 1), levels.view(-1, 1, 1, 1)).exp().flatten()
        assert x.mean().item() == approx((p * levels).sum().item(), abs=0.01)


def test_colour_channels_depend_on_those_before_them():
    """With one component, tanh coefficients c and means m: E = (m_r, m_g + c0 r, m_b + c1 r + c2 g)."""
    params = torch.zeros(1, 10, 1, 1)
    means, coefficients = torch.tensor([0.2, -0.1, 0.05]), torch.tensor([0.5, 0.3, -0.4])
    for channel in range(3):  # per channel: mean, log scale, coefficient
        params[0, 1 + 3 * channel : 4 + 3 * channel, 0, 0] = torch.tensor(
            [means[channel], -5.0, torch.atanh(coefficients[channel])]
        )
    red = 0.2
    green = -0.1 + 0.5 * red
    blue = 0.05 + 0.3 * red - 0.4 * green
    mean = DiscretizedLogisticMixture(3, 8, 1).mean(params).flatten()
    assert (2 * mean - 1).tolist() == approx([red, green, blue], abs=1e-6)


@pytest.mark.parametrize('bits', [1, 2])
def test_samples_of_a_color_mixture_follow_its_likelihood(bits):
    """Total variation over all colors: green and blue are drawn given the gray levels before them."""
    likelihood, levels, number = DiscretizedLogisticMixture(3, bits, num_mixture=2), 2 ** bits, 1_000_000
    torch.manual_seed(0)
    logits = torch.randn(1, likelihood.num_params, 1, 1)
    colors = torch.cartesian_prod(*[torch.arange(levels)] * 3)                   # (K^3, 3)
    expected = likelihood.log_prob(logits.expand(len(colors), -1, 1, 1),
                                   colors[..., None, None] / (levels - 1)).exp().flatten()
    drawn = (likelihood.sample(logits.expand(1, -1, number, 1)) * (levels - 1)).round().long()
    place = (drawn[0, ..., 0] * torch.tensor([[levels ** 2], [levels], [1]])).sum(0)
    counts = torch.bincount(place, minlength=len(colors))
    assert (counts / number - expected).abs().sum() / 2 < 0.005


def test_bernoulli_by_hand():
    logits, x = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    expected = [math.log(0.5), -math.log(1 + math.exp(-2))]
    assert Bernoulli(1).log_prob(logits, x).flatten().tolist() == approx(expected)


def test_levels_and_choice_of_likelihood():
    assert to_levels(torch.tensor([0.0, 0.4, 1.0]), 1).tolist() == [0, 0, 1]
    assert isinstance(pixel_likelihood(Pixels('bernoulli'), 1, 10), Bernoulli)
    assert isinstance(pixel_likelihood(Pixels(), 1, 1), DiscretizedNormal)
    with pytest.raises(ValueError, match='2 channels'):
        pixel_likelihood(Pixels(), 2, 10)


def test_likelihood_statistics_of_a_normal_in_closed_form():
    from distributions import DiscretizedNormal, likelihood_statistics
    likelihood, x = DiscretizedNormal(1), torch.tensor([0.25, 0.75]).reshape(1, 1, 1, 2)
    logits = torch.zeros(1, 2, 1, 2)                        # mean 0.5 on [0, 1], standard deviation 1.01 / 2
    terms = {'recon': torch.tensor([7.0]), 'kl': torch.tensor([[1.0, 2.0]])}
    found = likelihood_statistics(terms, likelihood, logits, x)[0]
    expected = [7, 0, math.log(2), math.log(0.505), math.log(0.25 / 0.505 + 1e-3), math.log(0.25 + 1e-3)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
