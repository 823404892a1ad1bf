"""Scores of tasks: a decoder's by ranking and by generation, an encoder's by its columns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from letters import Letters, logp

import tiny
from retain.data.specs import Item, TaskSpec
from retain.errors import ConfigError, ModelError, SourceError
from retain.evaluation import general
from retain.evaluation.generation import generate
from retain.evaluation.score import Score, _extract, _number, _until, score_task

CHOICES = [
    Item("abc", (" a", " bc", " d"), 1, ("abc",), "x"),
    Item("kji", (" a", " bc", " d"), 0, ("kji", "ab"), "x"),
    Item("ab", (" fg", " ed"), 1, ("ab",), "y"),
    Item("fgd", (" a", " bc", " d"), 2, ("fgd",), "z"),
    Item("ddc", (" k", " hc", " d"), 2, ("ddc", "c"), "z"),
]


def score(model: Any, items: list[Item], tokenizer: Any = None, **asked: Any) -> Score:
    """Of a task, of choices by default; `columns` and `batch_size` are no parts of it."""
    more = {name: asked.pop(name) for name in ("columns", "batch_size") if name in asked}
    choices = {"name": "t", "max_length": 256, "pattern": "", "kind": "choice"}
    spec = TaskSpec.model_construct(**choices | {"metric": "accuracy"} | asked)
    return score_task(model, tokenizer or Letters(), spec, items, **more)


@pytest.fixture
def decoder() -> torch.nn.Module:
    return tiny.tiny("llama", moved=True)


def test_choice_by_ranking(decoder: torch.nn.Module) -> None:
    scores = [[logp(decoder, i.prompt, o) for o in i.options] for i in CHOICES]
    best = [max(range(len(s)), key=s.__getitem__) for s in scores]
    right = [float(b == i.answer) for b, i in zip(best, CHOICES, strict=True)]
    assert 0 < sum(right) < len(right)
    for size in (1, 16):
        more = ("f1_macro", "group_em", "exact_match")
        got = score(decoder, CHOICES, metrics=more, batch_size=size)
        assert got.value == got.extras["exact_match"] == sum(right) / len(right)
        loss = -sum(s[int(i.answer)] for s, i in zip(scores, CHOICES, strict=True)) / len(right)
        assert got.loss == pytest.approx(loss, abs=1e-4)
        groups = {"x": 1.0, "y": 1.0, "z": 1.0}
        for item, one in zip(CHOICES, right, strict=True):
            groups[item.group] *= one
        assert got.extras["group_em"] == pytest.approx(sum(groups.values()) / 3)
        assert got.count == 5


def test_references_of_a_choice_are_texts(decoder: torch.nn.Module) -> None:
    scores = [logp(decoder, "abc", o) for o in (" a", " bc")]
    best = max((0, 1), key=scores.__getitem__)
    texts = ("a", "bc")
    items = [Item("abc", (" a", " bc"), 1 - best, references=("k", texts[best]))]
    got = score(decoder, items, metric="token_f1")
    assert got.value == 1.0
    assert score(decoder, items).value == 0.0


def test_generation_with_a_pattern(decoder: torch.nn.Module) -> None:
    prompts = ["abcdef", "a", "gh", "ik"]
    texts = generate(decoder, Letters(), prompts, max_new_tokens=6)
    assert texts == ["fffe", "keeee", "egkee", "eeeg"]
    items = [Item(p, (), "z" + t[1] + "q") for p, t in zip(prompts, texts, strict=True)]
    items[2] = Item(prompts[2], (), "zkq")
    asked = {"kind": "generate", "metric": "exact_match", "max_new_tokens": 6}
    got = score(decoder, items, pattern=r"^.(.)", **asked)
    assert got.value == 0.75
    assert got.extras["unparsed"] == 0
    assert got.loss is not None and got.loss > 0
    never = score(decoder, items, pattern="#### (.*)", **asked)
    assert (never.value, never.extras["unparsed"]) == (0.0, 1.0)
    items = [Item(p, (), t[:2]) for p, t in zip(prompts, texts, strict=True)]
    cut = score(decoder, items, stop=["fe", "kee"], **asked)
    assert cut.value == 0.5


def test_the_final_answer_in_a_text() -> None:
    text = "3 * 4 = 12 apples\n#### $1,200.\nQuestion: 5"
    assert _extract(text, r"#### (.+)") == "$1,200."
    assert _extract(text, r"\d+") == "3"
    assert _extract("none", r"#### (.+)") is None
    assert _extract(" whole ", None) == "whole"
    assert _until(text, ["Question", "\n"]) == "3 * 4 = 12 apples"
    assert _until(text, []) == text
    assert (_number("about -3.5 or 4"), _number("x")) == (-3.5, None)
    assert _number("about \u22123.5") == -3.5


def test_an_encoder_answers_with_its_columns() -> None:
    model = tiny.base("bert")
    with torch.no_grad():
        outputs = []
        for item in CHOICES:
            ids = Letters()(*item.texts)["input_ids"]
            outputs.append(model(torch.tensor([ids])).logits[0])
    for columns in (None, slice(0, 2), slice(1, 3)):
        own = [o[columns] if columns else o for o in outputs]
        best = [int(o.argmax()) for o in own]
        width = len(own[0])
        items = [Item("", (), i % width, item.texts) for i, item in enumerate(CHOICES)]
        got = score(model, items, columns=columns, batch_size=2)
        right = [b == i.answer for b, i in zip(best, items, strict=True)]
        assert got.value == sum(right) / len(right)
        loss = [-float(o.log_softmax(-1)[int(i.answer)]) for o, i in zip(own, items, strict=True)]
        assert got.loss == pytest.approx(sum(loss) / len(loss), abs=1e-9)
    numbers = [Item("", (), float(i), item.texts) for i, item in enumerate(CHOICES)]
    got = score(model, numbers, kind="regression", metric="pearson", columns=slice(2, 3))
    values = torch.tensor([float(o[2]) for o in outputs], dtype=torch.float64)
    wanted = torch.corrcoef(torch.stack([values, torch.arange(5.0, dtype=torch.float64)]))[0, 1]
    assert got.value == pytest.approx(float(wanted))
    assert got.loss is None


def test_a_decoder_may_write_a_number(decoder: torch.nn.Module) -> None:
    class Digits(Letters):
        """Writes each id as a digit and a point; reads a digit as a letter."""

        def __call__(self, text: str, *rest: str, **options: object) -> dict[str, list[int]]:
            return super().__call__(
                "".join("abcdefghij"[int(c)] if c.isdigit() else c for c in text)
            )

        def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
            return [f"it is {row[0]}.{row[1]} or 7" if row[0] != 5 else "?" for row in rows]

    prompts = ["abcdef", "a", "gh", "ik", "dca"]
    texts = generate(decoder, Digits(), prompts, max_new_tokens=2)
    numbers = [0.0 if t == "?" else float(t.split()[2]) for t in texts]
    assert 0 < texts.count("?") < 4
    items = [Item(p, (), n + 1) for p, n in zip(prompts, numbers, strict=True)]
    got = score(decoder, items, Digits(), kind="regression", metric="pearson", max_new_tokens=2)
    assert got.value == pytest.approx(1.0)
    assert got.extras["unparsed"] == texts.count("?") / 5


def test_training_mode_and_weights_stay(decoder: torch.nn.Module) -> None:
    decoder.train()
    before = {n: p.clone() for n, p in decoder.named_parameters()}
    score(decoder, CHOICES)
    assert decoder.training
    assert all(torch.equal(p, before[n]) for n, p in decoder.named_parameters())


def test_mistakes_are_named(decoder: torch.nn.Module) -> None:
    with pytest.raises(SourceError, match="no rows"):
        score(decoder, [])
    bert = tiny.base("bert")
    for model, item, kind, said in (
        (decoder, Item("a", (), 1), "choice", "cannot be asked"),
        (bert, Item("a", (), "b", ("a",)), "generate", "cannot be asked"),
        (bert, Item("a", (" a",), 0), "choice", "cannot be asked"),
        (bert, Item("", (), 3, ("a",)), "choice", "columns"),
    ):
        with pytest.raises(ConfigError, match=said):
            score(model, [item], kind=kind)
    with pytest.raises(ConfigError, match="no room"):
        score(decoder, [Item("a", (), "b")], kind="generate", metric="exact_match",
              max_new_tokens=300)  # fmt: skip
    assert math.isfinite(logp(decoder, "a", "b"))


@pytest.mark.parametrize(
    ("model", "kind", "metric"),
    [
        ("llama", "choice", "accuracy"), ("llama", "generate", "exact_match"),
        ("bert", "choice", "accuracy"), ("bert", "regression", "pearson"),
    ],
)  # fmt: skip
def test_predictions_that_are_not_finite_are_no_score(model: str, kind: str, metric: str) -> None:
    broken, items = tiny.base(model), CHOICES
    if kind != "choice":
        answers = [i.prompt if kind == "generate" else float(len(i.prompt)) for i in CHOICES]
        items = [Item(i.prompt, (), a, i.texts) for i, a in zip(CHOICES, answers, strict=True)]
    assert score(broken, items, kind=kind, metric=metric, max_new_tokens=2).count == 5
    with torch.no_grad():
        list(broken.parameters())[-1].fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        score(broken, items, kind=kind, metric=metric, max_new_tokens=2)


def test_a_limit_is_for_common_knowledge_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def right(model: object, tokenizer: object, limit: int | None = None, **_: bool) -> list[bool]:
        asked.append(limit)
        return [True, False]

    monkeypatch.setattr(general, "knowledge_right", right)
    model: Any = object()
    assert general.general_scores(model, model, ["knowledge"], limit=7) == {"knowledge": 0.5}
    assert asked == [7]
