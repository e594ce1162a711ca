"""Audits a data set before anything is trained on it: what tells its classes apart without the disease?

    python scripts/audit_dataset.py --dataset covid --data FOLDER --save audit
    python scripts/audit_dataset.py --split runs/eval-chest                 the data and the split of a run

Prints the findings, the worst first, and the AUROC of every trivial feature; --save keeps them as audit.md
and audit.json. See docs/data.md, section Audit.
"""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

from audit.audit import LEAST_IMAGES, audit
from audit.findings import SEVERITIES
from audit.trivial import FEATURES
from command_line.parser import parse_flags
from datasets import DataConfig, load_data
from readers.split import count, read_split
from utils import (
    UserError,
    flag,
    flags,
    read_flags,
    read_json,
    run_program,
    write_atomically,
    write_json,
)

WIDTH = 100                                                       # characters of a line in the terminal
NOT_OF_IMAGES = ('flip', 'num_workers')                           # flags that change nothing here
DATA_FLAGS = [name for name in DataConfig.__dataclass_fields__ if name not in NOT_OF_IMAGES]
TITLES = {'serious': 'Serious', 'moderate': 'Moderate', 'fine': 'Fine'}


@flags
class AuditConfig:
    """Audit"""
    save: str = flag('', "folder for audit.md and audit.json; '' = print only", basic=True)
    split: str = flag('', "run folder or its split.json: audit the parts of that run, with its data flags; "
                          "those given here win; '' = a new split", basic=True)
    max_images: int = flag(500, 'largest number of images measured of each part, of its normal class and of '
                                'each anomalous class', least=LEAST_IMAGES, basic=True)
    num_bootstrap: int = flag(1000, 'resamples behind the 95 % intervals', least=1, basic=True)
    seed: int = flag(0, 'seed of the images drawn if there are more than --max_images, and of the resamples',
                     basic=True)


def parse_args(argv: list[str]) -> argparse.Namespace:
    return parse_flags(argv, __doc__, (AuditConfig,), stored=(DataConfig,), without=NOT_OF_IMAGES)


def read_data(config: AuditConfig, given: dict[str, Any]) -> Any:
    """The data set of the flags, in a new split or in that of the run which `config` names."""
    if not config.split:
        return load_data(read_flags(DataConfig, given))
    path = Path(config.split)
    path = path / 'split.json' if path.is_dir() else path
    split, flags = read_split(path), path.with_name('args.json')
    if split is None:
        raise UserError(f"--split: {path} does not exist.")
    of_run = read_json(flags) if flags.exists() else {'dataset': split['dataset']}
    return load_data(read_flags(DataConfig, of_run | given), split)


def heading(result: dict[str, Any]) -> list[str]:
    """What was audited."""
    images = [f"{row['group']} ({row['part']}): {row['measured']:,}"
              + (f" of {row['of']:,}" if row['measured'] < row['of'] else '') for row in result['images']]
    size = ' x '.join(map(str, result['shape'][1:]))
    number = {level: sum(f['severity'] == level for f in result['findings']) for level in SEVERITIES}
    return [f"Audit of {result['dataset']}, {result['data']}.", f"The model sees {size} pixels.",
            f"Images measured: {'; '.join(images)}.",
            *(f"Note: {note}." for note in result['notes']),
            f"{count(number['serious'], 'serious finding')}, {number['moderate']} moderate."]


def tables(result: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells) for each comparison: medians and quartiles of both groups, AUROC, interval."""
    made = []
    for comparison in result['comparisons']:
        pair = comparison['first'], comparison['second']
        rows = [['feature', *(f'{name} ({n})' for name, n in zip(('first', 'second'), comparison['images'])),
                 'AUROC [95 %]', '']]
        for name, row in comparison['features'].items():
            cells = ([f'{100 * share:.0f} %' for share in row['shares']] if 'word' in row else
                     [spread(name, result['groups'][group]['features'][name]) for group in pair])
            rows.append([name, *cells, *judged(row)])
        if comparison['combined']:
            rows.append(['all together', '', '', *judged(comparison['combined'])])
        made.append((f'{pair[0]} (first) against {pair[1]} (second)', rows))
    return made


def spread(name: str, values: dict[str, float]) -> str:
    """'61.2 (48.0 to 70.1)': median and quartiles."""
    low, middle, high = (f'{values[key]:,.{FEATURES[name].digits}f}' for key in ('low', 'median', 'high'))
    return f'{middle} ({low} to {high})'


def judged(row: dict[str, float]) -> list[str]:
    apart = row['low'] > 0.5 or row['high'] < 0.5
    return [f"{row['auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", '*' if apart else '']


LEGEND = ('Median (quartiles). AUROC above 0.5: larger in the second group; * the interval excludes 0.5, '
          'which one in twenty does by chance.')


def as_text(result: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    lines = [part for line in heading(result) for part in textwrap.wrap(line, WIDTH)]
    for level in SEVERITIES:
        chosen = [f for f in result['findings'] if f['severity'] == level]
        lines += ['', TITLES[level].upper()] if chosen else []
        for f in chosen:
            lines += textwrap.wrap(f['text'], WIDTH, initial_indent='- ', subsequent_indent='  ')
            lines += textwrap.wrap(f"To do: {f['advice']}", WIDTH, initial_indent='  ',
                                   subsequent_indent='  ') if f['advice'] else []
    for title, rows in tables(result):
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += ['', title, *('  ' + '  '.join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
                               for row in rows)]
    return [*lines, '', *textwrap.wrap(LEGEND, WIDTH)]


def as_markdown(result: dict[str, Any]) -> str:
    """The same as a page."""
    lines = ['# Audit', *(part for line in heading(result) for part in ('', line))]
    for level in SEVERITIES:
        chosen = [f for f in result['findings'] if f['severity'] == level]
        lines += ['', f'## {TITLES[level]}', ''] if chosen else []
        lines += [f"- {f['text']}" + (f" *To do: {f['advice']}*" if f['advice'] else '') for f in chosen]
    for title, (head, *rows) in tables(result):
        lines += ['', f'## {title}', '', '| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
        lines += ['| ' + ' | '.join(cell.replace('*', r'\*') for cell in row) + ' |' for row in rows]
    return '\n'.join([*lines, '', LEGEND.replace('*', r'\*'), ''])


def main() -> int:
    args = parse_args(sys.argv[1:])
    config = read_flags(AuditConfig, args)
    data = read_data(config, {k: v for k, v in vars(args).items() if k in DATA_FLAGS})
    result = audit(data, config.max_images, config.num_bootstrap, config.seed)
    print('\n'.join(as_text(result)))
    if config.save:
        try:
            write_json(Path(config.save, 'audit.json'), result)
            write_atomically(Path(config.save, 'audit.md'),
                             lambda path: path.write_text(as_markdown(result), encoding='utf-8'))
        except OSError as error:
            raise UserError(f"--save {config.save} cannot be written ({error.strerror or error}).") from None
        print(f"\nkept in {Path(config.save, 'audit.md')} and audit.json")
    return 0


if __name__ == '__main__':
    run_program(main)
