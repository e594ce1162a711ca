"""Weights & Biases, MLflow and TensorBoard: what stand-ins are asked for, and what a run tells."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from distributed import launch
from training.trackers import TRACKERS, Tracker, start_trackers
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


@pytest.mark.parametrize('flag, library', [('wandb_project', 'wandb'), ('mlflow_experiment', 'mlflow')])
def test_a_missing_library_is_said(flag, library, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f'pip install {library}'):
        start_trackers(tmp_path / 'run', {flag: 'brains'})
    assert not (tmp_path / 'run').exists()


def test_mlflow_gets_flags_once_and_every_finite_metric(monkeypatch, tmp_path):
    asked, started = [], SimpleNamespace(info=SimpleNamespace(run_id='id-1'))
    note = lambda name: lambda *args, **words: asked.append((name, *args, *words.items())) or started
    monkeypatch.setitem(sys.modules, 'mlflow', SimpleNamespace(**{name: note(name) for name in (
        'set_experiment', 'start_run', 'log_params', 'log_metrics', 'end_run')}))
    for known in (None, 'id-1'):
        trackers = start_trackers(tmp_path, {'mlflow_experiment': 'brains', 'epochs': 3, 'data': 'x' * 600})
        tracker = trackers['mlflow']
        tracker.metrics(7, {'val/loss': 0.5, 'train/grad_norm': float('nan')})
        tracker.finish()
        assert asked.pop(0) == ('set_experiment', 'brains')
        assert asked.pop(0) == ('start_run', ('run_id', known), ('run_name', tmp_path.name))
        if known is None:
            texts = {'mlflow_experiment': 'brains', 'epochs': '3', 'data': 'x' * 500}
            assert asked.pop(0) == ('log_params', texts)
        assert asked == [('log_metrics', {'val/loss': 0.5}, ('step', 7)), ('end_run',)]
        asked.clear()


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(train_flags, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ConnectionError('no server')
    monkeypatch.setitem(TRACKERS, 'mlflow_experiment', ('json', lambda *_: Tracker('id-1', fail, fail)))
    run([*train_flags, '--root', str(tmp_path), '--mlflow_experiment', 'brains'])
    told = capsys.readouterr().out
    assert told.count('WARNING: nothing more goes to') == 1 and 'done: 8 steps' in told


def test_a_run_tells_tensorboard_its_flags_and_the_log_the_auroc_that_is_watched(train_flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run([*train_flags, '--root', str(tmp_path), '--epochs', '1', '--monitor_anomalies', '8'])
    folder = tmp_path / 'eval-exp'
    line, = [line for line in map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
             if 'monitor/auroc_nelbo' in line]
    assert 0 <= line['monitor/auroc_nelbo'] <= 1 and 'val/nelbo' in line
    assert f"AUROC of nelbo {line['monitor/auroc_nelbo']:.3f} (monitored" in (folder / 'log.txt').read_text()
    events = EventAccumulator(str(folder))
    events.Reload()
    flags, = events.Tensors('flags/text_summary')
    assert b'| `epochs` | 1 |' in flags.tensor_proto.string_val[0]
    assert '_hparams_/session_start_info' in events.summary_metadata
