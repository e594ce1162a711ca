"""What an audit has found, in words that need no statistics: how bad it is, what it means, what to do.

A finding is {'severity', 'topic', 'group', 'strength', 'text', 'advice'}: `group` is the anomalous class that
it is about, '' = none; `strength` the AUROC behind it, turned round where it is below 0.5.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from audit.trivial import FEATURES, TOPICS
from readers.split import PARTS, contradictions, count, some, spread_patients

SEVERITIES = ('serious', 'mind', 'fine')
# How far from 0.5 the nearer end of a 95 % interval must be: (mind, serious). Parts of the same normal images
# should not differ at all; classes may, a little.
BOUNDS = {'class': (0.05, 0.20), 'parts': (0.0, 0.10)}
MANY_TWINS = 0.01            # share of a part: from here on near-duplicates are serious
BY_CHANCE = 0.05             # share of features whose 95 % interval excludes 0.5 where there is no difference
NAMED = 5                    # features named in one sentence
LEARNED, TESTED = 'normal images of train and val', 'normal images of test'
DUPLICATES, PATIENTS, PART, TOGETHER = 'duplicates', 'patients', 'parts', 'all together'
# Of equal strength, the more direct cause comes first.
ORDER = (DUPLICATES, *TOPICS, PART, PATIENTS, TOGETHER)

Finding = dict[str, Any]
Row = Mapping[str, Any]      # 'auroc', 'low', 'high' of one feature


def all_findings(result: Mapping[str, Any], data: Any) -> list[Finding]:
    """The findings about the comparisons of an audit and about the entries of its datasets.Data, sorted:
    severity, then strength, and all features together after each of them.
    """
    found = [*of_entries(data), *of_files(result['groups'])]
    for comparison in result['comparisons']:
        found += OF_KIND[comparison['kind']](comparison, result['groups'])
    return sorted(found, key=lambda f: (SEVERITIES.index(f['severity']), f['topic'] == TOGETHER,
                                        -round(f['strength'], 2), ORDER.index(f['topic'])))


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The findings of an audit in words, the worst first: 'Serious: ... To do: ...'."""
    return [f"{f['severity'].capitalize()}: {f['text']}{' To do: ' if f['advice'] else ''}{f['advice']}"
            for f in result['findings']]


def finding(severity: str, topic: str, text: str, advice: str = '', strength: float = 0.5,
            group: str = '') -> Finding:
    return {'severity': severity, 'topic': topic, 'group': group, 'strength': strength, 'text': text,
            'advice': advice}


def strength(row: Row) -> float:
    """The AUROC, turned round where it is below 0.5."""
    return max(row['auroc'], 1 - row['auroc'])


def severity(row: Row, kind: str) -> str:
    """How bad it is that a feature tells two groups apart: by the end of its interval that is nearer 0.5."""
    least = max(row['low'] - 0.5, 0.5 - row['high'])
    mind, serious = BOUNDS[kind]
    return 'serious' if least >= serious else 'mind' if least > mind else 'fine'


# ------------------------------------------------------------------------------------- classes against normal

def of_class(comparison: Mapping[str, Any], groups: Mapping[str, Any]) -> list[Finding]:
    """One finding for each topic that tells a class from the normal images, one for all that do not."""
    first, second, rows = comparison['first'], comparison['second'], comparison['features']
    found, quiet = [], []
    for topic, facts in TOPICS.items():
        names = [name for name in rows if rows[name]['topic'] == topic]
        telling = [name for name in names if severity(rows[name], 'class') != 'fine']
        if not telling:
            quiet += [facts.title] if names else []
            continue
        best, *others = sorted(telling, key=lambda name: (
            SEVERITIES.index(severity(rows[name], 'class')), -strength(rows[name])))
        also = ', '.join(f'{name} {strength(rows[name]):.2f}' for name in others[:NAMED])
        found.append(finding(
            severity(rows[best], 'class'), topic,
            f"{subject(best, rows[best])} alone tells {second} from {first} images with AUROC "
            f"{told(rows[best])}: {difference(best, rows[best], comparison, groups)}"
            f"{'; also ' if also else ''}{also}. A model that reaches this may have learned {facts.learned}",
            facts.advice, strength(rows[best]), second))
    if comparison['combined']:
        row = comparison['combined']
        level = severity(row, 'class')
        found.append(finding(
            level, TOGETHER, f"All trivial features together, by a logistic regression that never looks at "
            f"the disease, tell {second} from {first} images with AUROC {told(row)}.",
            "An AUROC of a model means something only as far as it exceeds this." if level != 'fine' else '',
            strength(row), second))
    if quiet:
        found.append(finding('fine', PART, f"{second} and {first} images hardly differ in {listed(quiet)}.",
                             group=second))
    return found


def difference(name: str, row: Row, comparison: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    """What is different in the second group: 'COVID images have larger files (median 41.2 kB, Normal 34.3
    kB)'.
    """
    first, second = comparison['first'], comparison['second']
    if 'word' in row:
        shares = [{0: 'no', 1: 'all'}.get(share, f'{100 * share:.0f} % of the') for share in row['shares']]
        return f"{shares[1]} {second} files and {shares[0]} {first} files are {row['word']}"
    feature = FEATURES[name]
    medians = [feature.show(groups[group]['features'][name]['median']) for group in (first, second)]
    does = feature.more if row['auroc'] >= 0.5 else feature.less
    return f"{second} images {does} (median {medians[1]}, {first} {medians[0]})"


# --------------------------------------------------------------------------------------------- parts, entries

def of_parts(comparison: Mapping[str, Any], groups: Mapping[str, Any]) -> list[Finding]:
    """One finding: whether the normal images of the test part are like those that a model learns from."""
    rows, combined = comparison['features'], comparison['combined']
    flagged = sorted((name for name in rows if severity(rows[name], 'parts') != 'fine'),
                     key=lambda name: -strength(rows[name]))
    judged = [*(rows[name] for name in flagged), *([combined] if combined else [])]
    level = min((severity(row, 'parts') for row in judged), key=SEVERITIES.index, default='fine')
    together = f" All features together: {told(combined)}." if combined else ''
    if level == 'fine':
        return [finding('fine', PART, f"The {TESTED} are like the {LEARNED}: no trivial feature tells them "
                        f"apart, every AUROC is near 0.5, as it should be.{together}")]
    named = '; '.join(f"{subject(name, rows[name]).lower()} {told(rows[name])}" for name in flagged[:NAMED])
    expected = max(1, round(BY_CHANCE * len(rows)))
    text = (f"The {TESTED} differ from the {LEARNED}, though an AUROC between them should be 0.5"
            f"{': ' if named else ''}{named}.{together} Of {count(len(rows), 'feature')} about {expected} "
            f"would differ as much by chance.")
    together_alike = combined is None or severity(combined, 'parts') == 'fine'
    by_chance = level == 'mind' and together_alike and len(flagged) <= expected
    return [finding(level, PART, text, "Nothing: it is what chance brings." if by_chance else
                    "If they come from another hospital or time, thresholds from validation images do not "
                    "hold for them; else try another --split_seed, and tell who the patients are.",
                    max(map(strength, judged)))]


OF_KIND = {'class': of_class, 'parts': of_parts}


def of_entries(data: Any) -> list[Finding]:
    """Duplicates across parts, contents that are called both, patients in two parts or unknown.

    Of a large set nothing is known of contents and patients.
    """
    if not data.split.get('files'):
        return []
    entries = [e for part in PARTS for e in getattr(data, part).entries]
    parts = {e.id: part for part in PARTS for e in getattr(data, part).entries}
    found = of_duplicates(data)
    if ids := contradictions(entries):
        found.append(finding('serious', DUPLICATES, f"{count(len(ids), 'file')} of the same content are "
                             f"called normal and anomalous: {some(ids)}.", "Find out which is true.", 1.0))
    if people := spread_patients(entries, parts):
        found.append(finding('serious', PATIENTS, f"{count(len(people), 'patient')} in more than one part: "
                             f"{some(people)}.", "Split again, with the patients known.", 1.0))
    if any(e.path for e in entries) and not any(e.patient for e in entries):
        found.append(finding('mind', PATIENTS, "Nothing is known of the patients: images of one patient may "
                             "be in training and in the test.", "Give --patient_pattern or "
                             "--patient_metadata if patients have several images."))
    return found


def of_duplicates(data: Any) -> list[Finding]:
    """Images of one part that are in another too. Equal files are serious, and so are near-duplicates from
    a hundredth of a part on: to look alike is no proof.
    """
    pairs, found = data.split['duplicates'], []
    for kind, words in (('exact', 'the same file'), ('near', 'near-duplicates, which look the same')):
        of_kind = [pair for pair in pairs if pair['kind'] == kind]
        if not of_kind:
            continue
        named = some([' and '.join(f'{name} ({part})' for name, part in zip(pair['ids'], pair['parts']))
                      for pair in of_kind])
        reached = Counter(part for pair in of_kind for part in pair['parts'])
        many = any(n >= MANY_TWINS * len(getattr(data, part)) for part, n in reached.items())
        found.append(finding(
            'serious' if kind == 'exact' or many else 'mind', DUPLICATES,
            f"Duplicates across parts: {count(len(of_kind), 'pair')} of images are {words}: {named}. A model "
            f"is tested there on what it has learned by heart.",
            "Remove one of each pair, or tell who the patients are (--patient_pattern).", 1.0))
    return found or [finding('fine', DUPLICATES, "No image of one part is in another part, or looks like one "
                                                 "there.")]


def of_files(groups: Mapping[str, Any]) -> list[Finding]:
    """One line of what all files have in common."""
    common = []
    for trait in ('format', 'pixels', 'size', 'spacing'):
        words = {word for group in groups.values() for word in group['traits'][trait]}
        common += words if len(words) == 1 else []
    return [finding('fine', 'format', f"All files are alike in this: {', '.join(common)}.")] if common else []


# ------------------------------------------------------------------------------------------------------ words

def subject(name: str, row: Row) -> str:
    return f"The {name.partition('=')[0]} of the file" if 'word' in row else f"The {FEATURES[name].about}"


def told(row: Row) -> str:
    """'0.91 (95 % interval 0.88 to 0.94)', turned round where it is below 0.5."""
    low, high = (row['low'], row['high']) if row['auroc'] >= 0.5 else (1 - row['high'], 1 - row['low'])
    return f"{strength(row):.2f} (95 % interval {low:.2f} to {high:.2f})"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
