"""Trivial features of images and of headers, worked by hand."""

import numpy as np
import pytest
from PIL import Image
from pytest import approx
from test_audit import draw
from test_dicom import as_bytes, made

from audit.headers import read_file_header
from audit.trivial import (
    FEATURES,
    IMMERKAER,
    Picture,
    border,
    noise,
    sharpness,
    symmetry,
)
from utils import UserError


def test_features_worked_by_hand():
    ramp = np.tile(np.linspace(0.1, 0.9, 20), (20, 1))[None]             # (1, 20, 20), dark to bright
    assert symmetry(Picture(ramp)) == approx(-1) and noise(Picture(ramp)) == approx(0, abs=1e-9)
    mirror = Picture(np.concatenate([ramp, ramp[:, :, ::-1]], 2))
    assert symmetry(mirror) == approx(1)
    steep = ramp + np.linspace(0, 0.1, 20)[:, None]                      # no line of it has one value
    assert Picture(steep).bars == 0 and Picture(steep).content.shape == (20, 20)
    framed_ramp = Picture(np.pad(steep, ((0, 0), (5, 5), (0, 0))))
    assert framed_ramp.bars == approx(100 * 10 / 60) and framed_ramp.content.shape == (20, 20)
    uniform = Picture(np.full((1, 8, 8), 0.5))
    assert uniform.bars == 0 and symmetry(uniform) == 0
    disc = np.zeros((1, 20, 20))
    disc[:, 1:-1, 1:-1] = 0.5
    assert border(Picture(disc)) == approx(-50)
    assert IMMERKAER.sum() == 0 and np.abs(IMMERKAER.sum(0)).sum() == 0


def test_noise_and_sharpness_do_not_depend_on_contrast_or_brightness():
    rng = np.random.default_rng(0)
    white = 0.5 + 0.05 * rng.standard_normal((1, 200, 200))
    assert noise(Picture(white)) == approx(100, rel=0.02)             # noise is all there is
    assert sharpness(Picture(white)) == approx(20, rel=0.05)          # the kernel's squares: 4 x 1 + 4 x 4
    soft = draw(rng)[None] / 255
    for feature in (noise, sharpness, symmetry):
        assert feature(Picture(0.5 * soft + 0.3)) == approx(feature(Picture(soft)), rel=1e-6)


def test_features_of_volumes_worked_by_hand():
    x = np.zeros((1, 8, 8, 8), np.float32)
    x[0, 2:6, 2:6, 2:6] = np.random.default_rng(0).random((4, 4, 4))
    mirrored = np.maximum(x, x[:, ::-1])
    volume, even = Picture(x), Picture(mirrored)
    assert volume.content.shape == (4, 4, 4) and volume.bars == 50
    assert FEATURES['mean'].measure(volume) == approx(100 * x[0, 2:6, 2:6, 2:6].mean())
    assert symmetry(even) == approx(1) and symmetry(volume) < 0.5
    # the outer 5 % are one voxel, all 0: minus the mean of the inner 6 x 6 x 6, of which 4 x 4 x 4 are not 0
    assert border(volume) == approx(-100 * x.sum() / 6 ** 3)
    slope = np.add.outer(np.arange(8), np.arange(8))[..., None].repeat(8, 2)[None] / 14
    assert FEATURES['noise'].measure(Picture(slope)) == approx(0)          # a slope has no noise


@pytest.mark.parametrize('options, mode, pixels, encoder', [
    ({'format': 'PNG', 'compress_level': 1}, 'L', '8-bit gray', 'compression 0 or 1'),
    ({'format': 'PNG', 'compress_level': 9, 'dpi': (72, 72)}, 'RGB', '8-bit color',
     'compression 7 to 9, with pHYs'),
    ({'format': 'PNG', 'compress_level': 6}, 'I;16', '16-bit gray', 'compression 6'),
    ({'format': 'JPEG', 'quality': 60}, 'RGB', '8-bit color', '4:2:0, baseline, with jfif'),
    ({'format': 'JPEG', 'quality': 90, 'progressive': True, 'subsampling': 0}, 'RGB', '8-bit color',
     '4:4:4, progressive, with jfif'),
    ({'format': 'JPEG', 'quality': 25}, 'L', '8-bit gray', 'no subsampling, baseline, with jfif'),
    ({'format': 'TIFF', 'compression': 'tiff_lzw'}, 'L', '8-bit gray', 'compression tiff_lzw'),
    ({'format': 'TIFF', 'tiffinfo': {305: 'Scanner 3'}}, 'I;16', '16-bit gray', 'compression raw, Scanner 3'),
    ({'format': 'BMP'}, '1', '1-bit gray', 'compression 0'),
], ids=lambda value: str(value) if isinstance(value, dict) else None)
def test_headers_of_files(tmp_path, options, mode, pixels, encoder):
    path = tmp_path / 'picture'
    Image.new(mode, (24, 16)).save(path, **options)
    header = read_file_header(path)
    assert (header.format, header.pixels, header.size) == (options['format'], pixels, '24 x 16')
    assert header.encoder.startswith(encoder)
    if 'quality' in options:
        assert header.quality == approx(options['quality'], abs=1)
    else:
        assert np.isnan(header.quality)


def test_a_jpeg_without_tables_is_one_line(tmp_path):
    Image.new('L', (24, 16)).save(path := tmp_path / 'a.jpg')
    whole = path.read_bytes()
    start = whole.index(b'\xff\xdb')                                          # DQT, and its length
    path.write_bytes(whole[:start] + whole[start + 2 + int.from_bytes(whole[start + 2:start + 4]):])
    with pytest.raises(UserError, match=r'the header of .*a.jpg cannot be read \(StopIteration\)'):
        read_file_header(path)


def test_the_header_of_a_dicom_file_holds_nothing_of_the_patient(tmp_path):
    dataset = made(np.zeros((16, 24), np.uint16), bits=12, PatientName='Somebody^Secret')
    (tmp_path / 'scan').write_bytes(as_bytes(dataset))
    header = read_file_header(tmp_path / 'scan')
    assert (header.format, header.pixels, header.size) == ('DICOM', '12-bit MONOCHROME2', '24 x 16')
    assert header.encoder == 'Explicit VR Little Endian' and 'Secret' not in str(header)
    (tmp_path / 'scan').write_bytes(as_bytes(dataset)[:140])
    with pytest.raises(UserError, match='a damaged DICOM file'):
        read_file_header(tmp_path / 'scan')


@pytest.mark.parametrize('name, kind, form', [('a.nii', 'Nifti1Image', 'NIfTI'),
                                              ('b.nii.gz', 'Nifti2Image', 'NIfTI, packed')])
def test_the_header_of_a_nifti_file(tmp_path, name, kind, form):
    nibabel = pytest.importorskip('nibabel')
    image = getattr(nibabel, kind)(np.zeros((6, 5, 4), np.int16), np.diag([1, 1, 2.5, 1]))
    image.header['descrip'] = b'converter; TE=2.98; Time=143209.400'
    nibabel.save(image, tmp_path / name)
    header = read_file_header(tmp_path / name)
    assert (header.format, header.size, header.spacing) == (form, '6 x 5 x 4', '1 x 1 x 2.5 mm')
    assert (header.pixels, header.encoder) == ('int16 values', 'converter; TE=#; Time=#')
    (tmp_path / name).write_bytes(bytes(1000))
    with pytest.raises(UserError, match=rf'{name}.*is not a NIfTI file'):
        read_file_header(tmp_path / name)


def test_a_file_without_a_header_is_named(tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG')
    with pytest.raises(UserError, match=r'broken\.png'):
        read_file_header(tmp_path / 'broken.png')
