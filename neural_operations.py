"""What model families share: convolutions of volumes, memory of a step, latents, noise, foreground.

B images, C channels, *S the spatial axes: (H, W), or (D, H, W).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from utils import UserError

LINEAR = {2: 'bilinear', 3: 'trilinear'}      # interpolation by the axes of an image
FEWEST_FOR_ONEDNN = 20480     # B C D H of a single volume; up to it, PyTorch takes another kernel on a CPU


class Conv3d(nn.Conv3d):
    """nn.Conv3d, where the CPU takes a single volume as a batch of its two halves.

    Of a batch of one PyTorch computes most convolutions in float32 by a kernel that is many times slower.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_slow_alone(x):
            return super()._conv_forward(x, weight, bias)
        stride, padding, dilation = self.stride[0], self.padding[0], self.dilation[0]
        x = F.pad(x, (0, 0, 0, 0, padding, padding))
        reach = dilation * (self.kernel_size[0] - 1) + 1           # planes that one plane of the output sees
        planes = (x.shape[2] - reach) // stride + 1
        half = -(-planes // 2)                                     # of an odd number, one is in both halves
        seen, first = (half - 1) * stride + reach, (planes - half) * stride
        halves = torch.cat([x[:, :, :seen], x[:, :, first:first + seen]])
        y = F.conv3d(halves, weight, bias, self.stride, (0, *self.padding[1:]), self.dilation, self.groups)
        return torch.cat([y[:1], y[1:, :, 2 * half - planes:]], dim=2)


class ConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d, where the CPU takes a single volume twice: see Conv3d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.expand(2, -1, -1, -1, -1))[:1] if is_slow_alone(x) else super().forward(x)


def is_slow_alone(x: Tensor) -> bool:
    """Whether PyTorch does not take its fast kernel for a volume x (1, C, D, H, W)."""
    return (len(x) == 1 and x.device.type == 'cpu' and x.dtype == torch.float32
            and not torch.is_autocast_enabled('cpu') and math.prod(x.shape[:4]) <= FEWEST_FOR_ONEDNN)


CONV = {2: nn.Conv2d, 3: Conv3d}              # by the axes of an image


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


def repeated(x: Tensor, draws: int) -> Tensor:
    """All of x (B, ...) as often as there are draws: (draws B, ...), draw by draw."""
    return torch.cat([x] * draws) if draws > 1 else x


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
