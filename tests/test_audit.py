"""The audit of synthetic folders in which exactly one thing, or nothing, tells the classes apart."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from audit.audit import audit, classify, common_words, sentences
from audit.findings import BOUNDS, all_findings, part_findings, severity, with_interval
from audit.trivial import (
    FEATURES,
    TRAITS,
    Measured,
    column,
    measure,
)
from datasets import DataConfig, load_data
from readers.source import Entry
from readers.split import contradictions, spread_patients
from utils import UserError

SIZE, NORMAL, ILL = 32, 80, 30
OF_PICTURES = [name for name, feature in FEATURES.items() if feature.cause not in (
    'picture size', 'format', 'file size')]


def draw(rng):
    """A soft random picture of 32 x 32 with some noise, as (H, W) gray levels."""
    coarse = Image.fromarray(rng.uniform(70, 150, (6, 6)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.BICUBIC)) + rng.normal(0, 3, (SIZE, SIZE))


def save(values, path, **options):
    Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).save(path, **options)


def plain(values, path):
    save(values, path.with_suffix('.png'))


def brighter(values, path):
    plain(values + 60, path)


def stored(values, path):
    save(values, path.with_suffix('.png'), compress_level=0)     # as level 1, it is told as "0 or 1"


def packed(values, path):
    save(values, path.with_suffix('.png'), compress_level=1)


def framed(values, path):
    values[:3] = values[-3:] = 0
    plain(values, path)


def doubled(values, path):
    plain(np.kron(values, np.ones((2, 2))), path)


def as_jpeg(values, path):
    save(values, path.with_suffix('.jpg'), quality=98)


def folder_of(tmp_path, ill=plain, normal=plain, classes=('ill',), number_ill=ILL):
    """A folder of 80 normal images and 30 of each class, all drawn alike but for how they are written."""
    rng = np.random.default_rng(0)
    for name, number, write in (('normal', NORMAL, normal), *((c, number_ill, ill) for c in classes)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(number):
            write(draw(rng), tmp_path / name / f'{name}-{i:03d}')
    return tmp_path


def load(folder, split=None, **flags):
    return load_data(DataConfig(dataset='folder', data=str(folder), image_size=SIZE,
                                cache_dir=f'{folder}.cache', **flags), split)


def audited(folder, **options):
    return audit(load(folder), num_bootstrap=200, **options)


def serious(result):
    """Causes of the serious findings, but for that of all features together."""
    causes = [f['cause'] for f in result['findings'] if f['severity'] == 'serious']
    return [cause for cause in causes if cause != 'all together']


@pytest.mark.parametrize('ill, normal, cause, words, follow', [
    (brighter, plain, 'brightness', 'ill images are brighter', {'file size'}),
    (stored, packed, 'file size', 'ill images have larger files', set()),
    (framed, plain, 'border', 'ill images have wider bars', {'file size', 'detail'}),
    (doubled, plain, 'picture size', 'ill images are wider', {'file size', 'detail'}),
    (as_jpeg, plain, 'format', 'all ill files and no normal files are JPEG', {'file size', 'detail'}),
], ids=lambda value: getattr(value, '__name__', None))
def test_the_only_confounder_is_named_first(tmp_path, ill, normal, cause, words, follow):
    result = audited(folder_of(tmp_path / 'data', ill, normal))
    first = result['findings'][0]
    assert (first['severity'], first['cause'], first['group']) == ('serious', cause, 'ill')
    assert words in first['text'] and 'AUROC 1.00' in first['text'] and first['advice']
    assert set(serious(result)) - {cause} <= follow              # what the cause itself changes, and no more
    assert result['comparisons'][0]['combined']['auroc'] > 0.95
    assert sentences(result)[0].startswith('Serious: The ')


def test_a_clean_set_has_no_serious_finding(tmp_path):
    result = audited(folder_of(tmp_path / 'data'))
    assert [f for f in result['findings'] if f['severity'] == 'serious'] == []
    against, parts = result['comparisons']
    assert (against['kind'], parts['kind']) == ('class', 'parts')
    assert against['images'] == [NORMAL, ILL] and parts['images'] == [64, 16]
    for comparison in (against, parts):
        for row in [*comparison['features'].values(), comparison['combined']]:
            assert row['low'] <= row['auroc'] <= row['high'] and 0.25 < row['auroc'] < 0.75
    texts = ' '.join(sentences(result))
    assert 'All files have in common: PNG, 8-bit gray, 32 x 32 pixels.' in texts
    assert 'No image of one part is in another' in texts and 'The patients are unknown' in texts


def test_a_duplicate_across_parts_is_named_first(tmp_path):
    folder = folder_of(tmp_path / 'data')
    parts = {f['id']: f['part'] for f in load(folder).split['files'] if f['class'] == 'normal'}
    learned, tested = (next(i for i, p in parts.items() if p == part) for part in ('train', 'test'))
    twin = np.asarray(Image.open(folder / learned)).astype(float)
    save(twin * 0.9, folder / tested)                            # the same picture, a little darker
    result = audited(folder)
    first = result['findings'][0]
    assert (first['severity'], first['cause']) == ('serious', 'duplicates')
    assert serious(result) == ['duplicates']
    assert '1 pair of images are near-duplicates' in first['text']
    assert f'{learned} (train)' in first['text'] and f'{tested} (test)' in first['text']


def test_one_content_called_both_and_exact_duplicates_of_a_stored_split(tmp_path):
    folder = folder_of(tmp_path / 'data')
    (folder / 'ill' / 'ill-000.png').write_bytes((folder / 'normal' / 'normal-000.png').read_bytes())
    data = load(folder)
    assert contradictions([*data.train.entries, *data.val.entries, *data.test.entries]) == [
        'ill/ill-000.png', 'normal/normal-000.png']
    assert sentences(audit(data, num_bootstrap=20))[0].startswith(
        'Serious: 2 files of the same content are labeled normal and anomalous: ill/ill-000.png; normal/')
    moved = json.loads(json.dumps(data.split))
    for file in moved['files']:
        if file['id'] == 'normal/normal-000.png':
            file['part'] = 'train'
    texts = sentences(audit(load(folder, moved), num_bootstrap=20))
    assert texts[0].startswith('Serious: Duplicates across parts: 1 pair of images are the same file: ')


def test_a_difference_part_findings_is_told(tmp_path):
    """The normal test images are brighter than those that a model learns from."""
    folder = folder_of(tmp_path / 'data')
    parts = {f['id']: f['part'] for f in load(folder).split['files'] if f['class'] == 'normal'}
    for name in (i for i, part in parts.items() if part == 'test'):
        plain(np.asarray(Image.open(folder / name)) + 60.0, folder / name)
    split = load(folder).split
    for file in split['files']:
        file['part'] = parts.get(file['id'], 'test')
    found = audit(load(folder, split), num_bootstrap=100)['findings']
    told_of = next(f for f in found if f['cause'] == 'parts')
    assert told_of['severity'] == 'serious' and 'the mean brightness 1.00' in told_of['text']


def test_the_same_seed_gives_the_same_audit_and_samples_are_told(tmp_path):
    data = load(folder_of(tmp_path / 'data'))
    one, two = (json.dumps(audit(data, max_images=20, num_bootstrap=20)) for _ in range(2))
    assert one == two
    other = audit(data, max_images=20, num_bootstrap=20, seed=1)
    assert other['groups']['normal'] != json.loads(one)['groups']['normal']
    assert [(row['part'], row['group'], row['measured'], row['of']) for row in other['images']] == [
        ('train', 'normal', 20, 52), ('val', 'normal', 12, 12), ('test', 'normal', 16, 16),
        ('test', 'ill', 20, 30)]


def test_too_few_images_are_not_judged(tmp_path):
    folder = folder_of(tmp_path / 'data', brighter)
    for path in sorted((folder / 'ill').iterdir())[9:]:
        path.unlink()
    result = audited(folder)
    assert [c['kind'] for c in result['comparisons']] == ['parts'] and serious(result) == []
    assert result['notes'] == ['ill: 9 images, too few to compare (at least 10)']


def test_many_classes_are_one(tmp_path):
    names = [f'ill{i:02d}' for i in range(21)]
    result = audited(folder_of(tmp_path / 'data', brighter, classes=names, number_ill=2), max_images=40)
    assert result['comparisons'][0]['second'] == 'anomalous classes'
    assert result['images'][-1] == {'part': 'test', 'group': 'anomalous classes', 'measured': 40, 'of': 42}
    assert serious(result)[0] == 'brightness'


def test_patients_stay_together_in_the_regression():
    """Labels that follow the patient and noise that only tells the patient: nothing can be learned."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 5)
    x = np.repeat(rng.normal(size=(40, 60)), 5, 0)
    y = patients % 2 == 1
    alone = classify(x, y, [str(i) for i in range(200)], 5, 0)
    together = classify(x, y, [str(p) for p in patients], 5, 0)
    right = lambda scores: ((scores > 0) == y).mean()
    assert right(alone) == 1 and right(together) < 0.7
    both = ['one'] * 25 + [f'few {i % 2}' for i in range(5)]            # 'one' has nearly all of both kinds
    assert classify(x[:30], np.arange(30) % 23 == 0, both, 2, 0) is None


# ------------------------------------------------------------------------------------------------ small parts

def test_volumes_are_audited(tmp_path):
    pytest.importorskip('nibabel')
    from standins import volumes
    folder = volumes(12, 'label')(tmp_path / 'data', 40, 12)
    data = load_data(DataConfig(dataset='brain', data=str(folder), image_size=16,
                                cache_dir=str(tmp_path / 'cache')))
    result = audit(data, num_bootstrap=20)
    found = {name for comparison in result['comparisons'] for name in comparison['features']}
    assert {'mean', 'deviation', 'sharpness', 'noise', 'symmetry', 'png_size'} <= found
    assert 'All files have in common: NIfTI, uint8 values, 12 x 12 x 12 voxels, 3 x 3 x 3 mm.' in str(
        sentences(result))


def test_severity_needs_the_whole_interval():
    moderate, bad = BOUNDS['class']
    row = lambda low, high: {'auroc': (low + high) / 2, 'low': low, 'high': high}
    assert severity(row(0.51 + bad, 0.9), 'class') == 'serious'
    assert severity(row(0.1, 0.49 - bad), 'class') == 'serious'
    assert severity(row(0.49 + bad, 0.99), 'class') == 'moderate'
    assert severity(row(0.5 + moderate + 0.01, 0.9), 'class') == 'moderate'
    assert severity(row(0.45, 0.99), 'class') == 'fine'
    assert severity(row(0.51, 0.6), 'parts') == 'moderate' and severity(row(0.51, 0.6), 'class') == 'fine'
    assert with_interval(row(0.1, 0.3)) == '0.80 (95 % interval 0.70 to 0.90)'


def test_the_worst_comes_first_and_of_equals_the_cause():
    def findings(**aurocs):
        row = lambda name, auroc: {'cause': FEATURES[name].cause, 'auroc': auroc, 'low': auroc - 0.02,
                                   'high': auroc + 0.02}
        numbers = {name: {'low': 1.0, 'median': 2.0, 'high': 3.0} for name in aurocs}
        groups = {name: {'features': numbers, 'traits': {trait: {} for trait in TRAITS}}
                  for name in ('Normal', 'COVID')}
        comparison = {'kind': 'class', 'first': 'Normal', 'second': 'COVID', 'combined': row('mean', 0.97),
                      'features': {name: row(name, auroc) for name, auroc in aurocs.items()}}
        found = all_findings({'groups': groups, 'comparisons': [comparison]}, SimpleNamespace(split={}))
        return [(f.severity, f.cause) for f in found]
    file, bright, together = (('serious', cause) for cause in ('file size', 'brightness', 'all together'))
    assert findings(mean=0.8, file_size=0.9) == [file, bright, together]
    assert findings(mean=0.1, file_size=0.9) == [bright, file, together]
    assert findings(mean=0.6, file_size=0.5) == [together, ('moderate', 'brightness'), ('fine', 'parts')]


def test_what_chance_brings_is_told_from_what_it_does_not():
    def of(combined, **features):
        row = lambda low, high: {'auroc': (low + high) / 2, 'low': low, 'high': high, 'cause': 'brightness'}
        comparison = {'features': {name: row(*ends) for name, ends in features.items()},
                      'combined': combined and row(*combined)}
        (found,) = part_findings(comparison, {})
        return found.severity, found.advice.startswith('Nothing')
    alike, apart = (0.4, 0.6), (0.51, 0.65)
    assert of(alike, mean=alike, black=alike) == ('fine', False)
    assert of(alike, mean=apart, black=alike) == ('moderate', True)            # one of a few features
    assert of(None, mean=apart, black=alike) == ('moderate', True)
    assert of(alike, mean=apart, black=apart) == ('moderate', False)
    assert of(apart, mean=alike, black=alike) == ('moderate', False)
    assert of(alike, mean=(0.2, 0.39), black=alike) == ('serious', False)
    # Of ten features, independent ones, two or more differ by chance in 9 % of all splits, three in 1 %.
    many = lambda number: {name: apart if i < number else alike for i, name in enumerate([*FEATURES][:10])}
    assert of(alike, **many(2)) == ('moderate', True) and of(alike, **many(3)) == ('moderate', False)
    row = {'auroc': 0.9, 'low': 0.8, 'high': 1.0, 'cause': 'detail'}
    (found,) = part_findings({'features': {'png_size': row}, 'combined': None}, {})
    assert "0.5: the size as a PNG at the model's resolution 0.90" in found.text


def test_words_that_are_compared():
    def files(*formats):
        return [Measured({}, dict.fromkeys(TRAITS, word), str(i)) for i, word in enumerate(formats)]
    chosen = lambda a, b: [word for trait, word in common_words(a, b) if trait == 'format']
    assert chosen(files('PNG', 'PNG'), files('PNG', 'JPEG')) == ['JPEG']           # one of two says all
    assert chosen(files('PNG', 'BMP'), files('TIFF', 'JPEG')) == ['JPEG', 'TIFF', 'BMP', 'PNG']
    assert chosen(files('PNG', ''), files('JPEG', 'JPEG')) == []                   # a file is unknown
    assert chosen(files(*['PNG'] * 99, 'BMP'), files(*['PNG'] * 99, 'TIFF')) == ['PNG']      # rare ones


def test_patients_in_two_parts():
    people = ('a', 'a', 'b', '', '')
    entries = [Entry(str(i), '', 'normal', '', 0, i, patient=p) for i, p in enumerate(people)]
    parts = dict(zip('01234', ('train', 'test', 'test', 'train', 'test')))
    assert spread_patients(entries, parts) == ['a']


def test_a_set_without_files_has_the_features_of_its_pictures(config):
    found = measure(load_data(config('mnist')).train, [0, 1, 2])
    assert np.isfinite(column(found, 'mean')).all() and np.isnan(column(found, 'width')).all()
    assert common_words(found, found) == []


# ---------------------------------------------------------------------------------------------------- program

@pytest.fixture
def told_by(monkeypatch, capsys):
    """told_by(*flags): what scripts/audit_dataset.py prints, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / 'scripts'))
    import audit_dataset

    def run(*flags):
        monkeypatch.setattr(sys, 'argv', ['audit_dataset.py', *map(str, flags)])
        assert audit_dataset.main() == 0
        return capsys.readouterr().out
    return run


def test_the_program_prints_and_keeps_its_findings(tmp_path, told_by):
    folder = folder_of(tmp_path / 'data', brighter)
    flags = ('--num_bootstrap', 50, '--save', tmp_path / 'out')
    printed = told_by('--dataset', 'folder', '--data', folder, '--image_size', SIZE, '--cache_dir',
                      tmp_path / 'cache', *flags)
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 110 and lines.index('SERIOUS') < lines.index('FINE')
    assert 'normal (train): 52; normal (val): 12; normal (test): 16; ill (test): 30.' in printed
    page = (tmp_path / 'out' / 'audit.md').read_text()
    kept = json.loads((tmp_path / 'out' / 'audit.json').read_text())
    assert page.startswith('# Audit\n') and '## Serious' in page and '| mean |' in page
    assert kept['findings'][0]['cause'] == 'brightness' and kept['findings'][0]['text'] in page


def test_the_program_audits_the_split_and_the_flags_of_a_run(tmp_path, told_by):
    folder = folder_of(tmp_path / 'data')
    data = load(folder, split_seed=3, test_fraction=0.4)
    run = tmp_path / 'eval-run'
    run.mkdir()
    (run / 'split.json').write_text(json.dumps(data.split))
    (run / 'args.json').write_text(json.dumps({'dataset': 'folder', 'data': str(folder), 'image_size': 16,
                                               'cache_dir': str(tmp_path / 'cache'), 'model': 'nvae'}))
    for split in (run, run / 'split.json'):
        printed = told_by('--split', split, '--num_bootstrap', 10)
        assert 'The model sees 16 x 16 pixels.' in printed and 'normal (test): 32;' in printed
    assert 'The model sees 8 x 8 pixels.' in told_by('--split', run, '--num_bootstrap', 10, '--image_size', 8)


def test_the_program_refuses_what_it_cannot_use(tmp_path, told_by):
    (tmp_path / 'split.json').write_text('[]')
    for flags, words in [(('--split', tmp_path), 'is not the split of a run'),
                         (('--split', tmp_path / 'nowhere'), 'does not exist'),
                         (('--max_images', 5), '--max_images 5'),
                         (('--num_bootstrap', 0), '--num_bootstrap 0'),
                         (('--dataset', 'folder', '--data', tmp_path / 'x'), 'does not exist')]:
        with pytest.raises(UserError, match=words):
            told_by(*flags)
    folder = folder_of(tmp_path / 'data')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        told_by('--dataset', 'folder', '--data', folder, '--image_size', 16, '--cache_dir',
                tmp_path / 'cache', '--num_bootstrap', 5, '--save', tmp_path / 'file' / 'out')


def test_binary_and_many_bit_images_are_measured(tmp_path):
    folder = folder_of(tmp_path / 'data')
    for flags in ({'num_x_bits': 12}, {'likelihood': 'bernoulli'}, {'channels': 3}):
        data = load(folder, **flags)
        found = measure(data.test, range(6))
        assert all(np.isfinite(column(found, name)).all() for name in OF_PICTURES)
        assert (np.abs(column(found, 'mean') - 43) < 15).all()                   # drawn from 70 to 150 of 255
