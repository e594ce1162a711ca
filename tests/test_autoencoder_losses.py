"""Losses of AE and VAE, and the densities that they stand for, worked by hand."""

import math

import pytest
import scipy.integrate
import torch
import torch.nn.functional as F
from pytest import approx
from test_autoencoder import CONFIGS, build, fixed, images, seeded
from torchmetrics.functional.image import structural_similarity_index_measure

from anomaly.outputs import elbo
from distributions import Pixels
from families.autoencoder.config import VAEConfig
from families.autoencoder.model import AE, LOG_NORMALIZERS, LOSSES, VAE, dissimilarity


def test_losses_worked_by_hand():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.5]]).view(1, 1, 2, 2)
    y = torch.tensor([[0.5, -0.5], [2.0, 0.5]])
    for loss, error in (('l2', (0.25 + 0.25 + 1) / 4), ('l1', (0.5 + 0.5 + 1) / 4)):
        model = fixed(build(AE, (1, 2, 2), num_layers=1, loss=loss), y)
        terms = model(x)
        assert terms['error'].tolist() == approx([error])
        assert model.objective(terms, 0.0)[0].item() == approx(error)


def test_the_loss_is_the_mean_of_a_batch():
    model = fixed(build(AE, (1, 2, 2), num_layers=1), torch.tensor(0.0))
    x = torch.stack([torch.full((1, 2, 2), value) for value in (0.0, 1.0, 0.5)])
    assert model(x)['error'].tolist() == approx([0, 1, 0.25])
    assert model.objective(model(x), 0.0)[0].item() == approx(1.25 / 3)


def test_kl_in_closed_form_and_the_published_loss():
    """z of mean 1 and variance 4, another of the prior: (1 + 4 - 1 - log 4) / 2 nats and 0."""
    code = torch.tensor([[1.0, 0.0, math.log(4), 0.0]])                       # means, then log variances
    model = fixed(build(VAE, (1, 2, 2), num_layers=1, latent_dim=2, kl_weight=3.0), torch.tensor(0.5), code)
    terms, kl = model(torch.ones(1, 1, 2, 2)), (4 - math.log(4)) / 2
    assert terms['kl_channels'].tolist() == [[approx([kl, 0])]] and terms['kl'].tolist() == [[approx(kl)]]
    loss, logs = model.objective(terms, 0.0)
    assert loss.item() == approx(0.25 + 3.0 * kl / 2)                   # mean error, mean KL over the latents
    assert logs['train/error_iter'].item() == approx(0.25)
    assert logs['train/kl_per_latent_iter'].item() == approx(kl / 2)
    normal = torch.distributions.Normal
    q, p = normal(code[:, :2], code[:, 2:].div(2).exp()), normal(0.0, 1.0)
    torch.testing.assert_close(terms['kl'][0, 0], torch.distributions.kl_divergence(q, p).sum())


@torch.no_grad()
@pytest.mark.parametrize('loss', LOG_NORMALIZERS)
def test_the_published_loss_is_the_negative_elbo_but_for_a_factor_and_a_constant(loss):
    model = build(VAE, (3, 16, 16), Pixels(padding=2), loss=loss, kl_weight=0.7).double()
    terms = seeded(lambda: model(images(shape=(3, 16, 16)).double()))
    numbers, latents = 3 * 12 * 12, 3
    constant = numbers * LOG_NORMALIZERS[loss](0.7 * numbers / latents)
    nelbo = -elbo(terms).mean().item()
    assert model.objective(terms, 0.0)[0].item() == approx((nelbo - constant) * 0.7 / latents)
    assert model.objective(terms, 0.0)[1]['train/nelbo_iter'].item() == approx(nelbo)


@torch.no_grad()
@pytest.mark.parametrize('loss, density', [
    ('l2', lambda y: torch.distributions.Normal(y, math.sqrt(32))),         # 2 * 4096 / (2 * 128) = 32
    ('l1', lambda y: torch.distributions.Laplace(y, 64.0))])
def test_the_density_of_the_published_weight(loss, density):
    model, x = VAE((1, 64, 64), VAEConfig(loss=loss)).eval(), images(2, (1, 64, 64))
    terms = model(x)
    torch.testing.assert_close(terms['recon'], -density(terms['logits']).log_prob(x).sum((1, 2, 3)))


@pytest.mark.parametrize('loss', LOG_NORMALIZERS)
def test_densities_integrate_to_one(loss):
    def density(x):
        error = LOSSES[loss](torch.tensor(x), torch.tensor(0.4)).item()
        return math.exp(-error / 0.3 - LOG_NORMALIZERS[loss](0.3))
    assert scipy.integrate.quad(density, -8, 8, points=[0.4])[0] == approx(1, abs=1e-5)


def test_structural_similarity_is_that_of_a_kept_library():
    x, y = images(3, (3, 20, 32)), images(3, (3, 20, 32), seed=2) * 1.5 - 0.2            # y leaves [0, 1]
    y[0] = x[0] + 0.05 * y[0]
    ours = dissimilarity(x, y)                        # theirs goes on beyond the border, where it mirrors
    _, theirs = structural_similarity_index_measure(y, x, data_range=1.0, return_full_image=True)
    torch.testing.assert_close(ours, 1 - theirs[..., 5:-5, 5:-5], rtol=1e-3, atol=1e-4)
    assert ours[0].mean() < 0.1 < ours[1].mean()


def test_structural_similarity_of_volumes_that_are_alike_in_depth_is_that_of_their_pictures():
    x, y = images(2, (2, 1, 14, 15)), images(2, (2, 1, 14, 15), seed=3)
    deep = dissimilarity(x.expand(-1, -1, 12, -1, -1), y.expand(-1, -1, 12, -1, -1))         # (2, 2, 2, 4, 5)
    flat = dissimilarity(x[:, :, 0], y[:, :, 0])
    assert deep.shape == (2, 2, 2, 4, 5)
    torch.testing.assert_close(deep, flat[:, :, None].expand_as(deep), rtol=1e-4, atol=1e-5)


def test_structural_similarity_by_hand():
    """Equal images; and flat ones a and b, where only the luminance is left."""
    x = images(2)
    assert dissimilarity(x, x).abs().max() < 1e-6 and dissimilarity(x, x).shape == (2, 1, 6, 6)
    a, b = (torch.full((1, 1, 12, 12), value, requires_grad=True) for value in (0.2, 0.6))
    lost = dissimilarity(a, b)
    assert lost.mean().item() == approx(1 - (2 * 0.2 * 0.6 + 1e-4) / (0.2 ** 2 + 0.6 ** 2 + 1e-4), abs=1e-3)
    lost.sum().backward()
    assert b.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize('family', CONFIGS)
def test_a_border_counts_nowhere(family):
    """8 x 8 images in a frame of 4, where the output is far off."""
    off = F.pad(torch.zeros(8, 8), (4,) * 4, value=9.0)
    model, x = fixed(build(family, pixels=Pixels(padding=4)), off), F.pad(images(shape=(1, 8, 8)), (4,) * 4)
    assert model(x)['error'].tolist() == approx((x ** 2).sum((1, 2, 3)).div(64).tolist())
    assert torch.equal(model.residual(x), x) and (model.reconstruct(x) == 0).all()
