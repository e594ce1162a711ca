"""Size of an image under lossless compression, the input complexity of Serra et al. 2020."""

import lzma

import numpy as np
import torch
from torch import Tensor

from readers.images.png import png_bytes


def compressed_bits(x: Tensor, bits: int) -> Tensor:
    """Bits of each image (B, C, *S), losslessly compressed at `bits` per value as the model sees it: (B,).

    The shorter of an optimized PNG (gray or RGB; other channel counts stacked, 9 to 16 bits as 16-bit gray)
    and LZMA without a header. Images of more than 16 bits per value are compressed at 16.
    """
    levels = 2 ** min(bits, 16) - 1
    # Few levels are spread over 0 to 255 for the PNG, which changes no value's identity, so no information.
    step, dtype = (255 / levels, np.uint8) if levels < 256 else (1, np.uint16)
    values = (x.detach().cpu().double().clamp(0, 1) * levels).round().mul(step).numpy().astype(dtype)
    return torch.tensor([8.0 * min(png_bytes(v), lzma_bytes(v)) for v in values], dtype=torch.float64)


def lzma_bytes(values: np.ndarray) -> int:
    """Size in bytes of the raw values under LZMA2, without container or header."""
    filters = [{'id': lzma.FILTER_LZMA2, 'preset': 6}]
    return len(lzma.compress(values.tobytes(), lzma.FORMAT_RAW, filters=filters))
