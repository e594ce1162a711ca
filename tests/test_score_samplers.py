"""Samplers, likelihood and repairs with scores that are known: normals and mixtures of them."""

import math

import pytest
import torch
from pytest import approx
from small_score import Mixture, build, gaussian, make_sde, two_in_the_plane

from families.score.ode import solve
from families.score.samplers import (
    CORRECTORS,
    PC,
    PREDICTORS,
    Diffusion,
    blocks,
    inpaint,
    inpainting_error,
    langevin,
    ode_log_likelihood,
    restore,
    sample_ode,
)
from families.score.sde import SDES, expand
from utils import UserError

REPAIR = PC(snr=0.2, n_steps_each=8)         # it skips every second level: the corrector has to catch up
PAIRS = [(predictor, corrector) for predictor in PREDICTORS for corrector in CORRECTORS
         if (predictor, corrector) != ('none', 'none')]


def moments(x):
    x = x.flatten(1)
    return x.mean(0), torch.cov(x.T)


@pytest.mark.parametrize('predictor, corrector', [(p, c) for p, c in PAIRS if p != 'none'])
@pytest.mark.parametrize('name', SDES)
def test_predictor_corrector_draws_from_a_mixture(name, predictor, corrector):
    """Moments of two clouds of points: between them what a sampler gets wrong would show."""
    data, sde, n = two_in_the_plane(), make_sde(name, 100), 1000
    pc = PC(predictor, corrector, snr=0.1)
    like = torch.empty(n, 1, 1, 2, dtype=torch.float64)
    torch.manual_seed(0)
    if name == 'subvpsde' and predictor == 'ancestral_sampling':
        with pytest.raises(UserError, match='for vesde and vpsde'):
            pc.sample(data.diffusion(sde), like)
        return
    x = pc.sample(data.diffusion(sde), like)
    mean, covariance = moments(x)
    expected_mean, expected_covariance = moments(data.sample(200000))
    assert torch.allclose(mean, expected_mean, atol=0.07)
    assert torch.allclose(covariance, expected_covariance, atol=0.05)
    share = (x[:, 0, 0, 0] < 0).double().mean().item()
    assert share == approx(0.3, abs=0.08), 'each cloud has its share'


@pytest.mark.parametrize('corrector', ['langevin', 'ald'])
def test_a_corrector_alone_reaches_the_noisy_data(corrector):
    """Langevin steps at one level leave its density as it is: a normal of variance w + std^2."""
    data, sde = gaussian((1, 1, 2)), make_sde('vesde')
    t = torch.full((1000,), 0.5, dtype=torch.float64)
    variance = data.variance + sde.std(t)[0] ** 2
    d, snr = data.diffusion(sde), 0.2
    torch.manual_seed(0)
    x = data.means + 1.5 * variance.sqrt() * torch.randn(1000, 1, 1, 2, dtype=torch.float64)
    x, x_mean = CORRECTORS[corrector](d, x, t, snr, 80)
    torch.testing.assert_close(x.var(0), variance, rtol=0.15, atol=0)
    torch.testing.assert_close(x.mean(0), data.means[0], rtol=0, atol=0.08)
    assert not torch.equal(x, x_mean)


def test_langevin_steps_by_the_norms_of_each_image_leave_noisy_data_as_they_are():
    """In many dimensions: the length of a score hardly varies, so the step size is that of all images."""
    data, sde = gaussian((1, 16, 16)), make_sde('vesde')
    t = torch.full((100,), 0.5, dtype=torch.float64)
    variance = data.variance + sde.std(t)[0] ** 2
    torch.manual_seed(0)
    x = data.means + variance.sqrt() * torch.randn(100, 1, 16, 16, dtype=torch.float64)
    x, _ = langevin(data.diffusion(sde), x, t, 0.2, 40, per_image=True)
    assert ((x - data.means) ** 2 / variance).mean().item() == approx(1, abs=0.1)


@pytest.mark.parametrize('name', SDES)
def test_noise_removal_takes_away_the_last_noise(name):
    sde, data, noises = make_sde(name, 30), gaussian(), []

    def noise(like):
        noises.append(torch.randn_like(like))
        return noises[-1]

    def draw(noise_removal):
        torch.manual_seed(1)
        d = Diffusion(sde, data.diffusion(sde).score, noise)
        return PC(corrector='none').sample(d, like, noise_removal)

    like = torch.empty(2, 2, 3, 1, dtype=torch.float64)
    G = sde.discretize(torch.tensor([sde.end], dtype=torch.float64))[1]
    torch.testing.assert_close(draw(False) - draw(True), G * noises[-1])
    assert len(noises) == 2 * (1 + 30), 'the prior, and one at each step'


@pytest.mark.parametrize('name', SDES)
@pytest.mark.parametrize('predictor', ['reverse_diffusion', 'euler_maruyama'])
def test_a_predictor_of_the_probability_flow_follows_the_ode(name, predictor):
    """Without noise, and to first order in the step: the flow of a normal is known, see below."""
    data, sde = gaussian(), make_sde(name, 2000)
    x = torch.randn(4, 2, 3, 1, dtype=torch.float64)
    start, end = 0.6, 0.4
    d, moments_ = data.diffusion(sde), torch.linspace(start, end, 401, dtype=torch.float64)
    y, y_mean = PC(predictor, 'none', probability_flow=True).run(d, x, moments_[:-1])
    assert torch.equal(y, y_mean)
    torch.testing.assert_close(y, flowed(data, sde, x, start, end), rtol=0.02, atol=0.02)


def flowed(data, sde, x, start, end):
    """Where the probability flow takes x: it keeps the standardised value of every normal pixel."""
    place = lambda t: (sde.mean_factor(t) * data.means[0],
                       (sde.mean_factor(t) ** 2 * data.variance + sde.std(t) ** 2).sqrt())
    (mean, std), (new_mean, new_std) = (place(torch.tensor(t, dtype=torch.float64)) for t in (start, end))
    return new_mean + new_std * (x - mean) / std


@pytest.mark.parametrize('name', SDES)
def test_the_ode_sampler_maps_noise_to_data(name):
    data, sde = gaussian(), make_sde(name)
    like = torch.empty(10, 2, 3, 1, dtype=torch.float64)
    torch.manual_seed(0)
    x = sample_ode(data.diffusion(sde), like, noise_removal=False)
    torch.manual_seed(0)
    noise = sde.prior_std * torch.randn_like(like)
    torch.testing.assert_close(x, flowed(data, sde, noise, 1.0, sde.end), rtol=1e-3, atol=1e-3)
    torch.manual_seed(0)
    cleaned = sample_ode(data.diffusion(sde), like)
    assert 0 < (cleaned - x).abs().max() < 0.05, 'one small step more'


@pytest.mark.parametrize('name', SDES)
def test_ode_likelihood_of_a_normal_is_its_log_density(name):
    """At the end time, where there is a little noise; the score's Jacobian is diagonal, so it is exact."""
    data, sde = gaussian(), make_sde(name)
    torch.manual_seed(0)
    x, end = data.sample(20), torch.full((20,), sde.end, dtype=torch.float64)
    # the prior knows nothing of what the noise at t = 1 has left of the data: little, and known too
    y, last = flowed(data, sde, x, sde.end, 1.0), torch.ones(20, dtype=torch.float64)
    left = sde.prior_log_prob(y) - data.noisy(sde, y, last)[0]
    assert left.abs().max() < 0.3
    expected = data.noisy(sde, x, end)[0] + left
    torch.testing.assert_close(ode_log_likelihood(data.diffusion(sde), x), expected, rtol=1e-4, atol=1e-3)


def test_ode_likelihood_of_a_mixture_is_right_on_average():
    """Hutchinson's estimate is unbiased where the Jacobian is not diagonal."""
    data, sde = two_in_the_plane(), make_sde('vpsde')
    torch.manual_seed(0)
    x = data.sample(1).expand(400, -1, -1, -1)
    values = ode_log_likelihood(data.diffusion(sde), x)
    expected, _ = data.noisy(sde, x[:1], torch.full((1,), sde.end, dtype=torch.float64))
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(400) + 0.02


def test_the_solver_solves_and_says_when_it_cannot():
    x = torch.ones(2, 1, dtype=torch.float64)
    assert solve(lambda y, t: y, x, 0.0, 1.0).flatten()[0].item() == approx(math.e, rel=1e-4)
    with pytest.raises(UserError, match='could not be solved'):
        solve(lambda y, t: y ** 2, x, 0.0, 2.0)                    # 1 / (1 - t)


# ------------------------------------------------------------------------------------ inpainting, restoration

def correlated(rho=0.95):
    """A score of two neighbouring pixels of variance 0.25 and correlation rho under VE noise."""
    sde, base = make_sde('vesde', 100), 0.25 * torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)

    def score(x, t):
        noisy = base + expand(sde.std(t) ** 2, base.expand(1, 2, 2)) * torch.eye(2, dtype=torch.float64)
        return -torch.linalg.solve(noisy, x.flatten(1)).reshape(x.shape)

    return Diffusion(sde, score)


def test_inpainting_draws_what_the_known_part_foretells():
    """Of two correlated pixels the second, given the first: mean rho x, variance (1 - rho^2) / 4."""
    torch.manual_seed(0)
    x = torch.tensor([0.6, 9.0], dtype=torch.float64).reshape(1, 1, 1, 2).expand(400, -1, -1, -1)
    known = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    y = inpaint(correlated(), REPAIR, x, known)
    assert (y[..., 0] == 0.6).all(), 'what is known stays, whatever is drawn'
    assert y[..., 1].mean().item() == approx(0.57, abs=0.08)
    assert y[..., 1].std().item() == approx(0.5 * math.sqrt(1 - 0.95 ** 2), rel=0.3)


def test_checkerboards():
    board = blocks((4, 6, 8), block=2)
    assert torch.equal(board[::2, ::2, ::2], (torch.arange(2)[:, None, None] + torch.arange(3)[:, None]
                                              + torch.arange(4)).fmod(2).float())
    assert torch.equal(board[0, 0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    striped = blocks((4, 6, 8), block=2, as_published=True)
    assert (striped == striped[:1, :1]).all(), 'stripes: four blocks along the last axis'
    assert torch.equal(blocks((6, 9), as_published=True), blocks((6, 9))), 'of an odd number they agree'


def test_errors_of_repairs_are_where_the_image_is_odd():
    """Correlated pixels that agree are foretold; one that does not is not, nor is its neighbour."""
    torch.manual_seed(0)
    pairs = torch.tensor([[0.4, 0.4], [0.8, -0.8]], dtype=torch.float64).reshape(2, 1, 1, 2)
    d, pc, one = correlated(), REPAIR, torch.ones(1, dtype=torch.float64)
    error = inpainting_error(d, pc, pairs, one, rounds=6, block=1)
    assert error.shape == (2, 1, 1, 2) and error[0].max() < 0.4 < 1.0 < error[1].min()
    outside = inpainting_error(d, pc, pairs, 0 * one, rounds=4)
    assert outside[0].min() > 0.05, 'what is not inside is always unknown'


def test_restoration_leaves_normal_images_and_moves_others():
    data, sde = Mixture(torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.full((1, 1, 2), 0.01).double(),
                        torch.ones(1, dtype=torch.float64)), make_sde('vesde', 100)
    torch.manual_seed(0)
    x = torch.tensor([0.0, 1.5], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 1, 1, 2)
    few, many = (restore(data.diffusion(sde), PC(snr=0.1), x, steps) for steps in (2, 80))
    assert few[1].mean().item() == approx(1.5, abs=0.2), 'little noise, little change'
    assert many.abs().max() < 0.5, 'nothing is left of an image under much noise'
    one = restore(data.diffusion(make_sde('vesde', 2)), PC(snr=0.1), x)
    assert one.isfinite().all(), 'a quarter of 2 steps is one'


# ---------------------------------------------------------------------------------------------- of the family

@pytest.mark.parametrize('flags', [{'sampler': 'ode'}, {'probability_flow': True}, {'noise_removal': False},
                                   *({'predictor': p, 'corrector': c} for p, c in PAIRS)], ids=str)
def test_the_family_samples_with_every_sampler(flags):
    model = build(**{'sigma_max': 5.0} | flags)
    draw = lambda temperature: (torch.manual_seed(0), model.sample(2, temperature))[1]
    x = draw(1.0)
    assert x.shape == (2, 1, 8, 8) and x.min() >= 0 and x.max() <= 1 and x.isfinite().all()
    assert torch.equal(x, draw(1.0)) and not torch.equal(x, draw(0.5))


def test_likelihood_of_the_family_is_a_density_on_zero_to_one():
    """Twice as dense as on [-1, 1], in every pixel."""
    model, data = build((1, 2, 2)), gaussian((1, 2, 2))
    model._score = data.diffusion(model.sde).score
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    inside = ode_log_likelihood(data.diffusion(model.sde), 2 * x - 1)
    torch.testing.assert_close(model.log_likelihood(x), inside + 4 * math.log(2))
