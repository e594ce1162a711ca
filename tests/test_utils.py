"""Flags from dataclasses, seeds, files that are whole or not there, the run's log, exit statuses."""

import json
import math
import os
from dataclasses import dataclass, field

import pytest
import torch

from command_line.parser import parse_flags, peek_flags
from distributions import RowNoise
from storage.run_log import RunLog
from utils import (
    UserError,
    flag,
    flags,
    mix_seed,
    read_flags,
    read_json,
    run_program,
    seed_noise,
    write_atomically,
    write_csv,
    write_json,
)


@dataclass(frozen=True)
class Config:
    """Things to set

    And more that --help does not need.
    """
    groups: int = flag(1, 'groups; 0 = none', least=0, basic=True, aliases=('group',))
    rate: float = flag(0.0, 'share, 5 % is usual')
    name: str = flag('', "a name; '' = none")
    kinds: tuple = flag((), 'kinds', choices=('a', 'b'))
    fast: bool = flag(False, 'be fast')
    safe: bool = flag(True, 'be safe')
    bold: bool = flag(False, 'be bold', needs='fast')
    shade: int = flag(1, 'shade', needs='fast or name=x')


def parse(*argv, classes=(Config,), **options):
    return parse_flags(argv, 'Does things.', classes, **options)


def page(capsys, *argv, **options):
    """The help page, its words one space apart."""
    with pytest.raises(SystemExit) as end:
        parse(*argv, **options)
    assert end.value.code == 0
    return ' '.join(capsys.readouterr().out.split())


def test_flags_have_the_fields_defaults_and_types():
    assert read_flags(Config, parse()) == Config()
    given = ['--groups', '3', '--rate', '1e-2', '--kinds', 'a', 'b', '--fast', '--no-safe', '--name', 'x']
    assert read_flags(Config, parse(*given)) == Config(3, 0.01, 'x', ('a', 'b'), True, False)
    assert read_flags(Config, parse(*given, '--no-fast', '--safe', '--group', '4')).groups == 4
    assert read_flags(Config, parse('--groups', '3', defaults={'groups': 5, 'rate': 0.5})) == Config(3, 0.5)


def test_help_states_every_default_that_is_a_number(capsys):
    """1 and 0 are equal to True and False, and yet are numbers."""
    text = page(capsys, '--help_all')
    for part in ('groups; 0 = none (default: 1)', 'share, 5 % is usual (default: 0)', 'Things to set',
                 'be safe (default: on; --no-safe turns it off)', 'Does things.'):
        assert part in text, text
    assert "a name; '' = none --" in text and 'be fast --' in text and 'And more' not in text
    assert '--groups N' in text and '--group N' not in text and '[--FLAG VALUE ...]' in text


def test_help_shows_basic_flags_and_help_all_all(capsys):
    text = page(capsys, '--help')
    assert '--groups' in text and '--rate' not in text and '--help_all' in text


def test_fields_of_a_base_have_a_group_of_their_own_and_equal_titles_one(capsys):
    @dataclass(frozen=True)
    class More(Config):
        """Further things"""
        fast: bool = flag(True, 'be fast, by default')
        sizes: tuple = flag((0.5, 2.0), 'two sizes', type=float, nargs=2)
        unseen: int = field(default=1, kw_only=True)                        # no flag

    @dataclass(frozen=True)
    class Alike:
        """Further things"""
        more: int = flag(1, 'more of it')

    text = page(capsys, '--help_all', classes=(More, Alike))
    own, base = text.split('Things to set')
    assert own.count('Further things') == 1 and '--sizes' in own and '(default: 0.5 2)' in own
    assert '--more' in own and '--groups' in base and '--no-fast' in base          # where it was first
    args = parse('--sizes', '1', '3', classes=(More, Alike))
    assert read_flags(More, args).sizes == (1.0, 3.0) and 'unseen' not in vars(args)


def test_flags_that_are_stored_keep_the_stored_value(capsys):
    given = vars(parse('--rate', '0', classes=(), stored=(Config,)))
    assert given == {'rate': 0.0}
    stored = {'groups': 7, 'rate': 0.5, 'kinds': ['a'], 'unknown': 1}                  # as JSON gives them
    assert read_flags(Config, stored | given) == Config(7, 0.0, '', ('a',))
    text = page(capsys, '--help_all', classes=(), stored=(Config,))
    assert '(default: 1)' not in text and "(default: the run's)" in text


def test_all_flags_but_some():
    others = ('groups', 'name', 'kinds', 'fast', 'safe', 'bold')
    assert vars(parse(without=others)) == {'rate': 0.0, 'shade': 1}


@pytest.mark.parametrize('argv, told', [
    (['--rte', '1'], 'unknown flag --rte; did you mean --rate?'),
    (['--rte=1'], 'unknown flag --rte; did you mean --rate?'),
    (['--no-saef'], 'unknown flag --no-saef; did you mean --safe?'),
    (['--zzz'], 'unknown flag --zzz; --help_all shows all flags.'),
    (['--depth', '3'], '--depth is a flag of --model b, not of a: leave it out.'),
    (['--dept', '3'], 'unknown flag --dept; did you mean --depth?'),
    (['word'], "'word' belongs to no flag: give --FLAG VALUE. --help shows the flags."),
    (['--groups', 'x'], "--groups: invalid int value: 'x'. --help shows the flags."),
    (['--groups', '-1'], '--groups -1: it must be at least 0.'),
    (['--kinds', 'c'], '--kinds c: choose one of a, b.'),
    (['--bold', '--no-fast'], '--bold does nothing without --fast: give that too, or leave it out.'),
    (['--shade', '2', '--name', 'y'], '--shade does nothing without --fast or --name x: give that too, or '
                                      'leave it out.'),
    (['--config', 'no.yaml'], "--config no.yaml cannot be read: [Errno 2] No such file or directory: "
                              "'no.yaml'."),
])
def test_a_wrong_flag_is_one_line(argv, told):
    with pytest.raises(UserError) as error:
        parse(*argv, elsewhere=lambda: {'depth': '--model b, not of a'})
    assert str(error.value) == told


def test_a_flag_that_needs_another_one():
    assert parse('--bold', '--fast').bold and parse('--shade', '2', '--name', 'x').shade == 2
    assert parse('--shade', '1').shade == 1, "its default changes nothing"
    assert parse(defaults={'bold': True}).bold, "only what the user asks for is refused"
    assert vars(parse('--bold', classes=(), stored=(Config,), without=['fast'])) == {'bold': True}


@pytest.mark.parametrize('name, text', [
    ('flags.yaml', 'groups: 3\nrate: 1e-2\nkinds: [a, b]\nfast: true\nsafe: false\nname:\n'),
    ('flags.json', '{"groups": 3, "rate": 0.01, "kinds": ["a", "b"], "fast": true, "safe": false}'),
    ('args.json', '{"groups": 3, "rate": 0.01, "kinds": ["a", "b"], "fast": true, "safe": false,'
                  ' "old": [1]}')])
def test_flags_from_a_file(name, text, tmp_path):
    path = str(tmp_path / name)
    (tmp_path / name).write_text(text)
    assert read_flags(Config, parse('--config', path)) == Config(3, 0.01, '', ('a', 'b'), True, False)
    given = parse('--groups', '4', '--config', path, '--no-fast')
    assert (given.groups, given.fast, given.rate) == (4, False, 0.01), "the command line wins"
    assert 'config' not in vars(given)
    assert peek_flags(['--config', path], groups='1', name='') == {'groups': '3', 'name': ''}


@pytest.mark.parametrize('text, told', [
    ('grups: 3', r'unknown flag --grups in .*flags.yaml; did you mean --groups\?'),
    ('groups: three', "--groups: invalid int value: 'three'"), ('groups: -3', '--groups -3: it must be'),
    ('kinds: [c]', '--kinds c: choose one of a, b'), ('bold: true', '--bold does nothing without --fast'),
    ('fast: 3', 'fast'), ('just words', 'holds no flags'), ('a: [', 'cannot be read')])
def test_a_file_of_flags_is_checked_like_the_command_line(text, told, tmp_path):
    (tmp_path / 'flags.yaml').write_text(text)
    with pytest.raises(UserError, match=told):
        parse('--config', str(tmp_path / 'flags.yaml'))


def test_a_subclass_checks_what_its_base_does():
    @flags
    class Base:
        """Base"""
        low: int = flag(0, 'low', least=0)
        high: int = flag(1, 'high')

        def __post_init__(self):
            if self.low > self.high:
                raise UserError('low is above high')

    @flags
    class More(Base):
        """More"""
        step: int = flag(1, 'step', above=0)

    assert More(1, 2, 3).step == 3
    for values, told in (((3, 2), 'above high'), ((-1, 2), '--low -1'), ((1, 2, 0), '--step 0')):
        with pytest.raises(UserError, match=told):
            More(*values)


def test_a_mutable_default_is_refused():
    with pytest.raises(TypeError, match='tuple'):
        flag([], 'kinds')


def test_seeds_differ_in_order_and_are_the_same_for_ever():
    assert mix_seed(1, 2, 3) != mix_seed(1, 3, 2) != mix_seed(13, 2) and mix_seed(1, 23) != mix_seed(12, 3)
    assert 0 <= mix_seed('train', 1) < 2 ** 63
    assert mix_seed(0) == 0x5feceb66ffc86f38 >> 1                                         # SHA-256 of '0'
    seed_noise(1, 'a')
    a = torch.randn(3)
    seed_noise(1, 'b')
    assert not torch.equal(a, torch.randn(3))
    seed_noise(1, 'a')
    assert torch.equal(a, torch.randn(3))


def test_a_row_of_noise_follows_from_its_own_seed():
    def draw(seeds, make):
        with RowNoise(seeds):
            return [make(torch.zeros(len(seeds), 4)) for _ in range(2)]
    for make in (torch.randn_like, torch.rand_like):
        torch.manual_seed(0)
        together, alone = draw([5, 6, 7], make), draw([7], make)
        assert all(torch.equal(a[2:], b) for a, b in zip(together, alone, strict=True))
        values = torch.cat(together).flatten().tolist()
        assert len(set(values)) == 24, "rows differ, and so do two draws"
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
    with RowNoise([5, 6]), pytest.raises(ValueError, match='shorter'):
        torch.randn_like(torch.zeros(3, 4))


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / 'new' / 'file'
    write_atomically(path, lambda p: p.write_text('old'))

    def fail(temporary):
        temporary.write_text('half')
        raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'):
        write_atomically(path, fail)
    assert path.read_text() == 'old' and list(path.parent.iterdir()) == [path]


def test_csv_is_the_same_bytes_everywhere_and_empty_where_there_is_no_value(tmp_path):
    write_csv(tmp_path / 'a.csv', ('id', 'dice'), [('ä, b', 0.1), ('c', math.nan), ('d', None)])
    assert (tmp_path / 'a.csv').read_bytes() == 'id,dice\n"ä, b",0.1\nc,\nd,\n'.encode()
    assert [path.name for path in tmp_path.iterdir()] == ['a.csv']


def test_json_is_strict_and_its_errors_name_the_file(tmp_path):
    write_json(tmp_path / 'a.json', {'x': math.nan, 'y': [1.5, math.inf], 'z': {'n': 3}})
    strict = json.loads((tmp_path / 'a.json').read_text(), parse_constant=lambda word: pytest.fail(word))
    assert strict == read_json(tmp_path / 'a.json') == {'x': None, 'y': [1.5, None], 'z': {'n': 3}}
    (tmp_path / 'b.json').write_text('{')
    (tmp_path / 'd.json').write_text('[' * 200_000)
    (tmp_path / 'e.json').write_bytes(b'"\xff"')
    os.mkfifo(tmp_path / 'f.json')
    for name, told in (('b.json', 'not a JSON file'), ('c.json', 'does not exist'), ('d.json', 'too deep'),
                       ('e.json', 'not a JSON file'), ('f.json', 'a device or a pipe')):
        with pytest.raises(UserError, match=f'{name}.*{told}'):
            read_json(tmp_path / name)


def logged(folder):
    return [(line['step'], line['loss']) for line in map(json.loads, (folder / 'metrics.jsonl').open())]


def test_a_resumed_run_logs_every_step_once(tmp_path):
    """Killed in the middle of a line, after step 4; the checkpoint is that of step 2."""
    log = RunLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.metrics(step, {'loss': step / 2})
    log.close()
    with (tmp_path / 'metrics.jsonl').open('a') as f:
        f.write('{"step": 5, "lo')
    log = RunLog(tmp_path, step=2)
    for step in (3, 4, 5):
        log.metrics(step, {'loss': float(step)})
    log.image(5, 'grid', torch.rand(1, 4, 4))
    log.say('a line')
    log.close()
    assert logged(tmp_path) == [(1, 0.5), (2, 1.0), (3, 3.0), (4, 4.0), (5, 5.0)]
    assert (tmp_path / 'log.txt').read_text().endswith(' a line\n')

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars('loss')] == logged(tmp_path)
    assert events.Tags()['images'] == ['grid']


def test_damaged_lines_are_left_out_and_kept_aside(tmp_path, capsys):
    damaged = b'{"step": 1, "loss": 1.0}\n\0\0\0\n[1]\n{"step": "x"}\n\xff\n' + b'[' * 200_000 + b'\n'
    damaged += b'{"step": 2, "loss": 2.0}\n{"step": 3, "lo'
    (tmp_path / 'metrics.jsonl').write_bytes(damaged)
    log = RunLog(tmp_path, tensorboard=False, step=2)
    assert logged(tmp_path) == [(1, 1.0), (2, 2.0)] and log.logged == {'step', 'loss'}
    assert (tmp_path / 'metrics.jsonl.damaged').read_bytes() == damaged
    assert '5 damaged lines are left out' in capsys.readouterr().out


def test_a_skipped_step_is_logged_as_strict_json(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.metrics(1, {'loss': math.inf})
    assert logged(tmp_path) == [(1, None)]


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / 'run', active=False)
    log.say('a line')
    log.metrics(1, {'loss': 1.0})
    log.image(1, 'grid', torch.rand(1, 4, 4))
    log.close()
    assert not (tmp_path / 'run').exists() and capsys.readouterr().out == ''


def raises(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize('main, status, told', [
    (lambda: None, 0, ''), (lambda: 143, 143, ''),
    (raises(UserError('wrong folder')), 2, 'error: wrong folder\n'),
    (raises(KeyboardInterrupt()), 130, 'interrupted\n')])
def test_exit_status_of_a_program(main, status, told, capsys):
    with pytest.raises(SystemExit) as end:
        run_program(main)
    assert end.value.code == status and capsys.readouterr().err == told


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)
