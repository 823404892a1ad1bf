"""Certificates: the bounds by brute force, their coverage, and what counts as right."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom
from test_answers import tokenizer

import retain
from retain.data.general_prompts import general_prompts
from retain.errors import ConfigError, ModelError, RetainWarning, SourceError
from retain.evaluation.certify import certify, check_allowed, items_needed, loss_bound
from retain.evaluation.skills import SkillItem, read_skills
from retain.intervals import binomial_lower, binomial_upper
from tiny import base, tiny

WORDS = ["ab", "gecd", "i", "kab dd", "fff", "ha cafe", "bdb"]


def by_bisection(hits: int, n: int, level: float) -> float:
    """The p at which so few hits have the probability 1 - level."""
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        tail = math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(hits + 1))
        low, high = (p, high) if tail > 1 - level else (low, p)
    return high


@pytest.mark.parametrize("n", [1, 2, 7, 30, 149])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.975])
def test_bounds_of_a_probability_are_exact(n: int, level: float) -> None:
    for hits in sorted({0, 1, n // 3, n - 1}):
        upper = binomial_upper(hits, n, level)
        assert upper == pytest.approx(by_bisection(hits, n, level), abs=1e-10)
        if hits < n:
            assert upper == pytest.approx(float(beta.ppf(level, hits + 1, n - hits)), abs=1e-12)
        if hits:
            lower = float(beta.ppf(1 - level, hits, n - hits + 1))
            assert binomial_lower(hits, n, level) == pytest.approx(lower, abs=1e-10)
    assert binomial_upper(n, n, level) == 1 and binomial_lower(0, n, level) == 0
    assert binomial_upper(0, 0, level) == 1 and binomial_lower(0, 0, level) == 0


def test_the_rule_of_three() -> None:
    assert loss_bound(0, 149, 200, 0, 0.95) <= 0.02 < loss_bound(0, 148, 200, 0, 0.95)
    assert items_needed(1.0, 0.02, 0, 0.95) == 149
    assert items_needed(0.5, 0.02, 0, 0.95) == 298
    assert items_needed(0.25, 0.02, 0.25, 0.95) is None
    assert items_needed(0.0, 0.02, 0, 0.95) is None
    n = items_needed(0.8, 0.02, 0.25, 0.95)
    assert n is not None
    assert loss_bound(0, math.floor(0.8 * n), n, 0.25, 0.95) <= 0.02
    assert loss_bound(0, math.floor(0.8 * (n - 1)), n - 1, 0.25, 0.95) > 0.02


@pytest.mark.parametrize(
    ("share", "allowed", "chance"), [(0.55, 0.1, 0.5), (1 / 3, 0.05, 0.25), (0.9, 0.02, 0.0)]
)
def test_so_many_items_and_more_are_enough(share: float, allowed: float, chance: float) -> None:
    """Though with one item more the base may get no more of them right."""
    n = items_needed(share, allowed, chance, 0.95)
    assert n is not None
    more = range(n - 1, n + 200)
    bounds = [loss_bound(0, math.floor(share * m + 1e-9), m, chance, 0.95) for m in more]
    assert bounds[0] > allowed >= max(bounds[1:])


def test_a_bound_with_chance_is_made_of_two() -> None:
    q, p = by_bisection(3, 80, 0.955), 1 - by_bisection(20, 100, 0.995)
    assert loss_bound(3, 80, 100, 0.25, 0.95) == pytest.approx(q / (1 - 0.25 / p), rel=1e-9)
    assert loss_bound(0, 25, 100, 0.25, 0.95) == 1  # no better than chance
    assert loss_bound(40, 50, 100, 0.25, 0.95) == 1
    found = [loss_bound(lost, 60, 100, 0.25, 0.95) for lost in range(61)]
    assert found == sorted(found)


KNOWN, LOST, CHANCE = (0.2, 0.6, 0.95), (0.0, 0.01, 0.05, 0.2, 0.6), (0.0, 0.25, 0.5)


@pytest.mark.parametrize("chance", CHANCE)
@pytest.mark.parametrize("known", KNOWN)
def test_the_bound_covers_by_counting_all_outcomes(chance: float, known: float) -> None:
    """P(bound >= λ), over every R and L of 24 items, whether luck is drawn again or not."""
    n = 24
    right = known + (1 - known) * chance
    bounds = [[loss_bound(lost, r, n, chance, 0.95) for lost in range(r + 1)] for r in range(n + 1)]
    for share in LOST:
        for again in (0.0, 1 - chance):
            q = (known * share * (1 - chance) + (1 - known) * chance * again) / right
            covered = math.fsum(
                binom.pmf(r, n, right) * binom.pmf(lost, r, q)
                for r in range(n + 1)
                for lost in range(r + 1)
                if bounds[r][lost] >= share - 1e-12
            )
            assert covered >= 0.95, (share, again)


@pytest.mark.parametrize("chance", CHANCE)
def test_the_bound_covers_when_items_are_known_lost_and_guessed(chance: float) -> None:
    """The model of the docstring, item by item: 4,000 draws at each of 12 settings."""
    random, n, draws = np.random.default_rng(7), 60, 4000
    cached: dict[tuple[int, int], float] = {}
    for known in (0.4, 0.8):
        for share in (0.02, 0.1, 0.3):
            for again in (False, True):
                knew, lost, luck, fresh = (
                    random.random((draws, n)) < p for p in (known, share, chance, chance)
                )
                before = knew | luck
                after = (
                    (knew & ~lost) | (knew & lost & fresh) | (~knew & (fresh if again else luck))
                )
                pairs = zip((before & ~after).sum(1).tolist(), before.sum(1).tolist(), strict=True)
                hit = 0
                for pair in pairs:
                    if pair not in cached:
                        cached[pair] = loss_bound(*pair, n, chance, 0.95)
                    hit += cached[pair] >= share
                assert hit / draws >= 0.95, (known, share, again)


# --- rows


def items(*rows: dict[str, Any]) -> list[SkillItem]:
    return read_skills([{"skill": "s", "prompt": f"p{i}", **row} for i, row in enumerate(rows)])


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("Paris", "\n  paris.\nIt is big.", True),
        ("the cat", "A cat!", True),
        ("Paris", "It is Paris", False),
        (["a dog", "Hund"], "hund", True),
        (12, "5 + 7 = 12", True),
        (12, "12 of 13", False),
        (-5, "-5", True),
        (5, "10-5", True),
        (-5, "x = \u22125", True),
        (5, "x = \u22125", False),
        (5, "10\u22125", True),
        (1200, "$1,200.00", True),
        (7, "2*3=6\n6+1=7\n#### 7 and 9", True),
        (0.5, "it is .5", True),
        (3, "none", False),
        ("1,200", "1200", True),
        (2**60 + 1, "1152921504606846977", True),
        (2**60 + 1, "1,152,921,504,606,846,976", False),
        ("2.5 kg", "25 kg", False),
    ],
)
def test_right_answers(answer: Any, said: str, right: bool) -> None:
    (item,) = items({"answer": answer})
    assert item.right(said) is right
    assert item.chance == 0


def test_rows() -> None:
    one, two, three = items(
        {"choices": ["x", "y", "z"], "answer": "y"}, {"choices": ["x", "y"], "answer": 1},
        {"accepted": "Rome"},
    )  # fmt: skip
    assert (one.choice, two.choice) == (1, 1)
    assert (one.chance, two.chance, three.chance) == (1 / 3, 0.5, 0)
    assert three.right("I think that it is Rome, in Italy.")
    general = read_skills("general")
    assert [i.prompt for i in general] == [p.prompt for p in general_prompts() if p.scored]
    assert {i.skill for i in general} >= {"facts", "arithmetic"}
    assert read_skills(general) == read_skills(tuple(general)) == read_skills(iter(general))
    rows = [{"skill": "s", "prompt": "p", "answer": "a"}]
    assert read_skills(iter(rows)) == read_skills(rows) and read_skills(general) == general
    with pytest.raises(SourceError, match="an iterator gives its rows once"):
        read_skills(iter(()))


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        ([10, 20, 30], 20, "20"),
        ([0.5, 1.5], 1.5, "1.5"),
        ([10, 20.0], 20, "20.0"),
        ([True, False], True, "True"),
        ([5, True], 1, "True"),
        (["0", "1", "2"], 1, "1"),
        (["10", "20"], 20, "20"),
        ([1, 2, 3], "2", "2"),
        ([1, 2, 3], 3, "3"),
        ([0, 1, 2], 2, "2"),
    ],
)
def test_choices_that_are_numbers(choices: list[Any], answer: Any, right: str) -> None:
    (item,) = items({"choices": choices, "answer": answer})
    assert item.choices[item.choice] == right


@pytest.mark.parametrize(
    ("choices", "answer"), [([1, 2, 3], 2), ([2, 1, 0], 0), (["1", "2", "3"], 1)]
)
def test_a_choice_that_is_the_index_of_another_is_refused(choices: list[Any], answer: int) -> None:
    with pytest.raises(SourceError, match=r'index of another.*row 1.*as a text: "\d" or "\d"'):
        items({"choices": choices, "answer": answer})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"skill": None, "answer": "a"}, "no skill or no prompt"),
        ({"prompt": " ", "answer": "a"}, "no skill or no prompt"),
        ({}, "nothing clear"),
        ({"answer": "a", "accepted": "a"}, "nothing clear"),
        ({"choices": ["a", "b"]}, "nothing clear"),
        ({"choices": ["a"], "answer": "a"}, "told apart"),
        ({"choices": ["a", "a "], "answer": "a"}, "told apart"),
        ({"choices": "ab", "answer": "a"}, "told apart"),
        ({"choices": ["a", "b"], "answer": "c"}, "none of the choices"),
        ({"choices": ["a", "b"], "answer": 2}, "index from 0 to 1"),
        ({"choices": ["a", "b"], "answer": True}, "none of the choices"),
        ({"answer": True}, "cannot be compared"),
        ({"answer": "?!"}, "cannot be compared"),
        ({"answer": []}, "no answer"),
        ({"accepted": 3}, "cannot be compared"),
        ({"answer": "a", "system": "Be short."}, "'system' would be lost"),
        ({"answer": "a", "context": "b"}, "'context' would be lost"),
        ({"answer": "a", "messages": [{"role": "user", "content": "b"}]}, "'messages' would be"),
        ({"answer": "a", "tools": [{"name": "f"}]}, "'tools' would be lost"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=said) as error:
        items({"answer": "a"}, row)
    assert "row 2" in str(error.value) and "; fix: " in str(error.value)


def test_columns_that_say_nothing_to_the_model_are_counted() -> None:
    with pytest.warns(RetainWarning, match=r"columns that are not read: hint \(2 rows\)$"):
        found = items(
            {"answer": "a", "hint": "b", "id": 7}, {"answer": "a", "hint": "c", "system": None}
        )
    assert len(found) == 2


@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz"])
def test_a_number_in_csv_is_a_number(suffix: str, tmp_path: Path) -> None:
    cells = [("a", "2"), ("b", "-0.5"), ("c", "1,200"), ("d", "007"), ("e", "Two")]
    text = "".join(f's;{prompt};"{answer}"\n' for prompt, answer in cells)
    text = f"skill;prompt;answer\n{text}".replace(";", "," if suffix == ".csv" else "\t")
    file = tmp_path / f"items{suffix}"
    file.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    found = read_skills(file)
    assert [i.answers for i in found] == [(2,), (-0.5,), ("1,200",), ("007",), ("Two",)]
    assert found[0].right("It is 2.") and not found[0].right("It is 12.")
    (item,) = items({"answer": "2"})
    assert not item.right("It is 2.")  # a text, where texts can be told


def test_an_item_counts_once() -> None:
    with pytest.raises(SourceError, match="twice"):
        items({"answer": "a", "prompt": "p"}, {"answer": "b", "prompt": "p"})
    read = items({"answer": "a", "prompt": "p"}, {"answer": "a", "prompt": "q"})
    for again in (read[:1], items({"answer": "a", "prompt": "p"})):  # of the same number
        with pytest.raises(SourceError, match=r"twice.*'p' of s as rows 1 and 3"):
            read_skills([*read, *again])


@pytest.mark.parametrize("share", ["2", "0%", "100%", "-1%", "x", 0, 1, True, float("nan"), None])
def test_allowances_that_are_refused(share: Any) -> None:
    with pytest.raises(ConfigError, match="the allowance of s is no share"):
        check_allowed({"s": share}, items({"answer": "a"}))


def test_allowances() -> None:
    known = items({"answer": "a"})
    assert check_allowed({"s": "2%"}, known) == check_allowed({"s": 0.02}, known) == {"s": 0.02}
    with pytest.raises(ConfigError, match="unknown skill"):
        check_allowed({"t": 0.02}, known)
    with pytest.raises(ConfigError, match="nothing says"):
        check_allowed({}, known)


# --- models


def rows_of(model: Any) -> list[dict[str, Any]]:
    """Items of both kinds that a model gets right."""
    words = tokenizer()
    found = certify(
        model,
        [{"skill": "t", "prompt": p, "answer": "x"} for p in WORDS]
        + [{"skill": "c", "prompt": p, "choices": ["ab", "cd", "fg"], "answer": 0} for p in WORDS],
        allow={"t": 0.5, "c": 0.5}, tokenizer=words, new_tokens=9,
    )  # fmt: skip
    return [
        {
            "skill": row["skill"], "prompt": row["prompt"], "answer": row["base"],
            **({"choices": ["ab", "cd", "fg"]} if row["skill"] == "c" else {}),
        }
        for row in found.rows
    ]  # fmt: skip


def test_an_untouched_adapter_loses_nothing_and_a_moved_one_is_counted() -> None:
    model, moved = tiny("llama"), tiny("llama", moved=True)
    model.train()  # dropout must not count, and the mode stays
    rows = [r for r in rows_of(model) if r["answer"].strip(" ?")]
    told = {"tokenizer": tokenizer(), "new_tokens": 9}
    found = retain.certify(model, rows, allow={"t": "60%", "c": 0.999}, **told)
    assert model.training
    assert all(s.lost == s.won == 0 and s.before == s.after == s.items for s in found.skills)
    text, choice = found.skills
    assert (text.items, choice.items) == (6, 7)
    assert text.bound == pytest.approx(1 - 0.025 ** (1 / 6))  # Bonferroni over two
    assert (choice.chance, choice.share, choice.bound) == (1 / 3, 0, 1)
    assert [s.verdict for s in found.skills] == ["held", "broken"] and not found.held
    assert "too few items" in choice.reason and not text.reason
    assert retain.certify(model, rows, allow={"t": 0.4}, **told).held  # one skill: 1 - 0.05^(1/6)

    found = retain.certify(moved, rows, allow={"t": "60%"}, **told)
    for skill in found.skills:
        mine = [r for r in found.rows if r["skill"] == skill.skill]
        n = skill.items
        assert skill.before == n and skill.lost == sum(not r["right_after"] for r in mine) > 0
        assert skill.share == pytest.approx(min(1, skill.lost / (n - n * skill.chance)))
    assert [s.verdict for s in found.skills] == ["broken", ""]
    assert not found.held
    assert found.skills[0].bound == pytest.approx(binomial_upper(found.skills[0].lost, 6, 0.95))
    assert found.to_dict()["skills"][0]["verdict"] == "broken"


def test_a_choice_is_the_likeliest_continuation() -> None:
    model = tiny("llama", moved=True)
    rows = [{"skill": "c", "prompt": p, "choices": ["ab", "cd"], "answer": 0} for p in WORDS]
    found = certify(model, rows, allow={"c": 0.5}, tokenizer=tokenizer())
    for row in found.rows:
        for which, net in (("base", base("llama")), ("tuned", model)):
            nats = []
            for choice in (" ab", " cd"):
                head = tokenizer()(row["prompt"])["input_ids"]
                ids = tokenizer()(choice)["input_ids"]
                with torch.no_grad():
                    logp = net(torch.tensor([head + ids])).logits[0].log_softmax(-1)
                nats.append(sum(float(logp[len(head) - 1 + i, t]) for i, t in enumerate(ids)))
            assert row[which] == ("ab", "cd")[nats.index(max(nats))]


def test_too_few_items_are_told() -> None:
    model = tiny("llama")
    rows = [r for r in rows_of(model) if r["skill"] == "t" and r["answer"].strip(" ?")]
    found = certify(model, rows, allow={"t": "2%"}, tokenizer=tokenizer(), new_tokens=9)
    (skill,) = found.skills
    assert not found.held
    assert skill.needed == 149
    assert skill.reason == "too few items: 149 would be needed at 0 lost"
    wrong = [{**row, "answer": "none"} for row in rows]
    (skill,) = certify(model, wrong, allow={"t": 0.5}, tokenizer=tokenizer()).skills
    assert (skill.share, skill.bound, skill.needed) == (None, 1, None)
    assert "no better than chance" in skill.reason


def test_models_that_are_refused() -> None:
    told: dict[str, Any] = {"allow": {"s": 0.1}, "tokenizer": tokenizer()}
    asked = items({"answer": "a"}, {"choices": ["a", "b"], "answer": 0})
    with pytest.raises(ModelError, match="no adapter"):
        certify(base("llama"), asked, **told)
    with pytest.raises(ModelError, match="only a causal model"):
        certify(tiny("bert"), asked, **told)
    broken = tiny("llama", moved=True)
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lora_B" in n).fill_(float("nan"))
    for item in asked:  # a written answer alone tells too
        with pytest.raises(ModelError, match="not finite"):
            certify(broken, [item], **told)
    with pytest.raises(ConfigError, match="new_tokens"):
        certify(broken, asked, new_tokens=0, **told)
    with pytest.raises(SourceError, match="tokenizer"):
        certify(tiny("llama"), asked, allow={"s": 0.1})
