"""Whether thresholds hold on normal test images, and whether densities may learn from training images."""

import numpy as np
import pytest
from test_compare import Constant, make_data
from test_detect import run as detected
from test_detect import settings
from test_scores import LinearGaussian

from anomaly.config import Judging
from anomaly.density import KNN, Mahalanobis, are_alike, cross_fit
from anomaly.detect import training_part
from anomaly.judge import Judgement, ScoreRow, Share, broken_promises
from anomaly.metrics import expected_calls, threshold
from evaluation.monitoring import monitor


def judgement(flagged, total):
    row = ScoreRow('nelbo', 'model', '', 1.0, primary=True, flagged={'normal': Share(flagged, total)})
    return Judgement({'nelbo': row}, {}, Judging(target_fpr=0.05))


@pytest.mark.parametrize('flagged, low, high, said', [
    (5, 0.4, 0.6, []), (14, 0.45, 0.6, ['14.0 % of the normal test images are flagged']),
    (0, 0.3, 0.4, ['score lower']), (20, 0.6, 0.7, ['20.0 %', 'score higher'])])
def test_a_threshold_that_does_not_hold_is_said(flagged, low, high, said):
    parts = {'nelbo': {'value': (low + high) / 2, 'low': low, 'high': high}}
    lines = broken_promises(judgement(flagged, 100), parts, 1000)
    # no image of 100 above the threshold is below 5 % beyond chance, too: 1 to 10 are expected
    expected = said if flagged else ['0.0 %', *said]
    assert len(lines) == len(expected) and all(words in line for words, line in zip(expected, lines))
    assert broken_promises(judgement(flagged, 100), {}, 1000) == []


def test_a_threshold_of_few_validation_images_varies_with_them():
    random = np.random.default_rng(0)
    low, high = expected_calls(100, 0.05, 500)
    calls = np.array([(random.normal(size=500) > threshold(random.normal(size=100), 0.05)).sum()
                      for _ in range(2000)])
    assert 0.94 < np.mean((low <= calls) & (calls <= high)) < 0.98, "Wilson's interval, of 500 alone: 0.58"
    assert expected_calls(9, 0.05, 10) == (0, 4), "the largest of nine promises one in ten"


def test_training_images_count_where_they_are_like_validation_images():
    random = np.random.default_rng(0)
    validation, alike, other = (random.normal(size=(200, 5)) for _ in range(3))
    other[:, 3] -= 0.6                                   # one of five features, as of a model that overfits
    assert are_alike(alike, validation) and not are_alike(other, validation)
    assert not are_alike(alike[:0], validation)


def test_training_images_take_part_in_every_fit_and_validation_images_never_in_their_own():
    random = np.random.default_rng(0)
    features, more = random.normal(size=(6, 2)), random.normal(size=(9, 2))
    density = Mahalanobis()
    crossed = cross_fit(density, features, more=more)
    fitted = lambda some: Mahalanobis().fit(np.concatenate([more, some]))
    assert np.allclose(crossed, [fitted(np.delete(features, i, 0)).score(features[i:i + 1])[0]
                                 for i in range(6)])
    assert np.allclose(density.score(features), fitted(features).score(features))
    assert np.isfinite(cross_fit(KNN(2), features, ['one patient'] * 6, more)).all()


def test_the_run_says_what_a_density_has_learned_from(tmp_path):
    flags = {'scores': ('kl_knn',), 'num_draws': 1, 'num_bootstrap': 20, 'num_cases': 0, 'num_gallery': 0}
    alike = detected(tmp_path / 'auto', make_data(), LinearGaussian(), settings(**flags))
    alone = detected(tmp_path / 'val', make_data(), LinearGaussian(), settings(**flags, density_images='val'))
    assert any('kl_knn has learned from 20 training images too' in line for line in alike['warnings'])
    assert not any('has learned' in line for line in alone['warnings'])
    assert alike['scores']['kl_knn']['threshold'] != alone['scores']['kl_knn']['threshold']
    darker = make_data()
    darker.train.images = darker.train.images // 4          # a copy: validation keeps the old one
    biased = detected(tmp_path / 'biased', darker, LinearGaussian(), settings(**flags))
    assert any('learned from the 20 validation images alone' in line for line in biased['warnings'])


def test_the_training_images_are_all_or_some_drawn_by_the_seed():
    part = make_data().train
    assert training_part(part, settings()) is part
    some, again = ([entry.id for entry in training_part(part, settings(max_train_images=5)).entries]
                   for _ in range(2))
    assert len(set(some)) == 5 and some != [entry.id for entry in part.entries[:5]] and some == again


def test_a_model_without_densities_needs_no_training_images(tmp_path):
    result = detected(tmp_path, make_data(), Constant(), settings(num_bootstrap=20))
    assert not any('has learned' in line for line in result['warnings'])


def test_monitoring_ends_no_training():
    data, model = make_data(), LinearGaussian()
    model.primary_score = 'typicality'
    assert 0 <= monitor(model, data, data.test, 8)['typicality'] <= 1
    model.forward = lambda x, **options: {name: values * np.nan for name, values in LinearGaussian.forward(
        model, x, **options).items()}
    assert np.isnan(monitor(model, data, data.test, 8)['typicality'])
