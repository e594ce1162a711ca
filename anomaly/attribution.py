"""Anomaly maps of densities of score norms: attribution of the density's score to the pixels of the image.

B images x (B, C, *S) in [0, 1], n norms of the model's score, f (B, n), E = energy(f) the score of a fitted
density. The chain rule is applied level by level, dE/dx = sum over i of dE/df_i df_i/dx, so that the graph of
one level is in memory at a time.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.density import GMM, KDE, KNN, PCAGMM, Density, Mahalanobis
from anomaly.flow_density import Flow
from anomaly.outputs import Outputs
from anomaly.scores import check_captum

ACTIVATIONS = (nn.SiLU, nn.ELU, nn.LeakyReLU)
LINEAR_INTERPOLATION = {2: 'bilinear', 3: 'trilinear'}


# -------------------------------------------------------------------------------- densities, differentiable

def tensors(density: Density) -> dict[str, Any]:
    """The state of a density, numbers as float64 tensors."""
    return {name: torch.as_tensor(value, dtype=torch.float64) if value.dtype.kind in 'fi' else str(value)
            for name, value in density.state().items()}


def mahalanobis(density: Density, features: Tensor) -> Tensor:
    d = tensors(density)
    z = (features - d['mean']) / d['std']
    return (z @ d['precision'] * z).sum(1).sqrt()


def distances(d: dict[str, Any], features: Tensor) -> Tensor:
    """To the R images of the fit: (N, R)."""
    return torch.cdist((features - d['mean']) / d['std'], d['reference'])


def knn(density: Density, features: Tensor) -> Tensor:
    d = tensors(density)
    return distances(d, features).kthvalue(min(int(d['k']), len(d['reference']))).values


def kde(density: Density, features: Tensor) -> Tensor:
    """Up to a constant."""
    d = tensors(density)
    u = distances(d, features) / d['bandwidth']
    return -torch.logsumexp(-u if d['kernel'] == 'exponential' else -u ** 2 / 2, dim=1)


def mixture(d: dict[str, Any], z: Tensor) -> Tensor:
    """-log density (N,) of a mixture of normals, up to a constant; see GMM.rate."""
    white = torch.einsum('nkd,kde->nke', z[:, None] - d['centers'], d['roots'])                    # (N, K, D)
    log_det = d['roots'].diagonal(dim1=1, dim2=2).log().sum(1)                                         # (K,)
    return -torch.logsumexp(d['weights'].log() + log_det - 0.5 * white.square().sum(2), dim=1)


def gmm(density: Density, features: Tensor) -> Tensor:
    d = tensors(density)
    return mixture(d, (features - d['mean']) / d['std'])


def pca_gmm(density: Density, features: Tensor) -> Tensor:
    d = tensors(density)
    return mixture(d, (features - d['mean']) @ d['axes'])


# The score of features (N, D), float64: (N,), up to a constant.
ENERGIES: dict[type, Callable[[Any, Tensor], Tensor]] = {
    Mahalanobis: mahalanobis, KNN: knn, KDE: kde, GMM: gmm, PCAGMM: pca_gmm, Flow: Flow.energy}


def pull(density: Density, features: Tensor) -> Tensor:
    """Gradient of a fitted density's score by its features: (N, D). That of features not finite is NaN."""
    with torch.enable_grad():
        leaf = features.detach().double().requires_grad_()
        return torch.autograd.grad(ENERGIES[type(density)](density, leaf).sum(), leaf)[0]


# ------------------------------------------------------------------------------------------------ heat-maps

class Level(nn.Module):
    """The contribution of one level, w f_i(x): images (B, C, *S) to (B,). A module, as captum requires."""

    def __init__(self, model: Any, level: int, weight: Tensor, msma: dict[str, Any]):
        """`weight` (B,), dE/df_i."""
        super().__init__()
        self.model, self.level, self.weight, self.msma = model, level, weight, msma

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.to(x) * self.model.score_norm(x, self.level, **self.msma)


def levels(model: Any, weights: Tensor, msma: dict[str, Any]) -> Iterator[Level]:
    """The contributions of all levels, from `weights` (B, n)."""
    return (Level(model, i, weight, msma) for i, weight in enumerate(weights.T))


def gradient(model: Any, x: Tensor, weights: Tensor, msma: dict[str, Any]) -> Tensor:
    """dE/dx: (B, C, *S)."""
    total = torch.zeros_like(x)
    for level in levels(model, weights, msma):
        leaf = x.detach().requires_grad_()
        total += torch.autograd.grad(level(leaf).sum(), leaf)[0]
    return total


def saliency(model: Any, x: Tensor, weights: Tensor, msma: dict[str, Any]) -> Tensor:
    """|dE/dx|, mean over channels (Simonyan et al. 2014)."""
    return gradient(model, x, weights, msma).abs().mean(1, keepdim=True)


def gradient_times_input(model: Any, x: Tensor, weights: Tensor, msma: dict[str, Any]) -> Tensor:
    """x dE/dx, mean over channels: the contribution of the gray value to the score, which may be negative."""
    return (x * gradient(model, x, weights, msma)).mean(1, keepdim=True)


def guided_backprop(model: Any, x: Tensor, weights: Tensor, msma: dict[str, Any]) -> Tensor:
    """|dE/dx| without negative gradients at every ReLU (Springenberg et al. 2015), mean over channels."""
    from captum.attr import GuidedBackprop
    total = torch.zeros_like(x)
    for level in levels(with_relus(model), weights, msma):
        total += GuidedBackprop(level).attribute(x.detach().clone())
    return total.abs().mean(1, keepdim=True)


def grad_cam(model: Any, x: Tensor, weights: Tensor, msma: dict[str, Any]) -> Tensor:
    """Channels of the last block at full size, weighted by the mean gradient of E (Selvaraju et al. 2017),
    summed over levels and clipped at 0.
    """
    from captum.attr import LayerGradCam
    model = with_relus(model)
    total = sum(LayerGradCam(level, model.last_block).attribute(x) for level in levels(model, weights, msma))
    return F.interpolate(total.relu(), x.shape[2:], mode=LINEAR_INTERPOLATION[x.ndim - 2])


def with_relus(model: nn.Module) -> nn.Module:
    """A copy of the model with ReLU in place of all smooth activations, as published for these heat-maps."""
    # captum's hooks need gradients everywhere; those of the copy's weights are never computed.
    model = copy.deepcopy(model).requires_grad_(True)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, ACTIVATIONS):
                setattr(module, name, nn.ReLU())
    return model


METHODS: dict[str, Callable[[Any, Tensor, Tensor, dict], Tensor]] = {
    'gradient': saliency, 'gradient_input': gradient_times_input, 'guided': guided_backprop,
    'gradcam': grad_cam}


def density_map(density: Density, outputs: Outputs) -> Tensor:
    """The heat-map of a fitted density on the norms of scores, as --msma_map says: (B, 1, *S).

    The gradient of the density is taken at the norms of the model itself, also where it is propagated back to
    the image through a network with ReLUs.
    """
    scoring = outputs.scoring
    check_captum(scoring.msma_map)

    def make() -> Tensor:
        weights = pull(density, outputs.score_norms()).to(outputs.x)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')                       # captum announces its hooks
            return METHODS[scoring.msma_map](outputs.model, outputs.x, weights, scoring.msma).detach()
    return outputs.once(('density map', id(density)), make)
