"""Shapes, ramps and smooth noise from which images are drawn. N x N pixels."""

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter


def ramp(x: np.ndarray, width: float) -> np.ndarray:
    """0 for x << 0, 1 for x >> 0, smooth over about `width`."""
    return 0.5 + 0.5 * np.tanh(x * np.float32(2 / width))


def dome(x: np.ndarray) -> np.ndarray:
    """Thickness of a round body across its outline: 1 in the middle (x = 0), 0 at |x| >= 1."""
    return np.sqrt(np.clip(1 - x * x, 0, None))


def ellipse(u: np.ndarray, v: np.ndarray, centre: tuple[float, float], radii: tuple[float, float],
            angle: float = 0.0) -> np.ndarray:
    """Squared distance from `centre` in units of the radii: below 1 inside. `angle` in radians."""
    x, y = u - np.float32(centre[0]), v - np.float32(centre[1])
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return ((c * x + s * y) / np.float32(radii[0])) ** 2 + ((c * y - s * x) / np.float32(radii[1])) ** 2


def smooth_noise(rng: np.random.Generator, sigma: float, n: int) -> np.ndarray:
    """Gaussian noise of unit variance with structures of about `sigma` pixels: (N, N)."""
    noise = broad_blur(rng.standard_normal((n, n), np.float32), sigma, mode='wrap')
    return noise / noise.std()


def broad_blur(image: np.ndarray, sigma: float, mode: str = 'reflect') -> np.ndarray:
    """A Gaussian blur; a wide one as two running means, whose time does not grow with the width."""
    if sigma < 3:
        return gaussian_filter(image, sigma, mode=mode)
    width = round(sigma * 6 ** 0.5)                            # two boxes of this width have variance sigma^2
    return uniform_filter(uniform_filter(image, width, mode=mode), width, mode=mode)
