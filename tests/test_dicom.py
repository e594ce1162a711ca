"""DICOM files made by pydicom: what is done to their pixels, and that nothing of a patient comes out."""

import io
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLossless, RLELossless
from pytest import approx
from test_packed import make

from datasets import DataConfig, load_data
from readers.dicom import decode_dicom
from readers.images.decode import ImageLoader, decode
from readers.source import Unreadable
from utils import UserError

NAME = 'Doe^Jane'
RAMP = np.arange(6).reshape(2, 3)


def made(pixels, photometric='MONOCHROME2', bits=16, signed=False, syntax=ExplicitVRLittleEndian, **elements):
    """A Dataset with the stored values `pixels` (H, W) or (H, W, 3), and a patient."""
    pixels = np.asarray(pixels)
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = '1.2.3.4'
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = NAME, 'SECRET-17', '19700101'
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = 8 if bits <= 8 else 16
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, int(signed)
    kind = f'{"i" if signed else "u"}{dataset.BitsAllocated // 8}'
    content = pixels.astype(f'<{kind}').tobytes()
    dataset.PixelData = content + b'\0' * (len(content) % 2)
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def as_bytes(dataset):
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def grey(*args, **options):
    """The decoded values (H, W)."""
    return decode(as_bytes(made(*args, **options)))[..., 0]


def table(entries, first, bits):
    item = pydicom.Dataset()
    item.add_new('LUTDescriptor', 'US', [len(entries), first, bits])
    item.add_new('LUTData', 'US', entries)
    return [item]


def test_without_a_window_the_range_is_stretched():
    assert grey(RAMP + 100) == approx(RAMP / 5, abs=1e-5)
    assert (grey(np.full((2, 2), 7)) == 0).all(), "an image of one value"


def test_monochrome1_is_monochrome2_turned_round():
    assert grey(RAMP, 'MONOCHROME1') == approx(1 - grey(RAMP), abs=1e-6)
    window = {'WindowCenter': 2.5, 'WindowWidth': 2}
    assert grey(RAMP, 'MONOCHROME1', **window) == approx(1 - grey(RAMP, **window), abs=2e-5)


@pytest.mark.parametrize('kind, width, expected', [
    # centre 3, values 0 to 5. LINEAR: (x - 2.5) / (w - 1) + 1/2; a width of 1 is a threshold
    ('LINEAR', 5, [0, 0.125, 0.375, 0.625, 0.875, 1]),
    (None, 5, [0, 0.125, 0.375, 0.625, 0.875, 1]),
    ('LINEAR', 1, [0, 0, 0, 1, 1, 1]),
    ('LINEAR_EXACT', 4, [0, 0, 0.25, 0.5, 0.75, 1]),
    ('SIGMOID', 4, 1 / (1 + np.exp(-(np.arange(6) - 3.0)))),
    ('LINEAR', 0, np.arange(6) / 5),                                          # no window: the range
])
def test_windows_worked_by_hand(kind, width, expected):
    function = {'VOILUTFunction': kind} if kind else {}
    assert grey(RAMP, WindowCenter=3, WindowWidth=width, **function).ravel() == approx(np.array(expected),
                                                                                      abs=1e-5)


def test_the_first_of_several_windows_is_taken():
    first = grey(RAMP, WindowCenter=3, WindowWidth=5)
    assert np.array_equal(grey(RAMP, WindowCenter=[3, 100], WindowWidth=[5, 7]), first)


def test_a_window_is_that_of_rescaled_values():
    """CT: stored 1024 + HU. -1000 to 1000 HU is the window 0 of width 2001, about."""
    stored = np.array([[24, 1024, 2024]])
    x = grey(stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=0.5, WindowWidth=2001)
    assert x.ravel() == approx(np.array([0, 0.5, 1]), abs=1e-5)
    assert grey(RAMP, RescaleSlope=-2, RescaleIntercept=3) == approx(1 - RAMP / 5, abs=1e-5)


def test_signed_values_and_few_bits():
    assert grey(RAMP - 3, signed=True, bits=12) == approx(RAMP / 5, abs=1e-5)
    assert grey(RAMP, bits=8) == approx(RAMP / 5, abs=1e-5)


def test_lookup_tables():
    entries = [0, 255, 127, 127, 51, 0]
    expected = approx(np.array(entries) / 255, abs=1e-5)
    assert grey(RAMP, VOILUTSequence=table(entries, 0, 8)).ravel() == expected
    both = grey(RAMP, VOILUTSequence=table(entries, 0, 8), WindowCenter=3, WindowWidth=5)
    assert both.ravel() == expected, "before the window"
    doubled = table([0, 10, 20, 30, 40, 50], 0, 16)
    x = grey(RAMP, ModalityLUTSequence=doubled, WindowCenter=25, WindowWidth=50,
             VOILUTFunction='LINEAR_EXACT')
    assert x == approx(RAMP / 5, abs=1e-5)


def test_padding_is_black_and_outside_the_range():
    stored = np.array([[-2000, 0, 50, 100]])
    black = grey(stored, signed=True, PixelPaddingValue=-2000)
    assert black.ravel() == approx(np.array([0, 0, 0.5, 1]), abs=1e-5)
    turned = grey(stored, 'MONOCHROME1', signed=True, PixelPaddingValue=-2000)
    assert turned.ravel() == approx(np.array([0, 1, 0.5, 0]), abs=1e-5)
    limits = grey(stored, signed=True, PixelPaddingValue=-2000, PixelPaddingRangeLimit=0)
    assert limits.ravel() == approx(np.array([0, 0, 0, 1]), abs=1e-5)


def test_sixteen_bits_are_kept(tmp_path):
    """Neighbouring values of 16 bits stay apart at 16 bits, and full scale is white."""
    stored = np.array([[0, 30000], [30001, 65535]])
    path = tmp_path / 'scan.dcm'
    path.write_bytes(as_bytes(made(stored)))
    assert np.array_equal(ImageLoader(2, 1, 16).load(path).pixels[0], stored)


def test_colours():
    rgb = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [51, 51, 51]]])
    assert decode(as_bytes(made(rgb, 'RGB', 8))) == approx(rgb / 255, abs=1e-5)
    # PS3.3 C.7.6.3.1.2: luma 0.299 R + ..., chroma around 128
    ybr = np.array([[[76, 85, 255], [150, 44, 21], [29, 255, 107], [51, 128, 128]]])
    assert decode(as_bytes(made(ybr, 'YBR_FULL', 8))) == approx(rgb / 255, abs=2 / 255)
    numbers = {f'{name}PaletteColorLookupTableDescriptor': [3, 0, 16] for name in ('Red', 'Green', 'Blue')}
    words = {'Red': [0, 65535, 13107], 'Green': [0, 0, 13107], 'Blue': [65535, 0, 13107]}
    data = {f'{name}PaletteColorLookupTableData': np.array(v, '<u2').tobytes() for name, v in words.items()}
    x = decode(as_bytes(made([[0, 1, 2, 2]], 'PALETTE COLOR', 8, **numbers, **data)))
    assert x[0] == approx(np.array([[0, 0, 1], [1, 0, 0], [0.2] * 3, [0.2] * 3]), abs=1e-5)


def test_one_bit():
    dataset = made(np.zeros((2, 4)), bits=8)
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit = 0
    dataset.PixelData = pack_bits(np.array([0, 1, 1, 0, 1, 0, 0, 1], np.uint8))
    assert decode(as_bytes(dataset))[..., 0].tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]


def test_implicit_and_compressed_files_give_the_same_pixels():
    plain = decode(as_bytes(made(RAMP, PixelPaddingValue=0)))
    implicit = made(RAMP, syntax=ImplicitVRLittleEndian, PixelPaddingValue=0)
    assert np.array_equal(decode(as_bytes(implicit)), plain)
    compressed = made(RAMP, PixelPaddingValue=0)
    compressed.compress(RLELossless)
    assert np.array_equal(decode(as_bytes(compressed)), plain)


def test_an_enhanced_object_of_one_frame_has_its_window_in_a_sequence():
    voi, rescale, group = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    voi.WindowCenter, voi.WindowWidth = 6, 10
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, 0
    group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [voi], [rescale]
    x = grey(RAMP, NumberOfFrames=1, SharedFunctionalGroupsSequence=[group])
    assert np.array_equal(x, grey(RAMP, RescaleSlope=2, RescaleIntercept=0, WindowCenter=6, WindowWidth=10))


def without(name):
    dataset = made(RAMP)
    delattr(dataset, name)
    return as_bytes(dataset)


def uncompressible():
    dataset = made(RAMP)
    dataset.PixelData = pydicom.encaps.encapsulate([b'\xff\xd8\xff\xd9'])
    dataset['PixelData'].VR = 'OB'
    dataset.file_meta.TransferSyntaxUID = JPEGLossless
    return as_bytes(dataset)


def floats():
    dataset = made(RAMP)
    del dataset.PixelData
    dataset.FloatPixelData = np.array([0, 1, np.nan, 2, 3, 4], '<f4').tobytes()
    dataset.BitsAllocated = 32
    del dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    return as_bytes(dataset)


ALLOCATED = b'\x28\0\0\1US\2\0\x10\0'             # BitsAllocated 16

UNREADABLE = {
    'without pixel data': lambda: without('PixelData'),
    'of 2 frames': lambda: as_bytes(made(np.zeros((4, 3)), NumberOfFrames=2, Rows=2)),
    'damaged or cut off': lambda: as_bytes(made(np.zeros((50, 50))))[:-1000],
    'without Rows': lambda: without('Rows'),
    'without BitsAllocated': lambda: as_bytes(made(RAMP)).replace(ALLOCATED, b''),
    'BitsStored and BitsAllocated contradict': lambda: as_bytes(made(RAMP, bits=17)),
    'of 12 bits allocated': lambda: as_bytes(made(RAMP)).replace(ALLOCATED, ALLOCATED[:-2] + b'\x0c\0'),
    'SamplesPerPixel contradict': lambda: as_bytes(made(RAMP, SamplesPerPixel=3)),
    'RescaleSlope is no number': lambda: as_bytes(made(RAMP, RescaleSlope=2.5)).replace(b'2.5 ', b'two '),
    'NumberOfFrames is no number': lambda: as_bytes(made(RAMP, NumberOfFrames=11)).replace(
        b'IS\2\x0011', b'IS\2\x001A'),
    'height or width is 0': lambda: as_bytes(made(RAMP, Rows=0)),
    'has 400,000,000 pixels and claims': lambda: as_bytes(made(RAMP, Rows=20000, Columns=20000)),
    'kind of color that is not read': lambda: as_bytes(made(RAMP, NAME)),
    'compressed as JPEG Lossless': uncompressible,
    'unknown transfer syntax': lambda: as_bytes(made(RAMP)).replace(
        b'1.2.840.10008.1.2.1\0', b'1.2.3.4.5.6.7.8.9.1\0'),
    'not finite': floats,
}


@pytest.mark.parametrize('told', UNREADABLE)
def test_what_cannot_be_read_says_why_and_nothing_else(told, capfd):
    content = UNREADABLE[told]()
    with warnings.catch_warnings(), pytest.raises(Unreadable) as error:
        warnings.simplefilter('ignore')
        decode(content)
    assert told.strip() in str(error.value) and 'Doe' not in str(error.value)
    assert error.value.__context__ is None or error.value.__suppress_context__
    assert capfd.readouterr() == ('', '')


def test_elements_of_the_patient_are_not_even_parsed(monkeypatch):
    read, seen = pydicom.dcmread, []

    def watched(*args, **options):
        seen.append(read(*args, **options))
        return seen[-1]
    monkeypatch.setattr(pydicom, 'dcmread', watched)
    decode_dicom(as_bytes(made(RAMP)))
    assert 'Rows' in seen[0] and not [e for e in seen[0] if e.keyword.startswith('Patient')]


def test_odd_values_make_no_noise(capfd):
    """pydicom would warn of an identifier with a letter, and print it."""
    dataset = made(RAMP, WindowCenter=3, WindowWidth=5)
    content = as_bytes(dataset).replace(b'1.2.3.4\0', b'JaneDoe\0')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        decode(content)
    assert not caught and capfd.readouterr() == ('', '')


# ------------------------------------------------------------------------------------------ in data sets

@pytest.fixture
def folder(tmp_path):
    """12 normal DICOM files and one of another class, 8 x 8; of two the suffix says something else."""
    rng = np.random.default_rng(0)
    for name, count in {'normal': 12, 'fracture': 1}.items():
        (tmp_path / 'scans' / name).mkdir(parents=True)
        for i in range(count):
            suffix = {3: '.dicom', 4: '.png'}.get(i, '.dcm')
            (tmp_path / 'scans' / name / f'{i}{suffix}').write_bytes(
                as_bytes(made(rng.integers(0, 4096, (8, 8)), bits=12)))
    return tmp_path / 'scans'


def loaded(path, tmp_path, **options):
    return load_data(DataConfig(dataset='folder', data=str(path), image_size=8, num_x_bits=12,
                                cache_dir=str(tmp_path / 'cache'), **options))


def test_a_folder_of_dicom_files_is_a_data_set(folder, tmp_path):
    data = loaded(folder, tmp_path)
    assert sum(map(len, (data.train, data.val, data.test))) == 13
    entry = data.train.entries[0]
    x = data.train[0][0]
    own = ImageLoader(8, 1, 16).load(entry.path)
    assert np.allclose(x, own.pixels / 65535, atol=1 / 4095) and x.max() == 1


def test_an_lmdb_of_it_holds_the_same_pixels_and_no_patient(folder, tmp_path):
    packed = make(folder, tmp_path / 'packed')
    for part in ('train', 'val', 'test'):
        a, b = (getattr(loaded(path, tmp_path), part) for path in (folder, packed))
        assert [(e.id, e.sha256, e.file_bytes) for e in a.entries] == [
            (e.id, e.sha256, e.file_bytes) for e in b.entries]
        assert all((a[i][0] == b[i][0]).all() for i in range(len(a)))
    for path in packed.rglob('*'):
        assert path.is_dir() or b'Doe' not in path.read_bytes()


def test_a_damaged_one_stops_the_program_and_is_named(folder, tmp_path):
    path = folder / 'normal' / '0.dcm'
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r'normal/0\.dcm is a DICOM file that is damaged or cut off'):
        loaded(folder, tmp_path)
