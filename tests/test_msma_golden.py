"""Densities on the published features of CIFAR-10 against SVHN (Mahmood et al. 2021), where they are at hand.

    python tests/test_msma_golden.py            all densities and the whole rules: many minutes on one core

The test of a mixture takes the number of components that the published rule for 2D comes to, 20, and one
image in ten. What EM finds depends on its start: AUROCs of mixtures differ by about 0.01 with the seed.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from anomaly.density import GMM, KDE, KNN, MSMA_2D_RULE, PCAGMM, SADE_RULE
from anomaly.flow_density import Flow

PARITY = Path(os.environ.get('PARITY_DIR', Path(__file__).parents[2] / 'shared' / 'parity'))
FEATURES = PARITY / 'msma_cifar10_features.npz'
pytestmark = pytest.mark.skipif(not FEATURES.exists(), reason=f'no {FEATURES}: set PARITY_DIR')
NEIGHBOURS = {1: 0.98331, 2: 0.98903, 5: 0.99148397, 10: 0.99197}
PUBLISHED_GMM = 0.9590


def read_features():
    """Features of CIFAR-10 train, CIFAR-10 test and SVHN test: (50000, 10) and twice (10000, 10)."""
    with np.load(FEATURES, allow_pickle=False) as file:
        return [file[name].astype(np.float64) for name in ('train', 'cifar10_test', 'svhn_test')]


@pytest.fixture(scope='module')
def features():
    return read_features()


def auroc(scores, normal, other):
    return roc_auc_score(np.repeat([0, 1], [len(normal), len(other)]),
                         np.concatenate([scores(normal), scores(other)]))


@pytest.mark.parametrize('k', NEIGHBOURS)
def test_distances_to_neighbours(features, k):
    train, normal, other = features
    found = auroc(KNN(k, scale=False).fit(train).score, normal, other)
    assert found == pytest.approx(NEIGHBOURS[k], abs=1e-6 if k == 5 else 5e-6), 'as many digits as are known'


def test_the_mixture_is_near_the_published_one(features):
    train, normal, other = features
    some = np.random.default_rng(0).permutation(len(train))[:5000]
    fitted = GMM(**MSMA_2D_RULE | {'components': (20,)}).fit(train[some])
    assert auroc(fitted.score, normal, other) == pytest.approx(PUBLISHED_GMM, abs=0.01)


def main():
    train, normal, other = read_features()
    few = np.random.default_rng(0).permutation(len(train))[:5000]
    rows = {**{f'KNN {k}': (KNN(k, scale=False), train) for k in NEIGHBOURS},
            'GMM, rule of SADE': (GMM(**SADE_RULE), train), 'PCA-GMM, the same': (PCAGMM(**SADE_RULE), train),
            'KDE, 5000 images': (KDE(), train[few]), 'flow': (Flow(steps=10_000), train),
            'GMM, rule of 2D': (GMM(**MSMA_2D_RULE), train)}
    for name, (density, images) in rows.items():
        started = time.perf_counter()
        density.fit(images)
        chosen = {'GMM': lambda d: len(d.weights), 'KDE': lambda d: f'{d.kernel} {d.bandwidth}'}
        chosen = chosen.get(type(density).__name__.removeprefix('PCA'), lambda d: '')(density)
        print(f'{name:20} AUROC {auroc(density.score, normal, other):.8f}  {chosen}  '
              f'{time.perf_counter() - started:.0f} s', flush=True)


if __name__ == '__main__':
    main()
