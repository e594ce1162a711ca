"""What the stored values of a DICOM frame look like: sections are those of DICOM PS3.3.

    stored values -> modality LUT or rescale -> VOI LUT or window -> turned round where 0 is white -> [0, 1]

H x W pixels. A `dataset` is pydicom's, with the elements that readers/dicom.py fills in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from readers.source import Unreadable

COLORS = ('Red', 'Green', 'Blue')
WORDS = 1 << 16                         # values of 16 bits
# PresentationLUTShape decides which end is white, where it is given (C.11.6.1.2).
TURNED = {'INVERSE': True, 'IDENTITY': False}


# --------------------------------------------------------------------------------------------------- elements

def text(dataset: Any, name: str) -> str:
    """The code string of an element, '' where it is absent or empty."""
    return str(dataset.get(name) or '').strip(' \0').upper()


def number(dataset: Any, name: str) -> float | None:
    """The first number in a text, with a decimal point or comma; None if it is empty. Raises Unreadable."""
    element = dataset.get_item(name)
    value = None if element is None else element.value
    if isinstance(value, bytes):
        value = value.decode('latin-1').split('\\')[0].strip(' \0')
    if value in (None, ''):
        return None
    try:
        x = float(str(value).replace(',', '.'))
    except ValueError:
        x = np.nan
    if not np.isfinite(x):
        raise Unreadable(f'is a DICOM file whose {name} is no number')
    return x


def word(value: int, signed: bool) -> int:
    """A 16-bit word as a value of pixels: some files store one of signed pixels as unsigned or in reverse."""
    value %= WORDS
    return value - WORDS if signed and value >= WORDS // 2 else value


class Table(NamedTuple):
    """A lookup table: `entries` (N,) uint16 of the values from `first` on, of `bits` bits each."""
    entries: np.ndarray
    first: int
    bits: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The entries of integers (H, W); beyond its ends a table goes on with its last entry (C.11.1.1)."""
        return self.entries[np.clip(x.astype(np.int64) - self.first, 0, len(self.entries) - 1)]

    @property
    def white(self) -> int:
        """The entry for white; entries beyond the stated bits need more of them."""
        return 2 ** max(1, self.bits, int(self.entries.max()).bit_length()) - 1


def read_table(dataset: Any, descriptor: Any, data: Any, signed: bool) -> Table | None:
    """The table of a descriptor and its data, of `signed` values; None where one is absent or empty."""
    if not descriptor or data is None or not np.size(data):
        return None
    count, first, bits = (int(v) for v in descriptor)
    count = count % WORDS or WORDS
    if isinstance(data, bytes):
        little = dataset.file_meta.TransferSyntaxUID.is_little_endian
        data = np.frombuffer(data + b'\0' * (len(data) % 2), '<u2' if little else '>u2')
    entries = np.atleast_1d(data).astype('<u2')
    if len(entries) == (count + 1) // 2:
        entries = entries.view(np.uint8)                 # two to a word
    return Table(entries[:count], word(first, signed), bits)


def table_of(dataset: Any, sequence: str, signed: bool) -> Table | None:
    """The first table in a sequence of them that holds something."""
    tables = (read_table(dataset, item.get('LUTDescriptor'), item.get('LUTData'), signed)
              for item in dataset.get(sequence) or [])
    return next((table for table in tables if table), None)


# -------------------------------------------------------------------------------------------- kinds of pixels

def gray(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """MONOCHROME1 (smallest = white) and MONOCHROME2 (smallest = black): (H, W) in [0, 1]."""
    padding = is_padding(dataset, stored)
    x = shown(dataset, *rescaled(dataset, stored), ~padding)
    if TURNED.get(text(dataset, 'PresentationLUTShape'), dataset.PhotometricInterpretation == 'MONOCHROME1'):
        x = 1 - x
    return np.where(padding, 0.0, x)


def is_padding(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that belong to no image, but fill its rectangle (C.7.5.1.1.2)."""
    limits = [word(value, bool(dataset.PixelRepresentation))
              for name in ('PixelPaddingValue', 'PixelPaddingRangeLimit')
              if (value := dataset.get(name)) not in (None, '')]
    if dataset.get('PixelPaddingValue') in (None, ''):
        return np.zeros(stored.shape, bool)
    return (stored >= min(limits)) & (stored <= max(limits))


def rescaled(dataset: Any, stored: np.ndarray) -> tuple[np.ndarray, bool]:
    """Stored values in the unit of the modality, such as HU (H, W), and whether such values can be negative.
    """
    signed, bits = bool(dataset.PixelRepresentation), dataset.BitsStored
    if table := table_of(dataset, 'ModalityLUTSequence', signed):
        return table(stored).astype(np.float64), False
    slope, intercept = number(dataset, 'RescaleSlope'), number(dataset, 'RescaleIntercept')
    x = stored.astype(np.float64)
    if not slope or intercept is None:                   # a slope of 0 would make all values one: it is none
        return x, signed
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2 ** bits - 1])
    return x * slope + intercept, bool((ends * slope + intercept).min() < 0)


def shown(dataset: Any, x: np.ndarray, signed: bool, inside: np.ndarray) -> np.ndarray:
    """Rescaled values (H, W) as they are displayed, 0 black to 1 white: by lookup table, window or range."""
    if table := table_of(dataset, 'VOILUTSequence', signed):
        return table(np.rint(x)) / table.white
    center, width = number(dataset, 'WindowCenter'), number(dataset, 'WindowWidth')
    least, window = WINDOWS.get(text(dataset, 'VOILUTFunction'), WINDOWS['LINEAR'])
    if center is not None and width is not None and width >= least:
        return window(x, center, width)
    low, high = (x[inside].min(), x[inside].max()) if inside.any() else (0.0, 1.0)
    return (x - low) / max(high - low, 1e-12)


# C.11.2.1.2 and C.11.2.1.3, for an output from 0 to 1; a window narrower than the first number is none.
WINDOWS: dict[str, tuple[float, Callable[[np.ndarray, float, float], np.ndarray]]] = {
    'LINEAR': (1.0, lambda x, center, width: (
        ((x - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1) if width > 1 else (x > center - 0.5) * 1.0)),
    'LINEAR_EXACT': (1e-12, lambda x, center, width: ((x - center) / width + 0.5).clip(0, 1)),
    'SIGMOID': (1e-12, lambda x, center, width: 1 / (1 + np.exp(-4 * (x - center) / width))),
}


def palette(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """Numbers of colors in a table: (H, W, 3) in [0, 1]."""
    from pydicom.pixels import apply_color_lut
    tables = [read_table(dataset, *(dataset.get(f'{color}PaletteColorLookupTable{part}')
                                    for part in ('Descriptor', 'Data')), bool(dataset.PixelRepresentation))
              for color in COLORS]
    if not all(tables):                                                      # the tables are in segments
        x = apply_color_lut(stored, dataset)
        return x[..., :3] / np.float64(np.iinfo(x.dtype).max)
    return np.stack([table(stored) for table in tables], axis=-1) / max(table.white for table in tables)


def color(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """RGB, and luma with chroma, which pydicom makes RGB: (H, W, 3) in [0, 1]."""
    return stored / (2.0 ** dataset.BitsStored - 1)


# photometric interpretation (C.7.6.3.1.2) -> how its pixels are shown
KINDS: dict[str, Callable[[Any, np.ndarray], np.ndarray]] = {
    'MONOCHROME1': gray, 'MONOCHROME2': gray, 'PALETTE COLOR': palette, 'RGB': color, 'YBR_FULL': color,
    'YBR_FULL_422': color, 'YBR_ICT': color, 'YBR_RCT': color}
