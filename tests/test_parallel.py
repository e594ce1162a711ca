"""Many processes are one: under every launcher, in training and evaluation, and after one was killed."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import MPIRUN, TORCHRUN, end, needs_mpirun, saved, start, wait_for_step
from test_score import FLAGS as SCORE_FLAGS

import evaluate
from distributed import launch
from distributed.environment import free_port
from utils import read_flags

# ---------------------------------------------------------------------------------- as one process would do

STEPS_20 = ['--arch_instance', 'res_elu', '--epochs', '5', '--val_every', '100', '--val_iw_samples', '1']
LAUNCHERS = {
    'spawned': [sys.executable, 'tests/equal_noise.py', '--num_process_per_node', '2'],
    'torchrun': [*TORCHRUN, '--nproc_per_node', '2', 'tests/equal_noise.py'],
    'mpirun': [*MPIRUN, '-np', '2', sys.executable, 'tests/equal_noise.py', '--master_port', '{port}'],
}
MARKS = {'mpirun': needs_mpirun, 'torchrun': pytest.mark.slow}         # of torchrun, the tests below tell


@pytest.fixture(scope='module')
def one_process(train_flags, tmp_path_factory):
    """20 steps on the joint batch, in float64; the KL balancing is on in the first 6."""
    folder = tmp_path_factory.mktemp('one')
    process = start([sys.executable, 'tests/equal_noise.py', *train_flags, *STEPS_20, '--root', folder],
                    folder / 'log')
    assert end(process) == [0], (folder / 'log').read_text()
    return saved(folder / 'eval-exp')


@pytest.mark.parametrize('name', [pytest.param(name, marks=MARKS.get(name, ())) for name in LAUNCHERS])
def test_two_processes_come_to_the_weights_of_one(name, one_process, train_flags, tmp_path):
    """DDP, Adamax, warm-up, regularizers, KL balancing and initialization from data: to rounding."""
    words = [word.format(port=free_port()) for word in LAUNCHERS[name]]
    process = start([*words, *train_flags, *STEPS_20, '--batch_size', '4', '--root', tmp_path],
                    tmp_path / 'log')
    assert end(process) == [0], (tmp_path / 'log').read_text()
    two = saved(tmp_path / 'eval-exp')
    assert two['step'] == one_process['step'] == 20 and two['joint_batch'] == 8
    for key, weight in one_process['weights'].items():
        torch.testing.assert_close(two['weights'][key], weight, rtol=0, atol=1e-10, msg=key)
    assert one_process['weights']['stem.weight'].dtype == torch.float64


def test_two_processes_come_to_the_scores_of_one(train_flags, tmp_path):
    """A score-based model: its times and its noise belong to an image of the joint batch."""
    flags, weights = [*SCORE_FLAGS, *train_flags[train_flags.index('--dataset'):], *STEPS_20[2:]], {}
    for name, words, more in (('one', [sys.executable, 'tests/equal_noise.py'], []),
                              ('two', LAUNCHERS['torchrun'], ['--batch_size', '4'])):
        process = start([*words, *flags, *more, '--root', tmp_path / name], tmp_path / 'log')
        assert end(process) == [0], (tmp_path / 'log').read_text()
        run = saved(tmp_path / name / 'eval-exp')
        assert run['step'] == 20 and run['joint_batch'] == 8
        weights[name] = run['weights']
    for key, weight in weights['one'].items():
        torch.testing.assert_close(weights['two'][key], weight, rtol=0, atol=1e-10, msg=key)


# ------------------------------------------------------------------------------------------------- evaluation

ONE_THREAD = ('--device', 'cpu', '--num_threads', '1')
EVALUATE = ['--eval_mode', 'evaluate', '--num_iw_samples', '2', '--batch_size', '3']   # 20 images: 7 batches


def evaluated(checkpoint, out, *more):
    """Evaluates in this process."""
    args = evaluate.parse_args(['--checkpoint', str(checkpoint), '--save', str(out), *ONE_THREAD, *more])
    assert launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args)) == 0
    return out


def likelihood(out):
    return json.loads((out / 'metrics.json').read_text())['likelihood']


@pytest.mark.parametrize('launcher', [
    pytest.param([*MPIRUN, '-np', '3', sys.executable, 'evaluate.py', '--master_port', '{port}'],
                 marks=needs_mpirun, id='mpirun'),
    pytest.param([*TORCHRUN, '--nproc_per_node', '2', 'evaluate.py'], id='torchrun')])
def test_bounds_do_not_depend_on_the_number_of_processes(launcher, undisturbed, tmp_path):
    """7 batches of at most 3 images: neither 2 nor 3 processes share them evenly."""
    one = likelihood(evaluated(undisturbed[1], tmp_path / 'one', *EVALUATE))
    process = start([*(word.format(port=free_port()) for word in launcher), '--checkpoint', undisturbed[1],
                     '--save', tmp_path / 'many', *ONE_THREAD, *EVALUATE], tmp_path / 'log')
    assert end(process) == [0], (tmp_path / 'log').read_text()
    many = likelihood(tmp_path / 'many')
    assert many['num_images'] == one['num_images'] == 20
    for name in ('nelbo_nats', 'neg_log_p_nats', 'nelbo_bits_per_dim'):
        assert abs(many[name] - one[name]) <= 1e-6 * abs(one[name])


@pytest.mark.parametrize('mode, files', [
    (['--eval_mode', 'sample', '--num_samples', '7', '--batch_size', '3'],
     ['samples_0.npz', 'samples_1.npz', 'samples_2.npz', 'samples.png', 'metrics.json']),
    pytest.param(['--eval_mode', 'anomaly', '--num_iw_samples', '2', '--batch_size', '3', '--num_bootstrap',
                  '20'], ['scores.csv', 'thresholds.json'], marks=pytest.mark.slow)],
    ids=['sample', 'anomaly'])
def test_two_processes_leave_the_files_of_one(mode, files, undisturbed, tmp_path, forked_processes):
    checkpoint = tmp_path / 'run' / 'checkpoint.pt'            # a run folder of its own: thresholds go there
    checkpoint.parent.mkdir()
    for path in undisturbed[1].parent.glob('*.[jp]*'):
        shutil.copy(path, checkpoint.parent)
    one = evaluated(checkpoint, tmp_path / 'one', *mode)
    two = evaluated(checkpoint, tmp_path / 'two', *mode, '--num_process_per_node', '2')
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for name in files:
        if name.endswith('.npz'):
            assert np.array_equal(np.load(one / name)['samples'], np.load(two / name)['samples'])
        else:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


# --------------------------------------------------------------------------------------------------- failures

def child_of(parent, rank):
    """Process id of the worker with this rank that `parent` started."""
    for path in Path('/proc').glob('[0-9]*'):
        try:
            its_parent = int((path / 'stat').read_text().rsplit(')', 1)[1].split()[1])
            if its_parent == parent and f'RANK={rank}' in (path / 'environ').read_text().split('\0'):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f'{parent} has no worker with rank {rank}')


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='finds the processes of torchrun in /proc')
@pytest.mark.slow          # tests/test_hosts.py kills a whole host
def test_torchrun_goes_on_after_a_process_was_killed(undisturbed, tmp_path, same_weights):
    """Without --cont_training: what is restarted goes on from its checkpoint, to the same bits."""
    flags, whole = undisturbed
    process = start([*TORCHRUN, '--nproc_per_node', '2', '--max_restarts', '2', 'train.py', *flags, '--root',
                     tmp_path], tmp_path / 'log')
    wait_for_step(tmp_path / 'eval-exp', 5, process)
    os.kill(child_of(process.pid, 1), signal.SIGKILL)
    assert end(process) == [0], (tmp_path / 'log').read_text()
    log = (tmp_path / 'log').read_text()
    assert 'continuing at step' in log and 'error: lost touch with the other processes' in log
    assert saved(tmp_path / 'eval-exp')['step'] == 24
    assert same_weights(tmp_path / 'eval-exp' / 'checkpoint.pt', whole)


def test_a_restart_does_not_let_a_new_run_into_the_folder_of_an_old_one(undisturbed, tmp_path):
    """The first start refuses, so the second does too: it is not this job's run."""
    flags, whole = undisturbed
    process = start([*TORCHRUN, '--nproc_per_node', '1', '--max_restarts', '1', 'train.py', *flags,
                     '--batch_size', '8', '--root', whole.parents[1]], tmp_path / 'log')
    assert end(process) == [1]
    assert (tmp_path / 'log').read_text().count('already holds a trained model') == 2
