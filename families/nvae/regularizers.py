"""Regularizers of NVAE: singular values of the filters, scales of the batch norms (Vahdat and Kautz 2020).

The matrix of a convolution is R x C: output channels by the numbers of a filter. n of one shape are a batch.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.nvae.layers import WEIGHT_NORM_EPS, WeightNormConv2d

IN_CACHE = 2 ** 20     # numbers of the matrices that are handled at once on a CPU: its cache holds them


def is_normed(conv: nn.Conv2d) -> bool:
    return isinstance(conv, WeightNormConv2d)


def filters(convs: Sequence[nn.Conv2d]) -> tuple[Tensor, Tensor | None]:
    """Matrices (n, R, C) of convolutions of one shape and kind, and the factor (n, R) of each row that the
    weight normalization applies; None without one.
    """
    if not is_normed(convs[0]):
        return torch.stack([conv.weight for conv in convs]).flatten(2), None
    weight = torch.stack([conv._masked() for conv in convs]).flatten(2)
    gain = torch.stack([conv.log_weight_norm.flatten() for conv in convs])
    return weight, gain.exp() / (torch.linalg.vector_norm(weight, dim=2) + WEIGHT_NORM_EPS)


def products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(n, R, C) times (n, C): (n, R). One by one on a CPU, whose batched product of thin matrices is slow."""
    if matrices.device.type != 'cpu':
        return (matrices @ vectors.unsqueeze(2)).squeeze(2)
    return torch.stack([matrix.mv(vector) for matrix, vector in zip(matrices, vectors)])


class SpectralRegularizer(nn.Module):
    """Sum of the largest singular values of all convolutions (Yoshida and Miyato 2017), by power iteration.

    Matrices of one shape are handled as one batch, on a CPU as several that fit into its cache, in the
    precision of the weights even under autocast. Normalized filters are never formed: their factors scale the
    vectors. The singular vectors are buffers, so a resumed run goes on with them; the first call takes more
    iterations.
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
            for _, alike in groupby(members, is_normed):
                alike = list(alike)
                for first in range(0, len(alike), most):
                    batch = alike[first:first + most]
                    rows = slice(start, start := start + len(batch))
                    yield batch, u[rows], v[rows]

    def forward(self) -> Tensor:
        iterations = self.ITERATIONS if self.warm else self.FIRST_ITERATIONS
        total = 0.0
        with torch.autocast(self.warm.device.type, enabled=False):
            for convs, u, v in self._batches():
                weight, factor = filters(convs)
                factor = 1.0 if factor is None else factor
                with torch.no_grad():
                    row = u                                                                         # (n, R)
                    for _ in range(iterations):
                        column = F.normalize(products(weight.mT, row * factor), dim=1, eps=self.EPS)
                        row = F.normalize(products(weight, column) * factor, dim=1, eps=self.EPS)
                    u.copy_(row)
                    v.copy_(column)
                total = total + (row * factor * (weight @ column.unsqueeze(2)).squeeze(2)).sum()
        self.warm.fill_(True)
        return total


def batch_norm_regularizer(model: nn.Module) -> Tensor:
    """Sum over batch-norm layers of the largest absolute scale; 0 without such layers."""
    by_width: dict[int, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            by_width.setdefault(len(module.weight), []).append(module.weight)
    return sum((torch.stack(scales).abs().amax(1).sum() for scales in by_width.values()), torch.zeros(()))
