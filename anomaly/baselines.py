"""Scores that need no model: what exposure, spectrum, file size or a linear fit of the pixels tell of images.

They stand beside every model's scores because medical data sets differ in scanner, exposure and file format
between classes: a model that is no better than they are has learned that difference. Some have maps, next to
which those of models stand. B images, C channels, *S = (H, W) or (D, H, W); N normal training images, on
which they are fitted.
"""

import lzma
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from anomaly.density import Density, Mahalanobis, WhitenedKNN
from anomaly.image_statistics import bands, frame_histogram, haar_energies, histogram, tiny
from anomaly.maps.postprocessing import gaussian_blur
from anomaly.outputs import Outputs
from anomaly.scores import LESION_FRACTION, Score, highest
from readers.images.decode import png_bytes
from utils import UserError

PCA_VARIANCE = 0.9       # fraction of the variance of normal images that the components of `pca` keep
MAX_COMPONENTS = 200
TOP_COMPONENTS = 40      # of `pca_top`
SMOOTHING = 1.0          # standard deviation of its Gaussian, pixels
LEAST_IMAGES = 3         # from which a covariance is estimated


def means(x: Tensor) -> Tensor:
    """Mean of each image (B, C, *S): (B,) float64 on the CPU."""
    return x.double().flatten(1).mean(1).cpu()


def mean_intensity(images: Tensor) -> Score:
    return Score('mean_intensity', '', "mean intensity: an AUROC below 0.5 means darker anomalous images",
                 lambda outputs: means(outputs.x),
                 lambda outputs: outputs.x.float().mean(1, keepdim=True).cpu())


def intensity_deviation(images: Tensor) -> Score:
    center = means(images).mean()
    return Score('intensity_deviation', '', "|mean intensity - that of normal training images|",
                 lambda outputs: (means(outputs.x) - center).abs())


def mean_image(images: Tensor) -> Score:
    center = images.double().mean(0)                                                       # (C, *S)

    def difference(outputs: Outputs) -> Tensor:
        return outputs.x.double().cpu() - center
    return Score('mean_image', '', "Euclidean distance to the mean normal training image",
                 lambda outputs: difference(outputs).flatten(1).norm(dim=1),
                 lambda outputs: difference(outputs).abs().mean(1, keepdim=True).float())


def as_stored(x: Tensor, bits: int) -> np.ndarray:
    """Images (B, C, *S) at `bits` per value, at most 16, as uint8, from 9 bits on as uint16. Few levels are
    spread over 0 to 255, which adds and loses no information.
    """
    levels = 2 ** min(bits, 16) - 1
    step, dtype = (255 / levels, np.uint8) if bits <= 8 else (1, np.uint16)
    return (x.detach().cpu().double().clamp(0, 1) * levels).round().mul(step).numpy().astype(dtype)


def compressed_bits(x: Tensor, bits: int) -> Tensor:
    """Input complexity (Serra et al. 2020): losslessly compressed size of each image (B, C, *S), bits: (B,).

    As an optimized PNG (gray or RGB; other channel counts stacked) or by LZMA2 without a header, whichever is
    shorter.
    """
    lzma_bytes = lambda values: len(lzma.compress(values.tobytes(), lzma.FORMAT_RAW, filters=[
        {'id': lzma.FILTER_LZMA2, 'preset': 6}]))
    return torch.tensor([8.0 * min(png_bytes(v), lzma_bytes(v)) for v in as_stored(x, bits)],
                        dtype=torch.float64)


def png_size(images: Tensor) -> Score:
    return Score('png_size', '', "bytes of the image as the model sees it, as a PNG",
                 lambda outputs: torch.tensor([png_bytes(values) for values in as_stored(
                     outputs.x, outputs.bits)], dtype=torch.float64))


def file_size(images: Tensor) -> Score:
    def size(outputs: Outputs) -> Tensor:
        if outputs.file_bytes is None:
            raise UserError("baseline file_size needs file sizes, which these images do not have.")
        return outputs.file_bytes.double().cpu()
    return Score('file_size', '', "bytes of the file on disk", size)


def principal_components(images: Tensor, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (D,), principal components (n, D) and the shares of the variance (n,) of images (N, C, *S)."""
    from sklearn.decomposition import PCA
    x = images.flatten(1).double().numpy()                                                 # (N, D)
    # At most half as many components as images: more would fit the training images themselves.
    number = max(1, min(most, len(x) // 2, x.shape[1] - 1))
    fitted = PCA(number, svd_solver='randomized' if min(x.shape) > 100 else 'full', random_state=0).fit(x)
    return fitted.mean_, fitted.components_, fitted.explained_variance_ratio_


def linear_residual(x: Tensor, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Images (B, C, *S) minus their projections on the mean and the axes (n, D): (B, D) float64."""
    # One image at a time: products of matrices round differently in batches of another size.
    centered = x.flatten(1).double().cpu().numpy() - mean
    return np.stack([row - (axes @ row) @ axes for row in centered])


def pca(images: Tensor) -> Score:
    mean, axes, shares = principal_components(images, MAX_COMPONENTS)
    axes = axes[:1 + int((np.cumsum(shares) < PCA_VARIANCE).sum())]
    return Score('pca', '', "Euclidean distance to the principal components that keep 90 % of the variance "
                 "of normal training images", lambda outputs: torch.from_numpy(np.linalg.norm(
                     linear_residual(outputs.x, mean, axes), axis=1)))


def pca_top(images: Tensor) -> Score:
    mean, axes, _ = principal_components(images, TOP_COMPONENTS)

    def residual(x: Tensor) -> Tensor:
        """Mean over channels: (B, 1, *S)."""
        signed = torch.from_numpy(linear_residual(x, mean, axes)).view_as(x)
        return gaussian_blur(signed, SMOOTHING).abs().mean(1, keepdim=True)

    def errors(outputs: Outputs) -> Tensor:
        return outputs.once(('pca_top',), lambda: residual(outputs.x))
    return Score('pca_top', '', "absolute value of the smoothed residual of 40 principal components: mean of "
                 "the highest 1 %",
                 lambda outputs: highest(errors(outputs), None, LESION_FRACTION),
                 lambda outputs: errors(outputs).float())


Statistic = Callable[[np.ndarray], np.ndarray]           # of image_statistics


def describe(outputs: Outputs, statistics: Sequence[Statistic]) -> np.ndarray:
    """Statistics of the gray values of each image, each computed once: (B, n) float64."""
    def rows(statistic: Statistic) -> np.ndarray:
        return np.stack([statistic(image.double().cpu().numpy().mean(0)) for image in outputs.x])
    return np.concatenate([outputs.once((one,), partial(rows, one)) for one in statistics], 1)


def by_density(name: str, about: str, statistics: Sequence[Statistic], density: type[Density],
               images: Tensor) -> Score:
    """How far the statistics of an image are from those of normal training images (N, C, *S)."""
    fitted = density().fit(describe(Outputs(None, images), statistics))

    def distances(outputs: Outputs) -> Tensor:
        # One image at a time, as in linear_residual.
        return torch.from_numpy(np.stack([fitted.score(row)[0]
                                          for row in describe(outputs, statistics)[:, None]]))
    return Score(name, '', about, distances)


# name, what it is, what it knows of an image, and the density of that
DENSITIES = (
    ('tiny_image', "16 x 16 pixels: Mahalanobis distance", [tiny], Mahalanobis),
    ('haar_energy', "energies of Haar details at five levels: Mahalanobis distance", [haar_energies],
     Mahalanobis),
    ('bands', "power in eight bands of the spectrum: distance to 5 nearest", [bands], WhitenedKNN),
    ('histogram', "quantiles, shares of black and white: distance to 5 nearest", [histogram], WhitenedKNN),
    ('border_only', "histogram of the outer 5 %: distance to 5 nearest", [frame_histogram], WhitenedKNN),
    ('trivial_knn', "bands and histogram: distance to 5 nearest", [bands, histogram], WhitenedKNN),
)
# By which --match finds images of the same exposure and frame; it is no score.
EXPOSURE = Score('exposure', '', "histograms of an image and of its outer 5 %", features=lambda outputs:
                 torch.from_numpy(describe(outputs, [histogram, frame_histogram])))
# name -> the score, from normal training images (N, C, *S) on the CPU
BASELINES: dict[str, Callable[[Tensor], Score]] = {
    **{make.__name__: make for make in (
        mean_intensity, intensity_deviation, mean_image, png_size, file_size, pca, pca_top)},
    **{name: partial(by_density, name, *row) for name, *row in DENSITIES}}


def fit_baselines(images: Tensor) -> list[Score]:
    """All baselines, fitted to normal training images (N, C, *S). Raises UserError for fewer than three."""
    if len(images) < LEAST_IMAGES:
        raise UserError(f"the training part has {len(images)} images: the baselines need at least "
                        f"{LEAST_IMAGES}.")
    return [make(images) for make in BASELINES.values()]
