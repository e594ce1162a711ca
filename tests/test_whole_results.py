"""Results are complete or absent, and a run reports a split that was lost or changed."""

import json
import os
import shutil
from argparse import Namespace

import pytest
from test_train import run as train_run

import evaluate
from distributed import launch
from evaluation.run import Evaluation
from readers import split as splits
from storage import outputs
from storage.outputs import whole_folder
from utils import UserError, read_flags, write_json


def listed(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(params=[True, False], ids=['exchanged', 'renamed'])
def out(request, tmp_path, monkeypatch):
    if not request.param:
        monkeypatch.setattr(outputs.ctypes, 'CDLL', lambda _: None)
    out = tmp_path / 'out'
    write_json(out / 'metrics.json', {'a': 1})
    (out / 'figures').mkdir()
    (out / 'figures' / 'mine.txt').write_text('kept')
    return out


def test_new_results_take_the_place_of_old_ones_at_once(out):
    before = listed(out)
    with whole_folder(out) as new:
        write_json(new / 'metrics.json', {'a': 2})
        write_json(new / 'figures' / 'new.json', 3)
        assert listed(out) == before and new != out
    assert listed(out) == {'metrics.json': '{\n "a": 2\n}\n', 'figures/mine.txt': 'kept',
                           'figures/new.json': '3\n'}
    assert list(out.parent.iterdir()) == [out]


def test_a_failure_leaves_the_old_results(out):
    before = listed(out)
    with pytest.raises(KeyboardInterrupt), whole_folder(out) as new:
        write_json(new / 'metrics.json', {'a': 2})
        raise KeyboardInterrupt
    assert listed(out) == before and list(out.parent.iterdir()) == [out]


def test_a_kill_between_two_renames_is_made_up_for(out):
    before = listed(out)
    os.rename(out, out.parent / '.out.before')
    with pytest.raises(ZeroDivisionError), whole_folder(out):
        raise ZeroDivisionError
    assert listed(out) == before


def test_a_folder_of_other_things_and_the_current_one_stay_themselves(tmp_path, monkeypatch):
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.tex').write_text('')
    for place in (tmp_path / 'home', tmp_path):
        with whole_folder(place) as new:
            assert new == place
    monkeypatch.chdir(tmp_path / 'home')
    write_json(tmp_path / 'home' / 'metrics.json', {})
    with whole_folder(tmp_path / 'home') as new:
        assert new == tmp_path / 'home'


# ----------------------------------------------------------------------------------------------- evaluate.py

@pytest.fixture(scope='module')
def trained(train_flags, tmp_path_factory):
    return train_run(train_flags, tmp_path_factory.mktemp('runs'), 'a', '--max_steps', '1')


def evaluate_run(folder, out, *more):
    args = evaluate.parse_args(['--checkpoint', str(folder), '--save', str(out), '--device', 'cpu',
                                '--num_threads', '1', '--eval_mode', 'evaluate', '--num_iw_samples', '1',
                                *more])
    return launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args))


def test_a_mode_that_fails_leaves_no_results_and_one_that_ends_names_their_folder(trained, tmp_path, capsys,
                                                                                 monkeypatch):
    out = tmp_path / 'out'
    with monkeypatch.context() as patch, pytest.raises(UserError, match='too bad'):
        def fail(run):
            run.write_metrics('x', {})
            raise UserError('too bad')
        patch.setattr('evaluation.likelihood.evaluate', fail)
        evaluate_run(trained, out)
    assert not out.exists() and not list(tmp_path.iterdir())
    assert evaluate_run(trained, out) == 0 and [p.name for p in out.iterdir()] == ['metrics.json']


@pytest.mark.parametrize('change, told', [
    (lambda path: path.unlink(), 'is lost; made anew from the data it is the same'),
    (lambda path: path.write_text(path.read_text().replace('"val"', '"test"', 1)), 'was changed since')])
def test_a_split_that_was_lost_or_changed_is_said(change, told, trained, train_flags, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / 'eval-a')
    change(tmp_path / 'eval-a' / 'split.json')
    evaluate_run(tmp_path / 'eval-a', tmp_path / 'out')
    assert f"WARNING: the run's split.json {told}" in capsys.readouterr().out
    more = ('--max_steps', '2', '--cont_training')
    if 'lost' in told:
        train_run(train_flags, tmp_path, 'a', *more)
        assert told in capsys.readouterr().out and (tmp_path / 'eval-a' / 'split.json').exists()
    else:
        with pytest.raises(UserError, match=told):
            train_run(train_flags, tmp_path, 'a', *more)
    line, = splits.why_other_split(None, {'files': []}, splits.split_digest({'files': [1]}))
    assert 'is lost, and made anew from these data it is another one' in line


@pytest.mark.parametrize('content', ['[]', '{}', '{"files": 3}', '"' + 'x' * 9 + '"', 'no json'])
def test_a_damaged_split_is_one_line(content, tmp_path):
    (tmp_path / 'split.json').write_text(content)
    with pytest.raises(UserError, match='restore it'):
        splits.read_split(tmp_path / 'split.json')
    whole = {'dataset': 'a', 'split_seed': 0, 'normal_classes': [], 'anomalous_classes': []}
    for more in ({'files': [{'id': 'a'}]}, {'files': [3]}, {'records': {'train': '1'}}, {'records': []}):
        (tmp_path / 'split.json').write_text(json.dumps(whole | more))
        with pytest.raises(UserError, match='not the split of a run'):
            splits.read_split(tmp_path / 'split.json')


def test_what_is_said_before_there_is_a_workshop_stays_as_it_is(capsys):
    Evaluation(Namespace(save='OUT')).say('left out: None of them')
    assert capsys.readouterr().out == 'left out: None of them\n'
