"""DICOM files: which can be read, and their frames, as a viewer shows them first (readers/dicom_display.py).

Only elements that say what the pixels mean are read (`ELEMENTS`), and reasons are fixed words and names of
elements, so that nothing of a patient gets into an image, an error or a log. H x W pixels, C channels.
"""

import io
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from readers.dicom_display import COLORS, KINDS, number, text
from readers.paths import first_bytes
from readers.source import Unreadable, check_pixels, decoding
from storage.limits import unpack

MAGIC_START, MAGIC = 128, b'DICM'
DEFLATED, MOST_META = b'1.2.840.10008.1.2.1.99', 4096       # transfer syntax, and where it stands
MOST_READS = 1_000_000                        # about 300,000 elements, which take 5 seconds
MOST_ITEMS, ITEM = 300_000, b'\xfe\xff\0\xe0'   # of sequences, which are read later, at 20 microseconds each
BARE = (b'\x08\0', b'\0\x08', b'\2\0')        # the first group, where there is no preamble: old archives
FULL = 65535                                  # results lie on its grid: an LMDB keeps them as 16-bit integers
PIXELS = ('PixelData', 'FloatPixelData', 'DoubleFloatPixelData')
REQUIRED = ('Rows', 'Columns', 'BitsAllocated', 'PhotometricInterpretation')
ALLOCATED = (1, 8, 16, 32, 64)                # bits of a stored value
SHARED, PER_FRAME = 'SharedFunctionalGroupsSequence', 'PerFrameFunctionalGroupsSequence'  # enhanced objects
FRAME_LOOK = ('PixelValueTransformationSequence', 'FrameVOILUTSequence')
ELEMENTS = [
    *PIXELS, *REQUIRED, SHARED, PER_FRAME, 'NumberOfFrames', 'SamplesPerPixel', 'PlanarConfiguration',
    'BitsStored', 'HighBit', 'PixelRepresentation', 'PixelPaddingValue', 'PixelPaddingRangeLimit',
    'ExtendedOffsetTable', 'ExtendedOffsetTableLengths', 'ModalityLUTSequence', 'RescaleSlope',
    'RescaleIntercept', 'VOILUTSequence', 'WindowCenter', 'WindowWidth', 'VOILUTFunction',
    'PresentationLUTShape',
    *(f'{color}PaletteColorLookupTable{part}' for color in COLORS for part in ('Descriptor', 'Data')),
    *(f'Segmented{color}PaletteColorLookupTableData' for color in COLORS)]
TOO_MANY = 'is a DICOM file with too many elements to be read in a reasonable time'
INSTALL = 'pip install -r requirements-formats.txt'


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are those of a DICOM file, whatever its name, from the first 132 on."""
    return data[MAGIC_START:MAGIC_START + len(MAGIC)] == MAGIC or data[:2] in BARE


def is_dicom_file(path: str | Path) -> bool:
    """Whether a file is DICOM, but for the DICOMDIR of a medium, which lists its files."""
    return Path(path).name.upper() != 'DICOMDIR' and is_dicom(first_bytes(path) or b'')


def decode_dicom(data: bytes, frame: int | None = None) -> np.ndarray:
    """Frame 0, 1, ... in the bytes of a DICOM file, None = the only one: (H, W, C) float32 in [0, 1], C = 1
    gray or 3 RGB, of 16 bits. Raises Unreadable.

    Gray values go through the file's rescale and its first window or lookup table; without one they are
    stretched from the smallest to the largest. Padding around a round image is black.
    """
    with without_words():
        dataset = open_dataset(data)
        frames = dataset.NumberOfFrames
        if frame is None and frames > 1:
            raise Unreadable(f'is a DICOM file of {frames} frames: train with --frames each or middle, or '
                             f'export each as a file of its own')
        if frame and frame >= frames:
            raise Unreadable(f'is a DICOM file of {frames} frames: there is no frame {frame + 1}')
        take_groups(dataset, frame or 0, FRAME_LOOK)
        x = KINDS[dataset.PhotometricInterpretation](dataset, stored_values(dataset, frame or 0))
    if not np.isfinite(x).all():
        raise Unreadable('is a DICOM file with pixels that are not finite')
    return (np.rint(x.clip(0, 1) * FULL) / FULL).astype(np.float32).reshape(*x.shape[:2], -1)


def without_words() -> AbstractContextManager[None]:
    """Raises Unreadable for any error of the library, whose words may hold values of the file."""
    return decoding('is a DICOM file that is damaged or cut off', quoted=False)


def open_dataset(data: bytes, more: Sequence[str] = ()) -> Any:
    """The ELEMENTS, and `more`, of the bytes of a DICOM file, as a pydicom Dataset. Raises Unreadable."""
    if data.count(ITEM) > MOST_ITEMS:
        raise Unreadable(TOO_MANY)
    dataset = read_dataset(io.BytesIO(data), [*ELEMENTS, *more])
    if not any(name in dataset for name in PIXELS):
        raise Unreadable('is a DICOM file without pixel data')
    complete(dataset)
    check_pixels(dataset.Rows * dataset.Columns, len(data))
    dataset.NumberOfFrames = int(number(dataset, 'NumberOfFrames') or 1)
    return dataset


def check_deflated(data: bytes) -> None:
    """Raises Unreadable for a packed file that unpacks to much more than its size: pydicom does it unasked.
    """
    from pydicom.filebase import DicomBytesIO
    from pydicom.filereader import _read_file_meta_info, read_preamble
    file = DicomBytesIO(data)
    read_preamble(file, force=True)
    _read_file_meta_info(file)
    try:
        unpack(data[file.tell():], wbits=-zlib.MAX_WBITS)
    except ValueError as error:
        raise Unreadable(f'is a DICOM file that is meant to exhaust memory: {error}') from None


class Counted:
    """A file of which pydicom, which takes its time over each element, reads a limited number of pieces."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, MOST_READS

    def read(self, *size: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise Unreadable(TOO_MANY)
        return self.file.read(*size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def read_dataset(file: BinaryIO, elements: list[str], **options: Any) -> Any:
    """These elements of a DICOM file, as a pydicom Dataset with a transfer syntax. Raises Unreadable."""
    import pydicom
    from pydicom.config import IGNORE, settings
    start = file.read(MOST_META)
    if DEFLATED in start:
        check_deflated(start + file.read())
    file.seek(0)
    settings.reading_validation_mode = IGNORE            # its warnings would print what the file holds
    dataset = pydicom.dcmread(Counted(file), force=True, specific_tags=elements, **options)
    if not dataset.file_meta.get('TransferSyntaxUID'):
        implicit, little = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian if implicit else
            pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian)
    return dataset


def complete(dataset: Any) -> None:
    """Fills in elements that are absent or empty. Raises Unreadable for pixels of a kind that is not read."""
    if absent := [name for name in REQUIRED if dataset.get(name) in (None, '')]:
        raise Unreadable(f'is a DICOM file without {absent[0]}')
    kind = dataset.PhotometricInterpretation = text(dataset, 'PhotometricInterpretation')
    if kind not in KINDS:
        raise Unreadable(f'is a DICOM file of a kind of color that is not read: {", ".join(KINDS)} are')
    if dataset.BitsAllocated not in ALLOCATED:
        raise Unreadable(f'is a DICOM file of {int(dataset.BitsAllocated)} bits allocated to a value, which '
                         f'are not read')
    pixels = dataset.Rows * dataset.Columns
    if not pixels:
        raise Unreadable('is a DICOM file without pixels: its height or width is 0')
    samples = 1 if kind.startswith('MONOCHROME') or kind == 'PALETTE COLOR' else 3
    usual = {'SamplesPerPixel': samples, 'PlanarConfiguration': 0, 'PixelRepresentation': 0,
             'BitsStored': dataset.BitsAllocated}
    for name, value in usual.items():
        if dataset.get(name) in (None, ''):
            setattr(dataset, name, value)
    if not 0 < dataset.BitsStored <= dataset.BitsAllocated:
        raise Unreadable('is a DICOM file whose BitsStored and BitsAllocated contradict each other')
    if dataset.SamplesPerPixel != samples:
        raise Unreadable('is a DICOM file whose PhotometricInterpretation and SamplesPerPixel contradict '
                         'each other')


def count_frames(path: str | Path) -> int:
    """The frames of a file, 1 if it is no DICOM file or damaged."""
    try:
        if not is_dicom_file(path):
            return 1
        with open(path, 'rb') as file:
            dataset = read_dataset(file, ['NumberOfFrames'], stop_before_pixels=True)
        return int(number(dataset, 'NumberOfFrames') or 1)
    except Exception:                                    # which loading it will name
        return 1


def take_groups(dataset: Any, frame: int, names: Sequence[str]) -> None:
    """Puts what these groups say of a frame of an enhanced object where other objects have it."""
    for groups, index in {SHARED: 0, PER_FRAME: frame}.items():
        for group in (dataset.get(groups) or [])[index:index + 1]:
            for name in names:
                for item in (group.get(name) or [])[:1]:
                    dataset.update(item)


def stored_values(dataset: Any, frame: int) -> np.ndarray:
    """A frame as it is stored, of color as RGB: (H, W) or (H, W, 3). Raises Unreadable without a decoder."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEG2000TransferSyntaxes, JPEGExtended12Bit, RLELossless
    try:
        decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    except NotImplementedError:                          # so pydicom says that it knows no such syntax
        raise Unreadable('is a DICOM file of an unknown transfer syntax') from None
    syntax = decoder.UID
    if not decoder.is_available:
        raise Unreadable(f'is compressed as {syntax.name}, which nothing installed here decodes: {INSTALL}')
    low = unused_low_bits(dataset) if syntax == RLELossless or not syntax.is_encapsulated else 0
    dataset.BitsStored += low                            # pydicom takes them from the lowest bit on
    try:
        values, _ = decoder.as_array(dataset, index=frame)
    except Exception:
        in_part = syntax in (JPEGExtended12Bit, *JPEG2000TransferSyntaxes)     # is what Pillow reads
        if in_part and 'pylibjpeg' not in decoder.available_plugins:
            raise Unreadable(f'is compressed as {syntax.name} in a form that Pillow does not decode: '
                             f'{INSTALL}') from None
        if syntax.is_encapsulated:
            raise Unreadable(f'is compressed as {syntax.name}, and no decoder installed here can read it: it '
                             f'is damaged or cut off, or of an odd form') from None
        raise
    dataset.BitsStored -= low
    return values >> low if low else values


def unused_low_bits(dataset: Any) -> int:
    """How many bits lie below the lowest stored one: HighBit is not always BitsStored - 1."""
    high = dataset.get('HighBit')
    inside = high not in (None, '') and high < dataset.BitsAllocated
    return max(0, high + 1 - dataset.BitsStored) if inside else 0
