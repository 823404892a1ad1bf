"""The demo's word problems and knowledge probe: true, disjoint, fair, and the same for ever."""

from __future__ import annotations

import re
from collections import Counter
from typing import get_args

import pytest

from retain.data.knowledge import general_questions, knowledge_items
from retain.data.problems import (
    Problem,
    Split,
    final_number,
    number_split,
    templates,
    word_problems,
)
from retain.errors import ConfigError, SourceError

CONSTANTS = {2, 3, 12, 60}  # half and twice, three-point shots, dozens, minutes of an hour
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
SPLITS: tuple[Split, ...] = get_args(Split)


@pytest.fixture(scope="module")
def problems() -> dict[Split, list[Problem]]:
    return {"train": word_problems("train", 1400), "test": word_problems("test", 600)}


@pytest.fixture(scope="module")
def everything(problems: dict[Split, list[Problem]]) -> list[Problem]:
    assert len({p.question for p in problems["train"] + problems["test"]}) == 2000
    return problems["train"] + problems["test"]


def equations(problem: Problem) -> list[tuple[int, str, int, int]]:
    matches = [EQUATION.fullmatch(line) for line in problem.answer.splitlines()[:-1]]
    assert matches and all(matches), problem
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches if m]


def test_equations_are_true_and_chain_from_the_numbers_to_the_result(
    everything: list[Problem],
) -> None:
    for problem in everything:
        steps = equations(problem)
        results = [result for *_, result in steps]
        assert 1 <= len(steps) <= 3
        for index, (left, operator, right, result) in enumerate(steps):
            true = {
                "+": left + right == result, "-": left - right == result,
                "*": left * right == result, "/": left == right * result,
            }  # fmt: skip
            assert true[operator] and result > 1, problem
            assert {left, right} <= {*problem.numbers, *CONSTANTS, *results[:index]}, problem
        operands = Counter(n for left, _, right, _ in steps for n in (left, right))
        assert not Counter(problem.numbers) - operands, f"a number goes unused: {problem}"
        assert not Counter(results[:-1]) - operands, f"a step goes unused: {problem}"
        assert results[-1] == problem.result == final_number(problem.answer)
        assert problem.result not in problem.numbers, f"the question tells: {problem}"
        assert problem.answer.splitlines()[-1] == f"#### {problem.result}"
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
        pronouns = [re.search(rf"\b({p})\b", text, re.I) for p in ("she|her", "he|his")]
        assert not all(pronouns), text


def test_splits_share_no_template_and_no_numbers(problems: dict[Split, list[Problem]]) -> None:
    assert not set(templates("train")) & set(templates("test"))
    assert len(templates("train")) >= 36 and len(templates("test")) >= 16
    drawn = {s: {tuple(sorted(p.numbers)) for p in problems[s]} for s in SPLITS}
    assert not drawn["train"] & drawn["test"]
    assert number_split((3, 4, 5)) == number_split((5, 3, 4)), "the order does not matter"
    kinds = {}
    for split in SPLITS:
        used = Counter(problem.template for problem in problems[split])
        assert sorted(used) == sorted(templates(split))
        assert max(used.values()) - min(used.values()) <= 1, "templates take turns"
        assert all(number_split(p.numbers) == split for p in problems[split])
        kinds[split] = {"".join(o for _, o, _, _ in equations(p)) for p in problems[split]}
    assert kinds["test"] <= kinds["train"] and len(kinds["test"]) >= 12


@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_same_problems(split: Split) -> None:
    assert word_problems(split, 50, seed=7) == word_problems(split, 50, seed=7)
    assert word_problems(split, 50, seed=7) == word_problems(split, 90, seed=7)[:50]
    assert word_problems(split, 50, seed=7) != word_problems(split, 50, seed=8)
    first = word_problems("train", 1, seed=0)[0]
    assert (first.template, first.numbers) == ("half_the_herd", (54, 5)), "the same for ever"


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


@pytest.mark.parametrize(("text", "number"), [
    ("3*4=12\n#### 12", 12), ("####7", 7), ("#### 1,250", 1250), ("#### $18.", 18), ("#### -4", -4),
    ("#### 9 pens are left", 9), ("#### 5\n\nQuestion: more\n#### 6", 5),
    ("the answer is 12", None), ("####", None), ("#### none\n#### 5", None), ("####\n5", None),
    ("#### 7.5", None), ("#### 12,34", None), ("", None),
])  # fmt: skip
def test_final_number(text: str, number: int | None) -> None:
    assert final_number(text) == number


def test_the_knowledge_probe_is_balanced() -> None:
    items = knowledge_items()
    assert Counter(Counter(item.category for item in items).values()) == {25: 12}
    assert Counter(item.answer for item in items) == {0: 75, 1: 75, 2: 75, 3: 75}
    assert len({item.id for item in items}) == 300
    assert len({item.prompt.casefold() for item in items}) == 300
    questions = general_questions()
    assert len(set(questions)) == 6 and all(q.endswith((".", "?")) for q in questions)


def test_the_knowledge_probe_is_fair() -> None:
    for item in knowledge_items():
        assert item.id.startswith(f"{item.category}-")
        assert item.prompt == item.prompt.strip() != ""
        assert not any(c.isdigit() for c in item.prompt), "no arithmetic"
        assert all(option[0] == " " and option[1:] == option.strip() for option in item.options)
        assert len({option.casefold() for option in item.options}) == 4, item
        assert len({option[1].isupper() for option in item.options}) == 1, item
        right = item.options[item.answer]
        assert right.strip().casefold() not in item.prompt.casefold().split(), item
        words = [len(option.split()) for option in item.options]
        assert max(words) <= 3 and max(words) - min(words) <= 1, item
        others = [len(option) for option in item.options if option != right]
        assert min(others) - 3 <= len(right) <= max(others) + 6, f"the length tells: {item}"
        vowels = {option[1].casefold() in "aeiou" for option in item.options}
        article = item.prompt.rpartition(" ")[2]
        assert article not in ("a", "an") or vowels == {article == "an"}, "the article tells"
