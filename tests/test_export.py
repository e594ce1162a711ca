"""The exported program, and the script that runs it without this project, against the evaluation."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from test_evaluate import run as evaluated

from anomaly.choice import choose_scores
from anomaly.config import Judging, MapConfig
from anomaly.maps.postprocessing import final_maps
from anomaly.normal import Normal
from anomaly.outputs import Outputs
from anomaly.scores import Scoring
from anomaly.scoring import Table
from datasets import DataConfig, preparation
from distributions import Pixels
from evaluation.export_example import load
from model import build_model, describe, family_config, load_model
from storage.checkpoint import fingerprint, save_checkpoint
from utils import UserError, read_flags, write_json

MODELS = {     # family -> flags of a small one, and a primary score
    'nvae': ({'num_channels_enc': 4, 'num_channels_dec': 4, 'num_preprocess_blocks': 1, 'use_se': True,
              'num_preprocess_cells': 1, 'num_postprocess_blocks': 1, 'num_postprocess_cells': 1,
              'num_latent_scales': 2, 'num_groups_per_scale': 1, 'num_latent_per_group': 2,
              'num_mixture_dec': 2, 'res_dist': True}, 'latent_knn'),
    'ae': ({'num_layers': 2, 'width': 4, 'latent_dim': 4}, 'reconstruction'),
    'dae': ({'widths': (8, 8)}, 'residual_top'),
}
SMOOTH, SCORING = MapConfig(map_smoothing=0.7), Scoring(num_draws=1, residual_shift=2)


@pytest.fixture(scope='module', params=MODELS)
def exported(request, tmp_path_factory):
    """The folder of an export, and what the evaluation says: the model, images x, their scores and maps."""
    flags, primary = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = build_model(request.param, (1, 16, 16), read_flags(family_config(request.param), flags), Pixels())
    for parameter in model.eval().parameters():                       # a new DAE is constant
        parameter.data += 0.05 * torch.randn_like(parameter)
    args = {'model': request.param, 'dataset': 'folder', 'image_size': 16, 'data': '/secret/place'}
    save_checkpoint(folder / 'checkpoint.pt', {'weights': model.state_dict(), 'args': args,
                                               'description': describe(model)})
    write_json(folder / 'args.json', args)
    make_images(folder / 'images', 8, seed=3)
    x = preparation(read_flags(DataConfig, args), (1, 16, 16), Pixels()).images(
        sorted((folder / 'images').iterdir())).x
    has_bound = hasattr(model, 'num_groups')
    scores, _ = choose_scores([primary, 'reconstruction', *['nelbo'] * has_bound], model)
    # One at a time as the program takes them: last bits depend on the shape of a batch.
    single = [Outputs(model, image[None], SCORING) for image in x]
    column = lambda function: torch.cat([function(one) for one in single]).double().numpy()
    table = Table([SimpleNamespace(id=str(i)) for i in range(len(x))],
                  {s.name: column(s.image) for s in scores if s.image},
                  {s.name: column(s.features) for s in scores if s.features})
    normal = Normal.fit(table, scores, primary, SCORING, SMOOTH, Judging())
    normal.weights = fingerprint(model)
    normal.save(folder / 'thresholds.json')
    values = normal.apply(table, scores).values[primary]
    mapped = [score for score in scores if score.has_map(model, SCORING)]
    maps, _ = final_maps(Outputs(model, x, SCORING), mapped, SMOOTH)
    evaluated(folder, folder / 'out', 'export')
    return folder, model, x, values, maps


def test_the_program_gives_the_score_and_the_map_of_the_evaluation(exported):
    folder, _, x, values, maps = exported
    program = torch.export.load(folder / 'out' / 'model.pt2').module()
    about = json.loads((folder / 'out' / 'export.json').read_text())
    assert np.ptp(values) > 0
    for image, value, where in zip(x, values, maps[about['map']]):
        score, shown = program(image[None])
        assert score.shape == (1,) and score.item() == pytest.approx(value, rel=1e-5)
        torch.testing.assert_close(shown[0, 0], torch.from_numpy(where), atol=1e-5, rtol=1e-5)


def test_nothing_of_the_machine_is_in_the_folder(exported):
    for path in (exported[0] / 'out').iterdir():
        assert b'/secret/place' not in path.read_bytes(), path
        assert str(exported[0]).encode() not in path.read_bytes() or path.suffix == '.pt2', path


@pytest.mark.parametrize('exported', ['nvae'], indirect=True)
def test_a_score_that_draws_is_refused_with_those_that_do_not(exported, tmp_path):
    with pytest.raises(UserError, match='--primary_score: reconstruction, latent_knn'):
        evaluated(exported[0], tmp_path, 'export', '--primary_score', 'nelbo')


@pytest.mark.parametrize('exported', ['ae'], indirect=True)
def test_the_example_runs_without_the_project(exported, tmp_path):
    folder, _, _, values, _ = exported
    command = [sys.executable, '-I', folder / 'out' / 'example.py', folder / 'images' / '000.png']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'reconstruction {values[0]:.7g}' in done.stdout and 'of the pixels are anomalous' in done.stdout


@pytest.mark.parametrize('exported', ['ae'], indirect=True)
def test_the_weights_load_again(exported):
    if importlib.util.find_spec('safetensors') is None:
        pytest.skip('safetensors is not installed')
    folder, model, *_ = exported
    again = load_model(folder / 'out')
    assert fingerprint(again) == fingerprint(model) and again.config == model.config


@pytest.mark.parametrize('flags', [{}, {'fit': 'crop'}, {'fit': 'stretch', 'invert': True},
                                   {'num_x_bits': 5, 'channels': 3}, {'num_x_bits': 12}])
@pytest.mark.parametrize('mode', ['L', 'RGB', 'I;16'])
def test_the_example_prepares_an_image_as_the_run_does(flags, mode, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 13, 3)).astype(np.uint8)
    picture = {'L': noise[..., 0], 'RGB': noise, 'I;16': noise[..., 0].astype(np.uint16) * 251}[mode]
    Image.fromarray(picture).save(tmp_path / 'a.png')
    config = DataConfig(**{'dataset': 'folder', 'image_size': 12} | flags)
    shape = (config.channels or 1, 12, 12)
    prepared = preparation(config, shape, Pixels(bits=config.num_x_bits))
    x = load(tmp_path / 'a.png', 12, 0, shape[0], config.fit, config.depth, config.num_x_bits, config.invert)
    off = (x - prepared.images([tmp_path / 'a.png']).x).abs()
    assert off.max() <= 1.01 / (2 ** config.num_x_bits - 1) and (off > 1e-6).float().mean() < 0.01
