"""Layers: shapes, weight normalization, initialization from data, singular values."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import nn

from families.nvae import regularizers
from families.nvae.flows import FlowCell, autoregressive_mask
from families.nvae.layers import (
    RESIDUAL_OPS,
    Cell,
    Conv2d,
    SqueezeExcite,
    WeightNormConv2d,
    depthwise_filter_gradient,
    initialize_from_data,
)
from families.nvae.regularizers import SpectralRegularizer, batch_norm_regularizer
from neural_operations import Conv3d, ConvTranspose3d, activation_bytes, checkpoint_activations

OPS = [*RESIDUAL_OPS, 'mconv_e6k5g0', 'mconv_e3k5g8', 'mconv_e6k11g0', 'mconv_e6k9g0']
SHAPES = {'normal': (2, 8, 12, 12), 'down': (2, 16, 6, 6), 'up': (2, 4, 24, 24)}


@pytest.mark.parametrize('op', OPS)
@pytest.mark.parametrize('kind', SHAPES)
def test_cell_shapes_and_gradients(op, kind):
    cell = Cell(8, kind, [op] if op.startswith('mconv') else [op, op], use_se=True)
    y = cell(torch.randn(2, 8, 12, 12))
    assert y.shape == SHAPES[kind]
    y.sum().backward()
    assert all(p.grad is not None for p in cell.parameters())


def test_recomputed_activations_give_the_same_step_and_count_a_batch_once():
    torch.manual_seed(0)
    plain = nn.Sequential(*[Cell(8, 'normal', ['res_bnswish', 'res_bnswish'], use_se=True) for _ in range(3)])
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving)
    x = torch.randn(4, 8, 12, 12)
    for model in (plain, saving):
        model(x).square().mean().backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers()):
        assert torch.equal(a, b) or name.endswith('num_batches_tracked'), name
    kept, recomputed = (activation_bytes(plain, (8, 12, 12), on) for on in (False, True))
    one = 8 * 12 * 12 * 4                                                   # bytes of a cell's input
    # The inputs of three cells, and one cell in full.
    assert 3 * one < recomputed < 3 * one + kept / 2 and kept > 10 * one
    assert [activation_bytes(saving, (8, 12, 12), on) for on in (False, True)] == [kept, recomputed]
    assert all(cell.recomputes for cell in saving)


def test_filters_have_the_norm_of_their_gain():
    conv = WeightNormConv2d(3, 5, 3)
    with torch.no_grad():
        conv.log_weight_norm.copy_(torch.arange(5.0).view(5, 1, 1, 1))
    norms = conv.effective_weight().flatten(1).norm(dim=1)
    assert norms.tolist() == approx([torch.tensor(i).float().exp().item() for i in range(5)], rel=1e-4)


def test_a_new_convolution_is_nearly_the_plain_one():
    conv = WeightNormConv2d(16, 16, 3)
    torch.testing.assert_close(conv.effective_weight(), conv.weight, rtol=0.02, atol=1e-4)


def test_first_batch_gives_channels_mean_0_and_std_one_fifth():
    torch.manual_seed(0)
    layers = nn.Sequential(
        WeightNormConv2d(2, 4, 3, data_init=True), nn.ELU(), WeightNormConv2d(4, 6, 3, data_init=True)
    )
    x = 3 + 2 * torch.randn(8, 2, 10, 10)
    initialize_from_data(layers, lambda: layers(x))
    for y in (layers[0](x), layers(x)):
        assert y.mean((0, 2, 3)).abs().max().item() < 1e-4
        assert y.std((0, 2, 3)).tolist() == approx([0.2] * y.shape[1], rel=1e-3)


def test_squeeze_excite_gates_each_channel_of_each_image():
    se = SqueezeExcite(8)
    x = torch.rand(3, 8, 5, 5) + 0.1
    gate = se(x)
    assert gate.shape == (3, 8, 1, 1) and gate.amin() > 0 and gate.amax() < 1
    assert sum(p.numel() for p in se.parameters()) == 8 * 4 + 4 + 4 * 8 + 8


@pytest.mark.parametrize('use_se', [False, True])
@pytest.mark.parametrize('kind', ['normal', 'down', 'up'])
def test_a_cell_adds_a_tenth_of_its_gated_operations_to_its_skip(use_se, kind):
    cell = Cell(8, kind, ['res_bnswish', 'mconv_e3k5g0'], use_se).double()
    x = torch.randn(2, 8, 6, 6).double()
    y = cell.ops(x)
    gate = cell.se(y) if use_se else 1.0
    torch.testing.assert_close(cell(x), cell.skip(x) + 0.1 * (y * gate))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(cell.float()(x.float()).double(), cell.skip(x.float()) + 0.1 * (y * gate),
                                   rtol=0.05, atol=0.05, check_dtype=False)


def test_spectral_regularizer_finds_the_sum_of_largest_singular_values():
    torch.manual_seed(0)
    convs = [WeightNormConv2d(6, 10, 3), nn.Conv2d(6, 10, 3, bias=False), nn.Conv2d(4, 4, 1, bias=False)]
    regularizer = SpectralRegularizer(convs)
    exact = sum(
        torch.linalg.svdvals(w.flatten(1))[0].item()
        for w in (convs[0].effective_weight(), convs[1].weight, convs[2].weight)
    )
    assert regularizer().item() == approx(exact, rel=1e-3)
    for _ in range(30):
        value = regularizer()
    assert value.item() == approx(exact, rel=1e-5)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_largest_singular_values_have_the_gradients_of_autograd(channels_last, masked):
    torch.manual_seed(2)
    mask = (torch.rand(5, 3, 3, 3) > 0.5).double() if masked else None
    convs = [WeightNormConv2d(3, 5, 3, mask=mask).double() for _ in range(2)] + [nn.Conv2d(3, 5, 3).double()]
    convs[0].weight.data[1] = 0                                                        # its norm has no slope
    if channels_last:
        nn.ModuleList(convs).to(memory_format=torch.channels_last)
    plain, regularizer = copy.deepcopy(convs), SpectralRegularizer(convs).double()
    value, expected = 0.3 * regularizer(), 0.0
    value.backward()
    for i, conv in enumerate(plain):
        weight = conv.weight
        if i < 2:
            weight = weight if mask is None else weight * mask
            norm = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
            weight = weight * conv.log_weight_norm.exp() / (norm + 1e-5)
        expected = expected + 0.3 * (regularizer.u0[i] @ weight.flatten(1) @ regularizer.v0[i])
    expected.backward()
    torch.testing.assert_close(value, expected)
    for ours, one in zip(nn.ModuleList(convs).parameters(), nn.ModuleList(plain).parameters()):
        if one.grad is not None:
            torch.testing.assert_close(ours.grad, one.grad)


def test_singular_values_do_not_depend_on_how_many_matrices_the_cache_holds(monkeypatch):
    torch.manual_seed(2)
    convs = [WeightNormConv2d(3, 4, 3) for _ in range(3)] + [nn.Conv2d(3, 4, 3), WeightNormConv2d(3, 4, 3)]
    whole, parts = SpectralRegularizer(convs), SpectralRegularizer(convs)
    parts.load_state_dict(whole.state_dict())
    value = whole()
    monkeypatch.setattr(regularizers, 'IN_CACHE', 2 * convs[0].weight.numel())
    torch.testing.assert_close(parts(), value)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(buffer, parts.get_buffer(name))


@pytest.mark.parametrize(('kernel', 'stride', 'size'),
                         [(5, 1, 8), (3, 2, 9), (5, 2, 8), (9, 1, 4), (1, 1, 3)])
def test_filters_of_depthwise_convolutions_get_the_gradient_of_pytorch(kernel, stride, size):
    torch.manual_seed(0)
    x = torch.randn(3, 4, size, size + 1).double()
    w = torch.randn(4, 1, kernel, kernel).double().requires_grad_()
    y = F.conv2d(x, w, None, stride, kernel // 2, groups=4)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    ours = depthwise_filter_gradient(x.float(), gradient.float(), kernel, stride, kernel // 2)
    torch.testing.assert_close(ours.double(), w.grad, rtol=1e-5, atol=1e-5 * float(w.grad.abs().max()))


@pytest.mark.parametrize('amp', [False, True])
def test_a_depthwise_convolution_trains_as_that_of_pytorch(amp):
    torch.manual_seed(0)
    ours = Conv2d(6, 6, 5, padding=2, groups=6, bias=False)
    plain, x = nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False), torch.randn(2, 6, 8, 8)
    plain.load_state_dict(ours.state_dict())
    found = []
    for conv in (ours, plain):
        image = x.clone(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=amp):
            y = conv(image)
        assert 'Depthwise' in type(y.grad_fn).__name__ or conv is plain
        y.float().square().sum().backward()
        found.append((y, image.grad, conv.weight.grad))
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=2e-2 if amp else 1e-5, atol=0.2 if amp else 1e-4)


def test_gradient_of_the_largest_singular_value_is_the_outer_product_of_its_vectors():
    torch.manual_seed(1)
    conv = nn.Conv2d(5, 4, 1, bias=False)
    regularizer = SpectralRegularizer([conv])
    for _ in range(50):
        value = regularizer()
    value.backward()
    u, _, v = torch.linalg.svd(conv.weight.detach().flatten(1), full_matrices=False)
    torch.testing.assert_close(conv.weight.grad.flatten(1), torch.outer(u[:, 0], v[0]), atol=1e-3, rtol=1e-2)


def test_batch_norm_regularizer_adds_the_largest_scales():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(3), nn.BatchNorm2d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -4.0]))
        model[2].weight.copy_(torch.tensor([0.5, 2.0]))
    loss = batch_norm_regularizer(model)
    assert loss.item() == approx(4 + 1 + 2)
    loss.backward()
    assert model[0].weight.grad.tolist() == [0, -1] and model[2].weight.grad.tolist() == [0, 1]
    assert model[1].weight.grad.tolist() == approx([1 / 3] * 3), "equal ones share"
    assert batch_norm_regularizer(nn.Linear(1, 1)).item() == 0


# ------------------------------------------------------------------------------------------------------ flows


@pytest.mark.parametrize('channels', [1, 4])
def test_flow_keeps_volume(channels):
    """The Jacobian of a cell has determinant 1, whatever its weights."""
    torch.manual_seed(0)
    flow = FlowCell(channels).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    z = torch.randn(1, channels, 4, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(flow, z).view(z.numel(), z.numel())
    sign, log_det = torch.linalg.slogdet(jacobian)
    assert sign.item() == 1 and log_det.item() == approx(0, abs=1e-9)
    assert (jacobian - torch.eye(z.numel())).abs().max() > 1e-3  # it does something


def test_first_half_sees_only_what_comes_before():
    flow = FlowCell(2).double()[0]
    z = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(flow, z).permute(0, 2, 3, 1, 4, 6, 7, 5).reshape(50, 50)
    torch.testing.assert_close(torch.triu(jacobian, diagonal=1), torch.zeros(50, 50, dtype=torch.float64))


def test_mask_worked_by_hand():
    mask = autoregressive_mask(2, 2, 3, 1, strict=True, mirror=False)
    assert mask[0, 0].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert mask[1, 0].tolist() == [
        [1, 1, 1],
        [1, 1, 0],
        [0, 0, 0],
    ]  # channel 1 sees channel 0 at its own place
    mirrored = autoregressive_mask(2, 2, 3, 1, strict=False, mirror=True)
    assert mirrored[0, 0].tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]


def test_weight_norm_is_taken_after_masking():
    mask = autoregressive_mask(6, 1, 3, 1, strict=True, mirror=False)
    conv = WeightNormConv2d(1, 6, 3, mask=mask, bias=False)
    assert torch.equal(conv.effective_weight() * mask, conv.effective_weight())
    torch.testing.assert_close(
        conv.effective_weight().flatten(1).norm(dim=1),
        conv.log_weight_norm.flatten().exp(),
        rtol=1e-3,
        atol=1e-4,
    )
    assert F.conv2d(torch.ones(1, 1, 3, 3), conv.effective_weight()).shape == (1, 6, 1, 1)


@pytest.mark.parametrize(('kernel', 'stride', 'dilation', 'planes'),
                         [(3, 1, 1, 6), (3, 2, 1, 7), (3, 1, 2, 5), (1, 1, 1, 3), (3, 2, 1, 2), (4, 2, 1, 8)])
def test_a_single_volume_is_convolved_as_one_of_two(kernel, stride, dilation, planes):
    torch.manual_seed(0)
    ours = Conv3d(2, 3, kernel, stride, padding=dilation * (kernel - 1) // 2, dilation=dilation)
    x = torch.randn(2, 2, planes, 6, 5)
    found = []
    for conv, volumes in ((ours.forward, x[:1]), (partial(nn.Conv3d.forward, ours), x)):
        volumes = volumes.clone().requires_grad_()
        y = conv(volumes)[:1]
        y.square().sum().backward()
        found.append((y, volumes.grad[:1], ours.weight.grad.clone(), ours.bias.grad.clone()))
        ours.zero_grad()
    for one, of_two in zip(*found):
        torch.testing.assert_close(one, of_two, rtol=1e-5, atol=1e-4)


def test_a_single_volume_is_enlarged_as_one_of_two():
    torch.manual_seed(0)
    conv, x = ConvTranspose3d(2, 3, 2, stride=2), torch.randn(2, 2, 3, 3, 3)
    torch.testing.assert_close(conv(x[:1]), nn.ConvTranspose3d.forward(conv, x)[:1])
