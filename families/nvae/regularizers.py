"""Regularizers of NVAE: singular values of the filters, scales of the batch norms (Vahdat and Kautz 2020).

The matrix of a convolution is R x C: output channels by the numbers of a filter. n of one shape are a batch.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from families.nvae.layers import WEIGHT_NORM_EPS, WeightNormConv2d

IN_CACHE = 2 ** 20     # numbers of the matrices that are handled at once on a CPU: its cache holds them


def is_normed(conv: nn.Conv2d) -> bool:
    return isinstance(conv, WeightNormConv2d)


def as_matrix(filters: Tensor) -> Tensor:
    """Filters (n, C, h, w) as rows (n, C h w), whose numbers are in the order of the memory: a view in either
    memory format.
    """
    last = filters.permute(0, 2, 3, 1)
    return (last if last.is_contiguous() else filters).flatten(1)


def as_filters(rows: Tensor, like: Tensor) -> Tensor:
    """The filters (n, C, h, w) whose `as_matrix` is `rows` (n, C h w), in the memory format of `like`."""
    last = like.permute(0, 2, 3, 1)
    if last.is_contiguous():
        return rows.view(-1, *last.shape[1:]).permute(0, 3, 1, 2)
    return rows.view(-1, *like.shape[1:])


def products(matrices: Sequence[Tensor], vectors: Tensor, transposed: bool = False) -> Tensor:
    """n matrices (R, C) times their vectors (n, C): (n, R); `transposed`, from (n, R) to (n, C).

    `matrices` is a batch (n, R, C), or a list on a CPU, whose batched product of thin matrices is slow.
    """
    if isinstance(matrices, Tensor):
        return ((matrices.mT if transposed else matrices) @ vectors.unsqueeze(2)).squeeze(2)
    return torch.stack([(matrix.mT if transposed else matrix).mv(vector)
                        for matrix, vector in zip(matrices, vectors)])


class SingularValues(torch.autograd.Function):
    """Sum over n convolutions of row . (s * (W column)), at fixed unit vectors `row` (n, R), `column` (n, C).

    `parameters` are the n weights w and, if these are normalized, the n gains g: s = exp(g) / (|w| + 1e-5),
    else s = 1. Apart from the norm, the gradient of a weight has rank one: autograd would form it from many
    tensors as large as the weights.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Sequence[Tensor], row: Tensor, column: Tensor, norm: Tensor,
                factor: Tensor, *parameters: Tensor) -> Tensor:
        along = row * products(matrices, column)                                        # (n, R)
        ctx.save_for_backward(row, column, norm, factor, along, *parameters)
        return (along * factor).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        row, column, norm, factor, along, *parameters = ctx.saved_tensors
        weights, gains = parameters[:len(row)], parameters[len(row):]
        row, along = row * factor * gradient, along * gradient
        if gains:
            # s falls with the norm by s / (norm + 1e-5), and the norm rises along w / norm.
            slope = torch.where(norm > 0, -along * factor / ((norm + WEIGHT_NORM_EPS) * norm), 0)
            parts = zip(map(as_matrix, weights), slope, row, column)
            found = [(weight * part[:, None]).addr_(r, c) for weight, part, r, c in parts]
        else:
            found = [*map(torch.outer, row, column)]
        return (*(None,) * 5, *map(as_filters, found, weights),
                *(one.view_as(gain) for one, gain in zip(along * factor, gains)))


class SpectralRegularizer(nn.Module):
    """Sum of the largest singular values of all convolutions (Yoshida and Miyato 2017), by power iteration.

    Matrices of one shape are handled together, on a CPU as many as fit into its cache, in the precision of
    the weights even under autocast. Normalized filters are never formed: their factors scale the vectors. The
    singular vectors are buffers, so a resumed run goes on with them; the first call takes more iterations.
    """

    FIRST_ITERATIONS, ITERATIONS, EPS = 100, 4, 1e-3

    def __init__(self, convs: Sequence[nn.Conv2d]):
        super().__init__()
        groups: dict[tuple[int, int], list[nn.Conv2d]] = {}
        for conv in convs:
            groups.setdefault((conv.out_channels, conv.weight[0].numel()), []).append(conv)
        self._groups = list(groups.values())              # a plain list: the convolutions belong to the model
        for i, ((rows, columns), members) in enumerate(groups.items()):
            for name, size in (('u', rows), ('v', columns)):
                start = F.normalize(torch.randn(len(members), size), dim=1, eps=self.EPS)
                self.register_buffer(f'{name}{i}', start)
        self.register_buffer('warm', torch.tensor(False))

    def _batches(self) -> Iterator[tuple[list[nn.Conv2d], Tensor, Tensor]]:
        """Convolutions of one shape and kind with their u (n, R) and v (n, C)."""
        for i, members in enumerate(self._groups):
            u, v = self.get_buffer(f'u{i}'), self.get_buffer(f'v{i}')
            size = members[0].weight.numel()
            most = max(1, IN_CACHE // size) if u.device.type == 'cpu' else len(members)
            start = 0
            # The kernel too, as it is part of the order of v.
            for _, alike in groupby(members, lambda conv: (is_normed(conv), conv.kernel_size)):
                alike = list(alike)
                for first in range(0, len(alike), most):
                    batch = alike[first:first + most]
                    rows = slice(start, start := start + len(batch))
                    yield batch, u[rows], v[rows]

    def forward(self) -> Tensor:
        with torch.autocast(self.warm.device.type, enabled=False):
            total = sum(self._largest(*batch) for batch in self._batches())
        self.warm.fill_(True)
        return total

    def _largest(self, convs: list[nn.Conv2d], u: Tensor, v: Tensor) -> Tensor:
        """The sum of the largest singular values of some convolutions; improves u and v."""
        weights = [conv._masked() if is_normed(conv) else conv.weight for conv in convs]
        gains = [conv.log_weight_norm for conv in convs if is_normed(conv)]
        with torch.no_grad():
            matrices = [*map(as_matrix, weights)]
            if u.device.type != 'cpu':
                matrices = torch.stack(matrices)
            norm, factor = torch.ones_like(u), torch.ones_like(u)
            if gains:
                norm = torch.stack([torch.linalg.vector_norm(matrix, dim=1) for matrix in matrices])
                factor = torch.stack([*map(torch.flatten, gains)]).exp() / (norm + WEIGHT_NORM_EPS)
            row = u
            for _ in range(self.ITERATIONS if self.warm else self.FIRST_ITERATIONS):
                column = F.normalize(products(matrices, row * factor, True), dim=1, eps=self.EPS)
                row = F.normalize(products(matrices, column) * factor, dim=1, eps=self.EPS)
            u.copy_(row)
            v.copy_(as_filters(column, weights[0]).flatten(1))
        return SingularValues.apply(matrices, row, column, norm, factor, *weights, *gains)


def batch_norm_regularizer(model: nn.Module) -> Tensor:
    """Sum over batch-norm layers of the largest absolute scale; 0 without such layers."""
    by_width: dict[int, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            by_width.setdefault(len(module.weight), []).append(module.weight)
    return sum((torch.stack(scales).abs().amax(1).sum() for scales in by_width.values()), torch.zeros(()))
