"""Data sets that come as a tar, and the split by name with as many anomalous as normal test images."""

import io
import os
import tarfile
from types import SimpleNamespace

import pytest
from standins import make_standin

import train
from datasets import DataConfig, load_data
from readers.images.archive import unpacked
from readers.source import Entry
from readers.split import split_by_name
from utils import UserError


def write_tar(path, folder):
    """A tar of the folder as MedNIST/, packed if its name says so."""
    mode = 'w:gz' if path.suffix == '.gz' else 'w'
    with tarfile.open(path, mode) as tar:
        tar.add(folder, 'MedNIST')
    return path


def plant(path, name, kind=tarfile.REGTYPE, target='', content=b'planted'):
    """Adds a member to a tar."""
    with tarfile.open(path, 'a') as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        member.size = len(content) if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(content))


def config(data, cache, **flags):
    return DataConfig(dataset='mednist', data=str(data), cache_dir=str(cache), **flags)


def parts(data):
    return {name: [e.id for e in getattr(data, name).entries] for name in ('train', 'val', 'test')}


@pytest.fixture
def folder(tmp_path):
    """24 hands and 9 chests."""
    return make_standin('mednist', tmp_path / 'unpacked')


@pytest.fixture
def tar(folder, tmp_path):
    return write_tar(tmp_path / 'MedNIST.tar', folder)


@pytest.mark.parametrize('name', ['MedNIST.tar', 'MedNIST.tar.gz'])
def test_a_tar_is_its_folder(name, folder, tmp_path):
    tar = write_tar(tmp_path / name, folder)
    of_tar, of_folder = (load_data(config(data, tmp_path / 'cache')) for data in (tar, folder))
    assert parts(of_tar) == parts(of_folder) and of_tar.shape == (1, 64, 64)
    assert (of_tar.train.items(range(5)).x == of_folder.train.items(range(5)).x).all()


def test_a_tar_is_unpacked_once_and_again_when_it_changes(tar, tmp_path, monkeypatch):
    calls, extractall = [], tarfile.TarFile.extractall

    def counted(*args, **options):
        calls.append(args)
        return extractall(*args, **options)
    monkeypatch.setattr(tarfile.TarFile, 'extractall', counted)
    cache = str(tmp_path / 'cache')
    assert unpacked(tar, cache) == unpacked(tar, cache) and len(calls) == 1
    plant(tar, 'MedNIST/more.txt')
    assert (unpacked(tar, cache) / 'MedNIST' / 'more.txt').read_bytes() == b'planted' and len(calls) == 2


@pytest.mark.parametrize('name, kind, target', [
    ('../planted', tarfile.REGTYPE, ''), ('MedNIST/../../planted', tarfile.REGTYPE, ''),
    ('{outside}/planted', tarfile.REGTYPE, ''), ('MedNIST/planted', tarfile.SYMTYPE, '/etc/passwd'),
    ('MedNIST/planted', tarfile.SYMTYPE, 'CXR'), ('MedNIST/planted', tarfile.LNKTYPE, 'MedNIST/CXR'),
    ('MedNIST/planted', tarfile.FIFOTYPE, ''), ('MedNIST/planted', tarfile.CHRTYPE, '')])
def test_what_is_not_harmless_is_refused_and_nothing_is_left(name, kind, target, tar, tmp_path):
    plant(tar, name.format(outside=tmp_path / 'outside'), kind, target)
    with pytest.raises(UserError, match='planted') as error:
        load_data(config(tar, tmp_path / 'cache'))
    assert 'nothing is unpacked' in str(error.value) and '\n' not in str(error.value)
    assert [name for _, _, names in os.walk(tmp_path) for name in names if 'planted' in name] == []
    assert not (tmp_path / 'outside').exists()
    assert {p.suffix for p in (tmp_path / 'cache').iterdir()} == {'.lock', '.TAG'}


def test_what_does_not_fit_on_the_disk_is_not_begun(tar, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda folder: SimpleNamespace(free=5))
    with pytest.raises(UserError, match=r'cannot write the cache folder .*do not fit'):
        unpacked(tar, str(tmp_path / 'cache'))


def test_files_that_are_no_tar_or_damaged_are_named(folder, tmp_path):
    (tmp_path / 'other.tar').write_bytes(b'no tar' * 1000)
    packed = write_tar(tmp_path / 'cut.tar.gz', folder)
    packed.write_bytes(packed.read_bytes()[:len(packed.read_bytes()) // 2])
    long = tarfile.TarInfo('a.png')
    long.type, long.size = tarfile.XHDTYPE, 2 ** 70                  # no index of Python's reaches so far
    (tmp_path / 'long.tar').write_bytes(long.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    for name in ('other.tar', 'cut.tar.gz', 'long.tar'):
        with pytest.raises(UserError, match=rf'{name} cannot be unpacked') as error:
            load_data(config(tmp_path / name, tmp_path / 'cache'))
        assert '\n' not in str(error.value)
    with pytest.raises(UserError, match=r"'.*gone' does not exist"):
        load_data(config(tmp_path / 'gone', tmp_path / 'cache'))


def entries(normal, anomalous):
    return [Entry(f'{name}/{i:03d}.jpeg', '', name, '', 0, i, label=label)
            for label, (name, number) in enumerate([('Hand', normal), ('CXR', anomalous)])
            for i in range(number)]


def test_the_split_by_name_worked_by_hand():
    """80, 10 and 10 % in the order of names, however the files are listed; 2 of 7 anomalous images."""
    parts = split_by_name(entries(20, 7)[::-1], 0.1, 0.1, seed=0)
    of = lambda wanted: sorted(name for name, part in parts.items() if part == wanted)
    hands = [f'Hand/{i:03d}.jpeg' for i in range(20)]
    assert of('train') == hands[:16] and of('val') == hands[16:18] and of('test')[2:] == hands[18:]
    assert len(of('test')) == 4 and all(name.startswith('CXR/') for name in of('test')[:2])
    drawn = {tuple(name for name in split_by_name(entries(20, 7), 0.1, 0.1, seed) if name.startswith('CXR/'))
             for seed in range(30)}
    assert len(drawn) > 15, "the seed decides"
    assert len(split_by_name(entries(20, 1), 0.1, 0.1, 0)) == 21, "fewer anomalous images are all taken"


def test_parts_of_the_data_set(folder, tmp_path):
    data = load_data(config(folder, tmp_path / 'cache'))
    assert (len(data.train), len(data.val), len(data.test)) == (20, 2, 4) and data.test.labels.sum() == 2
    assert any('left out: 7 anomalous images that --split_seed did not draw' in line for line in data.report)
    other = load_data(config(folder, tmp_path / 'cache', split_seed=5))
    assert parts(other)['train'] == parts(data)['train'] and parts(other)['test'] != parts(data)['test']
    again = load_data(config(folder, tmp_path / 'cache', split_seed=5), data.split)
    assert parts(again) == parts(data), "the stored split stays"
    more = load_data(config(folder, tmp_path / 'cache', test_fraction=0.25))
    assert len(more.test) == 12 and more.test.labels.sum() == 6


def test_another_normal_class_by_either_flag(folder, tmp_path):
    for name in ('normal_class', 'normal_classes'):
        args = train.parse_args(['--dataset', 'mednist', f'--{name}', 'cxr'])
        assert args.normal_classes == ['cxr']
    data = load_data(config(folder, tmp_path / 'cache', normal_classes=('cxr',)))
    assert data.normal_classes == ('CXR',) and data.anomalous_classes == ('Hand',)
    assert (len(data.train), len(data.val), len(data.test)) == (7, 1, 2)
