"""Segmentations of DICOM images as DICOM objects: their pixels, what they refer to, when there is none."""

import highdicom
import numpy as np
import pytest
from pydicom import dcmread
from test_dicom import as_bytes, made

from anomaly.maps.dicom_seg import check_possible, write_segmentation
from readers.source import Unreadable
from utils import UserError

MASK = np.arange(12).reshape(3, 4) % 5 == 1
COMPLETE = {'StudyInstanceUID': '1.2.3', 'SeriesInstanceUID': '1.2.3.1', 'Modality': 'DX'}


def test_a_viewer_finds_the_pixels_by_the_image(tmp_path):
    image = as_bytes(made(np.zeros((3, 4)), **COMPLETE))
    assert write_segmentation(tmp_path / 'a.dcm', image, MASK, 'residual_top')
    found = highdicom.seg.segread(tmp_path / 'a.dcm')
    pixels = found.get_pixels_by_source_instance([dcmread(tmp_path / 'a.dcm').ReferencedSeriesSequence[0]
                                                  .ReferencedInstanceSequence[0].ReferencedSOPInstanceUID])
    assert np.array_equal(pixels[0, ..., 0] > 0, MASK)
    assert (found.Modality, found.StudyInstanceUID, found.PatientID) == ('SEG', '1.2.3', 'SECRET-17')
    assert found.SeriesInstanceUID != '1.2.3.1'
    segment, = found.SegmentSequence
    assert segment.SegmentLabel == 'Anomaly' and segment.SegmentAlgorithmName == 'residual_top'


def test_the_same_segmentation_has_the_same_identifiers_and_another_has_others(tmp_path):
    image = as_bytes(made(np.zeros((3, 4)), **COMPLETE))
    identifiers = []
    for number, mask in enumerate((MASK, MASK, ~MASK, np.zeros_like(MASK))):     # the last is empty
        write_segmentation(tmp_path / f'{number}', image, mask, 'residual_top')
        identifiers.append(dcmread(tmp_path / f'{number}').SOPInstanceUID)
    assert identifiers[0] == identifiers[1] and len(set(identifiers)) == 3
    assert not dcmread(tmp_path / '3').pixel_array.any()


@pytest.mark.parametrize('name', COMPLETE)
def test_an_image_without_its_study_has_none_and_says_why(name, tmp_path):
    image = as_bytes(made(np.zeros((3, 4)), **{key: value for key, value in COMPLETE.items() if key != name}))
    with pytest.raises(Unreadable, match=f'without {name}'):
        write_segmentation(tmp_path / 'a.dcm', image, MASK, 'residual_top')
    assert not write_segmentation(tmp_path / 'a.dcm', b'no DICOM', MASK, 'residual_top')
    assert not [*tmp_path.iterdir()]


def test_volumes_have_none():
    with pytest.raises(UserError, match='NIfTI'):
        check_possible((1, 8, 8, 8))
