"""--amp auto: bfloat16 where it is faster, float32 elsewhere, and a resumed run keeps the choice."""

import pytest
import torch
from torch import nn

from training import optimization as precision


class Timed(nn.Module):
    """A model whose passes take the seconds that `seconds` tells, by a clock of its own."""

    def __init__(self, float32: float, bfloat16: float):
        super().__init__()
        self.seconds, self.now = {False: float32, True: bfloat16}, 0.0
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer('passes', torch.zeros(1))

    def forward(self, x):
        self.passes += 1
        self.now += self.seconds[torch.is_autocast_enabled('cpu')]
        return {'error': (self.weight * x).mean()}

    def objective(self, terms, progress):
        return terms['error'], {}

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(('float32', 'bfloat16', 'chosen'), [(2, 1, True), (1, 2, False), (1, 1, False)])
def test_the_faster_precision_is_chosen_and_nothing_else_changes(monkeypatch, float32, bfloat16, chosen):
    model = Timed(float32, bfloat16)
    monkeypatch.setattr(precision, 'time', model)
    faster, line = precision.choose_bf16(model, torch.ones(2, 1))
    assert faster is chosen and ('bfloat16,' if chosen else 'float32,') in line
    assert f'{float32:.2f} s in float32 and {bfloat16:.2f} s in bfloat16' in line
    assert model.passes.item() == 0 and model.weight.item() == 1 and model.now > 0


@pytest.mark.parametrize(('names', 'known'), [({'avx2': True, 'avx512_bf16': False}, False),
                                              ({'avx512_bf16': True}, True), ({'amx_bf16': True}, True),
                                              ({}, False)])
def test_processors_with_instructions_for_bfloat16(monkeypatch, names, known):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: names)
    assert precision.multiplies_bf16() is known
