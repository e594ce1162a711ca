"""Checkpoints: what was saved comes back, whole or not at all; nothing in a file is run."""

import argparse
import os
import random
import socket

import pytest
import torch

from storage.checkpoint import copies, read_checkpoint, save_checkpoint
from storage.locks import clear_leftovers
from utils import TEMPORARY, UserError, temporary_name

CONTENT = {'weights': {'w': torch.arange(6.).view(2, 3), 'n': torch.tensor(True)}, 'step': 7, 'rate': 0.5,
           'args': {'name': 'x', 'kinds': ['a'], 'none': None}}


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / 'checkpoint.pt', CONTENT)
    return tmp_path / 'checkpoint.pt'


def test_what_was_saved_comes_back_from_file_or_folder(path):
    for where in (path, str(path), path.parent):
        got = read_checkpoint(where)
        assert torch.equal(got['weights']['w'], CONTENT['weights']['w']) and got['weights']['n']
        assert all(got[key] == CONTENT[key] for key in ('step', 'rate', 'args'))


def test_a_save_that_fails_leaves_the_last_checkpoint(path):
    with pytest.raises(Exception, match='pickle'):
        save_checkpoint(path, {'step': 8, 'bad': lambda: None})
    assert read_checkpoint(path)['step'] == 7 and list(path.parent.iterdir()) == [path]


def test_what_killed_processes_left_is_cleared_and_nothing_else(path):
    dead, alive, elsewhere = (path.parent / f'.checkpoint.pt.{host}.{pid}.0123abcd.tmp' for host, pid in (
        (socket.gethostname()[:40], 2 ** 22 + 1), (socket.gethostname()[:40], os.getpid()), ('host.b', 1)))
    for left in (dead, alive, elsewhere, path.parent / '.mine.tmp'):
        left.write_bytes(b'half')
    clear_leftovers(path.parent)
    assert not dead.exists() and alive.exists() and elsewhere.exists()
    clear_leftovers(path.parent, all_of_them=True)
    assert sorted(p.name for p in path.parent.iterdir()) == ['.mine.tmp', 'checkpoint.pt']


def test_temporary_names_are_never_the_same_and_say_whose_they_are():
    names = [temporary_name('a' * 300) for _ in range(2)]
    assert names[0] != names[1] and max(map(len, names)) < 150
    assert TEMPORARY.fullmatch(names[0])['pid'] == str(os.getpid())


# ------------------------------------------------------------------------------------------ older and damaged

def test_the_newest_are_kept(path):
    for step in (8, 9, 10):
        save_checkpoint(path, {'step': step}, keep=3)
    assert [read_checkpoint(p)['step'] for p in copies(path)] == [10, 9, 8]
    save_checkpoint(path, {'step': 11}, keep=2)
    assert [(p.name, read_checkpoint(p)['step']) for p in copies(path)] == [
        ('checkpoint.pt', 11), ('checkpoint-1.pt', 10)]
    assert len(list(path.parent.iterdir())) == 2


def test_without_links_the_checkpoint_before_is_kept_too(path, monkeypatch):
    monkeypatch.setattr(os, 'link', raises(OSError('no links here')))
    save_checkpoint(path, {'step': 8}, keep=2)
    assert [read_checkpoint(p)['step'] for p in copies(path)] == [8, 7]


def raises(error):
    def fail(*_, **__):
        raise error
    return fail


def test_every_flipped_bit_is_noticed_and_the_checkpoint_before_is_used(path):
    save_checkpoint(path, CONTENT | {'step': 8}, keep=2)
    whole, noise, said = path.read_bytes(), random.Random(0), []
    assert read_checkpoint(path, said.append)['step'] == 8 and not said
    for place in [noise.randrange(len(whole)) for _ in range(300)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << noise.randrange(8)
        path.write_bytes(damaged)
        assert read_checkpoint(path, said.append)['step'] == 7
    assert len(said) == 300 and all(line.startswith('WARNING: ') and 'step 7' in line for line in said)
    path.unlink()
    assert read_checkpoint(path.parent, said.append)['step'] == 7 and 'there is no' in said[-1]


def test_a_zip_without_our_seal_has_its_own_checksums(path):
    torch.save(CONTENT, path)
    assert read_checkpoint(path)['step'] == 7
    whole = path.read_bytes()
    place = whole.index(CONTENT['weights']['w'].numpy().tobytes())
    path.write_bytes(whole[:place + 5] + bytes([whole[place + 5] ^ 1]) + whole[place + 6:])
    with pytest.raises(UserError, match='is damaged: its checksums differ'):
        read_checkpoint(path)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / 'checkpoint.pt')
    with pytest.raises(UserError, match='is a device or a pipe'):
        read_checkpoint(tmp_path)


def test_a_namespace_of_flags_is_data(path):
    torch.save({'args': argparse.Namespace(num_nf=2)}, path)
    assert read_checkpoint(path)['args'].num_nf == 2


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_named_and_not_run(path, tmp_path):
    torch.save({'weights': {}, 'trap': Trap(tmp_path / 'sprung')}, path)
    with pytest.raises(UserError, match=r'mkdir, which is code and not data') as told:
        read_checkpoint(path)
    assert not (tmp_path / 'sprung').exists() and '\n' not in str(told.value) and str(path) in str(told.value)


def test_a_missing_file_is_named(tmp_path):
    for where, missing in ((tmp_path / 'no.pt', 'no.pt'), (tmp_path, 'checkpoint.pt')):
        with pytest.raises(UserError, match=f'there is no checkpoint .*{missing}'):
            read_checkpoint(where)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_every_damaged_file_is_one_clear_line(path):
    """Cut off, overwritten, empty, or not a checkpoint at all: never a traceback of the unpickler."""
    whole, noise = path.read_bytes(), random.Random(0)
    damaged = [b'', b'hello world, this is text', b'\x80\x02}', whole[:-1], b'PK\x03\x04' + bytes(50)]
    damaged += [whole[:noise.randrange(len(whole))] for _ in range(40)]
    damaged += [noise.randbytes(noise.randrange(60)) for _ in range(200)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError) as told:
            read_checkpoint(path)
        assert '\n' not in str(told.value) and str(path) in str(told.value)


def test_a_tensor_alone_is_no_checkpoint(path):
    torch.save(torch.zeros(3), path)
    with pytest.raises(UserError, match='holds a Tensor'):
        read_checkpoint(path)
