"""Trivial features of an image: its file, its frame, its exposure, its sharpness, not what it shows.

Features of the file come from its header, features of the picture from what the model sees, at the model's
size. C channels, *S = (H, W) pixels or (D, H, W) voxels; the content is the picture without uniform bars at
its edges, so that a border changes the features of the border and no other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.ndimage import convolve, laplace

from readers.headers import Trace, read_trace
from readers.images.png import png_bytes
from readers.parts import LEFT_RIGHT

BLOCK = 2 ** 24            # values measured at once: 256 images of 256 x 256 pixels
BAR = 8 / 255              # lines at an edge are a bar if their values differ by less
OUTER = 0.05               # of every side: the border
IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64)    # blind to edges and slopes


@dataclass(frozen=True)
class Topic:
    """What several features are about: `learned` is what a model that uses them has learned."""
    title: str
    learned: str
    advice: str


DISEASE = " It may also be the disease itself: then a model must beat it to have learned more."

# The more direct cause comes first: a border changes the size of the file, never the other way.
TOPICS = {
    'picture size': Topic(
        "the size of the picture", "the file, not the disease.",
        "Bring all images to one size by the same program; --image_size alone leaves traces of the "
        "resizing."),
    'format': Topic(
        "the format of the file", "the file, not the disease.",
        "Re-encode all images alike, from the least compressed originals; what JPEG has done to the pixels "
        "stays, and shows less at a smaller --image_size."),
    'border': Topic(
        "the border", "the frame, not the disease.",
        "Crop the borders of all images; if they come from filling up pictures that are not square, "
        "--fit crop avoids them."),
    'brightness': Topic(
        "the brightness", "the exposure." + DISEASE,
        "Match the exposure: bring all images to the same mean and deviation, or to the same histogram."),
    'contrast': Topic(
        "the contrast", "the exposure." + DISEASE,
        "Match the contrast: bring all images to the same mean and deviation, or to the same histogram."),
    'detail': Topic(
        "the sharpness", "the scanner or the compression." + DISEASE,
        "Bring all images to the same sharpness: blur the sharper ones, or lower --image_size."),
    'symmetry': Topic(
        "the symmetry", "the positioning." + DISEASE,
        "Compare how the patients were positioned, and the views; leave out views that one class lacks."),
    'file size': Topic(
        "the size of the file", "the file, not the disease.",
        "A model does not see the file, but what made it larger: look at the other lines of this class, "
        "and re-encode all images alike."),
}


@dataclass(frozen=True)
class Look:
    """One image: values (C, *S) and grey values (*S) in [0, 1], content (fewer), bars in per cent."""
    values: np.ndarray
    grey: np.ndarray
    content: np.ndarray
    bars: float


@dataclass(frozen=True)
class Feature:
    """A number of each image. `more` and `less` say of images what it means if it is larger or smaller."""
    topic: str
    about: str                                   # goes on from "the"
    more: str                                    # goes on from "COVID images"
    less: str
    unit: str = ''
    digits: int = 2
    of_look: Callable[[Look], float] | None = None
    of_file: Callable[[int, Trace | None], float] | None = None       # of its bytes, 0 = unknown, and header

    def show(self, value: float) -> str:
        return f'{value:,.{self.digits}f}{self.unit and " "}{self.unit}'


# ------------------------------------------------------------------------------------------------ of the file

def of_trace(number: Callable[[Trace], float]) -> Callable[[int, Trace | None], float]:
    return lambda size, trace: number(trace) if trace else math.nan


FILE_FEATURES = {
    'width': Feature('picture size', "width", "are wider", "are narrower", 'pixels', 0,
                     of_file=of_trace(lambda t: t.width)),
    'height': Feature('picture size', "height", "are taller", "are less tall", 'pixels', 0,
                      of_file=of_trace(lambda t: t.height)),
    'depth': Feature('picture size', "number of slices", "have more of them", "have fewer of them", '', 0,
                     of_file=of_trace(lambda t: t.depth or math.nan)),
    'aspect': Feature('picture size', "ratio of width to height", "are broader", "are slimmer",
                      of_file=of_trace(lambda t: t.width / t.height)),
    'jpeg_quality': Feature('format', "JPEG quality", "are less compressed", "are more compressed", '', 0,
                            of_file=of_trace(lambda t: t.quality)),
    'file_size': Feature('file size', "size of the file", "have larger files", "have smaller files", 'kB', 1,
                         of_file=lambda size, trace: size / 1000 if size else math.nan),
    'bytes_per_pixel': Feature('file size', "size of the file for each pixel", "have more bytes a pixel",
                               "have fewer bytes a pixel", of_file=lambda size, trace: (
                                   size / (trace.width * trace.height * (trace.depth or 1))
                                   if size and trace else math.nan)),
}
# name -> topic, what it says of a file, and how: told apart by words, not by a number
TRAITS: dict[str, tuple[str, Callable[[Trace], str]]] = {
    'size': ('picture size', lambda t: f"{t.size} {'voxels' if t.depth else 'pixels'}"),
    'spacing': ('picture size', lambda t: t.spacing),
    'format': ('format', lambda t: t.format),
    'pixels': ('format', lambda t: t.pixels),
    'encoder': ('format', lambda t: f'{t.format} ({t.encoder})'),
}


# --------------------------------------------------------------------------------------------- of the picture

def look(values: np.ndarray) -> Look:
    """An image (C, *S) in [0, 1], its content told from uniform bars at its edges."""
    grey = values.mean(0, dtype=np.float64)
    box, total = [], 0.0
    for axis in range(grey.ndim):
        lines = np.moveaxis(grey, axis, 0).reshape(grey.shape[axis], -1)       # (H, W), then (W, H)
        first, last = bar(lines), bar(lines[::-1])
        if first == len(lines):                   # one value all over: no bars, but a picture of nothing
            first = last = 0
        box.append(slice(first, len(lines) - last))
        total += 100 * (first + last) / (grey.ndim * len(lines))
    return Look(values, grey, grey[tuple(box)], total)


def bar(lines: np.ndarray) -> int:
    """How many of the first lines (n, m) have one value, all together, up to BAR."""
    highest, lowest = np.maximum.accumulate(lines.max(1)), np.minimum.accumulate(lines.min(1))
    return int((highest - lowest < BAR).sum())


def border(image: Look) -> float:
    """Mean of the outer 5 % minus mean of what is inside it, in per cent of white."""
    inside = np.zeros(image.grey.shape, bool)
    outer = [max(1, round(OUTER * n)) for n in image.grey.shape]
    inside[tuple(slice(n, -n) for n in outer)] = True
    return 100 * float(image.grey[~inside].mean() - image.grey[inside].mean()) if inside.any() else 0.0


def png_size(image: Look) -> float:
    """Bytes of the picture as the model sees it, as a PNG of 8 bits."""
    return float(png_bytes(np.rint(255 * image.values).astype(np.uint8)))


def sharpness(image: Look) -> float:
    """Variance of the Laplacian, in units of the picture's own variance: contrast does not change it."""
    variance = image.content.var()
    return float(laplace(image.content).var() / variance) if variance > 1e-12 else 0.0


def noise(image: Look) -> float:
    """Standard deviation of the noise (Immerkaer 1996), in per cent of the picture's own; in axial slices."""
    deviation = image.content.std()
    if deviation < 1e-6 or min(image.content.shape[:2]) < 3:
        return 0.0
    kernel = IMMERKAER.reshape(3, 3, *[1] * (image.content.ndim - 2))
    residual = convolve(image.content, kernel)[1:-1, 1:-1]
    return float(100 * math.sqrt(math.pi / 2) * np.abs(residual).mean() / 6 / deviation)


def symmetry(image: Look) -> float:
    """Correlation of the picture with its mirror image; 0 of a uniform one."""
    centred = image.content - image.content.mean()
    power = (centred ** 2).sum()
    mirrored = np.flip(centred, LEFT_RIGHT[2 + centred.ndim] - 2)
    return float((centred * mirrored).sum() / power) if power > 1e-9 else 0.0


PICTURE_FEATURES = {
    'bars': Feature('border', "width of uniform bars at the edges", "have wider bars", "have narrower bars",
                    '% of the side', 1, of_look=lambda image: image.bars),
    'border': Feature('border', "brightness of the outer 5 % against the rest", "have a brighter border",
                      "have a darker border",
                      '% of white', 1, of_look=border),
    'mean': Feature('brightness', "mean brightness", "are brighter", "are darker", '% of white', 1,
                    of_look=lambda image: 100 * float(image.content.mean())),
    'black': Feature('brightness', "share of black pixels", "have more of them", "have fewer of them", '%',
                     of_look=lambda image: 100 * float((image.content <= 0).mean())),
    'white': Feature('brightness', "share of white pixels", "have more of them", "have fewer of them", '%',
                     of_look=lambda image: 100 * float((image.content >= 1).mean())),
    'deviation': Feature('contrast', "contrast (standard deviation)", "have more of it", "have less of it",
                         '% of white', 1, of_look=lambda image: 100 * float(image.content.std())),
    'sharpness': Feature('detail', "sharpness (variance of the Laplacian)", "are sharper", "are more blurred",
                         digits=3, of_look=sharpness),
    'noise': Feature('detail', "noise", "are noisier", "are smoother", '% of the contrast', of_look=noise),
    'png_size': Feature('detail', "size as a PNG at the model's resolution", "are richer in detail",
                        "are poorer in detail", 'bytes', 0, of_look=png_size),
    'symmetry': Feature('symmetry', "correlation with the mirror image", "are more symmetric",
                        "are less symmetric",
                        of_look=symmetry),
}
FEATURES = FILE_FEATURES | PICTURE_FEATURES


# -------------------------------------------------------------------------------------------------- of a part

@dataclass(frozen=True)
class Measured:
    """N images: numbers {feature: (N,)}, NaN where unknown, words {trait: N strings} of those with a file."""
    numbers: dict[str, np.ndarray]
    traits: dict[str, list[str]]
    groups: list[str] = field(default_factory=list)          # patient of each image, or its id

    def __len__(self) -> int:
        return len(self.groups)

    def __add__(self, other: 'Measured') -> 'Measured':
        return Measured({name: np.concatenate([values, other.numbers[name]])
                         for name, values in self.numbers.items()},
                        {name: words + other.traits[name] for name, words in self.traits.items()},
                        self.groups + other.groups)


def measure(part: Any, indices: Sequence[int]) -> Measured:
    """The trivial features of some images of a part (datasets.Part), in their order."""
    entries = [part.entries[i] for i in indices]
    traces = [read_trace(e.path) if e.path else None for e in entries]
    numbers = {name: np.array([f.of_file(e.file_bytes, t) for e, t in zip(entries, traces)], np.float64)
               for name, f in FILE_FEATURES.items()}
    numbers |= {name: np.full(len(entries), np.nan) for name in PICTURE_FEATURES}
    block = max(1, BLOCK // part[0][0].numel()) if entries else 1
    for start in range(0, len(entries), block):
        batch = part.items(indices[start:start + block]).x.numpy()                       # (B, C, *S)
        for i, values in enumerate(batch, start):
            image = look(values)
            for name, feature in PICTURE_FEATURES.items():
                numbers[name][i] = feature.of_look(image)
    traits = {name: [words(t) if t else '' for t in traces] for name, (_, words) in TRAITS.items()}
    return Measured(numbers, traits, [getattr(e, 'patient', '') or e.id for e in entries])
