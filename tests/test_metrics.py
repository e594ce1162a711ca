"""Metrics and thresholds with answers known on paper, and the fast bootstrap against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from anomaly.metrics import (
    METRICS,
    Estimate,
    Metric,
    Resamples,
    evaluate_score,
    flagged,
    make_finite,
    percentile,
    smallest_sample,
    threshold,
    wilson_interval,
)
from utils import UserError


def by_scikit_learn(labels, scores):
    """The four metrics of one sample."""
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {'auroc': roc_auc_score(labels, scores), 'auprc': average_precision_score(labels, scores),
            **{f'fpr{rate}': fpr[np.argmax(tpr >= rate / 100 - 1e-12)] for rate in (80, 95)}}


def point_estimates(labels, scores):
    """Ours: {name: value}."""
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    found = evaluate_score(normal, anomalous, Resamples.draw(len(normal), len(anomalous)))
    return {name: estimate.value for name, estimate in found.items()}


def test_metrics_worked_by_hand():
    # normal 1, 2, 3, 4; anomalous 2.5, 5: 5 beats four, 2.5 beats two: 6 of 8 pairs
    found = point_estimates(np.array([0, 0, 0, 0, 1, 1]), np.array([1, 2, 3, 4, 2.5, 5]))
    assert found['auroc'] == 6 / 8
    assert found['auprc'] == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert found['fpr80'] == found['fpr95'] == 2 / 4


def test_fpr_is_that_of_the_first_vertex_that_reaches_the_rate():
    labels = np.r_[np.zeros(4), np.ones(5)]
    scores = np.r_[1.5, 2.5, 4.5, 0, 1, 2, 3, 4, 5]                       # 4 of 5 anomalous are at 2 or above
    assert point_estimates(labels, scores)['fpr80'] == 2 / 4
    assert point_estimates(labels, scores)['fpr95'] == 3 / 4


@pytest.mark.parametrize('levels', [4, 30, 10 ** 9])
def test_bootstrap_kernel_equals_scikit_learn_with_and_without_ties(levels):
    random = np.random.default_rng(levels)
    normal = random.integers(0, levels, 40) / levels
    anomalous = random.integers(levels // 3, levels + 1, 25) / levels
    drawn = Resamples.draw(40, 25, 60, seed=1)
    fast = {name: np.r_[one.value, one.resamples]
            for name, one in evaluate_score(normal, anomalous, drawn).items()}
    for i in range(60):
        again = np.r_[np.repeat(normal, drawn.normal[i]), np.repeat(anomalous, drawn.anomalous[i])]
        slow = by_scikit_learn(np.r_[np.zeros(40), np.ones(25)], again)
        assert slow.keys() == fast.keys() == {metric.name for metric in METRICS}
        for name in slow:
            assert fast[name][i] == pytest.approx(slow[name], abs=1e-12), name
    labels, scores = np.r_[np.zeros(40), np.ones(25)], np.r_[normal, anomalous]
    assert point_estimates(labels, scores) == pytest.approx(by_scikit_learn(labels, scores), abs=1e-12)


def test_resamples_are_stratified_seeded_and_shared():
    drawn = Resamples.draw(7, 5, 100, seed=3)
    assert (drawn.normal.sum(1) == 7).all() and (drawn.anomalous.sum(1) == 5).all()
    assert np.array_equal(drawn.normal, Resamples.draw(7, 5, 100, seed=3).normal)
    assert not np.array_equal(drawn.normal, Resamples.draw(7, 5, 100, seed=4).normal)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # N(0, 1) against N(1, 1): AUROC is Phi(1 / sqrt(2)) = 0.7602
    random, covered = np.random.default_rng(0), 0
    drawn = Resamples.draw(60, 40, 300, seed=0)
    for _ in range(200):
        found = evaluate_score(random.normal(0, 1, 60), random.normal(1, 1, 40), drawn)['auroc']
        covered += found.low <= 0.7602 <= found.high
    assert 0.89 <= covered / 200 <= 0.985


def test_separable_scores_have_a_perfect_interval():
    found = evaluate_score(np.arange(10.0), np.arange(10.0) + 100, Resamples.draw(10, 10, 50, 0))
    assert found['auroc'] == Estimate(1, 1, 1) and found['fpr95'].high == 0
    assert found['auroc'].as_json() == {'value': 1, 'low': 1, 'high': 1}
    assert found['auprc'].resamples.shape == (50,)


def test_a_new_metric_is_one_row():
    detected = Metric('detected', 'detected', 'anomalous images above every normal one', lambda curves:
                      (curves.positive * (curves.false_positive == 0)).sum(1) / curves.anomalous)
    drawn = Resamples.draw(4, 4, 50, 0)
    found = evaluate_score(np.arange(4.0), np.r_[2.5, 5, 6, 7], drawn, (detected,))
    assert found['detected'].value == 3 / 4 and found['detected'].low < 3 / 4 <= found['detected'].high


def test_a_difference_has_the_interval_of_the_pairs():
    random = np.random.default_rng(0)
    normal, anomalous = random.normal(0, 1, 60), random.normal(1, 1, 40)
    drawn = Resamples.draw(60, 40, 200, seed=0)
    score, worse = (evaluate_score(normal, anomalous - shift, drawn)['auroc'] for shift in (0, 0.5))
    assert (score - score).as_json() == {'value': 0, 'low': 0, 'high': 0}
    difference = score - worse
    assert 0 < difference.low <= difference.value <= difference.high
    assert difference.high - difference.low < score.high - score.low
    negated = evaluate_score(-normal, -anomalous, drawn)['auroc']
    assert negated.negated.value == pytest.approx(score.value)
    assert np.allclose(negated.negated.resamples, score.resamples)


def test_what_does_not_exist_in_a_resample_is_left_out_of_the_interval():
    assert Estimate.of(0.5, np.r_[np.nan, 0.25, 0.75]).as_json()['low'] == pytest.approx(0.2625)
    assert Estimate.of(np.nan, np.full(3, np.nan), images=0).as_json() == {
        'value': None, 'low': None, 'high': None, 'images': 0}


def test_threshold_is_the_conformal_quantile():
    validation = np.arange(1.0, 20)                              # 19 scores: 5 % is just within reach
    assert smallest_sample(0.05) == 19
    assert threshold(validation, 0.05) == 19
    assert threshold(np.arange(1.0, 100), 0.05) == 95                     # the ceil(100 * 0.95)-th
    assert threshold(np.arange(1.0, 6), 0.05) == 5                        # too few: the largest
    assert threshold(np.r_[np.nan, np.arange(1.0, 99)], 0.05) == 95       # a NaN counts as the largest
    assert threshold(np.r_[np.full(50, np.nan), np.arange(1.0, 11)], 0.05) == np.inf
    with pytest.raises(UserError, match='no normal validation images'):
        threshold(np.array([]), 0.05)


def test_threshold_keeps_its_promise_on_average():
    random, rates = np.random.default_rng(0), []
    for _ in range(2000):
        scores = random.normal(size=39 + 100)
        rates.append((scores[39:] > threshold(scores[:39], 0.1)).mean())
    assert 0.09 < np.mean(rates) <= 0.103                                 # 4 / 40 exactly in expectation


def test_percentile_worked_by_hand():
    validation = np.array([1.0, 2, 2, 4])
    assert percentile(np.array([0, 1, 2, 3, 9, np.nan]), validation).tolist() == [0, 12.5, 50, 75, 100, 100]


def test_scores_that_are_not_finite_are_the_most_anomalous():
    scores = np.array([1.0, np.nan, -np.inf, 5, np.inf])
    values, bad = make_finite(scores), flagged(scores, 9.0)
    assert bad.tolist() == [False, True, True, False, True]
    assert values[0] == 1 and values[3] == 5 and (values[bad] > 5).all() and np.isfinite(values).all()
    assert np.isfinite(make_finite(np.array([np.nan, np.nan]))).all()


def test_wilson_interval_of_a_known_case():
    low, high = wilson_interval(5, 100)                           # statsmodels: 0.02154, 0.11175
    assert (low, high) == pytest.approx((0.02154, 0.11175), abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(0, 10)[0] == 0
