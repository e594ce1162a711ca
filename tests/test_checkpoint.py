"""Checkpoints: what was saved comes back, whole or not at all; nothing in a file is run."""

import argparse
import os
import random

import pytest
import torch

from utils import UserError, read_checkpoint, save_checkpoint

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


def test_what_a_kill_left_is_cleared_by_the_next_save(path):
    (path.parent / '.checkpoint.pt.4242.tmp').write_bytes(b'half')
    save_checkpoint(path, CONTENT)
    assert list(path.parent.iterdir()) == [path]


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
