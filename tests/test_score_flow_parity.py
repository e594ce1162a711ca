"""Known answers of the published Spatial-MSMA flow, where they are at hand: see PARITY."""

import json

import pytest
import torch
from test_score_parity import PARITY, agrees, answers

from families.spatial_msma.config import SpatialMSMAConfig
from families.spatial_msma.model import SpatialMSMA
from families.spatial_msma.patches import pool
from storage.checkpoint import save_checkpoint
from utils import UserError

pytestmark = pytest.mark.skipif(not (PARITY / 'score3d_patch_flow.pt').exists(),
                                reason=f'no known answers in {PARITY}: set PARITY_DIR')


@pytest.fixture(scope='module')
def expected():
    return answers('patch_flow')


@pytest.fixture(scope='module')
def model(expected, tmp_path_factory):
    """Of the published flags and weights, these read as --init_from does."""
    config, flow = expected['config'], expected['config']['flow']
    flags = {name: flow[name] for name in ('num_blocks', 'base_distribution', 'context_embedding_size',
                                           'global_embedding_size', 'use_global_context', 'patch_batch_size')}
    inner = {'image_size': config['image_size'], 'nf': 8, 'blocks_down': [1, 1], 'blocks_up': [1],
             'norm_num_groups': 2, 'time_embedding_sz': 4}
    model = SpatialMSMA((config['num_channels'], *config['image_size']), SpatialMSMAConfig(
        score_model=json.dumps(inner), msma_levels=config['n_timesteps'],
        hidden_features=config['hidden_features'],
        local_patch_kernel=flow['local_patch_config']['kernel_size'],
        global_patch_kernel=flow['global_patch_config']['kernel_size'],
        global_patch_stride=flow['global_patch_config']['stride'], **flags)).eval()
    path = tmp_path_factory.mktemp('published') / 'checkpoint.pth'
    save_checkpoint(path, {'model_state_dict': {k: torch.zeros_like(v) for k, v in
                                                expected['state_dict'].items()},
                           'ema_state_dict': expected['state_dict'], 'kimg': 3})
    model.load_weights(path)
    return model


@torch.no_grad()
def test_published_numbers(model, expected):
    """Both images at once; published each alone."""
    scores, x = expected['scores'], (expected['x'] + 1) / 2
    features = pool(scores, expected['config']['flow']['local_patch_config']['kernel_size'])
    voxels = torch.arange(scores[0, 0].numel())
    code = model.image_code(x)
    assert agrees(features[0], expected['features']) and agrees(code, expected['global_context'])
    assert agrees(model.position(voxels).T, expected['position_code'].flatten(1))
    log_prob = model.log_prob(features, code, voxels)
    assert log_prob.dtype == torch.float64 and agrees(log_prob, expected['log_prob'].flatten(1))
    for i in range(2):
        rows = features[i].flatten(1).T
        context = torch.cat([model.position(voxels), code[i].expand(len(voxels), -1)], dim=1)
        latent, log_det = model.flow.transform(context).call_and_ladj(rows)
        assert agrees(log_det, expected['log_det'][i].flatten())
        if i == 0:
            assert agrees(latent.T, expected['latent'].flatten(1))


@torch.no_grad()
def test_heat_maps_of_both_images(model, expected, monkeypatch):
    monkeypatch.setattr(model.score_model, 'score_maps', lambda x, **levels: expected['scores'][
        [int(torch.equal(x[0], images[1]))]])
    images = (expected['x'] + 1) / 2
    inside, nll = model.foreground(images), model.voxel_nll(images)
    assert agrees(nll[inside], -expected['log_prob'][inside.squeeze(1)].float())


def test_weights_that_do_not_fit(model, expected, tmp_path):
    weights = expected['state_dict']
    for name, told in (('conv_init.conv.bias', '1 missing'), (None, r"1 left over \['gate'\]")):
        changed = {k: v for k, v in weights.items() if k != name} | ({} if name else {'gate': torch.ones(1)})
        save_checkpoint(tmp_path / 'checkpoint.pt', changed)
        with pytest.raises(UserError, match=told):
            model.load_weights(tmp_path)
    save_checkpoint(tmp_path / 'checkpoint.pt', {'net': {}})
    with pytest.raises(UserError, match='no checkpoint of a spatial_msma'):
        model.load_weights(tmp_path)
