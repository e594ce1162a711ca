"""Near-duplicates: the same picture twice, resized, recompressed or with other gray levels.

N images or volumes of size *S = (H, W) or (D, H, W).
"""

import numpy as np

SIZE = 16                 # signature: the image at 16 x 16, the volume at 16 x 16 x 16
CORRELATION = 0.995       # of two signatures, and then of the two images at full size
BLOCK = 2048              # images compared at once: 2048 x N float32 are 170 MB at N = 21,000
AT_ONCE = 1 << 26         # pixels made smaller at once
MOST_PAIRS = 100_000      # a folder of one image many times has N^2 / 2 pairs; nobody reads more than these


def near_duplicates(pixels: np.ndarray) -> list[tuple[int, int, float]]:
    """Pairs (i, j, correlation), i < j, of images (N, C, *S) that look alike up to brightness and contrast.

    Constant images are like nothing. At most MOST_PAIRS are returned.
    """
    n = len(pixels)
    if n == 0:
        return []
    few = max(1, AT_ONCE // pixels[0].size)
    coarse = np.concatenate([_unit(_thumbnails(pixels[i:i + few])) for i in range(0, n, few)])      # (N, 256)
    pairs = []
    for start in range(0, n, BLOCK):
        block = coarse[start:start + BLOCK]                              # (b, 256)
        likeness = block @ coarse[start:].T                              # (b, N - start)
        rows, columns = np.nonzero(np.triu(likeness, 1) > CORRELATION)
        for i, j in zip(rows[:MOST_PAIRS] + start, columns[:MOST_PAIRS] + start, strict=True):
            fine = float(np.prod(_unit(pixels[[i, j]].reshape(2, -1)), axis=0).sum())
            if fine > CORRELATION:
                pairs.append((int(i), int(j), round(fine, 5)))
            if len(pairs) == MOST_PAIRS:
                return pairs
    return pairs


def _thumbnails(pixels: np.ndarray) -> np.ndarray:
    """Means over SIZE cells along each axis, of smaller images the pixels: (b, C, *S) -> (b, cells)."""
    import torch
    from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d
    gray = torch.from_numpy(pixels.mean(axis=1, dtype=np.float32))       # (b, *S)
    pool = adaptive_avg_pool2d if gray.ndim == 3 else adaptive_avg_pool3d
    return pool(gray, [min(SIZE, length) for length in gray.shape[1:]]).flatten(1).numpy()


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Each row with mean 0 and length 1, so that products are correlations; constant rows become 0."""
    vectors = vectors.astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 1e-3, length, np.inf)
