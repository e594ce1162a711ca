"""Data sets: decoding, splits, duplicates, stored splits, batches. Every image is made here, a few pixels
large.
"""

import io
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx
from ranks import as_rank

import readers.items
from datasets import DataConfig, load_data
from readers.batches import eval_batches, steps_per_epoch, train_batches
from readers.duplicates import near_duplicates
from readers.images.decode import decode, to_channels, to_size
from readers.parts import gray_levels
from readers.source import Entry
from readers.split import split_parts
from utils import UserError


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


def noise(seed, size=24):
    return np.random.default_rng(seed).integers(0, 256, (size, size)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """20 normal and 5 ill images of noise, the ill ones with masks of their left half."""
    root = tmp_path / 'data'
    for i in range(20):
        save(root / 'normal' / f'p{i // 2}_{i}.png', noise(i))
    for i in range(5):
        save(root / 'ill' / 'images' / f'ill{i}.png', noise(100 + i))
        save(root / 'ill' / 'masks' / f'ill{i}.png', np.repeat(np.uint8([[255, 0]]), 24, 0).repeat(12, 1))
    return root


@pytest.fixture
def config(folder, tmp_path):
    return DataConfig(dataset='folder', data=str(folder), image_size=8, cache_dir=str(tmp_path / 'cache'))


def parts_of(data):
    return {f['id']: f['part'] for f in data.split['files']}


# --------------------------------------------------------------------------------------------------- decoding

def as_bytes(image, file_format='PNG', **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def grey_palette():
    image = Image.new('P', (2, 1))
    image.putpalette([0, 0, 0, 51, 51, 51])
    image.putpixel((1, 0), 1)
    return image


def rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 3                                     # upside down
    return {'exif': exif}


ODD_IMAGES = {
    '8 bits': (as_bytes(Image.fromarray(np.uint8([[0, 51]]))), [0, 0.2]),
    '16 bits PNG': (as_bytes(Image.fromarray(np.uint16([[0, 13107]]))), [0, 0.2]),
    '16 bits TIFF': (as_bytes(Image.fromarray(np.uint16([[0, 13107]])), 'TIFF'), [0, 0.2]),
    '32-bit integers within 16': (as_bytes(Image.fromarray(np.int32([[0, 13107]])), 'TIFF'), [0, 0.2]),
    '32-bit integers beyond': (as_bytes(Image.fromarray(np.int32([[-70000, 0, 70000]])), 'TIFF'), [0, .5, 1]),
    'floats in [0, 1]': (as_bytes(Image.fromarray(np.float32([[0.1, 0.2]])), 'TIFF'), [0.1, 0.2]),
    'floats beyond': (as_bytes(Image.fromarray(np.float32([[-1000, 0, 1000]])), 'TIFF'), [0, 0.5, 1]),
    '1 bit': (as_bytes(Image.fromarray(np.uint8([[0, 255]])).convert('1')), [0, 1]),
    'palette': (as_bytes(grey_palette()), [0, 0.2]),
    'grey + alpha': (as_bytes(Image.fromarray(np.uint8([[[51, 255], [255, 51]]]))), [0.2, 0.2]),
    'RGBA': (as_bytes(Image.fromarray(np.uint8([[[51, 51, 51, 255], [255, 255, 255, 0]]]))), [0.2, 0]),
    'RGB is luma': (as_bytes(Image.fromarray(np.uint8([[[255, 0, 0], [0, 255, 0]]]))), [0.299, 0.587]),
    'CMYK': (as_bytes(Image.new('CMYK', (2, 1), (0, 0, 0, 204)), 'TIFF'), [0.2, 0.2]),
    'EXIF upside down': (as_bytes(Image.fromarray(np.uint8([[0, 51]])), **rotated_exif()), [0.2, 0]),
    'BMP': (as_bytes(Image.fromarray(np.uint8([[0, 51]])), 'BMP'), [0, 0.2]),
}


@pytest.mark.parametrize('name', ODD_IMAGES)
def test_every_kind_of_image_gives_its_grey_values(name):
    data, expected = ODD_IMAGES[name]
    assert to_channels(decode(data), 1)[0, :, 0] == approx(np.array(expected), abs=1e-6)


def test_12_bit_and_white_is_zero_tiffs_use_their_own_scale():
    def tiff(pixels, bits, photometric):
        """A little-endian TIFF of one row of two pixels."""
        tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 1),
                (279, len(pixels))]
        head = b'II*\0' + struct.pack('<I', 8) + struct.pack('<H', len(tags))
        head += b''.join(struct.pack('<HHIHH', tag, 3, 1, value, 0) for tag, value in tags)
        return (head + struct.pack('<I', 0)).ljust(122, b'\0') + pixels

    words = np.array([0, 13107], '<u2').tobytes()
    assert decode(tiff(words, 16, 1))[0, :, 0] == approx(np.array([0, 0.2]))
    assert decode(tiff(words, 16, 0))[0, :, 0] == approx(np.array([1, 0.8]))
    assert decode(tiff(b'\x00\x03\x33', 12, 1))[0, :, 0] == approx(np.array([0, 819 / 4095]))


def test_colour_from_grey_and_resizing_keep_the_mean():
    x = decode(as_bytes(Image.fromarray(noise(0, 96))))
    small = to_size(to_channels(x, 3), 16, 'pad')
    assert small.shape == (3, 16, 16)
    assert small.mean() == approx(x.mean(), abs=0.01)
    assert small.std() < x.std() / 2                     # antialiased: noise averages out


def test_fits_of_an_image_twice_as_wide_as_high():
    x = np.concatenate([np.full((4, 2, 1), 0.2), np.full((4, 4, 1), 0.6), np.full((4, 2, 1), 1.0)], 1)
    assert to_size(x, 8, 'pad')[0, [0, 1, 6, 7]].max() == 0
    assert to_size(x, 8, 'pad')[0, 2:6].min() > 0.1
    assert to_size(x, 4, 'crop') == approx(0.6)
    assert to_size(x, 4, 'stretch')[0, 0] == approx([0.2, 0.6, 0.6, 1.0], abs=0.15)


# -------------------------------------------------------------------------------------------------- bad files

def break_files(folder):
    """Five files that are broken in five ways, and four that are none of our business."""
    good = (folder / 'normal' / 'p0_0.png').read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    broken = {'empty': b'', 'cut': good[:len(good) // 2], 'text': b'not an image', 'flipped': bytes(flipped),
              'tail': good[:-12]}
    for name, data in broken.items():
        (folder / 'normal' / f'{name}.png').write_bytes(data)
    for name in ('Thumbs.db', '.DS_Store', 'notes.txt', '._p0_0.png'):
        (folder / 'normal' / name).write_bytes(b'x')
    return {f'normal/{name}.png' for name in broken}


def test_all_broken_files_are_named_before_training(config, folder):
    broken = break_files(folder)
    with pytest.raises(UserError) as error:
        load_data(config)
    assert '5 files of 30' in str(error.value) and '--skip_corrupt' in str(error.value)
    assert all(name in str(error.value) for name in broken)
    assert '\n' not in str(error.value)


def test_skip_corrupt_leaves_out_and_reports_each(config, folder):
    broken = break_files(folder)
    data = load_data(replace(config, skip_corrupt=True))
    assert len(data.split['files']) == 25
    assert sum(line.startswith('left out: ') for line in data.report) == len(broken)
    assert all(any(name in line for line in data.report) for name in broken)


@pytest.mark.parametrize('damage, words', [
    (lambda root: DataConfig(data=str(root / 'nowhere')), 'does not exist'),
    (lambda root: DataConfig(data=str(root / 'ill')), 'found images, masks'),
    (lambda root: (root / 'other').mkdir() or DataConfig(data=str(root)), 'holds no image'),
    (lambda root: DataConfig(data=str(root), anomalous_classes=('flu',)), "'flu' is not in"),
    (lambda root: DataConfig(data=str(root), anomalous_classes=('normal',)), 'both normal and anomalous'),
    (lambda root: DataConfig(data=str(root), num_x_bits=17), '17: it must be at least 1 and at most 16'),
    (lambda root: DataConfig(data=str(root), binarize='static'), '--binarize static does nothing'),
    (lambda root: DataConfig(data=str(root), spacing=2.0), '--spacing: it does nothing for --dataset folder'),
    (lambda root: DataConfig(data=str(root), val_fraction=0.6, test_fraction=0.4), 'nothing to train on'),
    (lambda root: DataConfig(data=str(root), patient_pattern='p'), 'no group'),
    (lambda root: DataConfig(data=str(root), patient_pattern='(x+)_'), 'for no file'),
    (lambda root: DataConfig(data=str(root), patient_metadata='a:b'), 'FILE_NAME_COLUMN'),
    (lambda root: DataConfig(data=str(root), cache_dir=str(root / 'normal' / 'p0_0.png')), '--cache_dir'),
])
def test_a_mistake_is_one_clear_line(folder, tmp_path, damage, words):
    with pytest.raises(UserError, match=words) as error:
        config = damage(folder)
        load_data(replace(config, dataset='folder', cache_dir=config.cache_dir or str(tmp_path / 'cache')))
    assert '\n' not in str(error.value)


def test_a_file_that_looks_black_is_reported(config, folder):
    save(folder / 'normal' / 'dark.png', np.full((24, 24), 4095, np.uint16))
    assert any('dark.png' in line and '12-bit' in line for line in load_data(config).report)


def test_a_mask_of_another_size_is_a_broken_file(config, folder):
    save(folder / 'ill' / 'masks' / 'ill3.png', noise(0, 10))
    with pytest.raises(UserError, match=r'ill3.png is 24 x 24 pixels, its mask ill3.png 10 x 10'):
        load_data(config)


# ------------------------------------------------------------------------------------------------------ split

def test_parts_labels_and_masks(config):
    data = load_data(config)
    assert (len(data.train), len(data.val), len(data.test)) == (13, 3, 4 + 5)    # 15 % and 20 % of 20
    assert data.train.labels.sum() == data.val.labels.sum() == 0 and data.test.labels.sum() == 5
    assert data.shape == (1, 8, 8)
    x, y, mask, ids = data.test.items(range(9))
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    assert [i.startswith('ill/') for i in ids] == y.bool().tolist()
    assert (mask[y == 0] == 0).all()
    assert mask[y == 1, 0, :, :4].all() and not mask[y == 1, 0, :, 4:].any()
    assert data.train.items([0]).mask is None
    one = data.test[-1]
    assert one[3] == ids[-1] and torch.equal(one[0], x[-1])
    assert all(e.file_bytes == (Path(config.data) / e.id).stat().st_size for e in data.test.entries)


def test_parent_folder_class_spelling_and_lung_masks(tmp_path):
    root = tmp_path / 'up' / 'COVID-19_Radiography_Dataset'
    for i in range(10):
        save(root / 'Normal' / 'images' / f'Normal-{i}.png', noise(i))
        save(root / 'Normal' / 'masks' / f'Normal-{i}.png', noise(i))
        save(root / 'Viral Pneumonia' / 'images' / f'V-{i}.png', noise(50 + i))
        save(root / 'Viral Pneumonia' / 'masks' / f'V-{i}.png', noise(i))
    (root / 'Normal.metadata.xlsx').write_bytes(b'x')
    config = DataConfig(dataset='covid', data=str(tmp_path / 'up'), anomalous_classes=('viral_pneumonia',),
                        cache_dir=str(tmp_path / 'cache'))
    data = load_data(config)
    assert data.anomalous_classes == ('Viral Pneumonia',)
    assert len(data.split['files']) == 20
    assert data.test.items([0]).mask is None            # lungs, not lesions
    assert data.shape == (1, 64, 64)
    assert parts_of(data) == parts_of(load_data(replace(config, data=str(root))))


def test_the_split_does_not_depend_on_the_order_of_files_but_on_the_seed():
    entries = [Entry(f'a{i:02d}', '', 'normal', str(i), 0, i) for i in range(40)]
    parts = split_parts(entries, 0.15, 0.2, seed=0)
    assert parts == split_parts(entries[::-1], 0.15, 0.2, seed=0)
    assert parts != split_parts(entries, 0.15, 0.2, seed=1)
    assert [list(parts.values()).count(p) for p in ('train', 'val', 'test')] == [26, 6, 8]


def test_a_patient_and_a_content_are_never_in_two_parts():
    entries = [Entry(f'a{i:02d}', '', 'normal', f'content {i // 3}', 0, i, patient=f'p{i % 20}')
               for i in range(120)]
    for e in split_parts(entries[:60], 0.2, 0.2, 0), split_parts(entries, 0.2, 0.2, 3):
        for key in ('patient', 'sha256'):
            places = {}
            for entry in entries[:len(e)]:
                places.setdefault(getattr(entry, key), set()).add(e[entry.id])
            assert all(len(p) == 1 for p in places.values())
    by_patient = [replace(e, sha256=e.id) for e in entries]
    assert set(split_parts(by_patient, 0.2, 0.2, 0).values()) == {'train', 'val', 'test'}


def test_normal_images_of_an_ill_patient_are_in_test():
    entries = [Entry(f'n{i}', '', 'normal', f'n{i}', 0, i, patient=f'p{i}') for i in range(10)]
    ill = [Entry(f'i{i}', '', 'ill', f'i{i}', 0, 10 + i, patient=f'p{i}', label=1) for i in range(4)]
    parts = split_parts(entries + ill, 0, 0.2, 0)
    assert {parts[f'n{i}'] for i in range(4)} == {'test'}
    assert {parts[f'n{i}'] for i in range(4, 10)} == {'train'}


@pytest.mark.parametrize('how', ['pattern', 'metadata'])
def test_patients_from_file_names_and_from_a_table(config, tmp_path, how):
    table = tmp_path / 'patients.csv'
    table.write_text('image,person\n' + ''.join(f'p{i // 2}_{i},p{i // 2}\n' for i in range(20))
                     + ''.join(f'ill{i},NA\n' for i in range(5)))
    flags = {'pattern': {'patient_pattern': r'^(p\d+)_'},
             'metadata': {'patient_metadata': f'{table}:image:person'}}
    data = load_data(replace(config, **flags[how]))
    parts = parts_of(data)
    assert all(parts[f'normal/p{i}_{2 * i}.png'] == parts[f'normal/p{i}_{2 * i + 1}.png'] for i in range(10))
    assert data.train.entries[0].patient.startswith('p')
    assert any('10 patients in 20 images; 5 images without one' in line for line in data.report)
    unknown = [any('patients are not known' in line for line in one.report)
               for one in (data, load_data(config))]
    assert unknown == [False, 'folder' in config.dataset]


def test_a_near_duplicate_in_another_part_is_reported(config, folder):
    data = load_data(config)
    assert data.split['duplicates'] == []
    train = data.train.entries[0]
    changed = (np.asarray(Image.open(train.path)) * 0.8 + 20).astype(np.uint8)
    save(folder / 'ill' / 'images' / 'near.png', Image.fromarray(changed).resize((48, 48)))
    data = load_data(config)           # an ill image more moves no normal one
    (pair,) = data.split['duplicates']
    assert pair['kind'] == 'near' and pair['correlation'] > 0.995
    where = dict(zip(pair['ids'], pair['parts'], strict=True))
    assert where == {'ill/images/near.png': 'test', train.id: 'train'}
    assert any('near-duplicates' in line and train.id in line for line in data.report)


def test_near_duplicates_are_pairs_up_to_brightness_and_contrast():
    images = np.stack([noise(i, 32) for i in range(6)])[:, None]         # (6, 1, 32, 32)
    images[4] = images[1] // 2 + 60
    images[5] = 7                                                        # constant: like nothing
    assert [(i, j) for i, j, _ in near_duplicates(images)] == [(1, 4)]
    assert near_duplicates(images[:0]) == []


def test_files_of_equal_content_stay_together(config, folder):
    data = load_data(config)
    train, test = (next(e for e in part.entries if e.label == 0) for part in (data.train, data.test))
    (folder / 'ill' / 'images' / 'same.png').write_bytes(Path(test.path).read_bytes())
    for i in range(6):
        (folder / 'normal' / f'copy{i}.png').write_bytes(Path(train.path).read_bytes())
    data = load_data(config)
    parts = parts_of(data)
    assert len({parts[f'normal/copy{i}.png'] for i in range(6)} | {parts[train.id]}) == 1
    assert parts[test.id] == 'test'                      # with its ill twin
    assert any('normal and anomalous' in line for line in data.report)


# ----------------------------------------------------------------------------------------------- stored split

def test_a_stored_split_is_kept_when_files_are_added(config, folder):
    data = load_data(config)
    save(folder / 'normal' / 'p0_new.png', noise(500))
    save(folder / 'flu' / 'f.png', noise(501))
    again = load_data(replace(config, split_seed=9), data.split)
    assert parts_of(again) == parts_of(data) | {'flu/f.png': 'test'}
    assert any('1 file that the run' in line for line in again.report)
    only_flu = load_data(replace(config, anomalous_classes=('flu',)), data.split)
    assert only_flu.test.class_names.count('flu') == 1 and 'ill' not in only_flu.test.class_names
    assert [e.id for e in only_flu.train.entries] == [e.id for e in data.train.entries]


def test_a_stored_split_names_what_changed_or_is_gone(config, folder):
    data = load_data(config)
    save(folder / 'normal' / 'p3_7.png', noise(999))
    with pytest.raises(UserError, match=r'1 file changed since .*normal/p3_7.png'):
        load_data(config, data.split)
    (folder / 'normal' / 'p3_7.png').unlink()
    with pytest.raises(UserError, match=r'1 file of the run.*normal/p3_7.png'):
        load_data(config, data.split)


# ------------------------------------------------------------------------------------------------------ cache

def test_the_cache_is_used_and_a_damaged_one_is_made_anew(config, tmp_path, monkeypatch):
    data = load_data(config)
    expected = data.train.items(range(5)).x
    scans = []
    scan = readers.items.write_pixels
    monkeypatch.setattr(readers.items, 'write_pixels', lambda *a: scans.append(1) or scan(*a))
    load_data(config)
    assert not scans
    array = next((tmp_path / 'cache').glob('*/pixels.npy'))
    damaged = bytearray(array.read_bytes())
    damaged[-1] ^= 1
    array.write_bytes(damaged)
    assert torch.equal(load_data(config).train.items(range(5)).x, expected) and len(scans) == 1
    next((tmp_path / 'cache').glob('*/index')).write_text('{"entr')
    assert torch.equal(load_data(config).train.items(range(5)).x, expected) and len(scans) == 2
    assert not list((tmp_path / 'cache').glob('*.tmp'))


# ----------------------------------------------------------------------------------------------------- pixels

@pytest.mark.parametrize('bits', [1, 3, 5, 8])
def test_fewer_bits_are_the_published_formula(bits):
    values = np.arange(256, dtype=np.uint8)
    expected = np.floor(values / 255 * 255 / 2 ** (8 - bits)) / (2 ** bits - 1)
    assert gray_levels(values, 8, bits).numpy() == approx(expected)


def test_16_bit_files_keep_their_depth(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for i in range(4):
        save(tmp_path / 'data' / 'normal' / f'{i}.png', np.roll(values, i, 0))
    config = DataConfig(dataset='folder', data=str(tmp_path / 'data'), num_x_bits=12,
                        cache_dir=str(tmp_path / 'cache'))
    data = load_data(config)
    x = data.train.items([0]).x
    assert data.pixels.bits == 12 and len(x.unique()) == len(np.unique(values >> 4)) > 3000
    assert len(load_data(replace(config, num_x_bits=8)).train.items([0]).x.unique()) == 256


# ---------------------------------------------------------------------------------------------------- batches

def same(a, b):
    return a.id == b.id and torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def take(n, batches):
    return [next(batches) for _ in range(n)]


def test_an_epoch_is_a_permutation(config):
    part = load_data(config).train                                       # 13 images
    assert steps_per_epoch(part, 1) == 13 and steps_per_epoch(part, 3, 2) == 2
    batches = train_batches(part, 1, seed=0)
    epochs = [[b.id[0] for b in take(13, batches)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [e.id for e in part.entries]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [b.id[0] for b in take(13, train_batches(part, 1, seed=1))]


@pytest.mark.parametrize('batch_size, world, words',
                         [(14, 1, 'fits is 13'), (5, 4, 'fits is 3'), (1, 14, 'number of processes is 13')])
def test_a_batch_larger_than_the_part_says_what_fits(config, batch_size, world, words):
    with pytest.raises(UserError, match=words), as_rank(0, world):
        train_batches(load_data(config).train, batch_size, seed=0)


@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('workers', [0, 1])
def test_evaluation_sees_every_image_once(config, world, workers):
    part = load_data(config).test                                        # 9 images
    seen = {}
    for rank in range(world):
        with as_rank(rank, world):
            for number, batch in eval_batches(part, 2, workers=workers):
                assert number % world == rank
                seen[number] = batch.id
    assert [name for i in sorted(seen) for name in seen[i]] == [e.id for e in part.entries]


def test_a_part_is_cheap_to_send_to_a_worker(config):
    part = load_data(config).test
    before = part.items([0, 8])
    sent = pickle.loads(pickle.dumps(part))
    assert sent.images._array is None
    assert same(sent.items([0, 8]), before) and torch.equal(sent.items([0, 8]).mask, before.mask)
