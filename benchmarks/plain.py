"""The baseline: the step as the equations say it, with no regard to speed.

Contiguous tensors, convolutions of PyTorch, one filter normalized and one matrix iterated at a time, weights
updated one by one. The numbers are those of the framework's step.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distributions import RowNoise
from families.nvae.layers import Conv2d, WeightNormConv2d
from families.nvae.regularizers import SpectralRegularizer, is_normed
from neural_operations import Conv3d, ConvTranspose3d
from utils import seed_noise


class PlainWeightNorm(WeightNormConv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.Conv2d._conv_forward(self, x, weight, bias)


class PlainSpectral(SpectralRegularizer):
    def forward(self) -> Tensor:
        iterations = self.ITERATIONS if self.warm else self.FIRST_ITERATIONS
        total = 0.0
        for i, members in enumerate(self._groups):
            for conv, u, v in zip(members, self.get_buffer(f'u{i}'), self.get_buffer(f'v{i}')):
                weight = (conv.effective_weight() if is_normed(conv) else conv.weight).flatten(1)
                with torch.no_grad():
                    for _ in range(iterations):
                        v.copy_(F.normalize(u @ weight, dim=0, eps=self.EPS))
                        u.copy_(F.normalize(weight @ v, dim=0, eps=self.EPS))
                total = total + u.clone() @ weight @ v.clone()
        self.warm.fill_(True)
        return total


PLAIN = {Conv2d: nn.Conv2d, WeightNormConv2d: PlainWeightNorm, SpectralRegularizer: PlainSpectral,
         Conv3d: nn.Conv3d, ConvTranspose3d: nn.ConvTranspose3d}


def plain_model(model: Any) -> Any:
    """A copy of a model that computes without any trick."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    model.takes_draws = False
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return model


class OrderedNoise(TorchFunctionMode):
    """Within the block noise does not depend on the memory format of the tensors that it is drawn for."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function in (*RowNoise.FILL, torch.empty_like):               # RowNoise fills an empty tensor
            args = (args[0].new_empty(args[0].shape), *args[1:])
        return function(*args, **(kwargs or {}))


def loss_and_gradient(model: Any, x: Tensor) -> Tensor:
    """The loss of a batch and the norm of its gradient, in float64: (2,). Gradients are cleared."""
    seed_noise(0)
    with OrderedNoise():
        loss, _ = model.objective(model(x), 0.0)
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return torch.stack([loss.detach(), norm]).double()


def plain_step(model: Any, optimizer: torch.optim.Optimizer, progress: float) -> Callable[[Tensor], Tensor]:
    """The update of the weights of a plain model by a batch; it returns the loss."""
    options = {name: optimizer.defaults[name] for name in ('betas', 'eps', 'weight_decay')}
    own = type(optimizer)(model.parameters(), lr=optimizer.param_groups[0]['lr'], foreach=False, **options)

    def step(x: Tensor) -> Tensor:
        own.zero_grad(set_to_none=True)
        loss, _ = model.objective(model(x), progress)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), math.inf, foreach=False)
        own.step()
        return loss.detach()
    return step
