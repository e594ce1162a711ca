"""Layers that model families share: weight-normalized convolutions, squeeze-and-excitation, residual cells.

B images, C channels, H x W pixels. A cell keeps the resolution ('normal'), halves it ('down', twice the
channels) or doubles it ('up', half the channels). Cells and constants: NVAE (Vahdat and Kautz 2020).
"""

import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from distributed import launch
from utils import UserError

WEIGHT_NORM_EPS = 1e-5
RESIDUAL_SCALE = 0.1          # keeps a sum of 30 cells near unit variance at the start
BATCH_NORM = {'eps': 1e-5, 'momentum': 0.05}
LINEAR = {2: 'bilinear', 3: 'trilinear'}      # interpolation by the axes of an image
CHANNEL_FACTOR = {'normal': 1.0, 'down': 2.0, 'up': 0.5}
STRIDE = {'normal': 1, 'down': 2, 'up': 1}


class WeightNormConv2d(nn.Conv2d):
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


def effective_weights(convs: Sequence[nn.Conv2d]) -> Tensor:
    """The filters that convolutions of one shape apply, weight-normalized or plain: (n, C_out, fan_in).

    All at once where all are of a kind: hundreds of small operations would keep a GPU waiting.
    """
    normed = [isinstance(conv, WeightNormConv2d) for conv in convs]
    if all(normed):
        weight = torch.stack([conv._masked() for conv in convs]).flatten(2)
        gain = torch.stack([conv.log_weight_norm.flatten() for conv in convs]).unsqueeze(2)
        norm = torch.linalg.vector_norm(weight, dim=2, keepdim=True)
        return weight * (torch.exp(gain) / (norm + WEIGHT_NORM_EPS))
    return torch.stack([conv.effective_weight() if is_normed else conv.weight
                        for conv, is_normed in zip(convs, normed)]).flatten(2)


class SqueezeExcite(nn.Sequential):
    """Channel attention: x times a gate in (0, 1) a channel, from the channel means (Hu et al. 2018)."""

    def __init__(self, channels: int):
        hidden = max(channels // 16, 4)
        super().__init__(nn.Linear(channels, hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        gate = super().forward(x.mean((2, 3)))                                                # (B, C)
        return x * gate[:, :, None, None]


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
    conv = lambda a, b, k=1, **options: nn.Conv2d(a, b, k, padding=k // 2, bias=False, **options)
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
        self.se = SqueezeExcite(c_out) if use_se else nn.Identity()
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            # Noise is not drawn inside a cell, so its state need not be kept.
            return checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False,
                              context_fn=lambda: (nullcontext(), frozen_statistics(self)))
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + RESIDUAL_SCALE * self.se(self.ops(x))


# ---------------------------------------------------------------------------------- memory of a training step

@contextmanager
def frozen_statistics(module: nn.Module):
    """Within the block batch norms leave their running statistics: a batch that is recomputed counts once."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum


def checkpoint_activations(model: nn.Module, on: bool = True) -> None:
    """Cells keep only their input for the backward pass and compute the rest again (Chen et al. 2016).

    About a third more time for a fraction of the memory; the numbers are the same.
    """
    for module in model.modules():
        if hasattr(module, 'recomputes'):
            module.recomputes = on


def activation_bytes(model: nn.Module, shape: Sequence[int], recomputed: bool = False) -> int:
    """Memory that a training step takes for its backward pass, in bytes per image of this shape (C, *S).

    Cells that recompute keep their inputs, and the largest cell is there in full while its turn has come. In
    the precision of the weights. Computed on tensors without content, so it costs no memory itself.
    """
    state = {name: tensor.detach().to('meta').requires_grad_(tensor.requires_grad)
             for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    cells = [m for m in model.modules() if hasattr(m, 'recomputes')]
    before = [cell.recomputes for cell in cells]
    training = model.training

    def bytes_per_image(part: nn.Module) -> int:
        batches = (torch.zeros(number, *shape, device='meta') for number in (2, 4))
        two, four = (_saved_bytes(partial(functional_call, model, state, x), part) for x in batches)
        return max(four - two, 0) // 2          # without what does not grow with the batch: weights above all

    try:
        model.train()
        checkpoint_activations(model, recomputed)
        kept = bytes_per_image(model)
        checkpoint_activations(model, False)
        # The cells next to the image are the largest.
        largest = cells[:1] + cells[-1:] if recomputed else []
        return kept + max(map(bytes_per_image, largest), default=0)
    finally:
        model.train(training)
        for cell, recomputes in zip(cells, before):
            cell.recomputes = recomputes


def _saved_bytes(run: Callable[[], object], part: nn.Module) -> int:
    """Bytes of the tensors that `part` of a model saves for the backward pass, when `run()` calls it."""
    storages: dict[int, torch.UntypedStorage] = {}
    inside = False

    def note(tensor: Tensor) -> Tensor:
        if inside:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def enter(*_: object) -> None:
        nonlocal inside
        inside = True

    def leave(*_: object) -> None:
        nonlocal inside
        inside = False

    handles = [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = run()
    total = sum(storage.nbytes() for storage in storages.values())
    del kept
    for handle in handles:
        handle.remove()
    return total


class SpectralRegularizer(nn.Module):
    """Sum of the largest singular values of all convolutions (Yoshida and Miyato 2017), by power iteration.

    Matrices (C_out, fan_in) of one shape are handled as one batch, in the precision of the weights even under
    autocast. The singular vectors are buffers, so a resumed run goes on with them; the first call takes more
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

    def forward(self) -> Tensor:
        iterations = self.ITERATIONS if self.warm else self.FIRST_ITERATIONS
        total = 0.0
        with torch.autocast(self.warm.device.type, enabled=False):
            for i, members in enumerate(self._groups):
                weight = effective_weights(members)                                              # (n, R, C)
                u, v = self.get_buffer(f'u{i}')[:, None], self.get_buffer(f'v{i}')[..., None]
                with torch.no_grad():
                    row = u                                                                      # (n, 1, R)
                    for _ in range(iterations):
                        column = F.normalize((row @ weight).mT, dim=1, eps=self.EPS)             # (n, C, 1)
                        row = F.normalize((weight @ column).mT, dim=2, eps=self.EPS)
                    u.copy_(row)
                    v.copy_(column)
                total = total + (row @ weight @ column).sum()
        self.warm.fill_(True)
        return total


def batch_norm_regularizer(model: nn.Module) -> Tensor:
    """Sum over batch-norm layers of the largest absolute scale; 0 without such layers."""
    by_width: dict[int, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            by_width.setdefault(len(module.weight), []).append(module.weight)
    return sum((torch.stack(scales).abs().amax(1).sum() for scales in by_width.values()), torch.zeros(()))


def check_latents(latents: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises UserError unless these are latents of the top groups, one or more, of these shapes (Z, h, w)."""
    given = [tuple(z.shape[1:]) for z in latents]
    if not given or given != list(shapes[:len(given)]) or len({len(z) for z in latents}) > 1:
        raise UserError(f"latents of shapes {given}: expected the first of {list(shapes)}, one or more, all "
                        f"for the same images.")


def coarse_noise(x: Tensor, std: float, grids: Sequence[int] = (8, 16)) -> Tensor:
    """Smooth noise for images x (B, C, *S), about as coarse as lesions (after Kascenas et al. 2022).

    Normal with standard deviation `std` at the points of a grid, linear between them, then rolled around each
    axis at random. One of `grids`, at random for each image, says how many points lie along its longest side;
    along the others they are as far apart. So the noise scales with the anatomy, whatever the resolution.
    """
    sides, places = x.shape[2:], torch.arange(len(x), device=x.device)
    which, *shifts = torch.rand_like(x.new_empty(len(x), 1 + len(sides))).unbind(1)                   # (B,)
    points = [[max(1, round(side * number / max(sides))) for side in sides] for number in grids]
    fields = torch.stack([F.interpolate(torch.randn_like(x.new_empty(*x.shape[:2], *grid)), sides,
                                        mode=LINEAR[len(sides)]) for grid in points])
    noise = fields[(len(grids) * which).long(), places]
    for axis, (side, shift) in enumerate(zip(sides, shifts), start=2):
        rolled = (torch.arange(side, device=x.device) + (side * shift).long()[:, None]) % side    # (B, side)
        noise = noise.take_along_dim(rolled.view(len(x), *[-1 if a == axis else 1 for a in range(1, x.ndim)]),
                                     axis)
    return std * noise


def foreground(x: Tensor, level: float | None = None) -> Tensor:
    """Which pixels of images (B, C, *S) are not background: (B, 1, *S), bool.

    Those with a mean over channels above `level`, or without a level those above the darkest value of the
    image in any channel. All of an image that has no such pixel.
    """
    if level is None:
        inside = (x > x.amin(tuple(range(1, x.ndim)), keepdim=True)).any(1, keepdim=True)
    else:
        inside = x.mean(1, keepdim=True) > level
    return inside | ~inside.flatten(1).any(1).reshape(-1, *[1] * (x.ndim - 1))
