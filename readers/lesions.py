"""Lesions that are put into images of healthy people, with their masks: what changes of `--ood` do.

x (C, *S) in [0, 1], *S = (H, W) pixels or (D, H, W) voxels, mask (*S) bool; `spacing` of the voxels along *S
in mm. What is drawn follows from `random` alone.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from readers.body import body, otsu

LESIONS = (1, 4)                # how many, both included
RADII = (0.10, 0.25)            # of a lesion, as shares of the radius of a ball as large as the body
LEAST_RADIUS = 1.5              # voxels
STRETCH = (0.7, 1.4)            # of the radius along each axis
RAGGED = 0.25                   # standard deviation of the depth of the surface, as a share of the radius
SHIFTS = (0.25, 0.5)            # of the intensity, of a range of 1
CENTERS, STRENGTHS = 5.0, (5.0, 15.0)         # of the deformation, mm
PERCENTILES = (0.01, 99.9)      # of a channel, which a deformation leaves where they were, as a reader would
PUSHED = 1.5                    # times as far from the middle as before: so much counts as lesion
ENHANCED = 1.5                  # factor of the intensity of lesions
IMAGE_MM = 200.0                # what the longer side of an image without a spacing counts as


def add_lesions(x: np.ndarray, mask: np.ndarray, spacing: np.ndarray,
                random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A few ragged ellipsoids with soft edges in the body, each brighter or darker in each channel by itself.

    The mask is where at least half of the change is made.
    """
    gray = x.mean(0)
    tissue = body(gray[None, None], otsu(gray), largest=True)[0]         # (*S)
    shape, dims = tissue.shape, tissue.ndim
    ball = np.pi if dims == 2 else np.pi * 4 / 3
    size = (tissue.sum() / ball) ** (1 / dims)                                               # voxels
    index, inside = np.indices(shape), np.argwhere(tissue)
    x, mask = x.copy(), mask.copy()
    for _ in range(random.integers(LESIONS[0], LESIONS[1] + 1)):
        center, radius = random.choice(inside), max(LEAST_RADIUS, size * random.uniform(*RADII))
        away = (index - center.reshape(-1, *[1] * dims)) / random.uniform(*STRETCH, (dims, *[1] * dims))
        ragged = ndimage.gaussian_filter(random.standard_normal(shape), radius / 2, mode='wrap')
        depth = radius * (1 + RAGGED * ragged / ragged.std()) - np.sqrt((away ** 2).sum(0))
        share = np.clip(depth + 0.5, 0, 1) * tissue         # (*S)
        mask |= share >= 0.5
        for channel in x:
            before = (channel * share).sum() / max(share.sum(), 1e-9)
            channel += share * (another(before, random) - before)
    return x.clip(0, 1), mask


def another(value: float, random: np.random.Generator) -> float:
    """An intensity in [0, 1] that differs visibly from `value`: on either side, where there is room."""
    shift = random.uniform(*SHIFTS) * random.choice([-1, 1])
    return value + shift if 0 <= value + shift <= 1 else value - shift


def deform(x: np.ndarray, mask: np.ndarray, spacing: np.ndarray,
           random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pushed away from the middle, as by a tumour: the deformation of Spatial-MSMA (Mahmood et al. 2024).

    Two centers c1 and c2 near the image's, of a volume at one height, and m between them; p shows what was at
    m + (1 - k) (p - m), k = strength / (|p - c1| + |p - c2|), and black what was outside. Far away everything
    moves by half the strength, so that it moves marks nothing: the mask is where tissue is at least PUSHED
    times as far from m as it was, an ellipsoid with the foci c1 and c2. Intensities are scaled like those of
    all volumes; published they are not, which tells such images at once.
    """
    place = (np.indices(x.shape[1:]).T * spacing).T                                        # (dims, *S), mm
    middle = (np.array(x.shape[1:]) - 1) / 2 * spacing
    centers = middle + random.uniform(-CENTERS, CENTERS, (2, len(middle)))
    if len(middle) == 3:
        centers[1, 2] = centers[0, 2]
    share = random.uniform(*STRENGTHS) / np.maximum(
        sum(np.linalg.norm(place.T - c, axis=-1).T for c in centers), 1e-9)         # (*S)
    away = (place.T - centers.mean(0)).T
    source = ((place - share * away).T / spacing).T                                         # voxels
    # Cubic: between voxels linear interpolation would smooth the noise away, which tells such images too.
    moved = np.stack([ndimage.map_coordinates(channel, source, order=3) for channel in x])
    moved = np.stack([np.interp(new, np.percentile(new, PERCENTILES), np.percentile(channel, PERCENTILES))
                      for new, channel in zip(moved, x)])
    old = ndimage.map_coordinates(mask.astype(np.uint8), source, order=0) > 0
    return moved, old | (share >= 1 - 1 / PUSHED)


def enhance(x: np.ndarray, mask: np.ndarray, spacing: np.ndarray,
            random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lesions that are there made brighter (published as "-enhanced")."""
    return np.where(mask, (x * ENHANCED).clip(0, 1), x), mask


SIMULATIONS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    'lesion': add_lesions, 'tumour': deform, 'enhanced': enhance}
