"""The size of an image as a PNG file: a measure of its detail, and the file size of images without a file."""

import io

import numpy as np


def png_bytes(values: np.ndarray, optimize: bool = True) -> int:
    """Bytes of an image (C, *S), uint8 or uint16, as a PNG: the smallest, or as most programs write it.

    Three channels of 8 bits are stored as RGB. Other channels, and the slices of volumes, are stacked in one
    gray image.
    """
    from PIL import Image
    rgb = values.ndim == 3 and len(values) == 3 and values.dtype == np.uint8
    image = Image.fromarray(np.moveaxis(values, 0, -1) if rgb else values.reshape(-1, values.shape[-1]))
    file = io.BytesIO()
    image.save(file, 'PNG', optimize=optimize)
    return file.tell()
