"""Densities of features against distances worked by hand and scikit-learn; what they keep."""

import json

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from test_msma_golden import MSMA_2D_RULE
from test_scores import LinearGaussian, seeded

from anomaly.density import (
    GMM,
    KDE,
    KNN,
    PCAGMM,
    SADE_RULE,
    Mahalanobis,
    Typicality,
    WhitenedKNN,
    cross_fit,
)
from anomaly.flow_density import Flow
from anomaly.outputs import Outputs
from anomaly.scores import SCORES, Scoring
from utils import UserError

DENSITIES = {'typicality': Typicality, 'kl_profile': Mahalanobis, 'kl_knn': KNN, 'kl_gmm': GMM}


class QuickFlow(Flow):
    """Barely trained."""
    def __init__(self):
        super().__init__(hidden=(8,), transforms=2, steps=25)


ALL = [*DENSITIES.values(), KDE, PCAGMM, QuickFlow]


def correlated(number, dims=3, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(number, dims)) @ random.normal(size=(dims, dims)) + 5


def two_clusters(number=400, seed=0):
    random = np.random.default_rng(seed)
    centres = np.where(random.random((number, 1)) < 0.5, -4, 4)
    return centres + random.normal(size=(number, 2))


def test_typicality_worked_by_hand():
    fitted = Typicality().fit(np.array([[1.0, 2, 3], [3, 4, 5]]))                # sums 6 and 12, mean 9
    assert fitted.score(np.array([[0.0, 0, 4], [9, 9, 0]])).tolist() == [5, 9]


def test_mahalanobis_is_the_distance_in_standard_deviations():
    random = np.random.default_rng(0)
    mixing = np.array([[2.0, 0, 0], [1, 1, 0], [0, 0, 3]])
    fitted = Mahalanobis().fit(random.normal(size=(20000, 3)) @ mixing.T + 5)
    probe = np.array([[5.0, 5, 5], [9, 9, 5], [5, 5, 14]])
    exact = np.linalg.norm(np.linalg.solve(mixing, (probe - 5).T), axis=0)
    np.testing.assert_allclose(fitted.score(probe), exact, atol=0.08)


def test_knn_distances_worked_by_hand():
    normal = np.array([[0.0, 0], [3, 4], [0, 8], [6, 0]])
    probe = np.array([[0.0, 0], [3, 0]])                    # distances 0, 5, 8, 6 and 3, 4, sqrt 73, 3
    for k, expected in ((1, [0, 3]), (2, [5, 3]), (3, [6, 4]), (4, [8, np.sqrt(73)]), (99, [8, np.sqrt(73)])):
        np.testing.assert_allclose(KNN(k, scale=False).fit(normal).score(probe), expected, atol=1e-12)
    # standardized: a feature in other units changes nothing
    units = np.array([1.0, 1e6])
    a, b = KNN(2).fit(normal), KNN(2).fit(normal * units)
    np.testing.assert_allclose(a.score(probe), b.score(probe * units))
    # one deviation is sqrt(mean square): feature 1 has 0, 3, 0, 6, mean 9/4
    deviation = np.sqrt((0 + 9 + 0 + 36) / 4 - (9 / 4) ** 2)
    line = np.column_stack([normal[:, 0], np.zeros(4)])
    np.testing.assert_allclose(KNN(1).fit(line).score(np.array([[1.0, 0]])), 1 / deviation)


@pytest.mark.parametrize('covariance', ['full', 'diag'])
def test_gmm_is_that_of_scikit_learn(covariance):
    features = two_clusters()
    z = (features - features.mean(0)) / features.std(0)
    ours = GMM(components=(3,), covariances=(covariance,), seed=1).fit(features)
    theirs = GaussianMixture(3, covariance_type=covariance, reg_covar=1e-3, random_state=1).fit(z)
    np.testing.assert_allclose(ours.score(features), -theirs.score_samples(z), rtol=1e-10)


def test_gmm_takes_the_components_that_the_data_show():
    assert len(GMM().fit(two_clusters()).weights) == 2
    single = correlated(400)
    assert len(GMM().fit(single).weights) == 1
    assert len(GMM().fit(single[:7]).weights) == 1               # few: none that collapses onto two images
    # halfway between the clusters nothing is normal: a mixture knows, one normal does not
    features, middle, inside = two_clusters(), np.zeros((1, 2)), np.array([[4.0, 4]])
    fitted, one = GMM().fit(features), Mahalanobis().fit(features)
    assert fitted.score(middle) > fitted.score(features).max() and fitted.score(inside) < fitted.score(middle)
    assert one.score(middle) < one.score(inside)


def test_left_out_images_choose_a_mixture_by_their_sum_or_a_quantile():
    random, z = np.random.default_rng(0), two_clusters()
    rule = {'components': (2, 3), 'covariances': ('full',)}
    for quantile in (None, 0.1, 0.9):
        fitted = GMM(**rule, quantile=quantile, choosing_folds=4)
        fold = np.random.default_rng(0).permutation(400) // 100
        values = {k: np.array([GaussianMixture(k, reg_covar=1e-3, random_state=0).fit(z[fold != i])
                               .score_samples(z[fold == i]) for i in range(4)]) for k in (2, 3)}
        best = max(values, key=lambda k: (values[k].sum() if quantile is None
                                          else np.quantile(values[k], quantile, axis=1).mean()))
        assert fitted.choose(z) == (best, 'full')
    # published rules, and what is left of them with few images: smaller mixtures
    sade = GMM(**SADE_RULE, images_per_feature=2)
    assert len(sade.fit(two_clusters(40)).weights) in (3, 4, 5)
    assert len(sade.fit(random.normal(size=(12, 2))).weights) < 3
    assert len(PCAGMM(**SADE_RULE).fit(random.normal(size=(4, 2))).weights) == 1
    few = MSMA_2D_RULE | {'components': (2, 4)}
    assert len(GMM(**few).fit(two_clusters(60)).weights) in (2, 4)


def test_kernels_worked_by_hand_and_chosen_by_what_was_left_out():
    normal, probe = np.array([[0.0], [3.0]]), np.array([[0.0], [1.0]])
    gaussian = KDE(kernels=('gaussian',), bandwidths=(2.0,)).fit(normal)
    density = [sum(np.exp(-(x - c) ** 2 / 8) for c in (0, 3)) / 2 / np.sqrt(8 * np.pi) for x in (0, 1)]
    np.testing.assert_allclose(gaussian.score(probe), -np.log(density))
    exponential = KDE(kernels=('exponential',), bandwidths=(0.5,)).fit(normal)
    density = [sum(np.exp(-2 * abs(x - c)) for c in (0, 3)) / 2 for x in (0, 1)]
    np.testing.assert_allclose(exponential.score(probe), -np.log(density))
    for density in (gaussian, exponential, KDE(('gaussian',)).fit(correlated(40, 3))):           # as exported
        normal = torch.tensor(density.reference)
        np.testing.assert_allclose(density.energy(normal), density.score(normal.numpy()))
    wide, narrow = (KDE(('gaussian',)).fit(width * correlated(200, 1)).bandwidth for width in (1000, 0.1))
    assert (wide, narrow) == (3, 0.5), 'the ends of the published grid'


def test_principal_components_in_place_of_all_features():
    """Seven features are mixtures of two: the plane in which they vary is all that counts."""
    plane = two_clusters() @ np.diag([3, 1])
    embedded = plane @ np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0][:2] + 4
    rule = {'components': (2,), 'covariances': ('full',)}
    fitted = PCAGMM(**rule).fit(embedded)
    assert fitted.axes.shape == (7, 2)
    reference = PCAGMM(**rule).fit(plane)
    np.testing.assert_allclose(fitted.score(embedded), reference.score(plane), rtol=1e-6)
    np.testing.assert_allclose(fitted.standardized(torch.from_numpy(embedded)).numpy().std(0), 1)
    assert PCAGMM(dimensions=1, **rule).fit(embedded).axes.shape == (7, 1)


def test_a_flow_recovers_a_normal():
    """Its -log density, known on paper, in nats of the standardized features; it learns the correlation."""
    random = np.random.default_rng(0)
    normal, new = (random.multivariate_normal([1, -2], [[1, 0.9], [0.9, 1]], n) for n in (1500, 500))
    fitted = Flow(hidden=(16,), steps=300, learning_rate=0.01).fit(normal)
    from scipy.stats import multivariate_normal
    exact = -multivariate_normal(normal.mean(0), np.cov(normal.T)).logpdf(new) - np.log(normal.std(0)).sum()
    assert np.abs(fitted.score(new) - exact).mean() < 0.15, 'without the correlation it is above 0.7'
    assert fitted.weights.dtype == np.float32 and Flow.from_state(fitted.state()).transforms == 1


@pytest.mark.parametrize('make', [Mahalanobis, WhitenedKNN, KNN, GMM, KDE, PCAGMM, QuickFlow])
def test_far_is_more_anomalous_and_a_constant_feature_harms_nothing(make):
    features = np.column_stack([correlated(60), np.zeros(60)])                   # a collapsed group
    fitted = make().fit(features)
    usual = fitted.score(features)
    assert np.isfinite(usual).all()
    assert fitted.score(features[:1] + [30, 0, 0, 0]) > usual.max()


@pytest.mark.parametrize('make', ALL)
def test_rows_that_are_not_finite_teach_nothing_and_score_nan(make):
    features = correlated(40)
    spoilt = np.concatenate([features, np.full((2, 3), np.nan), [[np.inf, 0, 0]]])
    fitted = make().fit(spoilt)
    scores = fitted.score(spoilt)
    assert np.isnan(scores[40:]).all()
    # 43 rows and 40 may be summed in other orders.
    np.testing.assert_allclose(scores[:40], make().fit(features).score(features), rtol=1e-6)
    assert np.isnan(fitted.score(spoilt[40:])).all()


@pytest.mark.parametrize('make', ALL)
@pytest.mark.parametrize('keep', ['json', 'npz'])
def test_what_was_learned_is_kept_bit_by_bit(make, keep, tmp_path):
    features, new = correlated(50), correlated(20, seed=1)
    fitted = make().fit(features)
    if keep == 'json':
        state = json.loads(json.dumps({name: value.tolist() for name, value in fitted.state().items()}))
    else:
        np.savez(tmp_path / 'a.npz', **fitted.state())
        with np.load(tmp_path / 'a.npz', allow_pickle=False) as file:
            state = dict(file)
    again = make.from_state(state)
    np.testing.assert_array_equal(again.score(new), fitted.score(new))
    assert make().fit(features).score(new).tolist() == fitted.score(new).tolist()      # and fits repeat
    assert KNN.from_state(KNN(k=2).fit(features).state()).k == 2
    with pytest.raises(KeyError, match=r'mean|reference'):
        make.from_state({})


def test_cross_fitted_scores_are_those_of_images_that_were_not_fitted():
    random = np.random.default_rng(0)
    features, fresh = random.normal(size=(30, 12)), random.normal(size=(3000, 12))
    one = Mahalanobis()
    crossed = cross_fit(one, features)
    in_sample = one.score(features)
    # a fit flatters its own images, and crossed scores are those of images that it has not seen
    assert in_sample.mean() < one.score(fresh).mean() < crossed.mean() * 1.1
    assert crossed[4] == pytest.approx(Mahalanobis().fit(np.delete(features, 4, 0)).score(features[4:5])[0])
    grouped = cross_fit(one, features, ['a', 'b', 'a', *range(27)])      # a patient's images go together
    without = Mahalanobis().fit(np.delete(features, [0, 2], 0))
    np.testing.assert_allclose(grouped[[0, 2]], without.score(features[[0, 2]]))
    one.folds = 7
    assert len(cross_fit(one, np.repeat(features, 5, 0))) == 150
    nearest = KNN(k=1)
    assert (cross_fit(nearest, features) > 0).all()              # none is its own neighbour,
    assert nearest.score(features).max() == pytest.approx(0, abs=1e-6)           # as after a fit on all


def test_a_density_makes_no_more_fits_than_its_folds():
    calls = []

    class Counting(Typicality):
        folds = 4

        def learn(self, features):
            calls.append(len(features))
            super().learn(features)
    cross_fit(Counting(), correlated(20))
    assert calls == [15] * 4 + [20]


def test_too_few_images_are_told():
    with pytest.raises(UserError, match='Mahalanobis learns from at least 3 normal images, not 2'):
        Mahalanobis().fit(np.ones((2, 4)))
    with pytest.raises(UserError, match='at least 4 normal images, not 1'):
        GMM().fit(np.array([[1.0, 2], [np.nan, 2]]))


@pytest.mark.parametrize('name', DENSITIES)
def test_a_score_learns_from_terms_and_reads_what_an_evaluation_kept(name):
    model, normal = LinearGaussian(tau2=0.01, sigma2=0.01), torch.rand(30, 1, 2, 3, generator=seeded(1))
    one, = SCORES[name](2)
    assert one.image is None and type(one.density) is DENSITIES[name] and not hasattr(one.density, 'mean')
    one.density.fit(one.features(Outputs(model, normal)).numpy())
    features = one.features(Outputs(model, torch.rand(4, 1, 2, 3, generator=seeded(2)), Scoring(num_draws=2)))
    kept = {key: value.tolist() for key, value in one.density.state().items()}
    again = SCORES[name](2)[0].density.from_state(json.loads(json.dumps(kept)))
    assert np.array_equal(again.score(features.numpy()), one.density.score(features.numpy()))


def test_whitened_distances_against_scikit_learn():
    from sklearn.covariance import LedoitWolf
    random = np.random.default_rng(0)
    normal, new = random.normal(size=(40, 3)) @ random.normal(size=(3, 3)) + 2, random.normal(size=(6, 3)) * 4
    z = lambda values: (values - normal.mean(0)) / normal.std(0)
    precision = np.linalg.inv(LedoitWolf(assume_centered=False).fit(z(normal)).covariance_)
    pairs = z(new)[:, None] - z(normal)
    distances = np.sqrt(np.einsum('nmd,de,nme->nm', pairs, precision, pairs))
    expected = np.sort(distances, 1)[:, :5].mean(1)
    assert np.allclose(WhitenedKNN(k=5).fit(normal).score(new), expected)
    assert np.allclose(WhitenedKNN(k=5, log=True).fit(normal).score(new), np.log(expected))
    assert np.allclose(WhitenedKNN(k=100).fit(normal).score(new), distances.mean(1)), 'fewer images than k'


def test_the_mahalanobis_distance_of_a_gaussian_is_that_of_the_closed_form():
    random = np.random.default_rng(1)
    root, mean = random.normal(size=(4, 4)), np.array([1.0, -5, 3, 100])
    normal = random.normal(size=(50_000, 4)) @ root + mean
    new = random.normal(size=(100, 4)) @ root * 2 + mean
    inverse = np.linalg.inv(root.T @ root)
    exact = 0.5 * np.log(np.einsum('nd,de,ne->n', new - mean, inverse, new - mean))
    assert np.allclose(Mahalanobis(log=True).fit(normal).score(new), exact, atol=0.02)
