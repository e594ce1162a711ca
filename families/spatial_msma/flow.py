"""A conditional normalizing flow of vectors: affine autoregressive, then permutations and splines.

Neural spline flows (Durkan et al. 2019) as in Spatial-MSMA (Mahmood et al. 2024), on zuko's transforms. Rows
of n numbers, each with a context of c numbers; every transform runs from data to latent.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Transform,
    constraints,
)
from torch.utils.checkpoint import checkpoint
from zuko.transforms import (
    AdditiveTransform,
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


class Pending:
    """Outputs of a masked linear layer that fill up as its inputs become known, both by rising degree."""

    def __init__(self, weight: Tensor, start: Tensor):
        """`weight` (outputs, inputs); `start` (..., outputs) or (outputs,), what is there without inputs."""
        self.weight, self.sums = weight, start

    def push(self, values: Tensor, inputs: slice) -> None:
        """Adds what these inputs (..., k) give to the outputs that are still to come."""
        self.sums = self.sums + values @ self.weight[:, inputs].T

    def pop(self, number: int) -> Tensor:
        """The next outputs, which are complete: (..., number)."""
        done, self.sums = self.sums.tensor_split([number], dim=-1)
        self.weight = self.weight[number:]
        return done


class AutoregressiveNetwork(nn.Module):
    """Two numbers for each of n entries, from the entries before it and the context (Germain et al. 2015)."""

    def __init__(self, n: int, hidden: int, context: int):
        super().__init__()
        degrees = max(n - 1, 1)
        inputs, units = torch.arange(1, n + 1), torch.arange(hidden) % degrees + 1             # degrees

        def inner() -> MaskedLinear:
            return MaskedLinear(units[:, None] >= units)

        self.initial_layer = MaskedLinear(units[:, None] >= inputs)
        self.context_layer = nn.Linear(context, hidden)
        self.blocks = nn.ModuleList(ResidualBlock(inner(), inner(), context) for _ in range(RESIDUAL_BLOCKS))
        self.final_layer = MaskedLinear(inputs.repeat_interleave(2)[:, None] > units)
        self.numbers = [len(range(i, hidden, degrees)) for i in range(degrees)]       # units of each degree
        self.register_buffer('by_degree', torch.cat([torch.arange(i, hidden, degrees)
                                                     for i in range(degrees)]), persistent=False)

    @staticmethod
    def shift_and_scale(values: Tensor) -> tuple[Tensor, Tensor]:
        """(...) each, of the network's two numbers (..., 2)."""
        return values[..., 1], torch.sigmoid(values[..., 0] + SCALE_SHIFT) + LEAST

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """shift and scale (..., n) of all entries, of z (..., n)."""
        h = self.initial_layer(z) + self.context_layer(context)
        for block in self.blocks:
            h = block(h, block.gate(context))
        return self.shift_and_scale(self.final_layer(h).unflatten(-1, (-1, 2)))

    def solve(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., n) with x = scale(z) z + shift(z), and the scales.

        Entry by entry: what depends on an entry is computed as soon as that is known, all of it once, where n
        passes of the network would give the same.
        """
        order = self.by_degree
        initial = Pending(self.initial_layer.weight[order],
                          (self.initial_layer.bias + self.context_layer(context))[..., order])
        blocks = [(*(Pending(layer.weight[order][:, order], layer.bias[order])
                     for layer in block.linear_layers), block.gate(context)[..., order])
                  for block in self.blocks]
        final = Pending(self.final_layer.weight[:, order], self.final_layer.bias)
        zs, scales, first = [], [], 0
        for i, entry in enumerate(x.unbind(-1)):
            shift, scale = self.shift_and_scale(final.pop(2))
            zs.append((entry - shift) / scale)
            scales.append(scale.expand_as(entry))
            if i == len(self.numbers):
                break
            units = slice(first, first := first + self.numbers[i])
            initial.push(zs[i][..., None], slice(i, i + 1))
            h = initial.pop(self.numbers[i])
            for before, after, gate in blocks:
                before.push(F.relu(h), units)
                after.push(F.relu(before.pop(self.numbers[i])), units)
                h = h + after.pop(self.numbers[i]) * gate[..., units]
            final.push(h, units)
        return torch.stack(zs, dim=-1), torch.stack(scales, dim=-1)


# ------------------------------------------------------------------------------------------------ transforms

class RowTransform(Transform):
    """A transform of rows (..., n) that gives the result and log |det| together."""
    domain = codomain = constraints.real_vector
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]


class Autoregressive(RowTransform):
    """z_i = (x_i - shift_i) / scale_i, both from z_1 .. z_(i-1) and the context."""

    def __init__(self, net: AutoregressiveNetwork, context: Tensor):
        super().__init__()
        self.net, self.context = net, context

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, scale = self.net.solve(x, self.context)
        return z, -scale.log().sum(-1)

    def _inverse(self, z: Tensor) -> Tensor:
        shift, scale = self.net(z, self.context)
        return scale * z + shift


class EvenOdd(RowTransform):
    """Entries 0, 2, .. through a spline of their own; 1, 3, .. through one that the former give."""

    def __init__(self, even: Transform, odd_given: Callable[[Tensor], Transform]):
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

    def _inverse(self, y: Tensor) -> Tensor:
        even = self.even.inv(y[..., ::2])
        return self.merged(even, self.odd_given(even).inv(y[..., 1::2]))


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


# ---------------------------------------------------------------------------------------- layers of the flow

class Layer(nn.Module):
    """Rows (..., n) and contexts (..., c) to rows and log |det| (...); `transform` is what it does."""
    recomputes = False               # keep only the input for the backward pass

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._forward, x, context, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, context)

    def _forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(context).call_and_ladj(x)


class AffineAutoregressive(Layer):
    """The affine autoregressive transform."""

    def __init__(self, n: int, hidden: int, context: int):
        super().__init__()
        self.net = AutoregressiveNetwork(n, hidden, context)

    def transform(self, context: Tensor) -> Transform:
        return Autoregressive(self.net, context)


class PermutedLinear(Layer):
    """A random permutation, then L U x + bias: L with ones on its diagonal, U with positive numbers there."""

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer('permutation', torch.randperm(n))
        self.lower_entries = nn.Parameter(torch.zeros(n * (n - 1) // 2))     # of the triangles, row by row
        self.upper_entries = nn.Parameter(torch.zeros(n * (n - 1) // 2))
        self.unconstrained_upper_diag = nn.Parameter(torch.full((n,), SLOPE_OF_1))
        self.bias = nn.Parameter(torch.zeros(n))

    def transform(self, context: Tensor) -> Transform:
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


class SplineCoupling(Layer):
    """Splines of all entries; those of the odd ones depend on the even ones and the context."""

    def __init__(self, n: int, hidden: int, context: int):
        super().__init__()
        even, odd = (n + 1) // 2, n // 2
        self.root = math.sqrt(hidden)                # keeps the bins nearly equal at the start
        self.net = ResidualNetwork(even, odd * (3 * BINS - 1), hidden, context)
        self.unnormalized_widths = nn.Parameter(torch.zeros(even, BINS))
        self.unnormalized_heights = nn.Parameter(torch.zeros(even, BINS))
        self.unnormalized_derivatives = nn.Parameter(torch.full((even, BINS - 1), SLOPE_OF_1))

    def transform(self, context: Tensor) -> Transform:
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
        return ComposedTransform(*(layer.transform(context) for layer in self.layers))

    def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
        """log density, nats, float64: (...)."""
        log_det = 0.0
        for layer in self.layers:
            x, added = layer(x, context)
            log_det = log_det + added
        return self.base().log_prob(x.double()) + log_det

    @torch.no_grad()
    def sample(self, context: Tensor) -> Tensor:
        """One row for each context: (..., n)."""
        z = self.base().sample(context.shape[:-1]).to(context)
        return self.transform(context).inv(z)
