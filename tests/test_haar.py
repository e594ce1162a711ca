"""The multi-scale likelihood: a density that integrates to one, its sampler, its maps and its statistics."""

import math

import pytest
import torch
from pytest import approx

from anomaly.choice import choose_scores
from anomaly.outputs import Outputs
from anomaly.scores import Scoring
from distributions import Pixels
from families.haar.config import HaarConfig
from families.haar.model import Haar, Mixture, bounds, compose, decompose
from utils import UserError


def build(shape=(1, 2, 2), levels=1, bits=4, spread=1.0, **pixels):
    """A small model whose densities are far from uniform."""
    torch.manual_seed(0)
    model = Haar(shape, HaarConfig(levels=levels, width=4), Pixels(bits=bits, **pixels)).eval()
    for level in model.levels:
        level.std.copy_(torch.tensor([0.3, 0.2, 0.25]) * level.scale)
        for head in level.heads:
            torch.nn.init.normal_(head.bias, std=spread)
            torch.nn.init.normal_(head.weight, std=spread)
    return model


def images(n, shape, bits=8, seed=1):
    levels = torch.randint(2 ** bits, (n, *shape), generator=torch.Generator().manual_seed(seed))
    return levels / (2 ** bits - 1)


# --------------------------------------------------------------------------------------------------- wavelets

def test_the_transform_is_orthonormal_and_inverted():
    x = torch.randn(3, 2, 6, 8)
    ll, details = decompose(x)
    assert ll.shape == (3, 2, 3, 4)
    assert sum(part.square().sum() for part in (ll, *details)).item() == approx(x.square().sum().item())
    torch.testing.assert_close(compose(ll, details), x)
    assert ll[0, 0, 0, 0].item() == approx(x[0, 0, :2, :2].sum().item() / 2, abs=1e-6)


def test_bounds_leave_exactly_the_valid_cells():
    """Cells are in [0, m] if and only if LL and every detail are in their intervals."""
    most = 2.0
    x = torch.rand(200_000, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 6 - 2       # in [-2, 4]
    x[::2] = x[::2] / 3 + 2 / 3                                                                # in [0, 2]
    ll, details = decompose(x)
    allowed = (ll >= 0) & (ll <= 2 * most)
    for i in range(3):
        lower, upper = bounds(ll, details[:i], most)
        allowed &= (details[i] >= lower - 1e-5) & (details[i] <= upper + 1e-5)
    valid = ((x >= 0) & (x <= most)).all(-1).all(-1)
    assert 0.4 < valid.float().mean() < 0.6
    assert (allowed.flatten() == valid.flatten()).float().mean() > 0.9999                     # rounding


# ---------------------------------------------------------------------------------------------------- density

def mixture(lower, upper):
    as_map = lambda *values: torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1, 1)
    edge = lambda value: torch.full((1, 1, 1, 1), value, dtype=torch.float64)
    return Mixture(as_map(0.3, 0.7).log(), as_map(-1.0, 2.0), as_map(-0.5, 0.2), edge(lower), edge(upper))


@pytest.mark.parametrize('lower, upper', [(-1.5, 0.5), (-60.0, 60.0), (30.0, 30.5), (-1e-3, 1e-3)])
def test_a_truncated_mixture_has_mass_one_and_its_quantiles(lower, upper):
    """By the trapezoid rule; far in a tail and in a narrow interval too."""
    density, points = mixture(lower, upper), 200_001
    grid = torch.linspace(lower, upper, points, dtype=torch.float64)
    p = torch.exp(-density.nll(grid.view(-1, 1, 1, 1)).flatten())
    assert torch.trapezoid(p, grid).item() == approx(1, abs=1e-6)
    below = torch.cumulative_trapezoid(p, grid)
    for share in (0.05, 0.5, 0.9):
        value = density.quantile(torch.full((1, 1, 1, 1), share, dtype=torch.float64)).item()
        place = round((value - lower) / (upper - lower) * (points - 1))
        assert below[place - 1].item() == approx(share, abs=1e-3)


def quadrature(n):
    """Points x (n^4, 1, 2, 2) in [0, 1], and their shares (n^4,) of the volume of all images.

    A grid in LL and in the interval of each detail: the density of x is unbounded at the edges of the cube,
    where intervals are short, the density times their lengths is not.
    """
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t = torch.cartesian_prod(*[grid] * 4).view(-1, 4, 1, 1, 1)
    ll, details, volume = 2 * t[:, 0], [], torch.full((n ** 4,), 2 / n ** 4, dtype=torch.float64)
    for i in range(1, 4):
        lower, upper = bounds(ll, details, 1.0)
        details.append(lower + t[:, i] * (upper - lower))
        volume = volume * (upper - lower).flatten()
    return compose(ll, details), volume


@torch.no_grad()
def probabilities(model, x, volume):
    """The mass (N,) at the points x, which a model of very fine gray levels takes as they are."""
    gray = (x * model.gray_levels).floor() / (model.gray_levels - 1)
    return volume * torch.exp(4 * math.log(model.gray_levels) - model(gray, temperature=0.0)['recon'])


@pytest.fixture(scope='module')
def mass():
    """Points of the images of 2 x 2, and the probability around each."""
    x, volume = quadrature(16)
    assert volume.sum().item() == approx(1, abs=0.01)
    return x, probabilities(build(bits=20).double(), x, volume)


def test_the_density_integrates_to_one(mass):
    """Over all images of 2 x 2, by the midpoint rule."""
    assert mass[1].sum().item() == approx(1, abs=0.005)


def test_samples_follow_the_density(mass):
    """The probability of each of the 256 images of 2 bits, and its share of 100,000 samples.

    A total variation of 0.02 is expected from the number of samples alone.
    """
    x, p = mass
    place = lambda x: (x.flatten(1).long() * torch.tensor([64, 16, 4, 1])).sum(1)
    expected = torch.zeros(256, dtype=p.dtype).index_add_(0, place(4 * x), p)
    torch.manual_seed(1)
    samples = build(bits=2).sample(100_000)
    drawn = torch.bincount(place(3 * samples + 0.5), minlength=256) / len(samples)
    distance = lambda other: 0.5 * (expected - other).abs().sum().item()
    assert distance(drawn) < 0.03 and distance(1 / 256) > 0.3


@torch.no_grad()
def test_the_bound_is_that_of_the_gray_levels(mass):
    """Importance-weighted over many draws of the noise, it comes near the probability of an image."""
    x, p = mass
    chosen = torch.tensor([0, 1, 0, 1]).view(1, 1, 2, 2)
    expected = p[((x > 0.5) == chosen).flatten(1).all(1)].sum()
    torch.manual_seed(1)
    recon = build(bits=1).double()(chosen.expand(20_000, 1, 2, 2).double())['recon']
    assert torch.exp(-recon).mean().item() == approx(expected.item(), rel=0.05)
    assert -torch.log(expected).item() < recon.mean().item()


@torch.no_grad()
def test_two_levels_integrate_to_one():
    """E[1 / p(x)] over samples x is the volume, 1, of all images; the mean of their bits is the entropy."""
    model = build((1, 4, 4), levels=2, bits=8, spread=0.3)
    torch.manual_seed(1)
    x = model.sample(20_000)
    log_p = 16 * math.log(256) - model(x)['recon']
    weights = torch.exp(-log_p)
    assert weights.mean().item() == approx(1, abs=4 * weights.std().item() / 20_000 ** 0.5)
    assert weights.std() < 20 and log_p.std() > 0.5


@torch.no_grad()
def test_flat_densities_cost_all_bits():
    """Far wider than their interval, mixtures are uniform there: of a gray image, all bits are lost."""
    model = build((1, 7, 5), levels=1, bits=3)
    for level in model.levels:
        for head in level.heads:
            head.weight.zero_()
            head.bias.copy_(torch.tensor([0.0, 0, 0, 0, 7, 7]))
    x = images(4, (1, 7, 5), bits=3)
    terms = model(x)
    outside = 35 - 24                                       # beyond 6 x 4 pixels: 3 bits each
    values = model._dequantize(x, 0.0)[..., 0:6, 0:4]
    ll, details = decompose(values)
    widths = [torch.log(torch.sub(*bounds(ll, details[:i], 1.0)[::-1])) for i in range(3)]
    expected = outside * 3 * math.log(2) + 24 * 3 * math.log(2) + 6 * math.log(2) + sum(
        width.flatten(1).sum(1) for width in widths)
    torch.testing.assert_close(model(x, temperature=0.0)['recon'].float(), expected, rtol=1e-3, atol=0.05)
    assert terms['kl'].shape == (4, 0) and (terms['log_q'] == 0).all() and (terms['log_p'] == 0).all()


# ------------------------------------------------------------------------------------------------------ model

@torch.no_grad()
@pytest.mark.parametrize('shape, padding', [((1, 9, 14), 0), ((3, 8, 8), 0), ((2, 13, 12), 2)])
def test_any_size_and_number_of_channels(shape, padding):
    model = build(shape, levels=2, padding=padding)
    x = images(3, shape, bits=4)
    maps, terms = model.maps(x), model(x, temperature=0.0)
    assert maps['recon'].shape == (3, 1, *shape[1:]) and maps['kl'].shape == (3, 0, *shape[1:])
    torch.testing.assert_close(maps['recon'].sum((1, 2, 3)), terms['recon'].float(), rtol=1e-4, atol=1e-3)
    framed = model.pixels.inside(maps['recon'])
    assert framed.sum().item() == approx(maps['recon'].sum().item())
    samples = model.sample(2)
    assert samples.shape == (2, *shape) and torch.equal(samples * 15, (samples * 15).round())
    assert model.statistics(x).shape == (3, 8) and model.statistics(x).isfinite().all()


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match=r'16 x 31 cannot be halved 5 times.*at least 32'):
        Haar((1, 16, 31), HaarConfig())
    with pytest.raises(UserError, match='skip 1'):
        build().maps(images(1, (1, 2, 2)), skip=1)


@torch.no_grad()
def test_crops_estimate_the_likelihood():
    """Where an image is the same everywhere in distribution, crops are as likely as the whole."""
    model, x = build((1, 40, 40), levels=2, spread=0.2), images(60, (1, 40, 40), bits=4)
    model.initialize(x)
    whole, crops = (model.train(mode)(x)['level_nats'].mean(0) for mode in (False, True))
    assert (whole - crops).abs().max() < 0.05
    logs = model.objective(model(x), 0.0)[1]
    assert logs['train/nelbo_iter'].item() == approx(model.eval()(x)['recon'].mean().item(), rel=0.01)


@torch.no_grad()
def test_details_are_scaled_by_those_of_the_training_images():
    model, x = build((1, 8, 8), levels=2), images(50, (1, 8, 8), bits=4)
    model.initialize(x)
    torch.manual_seed(0)
    values, found = model._dequantize(x), []
    for _ in range(2):
        values, details = decompose(values)
        found.append([detail.square().mean().sqrt().item() for detail in details])
    assert [level.std.tolist() for level in model.levels] == [approx(row, rel=0.02) for row in found]


@torch.no_grad()
def test_statistics_of_a_known_density():
    """Mean 0 and scale 1 everywhere: the log deviation in scales is that in standard deviations."""
    model = build((1, 4, 4), levels=1, bits=8)
    for head in model.levels[0].heads:
        head.weight.zero_()
        head.bias.zero_()
    x = images(5, (1, 4, 4))
    torch.manual_seed(3)
    nll, log_scale, in_scales, deviation = model.statistics(x).T
    torch.manual_seed(3)
    _, details = decompose(model._dequantize(x))
    z = torch.stack([detail / std for detail, std in zip(details, model.levels[0].std)])
    expected = torch.log(z.abs() + 1e-3).mean((0, 2, 3, 4))
    torch.testing.assert_close(in_scales.float(), expected)
    torch.testing.assert_close(deviation.float(), expected)
    assert (log_scale == 0).all()
    torch.manual_seed(3)
    terms, stds = model(x), model.levels[0].std.log().mean()
    torch.testing.assert_close(nll, terms['level_nats'][:, 0] - stds)


def test_training_makes_images_more_likely():
    torch.manual_seed(0)
    model, nats = Haar((1, 16, 16), HaarConfig(levels=2, width=4)).train(), []
    x = torch.nn.functional.interpolate(images(16, (1, 4, 4)), size=16, mode='bilinear')
    model.initialize(x)
    for _ in range(30):
        loss, _ = model.objective(model(x), 0.0)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for weights, gradient in zip(model.parameters(), gradients):
                weights -= 0.2 * gradient
        nats.append(loss.item())
    assert sum(nats[-5:]) / 5 < sum(nats[:5]) / 5 - 0.05


def test_scores_of_a_likelihood_without_latents():
    model, x = build((1, 8, 8), levels=2), images(3, (1, 8, 8), bits=4)
    chosen, _ = choose_scores(('all',), model)
    names = [score.name for score in chosen]
    assert not [name for name in names if name.startswith(('kl', 'lk', 'llr'))]
    assert {'recon_nll', 'nelbo', 'iw', 'complexity', 'typicality', model.primary_score} <= set(names)
    outputs = Outputs(model, x, Scoring(num_draws=2, num_iw_samples=2), bits=4)
    for score in chosen:
        if score.image:
            assert score.image(outputs).isfinite().all()
            assert score.map is None or score.map(outputs).shape == x.shape
    with pytest.raises(UserError, match='--scores kl needs more latent groups: the model has 0'):
        choose_scores(('kl',), model)
