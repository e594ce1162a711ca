"""What the file of an image gives away before anybody looks at the picture: format, size, depth, encoder.

Read from the header alone, without decoding: two hospitals whose images look alike may still have saved them
by different programs.
"""

import math
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin

from readers.dicom import complete, is_dicom, read_dataset
from readers.images.decode import FORMATS
from readers.paths import first_bytes
from readers.volumes.itk import IMAGE_IO, ItkImage, is_itk
from readers.volumes.nifti import MGH, SUFFIXES, header_of, read_start, unit_of
from readers.volumes.series import members
from utils import UserError, check_regular

ZLIB_LEVELS = ('0 or 1', '2 to 5', '6', '7 to 9')      # RFC 1950, FLEVEL: what a compressor says
PNG_COLORS = {0: 'gray', 2: 'color', 3: 'palette', 4: 'gray with transparency',
               6: 'color with transparency'}
PNG_IMAGE = ('IHDR', 'PLTE', 'tRNS', 'IDAT')           # chunks of the picture; others are the program's
MODES = {'1': '1-bit gray', 'L': '8-bit gray', 'I': '32-bit gray', 'F': 'float', 'P': 'palette',
         'RGB': '8-bit color', 'RGBA': '8-bit color with transparency', 'CMYK': '8-bit CMYK'}
SAMPLINGS = {0: '4:4:4', 1: '4:2:2', 2: '4:2:0'}
SOFTWARE = 305                                         # TIFF and EXIF tag
MOST_SIGNS = 40                                        # of the name of a program
# Mean of the luminance table of ITU-T T.81, K.1, at which the Independent JPEG Group's quality is 50.
MEAN_QUANTIZATION = 57.625
DICOM = ['Rows', 'Columns', 'BitsAllocated', 'BitsStored', 'SamplesPerPixel', 'PhotometricInterpretation']


@dataclass(frozen=True)
class Header:
    """The header of one image file. `quality` is JPEG's, 1 to 100, estimated; NaN where there is none."""
    format: str               # 'PNG'
    width: int                # pixels
    height: int
    pixels: str               # '8-bit gray'
    encoder: str              # what tells one program from another: 'compression 6, with gAMA'
    quality: float = math.nan
    depth: int = 0            # of a volume, voxels along the third axis of the file
    spacing: str = ''         # and their size: '1 x 1 x 3 mm'

    @property
    def size(self) -> str:
        return f'{self.width} x {self.height}' + f' x {self.depth}' * bool(self.depth)


def read_file_header(path: str | Path) -> Header:
    """The header of a PNG, JPEG, TIFF, BMP, DICOM or NIfTI file. Raises UserError naming a damaged one."""
    try:
        if str(path).lower().endswith(SUFFIXES):
            return _volume(path)
        path = members(path)[0]                        # of a folder of DICOM slices the first
        check_regular(path)
        if is_dicom(first_bytes(path) or b''):
            return _dicom(path)
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter('ignore')            # of odd metadata: that is what is looked for
            pixels, encoder, quality = READERS[image.format](image, Path(path))
            return Header(image.format, image.width, image.height, pixels, encoder, quality)
    except Exception as error:                         # a damaged file can mislead Pillow into any of them
        raise UserError(f"the header of {path} cannot be read ({str(error) or type(error).__name__}): "
                        f"replace or remove the file.") from None


def _png(image: Image.Image, path: Path) -> tuple[str, str, float]:
    chunks, level = [], ''
    with path.open('rb') as file:
        file.seek(8)
        while not level:                               # up to the picture itself
            length, kind = struct.unpack('>I4s', file.read(8))
            name = kind.decode('latin-1')
            chunks.append(name)
            data = file.read(2 if name == 'IDAT' else length)
            if name == 'IHDR':
                depth, color, interlaced = data[8], data[9], data[12]
            if name == 'IDAT':
                level = ZLIB_LEVELS[data[1] >> 6]
            file.seek(4, 1)                            # its checksum
    pixels = f'{depth}-bit {PNG_COLORS.get(color, "")}'
    extra = list(dict.fromkeys(c for c in chunks if c not in PNG_IMAGE))
    return pixels, _words(f'compression {level}', interlaced and 'interlaced', extra), math.nan


def _jpeg(image: Image.Image, path: Path) -> tuple[str, str, float]:
    table = next(iter(image.quantization.values()))
    # The tables of quality q are those of 50, times 50 / q below it and times 2 - q / 50 above it.
    scale = float(np.mean(table)) / MEAN_QUANTIZATION
    quality = float(np.clip(50 / scale if scale > 1 else 100 - 50 * scale, 1, 100))
    sampling = SAMPLINGS.get(JpegImagePlugin.get_sampling(image), 'no subsampling')
    progressive = 'progressive' if image.info.get('progressive') else 'baseline'
    extra = [name for name in ('exif', 'icc_profile', 'adobe', 'comment', 'jfif') if name in image.info]
    return MODES.get(image.mode, image.mode), _words(f'{sampling}, {progressive}', _software(image),
                                                     extra), quality


def _other(image: Image.Image, path: Path) -> tuple[str, str, float]:
    pixels = '16-bit gray' if image.mode.startswith('I;16') else MODES.get(image.mode, image.mode)
    compression = str(image.info.get('compression', 'raw'))
    return pixels, _words(f'compression {compression}', _software(image), []), math.nan


def _dicom(path: str | Path) -> Header:
    try:
        with open(path, 'rb') as file:
            header = read_dataset(file, DICOM, stop_before_pixels=True)             # nothing of a patient
        complete(header)
        return Header('DICOM', header.Columns, header.Rows, f'{header.BitsStored}-bit '
                     f'{header.PhotometricInterpretation}', header.file_meta.TransferSyntaxUID.name)
    except Exception:                                  # its words may hold values of the file
        raise ValueError('a damaged DICOM file') from None


def _volume(path: str | Path) -> Header:
    start, packed = read_start(path)
    unit, program = 1.0, ''
    if is_itk(path, start):
        image = ItkImage(path, start)
        kind, shape, spacing = 'NRRD' if start[:4] in IMAGE_IO else 'MetaImage', image.shape, image.spacing
        dtype = image.get_data_dtype()
    else:
        header = header_of(start)
        kind, shape, spacing = 'MGH', header.get_data_shape(), header.get_zooms()
        dtype = header.get_data_dtype()
        if start[:4] != MGH:
            kind, unit = 'NIfTI, packed' if packed else 'NIfTI', unit_of(header)
            program = bytes(header['descrip'].item()).decode('latin-1')
    # Numbers are of the scan (echo time, hour), not of the program.
    program = ' '.join(re.sub(r'\d+(\.\d+)?', '#', program).split())[:MOST_SIGNS] or 'no program named'
    width, height, depth = (int(n) for n in shape[:3])
    return Header(kind, width, height, f'{dtype} values', program, depth=depth,
                  spacing=' x '.join(f'{step * unit:.3g}' for step in spacing[:3]) + ' mm')


READERS = {'PNG': _png, 'JPEG': _jpeg, 'TIFF': _other, 'BMP': _other}


def _software(image: Image.Image) -> str:
    """The program that says it has written the file."""
    return ' '.join(str(image.getexif().get(SOFTWARE, '')).split())[:MOST_SIGNS]


def _words(first: str, second: str, extra: list[str]) -> str:
    return ', '.join([first, *([second] if second else []), *([f"with {' '.join(extra)}"] if extra else [])])
