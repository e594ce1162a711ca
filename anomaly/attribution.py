"""Anomaly maps of densities of score norms: attribution of the density's score to the pixels of the image.

B images x (B, C, *S) in [0, 1], n norms of the model's score, f (B, n), E = energy(f) the score of a fitted
density. The chain rule is applied level by level, dE/dx = sum over i of dE/df_i df_i/dx, so that the graph of
one level is in memory at a time.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.density import Density
from anomaly.outputs import Outputs
from neural_operations import LINEAR

ACTIVATIONS = (nn.SiLU, nn.ELU, nn.LeakyReLU)


def pull(density: Density, features: Tensor) -> Tensor:
    """Gradient of a fitted density's score by its features (N, D): the same shape, NaN if not finite."""
    with torch.enable_grad():
        leaf = features.detach().double().requires_grad_()
        return torch.autograd.grad(density.energy(leaf).sum(), leaf)[0]


class Level(nn.Module):
    """The contribution of one level, w f_i(x): images (B, C, *S) to (B,). A module, as captum requires."""

    def __init__(self, model: Any, level: int, weight: Tensor, msma: dict[str, Any]):
        """`weight` (B,), dE/df_i."""
        super().__init__()
        self.model, self.level, self.weight, self.msma = model, level, weight, msma

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.to(x) * self.model.score_norm(x, self.level, **self.msma)


def levels(model: Any, weights: Tensor, msma: dict[str, Any]) -> list[Level]:
    """The contributions of all levels, from `weights` (B, n)."""
    return [Level(model, i, weight, msma) for i, weight in enumerate(weights.T)]


def gradient(model: Any, x: Tensor, weights: Tensor, msma: dict[str, Any]) -> Tensor:
    """dE/dx: (B, C, *S)."""
    leaf = x.detach().requires_grad_()
    return sum(torch.autograd.grad(level(leaf).sum(), leaf)[0] for level in levels(model, weights, msma))


def guided_backprop(model: Any, x: Tensor, weights: Tensor, msma: dict[str, Any]) -> Tensor:
    """|dE/dx| without negative gradients at every ReLU (Springenberg et al. 2015): (B, C, *S)."""
    from captum.attr import GuidedBackprop
    total = sum(GuidedBackprop(level).attribute(x.detach().clone())
                for level in levels(with_relus(model), weights, msma))
    return total.abs()


def grad_cam(model: Any, x: Tensor, weights: Tensor, msma: dict[str, Any]) -> Tensor:
    """Channels of the last block at full size, weighted by the mean gradient of E (Selvaraju et al. 2017),
    summed over levels and clipped at 0: (B, 1, *S).
    """
    from captum.attr import LayerGradCam
    model = with_relus(model)
    total = sum(LayerGradCam(level, model.last_block).attribute(x) for level in levels(model, weights, msma))
    return F.interpolate(total.relu(), x.shape[2:], mode=LINEAR[x.ndim - 2])


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
    'gradient': lambda *given: gradient(*given).abs(),                       # Simonyan et al. 2014
    # the contribution of the gray value to the score, which may be negative
    'gradient_input': lambda model, x, *given: x * gradient(model, x, *given),
    'guided': guided_backprop, 'gradcam': grad_cam}


def density_map(density: Density, outputs: Outputs) -> Tensor:
    """The heat-map of a fitted density on the norms of scores, as --msma_map says, mean over channels:
    (B, 1, *S).

    The gradient of the density is taken at the norms of the model itself, also where it is propagated back to
    the image through a network with ReLUs.
    """
    scoring = outputs.scoring

    def make() -> Tensor:
        weights = pull(density, outputs.score_norms()).to(outputs.x)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')                       # captum announces its hooks
            heat = METHODS[scoring.msma_map](outputs.model, outputs.x, weights, scoring.msma)
            return heat.detach().mean(1, keepdim=True)
    return outputs.once(('density map', id(density)), make)
