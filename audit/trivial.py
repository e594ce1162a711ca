"""Trivial features of images: of the file, the frame, the exposure and the sharpness, not of the anatomy.

Features of the file come from its header, features of the picture from what the model sees, at the model's
size. C channels, *S = (H, W) pixels or (D, H, W) voxels, N images. The content is the picture without uniform
bars at its edges, so that a border changes the features of the border and no others.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import convolve, laplace

from anomaly.image_statistics import frame
from audit.headers import Header, read_file_header
from readers.images.decode import png_bytes
from readers.parts import LEFT_RIGHT

BAR = 8 / 255              # lines at an edge are a bar if their values differ by less
IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64)    # blind to edges and slopes


class Confounder(NamedTuple):
    """A property of images that features measure. A model that uses it has learned `learned`."""
    title: str
    learned: str
    advice: str


FILE = "the file, not the disease."
DISEASE = " It may also be the disease itself: then a model must beat it to have learned more."
EXPOSURE = "bring all images to the same mean and standard deviation, or to the same histogram."
# The more direct cause comes first: a border changes the size of the file, never the other way.
CONFOUNDERS = {
    'picture size': Confounder(
        "the size of the picture", FILE,
        "Resize all images with the same program; --image_size alone leaves marks of the first resizing."),
    'format': Confounder(
        "the format of the file", FILE,
        "Re-encode all images from the least compressed originals; a small --image_size hides artifacts."),
    'border': Confounder(
        "the border", "the frame, not the disease.",
        "Crop the borders of all images; if they come from padding to a square, --fit crop avoids them."),
    'brightness': Confounder("the brightness", "the exposure." + DISEASE, f"Match the exposure: {EXPOSURE}"),
    'contrast': Confounder("the contrast", "the exposure." + DISEASE, f"Match the contrast: {EXPOSURE}"),
    'detail': Confounder(
        "the sharpness", "the scanner or the compression." + DISEASE,
        "Bring all images to the same sharpness: blur the sharper ones, or lower --image_size."),
    'symmetry': Confounder(
        "the symmetry", "the positioning." + DISEASE,
        "Compare how the patients were positioned, and leave out views that one class lacks."),
    'file size': Confounder(
        "the size of the file", FILE,
        "See the other findings of this class: a model sees what makes the file larger or smaller."),
}


class Feature(NamedTuple):
    """A number for each image. `more` and `less` say what differs: "COVID images are brighter"."""
    cause: str                                   # of CONFOUNDERS
    about: str                                   # "the mean brightness"
    more: str
    less: str
    unit: str
    digits: int
    measure: Callable[['Picture'], float]

NO_HEADER = Header('', math.nan, math.nan, '', '', depth=math.nan)
# Words in place of a number: what they say about a file, from its header.
TRAITS: dict[str, tuple[str, Callable[[Header], str]]] = {
    'size': ('picture size', lambda h: f"{h.size} {'voxels' if h.depth else 'pixels'}"),
    'spacing': ('picture size', lambda h: h.spacing),
    'format': ('format', lambda h: h.format),
    'pixels': ('format', lambda h: h.pixels),
    'encoder': ('format', lambda h: f'{h.format} ({h.encoder})'),
}


# --------------------------------------------------------------------------------------------- of one picture

class Picture:
    """One image: values (C, *S) and gray values (*S) in [0, 1], content (fewer), bars in percent of a side;
    bytes and header of its file, NaN where they are unknown.
    """

    def __init__(self, values: np.ndarray, file_bytes: float = math.nan, header: Header = NO_HEADER):
        self.values, self.file_bytes, self.header = values, file_bytes, header
        self.gray = gray = values.mean(0, dtype=np.float64)
        box, self.bars = [], 0.0
        for axis in range(gray.ndim):
            lines = np.moveaxis(gray, axis, 0).reshape(gray.shape[axis], -1)     # (H, W), then (W, H)
            first, last = bar(lines), bar(lines[::-1])
            if first == len(lines):               # one value all over: no bars, but a picture of nothing
                first = last = 0
            box.append(slice(first, len(lines) - last))
            self.bars += 100 * (first + last) / (gray.ndim * len(lines))
        self.content = gray[tuple(box)]


def bar(lines: np.ndarray) -> int:
    """How many of the first lines (n, m) have one value, all together, up to BAR."""
    highest, lowest = np.maximum.accumulate(lines.max(1)), np.minimum.accumulate(lines.min(1))
    return int((highest - lowest < BAR).sum())


def border(picture: Picture) -> float:
    """Mean of the outer 5 % minus mean of the rest, in percent of white."""
    outer = frame(picture.gray.shape)
    return 0.0 if outer.all() else 100 * float(picture.gray[outer].mean() - picture.gray[~outer].mean())


def sharpness(picture: Picture) -> float:
    """Variance of the Laplacian, in units of the picture's own variance: contrast does not change it."""
    variance = picture.content.var()
    return float(laplace(picture.content).var() / variance) if variance > 1e-12 else 0.0


def noise(picture: Picture) -> float:
    """Standard deviation of the noise (Immerkaer 1996), in percent of the picture's own; in axial slices."""
    deviation = picture.content.std()
    if deviation < 1e-6 or min(picture.content.shape[:2]) < 3:
        return 0.0
    kernel = IMMERKAER.reshape(3, 3, *[1] * (picture.content.ndim - 2))
    residual = convolve(picture.content, kernel)[1:-1, 1:-1]
    return float(100 * math.sqrt(math.pi / 2) * np.abs(residual).mean() / 6 / deviation)


def symmetry(picture: Picture) -> float:
    """Correlation of the picture with its mirror image; 0 for a uniform one."""
    centered = picture.content - picture.content.mean()
    power = (centered ** 2).sum()
    mirrored = np.flip(centered, LEFT_RIGHT[2 + centered.ndim] - 2)
    return float((centered * mirrored).sum() / power) if power > 1e-9 else 0.0


FEATURES = {
    'width': Feature('picture size', "width", "are wider", "are narrower", 'pixels', 0,
                     lambda p: p.header.width),
    'height': Feature('picture size', "height", "are taller", "are less tall", 'pixels', 0,
                      lambda p: p.header.height),
    'depth': Feature('picture size', "number of slices", "have more slices", "have fewer slices", '', 0,
                     lambda p: p.header.depth or math.nan),
    'aspect': Feature('picture size', "ratio of width to height", "are broader", "are slimmer", '', 2,
                      lambda p: p.header.width / p.header.height),
    'jpeg_quality': Feature('format', "JPEG quality", "are less compressed", "are more compressed", '', 0,
                            lambda p: p.header.quality),
    'file_size': Feature('file size', "size of the file", "have larger files", "have smaller files", 'kB', 1,
                         lambda p: p.file_bytes / 1000),
    'bytes_per_pixel': Feature('file size', "size of the file per pixel", "have more bytes per pixel",
                               "have fewer bytes per pixel", '', 2, lambda p: p.file_bytes / (
                                   p.header.width * p.header.height * (p.header.depth or 1))),
    'bars': Feature('border', "width of uniform bars at the edges", "have wider bars", "have narrower bars",
                    '% of the side', 1, lambda p: p.bars),
    'border': Feature('border', "brightness of the outer 5 % against the rest", "have a brighter border",
                      "have a darker border", '% of white', 1, border),
    'mean': Feature('brightness', "mean brightness", "are brighter", "are darker", '% of white', 1,
                    lambda p: 100 * float(p.content.mean())),
    'black': Feature('brightness', "share of black pixels", "have more of them", "have fewer of them", '%', 2,
                     lambda p: 100 * float((p.content <= 0).mean())),
    'white': Feature('brightness', "share of white pixels", "have more of them", "have fewer of them", '%', 2,
                     lambda p: 100 * float((p.content >= 1).mean())),
    'deviation': Feature('contrast', "contrast (standard deviation)", "have more of it", "have less of it",
                         '% of white', 1, lambda p: 100 * float(p.content.std())),
    'sharpness': Feature('detail', "sharpness (variance of the Laplacian)", "are sharper", "are more blurred",
                         '', 3, sharpness),
    'noise': Feature('detail', "noise", "are noisier", "are smoother", '% of the contrast', 2, noise),
    'png_size': Feature('detail', "size as a PNG at the model's resolution", "are richer in detail",
                        "are poorer in detail", 'bytes', 0,
                        lambda p: png_bytes(np.rint(255 * p.values).astype(np.uint8))),
    'symmetry': Feature('symmetry', "correlation with the mirror image", "are more symmetric",
                        "are less symmetric", '', 2, symmetry),
}


# -------------------------------------------------------------------------------------------------- of a part

class Measured(NamedTuple):
    """What is known of one image."""
    numbers: dict[str, float]                                # feature -> value, NaN where unknown
    traits: dict[str, str]                                   # trait -> word, '' without a file
    group: str                                               # its patient, or its id


def measure(part: Any, indices: Sequence[int]) -> list[Measured]:
    """The trivial features of some images of a part (readers.parts.Part), in their order."""
    measured = []
    for i in indices:
        entry = part.entries[i]
        header = read_file_header(entry.path) if entry.path else NO_HEADER
        picture = Picture(part.items([i]).x[0].numpy(), entry.file_bytes or math.nan, header)
        measured.append(Measured(
            {name: feature.measure(picture) for name, feature in FEATURES.items()},
            {name: word(header) if header.format else '' for name, (_, word) in TRAITS.items()},
            getattr(entry, 'patient', '') or entry.id))
    return measured


def column(images: Sequence[Measured], name: str) -> np.ndarray:
    """A feature of some images: (N,)."""
    return np.array([image.numbers[name] for image in images], np.float64)


def words(images: Sequence[Measured], trait: str) -> list[str]:
    return [image.traits[trait] for image in images]
