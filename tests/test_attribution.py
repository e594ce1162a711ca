"""Heat-maps of densities against finite differences and maps worked by hand."""

import numpy as np
import pytest
import torch
from small_score import build
from torch import nn

from anomaly import scores
from anomaly.attribution import METHODS, grad_cam, gradient, guided_backprop, pull
from anomaly.density import GMM, KDE, KNN, PCAGMM, Mahalanobis, WhitenedKNN
from anomaly.flow_density import Flow
from anomaly.outputs import Outputs
from anomaly.scores import MSMA_MAPS, NEED_CAPTUM, SCORES, Scoring
from utils import UserError

DENSITIES = {
    'mahalanobis': Mahalanobis(), 'knn': KNN(2), 'whitened knn': WhitenedKNN(k=2, log=True),
    'gaussian kernel': KDE(('gaussian',)),
    'exponential kernel': KDE(('exponential',)), 'gmm': GMM((2,), ('full',)),
    'pca gmm': PCAGMM(dimensions=2, components=(2,), covariances=('diag',)), 'flow': Flow((8,), steps=25)}


class LinearScores(nn.Module):
    """A model whose score at level i is a matrix times the image."""
    def __init__(self, size, n=3):
        super().__init__()
        self.matrices = torch.randn(n, size, size, generator=torch.Generator().manual_seed(0)).double()

    def score_norm(self, x, level):
        return (x.flatten(1) @ self.matrices[level]).norm(dim=1)

    def score_norms(self, x):
        return torch.stack([self.score_norm(x, i) for i in range(len(self.matrices))], 1)


@pytest.mark.parametrize('density', DENSITIES.values(), ids=DENSITIES)
def test_gradients_of_densities_by_finite_differences(density):
    """Through the norms of a linear score, pixel by pixel, in float64."""
    model, step = LinearScores(8), 1e-5
    generator = torch.Generator().manual_seed(1)
    normal, x = (torch.rand(n, 1, 2, 2, 2, generator=generator, dtype=torch.float64) for n in (40, 3))
    density.fit(model.score_norms(normal).numpy())
    found = gradient(model, x, pull(density, model.score_norms(x)), {})
    for i, offset in enumerate(step * torch.eye(8, dtype=torch.float64).reshape(8, *x.shape[1:])):
        up, down = (density.score(model.score_norms(x + sign * offset).numpy()) for sign in (1, -1))
        np.testing.assert_allclose(found.flatten(1)[:, i], (up - down) / (2 * step), rtol=1e-4, atol=1e-6)


class TwoChannels(nn.Module):
    """Level i of an image of one channel: (i + 1) times the sum over pixels of 2 act(x) - act(-2 x)."""
    def __init__(self):
        super().__init__()
        self.last_block, self.act = nn.Conv2d(1, 2, 1, bias=False), nn.SiLU()
        self.last_block.weight.data = torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)
        self.requires_grad_(False)

    def score_norm(self, x, level):
        h = self.act(self.last_block(x))
        return (level + 1) * (2 * h[:, 0] - h[:, 1]).flatten(1).sum(1)


def test_guided_backpropagation_and_gradcam_worked_by_hand():
    """With ReLU: dE/dx is 2 w where x > 0, and where x < 0 2 w as well, by way of what is stopped, -w.

    GradCAM: dE/dA is 2 w and -w there; means over 3 of 4 and 1 of 4 pixels: 1.5 w x - w / 4 (-2 x) = 2 w x.
    """
    pytest.importorskip('captum')
    model, x = TwoChannels(), torch.tensor([[0.5, 0.25], [-1.0, 1.0]]).reshape(1, 1, 2, 2)
    w = torch.tensor([[3.0, 0.5]])                                                       # 3 + 2 * 0.5 = 4
    assert guided_backprop(model, x, w, {}).flatten().tolist() == [8, 8, 0, 8]
    assert grad_cam(model, x, w, {}).flatten().tolist() == [4, 2, 0, 8]
    assert guided_backprop(model, x, -w, {}).flatten().tolist() == [0, 0, 8, 0], 'now the other channel'
    assert isinstance(model.act, nn.SiLU), 'the model itself is left as it is'


@pytest.mark.parametrize('shape, flags', [
    ((1, 8, 8), {}), ((2, 8, 8, 8), {'resblock_type': 'segresnet', 'act': 'elu'})])
def test_maps_of_a_score_network_in_2d_and_3d(shape, flags):
    model, options = build(shape, **flags), {'number': 3, 'denoised': len(shape) == 3}
    normal, x = (torch.rand(n, *shape, dtype=torch.float64) for n in (8, 2))
    score = next(s for s in SCORES['msma'](0) if s.name == 'msma_knn')
    score.density.fit(model.score_norms(normal, **options).numpy())
    outputs = lambda x, **more: Outputs(
        model, x, Scoring(msma_levels=3, msma_denoise=options['denoised'], **more),
        densities={'msma_knn': score.density})
    assert not score.has_map(model, Scoring()), 'none unless asked for'
    maps = {}
    assert ('none', *METHODS) == MSMA_MAPS
    for method in METHODS:
        if method in NEED_CAPTUM:
            pytest.importorskip('captum')
        with torch.no_grad():
            maps[method] = score.map(outputs(x, msma_map=method))
        found = maps[method]
        assert found.shape == (2, 1, *shape[1:]) and found.isfinite().all() and found.any()
        assert method == 'gradient_input' or (found >= 0).all()
    assert all(not a.equal(b) for method, a in maps.items() for other, b in maps.items() if other != method)
    # a step along the gradient raises the score by its squared length
    slope = gradient(model, x, pull(score.density, outputs(x).score_norms()), options)
    step = 1e-6
    before, after = (torch.from_numpy(score.density.score(score.features(outputs(x)).numpy()))
                     for x in (x, x + step * slope))
    higher = after - before
    torch.testing.assert_close(higher / step, slope.flatten(1).square().sum(1), rtol=1e-3, atol=0)
    torch.testing.assert_close(maps['gradient'], slope.abs().mean(1, keepdim=True))
    torch.testing.assert_close(maps['gradient_input'], (x * slope).mean(1, keepdim=True))


def test_without_captum_and_without_a_differentiable_model(monkeypatch):
    monkeypatch.setattr(scores.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='guided needs captum: pip install -r requirements-medical'):
        Scoring(msma_map='guided')
    assert Scoring(msma_map='gradient').msma_map == 'gradient'
    score = next(s for s in SCORES['msma'](0) if s.name == 'msma_knn')
    assert not score.has_map(nn.Identity(), Scoring(msma_map='gradient'))
