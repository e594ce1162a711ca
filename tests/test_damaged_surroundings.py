"""What a run meets: a full disk, a folder that may not be written, odd names, workers that are killed."""

import errno
import os
import signal
import sys
import threading

import pytest
import torch
from PIL import Image
from test_train import run
from torch.utils.data import Dataset

import utils
from distributed import launch
from readers.batches import _load
from readers.images.files import image_files
from readers.items import Item
from storage import run_log
from storage.checkpoint import copies, read_checkpoint
from storage.provenance import starts
from storage.run_log import RunLog
from utils import UserError, read_flags


class Full:
    """os.write on a disk that is full for the first calls, for half of the bytes or for all by turns."""

    def __init__(self, times):
        self.times, self.real = times, os.write

    def __call__(self, descriptor, data):
        self.times -= 1
        if self.times >= 0 and self.times % 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(descriptor, data[:len(data) // 2] if self.times >= 0 else data)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_log, 'WAIT_FOR_ROOM', 0.3)
    monkeypatch.setattr(run_log, 'ROOM_PAUSE', 0.05)


def test_a_log_waits_for_room_and_has_whole_lines(tmp_path, impatient, monkeypatch, capsys):
    log = RunLog(tmp_path, tensorboard=False)
    monkeypatch.setattr(os, 'write', Full(2))
    log.metrics(1, {'loss': 1.0})
    log.metrics(2, {'loss': 2.0})
    assert [utils.read_line(line)['step'] for line in (tmp_path / 'metrics.jsonl').open('rb')] == [1, 2]
    assert 'No space left on device. Make room there' in capsys.readouterr().err
    for times in (1000, 1001):
        monkeypatch.setattr(os, 'write', Full(times))
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/metrics.jsonl'"):
            log.metrics(3, {'loss': 3.0})
    assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 2


def test_a_file_that_has_no_room_is_named(tmp_path):
    def write(_):
        with open('/dev/full', 'w') as file:
            file.write('x')
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a.json'"):
        utils.write_atomically(tmp_path / 'a.json', write)


def test_events_end_on_a_full_disk_and_the_run_goes_on(train_flags, tmp_path, monkeypatch, capfd):
    """As the thread that writes them does: it fails, and the next event meets its error."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(gfile.LocalFileSystem, 'append', full)
    monkeypatch.setattr(threading, 'excepthook', threading.__excepthook__)
    folder = run(train_flags, tmp_path, 'a')
    said = capfd.readouterr()
    assert said.out.count('WARNING: no more events for TensorBoard (No space left on device)') == 1
    assert 'done: 8 steps' in said.out and 'Traceback' not in said.err
    assert read_checkpoint(folder)['step'] == 8


def test_a_run_on_a_full_disk_ends_with_one_line_and_keeps_its_checkpoint(train_flags, tmp_path, impatient,
                                                                         monkeypatch):
    folder, real = run(train_flags, tmp_path, 'a', '--max_steps', '2'), torch.save

    def full(content, file):
        real(content, file)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'checkpoint.pt')
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', full)
        with pytest.raises(UserError, match=r'checkpoint.pt: No space left on device\. Make room there'):
            run(train_flags, tmp_path, 'a', '--max_steps', '3', '--cont_training')
    assert read_checkpoint(folder)['step'] == 2 and not list(folder.glob('.*'))
    run(train_flags, tmp_path, 'a', '--max_steps', '3', '--cont_training')
    assert read_checkpoint(folder)['step'] == 3 and len(copies(folder / 'checkpoint.pt')) == 2
    assert [(start['step'], start['seed'], len(start['data'])) for start in starts(folder)] == [
        (0, 1, 64), (2, 1, 64), (2, 1, 64)]


def test_errors_of_the_file_system_are_one_line():
    def read_only(_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), '/runs/eval-a')
    config = read_flags(launch.LaunchConfig, {'device': 'cpu', 'num_threads': 1})
    with pytest.raises(UserError, match=r'/runs/eval-a: Read-only file system. Name a folder'):
        launch.launch(read_only, None, config)


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such names')
def test_a_file_name_that_is_no_utf_8_is_named(tmp_path):
    Image.new('L', (4, 4)).save(os.fsencode(tmp_path) + b'/a\xff.png', 'PNG')
    images, _ = image_files(tmp_path, {})
    with pytest.raises(UserError, match=r'the file name a\\xff.png is no UTF-8: rename it'):
        Item(images[0], 'normal')


class Deadly(Dataset):
    def __getitems__(self, keys):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(UserError, match=r'a process that prepares batches has ended .*Lower --num_workers'):
        next(_load(Deadly(), iter([[(0, 0)]] * 3), 1))


def test_a_run_is_verified_and_what_is_damaged_is_named(train_flags, tmp_path, program):
    folder = run(train_flags, tmp_path, 'a', '--max_steps', '1')
    done = program('scripts/verify_run.py', folder)
    assert done.stdout.count('ok ') == 8 and '60 images unchanged' in done.stdout, done.stdout
    path = folder / 'checkpoint.pt'
    path.write_bytes(path.read_bytes()[:-1])
    (folder / 'metrics.jsonl').write_text('{"step"')
    done = program('scripts/verify_run.py', folder, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith('FAILED')]
    assert done.returncode == 1 and [line.split()[1] for line in failed] == [
        'checkpoint.pt', 'metrics.jsonl', 'split.json'], done.stdout + done.stderr
    path.unlink()
    (folder / 'split.json').unlink()
    (folder / 'run.json').write_text('5')
    done = program('scripts/verify_run.py', folder, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith('FAILED')]
    assert done.returncode == 1 and [line.split()[1] for line in failed] == [
        'checkpoint.pt', 'metrics.jsonl', 'run.json', 'split.json', 'data'], done.stdout + done.stderr
