"""Tables of a report: rows of any kind under columns, drawn as text, Markdown, HTML and CSV.

A column says what its cell of a row is: text, a number, a `Label`, a `Share`, an `Estimate`, or None where
there is no value. How a cell looks follows from its type. HTML is drawn by templates/macros.html.j2.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from anomaly.judge import ScoreRow, Share
from anomaly.metrics import Estimate, Metric
from utils import write_csv

MISSING = Estimate(math.nan)


class Label(NamedTuple):
    """The name of a row, with a mark for primary scores; badges are shown on the page alone."""
    text: str
    primary: bool = False
    badges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """What a column shows of a row."""
    title: str
    cell: Callable[[Any], Any]
    metric: Metric | None = None           # of its estimates: gives digits and direction
    interval: bool = False                 # whether the terminal, where room is short, shows the interval
    look: str = ''                         # 'bar' draws the interval, on the page alone; 'shade' colors it

    @property
    def digits(self) -> int:
        return self.metric.digits if self.metric else 3


@dataclass(frozen=True)
class ReportTable:
    """Rows under columns. `section` gives the heading of the rows that a row belongs to, '' = none."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Any]
    section: Callable[[Any], str] = lambda row: ''

    def lines(self) -> list[tuple[str, list[Any]]]:
        """For each row the heading above it, where another section begins, and its cells."""
        sections = [self.section(row) for row in self.rows]
        headings = ['', *(new if new != old else '' for old, new in pairwise(sections))]
        return [(heading, [column.cell(row) for column in self.columns])
                for heading, row in zip(headings, self.rows)]


def metric_columns(metrics: Iterable[Metric], values: Callable[[Any], Mapping[str, Estimate]],
                   interval: bool = False) -> list[Column]:
    """A column for each metric; `values` gives the estimates of a row, which may lack some."""
    return [Column(metric.title, lambda row, name=metric.name: values(row).get(name, MISSING), metric,
                   interval) for metric in metrics]


def score_table(title: str, columns: Sequence[Column], rows: Iterable[ScoreRow],
                badges: Callable[[ScoreRow], tuple[str, ...]] = lambda row: ()) -> ReportTable:
    """A table with a row a score, the trivial baselines under a heading."""
    name = Column('', lambda row: Label(row.name, row.primary, badges(row)))
    return ReportTable(title, [name, *columns], list(rows),
                       lambda row: 'trivial baselines' if row.kind == 'baseline' else '')


# ---------------------------------------------------------------------------------------------------- cells

def number(value: float, digits: int) -> str:
    """'-' for what does not exist."""
    return f'{value:.{digits}f}' if math.isfinite(value) else '-'


def percent(share: Share) -> str:
    """'12.5 %'; '-' of nothing."""
    count, total = share
    return f'{100 * count / total:.1f} %' if total else '-'


def bracket(estimate: Estimate, digits: int) -> str:
    """'[0.636, 0.781]'; '' without an interval."""
    known = math.isfinite(estimate.low)
    return f'[{number(estimate.low, digits)}, {number(estimate.high, digits)}]' if known else ''


def show(cell: Any, digits: int, interval: bool) -> str:
    """A cell as plain text."""
    match cell:
        case None:
            return '-'
        case Estimate():
            return f'{number(cell.value, digits)} {bracket(cell, digits) if interval else ""}'.rstrip()
        case Share():
            return percent(cell)
        case Label():
            return f'{cell.text} *' if cell.primary else cell.text
    return str(cell)


# ------------------------------------------------------------------------------------------------ renderers

def as_text(table: ReportTable) -> list[str]:
    """The title and aligned lines; the first column, and others of plain text, are set to the left."""
    table = replace(table, columns=[column for column in table.columns if column.look != 'bar'])
    lines, head = table.lines(), [column.title for column in table.columns]
    rows = [[show(cell, column.digits, column.interval) for cell, column in zip(cells, table.columns)]
            for _, cells in lines]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    aligns = ['<' if all(isinstance(cell, str | Label) for cell in column) else '>'
              for column in zip(*(cells for _, cells in lines))]
    drawn = [table.title] if table.title else []
    for heading, row in [('', head), *((heading, row) for (heading, _), row in zip(lines, rows))]:
        drawn += [f'  {heading}'] if heading else []
        cells = [f'{cell:{align}{width}}' for cell, align, width in zip(row, aligns, widths)]
        drawn.append('  ' + '  '.join(cells).rstrip())
    return drawn


def as_markdown(table: ReportTable) -> str:
    """The title as a heading, and a table with all intervals."""
    rows = [[show(cell, column.digits, True) for cell, column in zip(cells, table.columns)]
            for _, cells in table.lines()]
    title = f'## {escape_markdown(table.title)}\n\n' if table.title else ''
    return title + '\n'.join('| ' + ' | '.join(map(escape_markdown, row)) + ' |' for row in [
        [column.title for column in table.columns], ['---'] * len(table.columns), *rows])


def escape_markdown(text: str) -> str:
    """Text in which Markdown sees no column and no emphasis."""
    return text.replace('|', r'\|').replace('*', r'\*')


def save_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows, {column: cell}, with all digits; an estimate takes three columns: value, low and high."""
    flat = [{name + end: value for name, cell in row.items() for end, value in (
        (('', cell.value), ('_low', cell.low), ('_high', cell.high)) if isinstance(cell, Estimate)
        else (('', cell),))} for row in rows]
    write_csv(path, flat[0], [row.values() for row in flat])


def shade(auroc: float) -> str:
    """Background of a cell: the stronger the farther from 0.5, in another color below it."""
    color = 'var(--accent)' if auroc >= 0.5 else 'var(--even)'
    return f'background: color-mix(in srgb, {color} {60 * abs(2 * auroc - 1):.0f}%, transparent)'
