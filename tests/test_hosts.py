"""Two hosts: started as published, by torchrun, by mpirun; with a cable that is cut and a host that dies.

Hosts are network namespaces of this machine, joined by a cable: that needs root and iproute2. Their host name
leads nowhere, as on many a cluster.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from processes import MPIRUN, TORCHRUN, end, needs_mpirun, saved, start, wait_for_step

from distributed import launch

ADDRESSES = '10.77.0.1', '10.77.0.2'


class Hosts:
    """Two network namespaces with an address each and no route elsewhere, joined by a cable."""

    def __init__(self):
        self.names = [f'nvae-{os.getpid()}-{side}' for side in 'ab']
        a, b = self.names
        for name in self.names:
            self.ip('netns', 'add', name)
        self.ip('link', 'add', 'cable', 'netns', a, 'type', 'veth', 'peer', 'name', 'cable', 'netns', b)
        for name, address in zip(self.names, ADDRESSES):
            self.ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', 'cable')
            self.ip('-n', name, 'link', 'set', 'lo', 'up')
            self.cable('up', name)

    def ip(self, *words):
        subprocess.run(['ip', *words], check=True, capture_output=True, timeout=30)

    def cable(self, state, name=None):
        self.ip('-n', name or self.names[1], 'link', 'set', 'cable', state)

    def kill(self, name):
        """As if the host lost its power."""
        found = subprocess.run(['ip', 'netns', 'pids', name], capture_output=True, text=True).stdout.split()
        for number in found:
            os.kill(int(number), signal.SIGKILL)

    def remove(self):
        for name in self.names:
            self.kill(name)
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


@pytest.fixture
def hosts():
    if shutil.which('ip') is None or os.geteuid() != 0:
        pytest.skip('two hosts are network namespaces: that needs root and iproute2')
    made = None
    try:
        made = Hosts()
    except (subprocess.SubprocessError, OSError) as error:
        for side in 'ab':
            subprocess.run(['ip', 'netns', 'del', f'nvae-{os.getpid()}-{side}'], capture_output=True)
        pytest.skip(f'network namespaces cannot be made here: {getattr(error, "stderr", error)}')
    yield made
    made.remove()


def published(hosts, flags, log):
    """The command of the published README on each of two hosts."""
    return [start([sys.executable, 'train.py', *flags, '--num_proc_node', '2', '--node_rank', rank,
                   '--num_process_per_node', '1', '--master_address', ADDRESSES[0]],
                  log.with_suffix(f'.{rank}'), name) for rank, name in enumerate(hosts.names)]


def test_a_cable_that_is_out_for_seconds_changes_nothing(hosts, undisturbed, tmp_path, same_weights):
    flags, whole = undisturbed
    processes = published(hosts, [*flags, '--root', tmp_path], tmp_path / 'log')
    wait_for_step(tmp_path / 'eval-exp', 5, *processes)
    hosts.cable('down')
    at = wait_for_step(tmp_path / 'eval-exp', 5, *processes)
    time.sleep(3)
    assert wait_for_step(tmp_path / 'eval-exp', 5, *processes) <= at + 1, 'the cable is the one they use'
    hosts.cable('up')
    assert end(*processes) == [0, 0], [path.read_text() for path in tmp_path.glob('log*')]
    assert same_weights(tmp_path / 'eval-exp' / 'checkpoint.pt', whole)


def test_a_host_that_is_gone_for_good_ends_the_run_in_minutes(hosts, undisturbed, tmp_path):
    """Of which there are 0.2 here; with one line, a status that asks for another try, and the checkpoint."""
    flags, _ = undisturbed
    processes = published(hosts, [*flags, '--root', tmp_path, '--timeout', '0.2'], tmp_path / 'log')
    wait_for_step(tmp_path / 'eval-exp', 5, *processes)
    hosts.cable('down')
    since = time.monotonic()
    assert end(*processes) == [launch.LOST_STATUS] * 2
    assert time.monotonic() - since < 150, 'minutes, not hours'
    for rank in range(2):
        errors = [line for line in (tmp_path / f'log.{rank}').read_text().splitlines() if 'error' in line]
        assert len(errors) == 1 and '--cont_training' in errors[0], errors
    assert saved(tmp_path / 'eval-exp')['step'] >= 3


def test_torchrun_goes_on_after_a_host_was_started_again(hosts, undisturbed, tmp_path, same_weights):
    flags, whole = undisturbed
    quickly = 'join_timeout=120,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5'

    def torchrun(rank):
        return start([*TORCHRUN, '--nnodes', '2', '--nproc_per_node', '1', '--max_restarts', '3',
                      '--rdzv_id', '7', '--rdzv_backend', 'c10d', '--rdzv_endpoint', f'{ADDRESSES[0]}:29400',
                      '--rdzv_conf', f'is_host={int(rank == 0)},{quickly}', '--local_addr', ADDRESSES[rank],
                      'train.py', *flags, '--root', tmp_path], tmp_path / f'log.{rank}', hosts.names[rank],
                     TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')

    first, second = torchrun(0), torchrun(1)
    wait_for_step(tmp_path / 'eval-exp', 5, first, second)
    hosts.kill(hosts.names[1])
    end(second)
    assert end(first, torchrun(1)) == [0, 0], [path.read_text() for path in tmp_path.glob('log*')]
    assert 'continuing at step' in (tmp_path / 'log.0').read_text()
    assert saved(tmp_path / 'eval-exp')['step'] == 24
    assert same_weights(tmp_path / 'eval-exp' / 'checkpoint.pt', whole)


REMOTE_SHELL = '''#!/bin/sh
# What mpirun takes for ssh: [options] HOST COMMAND. The other host is a network namespace.
while [ "${1#-}" != "$1" ]; do shift; done
shift
exec ip netns exec %s env NODE_RANK=1 sh -c "$*"
'''


@needs_mpirun
def test_mpirun_of_the_published_readme_on_two_hosts(hosts, train_flags, tmp_path):
    """mpirun starts one shell a host, which starts train.py, which starts the processes of the host."""
    shell = tmp_path / 'shell'
    shell.write_text(REMOTE_SHELL % hosts.names[1])
    shell.chmod(0o755)
    command = ' '.join([sys.executable, 'train.py', *train_flags, '--batch_size', '4', '--max_steps', '2',
                        '--root', str(tmp_path), '--node_rank $NODE_RANK --num_proc_node 2',
                        '--num_process_per_node 2 --master_address $IP_ADDR'])
    process = start([*MPIRUN, '--mca', 'plm_rsh_agent', shell, '--mca', 'btl', 'tcp,self', '--host',
                     ','.join(f'{address}:1' for address in ADDRESSES), '-npernode', '1', '-x', 'IP_ADDR',
                     'bash', '-c', f'cd {ROOT} && {command}'], tmp_path / 'log', hosts.names[0],
                    NODE_RANK='0', IP_ADDR=ADDRESSES[0])
    assert end(process) == [0], (tmp_path / 'log').read_text()
    log = (tmp_path / 'log').read_text()
    assert '4 process(es) on cpu' in log and log.count('done: 2 steps') == 1
    assert saved(tmp_path / 'eval-exp')['joint_batch'] == 16
