"""The plan of the house: who may import whom, and what no file may hold. Scans every module with ast."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = {   # a module by its file, or a package by its folder
    'utils': 0, 'command_line': 0, 'distributed': 0, 'storage': 0,
    'distributions': 1, 'neural_operations': 1,
    'families': 2, 'readers': 2, 'phantoms': 2,
    'model': 3, 'datasets': 3,
    'anomaly': 4, 'audit': 4, 'evaluation': 4, 'training': 4,
    'train': 5, 'evaluate': 5, 'scripts': 5,
}
# Within a floor the dependence has one direction: package -> package, or one module of it. The audit knows no
# model; of anomaly/ it takes the statistics alone.
NEIGHBOURS = {('phantoms', 'readers'), ('evaluation', 'anomaly'), ('evaluation', 'audit'),
              ('audit', 'anomaly.metrics'), ('audit', 'anomaly.image_statistics'), ('training', 'evaluation')}
# A family that is built on another one.
BUILT_ON = {('spatial_msma', 'score')}
DOWN = 'move the shared code down'
REMEDIES = {0: 'floor 0 knows no images and no models: pass values', 1: DOWN, 2: 'pass the numbers instead',
            3: DOWN, 4: DOWN, 5: 'programs never import programs: move the shared code to a package'}


def modules(root: Path = ROOT) -> list[Path]:
    """The modules of the house, relative to `root`: top level and packages, without tests and benchmarks."""
    packages = [name for name in FLOORS if (root / name).is_dir()]
    found = [*root.glob('*.py'), *(p for package in packages for p in root.glob(f'{package}/**/*.py'))]
    return sorted(p.relative_to(root) for p in found)


def imports(tree: ast.AST, path: Path) -> set[str]:
    """Dotted names that a module imports, anywhere in it; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.parts[:len(path.parts) - node.level] if node.level else ()
            base = '.'.join([*above, *([node.module] if node.module else [])])
            names |= {f'{base}.{alias.name}' for alias in node.names}
    return names


def own_name(path: Path) -> str:
    return path.parts[0].removesuffix('.py')


def import_offences(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of a module, one line an offence, with the remedy."""
    mine = own_name(path)
    if mine not in FLOORS:
        return [f"{path} has no floor: add it to the plan in docs/architecture.md and to FLOORS."]
    offences = []
    for name in sorted(imports(ast.parse(source), path)):
        other, *rest = name.split('.')
        if other not in FLOORS:
            continue                                                       # not of this house
        here, there = FLOORS[mine], FLOORS[other]
        if other == mine == 'families':
            allowed = rest[0] == path.parts[1] or (path.parts[1], rest[0]) in BUILT_ON
            remedy = 'a layer that two families share goes to neural_operations'
        else:
            inside = other == mine != 'scripts' or there == here == 0
            module = '.'.join([other, *rest[:1]])
            allowed = there < here or inside or {(mine, other), (mine, module)} & NEIGHBOURS
            remedy = REMEDIES[here]
        if not allowed:
            shown = f'{other}/{rest[0]}' if rest and other == mine else other
            offences.append(f'{path} (floor {here}) imports {shown} (floor {there}): {remedy}')
    return offences


def other_offences(path: Path, source: str) -> list[str]:
    """Habits that the house does not have."""
    offences = []
    for node in ast.walk(ast.parse(source)):
        place = f'{path}:{getattr(node, "lineno", 0)}'
        if isinstance(node, ast.ImportFrom) and any(alias.name == '*' for alias in node.names):
            offences.append(f'{place} import *: name what is used')
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            offences.append(f'{place} a bare except: name the error')
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == 'cuda':
            offences.append(f'{place} .cuda(): take the device from launch, or from another tensor')
        if isinstance(node, ast.Compare) and compares_dataset_with_a_name([node.left, *node.comparators]):
            offences.append(f'{place} a branch on the data set: make it a column of DATASETS')
    return offences


def compares_dataset_with_a_name(sides: list[ast.expr]) -> bool:
    """dataset == 'x', config.dataset in ('x', 'y'); but not dataset == other.dataset."""
    values = [value for side in sides for value in getattr(side, 'elts', [side])]
    return any(getattr(side, 'id', getattr(side, 'attr', '')) == 'dataset' for side in sides) \
        and any(isinstance(value, ast.Constant) and isinstance(value.value, str) for value in values)


@pytest.mark.parametrize('path', modules(), ids=str)
def test_imports_go_downwards(path):
    offences = import_offences(path, (ROOT / path).read_text())
    assert not offences, '\n'.join(offences)


@pytest.mark.parametrize('path', modules(), ids=str)
def test_habits(path):
    if path.parts[-2:] == ('nvae', 'official.py'):
        return                                   # reads `dataset` from checkpoints of another system
    offences = other_offences(path, (ROOT / path).read_text())
    assert not offences, '\n'.join(offences)


def test_the_scan_sees_the_whole_house():
    found = {own_name(path) for path in modules()}
    assert {'utils', 'families', 'anomaly', 'audit', 'evaluation', 'readers', 'train', 'evaluate'} <= found
    train = imports(ast.parse((ROOT / 'train.py').read_text()), Path('train.py'))
    assert train >= {'distributed.launch', 'model.MODELS'}


@pytest.mark.parametrize('path, source, told', [
    ('families/hvae/model.py', 'from datasets import DATASETS',
     'families/hvae/model.py (floor 2) imports datasets (floor 3): pass the numbers instead'),
    ('families/hvae/model.py', 'def f():\n    import model',
     'families/hvae/model.py (floor 2) imports model (floor 3)'),
    ('families/hvae/model.py', 'from families.nvae import NVAE',
     'families/hvae/model.py (floor 2) imports families/nvae (floor 2): a layer that two families share'),
    ('families/hvae/model.py', 'from families import nvae', 'imports families/nvae (floor 2)'),
    ('families/hvae/model.py', 'from ..nvae import NVAE', 'imports families/nvae (floor 2)'),
    ('families/nvaeish/model.py', 'from families.nvae import NVAE', 'imports families/nvae (floor 2)'),
    ('families/hvae/model.py', 'import readers.images', 'imports readers (floor 2)'),
    ('readers/items.py', 'from phantoms.chest import render', 'imports phantoms (floor 2)'),
    ('evaluate.py', 'from train import Trainer',
     'evaluate.py (floor 5) imports train (floor 5): programs never import programs'),
    ('scripts/a.py', 'import scripts.b', 'scripts/a.py (floor 5) imports scripts/b (floor 5)'),
    ('utils.py', 'import distributions', 'utils.py (floor 0) imports distributions (floor 1)'),
    ('distributions.py', 'import neural_operations', 'imports neural_operations (floor 1)'),
    ('anomaly/scores.py', 'from evaluation.sampling import samples', 'imports evaluation (floor 4)'),
    ('audit/trivial.py', 'from anomaly.scores import SCORES', 'audit/trivial.py (floor 4) imports anomaly'),
    ('novelty.py', '', 'novelty.py has no floor'),
])
def test_a_planted_import_is_named_with_its_remedy(path, source, told):
    assert len(import_offences(Path(path), source)) == 1 and told in import_offences(Path(path), source)[0]


@pytest.mark.parametrize('path, source', [
    ('families/nvae/flows.py', 'from families.nvae import NVAE'),
    ('families/nvae/model.py', 'from families.nvae.flows import FlowCell\nimport torch, distributions'),
    ('families/nvae/official.py', 'from families.nvae.flows import FlowCell'),
    ('distributed/launch.py', 'from utils import flag'), ('anomaly/detect.py', 'from anomaly import metrics'),
    ('evaluation/likelihood.py', 'from anomaly.scores import elbo'),
    ('audit/audit.py', 'from anomaly import metrics'), ('scripts/a.py', 'import datasets'),
    ('phantoms/brain.py', 'from readers.volumes.nifti import write_nifti'),
])
def test_what_is_allowed_is_not_reported(path, source):
    assert import_offences(Path(path), source) == []


@pytest.mark.parametrize('source, told', [
    ('model.cuda()', '.cuda()'), ('from torch import *', 'import *'),
    ('try: f()\nexcept: pass', 'bare except'),
    ("if dataset == 'mnist': f()", 'data set'), ("if args.dataset in ('a', 'b'): f()", 'data set'),
    ("x = 1 if 'a' == config.dataset else 2", 'data set'),
])
def test_a_planted_habit_is_named(source, told):
    assert len(other_offences(Path('x.py'), source)) == 1 and told in other_offences(Path('x.py'), source)[0]
    assert other_offences(Path('x.py'), 'try: f()\nexcept OSError: pass\ntorch.cuda.is_available()') == []
    assert other_offences(Path('x.py'), "if split['dataset'] == config.dataset: f()") == []


WATCH = '''
import importlib, sys
import torch, torch.utils.data, torch.distributed, torch.multiprocessing, torch.optim.swa_utils
import numpy, scipy.ndimage, PIL.Image, PIL.ImageOps, sklearn.metrics, tqdm, fcntl
names, done = sys.argv[1:], []
def hook(event, args):
    if event == 'open' and isinstance(args[0], str) and not args[0].endswith(('.py', '.pyc')):
        if '__pycache__' not in args[0]:
            done.append(f'{name} opens {args[0]}')
    if event in ('subprocess.Popen', 'socket.connect', 'os.mkdir', 'os.remove', 'os.rename'):
        if '__pycache__' not in str(args[0]):
            done.append(f'{name}: {event} {args[0]}')
name = ''
sys.addaudithook(hook)
before = torch.get_rng_state()
for name in names:
    importlib.import_module(name)
if not torch.equal(before, torch.get_rng_state()):
    done.append('random numbers were drawn')
print('\\n'.join(done))
'''


def test_importing_a_module_does_no_work():
    """No file is read or written, no process started, no random number drawn."""
    names = ['.'.join(path.with_suffix('').parts) for path in modules()
             if path.name != '__init__.py' and path.parts[0] != 'scripts']
    done = subprocess.run([sys.executable, '-c', WATCH, *names], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1',
                                            'PYTHONDONTWRITEBYTECODE': '1'})
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), done.stdout
