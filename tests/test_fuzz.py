"""The program that damages files: it knows whole ones, and the suite tries a few inputs of each kind."""

import os
import random

import fuzz
import pytest
import torch


def test_whole_files_are_read_and_damaged_ones_are_a_value_or_one_line(tmp_path):
    torch.manual_seed(0)
    for name, target in fuzz.targets(tmp_path).items():
        for number, whole in enumerate(target.wholes):
            place = tmp_path / f'{name} {number}'
            place.mkdir()
            (place / 'input').write_bytes(whole)
            target.read(place / 'input')
        for number in range(5):
            chance = random.Random(f'{name}/{number}')
            place = tmp_path / f'{name} damaged {number}'
            place.mkdir()
            data = fuzz.damaged(chance.choice(target.wholes), chance)
            assert fuzz.attempt(target, data, place / 'input') == '', (name, number)


def test_what_is_wrong_is_said(tmp_path):
    def fail(path):
        raise ZeroDivisionError
    assert 'ZeroDivisionError' in fuzz.attempt(fuzz.Target([b'x'], fail), b'x', tmp_path / 'input')
    count, wrong = fuzz.block(fuzz.Target([b'x'], lambda path: os._exit(3)), '0/x/0', tmp_path, 3)
    assert count == 1 and wrong == ['crash: status 3']


@pytest.mark.parametrize('whole', [b'', b'x', bytes(1000)])
def test_damage_follows_from_the_seed(whole):
    results = {fuzz.damaged(whole, random.Random(seed)) for seed in range(50)}
    assert len(results) > 3 and fuzz.damaged(whole, random.Random(7)) == fuzz.damaged(whole, random.Random(7))
