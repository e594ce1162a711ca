"""Which pixels of an image show the body: for maps, segmentations, simulated lesions and volumes in air.

*S pixels, (H, W) or (D, H, W).
"""

from typing import Any

import numpy as np

LEAST_SIZE = 0.1        # of the largest region: smaller ones are labels, markers or noise
BINS = 256              # of the histogram behind Otsu's threshold


def body(images: np.ndarray, level: float | None = None, erosion: float = 0.0,
         largest: bool = False) -> np.ndarray:
    """Which pixels of images (N, C, *S) belong to the body: (N, *S) bool.

    The `foreground` (neural_operations.py) at this gray level, in regions of at least LEAST_SIZE of the
    largest region's size, or in the `largest` region alone, with holes filled: the dark lungs in a chest
    belong to it. All of an image without foreground.

    What lies at most `erosion` pixels from the outside is left out, as skulls and skin cause false alarms;
    the edge of an image is not the outside.
    """
    import torch

    from neural_operations import foreground
    bright = foreground(torch.from_numpy(np.ascontiguousarray(images)), level)[:, 0].numpy()
    bodies = np.stack([fill(mask, largest) for mask in bright])
    return np.stack([distance_to(~mask) > erosion for mask in bodies]) if erosion else bodies


def fill(mask: np.ndarray, largest: bool) -> np.ndarray:
    """The regions of (*S) bool that are large enough, without holes.

    Diagonal neighbors belong to one region, but not where only the largest is kept: it should not grow by
    noise around it.
    """
    from scipy import ndimage
    labels, _ = ndimage.label(mask, None if largest else neighbors(mask.ndim))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0                                                             # the background is no region
    kept = np.arange(len(sizes)) == sizes.argmax() if largest else sizes >= LEAST_SIZE * sizes.max()
    return ndimage.binary_fill_holes(kept[labels])


def otsu(values: np.ndarray) -> float:
    """The threshold that leaves the least variance within the values on either side (Otsu 1979)."""
    numbers, edges = np.histogram(values, BINS)
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.maximum(np.cumsum(numbers)[:-1], 1)              # values below each edge between two bins
    above = np.maximum(numbers.sum() - below, 1)
    sums = np.cumsum(numbers * centers)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(edges[1:-1][between.argmax()])


def distance_to(mask: np.ndarray, spacing: Any = 1.0) -> np.ndarray:
    """From each pixel to the nearest one of `mask` (*S) bool, Euclidean: (*S); infinite if it is empty.

    `spacing` of the pixels along each axis gives the unit.
    """
    if not mask.any():
        return np.full(mask.shape, np.inf)
    from scipy.ndimage import distance_transform_edt
    return distance_transform_edt(~mask, sampling=spacing)


def neighbors(dimensions: int) -> np.ndarray:
    """The structure of scipy.ndimage.label in which diagonal pixels are neighbors: 8 in 2D, 26 in 3D."""
    from scipy.ndimage import generate_binary_structure
    return generate_binary_structure(dimensions, dimensions)
