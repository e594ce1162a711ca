"""Smoothing of anomaly maps, maps within the body, and the threshold of pixels.

N, B images, C channels, *S = (H, W) pixels or (D, H, W) voxels.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomaly.config import MapConfig
from readers.body import body
from utils import UserError

PRIOR = 5        # images


class Maps(NamedTuple):
    """The postprocessed maps of N images whose lesions are known, and the masks to compare them with."""
    masks: np.ndarray                    # (N, *S) bool; all False for normal images
    counted: np.ndarray | None           # (N, *S) bool, the pixels that count; None = all
    values: dict[str, np.ndarray]        # score with a map -> (N, *S) float32
    ids: np.ndarray                      # (N,) of the images
    inside: np.ndarray | None            # (N, *S) bool, the eroded body of volumes; None for images


class Spread(NamedTuple):
    """What maps of normal images are like, pixel by pixel."""
    mean: np.ndarray                     # (*S)
    std: np.ndarray                      # (*S)

    @classmethod
    def of(cls, maps: np.ndarray) -> 'Spread':
        """From maps (N, *S). The variance of a pixel is mixed with the mean one, as if it stood for PRIOR
        images: few images tell it badly, and in a constant background it is 0.
        """
        maps = np.where(np.isfinite(maps), maps, 0).astype(np.float64)
        variance = maps.var(0)
        mixed = (len(maps) * variance + PRIOR * variance.mean()) / (len(maps) + PRIOR)
        return cls(maps.mean(0), np.sqrt(mixed) if mixed.any() else np.ones_like(mixed))

    def relative(self, values: np.ndarray) -> np.ndarray:
        """A map (*S) in standard deviations above the mean of normal images, 0 below it."""
        return np.maximum((values - self.mean) / self.std, 0)


def final_maps(outputs: Any, scores: Iterable[Any],
               config: MapConfig) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The maps (B, *S) of scores as they are evaluated and drawn, smoothed and 0 outside the body; and the
    body (B, *S) bool, None without --body_mask.
    """
    inside = body(outputs.x.float().cpu().numpy(), config.body_mask) if config.body_mask else None
    maps = {score.name: gaussian_blur(score.map(outputs).float(), config.map_smoothing)[:, 0].cpu().numpy()
            for score in scores}
    return {name: values if inside is None else np.where(inside, values, 0)
            for name, values in maps.items()}, inside


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """(B, C, *S) smoothed by a Gaussian of `sigma` pixels, 0 = none; mirrored at the edges.

    A product of matrices for each axis: operations on tensors alone, so that a score can be exported.
    """
    from scipy.ndimage import gaussian_filter1d
    for axis in range(2, x.ndim) if sigma else ():
        # One ten times as wide as the image is even to the last digit; wider ones take minutes.
        kernel = gaussian_filter1d(np.eye(x.shape[axis]), min(sigma, 10 * x.shape[axis]), axis=0)
        smooth = x.double().movedim(axis, -1) @ torch.from_numpy(kernel.T.copy()).to(x.device)
        x = smooth.movedim(-1, axis).to(x.dtype)
    return x


def pixel_threshold(maps: np.ndarray, target_fpr: float, counted: np.ndarray | None = None) -> float:
    """The smallest value that at most `target_fpr` of the pixels of normal images exceed; NaN counts as inf.

    `maps` (N, *S) are those of normal validation images, `counted` (N, *S) bool the pixels that count; None =
    all. Exact for these pixels, but no guarantee for new images: the pixels of one image are not independent.
    """
    values = maps.ravel() if counted is None else maps[counted]
    if not values.size:
        raise UserError("no pixel of a normal validation image counts: lower --body_mask, for volumes also "
                        "--seg_erosion.")
    values = np.where(np.isfinite(values), values, np.inf)
    place = values.size - 1 - int(target_fpr * values.size + 1e-9)                # the others are above it
    return float(np.partition(values, place)[place])
