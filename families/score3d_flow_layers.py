"""A conditional normalizing flow of vectors: affine autoregressive, then permutations and splines.

Neural spline flows (Durkan et al. 2019) as in Spatial-MSMA (Mahmood et al. 2024), on zuko's transforms. Rows
of n numbers, each with a context of c numbers; every transform runs from data to latent.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Transform,
    constraints,
)
from zuko.transforms import (
    AdditiveTransform,
    AutoregressiveTransform,
    ComposedTransform,
    DependentTransform,
    LULinearTransform,
    MonotonicRQSTransform,
    PermutationTransform,
)

RESIDUAL_BLOCKS = 2                  # of every network
BINS, BOUND = 8, 3.0                 # of a spline, on [-3, 3]; it is the identity outside
LEAST = 1e-3                         # width and height of a bin as a share of all, slope, scale
SCALE_SHIFT = 2.0                    # the affine scale starts at sigmoid(2) + 0.001
MODES = 10                           # of the mixture
SLOPE_OF_1 = math.log(math.expm1(1 - LEAST))       # softplus of it is 1 - LEAST


# -------------------------------------------------------------------------------------------------- networks

class MaskedLinear(nn.Linear):
    """A linear layer whose outputs see some of the inputs: `mask` (outputs, inputs), bool."""

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer('mask', mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class ResidualBlock(nn.Module):
    """h + (two layers of h) times a gate that the context opens."""

    def __init__(self, first: nn.Linear, second: nn.Linear, context: int):
        super().__init__()
        self.linear_layers = nn.ModuleList([first, second])
        self.context_layer = nn.Linear(context, second.out_features)

    def gate(self, context: Tensor) -> Tensor:
        return torch.sigmoid(self.context_layer(context))

    def forward(self, h: Tensor, gate: Tensor) -> Tensor:
        first, second = self.linear_layers
        return h + second(F.relu(first(F.relu(h)))) * gate


class ResidualNetwork(nn.Module):
    """(..., inputs) and the context (..., c) to (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, hidden: int, context: int):
        super().__init__()
        self.initial_layer = nn.Linear(inputs + context, hidden)
        self.blocks = nn.ModuleList(
            ResidualBlock(nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), context)
            for _ in range(RESIDUAL_BLOCKS))
        self.final_layer = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.initial_layer(torch.cat([x, context], dim=-1))
        for block in self.blocks:
            h = block(h, block.gate(context))
        return self.final_layer(h)


class AutoregressiveNetwork(nn.Module):
    """Two numbers for each of n entries, from the entries before it and the context (Germain et al. 2015)."""

    def __init__(self, n: int, hidden: int, context: int):
        super().__init__()
        inputs, units = torch.arange(1, n + 1), torch.arange(hidden) % max(n - 1, 1) + 1       # degrees

        def inner() -> MaskedLinear:
            return MaskedLinear(units[:, None] >= units)

        self.initial_layer = MaskedLinear(units[:, None] >= inputs)
        self.context_layer = nn.Linear(context, hidden)
        self.blocks = nn.ModuleList(ResidualBlock(inner(), inner(), context) for _ in range(RESIDUAL_BLOCKS))
        self.final_layer = MaskedLinear(inputs.repeat_interleave(2)[:, None] > units)

    def conditions(self, context: Tensor) -> tuple[Tensor, ...]:
        """What the context adds: the same for every pass."""
        return self.context_layer(context), *(block.gate(context) for block in self.blocks)

    def forward(self, z: Tensor, conditions: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(..., n) each."""
        added, *gates = conditions
        h = self.initial_layer(z) + added
        for block, gate in zip(self.blocks, gates):
            h = block(h, gate)
        return self.final_layer(h).unflatten(-1, (-1, 2)).unbind(-1)


# ------------------------------------------------------------------------------------------------ transforms

class AffineAutoregressive(nn.Module):
    """z_i = (x_i - shift_i) / scale_i, both from z_1 .. z_(i-1) and the context: n passes of its network."""

    def __init__(self, n: int, hidden: int, context: int):
        super().__init__()
        self.n, self.net = n, AutoregressiveNetwork(n, hidden, context)

    def forward(self, context: Tensor) -> Transform:
        conditions = self.net.conditions(context)

        def affine(z: Tensor) -> Transform:
            scale, shift = self.net(z, conditions)
            return AffineTransform(shift, torch.sigmoid(scale + SCALE_SHIFT) + LEAST, event_dim=1)

        return AutoregressiveTransform(affine, passes=self.n).inv


class PermutedLinear(nn.Module):
    """A random permutation, then L U x + bias: L with ones on its diagonal, U with positive numbers there."""

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer('permutation', torch.randperm(n))
        self.lower_entries = nn.Parameter(torch.zeros(n * (n - 1) // 2))     # of the triangles, row by row
        self.upper_entries = nn.Parameter(torch.zeros(n * (n - 1) // 2))
        self.unconstrained_upper_diag = nn.Parameter(torch.full((n,), SLOPE_OF_1))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, context: Tensor) -> Transform:
        diagonal = F.softplus(self.unconstrained_upper_diag) + LEAST
        n, empty = len(diagonal), torch.diag(torch.zeros_like(diagonal))
        rows, columns = torch.tril_indices(n, n, -1, device=diagonal.device)
        lower = empty.index_put((rows, columns), self.lower_entries)
        rows, columns = torch.triu_indices(n, n, 1, device=diagonal.device)
        upper = empty.index_put((rows, columns), self.upper_entries)
        # zuko has the diagonal in the lower matrix: L U = (L D) (D^-1 U).
        matrix = lower * diagonal + torch.diag(diagonal) + upper / diagonal[:, None]
        return ComposedTransform(PermutationTransform(self.permutation), LULinearTransform(matrix),
                                 DependentTransform(AdditiveTransform(self.bias), 1))


class Spline(MonotonicRQSTransform):
    """zuko's monotonic rational-quadratic spline with bins and slopes of its own."""

    def __init__(self, widths: Tensor, heights: Tensor, slopes: Tensor):
        """Unconstrained widths and heights (..., K) and inner slopes (..., K - 1)."""
        Transform.__init__(self)
        self.horizontal, self.vertical = self.knots(widths), self.knots(heights)
        self.derivatives = F.pad(LEAST + F.softplus(slopes), (1, 1), value=1.0)

    @staticmethod
    def knots(sizes: Tensor) -> Tensor:
        """From -3 to 3: (..., K + 1)."""
        sizes = LEAST + (1 - LEAST * sizes.shape[-1]) * torch.softmax(sizes, dim=-1)
        return BOUND * (2 * F.pad(torch.cumsum(sizes, dim=-1), (1, 0)) - 1)


class EvenOdd(Transform):
    """Entries 0, 2, .. through a spline of their own; 1, 3, .. through one that the former give."""
    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, even: Transform, odd_given: object):
        """`odd_given` makes the transform of the odd entries from the even ones as they are in the data."""
        super().__init__()
        self.even, self.odd_given = even, odd_given

    @staticmethod
    def merged(even: Tensor, odd: Tensor) -> Tensor:
        pairs = torch.stack([even[..., :odd.shape[-1]], odd], dim=-1).flatten(-2)
        return torch.cat([pairs, even[..., odd.shape[-1]:]], dim=-1)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        even, odd = x[..., ::2], x[..., 1::2]
        odd, log_det_odd = self.odd_given(even).call_and_ladj(odd)
        even, log_det_even = self.even.call_and_ladj(even)
        return self.merged(even, odd), log_det_even.sum(-1) + log_det_odd.sum(-1)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def _inverse(self, y: Tensor) -> Tensor:
        even = self.even.inv(y[..., ::2])
        return self.merged(even, self.odd_given(even).inv(y[..., 1::2]))


class SplineCoupling(nn.Module):
    """Splines of all entries; those of the odd ones depend on the even ones and the context."""

    def __init__(self, n: int, hidden: int, context: int):
        super().__init__()
        even, odd = (n + 1) // 2, n // 2
        self.root = math.sqrt(hidden)                # keeps the bins nearly equal at the start
        self.net = ResidualNetwork(even, odd * (3 * BINS - 1), hidden, context)
        self.unnormalized_widths = nn.Parameter(torch.zeros(even, BINS))
        self.unnormalized_heights = nn.Parameter(torch.zeros(even, BINS))
        self.unnormalized_derivatives = nn.Parameter(torch.full((even, BINS - 1), SLOPE_OF_1))

    def forward(self, context: Tensor) -> Transform:
        def odd_given(even: Tensor) -> Transform:
            values = self.net(even, context).unflatten(-1, (-1, 3 * BINS - 1))
            widths, heights, slopes = values.split([BINS, BINS, BINS - 1], dim=-1)
            return Spline(widths / self.root, heights / self.root, slopes)

        return EvenOdd(Spline(self.unnormalized_widths, self.unnormalized_heights,
                              self.unnormalized_derivatives), odd_given)


# ---------------------------------------------------------------------------------------- base distributions

class GaussianMixture(nn.Module):
    """Ten normals of diagonal covariance, in float64."""

    def __init__(self, n: int):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(1, MODES, n, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(1, MODES, n, dtype=torch.float64))
        self.weight_scores = nn.Parameter(torch.zeros(1, MODES, dtype=torch.float64))

    def forward(self) -> Distribution:
        return MixtureSameFamily(Categorical(logits=self.weight_scores[0], validate_args=False),
                                 Independent(Normal(self.loc[0], self.log_scale[0].exp(),
                                                    validate_args=False), 1), validate_args=False)


class FullNormal(nn.Module):
    """A normal of any covariance, in float64; it starts at the standard one."""

    def __init__(self, n: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.factor = nn.Parameter(torch.zeros(n, n, dtype=torch.float64))       # logarithms on the diagonal

    def forward(self) -> Distribution:
        factor = torch.tril(self.factor, -1) + torch.diag(self.factor.diagonal().exp())
        return MultivariateNormal(self.loc, scale_tril=factor, validate_args=False)


class StandardNormal(nn.Module):
    """In float64."""

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer('loc', torch.zeros(n, dtype=torch.float64), persistent=False)

    def forward(self) -> Distribution:
        return Independent(Normal(self.loc, torch.ones_like(self.loc), validate_args=False), 1)


BASES = {'gaussian_mixture': GaussianMixture, 'multivariate_normal': FullNormal, 'standard': StandardNormal}


# --------------------------------------------------------------------------------------------------- the flow

class ConditionalFlow(nn.Module):
    """A density of rows (..., n) given contexts (..., c)."""

    def __init__(self, n: int, context: int, *, hidden: int, num_blocks: int, base: str):
        super().__init__()
        blocks = [layer for _ in range(num_blocks)
                  for layer in (PermutedLinear(n), SplineCoupling(n, hidden, context))]
        self.layers = nn.ModuleList([AffineAutoregressive(n, hidden, context), *blocks])
        self.base = BASES[base](n)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[0].net.final_layer.weight)

    def transform(self, context: Tensor) -> Transform:
        """From data to latent, for rows of these contexts."""
        return ComposedTransform(*(layer(context) for layer in self.layers))

    def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
        """log density, nats, float64: (...)."""
        z, log_det = self.transform(context).call_and_ladj(x)
        return self.base().log_prob(z.double()) + log_det

    @torch.no_grad()
    def sample(self, context: Tensor) -> Tensor:
        """One row for each context: (..., n)."""
        z = self.base().sample(context.shape[:-1]).to(context)
        return self.transform(context).inv(z)
