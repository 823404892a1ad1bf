"""The general prompts: two halves that are apart, and scorers that can be wrong."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from retain.data.general_prompts import (
    SKILLS,
    GeneralPrompt,
    Half,
    general_prompts,
    mixed_prompts,
    prompt_texts,
    read_prompts,
    spread_prompts,
)
from retain.errors import ConfigError, RetainWarning, SourceError
from retain.records import RunEvaluation

HELD, SOURCE = general_prompts(), general_prompts(half="source")
ALL = [*HELD, *SOURCE]


def words(text: str) -> set[str]:
    return set(re.findall(r"[\w']+", text.casefold()))


def test_each_skill_has_two_halves() -> None:
    pairs = product(SKILLS, ("held-out", "source"))
    sizes = dict.fromkeys(pairs, 19) | {("facts", "source"): 38}
    assert Counter((p.skill, p.half) for p in ALL) == sizes
    assert len({p.id for p in ALL}) == len({p.prompt.casefold() for p in ALL}) == 323
    numbers = [p for p in SOURCE if p.skill == "facts" and p.accepted[0][0].isdigit()]
    assert len(numbers) == 19
    for skill in SKILLS:
        assert general_prompts(skill) == [p for p in HELD if p.skill == skill]
    capitals = {"What is the capital of France?", "What is the capital of Italy?"}
    assert capitals <= {p.prompt for p in general_prompts("facts")}


def test_as_many_prompts_as_there_are_may_be_asked_in_a_study() -> None:
    assert {p.id for p in spread_prompts(len(HELD))} == {p.id for p in HELD}
    assert RunEvaluation(own_answers=len(HELD)).own_answers == len(HELD)
    with pytest.raises(ValueError, match="own_answers"):
        RunEvaluation(own_answers=len(HELD) + 1)


@pytest.mark.parametrize("half", ["source", "held-out"])
def test_any_beginning_has_each_skill_in_its_share(half: Half) -> None:
    skill = {p.prompt: p.skill for p in ALL}
    every = general_prompts(half=half)
    orders = [mixed_prompts(half, seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == sorted(p.prompt for p in every)
        for count in range(len(order)):
            found = Counter(skill[text] for text in order[:count])
            for name, whole in Counter(p.skill for p in every).items():
                assert abs(found[name] - whole * count / len(every)) <= 2, (name, count)


def test_no_prompt_is_near_one_of_the_other_half() -> None:
    for a, b in product(HELD, SOURCE):
        x, y = words(a.prompt), words(b.prompt)
        assert len(x & y) <= len(x | y) / 2, (a.prompt, b.prompt)


def test_the_prompts_are_fair() -> None:
    for p in ALL:
        assert p.id.startswith(f"{p.skill}-")
        assert p.prompt == p.prompt.strip() and len(p.prompt) <= 100, p
        assert p.scored == (p.skill in {"facts", "translation", "arithmetic", "lists", "code"})
        if p.skill in {"facts", "translation", "arithmetic"}:
            assert p.accepted and not p.right(p.prompt), f"the prompt tells: {p}"
        if p.skill != "arithmetic":
            assert not any(c.isdigit() for c in p.prompt), p
        assert bool(p.form) == (p.skill == "lists") and bool(p.contains) == (p.skill == "code")
        assert not p.right("")
        for word in p.accepted:
            assert p.right(f"I think that it is {word}, but ask somebody.")


def test_an_accepted_word_is_a_whole_one_near_the_beginning() -> None:
    paris = GeneralPrompt("a", "facts", "held-out", "?", accepted=("Paris", "the city of light"))
    for answer in ("Paris", "It is PARIS.", "**Paris**", "the City of Light!", "a " * 23 + "paris"):
        assert paris.right(answer), answer
    for answer in ("Parisian", "comparis", "paris1", "", "a " * 24 + "paris", "the city"):
        assert paris.right(answer) is False, answer
    assert GeneralPrompt("a", "writing", "held-out", "?").right("Paris") is None


@pytest.mark.parametrize(("form", "answer", "want"), [
    ("commas:3", "Red, blue, green.", True), ("commas:3", "Sure: red, blue, green", True),
    ("commas:3", "red, blue", False), ("commas:3", "red, blue, green, pink", False),
    ("commas:3", "Here they are:\nred, light blue, green", True), ("commas:3", "", False),
    ("commas:2", "When I was young I went away, and I never came back", False),
    ("commas:3", "red,, blue", False), ("bullets:2", "- a\n- b", True),
    ("bullets:2", "Sure!\n\n* a\n* b\n", True), ("bullets:2", "• a", False),
    ("bullets:2", "- a\n- b\n- c", False), ("bullets:2", "1. a\n2. b", False),
    ("numbered:2", "1. a\n2. b", True), ("numbered:2", "1) a\n2) b", True),
    ("numbered:2", "1. a\n1. b", False), ("numbered:2", "2. a\n3. b", False),
    ("numbered:2", "1. a\n2.", False),
])  # fmt: skip
def test_forms_of_lists(form: str, answer: str, want: bool) -> None:
    assert GeneralPrompt("a", "lists", "held-out", "?", form=form).right(answer) is want


def test_code_has_to_contain_all() -> None:
    item = GeneralPrompt("a", "code", "held-out", "?", contains=("def ", "return"))
    assert item.right("```python\ndef add(a, b):\n    return a + b")
    assert item.right("def add(a, b): print(a)") is False


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown skill; got: 'fact'; .*did you mean 'facts'\?"):
        general_prompts("fact")
    with pytest.raises(ConfigError, match="unknown half"):
        general_prompts(half="train")  # type: ignore[arg-type]


# --- prompts of users


def test_prompts_that_are_given(tmp_path: Path) -> None:
    assert read_prompts("general") == HELD and prompt_texts("general") == [p.prompt for p in SOURCE]
    assert read_prompts(HELD[:3]) == HELD[:3]
    (text, row) = read_prompts([" a \n", {"prompt": "b", "skill": "odd", "accepted": "yes"}])
    assert (text.prompt, text.skill, text.scored) == ("a", "given", False)
    assert (row.prompt, row.skill, row.right("Yes.")) == ("b", "odd", True)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "b", "accepted": ["yes", "ja"]}) + "\n")
    assert read_prompts(path)[0].right("ja") is True
    rows = [{"prompt": "a b", "completion": "c", "context": "b", "system": ""}, "d"]
    said = "columns that are not read: completion (1 rows), context (1 rows)"
    with pytest.warns(RetainWarning, match=re.escape(said)):
        read_prompts(rows)
    path = tmp_path / "a.txt"
    path.write_text("one\n\n two \n")
    assert prompt_texts(path) == prompt_texts(iter(["one", "two"])) == ["one", "two"]


@pytest.mark.parametrize(("prompts", "said"), [
    ([], "there are no prompts"), ({"prompt": "a"}, "no prompts; got: {'prompt': 'a'}"),
    (5, "no prompts; got: 5"), ([" "], "a prompt is no text; got: ' ' as number 1"),
    ([{"text": "a"}], "a prompt is no text"), ([{"prompt": "a", "skill": 3}], "is no text; got"),
    ([{"prompt": "a", "accepted": [3]}], "what is told of a prompt is no text"),
    ([{"prompt": "a", "accepted": 3}], "what is told of a prompt is no text"),
    ([{"prompt": "a", "accepted": ["b", ""]}], "what is told of a prompt is no text"),
    ([{"prompt": "a", "system": "b"}], "'system' would be lost: a prompt is asked alone; got"),
    ([{"prompt": "a", "context": "b"}], "context beside prompt in row 1"),
    ("nowhere/prompts", "the prompts cannot be read; got: nowhere/prompts: No such file"),
    ("nowhere/prompts.jsonl", "no such source; got"), ("generl", "cannot be read; got: generl"),
])  # fmt: skip
def test_what_is_no_prompt(prompts: Any, said: str) -> None:
    with pytest.raises(SourceError, match=re.escape(said)) as caught:
        read_prompts(prompts)
    assert "; fix: " in str(caught.value)


def test_a_file_of_bytes_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00")
    for place, said in ((path, "no UTF-8 text"), (tmp_path, "no regular file")):
        with pytest.raises(SourceError, match=f"the prompts cannot be read.*{said}"):
            read_prompts(place)
    path.write_text("\n \n")
    with pytest.raises(SourceError, match="there are no prompts"):
        read_prompts(path)
