"""What tells the classes of a data set apart without looking at the disease: confounders, duplicates.

Every trivial feature (trivial.py) is compared between the normal images and each anomalous class, and between
the normal images that a model learns from (train, val) and those of the test part, which should be alike.
AUROC above 0.5: the feature is larger in the anomalous, or in the test images. N images.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from anomaly.metrics import METRICS, Resamples, evaluate_score
from audit.findings import LEARNED, TESTED, all_findings
from audit.trivial import FEATURES, TRAITS, Measured, column, measure, words
from readers.source import CLASSES_SHOWN
from readers.split import PARTS, count
from utils import finite, mix_seed

LEAST_IMAGES = 10            # of a group: with fewer an interval means nothing
COMMON = 0.02                # part of a group that must have a trait ('JPEG') for it to be compared
MOST_WORDS = 12              # values of a trait that are compared
FOLDS = 5                    # of the cross-validation of the regression


def audit(data: Any, max_images: int = 500, num_bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The findings about a data set (datasets.Data), and all that they rest on, JSON-ready.

    At most `max_images` images of each part, of its normal images and of each anomalous class, are drawn by
    `seed` and measured; duplicates are those of all images. 'findings' are sorted, the worst first.
    """
    samples = draw_samples(data, max_images, seed)
    measured = {key: measure(getattr(data, key[0]), indices) for key, (indices, _) in samples.items()}
    normal = data.normal_classes[0] if len(data.normal_classes) == 1 else 'normal'
    learned, tested = measured['train', ''] + measured['val', ''], measured['test', '']
    classes = {name: images for (_, name), images in measured.items() if name}
    groups = {normal: learned + tested, **classes, LEARNED: learned, TESTED: tested}
    pairs = [*(('class', normal, name) for name in classes), ('parts', LEARNED, TESTED)]
    result = {
        'dataset': getattr(data.config, 'dataset', ''), 'data': getattr(data.config, 'data', ''),
        'shape': list(data.shape), 'max_images': max_images, 'num_bootstrap': num_bootstrap, 'seed': seed,
        'images': [{'part': part, 'group': name or normal, 'measured': len(indices), 'of': total}
                   for (part, name), (indices, total) in samples.items() if total],
        'groups': {name: describe(group) for name, group in groups.items() if len(group)},
        'comparisons': [{'kind': kind, 'first': first, 'second': second,
                         **compare(groups[first], groups[second], num_bootstrap, seed)}
                        for kind, first, second in pairs
                        if min(len(groups[first]), len(groups[second])) >= LEAST_IMAGES],
        'notes': [f"{name}: {count(len(group), 'image')}, too few to compare (at least {LEAST_IMAGES})"
                  for name, group in groups.items() if len(group) < LEAST_IMAGES]}
    return finite(result | {'findings': [vars(finding) for finding in all_findings(result, data)]})


def sentences(result: dict[str, Any]) -> list[str]:
    """The findings of an audit in words, the worst first: 'Serious: ... To do: ...'."""
    return [f"{f['severity'].capitalize()}: {f['text']}{' To do: ' * bool(f['advice'])}{f['advice']}"
            for f in result['findings']]


def draw_samples(data: Any, max_images: int, seed: int) -> dict[tuple[str, str], tuple[np.ndarray, int]]:
    """{(part, anomalous class or '' for the normal images): (places in the part, images there in all)}.

    More than CLASSES_SHOWN anomalous classes become one.
    """
    samples = {}
    for part_name in PARTS:
        part = getattr(data, part_name)
        classes = np.array([entry.class_name if entry.label else '' for entry in part.entries], object)
        if len({*classes} - {''}) > CLASSES_SHOWN:
            classes[classes != ''] = 'anomalous classes'
        for group in ('', *sorted({*classes} - {''})):
            places = np.flatnonzero(classes == group)
            random = np.random.default_rng(mix_seed(seed, 'audit', part_name, group))
            chosen = random.choice(places, min(len(places), max_images), replace=False)
            samples[part_name, group] = np.sort(chosen), len(places)
    return samples


def describe(group: Sequence[Measured]) -> dict[str, Any]:
    """Medians and quartiles of the features, where they are known, and the most frequent words of traits."""
    known = {name: values[np.isfinite(values)] for name in FEATURES for values in [column(group, name)]}
    frequent = lambda trait: Counter(filter(None, words(group, trait))).most_common(MOST_WORDS)
    return {'images': len(group),
            'features': {name: dict(zip(('low', 'median', 'high'), np.percentile(v, [25, 50, 75]).tolist()))
                         for name, v in known.items() if len(v)},
            'traits': {trait: {word: n / len(group) for word, n in frequent(trait)} for trait in TRAITS}}


def compare(first: Sequence[Measured], second: Sequence[Measured], num_bootstrap: int,
            seed: int) -> dict[str, Any]:
    """AUROC with its 95 % interval of each feature that is known for all images of both groups.

    'features': {name: {'cause', 'auroc', 'low', 'high'}}, a trait as 'format=JPEG' with its 'word' and
    'shares'; 'combined': the same of a logistic regression on all of them, cross-validated; None if all are
    constant, or too few patients make up a group.
    """
    resamples = Resamples.draw(len(first), len(second), num_bootstrap, seed)
    columns = {name: ({'cause': feature.cause}, [column(group, name) for group in (first, second)])
               for name, feature in FEATURES.items()}
    for trait, word in common_words(first, second):
        has = [np.equal(words(group, trait), word).astype(np.float64) for group in (first, second)]
        about = {'cause': TRAITS[trait][0], 'word': word, 'shares': [float(h.mean()) for h in has]}
        columns[f'{trait}={word}'] = about, has
    varied = {name: (about, pair) for name, (about, pair) in columns.items()
              if np.isfinite(joined := np.concatenate(pair)).all() and np.ptp(joined) > 0}
    rows = {name: about | auroc(*pair, resamples) for name, (about, pair) in varied.items()}
    combined, folds = None, min(FOLDS, *(len({image.group for image in group}) for group in (first, second)))
    if varied and folds > 1:
        x = np.stack([np.concatenate(pair) for _, pair in varied.values()], 1)               # (N, features)
        patients = [image.group for image in (*first, *second)]
        scores = classify(x, np.arange(len(x)) >= len(first), patients, folds, seed)
        combined = None if scores is None else auroc(scores[:len(first)], scores[len(first):], resamples)
    return {'images': [len(first), len(second)], 'features': rows, 'combined': combined}


def auroc(first: np.ndarray, second: np.ndarray, resamples: Resamples) -> dict[str, float]:
    found = evaluate_score(first, second, resamples, METRICS[:1])['auroc']
    return {'auroc': found.value, 'low': found.low, 'high': found.high}


def common_words(first: Sequence[Measured], second: Sequence[Measured]) -> list[tuple[str, str]]:
    """The (trait, words) to compare: frequent in a group; of only two words of a trait one is enough."""
    chosen = []
    for trait in TRAITS:
        both = [words(group, trait) for group in (first, second)]
        if '' in both[0] + both[1]:                                    # images without a file
            continue
        shares = {word: [group.count(word) / len(group) for group in both] for word in {*both[0], *both[1]}}
        common = [word for word in shares if max(shares[word]) >= COMMON]
        ranked = sorted(common, key=lambda word: (shares[word][0] - shares[word][1], word))
        chosen += [(trait, word) for word in ranked[:1 if len(shares) == 2 else MOST_WORDS]]
    return chosen


def classify(x: np.ndarray, y: np.ndarray, groups: Sequence[str], folds: int, seed: int) -> np.ndarray | None:
    """Scores (N,) of the rows of x (N, features), each from a logistic regression on y (N,) bool that has not
    seen the row or others of its group; None where without a fold only one value of y is left.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    splits = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, groups))
    if any(len(np.unique(y[rest])) < 2 for rest, _ in splits):
        return None
    return cross_val_predict(model, x, y, cv=splits, method='decision_function')
