"""Several processes, one after the other in this one."""

from contextlib import contextmanager

import pytest

from distributed import launch


@contextmanager
def as_rank(rank, world):
    """Inside the block this process is number `rank` of `world`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, 'rank', lambda: rank)
        patch.setattr(launch, 'world', lambda: world)
        yield
