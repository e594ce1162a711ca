"""DICOM files as devices write them, not always as the standard has it: each right value by hand."""

import io
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, JPEGExtended12Bit
from pytest import approx
from test_dicom import RAMP, as_bytes, grey, made, table

from audit.headers import read_file_header
from datasets import DataConfig, load_data
from readers.dicom import count_frames, decode_dicom
from readers.images.decode import FIRST_PAGE, ImageLoader, decode
from readers.images.files import Frame
from readers.source import Unreadable
from utils import UserError

X = np.array([[0, 1024, 2048, 4095]])                    # of 12 bits
WINDOW = {'WindowCenter': 2048, 'WindowWidth': 4096}
LEVELS = approx(np.array([0, 0.25, 0.5, 1]), abs=4e-3)


def levels(data):
    return decode(data).ravel()


def test_decimal_commas():
    data = as_bytes(made(X, WindowCenter=2048.5, WindowWidth=4096.5, RescaleSlope=0.5,
                         RescaleIntercept=1024.5))
    assert b'2048.5' in data
    assert levels(data.replace(b'8.5', b'8,5').replace(b'6.5', b'6,5').replace(b'0.5', b'0,5').replace(
        b'4.5', b'4,5')) == approx(levels(data), abs=1e-6)


def test_empty_elements_are_absent():
    empty = dict.fromkeys(['RescaleSlope', 'RescaleIntercept', 'VOILUTFunction', 'PixelPaddingValue',
                           'NumberOfFrames', 'PresentationLUTShape', 'PlanarConfiguration', 'HighBit'])
    assert grey(X, **WINDOW, **empty).ravel() == LEVELS
    item = pydicom.Dataset()
    item.add_new('LUTDescriptor', 'US', None)
    item.add_new('LUTData', 'OW', None)
    items = {'VOILUTSequence': [item], 'ModalityLUTSequence': [item]}
    assert grey(X, **WINDOW, **items).ravel() == LEVELS
    full = table(np.arange(4096).tolist(), 0, 12)
    assert grey(X, VOILUTSequence=[item, *full]).ravel() == LEVELS


@pytest.mark.parametrize('name', ['SamplesPerPixel', 'PixelRepresentation', 'BitsStored', 'HighBit'])
def test_elements_that_follow_from_others_may_be_absent(name):
    dataset = made(RAMP)
    delattr(dataset, name)
    assert np.array_equal(decode(as_bytes(dataset)), decode(as_bytes(made(RAMP))))


def test_bits_lie_where_high_bit_says():
    assert np.array_equal(grey(X << 4, bits=12, HighBit=15), grey(X, bits=12))
    signed = X - 2048
    assert np.array_equal(grey(signed << 2, bits=12, HighBit=13, signed=True), grey(signed, signed=True))
    assert np.array_equal(grey(X | 0xA000, bits=12), grey(X)), "bits above the stored ones, such as overlays"
    assert np.array_equal(grey(X, bits=12, HighBit=7), grey(X)), "a HighBit that cannot be"


def test_a_slope_of_zero_and_an_unknown_function_count_as_none():
    assert grey(X, **WINDOW, RescaleSlope=0, RescaleIntercept=0).ravel() == LEVELS
    assert grey(X, **WINDOW, VOILUTFunction='LOG').ravel() == LEVELS


def with_words(stored, **elements):
    """Signed pixels of 16 bits with unsigned elements, as explicit files may have them."""
    dataset = made(stored, signed=True)
    for name, value in elements.items():
        dataset.add_new(name, 'US', value)
    return levels(as_bytes(dataset))


def test_padding_and_first_values_of_signed_pixels_may_be_stored_unsigned():
    stored = np.array([[-2000, -1024, 0, 1024]])
    assert with_words(stored, PixelPaddingValue=65536 - 2000) == approx([0, 0, 0.5, 1], abs=1e-5)
    limited = with_words(stored, PixelPaddingValue=65536 - 2000, PixelPaddingRangeLimit=65536 - 1500)
    assert limited == approx([0, 0, 0.5, 1], abs=1e-5)
    words = table(np.arange(4096).tolist(), 65536 - 1024, 12)
    for elements in ({'VOILUTSequence': words}, WINDOW | {'ModalityLUTSequence': words}):
        assert grey(X - 1024, signed=True, **elements).ravel() == LEVELS
    rescaled = {'RescaleSlope': 1, 'RescaleIntercept': -1024, 'VOILUTSequence': words}
    assert grey(X, bits=12, **rescaled).ravel() == LEVELS, "unsigned, but rescaled below 0"


@pytest.mark.parametrize('kind, shape, turned', [
    ('MONOCHROME2', 'INVERSE', True), ('MONOCHROME2', 'IDENTITY', False), ('MONOCHROME1', 'INVERSE', True),
    ('MONOCHROME1', 'IDENTITY', False), ('MONOCHROME1', 'LIN OD', True)])
def test_the_presentation_shape_decides_which_end_is_white(kind, shape, turned):
    x = grey(X, kind, **WINDOW, PresentationLUTShape=shape).ravel()
    assert (1 - x if turned else x) == LEVELS


@pytest.mark.parametrize('bits, entries', [
    (16, np.arange(256, dtype='u2') * 256), (8, np.arange(256, dtype='u2')), (8, np.arange(256, dtype='u1'))])
def test_palettes_of_either_byte_order(bits, entries):
    """8 bits in words of their own, or two to a word, whose bytes change places too."""
    def shown(syntax, data):
        elements = {f'{color}PaletteColorLookupTable{part}': value for color in ('Red', 'Green', 'Blue')
                    for part, value in {'Descriptor': [256, 0, bits], 'Data': data.tobytes()}.items()}
        return decode(as_bytes(made([[0, 64, 128, 255]], 'PALETTE COLOR', 8, syntax=syntax, **elements)))
    little = shown('1.2.840.10008.1.2.1', entries)
    assert little[0, :, 0] == approx(np.array([0, 64, 128, 255]) / 255, abs=0.004)
    assert np.array_equal(shown(ExplicitVRBigEndian, entries.view('u2').byteswap()), little)


def test_tables_whose_data_are_words():
    def item(entries, count, bits):
        table = pydicom.Dataset()
        table.add_new('LUTDescriptor', 'US', [count, 0, bits])
        table.add_new('LUTData', 'OW', entries.tobytes())
        return {'VOILUTSequence': [table]}
    assert grey(X, **item(np.arange(4096, dtype='<u2'), 4096, 12)).ravel() == LEVELS
    bytes_of_8 = (np.arange(4096) // 16).astype('u1')
    assert grey(X, **item(bytes_of_8, 4096, 8)).ravel() == LEVELS, "two to a word"
    assert grey(X * 16, **item(np.arange(65536).astype('<u2'), 0, 16)).ravel() == LEVELS
    assert grey(X, **item((np.arange(4096) * 16).astype('<u2'), 4096, 12)).ravel() == LEVELS
    short = grey(X, **item(np.arange(2049).astype('<u2'), 4096, 12)).ravel()
    assert short == approx([0, 0.25, 0.5, 0.5], abs=4e-3)


def test_files_without_preamble_or_meta_header(tmp_path):
    dataset = made(X, **WINDOW)
    dataset.Modality = 'OT'
    for syntax in ('1.2.840.10008.1.2.1', '1.2.840.10008.1.2', ExplicitVRBigEndian):
        dataset.file_meta.TransferSyntaxUID = syntax
        pixels = X.astype('>u2' if syntax == ExplicitVRBigEndian else '<u2')
        dataset.PixelData = pixels.tobytes()
        data = as_bytes(dataset)[132:]
        assert levels(data) == LEVELS
        bare = data[12 + int.from_bytes(data[8:12], 'little'):]
        assert levels(bare) == LEVELS
        (tmp_path / 'IM0001').write_bytes(bare)
        header = read_file_header(tmp_path / 'IM0001')
        assert (header.format, header.width, header.pixels) == ('DICOM', 4, '16-bit MONOCHROME2')


@pytest.mark.parametrize('syntax', [JPEGExtended12Bit, JPEG2000Lossless])
def test_a_form_that_pillow_cannot_decode_is_no_damage(syntax, monkeypatch):
    dataset = made(RAMP, bits=12)
    dataset.PixelData = pydicom.encaps.encapsulate([b'\xff\xd8\xff\xd9'])
    dataset['PixelData'].VR = 'OB'
    dataset.file_meta.TransferSyntaxUID = syntax
    decoder = pydicom.pixels.get_decoder(syntax)
    monkeypatch.setattr(type(decoder), 'available_plugins', property(lambda self: ('pillow',)))
    with pytest.raises(Unreadable, match=r'JPEG .* in a form that Pillow does not decode: pip install'):
        decode(as_bytes(dataset))
    monkeypatch.setattr(type(decoder), 'available_plugins', property(lambda self: ('pillow', 'pylibjpeg')))
    with pytest.raises(Unreadable, match='damaged or cut off'):
        decode(as_bytes(dataset))


def test_each_frame_has_its_own_look(tmp_path):
    groups = []
    for center in (1, 4):
        group, voi = pydicom.Dataset(), pydicom.Dataset()
        voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = center, 2, 'LINEAR_EXACT'
        group.FrameVOILUTSequence = [voi]
        groups.append(group)
    data = as_bytes(made(RAMP, Rows=1, NumberOfFrames=2, PerFrameFunctionalGroupsSequence=groups))
    assert decode_dicom(data, 0).ravel() == approx([0, 0.5, 1], abs=1e-5)
    assert decode_dicom(data, 1).ravel() == approx([0, 0.5, 1], abs=1e-5)
    (tmp_path / 'cine.dcm').write_bytes(data)
    assert count_frames(tmp_path / 'cine.dcm') == 2
    (tmp_path / 'picture.png').write_bytes(b'\x89PNG')
    assert count_frames(tmp_path / 'picture.png') == count_frames(tmp_path / 'nothing') == 1
    assert pydicom.dcmread(io.BytesIO(data)).NumberOfFrames == 2


# ---------------------------------------------------------------------------------------------- in data sets

def written(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_frames_are_images_of_one_part(tmp_path):
    """3 frames of a file, 2 pages of another, and plain files."""
    rng, data = np.random.default_rng(0), tmp_path / 'data'
    cine = rng.integers(0, 4096, (24, 8))
    written(data / 'normal' / 'cine.dcm', as_bytes(made(cine, NumberOfFrames=3, Rows=8)))
    pages = [Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)) for _ in range(2)]
    pages[0].save(data / 'normal' / 'pages.tif', save_all=True, append_images=pages[1:])
    for k in range(8):
        written(data / 'normal' / f'{k}.dcm', as_bytes(made(rng.integers(0, 4096, (8, 8)))))
    flags = {'dataset': 'folder', 'image_size': 8, 'cache_dir': str(tmp_path / 'cache'), 'num_x_bits': 16}
    with pytest.raises(UserError, match=r'cine\.dcm is a DICOM file of 3 frames: train with --frames each'):
        load_data(DataConfig(data=str(data), **flags))
    images = load_data(DataConfig(data=str(data), frames='each', patient_pattern=r'^(\w+)\.\w+$', **flags))
    parts = {e.id: (part, e.patient) for part in ('train', 'val', 'test')
             for e in getattr(images, part).entries}
    assert len(parts) == 13
    assert len({parts[f'normal/cine.dcm#{k}'] for k in (1, 2, 3)}) == 1
    part, patient = parts['normal/pages.tif#2']
    assert patient == 'pages'
    entries = [e.id for e in getattr(images, part).entries]
    x = getattr(images, part)[entries.index('normal/pages.tif#2')][0]
    assert np.array_equal(np.rint(x[0].numpy() * 255), np.asarray(pages[1]))
    middle = load_data(DataConfig(data=str(data), frames='middle', skip_corrupt=True, **flags))
    assert sum(map(len, (middle.train, middle.val, middle.test))) == 10
    first = load_data(DataConfig(data=str(data), skip_corrupt=True, **flags))
    assert any(line.startswith('1 image of several pages, of which the first') for line in first.report)
    loader = ImageLoader(8, 1, 16, frames='each')
    found = loader.find(data)
    assert len(found.files) == 13
    own = loader.load(found.files['normal/cine.dcm#2']).pixels[0] / 65535
    low, high = cine[8:16].min(), cine[8:16].max()
    assert own == approx((cine[8:16] - low) / (high - low), abs=1e-4)


@pytest.mark.parametrize('kind, words', [
    ('constant', 'of a single gray level'), ('dark', 'look black'), ('hot', 'but for 1 % of the pixels'),
    ('white', 'of a single gray level'), ('good', '')])
def test_pictures_with_nothing_to_see_are_said(kind, words):
    """As a file with a few pixels far from all others gives, or a window that lies elsewhere."""
    ramp = np.arange(64 * 64).reshape(64, 64) / 4096
    values = {'constant': ramp * 0 + 0.3, 'dark': ramp / 16, 'hot': ramp / 16, 'white': ramp * 0 + 1,
              'good': ramp}
    image = values[kind][..., None].astype(np.float32)
    if kind == 'hot':
        image[0, :20] = 1
    for depth in (8, 16):
        notes = ImageLoader(64, 1, depth, border=8).finish(image, None, '', 0).repairs
        assert len(notes) == bool(words) and all(words in note for note in notes)


def test_a_preamble_may_be_that_of_a_tiff(tmp_path):
    (tmp_path / 'a').write_bytes(b'II*\0' + as_bytes(made(RAMP))[4:])
    assert ImageLoader(8, 1, 8).load(str(tmp_path / 'a')).repairs == ()


def test_a_mask_has_as_many_pages_as_its_image(tmp_path):
    pages = [Image.fromarray(np.full((8, 8), gray, np.uint8)) for gray in (90, 100, 200)]
    for name, number in {'a.tif': 3, 'all.tif': 3, 'two.tif': 2, 'one.tif': 1, 'one.png': 1}.items():
        pages[0].save(tmp_path / name, **({'save_all': True, 'append_images': pages[1:number]}
                                          if number > 1 else {}))
    loader, last = ImageLoader(8, 1, 8), Frame(str(tmp_path / 'a.tif'), 2)
    assert loader.load(last, [str(tmp_path / 'all.tif')]).mask.all()
    for name, has in {'two.tif': '2 pages', 'one.tif': '1 page', 'one.png': '1 page'}.items():
        with pytest.raises(Unreadable, match=rf'has a mask {name} that has {has}: there is no page 3'):
            loader.load(last, [str(tmp_path / name)])


def test_two_images_of_one_name_are_refused(tmp_path):
    """A file that is called as the second frame of another one."""
    for k in range(6):
        written(tmp_path / 'data' / 'normal' / f'{k}.dcm', as_bytes(made(RAMP + k)))
    written(tmp_path / 'data' / 'normal' / '0.dcm#2', as_bytes(made(RAMP)))
    frames = made(np.zeros((4, 3)), NumberOfFrames=2, Rows=2)
    written(tmp_path / 'data' / 'normal' / '0.dcm', as_bytes(frames))
    with pytest.raises(UserError, match=r"holds 'normal/0\.dcm#2' twice"):
        load_data(DataConfig(dataset='folder', data=str(tmp_path / 'data'), frames='each', image_size=8,
                             cache_dir=str(tmp_path / 'cache')))


def test_pictures_of_an_animated_png(tmp_path):
    pictures = [Image.fromarray(np.full((8, 8), gray, np.uint8)) for gray in (0, 100, 200)]
    pictures[0].save(tmp_path / 'a.png', save_all=True, append_images=pictures[1:])
    loader = ImageLoader(8, 1, 8)
    assert FIRST_PAGE in loader.load(str(tmp_path / 'a.png')).repairs
    each = replace(loader, frames='each').find(tmp_path)
    assert list(each.files) == ['a.png#1', 'a.png#2', 'a.png#3']
    assert [loader.load(place).pixels.max() for place in each.files.values()] == [0, 100, 200]
