"""The denoising autoencoder, its noise, and the scores of a smoothed residual."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pytest import approx

from anomaly.outputs import Outputs
from anomaly.scores import SCORES, Scoring
from distributions import EIGHT_BITS, Pixels, RowNoise
from families.autoencoder.config import AEConfig
from families.autoencoder.model import AE
from families.dae.config import DAEConfig
from families.dae.model import DAE, depth_to_space, space_to_depth
from families.nvae.config import NVAEConfig
from families.nvae.model import NVAE
from neural_operations import coarse_noise
from utils import UserError

SMALL = DAEConfig(widths=(8, 16))


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ noise

def grid_variance(side, points):
    """Mean variance of a linear interpolation of unit normals from one axis of `points` to `side`."""
    eye = torch.eye(points)[:, None]                                        # the weight of each point
    return (F.interpolate(eye, side, mode='linear') ** 2).sum(0).mean().item()


@pytest.mark.parametrize('shape, points', [
    ((2, 64, 64), (8, 8)), ((1, 32, 16), (8, 4)), ((1, 16, 8, 16), (8, 4, 8))])
def test_coarse_noise_has_the_variance_of_its_interpolation(shape, points):
    noise = coarse_noise(torch.zeros(400, *shape), 0.2, (8,))
    expected = math.prod(map(grid_variance, shape[1:], points))
    assert noise.shape == (400, *shape) and noise.mean().item() == approx(0, abs=0.01)
    assert noise.var().item() / 0.04 == approx(expected, rel=0.05)


def test_coarse_noise_takes_each_grid_half_of_the_time_and_is_rolled():
    fine = coarse_noise(torch.zeros(1000, 1, 16, 16), 1.0, (1, 16))[:, 0]
    flat = ((fine - fine[:, :1, :1]).abs() < 1e-5).flatten(1).all(1)   # one point: the same everywhere
    assert flat.float().mean().item() == approx(0.5, abs=0.06)
    assert fine[~flat].var().item() == approx(1, abs=0.03)                  # as many points as pixels
    # a seam of the roll is as likely at any row: the jump between neighbors is the same everywhere
    jumps = (coarse_noise(torch.zeros(12000, 1, 16, 4), 1.0, (2,)).diff(dim=2) ** 2).mean((0, 1, 3))
    assert jumps.max() < 1.35 * jumps.min()


def test_coarse_noise_of_an_image_is_its_own():
    x, seeds = torch.zeros(3, 1, 16, 16), (5, 6, 7)
    with RowNoise(seeds):
        noise = coarse_noise(x, 0.2)
    with RowNoise(seeds[1:2]):
        alone = coarse_noise(x[:1], 0.2)
    assert torch.equal(noise[1:2], alone) and not torch.equal(noise[0], noise[1])


# ---------------------------------------------------------------------------------------------------- network

def test_the_network_has_its_size_and_starts_from_gray():
    model, x = DAE((1, 64, 64), DAEConfig()), images(2, 1, 64, 64)
    assert sum(p.numel() for p in model.parameters()) == 461_860
    assert torch.equal(model.residual(x), x - 0.5) and torch.equal(model.reconstruct(x), 0 * x + 0.5)


def test_space_to_depth_is_pixel_unshuffle_and_has_an_inverse():
    x = images(2, 3, 6, 10)
    assert torch.equal(space_to_depth(x), F.pixel_unshuffle(x, 2))
    x = images(2, 3, 4, 6, 10)
    deep = space_to_depth(x)
    assert deep.shape == (2, 24, 2, 3, 5) and torch.equal(deep[:, 8 + 5], x[:, 1, 1::2, ::2, 1::2])
    assert torch.equal(depth_to_space(deep), x)


@pytest.mark.parametrize('size', [(9, 14), (5, 8, 6)])
def test_any_size_is_that_of_the_image_with_repeated_edges(size):
    model, x = DAE((1, *size), SMALL), images(2, 1, *size)
    torch.nn.init.normal_(model.out.weight, std=0.1)
    larger = tuple(-(-side // 4) * 4 for side in size)
    repeated = x
    for axis, side in enumerate(larger, start=2):
        repeated = repeated.index_select(axis, torch.arange(side).clamp(max=x.shape[axis] - 1))
    whole = DAE((1, *larger), SMALL)
    whole.load_state_dict(model.state_dict())
    expected = whole.residual(repeated)[(..., *map(slice, size))]
    assert model.residual(x).shape == x.shape
    torch.testing.assert_close(model.residual(x), expected)


def test_the_loss_is_of_the_noisy_image_and_scores_are_of_the_clean_one():
    model, x = DAE((1, 16, 16), SMALL, Pixels(padding=2)).eval(), images(3, 1, 16, 16)
    torch.nn.init.normal_(model.out.weight, std=0.1)
    torch.manual_seed(0)
    y, noise = model(x)['logits'], (torch.manual_seed(0), coarse_noise(x, 0.2))[1]
    torch.testing.assert_close(y, model(x + noise, temperature=0.0)['logits'])
    inner = (x - y)[..., 2:-2, 2:-2]
    torch.manual_seed(0)
    torch.testing.assert_close(model(x)['error'], inner.abs().mean((1, 2, 3)))
    assert torch.equal(model.residual(x), model.residual(x)) and model.residual(x)[..., :2].abs().max() == 0


def test_it_learns_to_remove_noise():
    torch.manual_seed(0)
    model, x = DAE((1, 16, 16), SMALL), torch.linspace(0, 1, 16).expand(8, 1, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.objective(model(x), 0.5)[0].backward()
        optimizer.step()
    noise = coarse_noise(x, 0.2)
    assert (model.reconstruct(x + noise) - x).abs().mean() < 0.4 * noise.abs().mean()


@pytest.mark.parametrize('wrong, told', [
    ({'widths': (8, 12)}, '12 is no multiple of 8'), ({'widths': ()}, '--widths: give one'),
    ({'noise_grids': ()}, '--noise_grids: give one'), ({'coarse_noise': 0.0}, '--coarse_noise 0.0')])
def test_flags_that_cannot_be(wrong, told):
    with pytest.raises(UserError, match=told):
        DAEConfig(**wrong)


# -------------------------------------------------------------------------------------------- other families

NARROW = dict.fromkeys(('num_groups_per_scale', 'num_preprocess_blocks', 'num_postprocess_blocks',
                        'num_preprocess_cells', 'num_postprocess_cells', 'num_mixture_dec'), 1)
NARROW |= {'num_channels_enc': 4, 'num_channels_dec': 4, 'num_latent_per_group': 2}


@pytest.mark.parametrize('family, config, options', [
    (AE, AEConfig, {'latent_dim': 3, 'num_layers': 2, 'width': 4}), (NVAE, NVAEConfig, NARROW)])
def test_coarse_noise_reaches_the_encoder_in_training_alone(family, config, options):
    x, seen = images(4, 1, 16, 16), []
    model = family((1, 16, 16), config(**options, coarse_noise=0.2))
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    scale = 2 if family is NVAE else 1                                     # NVAE sees 2 x - 1
    for training in (True, False):
        torch.manual_seed(0)
        model.train(training)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(seen[0] - seen[1], scale * coarse_noise(x, 0.2))
    torch.testing.assert_close(seen[1], scale * x - (scale - 1))


# ----------------------------------------------------------------------------------------------------- scores

class Known(torch.nn.Module):
    """Its residual is the image."""

    pixels = EIGHT_BITS

    def reconstruct(self, x):
        return 0 * x

    def residual(self, x):
        return x


def values(x, **scoring):
    """The scores of images whose residual is x, by name."""
    outputs = Outputs(Known(), x, Scoring(**scoring))
    return {score.name: score.image(outputs) for score in SCORES['residual'](0)}


def test_residual_scores_worked_by_hand():
    x = torch.arange(1, 401).reshape(1, 1, 20, 20) / 400
    found = values(torch.cat([x, -x]), residual_smoothing=0)
    for name, expected in (('residual_top', 398.5 / 400), ('residual_top5', 390.5 / 400),
                           ('residual_mean', math.log(200.5 / 400))):
        assert found[name].tolist() == approx([expected] * 2)
    assert values(0 * x)['residual_mean'].isfinite().all()


def test_top_residuals_of_a_volume_are_of_its_foreground():
    x = torch.zeros(1, 1, 10, 10, 10)
    x[0, 0, 0] = torch.arange(1, 101).reshape(10, 10) / 100
    found = values(x, residual_smoothing=0)
    assert found['residual_top'].item() == approx(1) and found['residual_mean'].exp().item() == approx(0.505)


def test_the_signed_residual_is_smoothed_and_mirrored_at_the_edges():
    spot = torch.zeros(2, 1, 25, 25)
    spot[0, 0, 12, 12], spot[1, 0, 0, 0] = 1, 1
    smooth = Outputs(Known(), spot, Scoring()).smooth_residual()
    assert smooth.sum((1, 2, 3)).tolist() == approx([1, 1])                 # nothing leaves the image
    assert smooth[0, 0, 12, 12].item() == approx(1 / (2 * math.pi), rel=0.01)
    checkers = (-1.0) ** (torch.arange(24)[:, None] + torch.arange(24)).expand(1, 1, 24, 24)
    assert Outputs(Known(), checkers, Scoring()).smooth_residual()[..., 3:-3, 3:-3].max() < 0.01
    wider = values(spot[:1], residual_smoothing=2)['residual_top']
    assert wider.item() < values(spot[:1])['residual_top'].item()


class Uneven(Known):
    """Its residual is the image where row, column (and slice) are even, without the border."""

    def residual(self, x):
        x = self.pixels.inside(x)
        even = [(torch.arange(side) % 2 == 0).double() for side in x.shape[2:]]
        grid = torch.stack(torch.meshgrid(*even, indexing='ij')).prod(0)
        return self.pixels.framed(x * grid)


@pytest.mark.parametrize(('axes', 'padding'), [(2, 0), (2, 2), (3, 0)])
def test_a_residual_is_averaged_with_that_of_a_shifted_copy(axes, padding):
    x = torch.rand(2, 1, *[6 + 2 * padding] * axes, dtype=torch.float64)
    known, uneven = Known(), Uneven()
    known.pixels = uneven.pixels = replace(EIGHT_BITS, padding=padding)
    x = known.pixels.framed(known.pixels.inside(x))
    for shift in (1, 2):            # what does not depend on the place stays, up to the last row and column
        assert torch.equal(Outputs(known, x, Scoring(residual_shift=shift)).steady_residual(), x.float())
    with pytest.raises(UserError, match='--residual_shift 6: the images have 6 pixels along a side'):
        Outputs(known, x, Scoring(residual_shift=6)).steady_residual()
    single = Outputs(uneven, x, Scoring()).steady_residual()
    assert torch.equal(Outputs(uneven, x, Scoring(residual_shift=2)).steady_residual(), single)
    both = known.pixels.inside(Outputs(uneven, x, Scoring(residual_shift=1)).steady_residual())
    x = known.pixels.inside(x).float()
    places = torch.stack(torch.meshgrid(*[torch.arange(6)] * axes, indexing='ij'))
    even, odd = ((places % 2 == parity).all(0) for parity in (0, 1))
    inner = (places > 0).all(0)
    expected = x * (0.5 * (even | odd) * inner + even * ~inner)        # at the near edges there is no copy
    torch.testing.assert_close(both, expected)
