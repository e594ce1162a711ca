"""The page of predictions: new files by falling score, their pictures, and what could not be read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anomaly.report.gallery import about_cards, short_number
from anomaly.report.page import write_page
from anomaly.report.tables import Column, Label, ReportTable

MOST_ROWS = 2000        # of the worklist on the page; scores.csv has all
OUTCOMES = {'flagged': 'anomalous', 'clear': 'not flagged'}


class Prediction(NamedTuple):
    """A file that was read, as a row of the worklist: its score, percentile and call."""
    id: str
    score: float
    percentile: float        # among normal validation images
    flagged: bool


def write(out: Path, result: dict[str, Any], files: Sequence[Prediction], errors: Mapping[str, str],
          cards: Mapping[str, dict[str, Any]], look: dict[str, Any]) -> None:
    """Writes predictions.html. `files` are those that could be read, by falling score, `errors` tell of the
    others; `cards` are pictures by id, `look` the colors of their maps.
    """
    shown = [cards[file.id] | {
        'id': file.id, 'class': '', 'place': rank, 'outcome': 'flagged' if file.flagged else 'clear',
        'score': short_number(file.score), 'percentile': f'{file.percentile:.0f}'}
        for rank, file in enumerate(files, 1) if file.id in cards]
    write_page(out / 'predictions.html', 'predictions.html.j2', result=result, outcomes=OUTCOMES,
               gallery=about_cards(shown, look),
               worklist=worklist(files[:MOST_ROWS], result['primary_score']),
               unreadable=ReportTable('Files that could not be read', [
                   Column('file', lambda row: Label(row[0])), Column('why', lambda row: row[1])],
                   sorted(errors.items())))


def worklist(files: Sequence[Prediction], score: str) -> ReportTable:
    """The files in the order in which to look at them."""
    rows = list(enumerate(files, 1))
    return ReportTable('Worklist', [
        Column('file', lambda row: Label(row[1].id)),
        Column('call', lambda row: 'anomalous' if row[1].flagged else 'not flagged'),
        Column(score, lambda row: short_number(row[1].score)),
        Column('percentile', lambda row: f'{row[1].percentile:.0f}'),
        Column('rank', lambda row: row[0])], rows)
