"""MetaImage (.mha) and NRRD (.nrrd), by SimpleITK, whose world runs to the left and the back (LPS)."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from readers.source import Unreadable
from utils import UserError

IMAGE_IO = {b'NRRD': 'NrrdImageIO'}            # by how a file begins; else what suffix .mha says
# Lines of a header, which ends at an empty line or with LOCAL, that name another file of voxels.
ELSEWHERE = re.compile(rb'^(ElementDataFile\s*=(?!\s*local\s*$)|data ?file\s*:)',
                       re.IGNORECASE | re.MULTILINE)
TO_RAS = np.diag([-1.0, -1, 1, 1])


def simpleitk() -> ModuleType:
    """The library. Raises UserError if it is not installed."""
    try:
        import SimpleITK
    except ImportError:
        raise UserError(".mha and .nrrd files need SimpleITK: pip install -r "
                        "requirements-formats.txt") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def is_itk(path: str | Path, start: bytes) -> bool:
    """Whether the file with these first bytes is one of these."""
    return start[:4] in IMAGE_IO or (str(path).lower().endswith('.mha') and b'=' in start)


class ItkImage:
    """A file of which the header is read: `shape` (X, Y, Z) with one more axis of channels, if there are
    several, and `affine` (4, 4) from the index of a voxel to mm, RAS+.
    """

    def __init__(self, path: str | Path, start: bytes):
        """Raises Unreadable, UserError."""
        if ELSEWHERE.search(re.split(rb'\r?\n\r?\n', start, maxsplit=1)[0]):
            raise Unreadable('keeps its voxels in another file: save header and voxels as one file')
        self.reader = simpleitk().ImageFileReader()
        self.reader.SetImageIO(IMAGE_IO.get(start[:4], 'MetaImageIO'))
        self.reader.SetFileName(str(path))
        try:
            self.reader.ReadImageInformation()
        except RuntimeError:                                       # several lines, with places in ITK's code
            raise Unreadable('cannot be decoded (its header is damaged)') from None
        components = self.reader.GetNumberOfComponents()
        self.shape = (*self.reader.GetSize(), *[components] * (components > 1))
        self.spacing = np.array(self.reader.GetSpacing())
        directions = np.array(self.reader.GetDirection()).reshape(len(self.spacing), -1)
        self.affine = np.eye(4)
        self.affine[:3, :3] = (directions * self.spacing)[:3, :3]
        self.affine[:3, 3] = self.reader.GetOrigin()[:3]
        self.affine = TO_RAS @ self.affine

    def get_data_dtype(self) -> np.dtype:
        """The type of a voxel."""
        sitk = simpleitk()
        scalar = sitk.Image([1, 1], self.reader.GetPixelID(), self.reader.GetNumberOfComponents())
        return sitk.GetArrayViewFromImage(scalar).dtype

    @property
    def dataobj(self) -> Any:
        """The voxels, in the order of `shape`. Raises RuntimeError."""
        sitk = simpleitk()
        values = sitk.GetArrayFromImage(self.reader.Execute())     # (Z, Y, X), channels last
        axes = len(self.reader.GetSize())
        return values.transpose([*range(axes)[::-1], *range(axes, values.ndim)])
