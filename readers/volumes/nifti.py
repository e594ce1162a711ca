"""NIfTI and other files of volumes: a volume in, on whatever grid is asked for; a map out, on the file's.

X, Y, Z voxels along a file's own axes, K volumes in it; *S voxels of a model's grid, whose axes run to the
right, to the front and upwards (RAS+). An affine (4, 4) takes the index of a voxel to its place in mm.
"""

import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter

from readers.dicom import is_dicom
from readers.paths import file_content
from readers.source import Unreadable, decoding
from readers.volumes.itk import ItkImage, is_itk
from readers.volumes.series import members, read_series
from storage.limits import excess, most_bytes, unpack
from utils import UserError, check_regular, write_atomically

SUFFIXES = ('.nii', '.nii.gz', '.mgh', '.mgz', '.mha', '.nrrd')
AFTER_HEADER = 1 << 20             # bytes that extensions may take between header and voxels
LONGEST_HEADER = 540               # bytes, of NIfTI-2
PACKED = b'\x1f\x8b'               # how gzip files begin
MGH = b'\0\0\0\1'                 # how FreeSurfer's files begin
MGH_START = 90                     # bytes of their header, of which the rest is at the end
IN_MM = {1: 1000.0, 3: 0.001}      # a meter, a micron: NIfTI's codes of units of length; others are mm
SMALLEST_VOLUME = 1e-9             # mm^3 of a voxel, below which an affine is singular


def nibabel() -> ModuleType:
    """The library that reads volumes, which is needed only here. Raises UserError if it is not installed."""
    try:
        import nibabel
    except ImportError:
        raise UserError("volumes need nibabel: pip install -r requirements-medical.txt") from None
    nibabel.imageglobals.logger.disabled = True              # of what is damaged it would speak beside us
    return nibabel


# ------------------------------------------------------------------------------------------------------ grids

@dataclass(frozen=True)
class Grid:
    """Where voxels lie: `shape` (X, Y, Z), and the `affine` (4, 4) from their indices to mm."""
    shape: tuple[int, ...]
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Distance between neighbors along each axis, mm: (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def box(self, start: Sequence[int], shape: Sequence[int]) -> 'Grid':
        """The part, or the surroundings, of this grid: `shape` voxels from index `start` on, even negative.
        """
        shift = np.eye(4)
        shift[:3, 3] = start
        return Grid(tuple(int(n) for n in shape), self.affine @ shift)

    def centered(self, shape: Sequence[int]) -> 'Grid':
        """`shape` voxels around the same center: cut where that is less, padded where it is more."""
        return self.box((np.array(self.shape) - shape) // 2, shape)

    def spaced(self, mm: float | np.ndarray) -> 'Grid':
        """The grid from this first voxel to the last one, `mm` apart: one number, or (3,); 0 = this grid."""
        if not np.any(mm):
            return self
        steps = mm / self.spacing
        shape = ((np.array(self.shape) - 1) / steps + 1e-3).astype(int) + 1
        return Grid(tuple(shape.tolist()), self.affine @ np.diag([*steps, 1]))

    def turned(self, turn: Callable[[np.ndarray], np.ndarray]) -> 'Grid':
        """Where the voxels of a volume lie after `turn`, which turns or mirrors arrays (N, C, *S)."""
        index = np.stack(np.meshgrid(*map(np.arange, self.shape), indexing='ij'))
        index = turn(index[None])[0].astype(float)                              # (3, *S): where it came from
        first, change = index[:, 0, 0, 0], np.eye(4)
        change[:3] = np.stack([index[:, 1, 0, 0] - first, index[:, 0, 1, 0] - first,
                               index[:, 0, 0, 1] - first, first], axis=1)
        return Grid(index.shape[1:], self.affine @ change)

    def as_json(self) -> list:
        return [list(self.shape), self.affine.tolist()]

    @classmethod
    def from_json(cls, value: Sequence) -> 'Grid':
        return cls(tuple(value[0]), np.array(value[1], np.float64))


def resample(values: np.ndarray, source: Grid, target: Grid, order: int = 1, fill: float = 0.0) -> np.ndarray:
    """The volume `values` (X, Y, Z) on `source`, as it is at the voxels of `target`: float32 or its own type.

    Order 1 is linear, after a Gaussian where the target is coarser (sigma half a step less half a voxel, as
    in scikit-image: finer structures would alias); order 0 takes the nearest voxel. `fill` is all around.
    """
    to_source = np.linalg.inv(source.affine) @ target.affine                     # (4, 4), index to index
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    if order:
        sigma = np.maximum(np.linalg.norm(matrix, axis=1) - 1, 0) / 2            # voxels of the source
        if sigma.max() > 1e-3:
            values = gaussian_filter(values, sigma, mode='nearest')
    if np.abs(matrix - np.diag(np.diag(matrix))).max() < 1e-6:
        matrix = np.diag(matrix)                                                 # axis by axis: much faster
    # 'constant' would take a voxel at index -1e-14 for one outside.
    return affine_transform(values, matrix, offset, target.shape, order=order, mode='grid-constant',
                            cval=fill, prefilter=False)


def to_input_grid(values: Any, model: Grid, own: Grid) -> Any:
    """A map (*S) on the grid `model`, as a NIfTI image on the grid `own` of the file: nibabel.save writes it.

    Linear between voxels, or of bool and integers the nearest one, as uint8; 0 where the model saw nothing.
    For an entry of a part: `*entry_grids(entry)`.
    """
    values = np.asarray(values)
    order, dtype = (1, np.float32) if values.dtype.kind == 'f' else (0, np.uint8)
    values = resample(values.astype(dtype), model, own, order)
    image = nibabel().Nifti1Image(values, own.affine)
    image.header.set_xyzt_units('mm')
    return image


def entry_grids(entry: Any) -> tuple[Grid, Grid]:
    """The grid of the model and that of the file, of an entry (readers/source.py) that is a volume."""
    model, own = (Grid.from_json(value) for value in entry.grids)
    return model, own


def spacing(entry: Any) -> np.ndarray:
    """Distance of the voxels that a model sees, mm, or of an image 1: (3,)."""
    return entry_grids(entry)[0].spacing if getattr(entry, 'grids', ()) else np.ones(3)


# ------------------------------------------------------------------------------------------------------ files

def stem(path: str) -> str:
    """A path without the suffix of a volume."""
    return re.sub(rf"({'|'.join(map(re.escape, (*SUFFIXES, '.dcm')))})$", '', path, flags=re.IGNORECASE)


class Nifti(NamedTuple):
    """A file: its volumes (K, X, Y, Z) float32, turned so that the axes of `grid` run RAS; the grid `own` of
    the file; whether that came from the file (`placed`) or was made up of its voxel sizes; how many voxels
    were not finite, and are 0; hash and size of the file.
    """
    values: np.ndarray
    grid: Grid
    own: Grid
    placed: bool
    repaired: int
    sha256: str
    num_bytes: int


def read_nifti(path: str | Path, like: Nifti | None = None) -> Nifti:
    """A file of a volume, packed or not, by its content, or a folder of DICOM slices. Raises Unreadable.

    A file that does not say where it lies takes the place of `like`, where that has the same shape.
    """
    nib = nibabel()
    contents = [file_content(file, most_bytes()) for file in members(path)]
    with decoding():
        if is_dicom(contents[0]):
            image = nib.Nifti1Image(*read_series(contents))
        elif is_itk(path, content := _unpacked(contents[0])):
            image = ItkImage(path, content)
        else:
            image = _kind(content).from_bytes(content)
        _expect_volume(image)
        values = np.asarray(image.dataobj, np.float32)
    values = values.reshape(*values.shape[:3], -1)                                       # (X, Y, Z, K)
    affine, placed = _place(image)
    own = Grid(values.shape[:3], affine)
    if not placed and like and like.own.shape == own.shape:
        own, placed = like.own, like.placed
    whole = np.isfinite(own.affine).all() and abs(np.linalg.det(own.affine[:3, :3])) >= SMALLEST_VOLUME
    turn = nib.io_orientation(own.affine) if whole else np.full((3, 2), np.nan)
    if np.isnan(turn).any():                     # or axes of such different lengths that one gets lost
        raise Unreadable('has a singular affine: its voxels lie in no space. Set its sform or qform')
    values = nib.apply_orientation(values, turn)
    affine = own.affine @ nib.orientations.inv_ornt_aff(turn, own.shape)
    finite = np.isfinite(values)
    repaired = values.size - int(finite.sum())
    values = np.where(finite, values, np.float32(0)) if repaired else values
    digest = hashlib.sha256()
    for data in contents:
        digest.update(data)
    return Nifti(np.moveaxis(values, -1, 0), Grid(values.shape[:3], affine), own, placed, repaired,
                 digest.hexdigest(), sum(map(len, contents)))


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    """Writes (X, Y, Z) or (X, Y, Z, K) as a packed file, atomically; equal values make equal bytes."""
    image = nibabel().Nifti1Image(values, affine)
    data = gzip.compress(image.to_bytes(), 6, mtime=0)       # the time in the header would make files differ
    write_atomically(path, lambda p: p.write_bytes(data))


def read_start(path: str | Path) -> tuple[bytes, bool]:
    """The start of a file, unpacked, with its header; whether it is packed. Raises OSError, UserError."""
    check_regular(path)
    with open(path, 'rb') as file:
        packed = file.read(2) == PACKED
    with (gzip.open if packed else open)(path, 'rb') as file:
        return file.read(LONGEST_HEADER), packed


def unit_of(header: Any) -> float:
    """The unit of length of a NIfTI header, in mm."""
    return IN_MM.get(int(header['xyzt_units']) & 7, 1.0)


def _place(image: Any) -> tuple[np.ndarray, bool]:
    """The affine (4, 4) of a file in mm, and whether the file gives it."""
    affine, header = np.array(image.affine, np.float64), getattr(image, 'header', {})
    if 'xyzt_units' in header:
        affine[:3] *= unit_of(header)
        return affine, bool(header['sform_code'] > 0 or header['qform_code'] > 0)
    return affine, bool(header['goodRASFlag'] > 0) if 'goodRASFlag' in header else True


def _kind(start: bytes) -> Any:
    """The class of images with this start."""
    nib = nibabel()
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        if kind.header_class.may_contain_header(start[:LONGEST_HEADER]):
            return kind
    if start[:4] == MGH:
        return nib.MGHImage
    raise Unreadable(f"is not a NIfTI file, nor another of {', '.join(SUFFIXES)}")


def header_of(start: bytes) -> Any:
    """The header in the first LONGEST_HEADER bytes of a NIfTI or MGH file."""
    kind = _kind(start).header_class
    length = kind.template_dtype.itemsize
    return kind(start[:MGH_START].ljust(length, b'\0') if start[:4] == MGH else start[:length])


def _unpacked(data: bytes) -> bytes:
    if not data:
        raise Unreadable('is empty (0 bytes)')
    if data[:2] != PACKED:
        return data
    with decoding('is cut off or damaged'):
        start = zlib.decompressobj(zlib.MAX_WBITS + 32).decompress(data, LONGEST_HEADER)
        return unpack(data, AFTER_HEADER + (_claim(start) if len(start) == LONGEST_HEADER else 0))


def _claim(start: bytes) -> int:
    """The bytes of the voxels after this header. Raises Unreadable if they are more than --max_gb allows."""
    header = header_of(start)
    voxels = math.prod(int(n) for n in header.get_data_shape())
    if words := excess(max(4, header.get_data_dtype().itemsize) * voxels):
        raise Unreadable(words)
    return header.get_data_dtype().itemsize * voxels


def _expect_volume(image: Any) -> None:
    """Raises Unreadable unless this is one volume of numbers, or several along one further axis."""
    shape = tuple(int(n) for n in image.shape)
    if len(shape) < 3 or sum(n > 1 for n in shape[3:]) > 1 or min(shape) < 1:
        raise Unreadable(f'has the shape {shape}: expected (X, Y, Z), or one more axis of channels')
    if words := excess(max(4, image.get_data_dtype().itemsize) * math.prod(shape)):
        raise Unreadable(words)
    if image.get_data_dtype().kind not in 'iuf':
        raise Unreadable(f'has voxels of type {image.get_data_dtype()}: expected numbers')
