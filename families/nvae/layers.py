"""Layers of NVAE (Vahdat and Kautz 2020): convolutions, squeeze-and-excitation, residual cells.

B images, C channels, H x W pixels. A cell keeps the resolution ('normal'), halves it ('down', twice the
channels) or doubles it ('up', half the channels).
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from distributed import launch
from neural_operations import frozen_statistics

WEIGHT_NORM_EPS = 1e-5
RESIDUAL_SCALE = 0.1          # keeps a sum of 30 cells near unit variance at the start
BATCH_NORM = {'eps': 1e-5, 'momentum': 0.05}
CHANNEL_FACTOR = {'normal': 1.0, 'down': 2.0, 'up': 0.5}
STRIDE = {'normal': 1, 'down': 2, 'up': 1}
IN_CACHE = 2 ** 18            # numbers of a few images that the cache of a CPU holds with their gradients


class DepthwiseConvolution(torch.autograd.Function):
    """F.conv2d with one filter a channel, whose filters get their gradient by a forward convolution.

    On a CPU that is two to ten times faster than PyTorch's own backward pass, which takes a dense kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = [stride] * 2, [padding] * 2
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.options
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, stride, padding, [1, 1], False, [0, 0], len(weight),
                [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            of_weight = depthwise_filter_gradient(x, gradient, weight.shape[2], stride[0], padding[0])
        return of_x, of_weight, None, None


def depthwise_filter_gradient(x: Tensor, gradient: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Gradient of the filters (C, 1, k, k) of a depthwise convolution of x (B, C, H, W), from that of its
    output (B, C, h, w): the channels of each image are convolved with it as filters, `stride` apart.
    """
    few, total = max(1, IN_CACHE // x[0].numel()), 0.0
    with torch.autocast(x.device.type, enabled=False):
        for pair in zip(x.split(few), gradient.split(few)):
            images, filters = (t.float().contiguous().flatten(0, 1) for t in pair)           # (b C, H, W)
            y = F.conv2d(images[None], filters[:, None], None, 1, padding, stride, groups=len(images))
            total = total + y.view(-1, x.shape[1], *y.shape[2:])[..., :kernel, :kernel].sum(0)
    return total[:, None].to(x.dtype)


class Conv2d(nn.Conv2d):
    """nn.Conv2d, where depthwise convolutions train faster on the CPU."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        depthwise = self.groups == self.in_channels == self.out_channels and self.dilation == (1, 1)
        if not (depthwise and bias is None and x.device.type == 'cpu' and torch.is_grad_enabled()):
            return super()._conv_forward(x, weight, bias)
        if torch.is_autocast_enabled('cpu'):
            x, weight = (t.to(torch.get_autocast_dtype('cpu')) for t in (x, weight))
        return DepthwiseConvolution.apply(x, weight, self.stride[0], self.padding[0])


class WeightNormConv2d(Conv2d):
    """Convolution whose filter o is exp(g_o) w_o / (|w_o| + 1e-5), zero-padded to keep H and W at stride 1.

    `mask` (broadcastable to the weight) is applied before the norm is taken. With `data_init`, the gains and
    biases are set from the first batch by `initialize_from_data` so that every channel has mean 0 and std 1/5
    (Salimans and Kingma 2016).
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, dilation: int = 1, *,
                 mask: Tensor | None = None, data_init: bool = False, **options: Any):
        """`options` are groups and bias of nn.Conv2d."""
        super().__init__(c_in, c_out, kernel, stride, padding=dilation * (kernel - 1) // 2, dilation=dilation,
                         **options)
        self.register_buffer('mask', mask, persistent=False)
        self.data_init, self.initializing = data_init, False
        self.log_weight_norm = nn.Parameter(torch.log(self._norm(self._masked().detach()) + 1e-2))

    def _masked(self) -> Tensor:
        return self.weight if self.mask is None else self.weight * self.mask

    def _norm(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)                # (C_out, 1, 1, 1)

    def effective_weight(self) -> Tensor:
        """The normalized filters: (C_out, C_in / groups, k, k)."""
        weight = self._masked()
        return weight * (torch.exp(self.log_weight_norm) / (self._norm(weight) + WEIGHT_NORM_EPS))

    def forward(self, x: Tensor) -> Tensor:
        if self.initializing:
            self._initialize(x)
        return self._conv_forward(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        self.log_weight_norm.zero_()
        y = self._conv_forward(x, self.effective_weight(), None)                            # (B, C_out, H, W)
        own, spread = y.mean((0, 2, 3)), y.double().var((0, 2, 3))
        count, world = y.numel() // y.shape[1], launch.world()
        mean = launch.mean_over_ranks(own)
        # The variance of the joint batch is the mean variance within ranks and that of their means.
        within = launch.mean_over_ranks(spread) * (world * (count - 1) / (world * count - 1))
        between = launch.mean_over_ranks((own - mean) ** 2) * (world * count / (world * count - 1))
        std = 5 * (within + between).sqrt().to(y.dtype)
        self.bias.copy_(-mean / (std + WEIGHT_NORM_EPS))
        self.log_weight_norm.copy_(-torch.log(std + WEIGHT_NORM_EPS).view(-1, 1, 1, 1))


def initialize_from_data(model: nn.Module, run: Callable[[], object]) -> None:
    """Sets the gains and biases of all `data_init` convolutions, in the order in which `run()` meets them."""
    convs = [m for m in model.modules() if isinstance(m, WeightNormConv2d) and m.data_init]
    for conv in convs:
        conv.initializing = True
    try:
        with torch.no_grad():
            run()
    finally:
        for conv in convs:
            conv.initializing = False


class SqueezeExcite(nn.Sequential):
    """Channel attention: the gate in (0, 1) of each channel, (B, C, 1, 1), from its mean (Hu et al. 2018)."""

    def __init__(self, channels: int):
        hidden = max(channels // 16, 4)
        super().__init__(nn.Linear(channels, hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3)))[:, :, None, None]


class DownSkip(nn.Module):
    """Halves the resolution: 1 x 1 convolutions of the four phases of the 2 x 2 grid, side by side."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        quarter = c_out // 4
        self.phases = nn.ModuleList(WeightNormConv2d(c_in, c)
                                    for c in (quarter, quarter, quarter, c_out - 3 * quarter))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        # Copies: strided convolutions of shifted views, as published, corrupt memory in channels-last format
        # on the CPU (torch 2.15).
        views = (x[:, :, row::2, column::2].contiguous() for row, column in ((0, 0), (1, 1), (0, 1), (1, 0)))
        return torch.cat([conv(view) for conv, view in zip(self.phases, views)], dim=1)


class UpSkip(nn.Module):
    """Doubles the resolution bilinearly, then mixes channels."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = WeightNormConv2d(c_in, c_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=True))


SKIPS = {'normal': lambda c_in, c_out: nn.Identity(), 'down': DownSkip, 'up': UpSkip}


def batch_norm_swish(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, **BATCH_NORM), nn.SiLU()]


def _residual_op(c_in: int, c_out: int, cell: str, before: list[nn.Module], dilation: int = 1,
                 data_init: bool = False) -> nn.Sequential:
    up = [nn.Upsample(scale_factor=2, mode='nearest')] if cell == 'up' else []
    conv = WeightNormConv2d(c_in, c_out, 3, STRIDE[cell], dilation, data_init=data_init)
    return nn.Sequential(*before, *up, conv)


def _inverted_bottleneck(c_in: int, c_out: int, cell: str, expansion: int, kernel: int,
                         groups: int) -> nn.Sequential:
    """1 x 1 expansion, depthwise convolution, 1 x 1 projection (MobileNetV2); 0 groups is one a channel."""
    hidden = c_in * expansion
    conv = lambda a, b, k=1, **options: Conv2d(a, b, k, padding=k // 2, bias=False, **options)
    return nn.Sequential(
        *([nn.Upsample(scale_factor=2, mode='nearest')] if cell == 'up' else []),
        nn.BatchNorm2d(c_in, **BATCH_NORM),
        conv(c_in, hidden), *batch_norm_swish(hidden),
        conv(hidden, hidden, kernel, stride=STRIDE[cell], groups=groups or hidden), *batch_norm_swish(hidden),
        conv(hidden, c_out), nn.BatchNorm2d(c_out, **BATCH_NORM))


RESIDUAL_OPS = {   # name: (layers before the convolution, dilation, data-dependent initialization)
    'res_elu': (lambda c: [nn.ELU()], 1, True),
    'res_bnelu': (lambda c: [nn.BatchNorm2d(c, **BATCH_NORM), nn.ELU()], 1, False),
    'res_bnswish': (batch_norm_swish, 1, False),
    'res_bnswish5': (batch_norm_swish, 2, False),      # a 5 x 5 field of view by dilation
}


def make_op(name: str, c_in: int, c_out: int, cell: str) -> nn.Sequential:
    """One operation of a cell: a name of RESIDUAL_OPS, or mconv_e<expansion>k<kernel>g<groups>."""
    if name in RESIDUAL_OPS:
        before, dilation, data_init = RESIDUAL_OPS[name]
        return _residual_op(c_in, c_out, cell, before(c_in), dilation, data_init)
    expansion, kernel, groups = (int(n) for n in re.fullmatch(r'mconv_e(\d+)k(\d+)g(\d+)', name).groups())
    return _inverted_bottleneck(c_in, c_out, cell, expansion, kernel, groups)


class Cell(nn.Module):
    """skip(x) + 0.1 * op_n(...op_1(x)): a residual cell; only the first operation changes the resolution."""

    def __init__(self, channels: int, cell: str, ops: Sequence[str], use_se: bool):
        super().__init__()
        c_out = int(channels * CHANNEL_FACTOR[cell])
        self.skip = SKIPS[cell](channels, c_out)
        self.ops = nn.Sequential(
            *[make_op(name, channels if i == 0 else c_out, c_out, cell if i == 0 else 'normal')
              for i, name in enumerate(ops)])
        self.se = SqueezeExcite(c_out) if use_se else None
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            # Noise is not drawn inside a cell, so its state need not be kept.
            return checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False,
                              context_fn=lambda: (nullcontext(), frozen_statistics(self)))
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.ops(x)
        if self.se is None:
            return torch.add(self.skip(x), y, alpha=RESIDUAL_SCALE)
        return torch.addcmul(self.skip(x), y, RESIDUAL_SCALE * self.se(y))      # one pass over the memory
