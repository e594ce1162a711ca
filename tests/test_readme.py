"""Every command of the README runs as it stands, on a few tiny images, and its lines of Python do too."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from test_recipes import commands, recorder  # noqa: F401

import evaluate
import train
from distributed import launch
from scripts import audit_dataset
from utils import read_flags

README = (ROOT / 'README.md').read_text()
LINES = [line for block in re.findall(r'```bash\n(.*?)```', README, re.DOTALL)
         for line in block.replace('\\\n', ' ').splitlines()]
PROGRAMS = {'train.py': train, 'evaluate.py': evaluate, 'scripts/audit_dataset.py': audit_dataset}
HERE = ['--device', 'cpu', '--num_threads', '1']
TINY = {'train.py': [*HERE, *'--image_size 16 --max_steps 1 --epochs 1 --image_every 0'.split()],
        'mine': '--widths 8 8'.split(), 'haar': '--levels 2 --width 8'.split(), 'evaluate.py': HERE,
        'scripts/audit_dataset.py': '--image_size 16 --num_bootstrap 10'.split(),
        'anomaly': '--num_bootstrap 10 --num_cases 0 --num_gallery 4 --audit_images 0'.split(),
        'compare': '--num_bootstrap 10'.split()}
SETUP = ('python3 -m venv', 'source .venv', 'pip install')


@pytest.fixture(scope='module')
def folder(tmp_path_factory, data_folder):
    """A folder with `images` and `new_images`, in which the commands of the README ran in their order."""
    here = tmp_path_factory.mktemp('readme')
    (here / 'images').symlink_to(data_folder)
    (here / 'new_images').symlink_to(data_folder / 'spot')
    (here / 'image.png').symlink_to(data_folder / 'spot' / '000.png')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv('XDG_CACHE_HOME', str(here / 'cache'))
        for line in LINES:
            if line.startswith('python '):
                run(*shlex.split(line)[1:])
    return here


def run(name, *argv):
    """One command in this process, at the size of the tests."""
    program = PROGRAMS[name]
    small = [flag for word in (name, *argv) for flag in TINY.get(word.removeprefix('--'), ())]
    if name.startswith('scripts/'):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', [name, *argv, *small])
            assert program.main() == 0
        return
    args = program.parse_args([*argv, *small])
    assert launch.launch(program.work, args, read_flags(launch.LaunchConfig, args)) == 0


def test_every_command_ran_and_left_what_the_readme_says(folder):
    for path in ('runs/eval-mine/checkpoint.pt', 'runs/eval-mine/anomaly/report.html',
                 'comparison/comparison.md', 'predictions/scores.csv', 'reconstructions/reconstructions.npz'):
        assert (folder / path).exists(), path


def test_its_python_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(''.join(re.findall(r'```python\n(.*?)```', README, re.DOTALL)), 'README.md', 'exec'), names)
    assert names['residual'].shape == names['x'].shape == (1, 1, 16, 16)
    assert names['residual'].isfinite().all()


@pytest.mark.parametrize('line', [line for line in LINES if not line.startswith('python ')])
def test_the_other_commands_exist(line, recorder):  # noqa: F811
    """Recipes take their published flags, make knows its targets, and requirements are files."""
    if 'own_images.sh' in line:
        pass                                    # tests/test_recipes.py runs it
    elif '.sh' in line:
        assert line.endswith('.sh') and commands(re.search(r'recipes/(\w+)\.sh', line)[1], recorder)
    elif line.startswith('make '):
        subprocess.run([*shlex.split(line), '--dry-run'], cwd=ROOT, check=True, capture_output=True)
    else:
        assert line.startswith(SETUP)
        assert all((ROOT / name).exists() for name in re.findall(r'\S+\.txt', line))
