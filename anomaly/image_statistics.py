"""Numbers that describe an image without any model: its spectrum, its exposure, its frame.

Each function maps gray values (*S) in [0, 1], float64, S = (H, W) or (D, H, W), to a vector, whose length
depends on the shape alone.
"""

from functools import lru_cache

import numpy as np

NUM_BANDS = 8
HAAR_LEVELS = 5
FLOOR = 1e-9                       # added to a power before its log: far below that of rounding to 8 bits
QUANTILES = (1, 5, 25, 50, 75, 95, 99)                                       # per cent
BLACK = 1.5 / 255                  # the two darkest levels of 8 bits; white are the two brightest
OUTER = 0.05                       # of every side: the frame
TINY = 256                         # pixels, or voxels, of a tiny image


@lru_cache(maxsize=4)
def spectrum_bands(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A Hann window of this shape, and the band of each frequency of its spectrum, 0 to 7; -1 = constant.

    The bands are equally wide in log frequency, from one period a side to the corner of the spectrum.
    """
    window = np.ones(shape)
    for axis, size in enumerate(shape):
        window *= np.hanning(size + 2)[1:-1].reshape([-1 if axis == a else 1 for a in range(len(shape))])
    axes = np.meshgrid(*map(np.fft.fftfreq, shape), indexing='ij', sparse=True)
    radius = np.sqrt(sum(np.square(axis) for axis in axes)).ravel()              # cycles a pixel
    edges = np.geomspace(radius[radius > 0].min(), radius.max(), NUM_BANDS + 1)[1:-1]
    return window, np.where(radius > 0, np.digitize(radius, edges), -1)


def bands(gray: np.ndarray) -> np.ndarray:
    """Log mean power of eight bands of the spectrum: (8,).

    The window keeps what differs between opposite edges, which the Fourier transform takes for neighbors, out
    of the high frequencies.
    """
    window, band = spectrum_bands(gray.shape)
    power = np.abs(np.fft.fftn(window * (gray - gray.mean()), norm='ortho')).ravel() ** 2
    sums, counts = (np.bincount(band + 1, weights, NUM_BANDS + 1)[1:] for weights in (power, None))
    return np.log(sums / np.maximum(counts, 1) + FLOOR)


def haar_energies(gray: np.ndarray) -> np.ndarray:
    """Log mean square of the Haar details at five levels, finest first: (5,), fewer if a side gets below 2.

    That is the variance within blocks of two pixels a side. A last odd row or column is left out.
    """
    energies, between = [], tuple(range(1, 2 * gray.ndim, 2))
    while len(energies) < HAAR_LEVELS and min(gray.shape) >= 2:
        gray = gray[tuple(slice(size // 2 * 2) for size in gray.shape)]
        blocks = gray.reshape([side for size in gray.shape for side in (size // 2, 2)])
        means = blocks.mean(between, keepdims=True)
        energies.append(np.log(np.square(blocks - means).mean() + FLOOR))
        gray = means.squeeze(between)
    return np.array(energies)


def histogram(gray: np.ndarray) -> np.ndarray:
    """Seven quantiles of the values, and the shares of black and of white ones: (9,)."""
    return np.array([*np.percentile(gray, QUANTILES), (gray < BLACK).mean(), (gray > 1 - BLACK).mean()])


def frame(shape: tuple[int, ...]) -> np.ndarray:
    """Which pixels are among the outer 5 % of a side, at least one pixel: (*S) bool."""
    outer = np.ones(shape, bool)
    widths = [max(1, round(OUTER * size)) for size in shape]
    outer[tuple(slice(width, -width) for width in widths)] = False
    return outer


def frame_histogram(gray: np.ndarray) -> np.ndarray:
    """The histogram of the outer 5 %: (9,)."""
    return histogram(gray[frame(gray.shape)])


def tiny(gray: np.ndarray) -> np.ndarray:
    """Means over 16 x 16 areas of an image, 6 x 6 x 6 of a volume, or its pixels if it is smaller: (256,)."""
    for axis, size in enumerate(gray.shape):
        number = min(size, round(TINY ** (1 / gray.ndim)))
        starts = np.arange(number) * size // number
        widths = np.diff(starts, append=size).reshape([-1 if axis == a else 1 for a in range(gray.ndim)])
        gray = np.add.reduceat(gray, starts, axis) / widths
    return gray.ravel()
