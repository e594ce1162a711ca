"""Which scores are computed, which of them is the primary one, and sums of scores."""

from collections.abc import Iterable, Sequence
from typing import Any

from anomaly.scores import CAPABILITIES, ON_REQUEST, SCORES, Score, Scoring
from datasets import DATASETS
from model import family_name
from utils import UserError


def choose_scores(names: Iterable[str], model: Any) -> tuple[list[Score], list[str]]:
    """The scores that `names` ask for, in the table's order, and at most one line, on what 'all' leaves out.

    A name is a row of SCORES, one member of a row (`llr_2`), or a sum of members (`kl_knn+llr_2`), which
    follows the scores that it needs. Raises UserError for an unknown name, and for one that the model cannot
    give if it was asked for by name.
    """
    asked_for, chosen = tuple(names) or ('all',), []
    sums = {name: name.split('+') for name in asked_for if '+' in name}
    names = [*(name for name in asked_for if name not in sums), *(term for s in sums.values() for term in s)]
    lacking: dict[str, list[str]] = {}                       # capability -> scores that need it
    groups = getattr(model, 'num_groups', 0)
    table = {row: make(groups) for row, make in SCORES.items()}
    check_names(names, table, groups)
    for row, scores in table.items():
        for score in scores:
            asked = row in names or score.name in names
            if not asked and ('all' not in names or row in ON_REQUEST):
                continue
            if hasattr(model, CAPABILITIES[score.needs]):
                chosen.append(score)
            elif asked:
                raise UserError(f"score {score.name} needs a model with {score.needs}, which "
                                f"{type(model).__name__} does not have. Leave it out of --scores.")
            else:
                lacking.setdefault(score.needs, []).append(score.name)
    single = {score.name for score in chosen}
    for name, terms in sums.items():
        if unknown := [term for term in terms if term not in single]:
            raise UserError(f"{name}: {unknown[0]!r} is not a single score of this model. Add up single "
                            f"scores, such as kl_knn+llr_2.")
        chosen.append(sum_score(terms))
    reasons = '; '.join(f"{', '.join(scores)} (need{'s' if len(scores) == 1 else ''} {needs})"
                        for needs, scores in lacking.items())
    return chosen, [f'scores that {type(model).__name__} cannot give: {reasons}'] if reasons else []


def check_names(names: Iterable[str], table: dict[str, list[Score]], groups: int) -> None:
    """Raises UserError for a name that is no row of the table and no member of one, and for an empty row."""
    members = {row: [score.name for score in scores if score.name != row] for row, scores in table.items()}
    known = {'all', *members, *(name for row in members.values() for name in row)}
    for name in names:
        if name not in known:
            ranges = [' to '.join(dict.fromkeys((row[0], row[-1]))) for row in members.values() if row]
            raise UserError(f"--scores {name}: no such score for a model with {groups} latent groups. "
                            f"Known: {', '.join(['all', *members, *ranges])}.")
        if name in table and not table[name]:
            raise UserError(f"--scores {name} needs more latent groups: the model has {groups}.")


def preset(model: Any, dataset: str) -> str:
    """The family's primary score on the data set, by development data, or else its own; '' = none."""
    chosen = DATASETS[dataset].primary_scores if dataset in DATASETS else {}
    return chosen.get(family_name(model), getattr(model, 'primary_score', ''))


def choose_primary(name: str, preset: str, computed: list[str]) -> str:
    """The score of the figures: the user's; else, if computed, the `preset`, nelbo, or the first of all."""
    if not computed:
        raise UserError("no score fits this model: see the lines above, or name one with --scores.")
    if name and name not in computed:
        raise UserError(f"--primary_score {name} is not among the computed scores: {', '.join(computed)}.")
    return name or next((s for s in (preset, 'nelbo') if s in computed), computed[0])


def choose_map(primary: str, scores: Sequence[Score], model: Any, scoring: Scoring) -> Score | None:
    """The score whose map is shown: the primary one, or a term of it, or else the first that has a map."""
    first = primary.split('+')
    mapped = [score for score in scores if score.has_map(model, scoring)]
    return min(mapped, key=lambda score: [*first, score.name].index(score.name), default=None)


def sum_score(names: Sequence[str]) -> Score:
    """The score 'a+b', the sum of the z-scores of some scores over normal validation images.

    No weights are fitted. It has no map; its terms may have one.
    """
    return Score('+'.join(names), '', f"{' + '.join(names)}, each in standard deviations from its mean over "
                 f"normal validation images", terms=tuple(names))
