"""Several runs in one score: z-scores worked by hand, and runs that do not fit together."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from test_compare import Constant, Copy, gaussian, make_data, run
from test_detect import settings

import evaluate
from anomaly.detect import detect
from anomaly.maps import nifti
from anomaly.scoring import Case
from utils import UserError, read_json

SUM = 'dark/reconstruction+bound/nelbo'


def together(runs, out, log=lambda line: None, **flags):
    return detect(runs, out, settings(num_draws=2, num_bootstrap=40, **flags), log)


def column(out, part, name):
    """A column of scores.csv in the order of the images."""
    rows = csv.DictReader((out / 'scores.csv').open())
    return np.array([value for _, value in sorted((row['id'], float(row[name])) for row in rows
                                                  if row['part'] == part)])


@pytest.mark.page
def test_the_sum_of_z_scores_over_validation_images(tmp_path):
    lines = []
    # at another size, and the second in another order
    runs = [run('dark', Constant(), make_data(size=8)),
            run('bound', gaussian(), make_data(val=range(39, 19, -1)))]
    result = together(runs, tmp_path, lines.append, primary_score=SUM)
    assert result['primary_score'] == SUM == next(iter(result['scores']))
    for part in ('val', 'test'):
        expected = 0
        for name in SUM.split('+'):
            normal = column(tmp_path, 'val', name)
            expected = expected + (column(tmp_path, part, name) - normal.mean()) / normal.std()
        assert np.allclose(column(tmp_path, part, SUM), expected, rtol=1e-4, atol=2e-4)        # of six digits
    auroc = result['scores'][SUM]['metrics']['all']['auroc']['value']
    assert auroc == 1 and any(SUM in line for line in lines)
    assert [row['first'] for row in result['verdict']] == [SUM] * len(result['verdict'])
    kept = read_json(tmp_path / 'metrics.json')['anomaly']['runs']
    assert kept == {'dark': 'runs/eval-dark', 'bound': 'runs/eval-bound'}
    assert (tmp_path / 'report.html').exists()


def test_a_score_of_all_runs_or_the_own_one_of_each(tmp_path):
    runs = [run('dark', Constant()), run('copy', Copy())]
    expected = 'dark/reconstruction+copy/reconstruction'
    assert together(runs, tmp_path / 'one', primary_score='reconstruction')['primary_score'] == expected
    assert together(runs, tmp_path / 'own')['primary_score'] == expected


def test_the_name_of_a_run_may_hold_a_plus(tmp_path):
    runs = [run('dark+bright', Constant()), run('copy', Copy())]
    both = 'dark+bright/reconstruction+copy/reconstruction'
    assert together(runs, tmp_path, primary_score=both)['primary_score'] == both


def test_further_scores_are_those_that_a_run_has(tmp_path):
    runs = [run('dark', Constant()), run('bound', gaussian())]
    result = together(runs, tmp_path, primary_score=SUM, scores=('kl_1', 'reconstruction'))
    models = [name for name, row in result['scores'].items() if row['kind'] == 'model']
    assert models == [SUM, 'dark/reconstruction', 'bound/reconstruction', 'bound/nelbo', 'bound/kl_1']
    with pytest.raises(UserError, match='no such score'):
        together(runs, tmp_path, primary_score=SUM, scores=('kl_7',))


@pytest.mark.parametrize('second, flags, said', [
    (make_data(train=range(20, 40), val=range(20)), {}, 'validation images differ'),
    (make_data(), {'primary_score': 'nobody/reconstruction'}, 'there is no run nobody'),
    (make_data(), {'primary_score': 'a/reconstruction'}, 'b: no score of this run'),
    (make_data(), {'primary_score': 'nelbo'}, 'likelihood terms')])
def test_runs_that_do_not_fit_together_are_refused(second, flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        together([run('a', Copy()), run('b', Copy(), second)], tmp_path, **flags)


def test_the_primary_score_of_a_family_may_be_preset_by_the_data_set():
    from anomaly.choice import preset
    from families.autoencoder.config import AEConfig
    from families.autoencoder.model import AE
    from families.dae.config import DAEConfig
    from families.dae.model import DAE
    dae, ae = DAE((1, 16, 16), DAEConfig()), AE((1, 16, 16), AEConfig(width=2))
    assert preset(dae, 'covid') == 'residual_mean' and preset(dae, 'folder') == 'residual_top'
    assert preset(ae, 'covid') == 'reconstruction' and preset(Constant(), 'covid') == ''


def test_several_checkpoints_are_for_anomaly_scores(tmp_path):
    paths = [str(tmp_path / name) for name in ('eval-a', 'eval-b')]
    (tmp_path / 'eval-a').mkdir()
    args = evaluate.parse_args(['--eval_mode', 'anomaly', '--checkpoint', *paths])
    assert list(args.together) == paths
    assert args.checkpoint == paths[0] and args.save == str(tmp_path / 'together')
    with pytest.raises(UserError, match='is for one run, 2 are given'):
        evaluate.parse_args(['--eval_mode', 'sample', '--checkpoint', *paths])


def test_maps_of_one_of_several_runs_lie_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(nifti, 'entry_grids', lambda entry: ())
    monkeypatch.setattr(nifti, 'write_map', lambda path, values: written.append(path))
    written, case = [], Case(0, np.zeros((1, 2, 2, 2)), None, np.zeros((2, 2, 2)), None)
    nifti.write_cases(tmp_path, [case], [SimpleNamespace(id='ward/7', grids=(1, 1))], 'dark/residual_top')
    assert written == [tmp_path / 'ward_7_dark_residual_top.nii.gz']
