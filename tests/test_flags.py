"""The flags of both programs: which ones a command has, one screen of help without PyTorch, and that no flag
that would do nothing is taken.
"""

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import ROOT

import evaluate
import train
from anomaly.scores import SCORES, Scoring, check_used
from datasets import DATASETS, data_flags
from distributed.launch import LaunchConfig
from model import MODELS, family_config
from utils import UserError

SCREEN = 48                             # lines
CLASSES = {'train': {config for name in MODELS for config in (family_config(name),)}
           | {train.RunConfig, train.TrainConfig, LaunchConfig}
           | {config for name in DATASETS for config in data_flags(name)},
           'evaluate': {config for mode in evaluate.MODES.values() for config in mode.flags}}


def conditional():
    """(program, class, field, needs) of every flag that needs another one."""
    found = {(program, field.name, field.metadata['needs']): (program, config, field)
             for program, configs in CLASSES.items() for config in configs
             for field in dataclasses.fields(config) if field.metadata.get('needs')}
    return [found[key] for key in sorted(found)]


def word(field, value):
    if isinstance(field.default, bool):
        return [f'--{field.name}' if value else f'--no-{field.name}']
    return [f'--{field.name}', *map(str, value if isinstance(value, tuple) else [value])]


def other(field):
    """A value that is not the default and within the limits."""
    if isinstance(field.default, bool):
        return not field.default
    if choices := field.metadata.get('choices'):
        return next(choice for choice in choices if choice != field.default)
    return field.default + 1 if isinstance(field.default, int) else field.default / 2 or 1


def switched_off(config, needs):
    """Words that turn off all the flags that a flag needs."""
    words = []
    for name in {term.partition('=')[0] for term in needs.split(' or ')}:
        field = next(f for f in dataclasses.fields(config) if f.name == name)
        wanted = {term.partition('=')[2] for term in needs.split(' or ') if term.startswith(f'{name}=')}
        off = next(c for c in field.metadata['choices'] if c not in wanted) if any(wanted) else \
            () if isinstance(field.default, tuple) else type(field.default)()
        words += word(field, off)
    return words


@pytest.mark.parametrize('program, config, field', conditional(), ids=lambda one: getattr(one, 'name', ''))
def test_a_flag_that_would_do_nothing_is_refused(program, config, field):
    if program == 'train':
        model = next((name for name in MODELS if family_config(name) is config), 'nvae')
        parse, words = train.parse_args, ['--model', model]
    else:
        mode = next(name for name, mode in evaluate.MODES.items() if config in mode.flags)
        parse, words = evaluate.parse_args, ['--eval_mode', mode, '--checkpoint', 'run']
    words += switched_off(config, field.metadata['needs'])
    if mode_needs := {'compare': ['--compare', 'a', 'b']}.get(words[1]):
        words += mode_needs
    with pytest.raises(UserError, match=f'--{field.name} does nothing without'):
        parse([*words, *word(field, other(field))])
    parse(words)


@pytest.mark.parametrize('field', [one for one in dataclasses.fields(Scoring) if 'scores' in one.metadata],
                         ids=lambda one: one.name)
def test_a_flag_of_scores_that_are_not_computed_is_refused(field):
    scoring = dataclasses.replace(Scoring(), **{field.name: other(field)})
    with pytest.raises(UserError, match=f'--{field.name} does nothing, as no score'):
        check_used(scoring, ['reconstruction', 'ode_nll'])
    for row in SCORES.keys() & field.metadata['scores'].split():
        check_used(scoring, ['reconstruction', row])
        check_used(scoring, [f'{row}_1'])
    check_used(Scoring(), [])


def test_draws_do_nothing_for_densities_at_the_posterior_means():
    with pytest.raises(UserError, match='--num_draws does nothing'):
        check_used(Scoring(num_draws=2), ['kl_knn', 'iw', 'residual_top'])
    check_used(Scoring(num_draws=2, density_features='draws'), ['kl_knn'])
    check_used(Scoring(num_draws=2), ['kl_knn', 'kl_2'])


@pytest.mark.parametrize('parse, words, told', [
    (evaluate.parse_args, '--eval_mode anomaly --max_images 1', '--eval_mode evaluate, not of anomaly'),
    (evaluate.parse_args, '--eval_mode anomaly --temp 0.3', 'evaluate_fid, sample, decode, not of anomaly'),
    (evaluate.parse_args, '--eval_mode anomaly --readjust_bn', 'evaluate_fid, sample, not of anomaly'),
    (evaluate.parse_args, '--eval_mode interpolate --batch_size 3', 'not of interpolate'),
    (evaluate.parse_args, '--eval_mode predict --num_draws 3', 'anomaly, compare, not of predict'),
    (evaluate.parse_args, '--eval_mode predict --image_size 32', 'not of predict'),
    (evaluate.parse_args, '--eval_mode sample --data x', 'not of sample'),
    (evaluate.parse_args, '--eval_mode evaluate --dataset covid --spacing 1', 'brain, brain_phantom, not'),
    (evaluate.parse_args, '--eval_mode evaluate --flip on', '--flip is a flag of train.py'),
    (evaluate.parse_args, '--eval_mode evaluat', 'evaluat: choose one of .*; did you mean evaluate?'),
    (train.parse_args, '--free_nats 1', '--model hvae, lvae, biva, not of nvae'),
    (train.parse_args, '--model nvea', '--model nvea: choose one of .*; did you mean nvae?'),
    (train.parse_args, '--dataset covid --spacing 1', '--dataset brain, brain_phantom, not of covid'),
    (train.parse_args, '--dataset mnist --num_phantoms 3', '--dataset phantom, brain_phantom, not of mnist'),
])
def test_flags_of_another_mode_model_or_data_set_are_refused(parse, words, told):
    with pytest.raises(UserError, match=told):
        parse(words.split())


def test_the_run_decides_which_flags_there_are(tmp_path):
    (tmp_path / 'args.json').write_text('{"model": "nvae", "dataset": "covid", "image_size": 32}')
    run = ['--checkpoint', str(tmp_path), '--eval_mode']
    with pytest.raises(UserError, match='--snr is a flag of --model score, not of nvae'):
        evaluate.parse_args([*run, 'sample', '--snr', '1'])
    for mode, flag in (('evaluate', '--spacing'), ('anomaly', '--seg_erosion')):
        with pytest.raises(UserError, match=f'{flag} is a flag of --dataset brain, brain_phantom, not'):
            evaluate.parse_args([*run, mode, flag, '1'])
    args = vars(evaluate.parse_args([*run, 'evaluate', '--num_x_bits', '5']))
    assert args['num_x_bits'] == 5 and 'image_size' not in args, "the run's own stays in force"


def test_a_runs_own_flags_start_it_again(tmp_path):
    path = tmp_path / 'args.json'
    args = train.parse_args(['--model', 'score', '--dataset', 'brain_phantom', '--nf', '8',
                             '--no-noise_removal'])
    path.write_text(json.dumps(vars(args)))
    again = train.parse_args(['--config', str(path)])
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in vars(again).items()} == vars(args)
    assert train.parse_args(['--config', str(path), '--nf', '16']).nf == 16
    scored = evaluate.parse_args(['--config', str(path), '--checkpoint', 'run', '--eval_mode', 'sample'])
    assert scored.save == '' and scored.seed == args.seed
    scored = evaluate.parse_args(['--config', str(path), '--checkpoint', 'run', '--save=OUT'])
    assert scored.save == 'OUT'


@pytest.mark.parametrize('words', ['train.py --help', 'train.py --help_all', 'train.py --lerning_rate 1',
                                   'evaluate.py --help', 'evaluate.py --eval_mode anomaly --help',
                                   'evaluate.py --lerning_rate 1'])
def test_help_and_wrong_flags_are_answered_without_pytorch(words):
    """Half a second of CPU, of which a busy machine takes more; that PyTorch is not imported is exact."""
    program, *flags = words.split()
    code = (f'import sys, time; sys.argv = {[program, *flags]!r}; import {program[:-3]} as program\n'
            f'try: program.run_program(program.main)\n'
            f'except SystemExit as end: status = end.code\n'
            f'slow = {{"torch", "scipy", "PIL", "sklearn"}} & set(sys.modules)\n'
            f'assert not slow, slow\nprint(time.process_time(), status, file=sys.stderr)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *told, last = done.stderr.splitlines()
    seconds, status = last.split()
    assert float(seconds) < 1
    if '--help' in words:
        assert status == '0' and not told
        assert '--help_all' in words or len(done.stdout.splitlines()) <= SCREEN, done.stdout
    else:
        assert status == '2' and told == [line for line in told if line.startswith('error: unknown flag')]
