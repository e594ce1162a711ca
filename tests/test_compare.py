"""Several runs on the same test images: who is compared on what, and numbers that are known on paper."""

import csv
import json
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_detect import settings
from test_scores import LinearGaussian

import evaluate
import train
from anomaly import scoring
from anomaly.baselines import BASELINES
from anomaly.compare import compare
from anomaly.metrics import Estimate
from anomaly.report.comparison import forest
from anomaly.runs import Run, common_images, run_names
from datasets import Data, DataConfig
from distributed import launch
from distributions import Pixels
from readers.parts import Part, SomeOf, Transform
from readers.source import Entry, Source
from utils import UserError, read_flags, read_json, write_json

CONFIG = settings(num_draws=2, num_bootstrap=40)
NORMAL = 60                       # images 0 to 59 are normal, then 8 COVID and 8 Other, which are brighter
COVID, OTHER = range(60, 68), range(68, 76)


def make_data(train=range(20), val=range(20, 40), test=range(40, 76), size=4, masks=False, **changes):
    """One world of 76 images, of which a run has these in its parts; `changes` are of the entries' fields."""
    random = np.random.default_rng(0)
    images = random.integers(40, 110, (76, 1, 4, 4)).repeat(size // 4, 2).repeat(size // 4, 3)
    images[NORMAL:] += 100
    names = ['Normal'] * NORMAL + ['COVID'] * 8 + ['Other'] * 8
    entries = [replace(Entry(f'{name}/{i:02d}.png', 'file', name, f'content-{i}', 1000 + i % 7, i,
                             label=int(name != 'Normal'), mask_row=i if masks else -1), **changes)
               for i, name in enumerate(names)]
    marks = np.zeros((76, 1, size, size), np.uint8)
    marks[NORMAL:, :, :2] = 1
    source = Source(entries, images.astype(np.uint8), marks if masks else None, ('Normal',),
                    ('COVID', 'Other'))
    parts = {name: Part([entries[i] for i in rows], source, Transform(Pixels('discretized', 8)))
             for name, rows in (('train', train), ('val', val), ('test', test))}
    return Data(**parts, shape=(1, size, size), pixels=Pixels('discretized', 8), normal_classes=('Normal',),
                anomalous_classes=('COVID', 'Other'), split={'split_seed': 1, 'duplicates': []}, report=[],
                config=DataConfig(dataset='folder'))


class Constant(torch.nn.Module):
    """Reconstructs black: its error is the brightness, which here tells the classes apart without fail."""
    pixels = Pixels()

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def reconstruct(self, x):
        return torch.zeros_like(x)


class Copy(torch.nn.Module):
    """Reconstructs whatever it is given: its error is 0 for all images."""
    pixels = Pixels()

    def reconstruct(self, x):
        return x


def gaussian():
    return LinearGaussian(tau2=0.01, sigma2=0.01)


def run(name, model, data=None, **more):
    return Run(name, f'runs/eval-{name}', model, data or make_data(), **more)


def do(runs, out, config=CONFIG, log=lambda line: None):
    return compare(runs, out, config, log)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A perfect score at another resolution, and one that knows nothing."""
    out, lines = tmp_path_factory.mktemp('comparison'), []
    result = do([run('perfect', Constant(), make_data(size=8, masks=True)),
                 run('blind', Copy(), make_data(masks=True))], out, log=lines.append)
    return SimpleNamespace(out=out, result=result, lines=lines, text='\n'.join(lines))


def test_a_perfect_score_and_a_blind_one(finished):
    perfect, blind = (finished.result['scores'][f'{name}/reconstruction'] for name in ('perfect', 'blind'))
    for group in ('COVID', 'Other', 'all'):
        share = finished.result['counts'].get(group, 16) / (20 + finished.result['counts'].get(group, 16))
        assert perfect['metrics'][group] == {
            metric: {'value': best, 'low': best, 'high': best}
            for metric, best in (('auroc', 1), ('auprc', 1), ('fpr80', 0), ('fpr95', 0))}
        assert [blind['metrics'][group]['auroc'][key] for key in ('value', 'low', 'high')] == [0.5] * 3
        assert blind['metrics'][group]['auprc']['value'] == pytest.approx(share)
        assert blind['metrics'][group]['fpr80']['value'] == 1
        found = next(d for d in finished.result['differences'] if d['group'] == group)
        assert found == {'group': group, 'first': 'perfect/reconstruction', 'second': 'blind/reconstruction',
                         'turned': False, 'value': 0.5, 'low': 0.5, 'high': 0.5, 'outcome': 'better'}
    assert 'perfect/reconstruction is better' in finished.text


def test_a_model_that_sees_no_more_than_a_baseline_is_not_told_from_it(finished):
    """Mean intensity is perfect here too."""
    result = finished.result
    to_baseline = [d for d in result['differences'] if d['second'] not in result['primary_scores']
                   and d['first'].startswith('perfect') and d['group'] == 'all']
    assert [(d['second'], d['value'], d['outcome']) for d in to_baseline] == [
        ('mean_intensity', 0, 'undecided')]
    assert list(result['scores'])[:2] == result['primary_scores'], "baselines last, once"
    assert len(result['scores']) == 2 + len(BASELINES)


def test_what_is_known_of_the_runs(finished):
    perfect, blind = finished.result['runs'].values()
    assert (perfect['parameters'], blind['parameters']) == (3, 0)
    assert (perfect['shape'], blind['shape']) == ([1, 8, 8], [1, 4, 4])
    assert (perfect['train_images'], perfect['validation_images']) == (20, 20)
    assert 0 < perfect['seconds_per_image'] < 1
    assert finished.result['counts'] == {'Normal': 20, 'COVID': 8, 'Other': 8}


def test_seconds_are_those_of_the_scores_and_not_of_the_baselines(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(scoring.time, 'perf_counter', lambda: float(next(clock)))
    result = do([run('a', Copy()), run('b', Copy())], tmp_path)
    # the clock moves on by one between the two readings of a batch, and there are 5 of the 36 test images
    assert [one['seconds_per_image'] for one in result['runs'].values()] == [5 / 36] * 2


@pytest.mark.parametrize('scores', [(), ('llr_1', 'kl_profile')])
def test_the_same_model_twice_differs_by_exactly_nothing(tmp_path, scores):
    result = do([run('a', gaussian()), run('b', gaussian())], tmp_path,
                settings(scores=scores, num_draws=2, num_bootstrap=40))
    rows = result['scores']
    assert [name for name in rows if '/' in name] == [
        f'{name}/{score}' for name in 'ab' for score in ('nelbo', *scores[::-1])]
    for score in ('nelbo', *scores):
        assert rows[f'a/{score}'] | {'run': 'b'} == rows[f'b/{score}']
    pairs = [d for d in result['differences'] if d['second'] == 'b/nelbo']
    assert [d['group'] for d in pairs] == ['COVID', 'Other', 'all']
    assert all((d['value'], d['low'], d['high'], d['outcome']) == (0, 0, 0, 'undecided') for d in pairs)


# -------------------------------------------------------------------------------------------- the same images

def test_only_images_that_every_run_tests_and_none_has_learned_from():
    first = run('first', Copy())
    other = make_data(train=[*range(20), 40, 41], val=range(20, 40), test=[*range(75, 42, -1), 42])
    ids, lines = common_images([first, run('second', Copy(), other)])
    assert ids == [entry.id for entry in first.data.test.entries[2:]], "in the order of the first"
    assert lines == ['2 of 36 test images are left out: 2 in the training or validation part of second']
    fewer = make_data(test=range(40, 70))
    ids, lines = common_images([first, run('second', Copy(), fewer)])
    assert len(ids) == 30 and lines == [
        '6 of 36 test images are left out: 6 not among the test images of second']
    assert common_images([first, first]) == ([entry.id for entry in first.data.test.entries], [])


def test_an_image_that_a_run_has_learned_under_another_name_is_left_out():
    first, other = run('first', Copy()), make_data(val=range(20, 39))
    twin = replace(other.val.entries[0], id='Normal/copy.png', sha256='content-44')
    other.val.entries[0] = twin
    ids, lines = common_images([first, run('second', Copy(), other)])
    assert 'Normal/44.png' not in ids and len(ids) == 35
    assert lines == ['1 of 36 test images are left out: 1 in the training or validation part of second']


def test_all_runs_are_judged_on_these_images(tmp_path):
    other = make_data(train=[*range(20), 40, 41], test=range(42, 76))
    lines = []
    result = do([run('a', Constant()), run('b', Constant(), other)], tmp_path, log=lines.append)
    assert [result['scores'][f'{name}/reconstruction']['flagged']['normal'][1] for name in 'ab'] == [18, 18]
    assert result['scores']['png_size']['flagged']['normal'][1] == 18
    assert '2 of 36 test images are left out: 2 in the training or validation part of b' in lines
    assert 'left out' in (tmp_path / 'comparison.md').read_text()


def test_some_of_a_part_gives_the_images_of_these_ids():
    part = make_data(masks=True).test
    some = SomeOf(part, ['COVID/61.png', 'Normal/43.png'])
    batch = some.__getitems__([(0, 0), (0, 1)])
    assert batch.id == ['COVID/61.png', 'Normal/43.png'] and batch.y.tolist() == [1, 0]
    whole = part.items([21, 3])
    assert torch.equal(batch.x, whole.x) and torch.equal(batch.mask, whole.mask) and len(some) == 2
    with pytest.raises(KeyError):
        SomeOf(part, ['Normal/00.png'])


@pytest.mark.parametrize('second, told', [
    (replace(make_data(), config=DataConfig(dataset='covid')),
     "the data set of second is 'covid', of first 'folder'"),
    (replace(make_data(), normal_classes=('Normal', 'Other')),
     "the normal classes of second is 'Normal, Other', of first 'Normal'"),
    (make_data(sha256='changed'),
     'Normal/40.png is another file in the data of second than in those of first'),
    (make_data(train=range(40, 60), val=range(20, 40), test=range(60, 76)),
     r'no normal test image in common \(20 in that of first, 0 in that of second\). 20 of 36 test images are '
     r'left out: 20 in the training'),
    (make_data(test=range(40, 60)), 'no anomalous test image in common'),
], ids=['data set', 'classes', 'content', 'normal', 'anomalous'])
def test_runs_that_cannot_be_compared(second, told, tmp_path):
    with pytest.raises(UserError, match=told):
        do([run('first', Copy()), run('second', Copy(), second)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_split_is_said_to_be_unknown(tmp_path):
    lines = []
    do([run('a', Copy()), run('b', Copy(), knows_split=False)], tmp_path, log=lines.append)
    assert any(line.startswith('b has no split.json') for line in lines)


# ----------------------------------------------------------------------------------------------------- scores

def test_scores_that_only_one_run_has(tmp_path):
    lines = []
    result = do([run('a', gaussian()), run('b', Copy())], tmp_path, settings(
        scores=('llr_1',), num_draws=1, num_bootstrap=5), log=lines.append)
    assert [name for name in result['scores'] if '/' in name] == ['a/nelbo', 'a/llr_1', 'b/reconstruction']
    assert 'b has no score llr_1' in lines
    with pytest.raises(UserError, match='--scores llr_7'):
        do([run('a', gaussian()), run('b', gaussian())], tmp_path, settings(scores=('llr_7',)))


def test_the_primary_score_may_be_named(tmp_path):
    result = do([run('a', gaussian()), run('b', gaussian())], tmp_path,
                settings(primary_score='kl', num_bootstrap=5))
    assert result['primary_scores'] == ['a/kl', 'b/kl'] and len(result['scores']) == 2 + len(BASELINES)
    with pytest.raises(UserError, match='b: --primary_score kl is not among'):
        do([run('a', gaussian()), run('b', Copy())], tmp_path, settings(primary_score='kl'))


# ---------------------------------------------------------------------------------------------------- outputs

def test_the_files(finished):
    assert {p.relative_to(finished.out).as_posix() for p in finished.out.rglob('*') if p.is_file()} == {
        'comparison.json', 'comparison.html', 'comparison.md', 'comparison.csv',
        *(f'figures/{name}.{kind}' for name in ('forest', 'differences', 'roc') for kind in ('png', 'svg'))}
    page = (finished.out / 'comparison.html').read_text()
    assert page.count('</svg>') >= 3 and page.count('<table>') == 8 and 'Not a medical device' in page
    stored = json.loads((finished.out / 'comparison.json').read_text())
    assert stored == json.loads(json.dumps(finished.result))


def markdown_tables(text):
    """The tables of a page: lists of rows of cells."""
    blocks = re.findall(r'(?:^\|.*\n)+', text, flags=re.M)
    return [[[cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]] for line in block.splitlines()]
            for block in blocks]


def test_the_markdown_is_made_of_tables(finished):
    text = (finished.out / 'comparison.md').read_text()
    tables = markdown_tables(text)
    assert len(tables) == 1 + 2 * 3 + 1, "runs; scores and differences of two classes and all; pixels"
    for head, line, *rows in tables:
        assert set(line) == {'---'} and {len(row) for row in (line, *rows)} == {len(head)} and rows
    scores = tables[1]
    assert scores[0] == ['', 'AUROC', 'AUPRC', 'FPR80', 'FPR95', 's/image', 'parameters']
    assert scores[2][:2] == [r'perfect/reconstruction \*', '1.000 [1.000, 1.000]']
    assert scores[4][0] == 'mean_intensity' and scores[4][-2:] == ['-', '-']
    assert tables[2][2] == ['perfect/reconstruction - blind/reconstruction',
                            'perfect/reconstruction is better', '+0.500 [+0.500, +0.500]']
    assert [row[0] for row in tables[-1][2:]] == [r'perfect/reconstruction \*', r'blind/reconstruction \*',
                                                  'mean_intensity', 'mean_image', 'pca_top']


def test_the_table_of_the_terminal_is_aligned(finished):
    start = finished.lines.index('Normal (20) against COVID (8 test images)')
    head, *rows = finished.lines[start + 1:start + 11]
    assert rows[2] == '  trivial baselines'
    ends = {line.index(']') for line in rows[:2] + rows[3:]}
    assert ends == {head.index('AUROC') + 4}, "columns end where their head ends"
    assert 'cannot be told apart' in finished.text and 'paired' in finished.text


def test_many_classes_share_a_table_on_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr('anomaly.report.comparison.MOST_TABLES', 2)
    lines = []
    do([run('a', Constant()), run('b', Copy())], tmp_path, log=lines.append)
    assert [line for line in lines if line.startswith('Normal (')] == [
        'Normal (20) against all anomalous classes (16 test images)']
    assert 'The tables of each class are in comparison.md.' in lines


def test_the_csv_has_a_line_a_row_and_group(finished):
    with (finished.out / 'comparison.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (2 + len(BASELINES)) * 3
    assert rows[0]['row'] == 'perfect/reconstruction' and rows[0]['primary'] == '1'
    for row in rows:
        metric = finished.result['scores'][row['row']]['metrics'][row['group']]['auprc']
        assert [float(row[f'auprc{end}']) for end in ('', '_low', '_high')] == [
            metric[key] for key in ('value', 'low', 'high')]
        assert (row['run'] == '') == (row['kind'] == 'baseline')


def timeless(result):
    return {**result, 'runs': {name: one | {'seconds_per_image': 0} for name, one in result['runs'].items()}}


def score_on_a_rank(out):
    do([run('a', gaussian()), run('b', Constant())], out)
    return 0


def test_two_ranks_give_the_numbers_of_one(tmp_path, forked_processes):
    first = do([run('a', gaussian()), run('b', Constant())], tmp_path / 'one')
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert launch.launch(score_on_a_rank, tmp_path / 'two', launch.LaunchConfig(
            num_process_per_node=2, device='cpu', num_threads=1)) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    two = json.loads((tmp_path / 'two' / 'comparison.json').read_text())
    assert timeless(two) == timeless(json.loads(json.dumps(first)))


# ----------------------------------------------------------------------------------------------- command line

def test_names_of_runs(tmp_path):
    folders = [tmp_path / name for name in ('a/eval-x', 'b/eval-x', 'a/eval-y', 'c/deep/eval-z')]
    for folder in folders:
        folder.mkdir(parents=True)
    files = [folders[3] / name for name in ('checkpoint.pt', 'best.pt')]
    for file in files:
        file.touch()
    paths = [*map(str, folders[:3]), *map(str, files)]
    assert run_names(paths) == ['a/x', 'b/x', 'y', 'z', 'z-best']
    for other in (f'{folders[3]}', f'{folders[3]}/../eval-z', f'{folders[3]}/checkpoint.pt'):
        with pytest.raises(UserError, match='twice'):
            run_names([paths[3], other])
    with pytest.raises(UserError, match='name two or more'):
        run_names(paths[:1])


@pytest.fixture(scope='module')
def trained(train_flags, tmp_path_factory):
    """A run, and the same as if it had learned from two of the 20 test images."""
    root = tmp_path_factory.mktemp('runs')
    args = train.parse_args([*train_flags, '--root', str(root), '--save', 'a', '--max_steps', '2'])
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0
    shutil.copytree(root / 'eval-a', root / 'eval-b')
    split = read_json(root / 'eval-b' / 'split.json')
    for file in [file for file in split['files'] if file['part'] == 'test' and file['class'] == 'normal'][:2]:
        file['part'] = 'train'
    write_json(root / 'eval-b' / 'split.json', split)
    return root


def on_command(*words):
    args = evaluate.parse_args([*map(str, words), '--device', 'cpu', '--num_threads', '1'])
    return launch.launch(evaluate.work, args, read_flags(launch.LaunchConfig, args))


def test_trained_runs_from_the_command_line(trained, capsys):
    assert on_command('--compare', trained / 'eval-a', trained / 'eval-b' / 'checkpoint.pt', '--num_draws', 1,
                      '--num_bootstrap', 20) == 0
    result = json.loads((trained / 'comparison' / 'comparison.json').read_text())
    assert result['counts'] == {'normal': 8, 'spot': 10}
    assert [one['train_images'] for one in result['runs'].values()] == [32, 34]
    assert result['primary_scores'] == ['a/nelbo', 'b/nelbo'] and result['batch_size'] == 8
    shown = capsys.readouterr().out
    assert 'a/nelbo *' in shown and '2 of 20 test images are left out' in shown


@pytest.mark.parametrize('words, told', [
    (['--compare', 'eval-a', 'nowhere'], 'there is no checkpoint nowhere'),
    (['--compare', 'eval-a'], 'name two or more'),
    (['--compare', 'eval-a', './eval-a'], 'twice'),
    (['--compare', 'eval-a', 'eval-b', '--eval_mode', 'latents'], '--eval_mode compare, not of latents'),
    (['--compare', 'eval-a', 'eval-b', '--llr_prior', 'draw'], '--llr_prior does nothing'),
    (['--compare', 'eval-a', 'eval-b', '--density_images', 'val'], '--density_images does nothing'),
])
def test_mistakes_of_the_user_are_named(trained, words, told, monkeypatch):
    monkeypatch.chdir(trained)
    with pytest.raises(UserError, match=told):
        on_command(*words)


def test_a_checkpoint_or_a_comparison():
    for words in ([], ['--checkpoint', 'a', '--compare', 'a', 'b']):
        with pytest.raises(UserError, match='give --checkpoint'):
            evaluate.parse_args(words)


def test_every_panel_of_a_forest_plot_has_a_scale():
    """Four panels are two rows, and a shared axis would leave the upper one without numbers."""
    found = {str(group): {'a': Estimate(0.8, 0.7, 0.9)} for group in range(4)}
    figure = forest(found, {}, 0.5, 'AUROC')
    figure.draw_without_rendering()
    shown = [panel for panel in figure.axes if panel.get_visible()]
    assert len(shown) == 4
    for panel in shown:
        assert any(label.get_visible() and label.get_text() for label in panel.get_xticklabels())
