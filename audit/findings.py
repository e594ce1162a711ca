"""The findings of an audit in words that need no statistics: how serious, what it means, what to do."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import binom

from audit.trivial import CONFOUNDERS, FEATURES
from readers.split import PARTS, contradictions, count, some, spread_patients

SEVERITIES = ('serious', 'moderate', 'fine')
# How far from 0.5 the nearer end of a 95 % interval must be: (moderate, serious). Parts of the same normal
# images should not differ at all; classes may, a little.
BOUNDS = {'class': (0.05, 0.20), 'parts': (0.0, 0.10)}
MANY_DUPLICATES = 0.01       # of a part: from here on near-duplicates are serious
BY_CHANCE = 0.05             # of the features: a 95 % interval excludes 0.5 where there is no difference
NAMED = 5                    # features named in one sentence
LEARNED, TESTED = 'normal images of train and val', 'normal images of test'
DUPLICATES, PATIENTS, PART, TOGETHER = 'duplicates', 'patients', 'parts', 'all together'
# Of equal strength, the more direct cause comes first.
ORDER = (DUPLICATES, *CONFOUNDERS, PART, PATIENTS, TOGETHER)

Row = Mapping[str, Any]      # 'auroc', 'low', 'high' of one feature


@dataclass(frozen=True)
class Finding:
    severity: str
    cause: str               # of ORDER
    text: str
    advice: str = ''
    strength: float = 0.5    # the AUROC behind it, 1 - AUROC where that is larger
    group: str = ''          # the anomalous class that it is about; '' = none


def all_findings(result: Mapping[str, Any], data: Any) -> list[Finding]:
    """The findings about the comparisons of an audit and about the entries of its datasets.Data, sorted:
    severity, then strength, and all features together after each of them.
    """
    found = [*entry_findings(data), *file_findings(result['groups'])]
    for comparison in result['comparisons']:
        find = class_findings if comparison['kind'] == 'class' else part_findings
        found += find(comparison, result['groups'])
    return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), f.cause == TOGETHER,
                                        -round(f.strength, 2), ORDER.index(f.cause)))


def strength(row: Row) -> float:
    """The AUROC, or 1 - AUROC where that is larger."""
    return max(row['auroc'], 1 - row['auroc'])


def severity(row: Row, kind: str) -> str:
    """How bad it is that a feature tells two groups apart: by the end of its interval that is nearer 0.5."""
    least = max(row['low'] - 0.5, 0.5 - row['high'])
    moderate, serious = BOUNDS[kind]
    return 'serious' if least >= serious else 'moderate' if least > moderate else 'fine'


def telling(rows: Mapping[str, Row], kind: str) -> list[str]:
    """The features that tell two groups apart, the worst first."""
    found = {name: severity(row, kind) for name, row in rows.items()}
    return sorted((name for name in rows if found[name] != 'fine'),
                  key=lambda name: (SEVERITIES.index(found[name]), -strength(rows[name])))


def class_findings(comparison: Mapping[str, Any], groups: Mapping[str, Any]) -> list[Finding]:
    """One finding for each cause that tells a class from the normal images, one for all that do not."""
    first, second, rows = comparison['first'], comparison['second'], comparison['features']
    found, alike = [], []
    for cause, facts in CONFOUNDERS.items():
        measured = {name: row for name, row in rows.items() if row['cause'] == cause}
        if not (different := telling(measured, 'class')):
            alike += [facts.title] * bool(measured)
            continue
        best, *others = different
        row, also = rows[best], [f'{name} {strength(rows[name]):.2f}' for name in others[:NAMED]]
        found.append(Finding(
            severity(row, 'class'), cause,
            f"The {subject(best, row)} alone tells {second} from {first} images with AUROC "
            f"{with_interval(row)}: {difference(best, comparison, groups)}{'; also ' * bool(also)}"
            f"{', '.join(also)}. A model that reaches this may have learned {facts.learned}",
            facts.advice, strength(row), second))
    if row := comparison['combined']:
        level = severity(row, 'class')
        found.append(Finding(
            level, TOGETHER, f"All trivial features together, in a logistic regression on nothing else, tell "
            f"{second} from {first} images with AUROC {with_interval(row)}.",
            "Compare models with this AUROC: one that has learned more exceeds it." * (level != 'fine'),
            strength(row), second))
    if alike:
        listed = ' and '.join([', '.join(alike[:-1]), alike[-1]]) if len(alike) > 1 else alike[0]
        found.append(Finding('fine', PART, f"{second} and {first} images hardly differ in {listed}.",
                             group=second))
    return found


def part_findings(comparison: Mapping[str, Any], groups: Mapping[str, Any]) -> list[Finding]:
    """One finding: whether the normal images of the test part are like those that a model learns from."""
    rows, combined = comparison['features'], comparison['combined']
    different = telling(rows, 'parts')
    judged = [rows[name] for name in different] + [combined] * bool(combined)
    level = min((severity(row, 'parts') for row in judged), key=SEVERITIES.index, default='fine')
    together = f" All features together: {with_interval(combined)}." if combined else ''
    if level == 'fine':
        return [Finding('fine', PART, f"The {TESTED} are like the {LEARNED}: no trivial feature tells them "
                        f"apart, every AUROC is near 0.5, as it should be.{together}")]
    named = '; '.join(f"the {subject(name, rows[name])} {with_interval(rows[name])}"
                      for name in different[:NAMED])
    allowed = max(1, int(binom.ppf(0.95, len(rows), BY_CHANCE)))
    by_chance = level == 'moderate' and len(different) <= allowed and (
        not combined or severity(combined, 'parts') == 'fine')
    return [Finding(
        level, PART, f"The {TESTED} differ from the {LEARNED}, though an AUROC between them should be 0.5"
        f"{': ' * bool(named)}{named}.{together} By chance, up to {allowed} "
        f"of {count(len(rows), 'feature')} would differ as much (95 %).",
        "Nothing: chance explains it." if by_chance else
        "If they come from another hospital or time, thresholds from validation images do not hold for them; "
        "else try another --split_seed, and name the patients.", max(map(strength, judged)))]


def subject(name: str, row: Row) -> str:
    return f"{name.partition('=')[0]} of the file" if 'word' in row else FEATURES[name].about


def difference(name: str, comparison: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    """'COVID images have larger files (median 41.2 kB, Normal 34.3 kB)'."""
    first, second, row = comparison['first'], comparison['second'], comparison['features'][name]
    if 'word' in row:
        shares = [{0: 'no', 1: 'all'}.get(share, f'{100 * share:.0f} % of the') for share in row['shares']]
        return f"{shares[1]} {second} files and {shares[0]} {first} files are {row['word']}"
    feature = FEATURES[name]
    medians = [f"{groups[group]['features'][name]['median']:,.{feature.digits}f} {feature.unit}".rstrip()
               for group in (first, second)]
    does = feature.more if row['auroc'] >= 0.5 else feature.less
    return f"{second} images {does} (median {medians[1]}, {first} {medians[0]})"


def with_interval(row: Row) -> str:
    """'0.91 (95 % interval 0.88 to 0.94)'; that of 1 - AUROC where the AUROC is below 0.5."""
    low, high = (row['low'], row['high']) if row['auroc'] >= 0.5 else (1 - row['high'], 1 - row['low'])
    return f"{strength(row):.2f} (95 % interval {low:.2f} to {high:.2f})"


def entry_findings(data: Any) -> list[Finding]:
    """Duplicates across parts, contents with both labels, patients in two parts or unknown.

    Nothing where the split does not list the files, as for large sets.
    """
    if not data.split.get('files'):
        return []
    found = duplicate_findings(data)
    entries = [e for part in PARTS for e in getattr(data, part).entries]
    if ids := contradictions(entries):
        found.append(Finding('serious', DUPLICATES, f"{count(len(ids), 'file')} of the same content are "
                             f"labeled normal and anomalous: {some(ids)}.", "Find out which is true.", 1.0))
    parts = {e.id: part for part in PARTS for e in getattr(data, part).entries}
    if people := spread_patients(entries, parts):
        found.append(Finding('serious', PATIENTS, f"{count(len(people), 'patient')} in more than one part: "
                             f"{some(people)}.", "Split again, with the patients known.", 1.0))
    if any(e.path for e in entries) and not any(e.patient for e in entries):
        found.append(Finding(
            'moderate', PATIENTS, "The patients are unknown: images of one may be in training and in test.",
            "Give --patient_pattern or --patient_metadata if patients have several images."))
    return found


def duplicate_findings(data: Any) -> list[Finding]:
    """Images in two parts: equal files are serious, near-duplicates from a hundredth of a part on."""
    pairs, found = data.split['duplicates'], []
    for kind, words in (('exact', 'the same file'), ('near', 'near-duplicates, which look the same')):
        if not (of_kind := [pair for pair in pairs if pair['kind'] == kind]):
            continue
        named = [' and '.join(f'{name} ({part})' for name, part in zip(pair['ids'], pair['parts']))
                 for pair in of_kind]
        numbers = Counter(part for pair in of_kind for part in pair['parts'])
        many = any(n >= MANY_DUPLICATES * len(getattr(data, part)) for part, n in numbers.items())
        found.append(Finding(
            'serious' if kind == 'exact' or many else 'moderate', DUPLICATES,
            f"Duplicates across parts: {count(len(of_kind), 'pair')} of images are {words}: {some(named)}. A "
            f"model is tested there on images that it may have memorized.",
            "Remove one of each pair, or name the patients (--patient_pattern).", 1.0))
    return found or [Finding('fine', DUPLICATES, "No image of one part is in another part, or looks like one "
                                                 "there.")]


def file_findings(groups: Mapping[str, Any]) -> list[Finding]:
    """What all files have in common."""
    common = []
    for trait in ('format', 'pixels', 'size', 'spacing'):
        words = {word for group in groups.values() for word in group['traits'][trait]}
        common += words if len(words) == 1 else []
    return [Finding('fine', 'format', f"All files have in common: {', '.join(common)}.")] if common else []
