"""Data flags follow the data set, and are known before anything heavy is imported."""

import subprocess
import sys
from dataclasses import fields

from conftest import ROOT

from datasets import DATASETS, DataConfig, data_flags


def test_a_data_set_takes_only_the_flags_that_do_something():
    names = {name: {f.name for group in data_flags(name) for f in fields(group)} for name in DATASETS}
    every = set.intersection(*names.values())
    assert {'dataset', 'data', 'image_size', 'num_x_bits', 'val_fraction', 'invert', 'cache_dir'} <= every
    assert set.union(*names.values()) == {f.name for f in fields(DataConfig)}
    assert names['folder'] - every == {'normal_classes', 'anomalous_classes', 'channels', 'fit', 'frames',
                                       'patient_pattern', 'patient_metadata', 'columns', 'class_columns',
                                       'images', 'tables'}
    assert names['phantom'] - names['folder'] == {'num_phantoms', 'phantom_confound'}
    assert names['celeba_64'] - every == {'channels'}
    assert names['mnist'] - every == {'normal_classes', 'anomalous_classes'}
    assert names['cifar10'] - names['mnist'] == {'channels'}
    assert names['brain'] >= {'spacing', 'window', 'patient_pattern'}
    assert not names['brain'] & {'channels', 'fit'}


def test_flags_are_known_before_pytorch_and_pillow_are_imported():
    heavy = "('torch', 'scipy', 'PIL', 'sklearn', 'numpy', 'lmdb')"
    code = f"import datasets, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr
