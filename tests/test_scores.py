"""Scores against a model whose likelihood, ELBO and LLR are known on paper."""

import math

import numpy as np
import pytest
import torch

from anomaly.baselines import BASELINES
from anomaly.scores import (
    SCORES,
    Passes,
    ScoreConfig,
    choose_scores,
    compressed_bits,
    cross_fit,
    elbo,
    iw_bound,
    log_weight,
)
from utils import UserError


def log_normal(x, mean, var):
    return -0.5 * (math.log(2 * math.pi * var) + (x - mean) ** 2 / var)


class LinearGaussian(torch.nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(z1, tau2), each of D pixels ~ N(z2, sigma2): every posterior is known.

    `spread` multiplies the standard deviation of the posteriors; at 1 they are exact and each log weight is
    log p(x).
    """
    num_groups = 2

    def __init__(self, tau2=0.5, sigma2=0.4, spread=1.0):
        super().__init__()
        self.tau2, self.sigma2, self.spread, self.calls = tau2, sigma2, spread, []

    def posteriors(self, x):
        """Mean and variance of z1 given x, and of z2 given x as a function of z1."""
        d, mean = x[0].numel(), x.double().mean((1, 2, 3))
        noise = self.tau2 + self.sigma2 / d
        p1, p2 = 1 + 1 / noise, 1 / self.tau2 + d / self.sigma2
        return (mean / noise / p1, self.spread ** 2 / p1,
                lambda z1: (z1 / self.tau2 + d * mean / self.sigma2) / p2, self.spread ** 2 / p2)

    def forward(self, x, skip=0, temperature=1.0):
        self.calls.append(skip)
        m1, v1, m2_of, v2 = self.posteriors(x)
        prior1, prior2 = skip > 1, skip > 0
        z1 = temperature * torch.randn_like(m1) * (1 if prior1 else v1 ** 0.5) + (0 if prior1 else m1)
        m2 = z1 if prior2 else m2_of(z1)
        z2 = m2 + temperature * torch.randn_like(m1) * (self.tau2 if prior2 else v2) ** 0.5
        kl1 = 0 * z1 if prior1 else 0.5 * (v1 + m1 ** 2 - 1 - math.log(v1))
        kl2 = 0 * z1 if prior2 else 0.5 * ((v2 + (m2 - z1) ** 2) / self.tau2 - 1 - math.log(v2 / self.tau2))
        keep1, keep2 = not prior1, not prior2
        return {'recon': -log_normal(x.double(), z2[:, None, None, None], self.sigma2).sum((1, 2, 3)),
                'kl': torch.stack([kl1, kl2], 1), 'logits': z2,
                'log_q': keep1 * log_normal(z1, m1, v1) + keep2 * log_normal(z2, m2, v2),
                'log_p': keep1 * log_normal(z1, 0 * z1, 1) + keep2 * log_normal(z2, z1, self.tau2)}

    def means(self, x, skip=0):
        m1, _, m2_of, _ = self.posteriors(x)
        z1 = 0 * m1 if skip > 1 else m1
        return (z1 if skip else m2_of(z1))[:, None, None, None]

    def reconstruct(self, x, skip=0):
        return self.means(x, skip).expand(x.shape).float()

    def maps(self, x, skip=0):
        pixels = x.shape[-2] * x.shape[-1]
        kl = self(x, skip=skip, temperature=0.0)['kl']
        return {'recon': -log_normal(x.double(), self.means(x, skip), self.sigma2).sum(1, keepdim=True),
                'kl': kl[:, :, None, None].expand(-1, -1, *x.shape[-2:]) / pixels}

    def log_prob(self, x):
        """log p(x) in closed form: pixels are N(0, (1 + tau2) 11' + sigma2 I)."""
        x = x.double().flatten(1)
        d = x.shape[1]
        covariance = (1 + self.tau2) * x.new_ones(d, d) + self.sigma2 * torch.eye(d, dtype=x.dtype)
        return torch.distributions.MultivariateNormal(x.new_zeros(d), covariance).log_prob(x)


class Autoencoder(torch.nn.Module):
    def reconstruct(self, x):
        return x.flip(-1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images(number=3):
    return torch.rand(number, 1, 2, 3, generator=seeded(0))


def score(name, passes):
    return next(s for row in SCORES.values() for s in row(2) if s.name == name)(passes)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_functions_of_the_terms_worked_by_hand():
    terms = {'recon': torch.tensor([10.0]), 'kl': torch.tensor([[1.0, 2.5]]), 'log_q': torch.tensor([-3.0]),
             'log_p': torch.tensor([-7.0])}
    assert elbo(terms).item() == -13.5
    assert log_weight(terms).item() == -14.0
    weights = torch.tensor([[1.0], [2.0], [6.0]]).log()
    assert iw_bound(weights).item() == pytest.approx(math.log(3))


def test_with_the_exact_posterior_every_log_weight_is_log_p_of_x():
    model, x = LinearGaussian(), images()
    passes = Passes(model, x, draws=2, iw_samples=3)
    torch.testing.assert_close(passes.log_weights(), model.log_prob(x).expand(3, -1), rtol=0, atol=1e-9)
    torch.testing.assert_close(score('iw', passes).image, -model.log_prob(x))


def test_iw_bound_of_a_wrong_posterior_converges_from_below():
    model, x = LinearGaussian(spread=2.0), images()
    truth = model.log_prob(x)
    weights = Passes(model, x.repeat(300, 1, 1, 1), iw_samples=10).log_weights().view(-1, 3)
    assert (iw_bound(weights) - truth).abs().max() < 0.1
    assert (weights.mean(0) < truth - 0.3).all()                          # the ELBO is far below
    assert iw_bound(weights[:5]).mean() < iw_bound(weights).mean()


def test_nelbo_and_llr_are_the_closed_forms():
    model, x = LinearGaussian(), images()
    passes = Passes(model, x.repeat(1000, 1, 1, 1), draws=4)              # 4000 draws of each of 3 images
    nelbo = score('nelbo', passes).image.view(-1, 3).mean(0)
    torch.testing.assert_close(nelbo, -model.log_prob(x), rtol=0, atol=0.05)
    # L>1: z1 from its posterior N(m, v), z2 from N(z1, tau2), so that z2 is N(m, v + tau2)
    m, v, _, _ = model.posteriors(x)
    square = ((x.double() - m[:, None, None, None]) ** 2 + v + model.tau2).sum((1, 2, 3))
    d = x[0].numel()
    kl1 = 0.5 * (v + m ** 2 - 1 - math.log(v))
    l1 = -d / 2 * math.log(2 * math.pi * model.sigma2) - square / (2 * model.sigma2) - kl1
    llr = score('llr_1', passes).image.view(-1, 3).mean(0)
    torch.testing.assert_close(llr, model.log_prob(x) - l1, rtol=0, atol=0.3)
    assert (llr > 1).all()


def test_llr_of_no_skipped_group_is_zero_and_draws_are_shared():
    passes = Passes(LinearGaussian(), images(), draws=3)
    assert (passes.mean(elbo) - passes.mean(elbo, skip=0)).abs().max() == 0
    # the top group is sampled first, so it takes the same values whether or not group 2 is skipped: equal KL
    assert torch.equal(passes.terms(1, 0)['kl'][:, 0], passes.terms(1, 1)['kl'][:, 0])
    assert 'logits' not in passes.terms(1)


def test_all_scores_of_a_batch_share_their_passes():
    model = LinearGaussian()
    model.maps = lambda x, skip=0: {'recon': x, 'kl': x.expand(-1, 2, -1, -1)}
    passes = Passes(model, images(), draws=3, iw_samples=5)
    chosen, lines = choose_scores(('all',), model, 5)
    for one in chosen:
        if not hasattr(one, 'state'):
            one(passes)
    passes.features()
    assert sorted(model.calls) == [0] * 5 + [1] * 3               # 5 draws, of which 3 serve all; 3 for LLR>1
    assert not lines


def test_noise_depends_on_the_counters_alone():
    model, x = LinearGaussian(), images()
    first = Passes(model, x, draws=2, noise=(1, 'val', 0))
    torch.rand(7)
    again = Passes(model, x, draws=2, noise=(1, 'val', 0))
    again.terms(1)                                                        # another order of passes
    assert torch.equal(score('nelbo', first).image, score('nelbo', again).image)
    other = Passes(model, x, draws=2, noise=(1, 'val', 1))
    assert not torch.equal(score('nelbo', first).image, score('nelbo', other).image)


OUTLIER_SCORES = ['reconstruction', 'recon_nll', 'nelbo', 'iw', 'kl_1', 'typicality', 'kl_profile']


@pytest.mark.parametrize('name', OUTLIER_SCORES)
def test_an_outlier_scores_higher_than_normal_images(name):
    model = LinearGaussian(tau2=0.01, sigma2=0.01)
    normal = (0.3 + 0.05 * torch.randn(40, 1, 2, 3, generator=seeded(1))).clamp(0, 1)
    outlier = torch.tensor([0.9, 1, 0.95, 0.6, 1, 1]).reshape(1, 1, 2, 3)
    one = next(s for row in SCORES.values() for s in row(2) if s.name == name)
    one.fit(model, normal.split(10))
    usual = one(model, normal).image
    assert one(model, outlier).image.item() > usual.mean() + 2 * usual.std()


def test_maps_sum_to_their_scores_at_posterior_means():
    model, x = LinearGaussian(), images()
    passes, means = Passes(model, x), model(x, temperature=0.0)
    close(score('recon_nll', passes).map.sum((1, 2, 3)), means['recon'])
    close(score('nelbo', passes).map.sum((1, 2, 3)), -elbo(means))
    close(score('kl_2', passes).map.sum((1, 2, 3)), means['kl'][:, 1])
    assert score('reconstruction', passes).map.shape == (3, 1, 2, 3)
    # z2 from the posterior explains the pixels better, so log p(x|z posterior) - log p(x|z prior) sums to > 0
    assert (score('llr_1', passes).map.sum((1, 2, 3)) > 0).all()
    assert score('complexity', passes).map is None and score('iw', passes).map is None


def test_complexity_is_nelbo_in_bits_minus_compressed_bits():
    passes = Passes(LinearGaussian(), images(), draws=2, bits=5)
    nelbo = score('nelbo', passes).image
    close(score('complexity', passes).image, nelbo / math.log(2) - compressed_bits(passes.x, 5))


@pytest.mark.parametrize(('channels', 'bits'), [(1, 1), (1, 5), (1, 8), (1, 12), (3, 8), (3, 16), (2, 8)])
def test_noise_compresses_to_about_its_own_bits_and_a_flat_image_to_few(channels, bits):
    noise = torch.rand(1, channels, 64, 64, generator=seeded(0))
    values = channels * 64 * 64
    assert 0.99 * values * bits < compressed_bits(noise, bits).item() < 1.5 * values * bits + 1000
    assert compressed_bits(torch.full_like(noise, 0.5), bits).item() < 3000


def test_fewer_bits_compress_better():
    noise = torch.rand(1, 1, 32, 32, generator=seeded(0))
    assert compressed_bits(noise, 2) < compressed_bits(noise, 5) < compressed_bits(noise, 8)


def test_typicality_of_features_worked_by_hand():
    one = SCORES['typicality'](2)[0]
    one.fit_features(np.array([[1.0, 2, 3], [3, 4, 5]]))                  # NELBO 6 and 12, mean 9
    assert one.score_features(np.array([[0.0, 0, 4], [9, 9, 0]])).tolist() == [5, 9]


def test_kl_profile_is_the_mahalanobis_distance():
    random = np.random.default_rng(0)
    mixing = np.array([[2.0, 0, 0], [1, 1, 0], [0, 0, 3]])
    features = random.normal(size=(20000, 3)) @ mixing.T + 5
    one = SCORES['kl_profile'](2)[0]
    one.fit_features(features)
    probe = np.array([[5.0, 5, 5], [9, 9, 5], [5, 5, 14]])
    exact = np.linalg.norm(np.linalg.solve(mixing, (probe - 5).T), axis=0)
    np.testing.assert_allclose(one.score_features(probe), exact, atol=0.08)
    constant = np.column_stack([features[:50], np.zeros(50)])             # a collapsed group
    one.fit_features(constant)
    assert np.isfinite(one.score_features(constant)).all()


def test_cross_fitted_scores_are_those_of_images_that_were_not_fitted():
    random = np.random.default_rng(0)
    features, fresh = random.normal(size=(30, 12)), random.normal(size=(3000, 12))
    one = SCORES['kl_profile'](11)[0]
    crossed = cross_fit(one, features)
    in_sample = one.score_features(features)
    # a fit flatters its own images, and crossed scores are those of images that it has not seen
    assert in_sample.mean() < one.score_features(fresh).mean() < crossed.mean() * 1.1
    one.fit_features(np.delete(features, 4, 0))
    assert crossed[4] == pytest.approx(one.score_features(features[4:5])[0])
    grouped = cross_fit(one, features, ['a', 'b', 'a', *range(27)])       # a patient's images go together
    one.fit_features(np.delete(features, [0, 2], 0))
    np.testing.assert_allclose(grouped[[0, 2]], one.score_features(features[[0, 2]]))
    assert len(cross_fit(one, np.repeat(features, 5, 0), folds=7)) == 150


def test_a_model_without_the_capability_is_told_which():
    model = Autoencoder()
    chosen, lines = choose_scores(('all',), model)
    assert [s.name for s in chosen] == ['reconstruction']
    assert any('nelbo' in line and 'likelihood terms' in line for line in lines)
    with pytest.raises(UserError, match='nelbo needs a model with likelihood terms'):
        choose_scores(('nelbo',), model)
    with pytest.raises(UserError, match='reconstruct'):
        SCORES['reconstruction'](0)[0](torch.nn.Identity(), images())
    with pytest.raises(UserError, match='has not been fitted'):
        SCORES['typicality'](2)[0](LinearGaussian(), images())


def test_scores_are_chosen_by_row_or_by_member():
    model = LinearGaussian()
    assert [s.name for s in choose_scores(('kl',), model)[0]] == ['kl', 'kl_1', 'kl_2']
    assert [s.name for s in choose_scores(('llr_1', 'nelbo'), model)[0]] == ['nelbo', 'llr_1']
    with pytest.raises(UserError, match='llr_2'):
        choose_scores(('llr_2',), model)
    assert 'iw' not in [s.name for s in choose_scores(('all',), model, 0)[0]]
    with pytest.raises(UserError, match='target_fpr'):
        ScoreConfig(target_fpr=1.5)


def test_baselines_worked_by_hand():
    dark, bright, grey = (torch.full((1, 1, 2, 3), v) for v in (0.0, 1.0, 0.5))
    normal = [torch.cat([dark, bright])]
    fitted = {}
    for name, make in BASELINES.items():
        fitted[name] = make()
        fitted[name].fit(None, normal)
    assert fitted['mean_intensity'](None, bright).image.item() == 1
    assert fitted['intensity_deviation'](None, dark).image.item() == 0.5
    assert fitted['mean_image'](None, bright).image.item() == pytest.approx(math.sqrt(6) / 2)
    assert fitted['file_size'](Passes(None, grey, file_bytes=torch.tensor([99.0]))).image.item() == 99
    # the one direction in which normal images differ is brightness: a bright pixel is off that line
    spot = grey.clone()
    spot[0, 0, 0, 0] = 1.0
    assert fitted['pca'](None, grey).image.item() == pytest.approx(0, abs=1e-9)
    assert fitted['pca'](None, spot).image.item() == pytest.approx(0.5 * math.sqrt(5 / 6))
    noise = torch.rand(1, 1, 20, 20)
    png = BASELINES['png_size']()
    assert png(None, noise).image > png(None, torch.zeros(1, 1, 20, 20)).image
