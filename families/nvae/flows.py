"""Volume-preserving autoregressive flow cells of NVAE (section 3.3 of Vahdat and Kautz 2020).

A cell maps a latent z (B, C, H, W) to z - m(z), where m at a position sees only positions and channels
before it: the Jacobian is triangular with a unit diagonal, so the log-determinant is 0. Two halves follow
each other, the second in the reverse spatial order.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.nvae.layers import WeightNormConv2d

HIDDEN_FACTOR = 6


def autoregressive_mask(c_out: int, c_in: int, kernel: int, groups: int, strict: bool,
                        mirror: bool) -> Tensor:
    """(c_out, c_in / groups, k, k) of 0 and 1: rows above and the left part of the row are seen;
    at the center, channel blocks before one's own (and one's own too unless `strict`). `mirror` turns the
    spatial order round.
    """
    center = kernel // 2
    mask = torch.zeros(c_out, c_in // groups, kernel, kernel)
    mask[:, :, :center] = 1
    mask[:, :, center, :center] = 1
    c_small = min(c_in, c_out)
    block_out, block_in = torch.arange(c_out) * c_small // c_out, torch.arange(c_in) * c_small // c_in
    sees = block_in[None, :] < block_out[:, None] if strict else block_in[None, :] <= block_out[:, None]
    # A depthwise convolution (groups = c_in) has only its own channel, which is not strictly before itself.
    mask[:, :, center, center] = sees.float() if groups == 1 else float(not strict)
    return mask.flip(2, 3) if mirror else mask


class FlowHalf(nn.Module):
    """z - m(z) in one spatial order."""

    def __init__(self, channels: int, mirror: bool):
        super().__init__()
        hidden = HIDDEN_FACTOR * channels
        conv = lambda c_in, c_out, kernel, groups, strict, bias: WeightNormConv2d(
            c_in, c_out, kernel, groups=groups, bias=bias,
            mask=autoregressive_mask(c_out, c_in, kernel, groups, strict, mirror))
        self.expand = conv(channels, hidden, 3, 1, True, False)
        self.depthwise = conv(hidden, hidden, 5, hidden, False, False)
        self.project = conv(hidden, channels, 1, 1, False, True)
        with torch.no_grad():
            self.project.log_weight_norm.add_(math.log(0.1))     # a flow starts near the identity

    def forward(self, z: Tensor) -> Tensor:
        h = self.depthwise(F.elu(self.expand(z)))
        return z - self.project(F.elu(F.elu(h)))                 # the published cell applies ELU twice


class FlowCell(nn.Sequential):
    """Two halves, the second in reverse spatial order. (B, C, H, W) -> the same; log-determinant 0."""

    def __init__(self, channels: int):
        super().__init__(FlowHalf(channels, mirror=False), FlowHalf(channels, mirror=True))
