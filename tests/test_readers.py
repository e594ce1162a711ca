"""The published data sets, each a few images large in its own layout (tests/standins.py)."""

import itertools
import multiprocessing
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx
from standins import (
    STANDINS,
    celeba_files,
    cifar10,
    encoded,
    image,
    lead_astray,
    make_standin,
    write_indexed,
    write_lmdb,
)

from datasets import DATASETS, DataConfig, load_data
from readers.batches import train_batches
from readers.images.decode import ImageLoader
from readers.lmdb.file import Lmdb
from readers.published import arrays
from readers.published.arrays import prepare
from readers.published.records import Decoding, LazyImages, LmdbStore, Records
from readers.source import Unreadable
from readers.split import split_records
from utils import UserError, read_json, write_json

LAZY = [name for name, row in DATASETS.items() if not row.classes]


def values(part, index=0, draw=0):
    """One image of a part as it is in the file: (C, H, W) uint8."""
    return np.rint(part.items([index], draw).x[0].numpy() * 255).astype(np.uint8)


def fails(config, words, split=None):
    with pytest.raises(UserError, match=words) as error:
        load_data(config, split)
    assert '\n' not in str(error.value)


# -------------------------------------------------------------------------------------------------- every row

@pytest.mark.parametrize('name', DATASETS)
def test_every_row_gives_batches_of_its_shape_in_its_parts(name, config):
    row, data = DATASETS[name], load_data(config(name))
    assert data.shape == (row.channels, *[row.size or 16] * row.dims)      # stand-ins of size 0 have 16
    assert len(data.train) and len(data.test)
    assert data.train.labels.sum() == 0 and len(data.val) == round(24 * row.val_fraction * row.val_always)
    batch = next(train_batches(data.train, 5, seed=0))
    assert batch.x.shape == (5, *data.shape) and batch.x.dtype == torch.float32
    assert batch.x.min() >= 0 and batch.x.max() <= 1 and batch.x.std() > 0.01
    assert data.train.transform.flip == row.flip
    again = load_data(config(name), data.split)
    assert [e.id for e in again.test.entries] == [e.id for e in data.test.entries]
    assert len({e.id for e in data.train.entries}) == len(data.train)
    sent = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(sent.items([3], 7).x, data.train.items([3], 7).x)


def test_each_row_has_a_stand_in():
    assert set(STANDINS) == set(DATASETS)


@pytest.mark.parametrize('name', [name for name, row in DATASETS.items() if not row.val_always])
def test_published_parts_are_kept_and_the_given_test_part_is_the_test_part(name, config):
    data = load_data(config(name))
    times = 2 if name == 'stacked_mnist' else 1
    assert (len(data.train), len(data.val), len(data.test)) == (24 * times, 0, 9 * times)
    assert {e.part for e in data.test.entries} == {'test'}
    data = load_data(config(name, val_fraction=0.25))
    assert (len(data.train), len(data.val), len(data.test)) == (18 * times, 6 * times, 9 * times)


@pytest.mark.parametrize('name', [name for name, row in DATASETS.items() if row.dims == 2])
def test_another_size_and_grey_can_be_asked_for(name, config):
    row = DATASETS[name]
    size = 36 if row.padding else 48
    channels = 0 if row.likelihood == 'bernoulli' else 1
    data = load_data(config(name, image_size=size, channels=channels))
    assert data.shape == (1, size, size) and data.train.items([0, 1]).x.shape == (2, 1, size, size)


# ------------------------------------------------------------------------------------------------- small sets

def test_cifar10_has_its_pixels_and_class_names(config):
    data = load_data(config('cifar10'))
    order = [i for batch in range(5) for i in range(batch, 24, 5)]             # as the five files have them
    assert all(np.array_equal(values(data.train, k), image(i, 32, 32).transpose(2, 0, 1))
               for k, i in enumerate(order))
    names = {i: data.train.class_names[k] for k, i in enumerate(order)}
    assert (names[0], names[13], names[9]) == ('airplane', 'cat', 'truck')


def test_a_class_left_out_is_anomalous_and_comes_from_the_test_part_alone(config):
    data = load_data(config('cifar10', anomalous_classes=('Cat',)))
    assert 'cat' not in data.train.class_names + data.val.class_names and len(data.val) == 2
    assert [e.id for e in data.test.entries if e.label] == ['test/00003']
    stacked = load_data(config('stacked_mnist'))
    one = stacked.test.class_names[0]
    data = load_data(config('stacked_mnist', anomalous_classes=(one,)))
    assert one not in data.train.class_names and data.test.labels[0] == 1
    fails(config('imagenet_32', anomalous_classes=('dog',)), '--anomalous_classes: it does nothing')


def test_a_cifar10_file_that_is_damaged_or_a_program_is_named(config, tmp_path, monkeypatch):
    load_data(config('cifar10'))
    path = tmp_path / 'cifar10' / 'cifar-10-batches-py' / 'data_batch_3'
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    fails(config('cifar10'), 'data_batch_3 is not a batch of CIFAR-10')
    path.write_bytes(pickle.dumps({'data': np.uint8([1]), 'labels': [shutil.rmtree]}))
    fails(config('cifar10'), 'data_batch_3 is not a batch of CIFAR-10')
    path.unlink()
    fails(config('cifar10'), r'torchvision.datasets.CIFAR10\(FOLDER, download=True\)')
    path.write_bytes(whole)
    monkeypatch.setattr(arrays, 'PUBLISHED_BATCH', 5)   # as if of the published size
    fails(config('cifar10'), 'data_batch_1 is not a batch .*its MD5')


def test_an_older_pickle_of_cifar10_is_read(tmp_path):
    """Python 2 wrote the published files: strings are bytes, and NumPy's modules have their old names."""
    cifar10(tmp_path, 5, 5)
    path = tmp_path / 'cifar-10-batches-py' / 'test_batch'
    old = path.read_bytes().replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
    path.write_bytes(old)
    images, labels = arrays.read_batch(path)
    assert images.shape == (5, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3, 4]


def test_stacked_mnist_is_three_digits_of_its_part_the_same_in_every_run(config, tmp_path):
    data = load_data(config('stacked_mnist'))
    digits = {bytes(image(i, 28, 28, 1)): i % 10 for i in range(24)}
    for k in range(48):
        x = values(data.train, k)                                                      # (3, 32, 32)
        assert ''.join(str(digits[bytes(c[2:30, 2:30])]) for c in x) == data.train.class_names[k]
    again = load_data(replace(config('stacked_mnist'), cache_dir=str(tmp_path / 'other')))
    assert again.split['files'] == data.split['files']
    assert len(set(data.train.class_names)) > 20
    equal = make_standin('stacked_mnist', tmp_path / 'equal', count=9)          # as many as test digits
    data = load_data(replace(config('stacked_mnist'), data=str(equal)))
    assert data.train.class_names != data.test.class_names                             # other triples
    data = load_data(config('stacked_mnist'))
    table = [line for line in data.report if ' normal' in line]
    assert len(table) == 1 and table[0].startswith('normal classes')                # not a line for each


def test_arrays_are_padded_and_resized_worked_by_hand():
    white = np.full((4, 4, 3), 255, np.uint8)
    x = prepare(white, ImageLoader(4, 3, 8, border=2)).pixels
    assert x.shape == (3, 8, 8) and x.sum() == 3 * 16 * 255 and (x[:, 2:6, 2:6] == 255).all()
    assert prepare(white, ImageLoader(6, 3, 8)).pixels.shape == (3, 6, 6)
    assert (prepare(white, ImageLoader(4, 3, 16)).pixels == 65535).all()
    red = white * np.uint8([1, 0, 0])
    assert prepare(red, ImageLoader(4, 1, 8)).pixels[0, 0, 0] == round(0.299 * 255)


# ------------------------------------------------------------------------------------------------- large sets

@pytest.mark.parametrize('name, side', [('imagenet_32', 32), ('celeba_256', 256), ('ffhq', 256)])
def test_raw_records_are_the_pixels(name, side, config):
    data = load_data(config(name))
    assert np.array_equal(values(data.train, 17), image(17, side, side).transpose(2, 0, 1))
    assert np.array_equal(values(data.test, 8), image(1008, side, side).transpose(2, 0, 1))
    assert data.test.entries[8].id == 'test/8'


def test_celeba_is_cut_out_and_resized_as_published(config):
    from torchvision.transforms import functional as published
    data = load_data(config('celeba_64'))
    record = Lmdb(Path(config('celeba_64').data) / 'train.lmdb').get(b'5')
    with open(Path(config('celeba_64').data) / 'one.jpg', 'w+b') as file:
        file.write(record)
        face = published.crop(Image.open(file), top=40, left=15, height=148, width=148)
        assert np.array_equal(values(data.train, 5), published.pil_to_tensor(published.resize(face, 64)))


def test_celeba_as_files_is_celeba_as_lmdb(config, tmp_path):
    celeba_files(tmp_path / 'files', 24, 9)
    data = load_data(replace(config('celeba_64'), data=str(tmp_path / 'files')))
    assert (len(data.train), len(data.test)) == (24, 9)
    listed = (tmp_path / 'files' / 'celeba' / 'list_eval_partition.txt').read_text().split()
    train, valid = ([name for name, number in zip(listed[::2], listed[1::2], strict=True) if number == part]
                    for part in '01')
    assert [e.id for e in data.train.entries] == [f'train/{name}' for name in train]
    assert [e.id for e in data.test.entries] == [f'test/{name}' for name in valid]        # as published
    files = [tmp_path / 'files' / 'celeba' / 'img_align_celeba' / name for name in train]
    write_indexed(tmp_path / 'lmdb' / 'train.lmdb', (f.read_bytes() for f in files))
    write_indexed(tmp_path / 'lmdb' / 'validation.lmdb', [files[0].read_bytes()])
    packed = load_data(replace(config('celeba_64'), data=str(tmp_path / 'lmdb')))
    assert torch.equal(packed.train.items(range(24)).x, data.train.items(range(24)).x)
    files[3].unlink()
    with pytest.raises(UserError, match=files[3].name):
        data.train.items([3])


def test_lsun_is_resized_and_cut_as_published(config):
    from torchvision.transforms import functional as published
    data = load_data(config('lsun_church_64'))
    lmdb = Lmdb(Path(config('lsun_church_64').data) / 'church_outdoor_train_lmdb')
    keys = sorted(lmdb.keys())
    assert [e.id for e in data.train.entries] == [f'train/{key.decode()}' for key in keys]
    decoding = Decoding(encoded=True)
    for k in (0, 1, 2, 3):                                                      # some wide, some high
        photograph = published.resize(decoding.open(lmdb.get(keys[k])), 64)
        centre = published.pil_to_tensor(published.center_crop(photograph, 64)).numpy()
        assert np.array_equal(values(data.train, k), centre)
        whole = published.pil_to_tensor(photograph).numpy()                     # (3, H, W), one side 64
        windows = [whole[:, top:top + 64, left:left + 64] for top in range(whole.shape[1] - 63)
                   for left in range(whole.shape[2] - 63)]
        part = replace_flip(data.train, False)
        seen = [next(i for i, w in enumerate(windows) if np.array_equal(w, values(part, k, draw)))
                for draw in range(1, 40)]
        assert len(windows) > 4 and {0, len(windows) - 1} <= set(seen) and len(set(seen)) > 4
        assert np.array_equal(values(part, k, 5), values(part, k, 5))


def replace_flip(part, flip):
    part = pickle.loads(pickle.dumps(part))
    part.transform = replace(part.transform, flip=flip)
    return part


def test_keys_of_any_kind_are_listed_once(config, monkeypatch):
    data = load_data(config('lsun_bedroom_128'))
    monkeypatch.setattr(Lmdb, 'keys', None)
    again = load_data(config('lsun_bedroom_128'))
    assert [e.id for e in again.train.entries] == [e.id for e in data.train.entries]


def test_a_folder_above_is_taken_if_it_holds_one_data_set(config, tmp_path):
    make_standin('imagenet_32', tmp_path / 'imagenet-oord' / 'imagenet-oord-lmdb_32')
    above = replace(config('imagenet_32'), data=str(tmp_path / 'imagenet-oord'))
    assert len(load_data(above).train) == 24
    make_standin('imagenet_32', tmp_path / 'imagenet-oord' / 'imagenet-oord-lmdb_64')
    fails(above, 'several data sets: name one of imagenet-oord-lmdb_32, imagenet-oord-lmdb_64')


def test_what_differs_from_the_published_set_is_said(config, tmp_path):
    data = load_data(config('imagenet_32'))
    assert any('24 images, the published training part 1,281,147' in line for line in data.report)
    assert not any('resized' in line for line in data.report)
    write_indexed(tmp_path / 'large' / 'train.lmdb', [image(0, 64, 64).tobytes()])
    write_indexed(tmp_path / 'large' / 'validation.lmdb', [image(1, 64, 64).tobytes()])
    data = load_data(replace(config('imagenet_32'), data=str(tmp_path / 'large')))
    assert any('64 x 64 pixels: they are resized to 32 x 32' in line for line in data.report)


# ------------------------------------------------------------------------------------------------ broken sets

def test_a_part_that_is_missing_unfinished_or_no_lmdb_is_named(config, tmp_path):
    folder = tmp_path / 'ffhq'
    fails(replace(config('ffhq'), data=''), '--data is missing. .*create_ffhq_lmdb.py')
    fails(replace(config('ffhq'), data=str(tmp_path / 'nowhere')), 'nowhere. does not exist')
    (folder / 'validation.lmdb').rename(folder / 'validation.lmdb.unfinished')
    fails(config('ffhq'), 'validation.lmdb is unfinished: give the command .*create_ffhq_lmdb.py')
    shutil.rmtree(folder / 'validation.lmdb.unfinished')
    fails(config('ffhq'), 'validation.lmdb is missing. .*create_ffhq_lmdb.py')
    (folder / 'validation.lmdb').write_bytes(b'what is this')
    fails(config('ffhq'), 'validation.lmdb is not an LMDB')
    (tmp_path / 'empty').mkdir()
    fails(replace(config('ffhq'), data=str(tmp_path / 'empty')), 'has no train.lmdb and validation.lmdb')


def test_a_file_that_is_cut_off_is_an_error_and_not_the_end_of_the_process(config, tmp_path):
    for name in ('imagenet_32', 'lsun_bedroom_128'):
        folder = Path(config(name).data)
        file = next(folder.glob('*train*')) / 'data.mdb'
        with file.open('r+b') as f:
            f.truncate(file.stat().st_size // 2)
        fails(config(name), 'is cut off: it has')


def test_a_damaged_page_is_an_error_and_not_the_end_of_the_program(config):
    file = Path(config('lsun_church_64').data, 'church_outdoor_train_lmdb', 'data.mdb')
    file.write_bytes(lead_astray(file.read_bytes()))
    fails(config('lsun_church_64'), r'church_outdoor_train_lmdb cannot be read \(')


def test_processes_that_fork_read_on_and_all_keys_are_listed(tmp_path):
    write_indexed(tmp_path / 'x.lmdb', [b'%d' % i for i in range(40)])
    with Lmdb(tmp_path / 'x.lmdb') as records:
        assert records.get(b'3') == b'3'
        fork = multiprocessing.get_context('fork')
        heard, forked = fork.SimpleQueue(), []
        for i in range(2):                                      # they inherit what the parent has opened
            forked.append(fork.Process(target=lambda i=i: heard.put([records.get(b'%d' % i)] * 2)))
            forked[-1].start()
            assert records.get(b'4') == b'4'
        assert sorted(heard.get() for _ in forked) == [[b'0'] * 2, [b'1'] * 2]
        assert pickle.loads(pickle.dumps(records)).get(b'5') == b'5'
        assert records.get(b'4') == b'4' and records.get(b'x') is None and len(records) == 40
        assert list(records.keys()) == sorted(b'%d' % i for i in range(40))
        records._child.kill()                                   # as liblmdb does where a page is damaged
        with pytest.raises(Unreadable, match='it ends the process that reads'):
            records.get(b'3')
        assert records.get(b'3') == b'3'


def test_a_gap_or_a_record_of_another_kind_is_found_at_the_start(config, tmp_path):
    def write(values):
        folder = tmp_path / f'bad {next(number)}'
        write_lmdb(folder / 'train.lmdb', values)
        write_indexed(folder / 'validation.lmdb', [image(0, 32, 32).tobytes()])
        return replace(config('imagenet_32'), data=str(folder))

    number = itertools.count()
    picture = image(0, 32, 32).tobytes()
    fails(write([(b'0', picture), (b'2', picture)]), "2 records but none with the key '1'")
    fails(write([(b'0', picture + b'x')]), "record '0' cannot be decoded .3,073 bytes are no square")
    fails(write([]), 'without records')
    fails(replace(write([(b'0', picture)]), dataset='celeba_64'), "train.lmdb: record '0' cannot be decoded")


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_record_is_named_when_it_is_met(workers, tmp_path):
    faces = [encoded(image(i, 218, 178)) for i in range(24)]
    write_indexed(tmp_path / 'train.lmdb', [*faces[:7], faces[7][:-500], *faces[8:]])
    write_indexed(tmp_path / 'validation.lmdb', faces)
    data = load_data(DataConfig(dataset='celeba_64', data=str(tmp_path)))
    batches = train_batches(data.train, 24, seed=0, workers=workers)
    with pytest.raises(UserError, match=r"train.lmdb: record '7' cannot be decoded \(.*\). Make") as error:
        next(batches)
    assert '\n' not in str(error.value)


def test_a_record_that_is_gone_is_named(tmp_path):
    write_lmdb(tmp_path / 'x.lmdb', [(key, image(0, 8, 8).tobytes()) for key in (b'0', b'2', b'3', b'x')])
    images = LazyImages([LmdbStore('train', tmp_path / 'x.lmdb')], Decoding(), 3, 8)
    assert images[[0, 2]].shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match=r"x.lmdb: record '1' is missing"):
        images[[0, 1]]


def test_an_image_smaller_than_the_box_is_no_face():
    with pytest.raises(ValueError, match='100 x 100 pixels, expected 163 x 188'):
        Decoding(encoded=True, box=(15, 40, 163, 188)).open(encoded(image(0, 100, 100)))


# ----------------------------------------------------------------------------------------- parts of millions

def test_split_json_of_records_holds_numbers_and_gives_the_same_parts_again(config, tmp_path):
    data = load_data(config('imagenet_32', val_fraction=0.25, split_seed=3))
    write_json(tmp_path / 'split.json', data.split)
    split = read_json(tmp_path / 'split.json')
    assert split['records'] == {'train': 18, 'val': 6, 'test': 9} and 'files' not in split
    again = load_data(config('imagenet_32', split_seed=4), split)      # what the run stored counts, not flags
    assert [e.id for e in again.val.entries] == [e.id for e in data.val.entries]
    assert again.split == split
    other = load_data(config('imagenet_32', val_fraction=0.25, split_seed=4))
    assert [e.id for e in other.val.entries] != [e.id for e in data.val.entries]
    assert {e.id for e in data.val.entries} | {e.id for e in data.train.entries} \
        == {f'train/{i}' for i in range(24)}


def test_another_number_of_records_is_an_error(config, tmp_path):
    split = load_data(config('imagenet_32')).split
    larger = make_standin('imagenet_32', tmp_path / 'larger', count=25)
    fails(replace(config('imagenet_32'), data=str(larger)), 'counts 33 images .* --data has 34', split)
    fewer = make_standin('imagenet_32', tmp_path / 'fewer', count=23, test_count=10)
    fails(replace(config('imagenet_32'), data=str(fewer)), 'counts 33 images .* --data has 33 and 10', split)
    files = load_data(config('folder')).split
    fails(config('imagenet_32'), 'another form', files | {'normal_classes': ['image']})
    fails(config('folder'), 'another form', split | {'normal_classes': ['normal']})
    fails(config('imagenet_32', patient_pattern='(.)'), '--patient_pattern: it does nothing')


class Many:
    """A store of very many images."""
    path = 'many'

    def __init__(self, part, number):
        self.part, self.number = part, number

    def __len__(self):
        return self.number

    def name(self, index):
        return f'{index:07d}'

    def names(self):
        return map(self.name, range(self.number))


def test_three_million_records_make_no_objects(monkeypatch):
    made = []
    records = Records([Many('train', 3_000_000), Many('test', 50)], 'image')
    monkeypatch.setattr('readers.published.records.Entry', lambda **fields: made.append(1))
    parts = split_records(records, 0, 0, 0, None)
    assert [len(parts[p]) for p in ('train', 'val', 'test')] == [3_000_000, 0, 50] and not made
    assert len(records.at(parts['test'])) == 50 and not made
    monkeypatch.undo()
    assert records.at(parts['test'])[7].id == 'test/0000007'
    assert records[2_999_999].id == 'train/2999999' and records[2_999_999].row == 2_999_999


def test_ids_in_a_row_are_the_ids_one_by_one(config):
    for name in LAZY:
        records = load_data(config(name)).train.entries
        everything = Records(records._rows.stores, 'image')
        assert list(everything.ids()) == [e.id for e in everything]


# ---------------------------------------------------------------------------------------------- mirror images

def test_images_are_mirrored_in_training_and_masks_with_them(config):
    part = load_data(config('folder', flip='on', test_fraction=0.0)).test        # anomalous images with masks
    still = part.items(range(len(part)))
    draws = [part.items(range(len(part)), draw) for draw in range(1, 31)]
    count = np.zeros(len(part))
    for moved in draws:
        for i in range(len(part)):
            same, mirror = (torch.equal(moved.x[i], x) for x in (still.x[i], still.x[i].flip(-1)))
            assert same != mirror
            assert torch.equal(moved.mask[i], still.mask[i].flip(-1) if mirror else still.mask[i])
            count[i] += mirror
    assert count.mean() / 30 == approx(0.5, abs=0.12)
    assert count.min() > 0 and count.max() < 30                                 # each image now so, now so
    assert torch.equal(draws[3].x[2], part.items([2], 4).x[0])                 # whatever batch it is in
    assert torch.equal(part.items(range(9), 0).x, still.x)


@pytest.mark.parametrize('name, flip, mirrored', [('folder', 'auto', False), ('cifar10', 'auto', True),
                                                  ('cifar10', 'off', False), ('mnist', 'on', True)])
def test_the_flag_decides_who_is_mirrored(name, flip, mirrored, config):
    part = load_data(config(name, flip=flip, likelihood='discretized')).train
    still = part.items(range(12)).x
    moved = torch.cat([part.items(range(12), draw).x for draw in range(1, 4)])
    assert (not torch.equal(moved, torch.cat([still] * 3))) == mirrored
