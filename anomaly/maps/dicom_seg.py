"""Segmentations of DICOM images as DICOM segmentation objects, by highdicom (requirements-formats.txt).

An object takes over the patient and study of its image, as viewers need them to lay it over the image.
"""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

from anomaly.report.provenance import code_and_date
from readers.dicom import INSTALL, is_dicom, without_words
from readers.source import Unreadable
from utils import UserError, write_atomically

SERIES_NUMBER = 9000               # far from the numbers that machines give
LABEL = 'Anomaly'
# What a segmentation takes over from its image: with a value, or empty where it is unknown.
REQUIRED = ('SOPClassUID', 'SOPInstanceUID', 'StudyInstanceUID', 'SeriesInstanceUID', 'Modality')
ALLOWED_EMPTY = ('PatientID', 'PatientName', 'PatientBirthDate', 'PatientSex', 'StudyDate', 'StudyTime',
                 'StudyID', 'AccessionNumber', 'ReferringPhysicianName')
MAKER = 'Unsupervised anomaly detection'


def check_possible(shape: tuple[int, ...]) -> None:
    """Raises UserError for a model of volumes, shape (C, D, H, W), and without highdicom."""
    if len(shape) != 3:
        raise UserError("--dicom_seg is for images; segmentations of volumes are NIfTI files: leave it out.")
    if not importlib.util.find_spec('highdicom'):
        raise UserError(f"--dicom_seg needs highdicom, which is not installed: {INSTALL}")


def write_segmentation(path: Path, content: bytes, mask: np.ndarray, score: str) -> bool:
    """Writes `mask` (H, W) bool as a segmentation of the DICOM image whose bytes are `content`, on its grid;
    returns False and writes nothing for other files. `score`, whose map it is, and the commit of this code
    are named in it.

    The same image, mask, score and commit give the same identifiers. Raises Unreadable where the image lacks
    what a segmentation has to take over from it, such as its study.
    """
    if not is_dicom(content):
        return False
    with without_words():
        segmentation = segment_image(content, mask, score, code_and_date()['commit'] or 'unknown')
    write_atomically(path, segmentation.save_as)
    return True


def segment_image(content: bytes, mask: np.ndarray, score: str, version: str) -> Any:
    """The object itself: a pydicom Dataset. Raises Unreadable."""
    import pydicom
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes
    image = pydicom.dcmread(io.BytesIO(content), force=True)
    if missing := [name for name in REQUIRED if not image.get(name)]:
        raise Unreadable(f'is a DICOM file without {missing[0]}, which a segmentation needs')
    for name in ALLOWED_EMPTY:
        if name not in image:
            setattr(image, name, '')
    unique = [image.SOPInstanceUID, score, version, np.packbits(mask).tobytes().hex()]
    structure = codes.SCT.MorphologicallyAbnormalStructure
    algorithm = AlgorithmIdentificationSequence(score, codes.DCM.ArtificialIntelligence, version)
    description = SegmentDescription(1, LABEL, structure, structure, 'AUTOMATIC', algorithm)
    return Segmentation(
        [image], mask[None].astype(np.uint8), 'BINARY', [description],
        pydicom.uid.generate_uid(entropy_srcs=[*unique, 'series']), SERIES_NUMBER,
        pydicom.uid.generate_uid(entropy_srcs=[*unique, 'instance']), 1,
        MAKER, score, version, '0', omit_empty_frames=False)
