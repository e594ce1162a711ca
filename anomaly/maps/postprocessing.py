"""What is done to anomaly maps before they are judged, drawn or given away: smoothing, the body, a threshold.

N images, C channels, S pixels, which may be (H, W) or (D, H, W).
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from readers.body import body
from utils import UserError


class Maps(NamedTuple):
    """The treated maps of N images whose lesions are known, and what they are judged by."""
    masks: np.ndarray                    # (N, *S) bool; all False for normal images
    counted: np.ndarray | None           # (N, *S) bool, the pixels that count; None = all
    values: dict[str, np.ndarray]        # score with a map -> (N, *S) float32
    ids: np.ndarray                      # (N,) of the images
    inside: np.ndarray | None            # (N, *S) bool, `interior` of volumes; None for images

    def merged(self, other: 'Maps | None') -> 'Maps':
        """These maps and those that `other` has of the same images."""
        return self if other is None else self._replace(values=self.values | other.values)


def treated(passes: Any, scores: list, sigma: float,
            level: float) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The maps (B, *S) of `scores` for a batch after `treat`, and its `body`, None where `level` is 0.

    Without maps where the model has none.
    """
    inside = body(passes.x.float().cpu().numpy(), level) if level and scores else None
    made = {s.name: s.map(passes) for s in scores}
    return {name: treat(m[:, 0].float().cpu().numpy(), sigma, inside)
            for name, m in made.items() if m is not None}, inside


def treat(maps: np.ndarray, sigma: float, inside: np.ndarray | None) -> np.ndarray:
    """Maps (N, *S) as they are judged and drawn: smoothed, and 0 outside the body.

    The Gaussian's `sigma` is in pixels, the same in every direction, with the image mirrored at its edges;
    0 = not smoothed. `inside` (N, *S) bool is what `body` gives; None = no body mask.
    """
    if sigma:
        maps = ndimage.gaussian_filter(maps, sigma, axes=tuple(range(1, maps.ndim)))
    return maps if inside is None else np.where(inside, maps, np.zeros_like(maps))


def pixel_threshold(maps: np.ndarray, target_fpr: float, counted: np.ndarray | None = None) -> float:
    """The least value that at most `target_fpr` of the pixels of normal images exceed; inf if they are NaN.

    `maps` (N, *S) are those of normal validation images, `counted` (N, *S) bool the pixels that count; None =
    all. It is exact for these pixels. Pixels of one image resemble each other, so it promises less than the
    threshold of an image's score does.
    """
    values = maps.ravel() if counted is None else maps[counted]
    if not values.size:
        raise UserError("no pixel of a normal validation image counts: lower --body_mask, of volumes also "
                        "--seg_erosion.")
    values = np.where(np.isfinite(values), values, np.inf)
    place = values.size - 1 - int(target_fpr * values.size + 1e-9)                # so many lie above it
    return float(np.partition(values, place)[place])
