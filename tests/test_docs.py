"""The pages of docs/: code that runs, links that lead somewhere."""

import re

import pytest
import torch
import yaml
from conftest import ROOT

import train
from distributed import launch
from utils import read_flags

PAGES = sorted([*ROOT.glob('docs/*.md'), *ROOT.glob('*.md')])


def test_the_python_page_runs_as_it_stands(train_flags, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parse_args([*train_flags, '--save', 'chest', '--max_steps', '2'])
    assert launch.launch(train.work, args, read_flags(launch.LaunchConfig, args)) == 0
    (tmp_path / 'images').symlink_to(data_folder)
    (tmp_path / 'image.png').symlink_to(data_folder / 'spot' / '000.png')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    code = '\n'.join(re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'python.md').read_text(), re.DOTALL))
    names = {}
    exec(compile(code, 'docs/python.md', 'exec'), names)
    model, x = names['model'], names['x']
    assert x.shape == (1, 1, 16, 16) and names['nelbo'].shape == (1,) and names['where'].shape == x.shape
    assert names['images'].shape == (16, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(names['same'], model.reconstruct(x))
    assert not torch.equal(names['edited'], names['same']) and not torch.equal(names['coarse'], names['same'])


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    for target in re.findall(r'\]\((?!https?:)([^)#]+)', prose):
        assert (page.parent / target).exists(), f'{page.name} points to {target}'


def test_workflow_and_containers_name_files_that_are_there():
    jobs = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text())['jobs']
    steps = [step.get('run', '') for job in jobs.values() for step in job['steps']]
    texts = [*steps, (ROOT / 'Dockerfile').read_text(), (ROOT / 'apptainer.def').read_text()]
    files = r'(?:requirements[-\w]*|scripts/recipes/\w+)\.\w+'
    named = {name for text in texts for name in re.findall(files, text)}
    assert len(named) >= 4 and all((ROOT / name).exists() for name in named), named


def test_the_version_is_that_of_the_newest_changes():
    version = yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version']
    assert re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)[1] == version
