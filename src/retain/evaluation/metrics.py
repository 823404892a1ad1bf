"""Scores of a task from its predictions; scikit-learn's and SciPy's, by name.

All are fractions from 0 to 1, correlations from -1 to 1. A correlation that is not defined
(constant predictions or answers, fewer than two rows, numbers that are not finite) is 0.0, as is
an F1 without any positive: a score is never NaN.

    accuracy           share of equal ones
    f1                 F1 of class 1
    f1_macro           mean F1 over the classes (the metric of CB)
    matthews           Matthews' correlation (CoLA)
    pearson, spearman  correlations (STS-B); pearson_spearman is their mean
    exact_match        share of texts that are equal to a reference, see `same_text`
    token_f1           mean F1 of the words shared with the nearest reference (ReCoRD, SQuAD)
    f1a                F1 of class 1 over all answers of all questions (MultiRC)
    group_em           share of groups whose rows are all right (MultiRC)
    f1a_em             mean of the last two, as SuperGLUE averages them
"""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from importlib import import_module
from typing import Any, cast

from retain.errors import ConfigError, unknown

__all__ = ["METRICS", "TEXT_METRICS", "compute", "normalize", "plain_minus", "same_text"]

Values = Sequence[Any]
Metric = Callable[[Values, Values, Sequence[str]], float]

TEXT_METRICS = frozenset({"exact_match", "token_f1"})
"""Metrics of texts; an answer may be several texts, of which the nearest counts."""

_GROUPED = frozenset({"group_em", "f1a_em"})

_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
"""Rounds no number that is written out."""

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

_DROPPED = re.compile(
    rf"""(?!
        (?<=\d) . \d                  # what stands between two digits belongs to a number,
      | (?<![\w)]) - [$€£]? \.? \d    # as do a sign,
      | (?<=\de) - \d                 # that of an exponent,
      | (?<![\w.]) \. \d              # and a point in front
    ) [{re.escape(string.punctuation)}]""",
    re.VERBOSE,
)
"""Punctuation of a text in lower case without commas of thousands."""


def compute(
    metric: str, predictions: Values, answers: Values, groups: Sequence[str] | None = None
) -> float:
    """One score.

    Args:
        metric: a name in `METRICS`.
        predictions: class indices, numbers or texts.
        answers: the true ones, in the same order. Of a text metric each is a text or several.
        groups: what each row belongs to, for metrics of groups.

    Raises:
        ConfigError: an unknown metric, no rows, lengths that differ, or groups that are missing.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if not predictions or len(predictions) != len(answers):
        raise ConfigError(
            "predictions and answers do not match",
            got=f"{len(predictions)} predictions, {len(answers)} answers",
            allowed="as many of one as of the other, and one at least",
            fix="give one prediction for each answer",
        )
    if metric in _GROUPED and (groups is None or len(groups) != len(answers)):
        raise ConfigError(
            f"{metric} scores groups of rows",
            got="no groups" if groups is None else f"{len(groups)} groups",
            allowed=f"a group for each of {len(answers)} rows",
            fix="name the group in the task's file",
        )
    return METRICS[metric](predictions, answers, groups or ())


def plain_minus(text: str) -> str:
    """A text whose minus signs as they are typeset (U+2212) are those of a keyboard."""
    return text.replace("\N{MINUS SIGN}", "-")


def normalize(text: str) -> str:
    """A text as it is compared.

    A number, maybe with a currency sign, commas or a percent sign, in its shortest form ("$1,200."
    is "1200", "2.50" is "2.5"). Any other text as for SQuAD (Rajpurkar et al. 2016): lower case,
    without punctuation, articles (unless nothing else is there) and doubled spaces; but what
    belongs to a number within it stays ("-5 degrees", "1/2", "12:30", "2.5 kg").
    """
    text = plain_minus(text)
    bare = _THOUSANDS.sub("", re.sub(r"[$€£%]", "", text)).strip().rstrip(".").rstrip()
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", bare):
        return format(_EXACT.plus(Decimal(bare).normalize(_EXACT)), "f")
    plain = _DROPPED.sub("", _THOUSANDS.sub("", text.lower()))
    rest = re.sub(r"\b(a|an|the)\b", " ", plain)
    return " ".join((rest if rest.strip() else plain).split())


def same_text(said: str, right: str) -> bool:
    """Whether a text says what the right one does: both after `normalize`.

    Where nothing is left of one of them, such as of "<", they are compared as they stand.
    """
    ours, theirs = normalize(said), normalize(right)
    if not (ours and theirs):
        ours, theirs = said.strip(), right.strip()
    return bool(ours) and ours == theirs


def _classes(name: str, **options: Any) -> Metric:
    """A score of classes of scikit-learn, by its name there."""

    def score(predictions: Values, answers: Values, groups: object) -> float:
        found = getattr(import_module("sklearn.metrics"), name)
        return _defined(found(answers, predictions, **options))

    return score


def _f1(predictions: Values, answers: Values, groups: object) -> float:
    score = _classes("f1_score", pos_label=True, average="binary", zero_division=0)
    return score([p == 1 for p in predictions], [a == 1 for a in answers], ())


def _correlation(*names: str) -> Metric:
    """The mean of correlations of SciPy, by their names there."""

    def score(predictions: Values, answers: Values, groups: object) -> float:
        if len(answers) < 2 or len(set(predictions)) < 2 or len(set(answers)) < 2:
            return 0.0
        if not all(math.isfinite(v) for v in (*predictions, *answers)):
            return 0.0
        stats = import_module("scipy.stats")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nearly constant input, which is 0 here
            found = [getattr(stats, name)(predictions, answers).statistic for name in names]
        return _mean([_defined(value) for value in found])

    return score


def _texts(one: Callable[[str, str], float]) -> Metric:
    """The mean over rows of what is measured to the nearest of a row's references."""

    def score(predictions: Values, answers: Values, groups: object) -> float:
        rows = zip(predictions, answers, strict=True)
        return _mean([max(one(str(p), r) for r in _references(a)) for p, a in rows])

    return score


def _references(answer: object) -> Sequence[str]:
    return [answer] if isinstance(answer, str) else [str(a) for a in cast(Values, answer)]


def _exact(prediction: str, reference: str) -> float:
    return float(same_text(prediction, reference))


def _token_f1(prediction: str, reference: str) -> float:
    found, truth = normalize(prediction).split(), normalize(reference).split()
    shared = sum((Counter(found) & Counter(truth)).values())
    return 2 * shared / (len(found) + len(truth)) if shared else 0.0


def _group_em(predictions: Values, answers: Values, groups: Sequence[str]) -> float:
    right: dict[str, bool] = {}
    for p, a, g in zip(predictions, answers, groups, strict=True):
        right[g] = right.get(g, True) and p == a
    return _mean([float(r) for r in right.values()])


def _f1a_em(predictions: Values, answers: Values, groups: Sequence[str]) -> float:
    return (_f1(predictions, answers, groups) + _group_em(predictions, answers, groups)) / 2


METRICS: dict[str, Metric] = {
    "accuracy": _classes("accuracy_score"),
    "f1": _f1,
    "f1_macro": _classes("f1_score", average="macro", zero_division=0),
    "matthews": _classes("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
    "pearson_spearman": _correlation("pearsonr", "spearmanr"),
    "exact_match": _texts(_exact),
    "token_f1": _texts(_token_f1),
    "f1a": _f1,
    "group_em": _group_em,
    "f1a_em": _f1a_em,
}
"""Name to ``(predictions, answers, groups) -> score``; call `compute`, which checks them."""


def _defined(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
