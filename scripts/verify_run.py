"""Checks a run folder: files whole, data unchanged, the versions of its last start.

    python scripts/verify_run.py runs/eval-chest [--thorough]

Prints a line a check, and ends with status 1 if one of them failed. Other versions than those of the run are
reported, but are no failure.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

from command_line.parser import parse_flags
from datasets import DATASETS, DataConfig, load_data
from readers.cache import is_cache
from readers.config import phantom_place
from readers.split import count, read_split, split_digest
from storage.checkpoint import copies, fingerprint, not_finite, read_one
from storage.provenance import data_digest, starts, versions
from utils import UserError, flag, flags, read_flags, read_json, read_line, run_program


@flags
class VerifyConfig:
    """Verification"""
    run: str = flag('', 'run folder, which may stand first without its flag', basic=True)
    thorough: bool = flag(False, 'read and hash every file of the data again; else files of the same '
                                 'size and times count as unchanged', basic=True)


class Failed(Exception):
    """Why a check failed."""


def checks(config: VerifyConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name of each check, and what makes it: it returns what was found, or raises Failed or UserError."""
    folder = Path(config.run)
    newest = folder / 'checkpoint.pt'
    for path in dict.fromkeys([newest, *copies(newest), *copies(folder / 'best.pt')]):
        yield path.name, lambda path=path: checkpoint(path)
    yield 'metrics.jsonl', lambda: metrics(folder / 'metrics.jsonl')
    for name in ('args.json', 'run.json', 'thresholds.json'):
        if (folder / name).exists() or name == 'args.json':
            yield name, lambda name=name: f'{len(entries(folder / name))} entries'
    yield 'split.json', lambda: split(folder)
    yield 'thresholds', lambda: thresholds(folder)
    yield 'data', lambda: data(folder, config.thorough)
    yield 'versions', lambda: other_versions(folder)


def entries(path: Path) -> dict[str, Any]:
    if not isinstance(found := read_json(path), dict):
        raise Failed(f'holds a {type(found).__name__}, not the entries of a run')
    return found


def checkpoint(path: Path) -> str:
    content = read_one(path)
    if name := not_finite({key: content.get(key) for key in ('weights', 'ema', 'optimizer')}):
        raise Failed(f'{name} has numbers that are not finite')
    return f"whole, step {content.get('step', '?')}"


def metrics(path: Path) -> str:
    if not path.exists():
        raise Failed('is missing')
    lines = [read_line(line) for line in path.read_bytes().splitlines(keepends=True)]
    if damaged := lines.count(None):
        raise Failed(f'{damaged} of {len(lines)} lines are damaged')
    return count(len(lines), 'line')


def split(folder: Path) -> str:
    found, known = read_split(folder / 'split.json'), {}
    if found is None:
        raise Failed('is missing')
    for path in copies(folder / 'checkpoint.pt')[:1]:
        known = read_one(path)
    if known.get('split') and known['split'] != split_digest(found):
        raise Failed('is not the one that the checkpoint knows')
    return 'as the checkpoint knows it' if known.get('split') else 'whole; no checkpoint knows its hash'


def thresholds(folder: Path) -> str:
    path = folder / 'thresholds.json'
    if not path.exists():
        return 'none yet'
    from model import load_model
    same = fingerprint(load_model(folder)) == entries(path).get('weights')
    return 'of these weights' if same else 'of other weights: training went on, or they are of best.pt'


def data(folder: Path, thorough: bool) -> str:
    args, found = entries(folder / 'args.json'), read_split(folder / 'split.json')
    if found is None:
        raise Failed('cannot be compared without split.json')
    with tempfile.TemporaryDirectory() as cache:
        if thorough or not is_cache(args.get('cache_dir', '')):         # a run may come from anybody
            args['cache_dir'] = cache if thorough else ''
        config = read_flags(DataConfig, args)
        if DATASETS[config.dataset].phantoms and not phantom_place(config.data, config.dataset).is_dir():
            raise Failed('the phantoms of this run are not there')
        loaded = load_data(config, found)                      # raises UserError for lost and changed files
        images = sum(len(part) for part in (loaded.train, loaded.val, loaded.test))
    last = starts(folder)[-1:]
    if last and last[0].get('data') != data_digest(found):
        raise Failed('split.json is of other files than the last start')
    return f"{count(images, 'image')} unchanged"


def other_versions(folder: Path) -> str:
    if not (found := starts(folder)):
        return 'unknown: there is no run.json'
    then, now = found[-1].get('versions', {}), versions()
    differ = [f'{name} {then.get(name) or "none"} then, {now[name] or "none"} now' for name in now
              if then.get(name) != now[name]]
    return '; '.join(differ) or f"the same; commit {found[-1].get('commit') or 'unknown'}"


def main() -> int:
    argv: list[Any] = sys.argv[1:]
    argv = ['--run', *argv] if argv and not argv[0].startswith('-') else argv
    config = read_flags(VerifyConfig, parse_flags(argv, __doc__, (VerifyConfig,)))
    if not Path(config.run, 'args.json').exists():
        raise UserError(f"{config.run or 'nothing'} is not a run folder: name one, such as runs/eval-a.")
    failed = False
    for name, check in checks(config):
        try:
            print(f'ok      {name:18} {check()}')
        except (Failed, UserError) as error:
            failed = True
            print(f'FAILED  {name:18} {error}')
    return int(failed)


if __name__ == '__main__':
    run_program(main)
