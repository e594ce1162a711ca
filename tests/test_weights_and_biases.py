"""Weights & Biases: what a stand-in of the library is asked for. The library itself is not needed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from distributed import launch
from training.run_folder import start_wandb
from utils import UserError, read_flags


@pytest.fixture
def library(monkeypatch):
    """A stand-in of wandb that remembers what was asked for, and whether TensorBoard had begun by then."""
    asked = []

    def init(**words):
        begun = any(Path(words['dir']).glob('events.out*'))
        asked.append(SimpleNamespace(words=words, begun=begun, ends=0, id=words['id'] or f'id-{len(asked)}'))
        asked[-1].finish = lambda run=asked[-1]: setattr(run, 'ends', run.ends + 1)
        return asked[-1]

    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init))
    return asked


def run(flags):
    args = train.parse_args(flags)
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0


def test_a_run_is_shown_and_goes_on_where_it_was(library, train_flags, tmp_path):
    flags = [*train_flags, '--root', str(tmp_path), '--val_every', '100', '--cont_training']
    run([*flags, '--max_steps', '1'])
    assert not library                                                  # not asked for
    run([*flags, '--max_steps', '2', '--wandb_project', 'brains', '--save', 'shown'])
    run([*flags, '--max_steps', '3', '--wandb_project', 'brains', '--save', 'shown'])
    first, second = library
    assert first.words['project'] == 'brains' and first.words['name'] == 'eval-shown'
    assert first.words['sync_tensorboard'] and not first.begun and first.words['config']['max_steps'] == 2
    assert (first.words['id'], second.words['id'], second.words['resume']) == (None, first.id, 'allow')
    assert (first.ends, second.ends) == (1, 1)


def test_a_missing_library_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(UserError, match='pip install wandb'):
        start_wandb(tmp_path / 'run', 'brains', {})
    assert not (tmp_path / 'run').exists()
