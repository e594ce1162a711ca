"""What a program tells of its progress in a log, where there is no bar."""

import pytest
import torch

from distributed import launch
from distributed import progress as module
from distributed.progress import progress
from training.run_folder import Progress


@pytest.fixture
def minutes(monkeypatch):
    """A clock that has gone on by half a minute at every look."""
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(module.time, 'monotonic', lambda: next(clock))


def test_a_loop_tells_a_log_once_a_minute(minutes, capsys):
    assert list(progress(iter('abcdefg'), 'test', 7)) == list('abcdefg')
    assert capsys.readouterr().err.splitlines() == [
        'test: batch 2 of 7', 'test: batch 4 of 7', 'test: batch 6 of 7']


def test_only_the_main_process_tells(minutes, capsys, monkeypatch):
    monkeypatch.setattr(launch, 'is_main', lambda: False)
    assert list(progress(range(9), 'test', 9)) == list(range(9)) and capsys.readouterr().err == ''


def test_a_training_tells_a_log_once_a_minute(minutes, capsys):
    shown = Progress('loss', 10, 20)
    for value in (3.0, 2.0, 1.0):
        shown.update({'train/loss_iter': torch.tensor(value)}, 4)
    assert capsys.readouterr().err.splitlines() == ['step 12 of 20: loss 2']
