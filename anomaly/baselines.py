"""Scores that need no model: what brightness, file size or a linear fit of the pixels tell of an image.

They stand beside every model's scores because medical data sets differ in scanner, exposure and file format
between classes: a model that is no better than they are has learned that difference. Two have maps, next to
which those of models stand. B images, C channels, *S = (H, W) or (D, H, W); N normal training images, on
which they are fitted.
"""

import lzma
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from anomaly.outputs import Outputs
from anomaly.scores import Score
from readers.images.png import png_bytes
from utils import UserError

PCA_VARIANCE = 0.9       # fraction of the variance of normal images that the components keep
MAX_COMPONENTS = 200


def means(x: Tensor) -> Tensor:
    """Mean of each image (B, C, *S): (B,) float64 on the CPU."""
    return x.double().flatten(1).mean(1).cpu()


def mean_intensity(images: Tensor) -> Score:
    """Mean intensity as it is: an AUROC below 0.5 means that anomalous images are darker."""
    return Score('mean_intensity', '', "mean intensity: an AUROC below 0.5 means darker anomalous images",
                 lambda outputs: means(outputs.x),
                 lambda outputs: outputs.x.float().mean(1, keepdim=True).cpu())


def intensity_deviation(images: Tensor) -> Score:
    """|mean intensity - mean intensity of normal training images|: dark and bright images both count."""
    center = means(images).mean()
    return Score('intensity_deviation', '', "|mean intensity - that of normal training images|",
                 lambda outputs: (means(outputs.x) - center).abs())


def mean_image(images: Tensor) -> Score:
    """Euclidean distance to the mean of the normal training images."""
    center = images.double().mean(0)                                                       # (C, *S)

    def difference(outputs: Outputs) -> Tensor:
        return outputs.x.double().cpu() - center
    return Score('mean_image', '', "Euclidean distance to the mean normal training image",
                 lambda outputs: difference(outputs).flatten(1).norm(dim=1),
                 lambda outputs: difference(outputs).abs().mean(1, keepdim=True).float())


def as_stored(x: Tensor, bits: int) -> np.ndarray:
    """Images (B, C, *S) at `bits` per value as uint8, or for 9 to 16 bits as uint16. Few levels are spread
    over 0 to 255, which adds and loses no information.
    """
    levels = 2 ** bits - 1
    step, dtype = (255 / levels, np.uint8) if bits <= 8 else (1, np.uint16)
    return (x.detach().cpu().double().clamp(0, 1) * levels).round().mul(step).numpy().astype(dtype)


def compressed_bits(x: Tensor, bits: int) -> Tensor:
    """Input complexity (Serra et al. 2020): losslessly compressed size of each image (B, C, *S), bits: (B,).

    Values of at most 16 `bits`, as an optimized PNG (gray or RGB; other channel counts stacked) or by LZMA2
    without a header, whichever is shorter.
    """
    lzma_bytes = lambda values: len(lzma.compress(values.tobytes(), lzma.FORMAT_RAW, filters=[
        {'id': lzma.FILTER_LZMA2, 'preset': 6}]))
    return torch.tensor([8.0 * min(png_bytes(v), lzma_bytes(v)) for v in as_stored(x, min(bits, 16))],
                        dtype=torch.float64)


def png_size(images: Tensor) -> Score:
    """Bytes of the image as the model sees it, as an optimized PNG."""
    def size(outputs: Outputs) -> Tensor:
        stored = as_stored(outputs.x, min(outputs.bits, 8))
        return torch.tensor([png_bytes(values) for values in stored], dtype=torch.float64)
    return Score('png_size', '', "bytes of the image as the model sees it, as a PNG", size)


def file_size(images: Tensor) -> Score:
    """Bytes of the image's file on disk."""
    def size(outputs: Outputs) -> Tensor:
        if outputs.file_bytes is None:
            raise UserError("baseline file_size needs file sizes, which these images do not have.")
        return outputs.file_bytes.double().cpu()
    return Score('file_size', '', "bytes of the file on disk", size)


def pca(images: Tensor) -> Score:
    """Euclidean distance to the linear subspace that keeps 90 % of the variance of normal training images."""
    from sklearn.decomposition import PCA
    x = images.flatten(1).double().numpy()                                                 # (N, D)
    # At most half as many components as images: more would fit the training images themselves.
    most = max(1, min(MAX_COMPONENTS, len(x) // 2, x.shape[1] - 1))
    fitted = PCA(most, svd_solver='randomized' if min(x.shape) > 100 else 'full', random_state=0).fit(x)
    kept = min(most, 1 + int((np.cumsum(fitted.explained_variance_ratio_) < PCA_VARIANCE).sum()))
    axes = fitted.components_[:kept]                                                       # (kept, D)

    def distance(outputs: Outputs) -> Tensor:
        x = outputs.x.flatten(1).double().cpu().numpy() - fitted.mean_                     # (B, D)
        return torch.from_numpy(np.linalg.norm(x - x @ axes.T @ axes, axis=1))
    return Score('pca', '', "Euclidean distance to principal components of normal training images", distance)


# name -> the score, from normal training images (N, C, *S) on the CPU
BASELINES: dict[str, Callable[[Tensor], Score]] = {make.__name__: make for make in (
    mean_intensity, intensity_deviation, mean_image, png_size, file_size, pca)}


def fit_baselines(images: Tensor) -> list[Score]:
    """All baselines, fitted to normal training images (N, C, *S). Raises UserError for fewer than two."""
    if len(images) < 2:
        raise UserError(f"the training part has {len(images)} image: the baselines need at least 2.")
    return [make(images) for make in BASELINES.values()]
