"""Where the processes of a run meet: a store that all reach, who is there, who lives, and who is gone.

The store is served by process 0, or by torchrun, whose store outlives the processes that it starts again.
Waiting here has no limit as long as the others live: one of them may be decoding a data set, or writing a
report. That a process lives is what it says in the store every few seconds.
"""

import fcntl
import os
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from distributed.topology import LOOPBACK, Topology
from utils import UserError

MEETING_TIME = 600.0         # seconds that processes may start apart
NAME_TIME = 30.0             # seconds in which a name server may come to know the host of process 0
PULSE = 5.0                  # seconds between two signs of life, at most
LONGEST_PAUSE = 0.5          # seconds between two looks at the store
BEGUN = 'begun'              # the run is under way, and torchrun may start it again where it was
ENDED = 'ended'              # the last sign of life of a process that failed
SOMEWHERE = '192.0.2.1'      # an address that only the default route leads to (RFC 5737); nothing is sent
ADDRESS_OF_INTERFACE = 0x8915            # SIOCGIFADDR
GO_ON = "The last checkpoint is kept: start again, and training goes on from it with --cont_training."


class Meeting:
    """This process among the others of one start of a run."""

    def __init__(self, topology: Topology, timeout: float, give_up: Callable[[str], None]):
        """Meets the others; raises UserError if they do not come.

        A process that gives no sign of life for `timeout` seconds is gone: then `give_up` is called from
        another thread with a line that says so, and does not return.
        """
        self.rank, self.world, self.timeout = topology.rank, topology.world, timeout
        self.job = connect(topology)
        if begun_here():
            self.job.set(BEGUN, '')                                   # a host that is new does not know
        self.store = PrefixStore(fresh_prefix(self.job, topology), self.job)
        self.begun_before = self.job.check([BEGUN])
        self.meetings, self.give_up, self.leaving = 0, give_up, threading.Event()
        self.watch = threading.Thread(target=self._watch, args=(self.store.clone(),), daemon=True)
        self.watch.start()

    def assemble(self) -> None:
        """Waits for all processes, as long as they live."""
        self.meetings += 1
        key = f'meeting/{self.meetings}'
        if self.store.add(key, 1) == self.world:                      # the last one clears up the one before
            self.store.delete_key(f'meeting/{self.meetings - 1}')
        poll(lambda: self.store.add(key, 0) == self.world)

    def leave(self, failed: bool = False) -> None:
        """Ends the signs of life; `failed` tells the others not to wait for this process."""
        self.leaving.set()
        self.watch.join(PULSE)                                        # unless the network keeps it
        if failed:
            with suppress(RuntimeError):                              # there may be nobody left to tell
                self.store.set(f'alive/{self.rank}', ENDED)

    def _watch(self, store: Store) -> None:
        """Counts rounds, not seconds: a machine that was asleep does not take the others for dead."""
        pulse = min(PULSE, self.timeout / 4)
        others = [rank for rank in range(self.world) if rank != self.rank]
        keys, heard, silent, beat = [f'alive/{rank}' for rank in others], [b''] * len(others), {}, 0
        while not self.leaving.wait(pulse):
            beat += 1
            try:
                store.set(f'alive/{self.rank}', str(beat))
                signs = store.multi_get(keys)
            except RuntimeError:
                if not self.leaving.wait(pulse):                      # else the end of the run has come
                    self.give_up(f'the meeting point of the processes cannot be reached. {GO_ON}')
                return
            for rank, sign, before in zip(others, signs, heard):
                silent[rank] = silent.get(rank, 0) + 1 if sign == before else 0
                if sign == ENDED.encode():
                    self.give_up(f'process {rank} of {self.world} has ended with an error. {GO_ON}')
                if silent[rank] * pulse > self.timeout:
                    self.give_up(f'process {rank} of {self.world} gave no sign of life for '
                                 f'{self.timeout / 60:g} minutes: it, its host or the network is down. '
                                 f'{GO_ON}')
            heard = signs


def begun_mark() -> Path | None:
    """A file for those whom torchrun starts after this process, beside their logs; None without torchrun."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')                  # FOLDER/attempt_0/0/error.json
    return Path(path).parents[2] / BEGUN if path else None


def begun_here() -> bool:
    """Whether a process that torchrun started before this one, on this host, saw the run under way."""
    mark = begun_mark()
    return mark is not None and mark.exists()


def poll(ready: Callable[[], bool], seconds: float | None = None) -> bool:
    """Asks `ready()` again and again, ever more rarely; False if `seconds` were not enough."""
    since, pause = time.monotonic(), 0.01
    while not ready():
        if seconds is not None and time.monotonic() - since > seconds:
            return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return True


# -------------------------------------------------------------------------------------------- coming together

def connect(topology: Topology) -> Store:
    """The store at the meeting point; process 0 serves it unless torchrun does."""
    served = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' \
        and os.environ.get('MASTER_PORT') == str(topology.port)
    if topology.rank or served:
        return _client(topology.address, topology.port, topology.rank, topology.world)
    try:                                          # the address may be one that only the others see
        return TCPStore(LOOPBACK[0], topology.port, is_master=True, wait_for_workers=False)
    except (dist.DistError, OSError) as error:
        raise UserError(f"process 0 of {topology.world} cannot meet the others at port {topology.port} "
                        f"({_first_line(error)}). Choose another --master_port.") from None


def _client(address: str, port: int, rank: int, world: int) -> Store:
    since, reason = time.monotonic(), ''

    def answers() -> bool:
        nonlocal reason
        try:
            socket.create_connection((address, port), timeout=10).close()
        except OSError as error:
            reason = str(error)
            if isinstance(error, socket.gaierror) and time.monotonic() - since > NAME_TIME:
                raise UserError(f"process {rank} of {world} does not know the host {address} ({reason}). "
                                f"Give an address that all nodes reach with --master_address.") from None
            return False
        return True

    try:
        if poll(answers, MEETING_TIME):
            return TCPStore(address, port, is_master=False, wait_for_workers=False)
    except dist.DistError as error:
        reason = _first_line(error)
    raise UserError(f"process {rank} of {world} cannot meet process 0 at {address}:{port} ({reason}). Check "
                    f"--master_address and --master_port, and that all processes were started.")


def fresh_prefix(job: Store, topology: Topology) -> str:
    """A prefix for keys of this start of the run: the store may hold those of an earlier one.

    Everyone calls with a word of its own, which process 0 answers with the number of this start. Returns
    once all are there, each with a first sign of life; raises UserError if some do not come.
    """
    rank, word = topology.rank, uuid.uuid4().hex
    if rank:
        job.set(f'call/{rank}', word)
        if poll(lambda: job.check([f'answer/{word}']), MEETING_TIME):
            prefix = job.get(f'answer/{word}').decode()
            job.set(f'{prefix}/alive/{rank}', '0')
            if poll(lambda: job.check([f'{prefix}/complete']), MEETING_TIME):
                return prefix
        raise UserError(f"process {rank} of {topology.world} does not meet the others at {topology.address}:"
                        f"{topology.port}. Check --master_port, and that all processes were started.")
    prefix = f'start {job.add("starts", 1)}'
    missing = set(range(1, topology.world))

    def all_here() -> bool:
        for other in sorted(missing):
            if job.check([f'{prefix}/alive/{other}']):
                missing.discard(other)
            elif job.check([f'call/{other}']):
                job.set(f'answer/{job.get(f"call/{other}").decode()}', prefix)
        return not missing

    if not poll(all_here, MEETING_TIME):
        raise UserError(f"process 0 of {topology.world} cannot meet the others at port {topology.port}: "
                        f"{len(missing)} did not come, process {min(missing)} the first of them. Check "
                        f"--master_address, --master_port, and that all processes were started.")
    job.set(f'{prefix}/alive/0', '0')
    job.set(f'{prefix}/complete', '')
    return prefix


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


# ------------------------------------------------------------------------------------------------ interfaces

def gloo_interface(topology: Topology) -> str:
    """The network interface that leads to the meeting point; '' = leave the choice to gloo.

    gloo takes the one of the host's name, and of a name that it cannot resolve, or that Debian gives to
    127.0.1.1, it makes the loopback, where other hosts are not.
    """
    if not sys.platform.startswith('linux'):
        return ''
    alone = topology.local_world == topology.world
    for target in (topology.address, *(() if alone else (SOMEWHERE,))):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                s.connect((target, topology.port or 9))               # with datagrams: only finds the route
                own = s.getsockname()[0]
                if alone or not own.startswith('127.'):
                    return next((name for _, name in socket.if_nameindex() if _address(s, name) == own), '')
        except OSError:
            continue
    return ''


def _address(s: socket.socket, interface: str) -> str:
    """IPv4 address of an interface; '' if it has none."""
    try:
        answer = fcntl.ioctl(s.fileno(), ADDRESS_OF_INTERFACE, struct.pack('256s', interface.encode()[:15]))
    except OSError:
        return ''
    return socket.inet_ntoa(answer[20:24])
