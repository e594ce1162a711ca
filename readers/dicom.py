"""DICOM: one frame as it is meant to be seen, and nothing of whom it shows.

Only elements that say what the pixels mean are read (`ELEMENTS`), and reasons are fixed words, so that
nothing of a patient gets into an image, an error or a log. Sections are those of DICOM PS3.3. H x W pixels, C
channels.

    stored values -> modality LUT or rescale -> VOI LUT or window -> MONOCHROME1 turned round -> [0, 1]
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from readers.source import MOST_PIXELS, Unreadable

MAGIC_START, MAGIC = 128, b'DICM'
FULL = 65535                                  # results lie on its grid: an LMDB keeps them as 16-bit integers
PIXELS = ('PixelData', 'FloatPixelData', 'DoubleFloatPixelData')
COLORS = ('Red', 'Green', 'Blue')
PER_FRAME = ('SharedFunctionalGroupsSequence', 'PerFrameFunctionalGroupsSequence')      # of enhanced objects
FRAME_LOOK = ('PixelValueTransformationSequence', 'FrameVOILUTSequence')
ELEMENTS = [
    *PIXELS, *PER_FRAME, 'Rows', 'Columns', 'NumberOfFrames', 'SamplesPerPixel', 'PlanarConfiguration',
    'PhotometricInterpretation', 'BitsAllocated', 'BitsStored', 'HighBit', 'PixelRepresentation',
    'PixelPaddingValue', 'PixelPaddingRangeLimit', 'ExtendedOffsetTable', 'ExtendedOffsetTableLengths',
    'ModalityLUTSequence', 'RescaleSlope', 'RescaleIntercept',
    'VOILUTSequence', 'WindowCenter', 'WindowWidth', 'VOILUTFunction',
    *(f'{color}PaletteColorLookupTable{part}' for color in COLORS for part in ('Descriptor', 'Data')),
    *(f'Segmented{color}PaletteColorLookupTableData' for color in COLORS)]


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are those of a DICOM file, whatever its name."""
    return data[MAGIC_START:MAGIC_START + len(MAGIC)] == MAGIC


def decode_dicom(data: bytes) -> np.ndarray:
    """The frame in the bytes of a DICOM file: (H, W, C) float32 in [0, 1], C = 1 gray or 3 RGB, of 16 bits.

    Gray values go through the file's rescale and its first window or lookup table; without one they are
    stretched from the smallest to the largest. Padding around a round image is black. Raises Unreadable.
    """
    import pydicom
    from pydicom.config import IGNORE, settings
    settings.reading_validation_mode = IGNORE            # its warnings would print what the file holds
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=ELEMENTS)
        check(dataset)
        take_look_of_frame(dataset)
        x = KINDS[dataset.PhotometricInterpretation](dataset)
    except Unreadable:
        raise
    except Exception:                                    # its words may hold values of the file
        raise Unreadable('is a DICOM file that is damaged or cut off') from None
    if not np.isfinite(x).all():
        raise Unreadable('is a DICOM file with pixels that are not finite')
    return (np.rint(x.clip(0, 1) * FULL) / FULL).astype(np.float32).reshape(*x.shape[:2], -1)


def check(dataset: Any) -> None:
    """Raises Unreadable unless there is one frame of a kind that can be decoded here."""
    from pydicom.pixels import get_decoder
    if not any(name in dataset for name in PIXELS):
        raise Unreadable('is a DICOM file without pixel data')
    if int(dataset.get('NumberOfFrames') or 1) > 1:
        raise Unreadable('is a DICOM file of several frames: export each as a file of its own')
    pixels = dataset.Rows * dataset.Columns
    if not pixels:
        raise Unreadable('is a DICOM file without pixels: its height or width is 0')
    if pixels > MOST_PIXELS:
        raise Unreadable(f'has more than {MOST_PIXELS:,} pixels: make it smaller')
    if dataset.get('PhotometricInterpretation') not in KINDS:
        raise Unreadable(f'is a DICOM file of a kind of color that is not read: {", ".join(KINDS)} are')
    try:
        decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    except NotImplementedError:
        raise Unreadable('is a DICOM file of an unknown transfer syntax') from None
    if not decoder.is_available:
        raise Unreadable(f'is compressed as {decoder.UID.name}, which nothing installed here decodes: '
                         f'decompress it, or see docs/data.md for decoders')


def take_look_of_frame(dataset: Any) -> None:
    """Puts rescale and window of the one frame of an enhanced object where other objects have theirs."""
    for groups in PER_FRAME:
        for group in (dataset.get(groups) or [])[:1]:
            for name in FRAME_LOOK:
                for item in (group.get(name) or [])[:1]:
                    dataset.update(item)


# ----------------------------------------------------------------------------------------- kinds of pixels

def gray(dataset: Any) -> np.ndarray:
    """MONOCHROME1 (smallest = white) and MONOCHROME2 (smallest = black): (H, W) in [0, 1]."""
    from pydicom.pixels import apply_modality_lut
    stored = dataset.pixel_array                                                                 # (H, W)
    padding = is_padding(dataset, stored)
    x = shown(dataset, apply_modality_lut(stored, dataset).astype(np.float64), ~padding)
    if dataset.PhotometricInterpretation == 'MONOCHROME1':
        x = 1 - x
    return np.where(padding, 0.0, x)


def is_padding(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that belong to no image, but fill its rectangle (C.7.5.1.1.2)."""
    first = dataset.get('PixelPaddingValue')
    if first is None:
        return np.zeros(stored.shape, bool)
    last = dataset.get('PixelPaddingRangeLimit')
    low, high = sorted((first, first if last is None else last))
    return (stored >= low) & (stored <= high)


def shown(dataset: Any, x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Rescaled values (H, W) as they are displayed, 0 black to 1 white: by lookup table, window or range."""
    from pydicom.pixels import apply_voi
    if tables := dataset.get('VOILUTSequence'):
        x = apply_voi(np.rint(x).astype(np.int64), dataset)
        return x / (2.0 ** tables[0].LUTDescriptor[2] - 1)
    center, width = (first_number(dataset.get(name)) for name in ('WindowCenter', 'WindowWidth'))
    kind = (dataset.get('VOILUTFunction') or 'LINEAR').strip().upper()
    if center is not None and width is not None and width >= LEAST_WIDTH[kind]:
        return WINDOWS[kind](x, center, width)
    low, high = (x[inside].min(), x[inside].max()) if inside.any() else (0.0, 1.0)
    return (x - low) / max(high - low, 1e-12)


def first_number(value: Any) -> float | None:
    """The first of one or several numbers; None where there is none."""
    values = [value] if isinstance(value, int | float) else list(value or ())
    return float(values[0]) if values and values[0] is not None else None


# C.11.2.1.2 and C.11.2.1.3, for an output from 0 to 1
WINDOWS: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    'LINEAR': lambda x, center, width: (
        ((x - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1) if width > 1 else (x > center - 0.5) * 1.0),
    'LINEAR_EXACT': lambda x, center, width: ((x - center) / width + 0.5).clip(0, 1),
    'SIGMOID': lambda x, center, width: 1 / (1 + np.exp(-4 * (x - center) / width)),
}
LEAST_WIDTH = {'LINEAR': 1.0, 'LINEAR_EXACT': 1e-12, 'SIGMOID': 1e-12}     # a narrower window is none


def palette(dataset: Any) -> np.ndarray:
    """Numbers of colors in a table: (H, W, 3) in [0, 1]."""
    from pydicom.pixels import apply_color_lut
    x = apply_color_lut(dataset.pixel_array, dataset)
    return x[..., :3] / np.float64(np.iinfo(x.dtype).max)


def color(dataset: Any) -> np.ndarray:
    """RGB, and luma with chroma, which pydicom makes RGB: (H, W, 3) in [0, 1]."""
    return dataset.pixel_array / (2.0 ** dataset.BitsStored - 1)


# photometric interpretation (C.7.6.3.1.2) -> how its pixels are read
KINDS: dict[str, Callable[[Any], np.ndarray]] = {
    'MONOCHROME1': gray, 'MONOCHROME2': gray, 'PALETTE COLOR': palette, 'RGB': color, 'YBR_FULL': color,
    'YBR_FULL_422': color, 'YBR_ICT': color, 'YBR_RCT': color}
