"""What every program shares: flags made from dataclasses, seeds, the run folder, checkpoints, user errors.

Knows no images. Imports neither PyTorch nor NumPy before they are needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import operator
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:       # PyTorch is imported where it is used: a program answers --help without it
    import torch

T = TypeVar('T')


class UserError(ValueError):
    """A mistake that the user can put right: programs print its one line and exit with status 2."""


# ------------------------------------------------------------------------------------------------------ flags

def flag(default: Any, help: str, *, least: float | None = None, most: float | None = None,
         above: float | None = None, below: float | None = None, basic: bool = False, needs: str = '',
         **argparse_options: Any) -> Any:
    """A dataclass field that is a command-line flag; `help` states its unit and any special value.

    A value must be at least `least`, at most `most`, above `above` and below `below`; of a tuple each value.
    `basic` flags stand in --help, the others in --help_all. A flag that does nothing without another one
    `needs` it: 'ema_decay' (it is on), 'sampler=pc' (it has this value), 'flip or augment' (either).
    `argparse_options` go to `add_argument` as they are (choices, nargs, type, metavar); `aliases` are further
    names of the flag.
    """
    if isinstance(default, list | dict | set):
        raise TypeError(f"flag default {default!r} is mutable: use a tuple")
    limits = {'least': least, 'most': most, 'above': above, 'below': below}
    limits = {name: value for name, value in limits.items() if value is not None}
    return dataclasses.field(default=default, metadata={
        'help': help, 'limits': limits, 'basic': basic, 'needs': needs, **argparse_options})


LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    'least': ('at least', operator.ge), 'most': ('at most', operator.le),
    'above': ('above', operator.gt), 'below': ('below', operator.lt)}


def flags(cls: type[T]) -> type[T]:
    """Decorator: a frozen dataclass of flags, which raises UserError for a value outside its limits or
    choices before its own `__post_init__`, or that of its base, looks at what else must hold.
    """
    own = getattr(cls, '__post_init__', None)

    def __post_init__(self: Any) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if own is not None:
            own(self)
    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True)(cls)


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError for a value of a flag outside its limits or choices."""
    choices, limits = field.metadata.get('choices'), field.metadata.get('limits', {})
    for one in value if isinstance(value, tuple | list) else (value,):
        if one is None:
            continue
        if choices is not None and one not in choices:
            raise UserError(f"--{field.name} {one}: choose one of {', '.join(map(str, choices))}.")
        if not all(LIMITS[name][1](one, limit) for name, limit in limits.items()):
            wanted = ' and '.join(f'{LIMITS[name][0]} {limit:g}' for name, limit in limits.items())
            raise UserError(f"--{field.name} {one}: it must be {wanted}.")


def read_flags(config: type[T], values: argparse.Namespace | dict[str, Any]) -> T:
    """The dataclass `config` from a namespace or dict: missing ones keep their default, others are left."""
    values = values if isinstance(values, dict) else vars(values)
    known = {f.name: f for f in dataclasses.fields(config)}
    picked = {k: tuple(v) if isinstance(known[k].default, tuple) else v
              for k, v in values.items() if k in known}
    return config(**picked)


# ----------------------------------------------------------------------------------------------- command line

HELP_WIDTH = 110            # characters of a line of a help page
MOST_CHOICES = 6            # that stand beside the name of a flag; more stand in its help
ARGPARSE_OPTIONS = ('choices', 'nargs', 'const', 'type', 'metavar')
METAVARS = {int: 'N', float: 'X', str: 'TEXT'}


class Parser(argparse.ArgumentParser):
    """Flags from the fields of dataclasses. Flags that are not given are absent from the result."""

    def __init__(self, about: str = '', show_all: bool = False):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=HELP_WIDTH)
        super().__init__(usage='python %(prog)s [--FLAG VALUE ...]', description=about, add_help=False,
                         allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=layout)
        self.show_all = show_all
        self.fields: dict[str, dataclasses.Field] = {}

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}. --help shows the flags.")

    def add_class(self, config: type, defaults: Mapping[str, Any], stored: bool,
                  without: Collection[str]) -> None:
        """A titled group of flags for the class, and one for each base of it; for all fields but `without`.

        The help page states the defaults, or that a `stored` value stays in force, with --help_all.
        """
        bases = [base for base in config.__mro__ if dataclasses.is_dataclass(base)]
        owner = {field.name: base for base in bases for field in dataclasses.fields(base)}    # the first one
        titles = {base: (base.__doc__ or base.__name__).strip().split('\n')[0] for base in bases}
        for title in titles.values():
            self.group(title)
        for field in dataclasses.fields(config):
            if 'help' in field.metadata and field.name not in without:
                self.fields[field.name] = field
                default = "the run's" if stored else defaults.get(field.name, field.default)
                shown = self.show_all or (field.metadata['basic'] and not stored)
                self._add_field(self.group(titles[owner[field.name]]), field, default, shown)

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The group of this title; the short page has one group, which saves lines."""
        title = title if self.show_all else 'Flags'
        return next((group for group in self._action_groups if group.title == title), None) \
            or self.add_argument_group(title)

    def _add_field(self, group: Any, field: dataclasses.Field, default: Any, shown: bool) -> None:
        """A bool is turned on by --name and off by --no-name."""
        name, kind, help = field.name, type(field.default), field.metadata['help']
        options = {k: v for k, v in field.metadata.items() if k in ARGPARSE_OPTIONS}
        choices = options.get('choices', ())
        if kind is bool:
            options['action'] = 'store_true'
            group.add_argument(f'--no-{name}', dest=name, action='store_false', help=argparse.SUPPRESS)
        else:
            options = {'type': str if kind is tuple else kind} | options
            options |= {'nargs': options.get('nargs', '*')} if kind is tuple else {}
            if len(choices) > MOST_CHOICES:
                help += f": {', '.join(choices)}"
            if not 0 < len(choices) <= MOST_CHOICES:
                options = {'metavar': METAVARS.get(options['type'], 'VALUE')} | options
        if default is True:
            help += f' (default: on; --no-{name} turns it off)'
        elif default is not False and default not in ('', (), None):
            words = [f'{one:g}' if isinstance(one, float) else str(one)
                     for one in (default if isinstance(default, tuple) else (default,))]
            help += '' if f'; {words[0]} = ' in help else f" (default: {' '.join(words)})"
        for alias in (name, *field.metadata.get('aliases', ())):
            hidden = not shown or alias != name
            group.add_argument(f'--{alias}', dest=name, **options,
                               help=argparse.SUPPRESS if hidden else help.replace('%', '%%'))


def parse_flags(argv: Sequence[str], about: str, classes: Sequence[type], *,
                defaults: Mapping[str, Any] | None = None, stored: Sequence[type] = (),
                without: Collection[str] = (), elsewhere: Callable[[], Mapping[str, str]] = dict,
                ) -> argparse.Namespace:
    """Flags from the words of a command line, which win over those of a file that it names with --config.

    They are those of the dataclasses `classes` and `stored`, but for the names `without`. `about` heads the
    help page. `defaults` take the place of the fields' own; flags of the classes `stored` are absent from the
    result unless they are given, so that a stored value stays in force. `elsewhere` says for flags of other
    commands where they belong. Raises UserError for unknown flags, values that are not allowed, and flags
    that would do nothing.
    """
    parser, defaults = Parser(about, show_all='--help_all' in argv), defaults or {}
    for config in (*classes, *stored):
        parser.add_class(config, defaults, config in stored, without)
    group = parser.group('Help')
    group.add_argument('--config', metavar='FILE', help='take flags from this YAML or JSON file, such as the '
                                                        'args.json of a run; the command line wins')
    group.add_argument('-h', '--help', action='help', help='show the flags that most people need')
    group.add_argument('--help_all', action='help', help='show all flags')
    given, unknown = parser.parse_known_args(with_config(argv))
    file = vars(given).pop('config', '')
    if Path(file).name == 'args.json':                     # a run's own: it may hold flags of another program
        unknown = [word for word in unknown if word in argv]
    if unknown:
        raise _unknown_flag(unknown[0], parser.fields, elsewhere(), '' if unknown[0] in argv else file)
    own = {field.name: defaults.get(field.name, field.default) for config in classes
           for field in dataclasses.fields(config) if field.name in parser.fields}
    values = own | vars(given)
    for name, value in vars(given).items():
        check_value(parser.fields[name], value)
        _check_needs(parser.fields[name], value, values)
    return argparse.Namespace(**values)


def peek_flags(argv: Sequence[str], **defaults: Any) -> dict[str, Any]:
    """The values of some flags, by which a program chooses which other flags there are."""
    parser = Parser()
    for name, default in defaults.items():
        parser.add_argument(f'--{name}', default=default, nargs='*' if isinstance(default, tuple) else None)
    return vars(parser.parse_known_args(with_config(argv))[0])


def with_config(argv: Sequence[str]) -> list[str]:
    """The flags of the file that the command line names with --config, as words, and then its own words.

    Raises UserError for a file that cannot be read or holds anything but flags.
    """
    parser = Parser()
    parser.add_argument('--config')
    path, words = getattr(parser.parse_known_args(argv)[0], 'config', ''), []
    for name, value in _read_config(Path(path)).items() if path else ():
        if isinstance(value, bool):
            words.append(f'--{name}' if value else f'--no-{name}')
        elif isinstance(value, list):
            words += [f'--{name}', *map(str, value)] if value else []
        elif value is not None:
            words.append(f'--{name}={value}')
    return [*words, *argv]


def _read_config(path: Path) -> dict[str, Any]:
    if path.suffix == '.json':
        content = read_json(path)
    else:
        import yaml
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no flags: expected lines such as 'epochs: 20'.")
    return content


def owners(flag: str, chosen: str, classes: Mapping[str, Sequence[type]]) -> dict[str, str]:
    """For flags that there are not with the value `chosen` of a flag, the values with which there are.

    `classes` are the classes of flags of each value.
    """
    names = {value: {field.name for config in configs for field in dataclasses.fields(config)}
             for value, configs in classes.items()}
    return {name: f"--{flag} {', '.join(value for value in names if name in names[value])}, not of {chosen}"
            for name in set().union(*names.values()) - names.get(chosen, set())}


def _unknown_flag(word: str, known: Collection[str], elsewhere: Mapping[str, str], file: str) -> UserError:
    """The error for a word that is no flag here: where it belongs, or the flag that was probably meant."""
    word = word.split('=')[0]
    name, place = word.removeprefix('--').removeprefix('no-'), f' in {file}' if file else ''
    if not word.startswith('--'):
        return UserError(f"'{word}'{place} belongs to no flag: give --FLAG VALUE. --help shows the flags.")
    if name in elsewhere:
        return UserError(f"{word}{place} is a flag of {elsewhere[name]}: leave it out.")
    near = difflib.get_close_matches(name, [*known, *elsewhere], n=1)
    return UserError(f"unknown flag {word}{place}" + (f"; did you mean --{near[0]}?" if near else
                                                      "; --help_all shows all flags."))


def _check_needs(field: dataclasses.Field, value: Any, values: Mapping[str, Any]) -> None:
    """Raises UserError for a flag that was set and does nothing, as the one that it needs is not."""
    needs = [term.partition('=') for term in field.metadata.get('needs', '').split(' or ') if term]
    known = [(name, wanted) for name, _, wanted in needs if name in values]
    met = any(str(values[name]) == wanted if wanted else values[name] for name, wanted in known)
    if known and not met and value != field.default:
        words = ' or '.join(f'--{name} {wanted}'.strip() for name, wanted in known)
        raise UserError(f"--{field.name} does nothing without {words}: give that too, or leave it out.")


# ------------------------------------------------------------------------------------------------------ seeds

def mix_seed(*parts: int | str) -> int:
    """One 63-bit seed from several numbers or words; (seed, step, rank) never meets (seed, rank, step)."""
    digest = hashlib.sha256('/'.join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], 'big') >> 1


def seed_noise(*parts: int | str) -> None:
    """Seeds torch's noise on every device from `parts`.

    Noise is a function of a counter (the run's seed, the step, the rank), never of a state carried along: a
    resumed run draws what the uninterrupted run draws, and nothing has to be saved.
    """
    import torch
    torch.manual_seed(mix_seed(*parts))


# ------------------------------------------------------------------------------------------------- run folder

def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary file beside `path`, syncs it to disk and renames it: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        write(temporary)
        with temporary.open('rb') as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; numbers that are not finite become null."""
    write_atomically(path, lambda p: p.write_text(json.dumps(finite(value), indent=1) + '\n'))


def write_csv(path: str | Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a table as UTF-8 CSV with Unix line ends, atomically; None and NaN become empty cells."""
    import csv
    def write(temporary: Path) -> None:
        with temporary.open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(header)
            writer.writerows([None if cell != cell else cell for cell in row] for row in rows)
    write_atomically(path, write)


def write_npz(path: str | Path, **arrays: Any) -> None:
    """Writes named arrays as a compressed npz file, atomically."""
    import numpy as np
    def write(temporary: Path) -> None:
        with temporary.open('wb') as f:
            np.savez_compressed(f, **arrays)
    write_atomically(path, write)


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, which strict JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Reads a JSON file. Raises UserError naming the file if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a JSON file ({error}). Delete it or restore it.") from None


class RunLog:
    """log.txt, metrics.jsonl and TensorBoard events of a run folder; silent where not `active` (rank > 0)."""

    def __init__(self, folder: str | Path, active: bool = True, tensorboard: bool = True, step: int = 0):
        """`step` steps are done: what a killed run wrote beyond them, and will write again, is dropped."""
        self.folder, self.active, self.writer = Path(folder), active, None
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget_after(step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def _forget_after(self, step: int) -> None:
        path = self.folder / 'metrics.jsonl'
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step]
            if len(kept) < len(lines):
                write_atomically(path, lambda p: p.write_text(''.join(kept)))

    def say(self, line: str) -> None:
        """Prints a line, and keeps it in log.txt with the time."""
        if not self.active:
            return
        from tqdm import tqdm
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        with (self.folder / 'log.txt').open('a') as f:
            f.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {line}\n')

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Appends one JSON line to metrics.jsonl and a scalar per value to TensorBoard."""
        if not self.active:
            return
        with (self.folder / 'metrics.jsonl').open('a') as f:
            f.write(json.dumps({'step': step, 'time': round(time.time(), 3), **finite(values)}) + '\n')
        if self.writer:
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def image(self, step: int, tag: str, grid: torch.Tensor) -> None:
        """Shows an image (C, H, W) in [0, 1] in TensorBoard."""
        if self.writer:
            self.writer.add_image(tag, grid, step)

    def histogram(self, step: int, tag: str, values: torch.Tensor) -> None:
        """Shows how values of any shape are distributed in TensorBoard; leaves out what is not finite."""
        import torch
        values = values[torch.isfinite(values)]
        if self.writer and len(values):
            self.writer.add_histogram(tag, values, step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


# ----------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Writes `content` atomically: a kill at any moment leaves the last whole checkpoint in place."""
    import torch
    path = Path(path)
    for left_by_a_kill in path.parent.glob(f'.{path.name}.*.tmp'):
        left_by_a_kill.unlink(missing_ok=True)
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running code from it (`weights_only=True`, Namespace allowed).

    Raises UserError if the file is missing, damaged, or holds anything but data.
    """
    import torch
    path = Path(path)
    if path.is_dir():
        path = path / 'checkpoint.pt'
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}. Name the checkpoint.pt of a run.") from None
    except pickle.UnpicklingError as error:
        foreign = re.search(r'GLOBAL (\S+)', str(error))
        what = f"holds a {foreign[1]}, which is code and not data" if foreign else "is damaged"
        raise UserError(f"checkpoint {path} {what}; it is not loaded. Take another copy.") from None
    except Exception as error:      # a damaged file can mislead the reader into any of them
        raise UserError(f"checkpoint {path} cannot be read: it is damaged or no checkpoint "
                        f"({type(error).__name__}: {str(error).split(chr(10))[0][:120]}).") from None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not the dictionary of a run.")
    return content


def fingerprint(model: torch.nn.Module) -> str:
    """16 hexadecimal digits that tell these weights from any others."""
    import torch
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- programs

def run_program(main: Callable[[], int | None]) -> None:
    """Runs `main` as a command-line program: a UserError is one line on stderr and status 2, Ctrl-C 130."""
    try:
        status = main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        status = 130
    sys.exit(status or 0)
