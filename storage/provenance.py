"""What a run was made with: seed, code, versions and data, in run.json; one entry a start."""

import hashlib
import json
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from utils import UserError, read_json, write_json

FILE = 'run.json'
LIBRARIES = ('torch', 'numpy', 'scipy', 'scikit-learn', 'pillow', 'pydicom', 'nibabel', 'lmdb')


def versions() -> dict[str, str]:
    """Of Python and of the libraries that results may depend on; '' where one is not installed."""
    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ''
    return {'python': platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def commit() -> str:
    """The commit of this code, with '+' if files differ from it; '' outside of a git repository."""
    git = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--abbrev=40', '--exclude=*',
           '--dirty=+']
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


def data_digest(split: Mapping[str, Any]) -> str:
    """SHA-256 of the ids and hashes of all files in a split; of its numbers where files have no hashes."""
    files = sorted((file['id'], file['sha256']) for file in split.get('files', ()))
    return hashlib.sha256(json.dumps(files or split.get('records', {}), sort_keys=True).encode()).hexdigest()


def add_start(folder: Path, seed: int, split: Mapping[str, Any], step: int) -> None:
    """Adds this start of a run, which goes on from a step, to its run.json."""
    write_json(folder / FILE, {'starts': [*starts(folder), {
        'time': time.strftime('%Y-%m-%d %H:%M:%S'), 'host': socket.gethostname(), 'step': step,
        'command': shlex.join(sys.argv), 'seed': seed, 'commit': commit(), 'versions': versions(),
        'data': data_digest(split)}]})


def starts(folder: Path) -> list[dict[str, Any]]:
    """The starts that run.json lists; none if it is not there or damaged, as nothing depends on it."""
    try:
        found = read_json(folder / FILE)['starts']
        return [start for start in found if isinstance(start, dict)]
    except (UserError, KeyError, TypeError):
        return []
