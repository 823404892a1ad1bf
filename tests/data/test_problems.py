"""Word problems: true answers, disjoint splits, clean text, the same for the same seed."""

from __future__ import annotations

import re
from collections import Counter
from typing import get_args

import pytest

from retain.data.problems import (
    Problem,
    Split,
    _template,
    final_number,
    number_split,
    templates,
    word_problems,
)
from retain.errors import ConfigError, SourceError

CONSTANTS = {2, 3, 12, 60}  # half and twice, three-point shots, dozens, minutes of an hour
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
SPLITS: tuple[Split, ...] = get_args(Split)
FIRST = ("half_the_herd", (54, 5))


@pytest.fixture(scope="module")
def problems() -> dict[Split, list[Problem]]:
    return {"train": word_problems("train", 1400), "test": word_problems("test", 600)}


@pytest.fixture(scope="module")
def everything(problems: dict[Split, list[Problem]]) -> list[Problem]:
    return problems["train"] + problems["test"]


def equations(problem: Problem) -> list[tuple[int, str, int, int]]:
    lines = problem.answer.splitlines()[:-1]
    matches = [EQUATION.fullmatch(line) for line in lines]
    assert matches and all(matches), problem
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches if m]


def kind(problem: Problem) -> str:
    return "".join(operator for _, operator, _, _ in equations(problem))


def test_every_equation_is_true(everything: list[Problem]) -> None:
    assert len(everything) == 2000
    for problem in everything:
        for left, operator, right, result in equations(problem):
            true = {
                "+": left + right == result,
                "-": left - right == result,
                "*": left * right == result,
                "/": left == right * result,
            }
            assert true[operator], problem
            assert result > 1, problem


def test_equations_chain_from_the_numbers_to_the_result(everything: list[Problem]) -> None:
    for problem in everything:
        steps = equations(problem)
        assert 1 <= len(steps) <= 3
        results = [result for *_, result in steps]
        for index, (left, _, right, _) in enumerate(steps):
            assert {left, right} <= {*problem.numbers, *CONSTANTS, *results[:index]}, problem
        operands = Counter(n for left, _, right, _ in steps for n in (left, right))
        assert not Counter(problem.numbers) - operands, f"a number goes unused: {problem}"
        assert not Counter(results[:-1]) - operands, f"a step goes unused: {problem}"
        assert results[-1] == problem.result
        assert problem.result not in problem.numbers, f"the question tells: {problem}"


def test_answer_ends_with_the_result(everything: list[Problem]) -> None:
    for problem in everything:
        assert problem.answer.splitlines()[-1] == f"#### {problem.result}"
        assert final_number(problem.answer) == problem.result


def test_answers_are_short(everything: list[Problem]) -> None:
    for problem in everything:
        assert len(re.findall(r"\d|[-+*/=\n]|####", problem.answer)) <= 35, problem


def test_question_text_is_filled_in(everything: list[Problem]) -> None:
    for problem in everything:
        text = problem.question
        assert not re.search(r"[{}_]|  |\bs\d\b|None", text), text
        assert text[0].isupper() and text.endswith((".", "?")) and text.count("?") == 1, text
        assert not re.search(r"\b(an?|1) \d|[.?] [a-z]|\b(\w+) \2\b", text), text
        in_text = Counter(int(n) for n in re.findall(r"\d+", text))
        assert not Counter(problem.numbers) - in_text, f"a number is not told: {problem}"
        assert set(in_text - Counter(problem.numbers)) <= {2, 3}, f"a stray number: {problem}"


def test_pronouns_agree_with_the_name() -> None:
    female = re.compile(r"\b(she|her)\b", re.IGNORECASE)
    male = re.compile(r"\b(he|his)\b", re.IGNORECASE)
    for problem in word_problems("train", 800):
        assert not (female.search(problem.question) and male.search(problem.question))


def test_there_are_enough_templates_and_all_are_used(
    problems: dict[Split, list[Problem]],
) -> None:
    assert len(templates("train")) >= 36
    assert len(templates("test")) >= 16
    for split in SPLITS:
        assert len(set(templates(split))) == len(templates(split))
        used = Counter(problem.template for problem in problems[split])
        assert set(used) == set(templates(split))
        assert max(used.values()) - min(used.values()) <= 1, "templates take turns"


def test_splits_share_no_template() -> None:
    assert not set(templates("train")) & set(templates("test"))


def test_splits_share_no_numbers(problems: dict[Split, list[Problem]]) -> None:
    drawn = {s: {tuple(sorted(p.numbers)) for p in problems[s]} for s in SPLITS}
    assert not drawn["train"] & drawn["test"]
    for split in SPLITS:
        assert all(number_split(p.numbers) == split for p in problems[split])
    assert number_split((3, 4, 5)) == number_split((5, 3, 4)), "the order does not matter"


def test_test_problems_need_only_reasoning_seen_in_training(
    problems: dict[Split, list[Problem]],
) -> None:
    kinds = {split: {kind(problem) for problem in problems[split]} for split in SPLITS}
    assert kinds["test"] <= kinds["train"]
    assert len(kinds["test"]) >= 12


@pytest.mark.parametrize("split", SPLITS)
def test_no_question_comes_twice(split: Split, problems: dict[Split, list[Problem]]) -> None:
    assert len({problem.question for problem in problems[split]}) == len(problems[split])


@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_same_problems(split: Split) -> None:
    assert word_problems(split, 50, seed=7) == word_problems(split, 50, seed=7)
    assert word_problems(split, 50, seed=7) == word_problems(split, 90, seed=7)[:50]
    assert word_problems(split, 50, seed=7) != word_problems(split, 50, seed=8)


def test_problems_do_not_change_between_releases() -> None:
    first = word_problems("train", 1, seed=0)[0]
    assert (first.template, first.numbers) == FIRST


def test_bad_arguments_are_refused() -> None:
    assert word_problems("test", 0) == []
    with pytest.raises(ConfigError, match="unknown split"):
        word_problems("dev", 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown split"):
        templates("dev")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="negative"):
        word_problems("train", -1)
    with pytest.raises(SourceError, match=r"too few test word problems.*at most \d+"):
        word_problems("test", 10**7)


@pytest.mark.parametrize("step", ["a ** b", "a + c", "s1 + b", "a+b", "a + b + b"])
def test_bad_steps_of_a_template_are_refused(step: str) -> None:
    entry = {"name": "x", "text": "{a} {b}", "numbers": {"a": [2, 3], "b": [2, 3]}}
    assert _template({**entry, "steps": ["a + b", "s1 * 2"]}).work((2, 3)) == (
        ["2+3=5", "5*2=10"],
        10,
    )
    with pytest.raises(SourceError, match="bad step in template x"):
        _template({**entry, "steps": [step]})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3*4=12\n#### 12", 12),
        ("####7", 7),
        ("#### 1,250", 1250),
        ("#### $18.", 18),
        ("#### -4", -4),
        ("#### 9 pens are left", 9),
        ("#### 5\n\nQuestion: more\n#### 6", 5),
        ("the answer is 12", None),
        ("####", None),
        ("#### none\n#### 5", None),
        ("####\n5", None),
        ("#### 7.5", None),
        ("#### 12,34", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: int | None) -> None:
    assert final_number(text) == number
