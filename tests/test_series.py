"""DICOM slices and frames as volumes: the same as in a NIfTI file, and why a stack is refused."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pytest import approx
from test_dicom import as_bytes, made
from test_volumes import fails, noise

from audit.headers import read_file_header
from datasets import DATASETS, DataConfig, load_data
from readers.source import Unreadable
from readers.volumes.nifti import read_nifti
from readers.volumes.volumes import VolumeLoader
from utils import UserError

TURN = np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]])           # its rows: rows, columns, normal (LPS)
SIZE = np.array([2.0, 3.0, 4.0])                                      # mm along them
PLACE = np.array([10.0, -20.0, 30.0])
HU = {'RescaleSlope': 2, 'RescaleIntercept': -1024}


def stored(shape=(4, 5, 3)):
    return np.random.default_rng(0).integers(0, 2000, shape)          # (X, Y, Z)


def place(at=0.0, aside=0.0):
    """Elements of a slice at this place along the normal, in steps."""
    return {'ImagePositionPatient': (PLACE + at * SIZE[2] * TURN[2] + aside * TURN[0]).tolist(),
            'ImageOrientationPatient': TURN[:2].ravel().tolist(), 'PixelSpacing': [SIZE[1], SIZE[0]]}


def write(folder, slices):
    """Slices (X, Y) with their elements, in files whose names do not say their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (values, elements) in enumerate(slices):
        data = as_bytes(made(values.T, **{'SeriesInstanceUID': '1.2'} | HU | elements))
        (folder / f'IM{(number * 7) % 5}').write_bytes(data)
    return folder


def as_nifti(path, values):
    """The same as one file, whose world runs right and front (RAS)."""
    affine = np.eye(4)
    affine[:3] = np.column_stack([*(TURN * SIZE[:, None]), PLACE])
    nib.save(nib.Nifti1Image((2 * values - 1024).astype(np.float32), np.diag([-1, -1, 1, 1]) @ affine), path)
    return read_nifti(path)


def same(a, b):
    assert a.placed and np.array_equal(a.values, b.values)
    assert a.grid.affine == approx(b.grid.affine, abs=1e-4) and a.own.affine == approx(b.own.affine, abs=1e-4)


@pytest.mark.parametrize('axes', [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_slices_in_a_folder_are_the_volume_of_a_nifti_file(axes, tmp_path, monkeypatch):
    monkeypatch.setattr('test_series.TURN', TURN[list(axes)])              # axial, sagittal, coronal slices
    x = stored()
    folder = write(tmp_path / 'ct', [(x[..., k], place(k)) for k in (2, 0, 1)])
    (folder / 'notes.txt').write_text('none of them')
    same(read_nifti(folder), as_nifti(tmp_path / 'ct.nii', x))
    assert read_file_header(folder).format == 'DICOM'


def test_padding_is_as_dark_as_the_darkest_voxel(tmp_path):
    x = stored()
    x[0] = 3000
    folder = write(tmp_path / 'ct', [(x[..., k], place(k) | {'PixelPaddingValue': 3000}) for k in range(3)])
    assert read_nifti(folder).values.max() <= 2 * 2000 - 1024
    assert read_nifti(folder).values.min() == 2 * x[1:].min() - 1024


def enhanced(path, x):
    """The volume (X, Y, Z) as one file of frames, which are out of order."""
    def sequence(*names, **elements):
        item = pydicom.Dataset()
        for name in names:
            setattr(item, name, elements.pop(name))
        return [item]

    shared = sequence('PlaneOrientationSequence', 'PixelMeasuresSequence', 'PixelValueTransformationSequence',
                      PlaneOrientationSequence=sequence('ImageOrientationPatient', **place()),
                      PixelMeasuresSequence=sequence('PixelSpacing', **place()),
                      PixelValueTransformationSequence=sequence(*HU, **HU))
    frames = [sequence('PlanePositionSequence', PlanePositionSequence=sequence(
        'ImagePositionPatient', **place(k)))[0] for k in (1, 0, 2)]
    data = made(x[..., 1].T, SharedFunctionalGroupsSequence=shared, PerFrameFunctionalGroupsSequence=frames,
                NumberOfFrames=3)
    data.PixelData = np.concatenate([x[..., k].T.ravel() for k in (1, 0, 2)]).astype('<u2').tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_bytes(data))


def test_frames_of_an_enhanced_file_are_a_volume(tmp_path):
    x = stored()
    enhanced(tmp_path / 'a.dcm', x)
    same(read_nifti(tmp_path / 'a.dcm'), as_nifti(tmp_path / 'a.nii', x))


@pytest.mark.parametrize('places, words', [
    ([place(k) for k in (0, 1, 2, 4)], 'lacks a DICOM slice: they are 4 mm apart, two of them 8 mm'),
    ([place(k) for k in (0, 1, 1)], 'several DICOM slices at one place'),
    ([place(k) for k in (0, 1, 2, 2.5)], 'unevenly apart, 2 to 4 mm'),
    ([place(k, aside=0.5 * k) for k in range(3)], 'tilted gantry: .* moves by 0.5 mm'),
    ([place(0), place(1) | {'SeriesInstanceUID': '3.4'}], 'holds 2 DICOM series'),
    ([place(0), place(1) | {'PixelSpacing': [1, 1]}], 'different sizes, spacings or directions'),
    ([place(0)], 'a single DICOM slice'),
    ([place(0), place(1) | {'PixelSpacing': None}], 'without PixelSpacing'),
])
def test_slices_that_are_no_straight_stack_are_refused(places, words, tmp_path):
    folder = write(tmp_path / 'ct', [(stored()[..., 0], elements) for elements in places])
    with pytest.raises(Unreadable, match=words):
        read_nifti(folder)


def test_series_are_subjects_in_training_and_prediction(tmp_path):
    root = tmp_path / 'data'
    for number in range(3):
        x = (1000 * noise((4, 5, 3), seed=number)).clip(0).astype(int)
        write(root / 'normal' / f'p{number}', [(x[..., k], place(k)) for k in range(3)])
    (root / 'normal' / 'p0' / 'notes.txt').touch()
    config = DataConfig(dataset='brain', data=str(root), cache_dir=str(tmp_path / 'cache'), val_fraction=0,
                        test_fraction=0, pad_multiple=1)
    fails(config, '--dicom_series reads DICOM too')
    config = DataConfig(**vars(config) | {'dicom_series': True})
    data = load_data(config)
    assert [entry.id for entry in data.train.entries] == [f'normal/p{number}' for number in range(3)]
    assert any('passed over: files of other kinds (1, such as normal/p0/notes.txt)' in line
               for line in data.report)
    loader = VolumeLoader.of(config, DATASETS['brain'])
    assert list(loader.find(root / 'normal').files) == ['p0', 'p1', 'p2']
    assert list(loader.find(root / 'normal' / 'p1').files) == ['p1']


def subjects(root, **options):
    config = DataConfig(dataset='brain', data=str(root), cache_dir=str(root.parent / 'cache'), val_fraction=0,
                        test_fraction=0, pad_multiple=1, **{'dicom_series': True} | options)
    return {entry.id: entry for entry in load_data(config).train.entries}


def test_a_folder_with_one_enhanced_file_is_a_subject(tmp_path):
    """Devices name such a file by its UID, so that no flag could name it as a channel."""
    for number in range(3):
        enhanced(tmp_path / 'data' / 'normal' / f'p{number}' / f'1.2.{number}.dcm', stored())
    write(tmp_path / 'data' / 'normal' / 'p3', [(stored()[..., k], place(k)) for k in range(3)])
    enhanced(tmp_path / 'data' / 'normal' / 'p4' / 'seg.dcm', stored())
    assert list(subjects(tmp_path / 'data')) == [f'normal/p{number}' for number in range(4)]
    with pytest.raises(UserError, match=r'no .*nii.* --dicom_series reads DICOM too'):
        subjects(tmp_path / 'data', dicom_series=False)
    enhanced(tmp_path / 'data' / 'normal' / 'p1' / 'other.dcm', stored())
    with pytest.raises(UserError, match=r'p0/1.2.0 lies .* --modalities, or leave one DICOM file of several'):
        subjects(tmp_path / 'data')


@pytest.mark.parametrize('files, modalities', [
    (('{}.dcm',), ()), (('t1/{}.dcm',), ('t1',)), (('{}/t1.dcm',), ('t1',)), (('{}/t1/1.2.dcm',), ('t1',)),
    (('{0}/t1/{0}.dcm', '{0}/flair/1.2.dcm'), ('t1', 'flair')),
    (('{}/t1.dcm', '{}/flair.dcm'), ('t1', 'flair')),
])
def test_enhanced_files_in_the_layouts_of_volumes(files, modalities, tmp_path):
    for name in ('a', 'b'):
        for file in files:
            enhanced(tmp_path / 'data' / file.format(name), stored())
    assert list(subjects(tmp_path / 'data', modalities=modalities)) == ['a', 'b']


def test_a_subject_keeps_the_name_of_its_files_in_folders_of_channels(tmp_path):
    for folder in ('t1', 'flair'):
        enhanced(tmp_path / 'data' / folder / 'a.dcm', stored())
    assert list(subjects(tmp_path / 'data', modalities=('t1', 'flair'))) == ['a']


def test_frames_beside_slices_are_another_series(tmp_path):
    folder = write(tmp_path / 'data' / 'p0', [(stored()[..., k], place(k)) for k in range(3)])
    enhanced(folder / 'localizer.dcm', stored())
    with pytest.raises(UserError, match=r'p0 .*holds 2 DICOM series'):
        subjects(tmp_path / 'data')
