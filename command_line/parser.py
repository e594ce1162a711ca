"""Command lines from classes of flags: help pages, files of flags, and one line for every mistake.

A program names the classes whose flags apply (utils.flags); all others are refused, with the place where they
belong.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from utils import UserError, check_regular, check_value, read_json

HELP_WIDTH = 110            # characters of a line of a help page
MOST_CHOICES = 6            # that stand beside the name of a flag; more stand in its help
ARGPARSE_OPTIONS = ('nargs', 'const', 'type', 'metavar')
METAVARS = {int: 'N', float: 'X', str: 'TEXT'}


class Parser(argparse.ArgumentParser):
    """Flags from the fields of dataclasses. Flags that are not given are absent from the result."""

    def __init__(self, about: str = '', show_all: bool = False):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=HELP_WIDTH)
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
        titles = {base: (base.__doc__ or base.__name__).strip().split('\n')[0]
                        + (" (default: the run's)" if stored else '') for base in bases}
        for title in titles.values():
            self.group(title)
        for field in dataclasses.fields(config):
            if 'help' in field.metadata and field.name not in without:
                self.fields[field.name] = field
                default = None if stored else defaults.get(field.name, field.default)
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
        choices = field.metadata.get('choices') or ()
        if kind is bool:
            options['action'] = 'store_true'
            group.add_argument(f'--no-{name}', dest=name, action='store_false', help=argparse.SUPPRESS)
        else:
            options = {'type': str if kind is tuple else kind} | options
            options |= {'nargs': options.get('nargs', '*')} if kind is tuple else {}
            if len(choices) > MOST_CHOICES:
                help += f": {', '.join(choices)}"
            few = 0 < len(choices) <= MOST_CHOICES
            options = {'metavar': '{' + ','.join(map(str, choices)) + '}' if few else
                       METAVARS.get(options['type'], 'VALUE')} | options
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
    group.add_argument('--config', metavar='FILE', help="take flags from this YAML or JSON file, such as a "
                                                        "run's args.json; the command line wins")
    group.add_argument('-h', '--help', action='help', help='show the common flags')
    group.add_argument('--help_all', action='help', help='show all flags')
    given, unknown = parser.parse_known_args(with_config(argv))
    file = vars(given).pop('config', '')
    for name, value in vars(given).items():
        check_value(parser.fields[name], value)
    if Path(file).name == 'args.json':                     # a run's own: it may hold flags of another program
        unknown = [word for word in unknown if word in argv]
    if unknown:
        raise _unknown_flag(unknown[0], parser.fields, elsewhere(), '' if unknown[0] in argv else file)
    own = {field.name: defaults.get(field.name, field.default) for config in classes
           for field in dataclasses.fields(config) if field.name in parser.fields}
    values = own | vars(given)
    for name, value in vars(given).items():
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
        elif isinstance(value, dict) or (isinstance(value, list) and any(
                isinstance(one, list | dict) for one in value)):
            raise UserError(f"--config {path}: {name} holds more than values of a flag.")
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
            check_regular(path)
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
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
