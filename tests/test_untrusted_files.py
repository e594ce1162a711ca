"""What a file of a stranger cannot do: run code, touch memory, write where it says, fool a spreadsheet."""

import errno
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.run import Evaluation
from phantoms.chest import write_phantoms
from readers.cache import cache_folder, cached_files, is_cache
from readers.published import arrays
from readers.source import Unreadable
from readers.volumes.nifti import read_nifti
from storage.locks import locked, open_lock
from utils import UserError, write_csv

# ------------------------------------------------------------------------------------------------- CIFAR-10

def batch_of(value, path, protocol=2):
    path.write_bytes(pickle.dumps({'data': value, 'labels': [1, 2]}, protocol))
    return path


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_arrays_of_bytes_are_what_numpy_reads(protocol, tmp_path):
    x = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    images, labels = arrays.read_batch(batch_of(x, tmp_path / 'b', protocol))
    assert np.array_equal(images, x.reshape(2, 3, 32, 32).transpose(0, 2, 3, 1)) and labels.tolist() == [1, 2]
    assert np.array_equal(arrays.read_batch(batch_of(np.asfortranarray(x), tmp_path / 'b', protocol))[0],
                          images)


class Pointers:
    """An array of objects over bytes of the file: reading one follows an address of the file's choice."""

    def __reduce__(self):
        return np.ndarray, ((2, 3072), np.dtype('O'), b'A' * 8 * 6144)


class Over:
    """An array of bytes over a buffer in the pickle, by the constructor of NumPy."""

    def __reduce__(self):
        return np.ndarray, ((1 << 40,), np.dtype('u1'), b'short')


@pytest.mark.parametrize('value, told', [
    (Pointers(), 'no array of bytes'), (Over(), 'no array of bytes'), (np.array([{}] * 2), 'no array'),
    (np.zeros((2, 3072)), 'no array'), (bytearray(3072), 'no array'), ([0] * 6144, 'no array')])
def test_other_arrays_are_refused(value, told, tmp_path):
    with pytest.raises(UserError, match=f'is not a batch of CIFAR-10 .*{told}'):
        arrays.read_batch(batch_of(value, tmp_path / 'b', 5 if isinstance(value, bytearray) else 2))


@pytest.mark.parametrize('program', [
    b'r\xff\xff\xff\x7f.',                                      # remember object 2^31 of none
    pickle.BYTEARRAY8 + (1 << 36).to_bytes(8, 'little') + b'.', b'cposix\nsystem\n.'])
def test_a_pickle_reserves_no_memory_and_names_no_code(program, tmp_path):
    (tmp_path / 'b').write_bytes(b'\x80\x02' + program)
    with pytest.raises(UserError, match='is not a batch of CIFAR-10'):
        arrays.read_batch(tmp_path / 'b')


# ---------------------------------------------------------------------------------- flags in a checkpoint

def opened(tmp_path, given=(), **stored):
    run = Evaluation(SimpleNamespace(checkpoint=str(tmp_path), no_ema=False, **dict(given)))
    run.opened = None, {'dataset': 'folder', 'data': 'd', **stored}
    return run


def test_a_checkpoint_chooses_no_folder_to_write_to(tmp_path):
    elsewhere, own = tmp_path / 'elsewhere', tmp_path / 'own'
    elsewhere.mkdir(mode=0o700)
    cache_folder(str(own))
    assert opened(tmp_path, cache_dir=str(elsewhere)).data_config.cache_dir == ''
    assert opened(tmp_path, cache_dir=str(own)).data_config.cache_dir == str(own), "a cache of this user"
    given = {'cache_dir': str(elsewhere)}
    assert opened(tmp_path, given, cache_dir=str(own)).data_config.cache_dir == str(elsewhere)


def test_a_checkpoint_draws_no_phantoms(tmp_path):
    stored = {'dataset': 'phantom', 'data': str(tmp_path / 'victim'), 'num_phantoms': 3}
    with pytest.raises(UserError, match=r'no phantoms in .*victim.*--data'):
        opened(tmp_path, **stored).data_config  # noqa: B018
    assert not (tmp_path / 'victim').exists()
    given = {'data': str(tmp_path / 'mine')}
    assert opened(tmp_path, given, **stored).data_config.data == str(tmp_path / 'mine')
    write_phantoms(tmp_path / 'drawn', 3)                                # by the run itself
    drawn = stored | {'data': str(tmp_path / 'drawn')}
    assert opened(tmp_path, **drawn).data_config.num_phantoms == 3
    with pytest.raises(UserError, match='no phantoms'):
        opened(tmp_path, **drawn | {'num_phantoms': 10 ** 9}).data_config  # noqa: B018


# -------------------------------------------------------------------------------------------------- the cache

def test_a_lock_neither_follows_a_link_nor_empties_a_file(tmp_path):
    (tmp_path / 'precious').write_text('kept')
    (tmp_path / 'lock').symlink_to(tmp_path / 'precious')
    with pytest.raises(OSError):
        open_lock(tmp_path / 'lock')
    with locked(tmp_path / 'lock') as alone, locked(tmp_path / 'precious') as other:
        assert not alone and other
    assert (tmp_path / 'precious').read_text() == 'kept'


def test_a_cache_that_others_may_write_is_refused(tmp_path, monkeypatch):
    shared = tmp_path / 'shared'
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UserError, match=r'may be written by other users.*--cache_dir'):
        cache_folder(str(shared))
    shared.chmod(0o700)
    assert cache_folder(str(shared)) == shared and is_cache(str(shared)) and not is_cache(str(tmp_path))
    monkeypatch.setattr('os.getuid', lambda: shared.stat().st_uid + 1)
    with pytest.raises(UserError, match='belongs to another user'):
        cache_folder(str(shared))


def test_an_entry_that_was_changed_is_made_anew(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        np.save(folder / 'x.npy', np.arange(3))
        (folder / 'sub').mkdir()
        (folder / 'sub' / 'a.txt').write_text('abc')
        return {'n': 3}

    def use():
        return cached_files(str(tmp_path), 'key', make, lambda folder, fields: (folder, fields))
    folder, fields = use()
    assert fields == {'n': 3} and use() == (folder, fields) and len(made) == 1
    changes = [lambda: (folder / 'sub' / 'a.txt').write_text('abcd'),
               lambda: (folder / 'planted').write_text(''),
               lambda: (folder / 'index').write_text((folder / 'index').read_text().replace('3', '4'))]
    for number, change in enumerate(changes, 2):
        change()
        assert use() == (folder, {'n': 3}) and len(made) == number


# ---------------------------------------------------------------------------------------------------- volumes

def test_an_axis_that_gets_lost_is_a_singular_affine(tmp_path):
    nibabel = pytest.importorskip('nibabel')
    affine = np.eye(4)
    affine[:2, :2] = [[1e20, 1e20], [0, 1e-15]]                          # its determinant is 1e5
    image = nibabel.Nifti1Image(np.zeros((3, 3, 3), np.float32), affine)
    image.to_filename(tmp_path / 'a.nii')
    with pytest.raises(Unreadable, match='singular affine'):
        read_nifti(tmp_path / 'a.nii')


# ----------------------------------------------------------------------------------------------------- tables

def test_a_cell_that_looks_like_a_formula_is_text(tmp_path):
    cells = ['=1+1', '+cmd', '-x', '@a', '-1.5', '-inf', '+2', -3, 'plain', '']
    write_csv(tmp_path / 'a.csv', ['id'] * len(cells), [cells])
    assert (tmp_path / 'a.csv').read_text().splitlines()[1] == "'=1+1,'+cmd,'-x,'@a,-1.5,-inf,+2,-3,plain,"


def test_a_file_that_cannot_be_read_is_not_called_the_cache(tmp_path):
    def denied(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), '/data/set.tar')
    with pytest.raises(UserError, match=r'^/data/set.tar cannot be read .Permission denied'):
        cached_files(str(tmp_path / 'cache'), {}, denied, lambda folder, fields: folder)


def test_what_killed_processes_left_in_the_cache_goes(tmp_path):
    home = cache_folder(str(tmp_path / 'cache'))
    for name in ('dead', 'alive'):
        (home / f'{name}.x7.tmp').mkdir()
    with locked(home / 'alive.lock'):
        cached_files(str(home), {}, lambda folder: {}, lambda folder, fields: folder)
    assert [path.name for path in home.glob('*.tmp')] == ['alive.x7.tmp']
