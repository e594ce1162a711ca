"""The baseline of the benchmarks computes the same numbers, and their tables say what was measured."""

import pytest
import torch

from benchmarks.measure import milliseconds, ratio, table
from benchmarks.plain import loss_and_gradient, plain_model
from benchmarks.recipes import RECIPES, flags_of, trainer_of
from benchmarks.scaling import multiplications
from benchmarks.train_step import Convolutions, convolutions_of
from distributions import Pixels
from families.nvae.model import NVAE, NVAEConfig
from train import parse_args


def test_the_plain_step_has_the_loss_and_the_gradient_of_ours():
    torch.manual_seed(0)
    config = NVAEConfig(num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=2,
                        num_preprocess_cells=1, num_postprocess_cells=1, num_latent_per_group=2, num_nf=1,
                        use_se=True, res_dist=True, weight_decay_norm=1e-2)
    model = NVAE((1, 16, 16), config, Pixels('bernoulli', 1)).to(memory_format=torch.channels_last)
    model.spectral.warm.fill_(True)                         # few iterations, the same for both
    plain, x = plain_model(model), torch.rand(3, 1, 16, 16).round()
    for _ in range(2):                      # the second goes on with the singular vectors of the first
        found, expected = loss_and_gradient(model, x), loss_and_gradient(plain, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


RECIPES_TAKEN = ['nvae_mnist', 'nvae_chest_xray_cpu', 'hvae_fashion_mnist', 'score_phantom_cpu']


@pytest.mark.parametrize('recipe', RECIPES_TAKEN)
def test_flags_of_a_recipe(recipe):
    flags = flags_of(recipe)
    assert parse_args(flags).dataset in (RECIPES / f'{recipe}.sh').read_text() and '--data' not in flags


def test_a_table_of_medians_and_paired_ratios():
    seconds = {'ours': [0.1, 0.3, 0.2], 'plain': [0.2, 0.6, 0.8]}
    row = milliseconds(seconds)
    assert row == pytest.approx({'ours ms': 200, 'from': 100, 'to': 300, 'plain ms': 600})
    assert ratio(seconds['plain'], seconds['ours']) == pytest.approx(2)
    assert table([{'case': 'a', **row}]).splitlines()[1].split() == ['a', '200', '100', '300', '600']


@pytest.mark.parametrize('case', ['hvae_fashion:2', 'nvae_xray:1', 'score_32:1'])
def test_convolutions_of_every_family_are_found(case):
    with trainer_of(case) as trainer:
        images, = next(trainer.steps(0, 0))
        trainer.start_step([images])
        with torch.no_grad(), Convolutions() as found:
            trainer.model(images)
        weights = {id(args[1]): args[1].numel() for _, args, _, _ in found.met}
        assert sum(weights.values()) > 0.8 * sum(p.numel() for p in trainer.model.parameters())
        convolutions_of(trainer.model, images)()


def test_multiplications_of_a_network():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, groups=4))
    assert multiplications(model, torch.zeros(5, 2, 6, 6)) == 5 * (4 * 36 * 2 * 9 + 4 * 16 * 9)
