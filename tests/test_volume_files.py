"""Which files of volumes are whose, in the layouts and formats of the field; their units and key files."""

import sys

import nibabel as nib
import numpy as np
import pytest
from pytest import approx
from test_volumes import fails, noise

from audit.headers import read_file_header
from datasets import DataConfig, load_data
from readers.source import Unreadable
from readers.volumes.nifti import read_nifti
from readers.volumes.subjects import owner
from utils import UserError, read_text

AFFINE = np.diag([2.0, 3, 4, 1])


def save(path, values=None, affine=AFFINE, unit='mm'):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(noise() if values is None else values, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


@pytest.fixture
def config(tmp_path):
    return DataConfig(dataset='brain', data=str(tmp_path / 'data'), cache_dir=str(tmp_path / 'cache'),
                      val_fraction=0, test_fraction=0, pad_multiple=1)


def ids(config, part='train', **flags):
    data = load_data(DataConfig(**vars(config) | flags))
    return [entry.id for entry in getattr(data, part).entries]


# ------------------------------------------------------------------------------------------------------ names

@pytest.mark.parametrize('path, found', [
    ('BraTS-GLI-00000-000-t1n.nii.gz', ('BraTS-GLI-00000-000', 't1n')),             # BraTS 2023
    ('IXI002-Guys-0828-T1N.nii.gz', ('IXI002-Guys-0828', 't1n')),                   # IXI
    ('sub-01/anat/sub-01_t1n.nii', ('sub-01/anat/sub-01', 't1n')),                  # BIDS
    ('bert/mri/t1n.mgz', ('bert/mri', 't1n')),                                      # FreeSurfer
    ('imagesTr/s1.nii.gz', ('s1', '')), ('labelsTr/s1.nii.gz', ('s1', 'labelsTr')),
    ('s1-t1.nrrd', ('s1-t1', '')), ('_t1n.mha', ('_t1n', ''))])
def test_the_channel_of_a_file(path, found):
    assert owner(path, ['t1n', 'labelsTr']) == found


@pytest.mark.parametrize('label', ['s0_seg', 's0-GT', 's0_lesions', 'x/s0_brain_mask', 'labels/s0',
                                   'labelsTs/s0', 's0_dseg', 'x/seg'])
def test_label_files_are_no_subjects(label, config, tmp_path):
    save(tmp_path / 'data' / 's0.nii.gz')
    save(tmp_path / 'data' / f'{label}.nii.gz')
    assert ids(config) == ['s0']
    (tmp_path / 'data' / 's0.nii.gz').unlink()
    fails(config, 'holds no .nii, .* file of a volume')


def test_files_that_only_sound_like_labels_are_subjects(config, tmp_path):
    for seed, name in enumerate(['lesion/p_1_2_3', 'normal/massegment', 'normal/seg_1']):
        save(tmp_path / 'data' / f'{name}.nii.gz', noise(seed=seed))
    assert ids(config) == ['normal/massegment', 'normal/seg_1']
    assert ids(config, 'test') == ['lesion/p_1_2_3']


def test_channels_and_labels_of_the_field(config, tmp_path):
    """BraTS 2023; and the decathlon, whose channels lie in one file."""
    label = np.zeros((6, 7, 8), np.uint8)
    for k in range(2):
        for channel in ('t1n', 't2f', 'seg'):
            save(tmp_path / 'data' / f's{k}' / f's{k}-{channel}.nii.gz', label if channel == 'seg' else None)
        save(tmp_path / 'msd' / 'imagesTr' / f's{k}.nii.gz', noise((6, 7, 8, 2)))
        save(tmp_path / 'msd' / 'labelsTr' / f's{k}.nii.gz', label)
    two = {'modalities': ('t1n', 't2f')}
    for flags in (two | {'labels': 'seg'},
                  two | {'labels': 'labelsTr', 'data': str(tmp_path / 'msd')}):
        data = load_data(DataConfig(**vars(config) | flags))
        assert data.shape[0] == 2 and all(e.mask_row >= 0 for e in data.train.entries)
        assert len(data.train) == 2


def test_when_no_subject_is_normal_patches_are_the_way(config, tmp_path):
    save(tmp_path / 'data' / 's0.nii.gz')
    save(tmp_path / 'data' / 's0_seg.nii.gz', np.ones((6, 7, 8), np.uint8))
    fails(DataConfig(**vars(config) | {'labels': 'seg'}),
          r'none of the 1 subject is normal.*--lesion_load.*healthy patches.*cut_patches\.py')


# -------------------------------------------------------------------------------------------------- key files

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le'])
@pytest.mark.parametrize('name', ['train_keys.txt', 'abcd-train.txt', 'Train.txt'])
def test_key_files_of_any_encoding_and_name(encoding, name, config, tmp_path):
    for k in range(3):
        save(tmp_path / 'data' / f'sü{k}.nii.gz', noise((6, 7, 8, 1, 2)))
    (tmp_path / 'data' / 'abcd-test.txt').write_text('sü2\n', 'utf-8')
    (tmp_path / 'data' / 'README.txt').write_text('no key file\n')
    (tmp_path / 'data' / name).write_bytes('sü1\r\n\r\ns_ü0.nii.gz\r\n'.encode(encoding))
    flags = {'modalities': ('t1', 't2')}
    if encoding == 'utf-16-le':                                                           # without its mark
        return fails(DataConfig(**vars(config) | flags), f'{name} is no text in UTF-8')
    assert ids(config, **flags) == ['sü0', 'sü1'] and ids(config, 'test', **flags) == ['sü2']
    return None


def test_a_key_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match='cannot be read'):
        read_text(tmp_path / 'none')


# ---------------------------------------------------------------------------------------------------- formats

@pytest.mark.parametrize('unit, times', [('micron', 1000), ('meter', 1e-3), ('mm', 1), ('unknown', 1)])
def test_units_of_length(unit, times, tmp_path):
    path = save(tmp_path / 'a.nii.gz', affine=np.diag([2.0 * times, 3 * times, 4 * times, 1]), unit=unit)
    assert read_nifti(path).grid.spacing == approx([2, 3, 4])
    assert read_file_header(path).spacing == '2 x 3 x 4 mm'


@pytest.mark.parametrize('suffix', ['mgh', 'mgz'])
def test_files_of_freesurfer(suffix, tmp_path):
    affine = np.array([[-2.0, 0, 0, 10], [0, 0, 4, 20], [0, -3, 0, 30], [0, 0, 0, 1]])
    nib.save(nib.MGHImage(noise(), affine), tmp_path / f'a.{suffix}')
    nib.save(nib.Nifti1Image(noise(), affine), tmp_path / 'a.nii')
    a, b = read_nifti(tmp_path / f'a.{suffix}'), read_nifti(tmp_path / 'a.nii')
    assert np.array_equal(a.values, b.values) and a.placed
    assert a.grid.affine == approx(b.grid.affine, abs=1e-4)
    header = read_file_header(tmp_path / f'a.{suffix}')
    assert (header.format, header.size, header.spacing) == ('MGH', '6 x 7 x 8', '2 x 3 x 4 mm')


ITK = {    # 2 x 1 x 2 voxels, of 2, 3 and 4 mm, from (10, 20, 30) on in ITK's world, left and back of it
    'a.mha': 'ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n'
             'TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 10 20 30\nElementSpacing = 2 3 4\n'
             'DimSize = 2 1 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n',
    'a.nrrd': 'NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 1 2\n'
              'space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\nendian: little\n'
              'encoding: raw\n\n'}


@pytest.mark.parametrize('name', ITK)
def test_metaimage_and_nrrd(name, tmp_path):
    pytest.importorskip('SimpleITK')
    (tmp_path / name).write_bytes(ITK[name].encode() + np.array([1, 2, 3, 4], '<i2').tobytes())
    read = read_nifti(tmp_path / name)
    # The first voxel lies at x = -10 in mm to the right, the second at -12: turned, it comes first.
    assert read.values.ravel().tolist() == [2, 4, 1, 3]
    assert read.grid.affine == approx(np.array([[2, 0, 0, -12], [0, 3, 0, -20], [0, 0, 4, 30], [0, 0, 0, 1]]))
    assert read_file_header(tmp_path / name).size == '2 x 1 x 2'
    (tmp_path / name).write_bytes(ITK[name].encode())
    with pytest.raises(Unreadable, match='cannot be decoded'):
        read_nifti(tmp_path / name)


def test_a_damaged_header_is_one_line(tmp_path, caplog):
    data = bytearray(nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)).to_bytes())
    data[:4], data[70:72] = bytes(4), b'\x0f\x27'               # the length of the header, the type of voxels
    (tmp_path / 'a.nii').write_bytes(data)
    with pytest.raises(Unreadable, match=r'cannot be decoded \(data code 9999 not recognized\)'):
        read_nifti(tmp_path / 'a.nii')
    assert caplog.records == []


@pytest.mark.parametrize('name, before, after', [
    ('a.mha', 'LOCAL', 'other.raw'), ('a.nrrd', 'encoding: raw\n', 'encoding: raw\ndata file: other.raw\n'),
    ('a.nrrd', 'encoding: raw\n', 'DataFile: other.raw\r\nencoding: raw\r\n')])
def test_voxels_in_another_file_are_not_looked_for(name, before, after, tmp_path):
    """The hash and the cache are of the file that is named, and this could be any file of the user."""
    pytest.importorskip('SimpleITK')
    (tmp_path / 'other.raw').write_bytes(bytes(8))
    (tmp_path / name).write_text(ITK[name].replace(before, after))
    with pytest.raises(Unreadable, match='keeps its voxels in another file'):
        read_nifti(tmp_path / name)


@pytest.mark.parametrize('name', ITK)
def test_their_library_is_named_where_it_is_missing(name, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'SimpleITK', None)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / name).write_bytes(ITK[name].encode())
    fails(config, r'need SimpleITK: pip install -r requirements-formats\.txt')


def test_labels_that_no_flag_names_are_said_and_key_files_are_not(config, tmp_path):
    for name in ('s0', 's1', 's0_seg', 's1_seg'):
        save(tmp_path / 'data' / f'{name}.nii.gz', noise(seed=len(name)))
    (tmp_path / 'data' / 'train_keys.txt').write_text('s0\ns1\n')
    report = load_data(config).report
    assert [line for line in report if 'passed over' in line] == [
        'passed over: labels or masks that no flag names (2, such as s0_seg.nii.gz)']


def test_a_label_that_lies_elsewhere_is_said(config, tmp_path):
    mark = np.zeros(noise().shape, np.float32)
    mark[1:3] = 1
    for name, away in (('a', None), ('b', 0), ('c', 500)):
        save(tmp_path / 'data' / f'{name}.nii.gz', noise() + ord(name))
        if away is not None:
            save(tmp_path / 'data' / f'{name}_lab.nii.gz', mark, AFFINE + away * np.eye(4, k=3))
    data = load_data(DataConfig(**vars(config) | {'labels': 'lab'}))
    assert '1 subject with labels that mark nothing of what the model sees: c' in data.report
