"""The batch script for Slurm, with a stand-in for srun that sets the variables of a job step."""

import os
import sys
import time

import pytest
from conftest import ROOT
from processes import end, saved, start

from distributed.environment import free_port

SRUN = '''#!{python}
"""Stands in for srun: {tasks} tasks on one node, with the variables that Slurm sets."""
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith('--'):
    words.pop(0)
common = dict(SLURM_STEP_NUM_TASKS='{tasks}', SLURM_STEP_TASKS_PER_NODE='{tasks}',
              SLURM_STEP_NODELIST='gpu07', SLURM_NODEID='0', SLURM_STEP_ID='0')
tasks = [subprocess.Popen(words, env=dict(os.environ, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **common))
         for i in range({tasks})]
sys.exit(max(task.wait() for task in tasks))
'''


def sbatch(tmp_path, *words, python=sys.executable, tasks=2, **env):
    """Runs the batch script as Slurm would; its status, and whether the job went back to the queue."""
    tools = tmp_path / 'bin'
    tools.mkdir(exist_ok=True)
    (tools / 'srun').write_text(SRUN.format(python=sys.executable, tasks=tasks))
    (tools / 'scontrol').write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / 'requeued').unlink(missing_ok=True)
    process = start(['bash', 'scripts/slurm/train.sbatch', *words], tmp_path / 'log',
                    PATH=f'{tools}:{os.environ["PATH"]}', PYTHON=str(python), SLURM_JOB_ID=str(free_port()),
                    SLURM_SUBMIT_DIR=str(ROOT), **env)
    status, = end(process)
    return status, (tmp_path / 'requeued').exists()


def test_a_slurm_job_trains_and_another_goes_on(train_flags, tmp_path):
    flags = [*train_flags, '--batch_size', '4', '--root', tmp_path]
    assert sbatch(tmp_path, *flags, '--max_steps', '1') == (0, False), (tmp_path / 'log').read_text()
    assert '2 process(es) on cpu' in (tmp_path / 'log').read_text()
    assert saved(tmp_path / 'eval-exp')['step'] == 1
    assert sbatch(tmp_path, *flags, '--max_steps', '2', tasks=1) == (0, False), (tmp_path / 'log').read_text()
    assert saved(tmp_path / 'eval-exp')['step'] == 2


@pytest.mark.parametrize('status, left, restarts, again', [
    (143, 290, 7, True),                  # a checkpoint was written because the time limit is near
    (143, 7200, 0, False),                # the user ended the job
    (75, 7200, 0, True), (75, 7200, 5, False),
    (2, 290, 0, False), (0, 290, 0, False)])
def test_when_a_slurm_job_goes_back_to_the_queue(tmp_path, status, left, restarts, again):
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\nexit {status}\n')
    python.chmod(0o755)
    assert sbatch(tmp_path, '--save', 'a b', python=python, tasks=1, SLURM_RESTART_COUNT=str(restarts),
                  SLURM_JOB_END_TIME=str(int(time.time()) + left)) == (status, again)
    assert (tmp_path / 'words').read_text() == 'train.py --cont_training --save a b\n'
