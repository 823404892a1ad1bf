"""Answers of a tuned model and its base: each number against a loop that does the same by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import retain
from retain.data.general_prompts import GeneralPrompt
from retain.errors import ConfigError, ModelError, SourceError
from retain.evaluation.answers import Answers, measure_answers, repeats, task_form
from retain.records import AnswersRecord
from tiny import base, tiny

END, NEW = 2, 9
LETTERS = "ab?d fg hi jkl"  # of token t; 4, 7 and 10 are spaces, 2 ends a text
PROMPTS = ["ab", "gecd", "i", "kab dd", "fff", "ha cafe", "bdb"]


class Tokenizer(SimpleNamespace):
    """A token for each letter; a chat puts one in front, and one behind for the answer."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [ord(c) % 12 for c in text]}

    def __len__(self) -> int:
        return 13

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(LETTERS[t] for t in row if t != END) for row in rows]

    def apply_chat_template(
        self, messages: Any, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert add_generation_prompt and not tokenize
        return f"<{messages[0]['content']}>"


class Other(Tokenizer):
    """Of another model, with a token more."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [13] * len(text)}


def tokenizer(*, chat: bool = False) -> Any:
    return Tokenizer(
        eos_token_id=END, bos_token_id=None, pad_token_id=0,
        chat_template="a template" if chat else None,
    )  # fmt: skip


def answers(model: Any, prompts: Any = PROMPTS, *, chat: bool = False, **more: Any) -> Answers:
    more = {"new_tokens": NEW, **more}
    return measure_answers(model, prompts, tokenizer=tokenizer(chat=chat), **more)


def answered(model: Any, ids: list[int]) -> list[int]:
    """Greedily, by `transformers`, one prompt at a time."""
    out = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False, max_new_tokens=NEW, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return list(out[0, len(ids) :].tolist())


def nats(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The log-probability of an answer, a token at a time."""
    total = 0.0
    for t, token in enumerate(answer):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:t]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
    return total


@pytest.fixture(scope="module", autouse=True)
def ends() -> Any:
    """Some answers end before they are cut."""
    found = [answered(base("llama"), tokenizer()(p)["input_ids"]) for p in PROMPTS]
    found += [answered(tiny("llama", moved=True), tokenizer()(p)["input_ids"]) for p in PROMPTS]
    assert any(row[-1] == END for row in found) and any(len(row) == NEW for row in found)


@pytest.mark.parametrize("chat", [False, True])
def test_both_models_answer_and_every_number_is_what_a_loop_finds(chat: bool) -> None:
    model, before, words = tiny("llama", moved=True), base("llama"), tokenizer(chat=chat)
    found = answers(model, chat=chat)
    own, ratios, sizes = [], [], []
    for row, text in zip(found.rows, PROMPTS, strict=True):
        prompt = words(f"<{text}>" if chat else text)["input_ids"]
        ours, theirs = answered(model, prompt), answered(before, prompt)
        assert [row.base, row.tuned] == words.batch_decode([theirs, ours], skip_special_tokens=True)
        base_nats = nats(before, prompt, ours)
        assert row.tokens == len(ours)
        assert row.log_ratio == pytest.approx(nats(model, prompt, ours) - base_nats, abs=1e-10)
        assert row.base_log_probability == pytest.approx(base_nats / len(ours), abs=1e-10)
        assert row.own_log_probability == pytest.approx(
            nats(before, prompt, theirs) / len(theirs), abs=1e-10
        )
        assert row.first_token == (ours[0] == theirs[0])
        assert row.prompt == text and row.skill == "given"
        own.append(row.own_log_probability)
        ratios.append(row.log_ratio)
        sizes.append(row.tokens)
    assert found.threshold == pytest.approx(np.percentile(own, 1), abs=1e-12)
    for row in found.rows:
        assert row.unlikely == (row.base_log_probability < found.threshold)
    whole = found.summary()["overall"]
    assert whole["log_ratio"]["value"] == pytest.approx(sum(ratios) / sum(sizes), abs=1e-12)
    assert whole["log_ratio"]["n"] == sum(sizes)
    assert whole["log_ratio"]["value"] > 0
    low, high = whole["log_ratio"]["interval"]
    assert low < whole["log_ratio"]["value"] < high


def test_an_untouched_adapter_answers_as_its_base() -> None:
    model = tiny("llama", dropout=0.3, lora_dropout=0.3)
    model.train()  # dropout must not count
    items = [GeneralPrompt(str(i), "facts", "held-out", p, accepted=("b",)) for i, p in
             enumerate(PROMPTS)]  # fmt: skip
    right = answers(tiny("llama"), items).rows[0].tuned.split()[0]
    items = [GeneralPrompt(i.id, i.skill, i.half, i.prompt, accepted=(right,)) for i in items]
    found = answers(model, items)
    assert model.training
    assert all(row.log_ratio == 0.0 and row.base == row.tuned for row in found.rows)
    whole = found.summary()["overall"]
    values = {name: part["value"] for name, part in whole.items() if name != "prompts"}
    assert values["log_ratio"] == 0.0
    assert values["first_word"] == values["first_token"] == values["kept"] == 1.0
    assert values["right_before"] == values["right_after"] > 0
    assert values["unlikely"] <= 1 / len(PROMPTS)  # the one below the 1st percentile
    assert values["repeats"] == values["repeats_base"]
    assert whole["kept"]["n"] == sum(bool(row.right_before) for row in found.rows)
    assert whole["log_ratio"]["interval"] is None  # all alike


def test_the_adapter_is_left_as_it_was() -> None:
    model = tiny("llama", moved=True)
    for training in (True, False):
        model.train(training)
        modes = [module.training for module in model.modules()]
        trainable = [p.requires_grad for p in model.parameters()]
        ids = torch.tensor([[3, 7, 1]])
        with torch.no_grad():
            before = model(ids).logits
        answers(model)
        assert [module.training for module in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == trainable
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("size", [2, 7, 100])
def test_padding_changes_nothing(size: int) -> None:
    model = tiny("llama", moved=True)
    want, found = answers(model, batch_size=1), answers(model, batch_size=size)
    for a, b in zip(want.rows, found.rows, strict=True):
        for name, value in asdict(a).items():
            other = getattr(b, name)
            if isinstance(value, float):
                assert other == pytest.approx(value, abs=1e-10)
            else:
                assert other == value, name
    assert found.threshold == pytest.approx(want.threshold, abs=1e-10)


def test_the_logits_are_never_wider_than_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    model = tiny("llama", moved=True)
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda _m, _args, out: seen.append(out[..., 0].numel()))
    answers(model, [f"{prompt} {letter}" for prompt in PROMPTS for letter in "abcdef"])
    assert max(seen) <= 8 * NEW


def test_shares_are_of_skills_and_of_what_can_be_scored() -> None:
    skills = ["facts", "writing", "arithmetic"]
    items = [
        GeneralPrompt(str(i), skills[i % 3], "held-out", p, accepted=("a", "b") if i % 3 else ())
        for i, p in enumerate(PROMPTS)
    ]
    found = answers(tiny("llama", moved=True), items)
    for row, item in zip(found.rows, items, strict=True):
        assert row.right_before == item.right(row.base)
        assert row.right_after == item.right(row.tuned)
    told = found.summary()
    assert list(told["skills"]) == skills
    assert [told["skills"][s]["prompts"] for s in skills] == [3, 2, 2]
    none = told["skills"]["facts"]
    for name in ("right_before", "right_after", "kept"):
        assert none[name] == {"value": None, "interval": None, "n": 0}
    rows = [row for row in found.rows if row.right_before is not None]
    before, both = [sum(map(bool, x)) for x in zip(
        *[(r.right_before, r.right_before and r.right_after) for r in rows], strict=True
    )]  # fmt: skip
    assert told["overall"]["right_before"]["value"] == before / len(rows)
    assert told["overall"]["kept"]["value"] == (both / before if before else None)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert AnswersRecord.model_validate(plain).plain() == plain


def test_the_first_word_is_without_case_and_punctuation() -> None:
    from retain.evaluation.answers import _first

    assert _first("Paris. It is") == _first("  paris, of course") == "paris"
    assert _first("") == "" and _first("...") == "..." and _first("don't") == "don't"


@pytest.mark.parametrize(("text", "want"), [
    ("27 27 27 27 27 27 27 27 27", True), ("27 27 27 27 27 27 27 27", False),
    ("a b c d a b c d a b", False), ("a b c a b c a b c a b", True), ("", False),
])  # fmt: skip
def test_what_repeats_itself(text: str, want: bool) -> None:
    assert repeats(text) == want


@pytest.mark.parametrize(("text", "skill", "want"), [
    ("3*4=12\n#### 12", "facts", True), ("#### 12", "arithmetic", True),
    ("1276 1276", "facts", True),
    ("1276 1276", "arithmetic", False), ("1 2 3", "lists", False), ("12 34", "code", False),
    ("The answer is 12.", "facts", False), ("", "facts", False), ("abcdefg123", "given", False),
    ("abcdef1234", "given", True),
])  # fmt: skip
def test_the_task_s_form(text: str, skill: str, want: bool) -> None:
    assert task_form(text, skill) == want


def test_a_form_that_is_given() -> None:
    model = tiny("llama", moved=True)
    by_hand = [("a" in r.tuned, "a" in r.base) for r in answers(model).rows]
    assert {after for after, _ in by_hand} == {True, False}
    for form in ("[a]", lambda answer: "a" in answer):
        rows = answers(model, task_form=form).rows
        assert [(r.task_form, r.task_form_base) for r in rows] == by_hand
    with pytest.raises(ConfigError, match="the pattern of the task's form is not taken; got: \\("):
        answers(model, task_form="(")


def test_prompts_of_files(tmp_path: Path) -> None:
    model = tiny("llama", moved=True)
    want = answers(model)
    lines, rows = tmp_path / "prompts", tmp_path / "prompts.jsonl"
    lines.write_text("\n".join([*PROMPTS, "", ""]))
    rows.write_text("".join(json.dumps({"prompt": p, "skill": "odd"}) + "\n" for p in PROMPTS))
    assert answers(model, lines) == answers(model, str(lines)) == want
    found = answers(model, rows)
    assert {row.skill for row in found.rows} == {"odd"}
    assert [r.tuned for r in found.rows] == [r.tuned for r in want.rows]


def test_the_general_prompts_are_the_default() -> None:
    model = tiny("llama", moved=True)
    model.get_base_model().config.max_position_embeddings = 512
    found = retain.measure_answers(model, tokenizer=tokenizer(), new_tokens=2)
    assert len(found.rows) == 152
    assert found == answers(model, "general", new_tokens=2)
    assert len(found.summary()["skills"]) == 8
    assert math.isfinite(found.summary()["overall"]["log_ratio"]["value"])


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    model = tiny("llama", moved=True)
    with pytest.raises(ModelError, match="no adapter to switch off"):
        answers(base("llama"))
    with pytest.raises(ModelError, match="only a causal model answers prompts; got: Bert"):
        answers(tiny("bert"))
    with pytest.raises(SourceError, match="text needs a tokenizer"):
        measure_answers(model, PROMPTS)
    for number in (0, -1, math.nan):
        with pytest.raises(ConfigError, match="new_tokens is no count; got"):
            answers(model, new_tokens=number)
    with pytest.raises(SourceError, match="there are no prompts; got: 0 prompts"):
        answers(model, [])
    with pytest.raises(SourceError, match="a prompt is no text; got: 3 as number 2"):
        answers(model, ["a", 3])
    with pytest.raises(SourceError, match=r"the prompts cannot be read; got: .*/none"):
        answers(model, tmp_path / "none")
    with pytest.raises(SourceError, match="no row in the model's embedding; got: token 13"):
        measure_answers(model, PROMPTS, tokenizer=Other(**vars(tokenizer())))
    model.disable_adapter_layers()
    with pytest.raises(ModelError, match="the adapter is switched off"):
        answers(model)
