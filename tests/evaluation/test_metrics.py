"""Every metric equals what its formula gives by hand."""

from __future__ import annotations

import math

import pytest

from retain.errors import ConfigError
from retain.evaluation.metrics import METRICS, compute, normalize, same_text

TRUE = [1, 1, 1, 0, 0, 0, 0, 1]
PRED = [1, 0, 1, 0, 1, 0, 0, 1]  # tp 3, fn 1, fp 1, tn 3


def test_classes_by_hand() -> None:
    assert compute("accuracy", PRED, TRUE) == 6 / 8
    assert compute("f1", PRED, TRUE) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert compute("f1_macro", PRED, TRUE) == pytest.approx(0.75)
    assert compute("matthews", PRED, TRUE) == pytest.approx((3 * 3 - 1) / math.sqrt(4**4))
    three = [0, 0, 1, 2], [0, 1, 1, 1]  # F1 of 0: 2/3, of 1: 1/2, of 2: 0
    assert compute("f1_macro", three[1], three[0]) == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert compute("f1", [2, 1, 0], [1, 1, 0]) == pytest.approx(2 / 3)  # other classes are not 1


def test_correlations_by_hand() -> None:
    predictions, answers = [1.0, 2.0, 3.0, 10.0], [1.0, 3.0, 2.0, 4.0]
    mp, ma = 4.0, 2.5
    pairs = list(zip(predictions, answers, strict=True))
    cross = sum((p - mp) * (a - ma) for p, a in pairs)
    size = sum((p - mp) ** 2 for p in predictions) * sum((a - ma) ** 2 for a in answers)
    pearson = cross / math.sqrt(size)
    spearman = 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert compute("pearson", predictions, answers) == pytest.approx(pearson)
    assert compute("spearman", predictions, answers) == pytest.approx(spearman)
    both = compute("pearson_spearman", predictions, answers)
    assert both == pytest.approx((pearson + spearman) / 2)


def test_what_is_not_defined_is_zero_and_never_nan() -> None:
    for name in ("pearson", "spearman", "pearson_spearman"):
        assert compute(name, [2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0.0
        assert compute(name, [1.0], [1.0]) == 0.0
        assert compute(name, [1.0, math.nan, 2.0], [1.0, 2.0, 3.0]) == 0.0
    assert compute("matthews", [1, 1, 1], [1, 0, 1]) == 0.0
    assert compute("f1", [0, 0], [1, 0]) == 0.0


def test_multirc_by_hand() -> None:
    groups = ["q1", "q1", "q2", "q2", "q3", "q3", "q3", "q3"]
    # groups right: q1 no, q2 yes, q3 no
    assert compute("group_em", PRED, TRUE, groups) == pytest.approx(1 / 3)
    assert compute("f1a", PRED, TRUE, groups) == pytest.approx(0.75)
    assert compute("f1a_em", PRED, TRUE, groups) == pytest.approx((0.75 + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("$1,234.50", "1234.5"),
        ("72.", "72"),
        (" -3.0 ", "-3"),
        ("\u22125", "-5"),
        ("1e3", "1e3"),
        ("1000", "1000"),
        ("50%", "50"),
        ("-0", "0"),
        ("3, 4", "3 4"),
        ("The Cat's hat!", "cats hat"),
        ("an apple  a day", "apple day"),
        ("A", "a"),
        ("about -5 degrees", "about -5 degrees"),
        ("-$1,250 in 1990-95", "-1250 in 1990-95"),
        ("At 12:30.", "at 12:30"),
        ("The Covid-19 x-5 (3)-4", "covid19 x5 34"),
        (".5 kg", ".5 kg"),
        ("1.0e-3 m", "1.0e-3 m"),
        ("1,000km, 2", "1000km 2"),
    ],
)
def test_texts_as_they_are_compared(text: str, plain: str) -> None:
    assert normalize(text) == plain


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("<", ">"),
        ("+", "-"),
        ("1/2", "12"),
        ("2.5 kg", "25 kg"),
        (".5 kg", "5 kg"),
        ("-5 degrees", "5 degrees"),
        ("12:30", "1230"),
        ("1.0 x 10^-3", "1.0 x 10^3"),
        ("1" * 30, "1" * 29 + "2"),
        (" ", ""),
    ],
)
def test_texts_that_differ_in_a_sign(said: str, right: str) -> None:
    assert not same_text(said, right) and not same_text(right, said)
    assert same_text(f" {said}\n", said) is bool(said.strip())


@pytest.mark.parametrize(
    ("said", "right"),
    [("Paris.", "paris"), ("the cat", "cat"), ("1,000", "1000"), ("$5", "5"), ("5.0", "5"),
     ("A well-known (old) town!", "wellknown old town"), ("+3", "3"), ("-0", "0"), ("<", "<")],
)  # fmt: skip
def test_texts_that_say_the_same(said: str, right: str) -> None:
    assert same_text(said, right) and same_text(right, said)


def test_texts_by_hand() -> None:
    predictions = ["the red car", "$1,000", "", "blue"]
    answers = [["a car", "red car"], "1000.0", "", "green sky"]
    rows = zip(predictions, answers, strict=True)
    assert [compute("exact_match", [p], [a]) for p, a in rows] == [1, 1, 0, 0]
    assert compute("exact_match", predictions, answers) == 0.5
    near = compute("token_f1", ["red old car"], [["car", "the red truck"]])
    assert near == pytest.approx(2 * 1 / (3 + 1))  # "car": 1/2; "red truck": 2/5
    assert compute("token_f1", ["red old car", "x"], ["car", "y"]) == pytest.approx(0.25)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        compute("acuracy", [1], [1])
    with pytest.raises(ConfigError, match="do not match"):
        compute("accuracy", [1], [1, 0])
    with pytest.raises(ConfigError, match="do not match"):
        compute("accuracy", [], [])
    with pytest.raises(ConfigError, match="groups"):
        compute("f1a_em", [1], [1])
    assert set(METRICS) >= {"accuracy", "f1", "matthews", "pearson_spearman", "f1a_em"}
