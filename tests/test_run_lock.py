"""One run, one folder: a second start is refused and leaves nothing behind; a dead run keeps no lock."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT
from test_train import run, start, wait_for

import train
from distributed.environment import free_port
from storage.locks import LOCK, only_process
from utils import UserError, run_program

HOLD = ('import sys, time; from pathlib import Path; from storage.locks import only_process\n'
        'with only_process(Path(sys.argv[1])) as other: print(other or "mine", flush=True); time.sleep(60)')


def hold(folder):
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE,
                               text=True)
    return process, process.stdout.readline().strip()


def test_a_lock_is_that_of_one_process_and_ends_with_it(tmp_path):
    first, said = hold(tmp_path / 'run')
    assert said == 'mine'
    with only_process(tmp_path / 'run') as other:
        assert other.startswith(f'process {first.pid} on ')
    assert (tmp_path / 'run' / LOCK).exists(), 'it is that of the other process'
    first.kill()
    first.wait()
    with only_process(tmp_path / 'run') as other:
        assert not other
        second, said = hold(tmp_path / 'run')
        second.kill()
        assert said == f'process {os.getpid()} on {os.uname().nodename}'
        second.wait()
    assert list((tmp_path / 'run').iterdir()) == []


def test_folders_that_were_made_for_nothing_go_and_others_stay(tmp_path):
    (tmp_path / 'runs').mkdir()
    with only_process(tmp_path / 'runs' / 'a' / 'b'):
        pass
    assert (tmp_path / 'runs').exists() and not (tmp_path / 'runs' / 'a').exists()


def test_where_nobody_can_lock_everybody_enters(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(38, 'not implemented')
    monkeypatch.setattr(fcntl, 'lockf', unable)
    with only_process(tmp_path / 'run') as other:
        assert other == ''


@pytest.mark.parametrize('more, told', [
    (['--val_fraction', '0', '--keep_best'], '--keep_best chooses'), (['--data', '/nowhere'], '/nowhere'),
    (['--cuda_graph'], '--cuda_graph is for a GPU'), (['--wandb_project', 'x'], 'pip install wandb')])
def test_a_refused_start_leaves_nothing_behind(more, told, train_flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(UserError, match=told):
        run([*train_flags, *more], tmp_path / 'runs', 'a')
    assert not (tmp_path / 'runs').exists()


def refused(rank, port, flags, folder):
    """A process that was started by hand: its errors and its status go to files."""
    os.dup2(os.open(folder / f'said{rank}', os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE='2',
                      MASTER_PORT=str(port))
    sys.argv = ['train.py', *flags, '--root', str(folder / 'runs')]
    try:
        run_program(train.main)
    except SystemExit as ended:
        (folder / f'status{rank}').write_text(str(ended.code))


@pytest.mark.parametrize('told', ['is in use by process', 'holds a run without', '/nowhere'])
def test_two_processes_are_refused_with_a_line_each_and_leave_nothing(told, train_flags, tmp_path,
                                                                      forked_processes):
    runs, folder = tmp_path / 'runs', tmp_path / 'runs' / 'eval-exp'
    with only_process(folder) if 'use' in told else nullcontext():
        if 'holds' in told:
            folder.mkdir(parents=True)
            (folder / 'args.json').touch()
        before = sorted(runs.rglob('*'))
        flags = [*train_flags, '--data', '/nowhere'] if told == '/nowhere' else train_flags
        torch.multiprocessing.start_processes(refused, (free_port(), flags, tmp_path), nprocs=2)
        assert sorted(runs.rglob('*')) == before
    for rank in range(2):
        said = (tmp_path / f'said{rank}').read_text()
        assert said.startswith('error: ') and told in said and said.count('\n') == 1, said
        assert (tmp_path / f'status{rank}').read_text() == '2'


def test_a_second_start_is_refused_and_a_killed_run_can_go_on(train_flags, tmp_path):
    flags = [*train_flags, '--epochs', '4000', '--val_every', '5000', '--save_every', '1000000']
    first = start(flags, tmp_path, 'a')
    wait_for(tmp_path / 'eval-a' / 'metrics.jsonl', first)
    before = sorted(p.name for p in (tmp_path / 'eval-a').iterdir())
    for more in ([], ['--cont_training']):
        with pytest.raises(UserError, match=f'is in use by process {first.pid} on .*--save'):
            run([*flags, *more], tmp_path, 'a')
    assert sorted(p.name for p in (tmp_path / 'eval-a').iterdir()) == before
    first.kill()
    first.communicate()
    with pytest.raises(UserError, match='already holds a run without a checkpoint'):
        run(train_flags, tmp_path, 'a')
    run(train_flags, tmp_path, 'a', '--cont_training')
    assert LOCK not in [p.name for p in (tmp_path / 'eval-a').iterdir()]


def test_a_signal_while_data_are_read_ends_the_run_without_a_trace(train_flags, tmp_path):
    slow = tmp_path / 'slow.py'
    slow.write_text('import sys, time; sys.argv = sys.argv[1:]\n'
                    'import train, training.trainer as t\n'
                    'def slow(*_):\n    print("reading", flush=True); time.sleep(60)\n'
                    't.load_data = slow\ntrain.run_program(train.main)\n')
    process = subprocess.Popen([sys.executable, slow, 'train.py', *train_flags, '--root', tmp_path / 'runs'],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert process.stdout.readline() == 'reading\n'
    since = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and output == 'ended by SIGUSR1\n' and time.monotonic() - since < 10
    assert not (tmp_path / 'runs').exists()
