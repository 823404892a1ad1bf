"""Tokens and what is learned of them, against what TRL's SFTTrainer makes of the same rows.

TRL writes a second end token where the tokenizer's post-processor writes one too; here there is
one, so it is taken off before comparing. Formats that TRL does not read are compared with the rows
that docs/data.md says they become.
"""

from __future__ import annotations

import contextlib
import io
import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers_made import MARKED, TOKENIZERS, made
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer, chat_template_utils

from retain.data.sources import encode

Pairs = list[tuple[list[int], list[bool]]]
Row = dict[str, Any]

TOOL: Row = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}},
}  # fmt: skip


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


CALL: Row = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather",
        "arguments": {"t": "Ulm"}}}],
}  # fmt: skip
CHAT = [user("hi you"), assistant("yo, é!"), user("2+2?"), assistant("4")]
WITH_TOOLS = [user("Rain in Ulm?"), CALL, {"role": "tool", "content": "dry"}, assistant("No.")]
IDS = [3, 20, 21, 22, 23, 1]


@dataclass
class Format:
    """Rows, the same as TRL reads them, and how both are asked for the loss."""

    rows: list[Row]
    for_trl: list[Row] | None = None
    loss: str = "assistant"
    trl: dict[str, Any] = field(default_factory=dict)
    max_length: int = 400
    marked: bool = False


def alpaca(instruction: str, given: str) -> str:
    paired = ", paired with an input that provides further context" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
        f"{f'### Input:{chr(10)}{given}{chr(10) * 2}' if given else ''}### Response:\n"
    )


ASSISTANT = {"assistant_only_loss": True}
FORMATS: dict[str, Format] = {
    "text": Format([{"text": "Hello you."}, {"text": "Hello.</s>"}, {"text": " a b\n"}]),
    "text, cut": Format([{"text": "Hello you."}, {"text": "Hi"}], max_length=6),
    "prompt + completion": Format([{"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=\n",
        "completion": "4</s>"}, {"prompt": "hi", "completion": " you"}, {"prompt": "say nothing:",
        "completion": ""}]),
    "prompt + completion, all": Format([{"prompt": "2+2=", "completion": "4"}, {"prompt": "a",
        "completion": "b"}], loss="all", trl={"completion_only_loss": False}),
    "prompt + completion, cut": Format([{"prompt": "2+2=", "completion": "four"},
        {"prompt": "long enough", "completion": "4"}, {"prompt": "2", "completion": "4"}],
        max_length=7),
    "prompt + completion, all, cut": Format([{"prompt": "long enough", "completion": "4"},
        {"prompt": "2", "completion": "4"}], loss="all", trl={"completion_only_loss": False},
        max_length=7),
    "messages, all": Format([{"messages": CHAT}, {"messages": CHAT[:2]}], loss="all"),
    "messages, assistant": Format([{"messages": CHAT}, {"messages": CHAT[:3]}], trl=ASSISTANT,
        marked=True),
    "messages, assistant, cut": Format([{"messages": CHAT}, {"messages": CHAT[:2]}], trl=ASSISTANT,
        marked=True, max_length=31),
    "messages, tools": Format([{"messages": WITH_TOOLS, "tools": [TOOL]}], trl=ASSISTANT,
        marked=True),
    "messages, tools as JSON": Format([{"messages": WITH_TOOLS, "tools": json.dumps([TOOL])}],
        loss="all"),
    "messages, chat_template_kwargs": Format([{"messages": CHAT,
        "chat_template_kwargs": {"note": "be brief"}}], loss="all"),
    "messages as JSON": Format([{"messages": json.dumps(CHAT)}], [{"messages": CHAT}], "all"),
    "messages, system column": Format([{"system": "Brief.", "messages": CHAT}],
        [{"messages": [{"role": "system", "content": "Brief."}, *CHAT]}], trl=ASSISTANT,
        marked=True),
    "conversations": Format([{"conversations": [{"from": m["role"],
        "value": m["content"]} for m in CHAT]}], loss="all"),
    "ShareGPT": Format([{"conversations": [{"from": {"user": "human",
        "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]}],
        [{"messages": CHAT}], trl=ASSISTANT, marked=True),
    "prompt + completion of messages": Format([{"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"prompt": CHAT[:3], "completion": CHAT[3:]}]),
    "prompt + completion of messages, tools": Format([{"prompt": WITH_TOOLS[:1],
        "completion": WITH_TOOLS[1:], "tools": [TOOL]}]),
    "preference": Format([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}], [{"prompt": "2+2=",
        "completion": "4"}]),
    "preference of messages": Format([{"prompt": CHAT[:1], "chosen": CHAT[1:2],
        "rejected": [assistant("no")]}], [{"prompt": CHAT[:1], "completion": CHAT[1:2]}]),
    "preference, implicit prompt": Format([{"chosen": CHAT[:2], "rejected": [CHAT[0],
        assistant("no")]}], [{"prompt": CHAT[:1], "completion": CHAT[1:2]}]),
    "Alpaca": Format([{"instruction": "Add.", "input": "2 2", "output": "4"},
        {"instruction": "Sing.", "input": "", "output": "la"}], [{"prompt": alpaca("Add.", "2 2"),
        "completion": "4"}, {"prompt": alpaca("Sing.", ""), "completion": "la"}], max_length=900),
    "OpenOrca": Format([{"system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        {"system_prompt": "", "question": "2+2?", "response": "4"}], [{"prompt": [{"role": "system",
        "content": "Be brief."}, user("2+2?")], "completion": [assistant("4")]},
        {"prompt": [user("2+2?")], "completion": [assistant("4")]}]),
    "prompt + response": Format([{"prompt": "2+2=", "response": "4"}], [{"prompt": "2+2=",
        "completion": "4"}]),
    "question with context": Format([{"context": "On the Danube.", "question": "Where?",
        "answer": "Ulm"}, {"context": "C", "question": "Q", "answer": None,
        "answers": {"text": ["A", "B"]}}], [{"prompt": "On the Danube.\nWhere?\n",
        "completion": "Ulm"}, {"prompt": "C\nQ\n", "completion": "A"}]),
    "input_ids": Format([{"input_ids": IDS}, {"input_ids": IDS[:3]}]),
    "input_ids, cut": Format([{"input_ids": IDS}, {"input_ids": IDS[:3]}], max_length=4),
    "input_ids, labels": Format([{"input_ids": IDS, "labels": [-100, -100, *IDS[2:]],
        "attention_mask": [1] * 6}]),
    "input_ids, completion_mask": Format([{"input_ids": IDS, "completion_mask": [0, 0, 0, 1, 1,
        1]}], trl={"completion_only_loss": True}),
    "input_ids, assistant_masks": Format([{"input_ids": IDS, "assistant_masks": [0, 1, 1, 0, 1,
        1]}]),
    "input_ids, padded left": Format([{"input_ids": [2, 2, *IDS], "attention_mask": [0, 0,
        *[1] * 6]}], [{"input_ids": IDS}]),
    "input_ids, padded right": Format([{"input_ids": [*IDS, 2], "attention_mask": [*[1] * 6, 0],
        "labels": [*IDS, -100]}], [{"input_ids": IDS}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def of_trl(
    model: Any, tokenizer: Any, rows: list[Row], folder: Path, max_length: int, **more: Any
) -> Pairs:
    """Tokens of each row, and which of them but the first are learned."""
    args = SFTConfig(
        str(folder), report_to=[], use_cpu=True, bf16=False, max_length=max_length, **more
    )
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    return [
        (list(r["input_ids"]), [label != -100 for label in r["labels"]][1:])
        for r in trainer.train_dataset
    ]


def of_retain(rows: list[Row], tokenizer: Any, form: Format) -> Pairs:
    found = encode(
        rows,
        tokenizer,
        max_length=form.max_length,
        causal=True,
        loss=form.loss,  # type: ignore[arg-type]
    )
    return [([*e.tokens, e.targets[-1]], list(e.predict)) for e in found]


def one_end(pairs: Pairs, end: int) -> Pairs:
    return [
        (ids[:-1], [*learned[:-2], any(learned[-2:])]) if ids[-2:] == [end, end] else (ids, learned)
        for ids, learned in pairs
    ]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_as_sfttrainer_makes_them(
    name: str, kind: str, model: Any, tmp_path: Path
) -> None:
    form = FORMATS[name]
    tokenizer = made(**TOKENIZERS[kind], **({"template": MARKED} if form.marked else {}))
    rows = deepcopy(form.rows)
    got = of_retain(rows, tokenizer, form)
    assert rows == form.rows  # encode leaves them alone
    want = of_trl(
        model, tokenizer, deepcopy(form.for_trl or form.rows), tmp_path, form.max_length, **form.trl
    )
    assert got == one_end(want, tokenizer.eos_token_id)


def test_trl_writes_two_ends_and_retain_one(model: Any, tmp_path: Path) -> None:
    tokenizer = made(bos=True, eos=True)
    rows: list[Row] = [{"prompt": "2+2=", "completion": "4"}]
    assert of_trl(model, tokenizer, rows, tmp_path, 99)[0][0][-2:] == [1, 1]
    assert of_retain(rows, tokenizer, Format(rows))[0][0][-2:] != [1, 1]


KNOWN = {
    "qwen2.5": chat_template_utils.qwen2_5_chat_template,
    "qwen3": chat_template_utils.qwen3_chat_template,
    "llama3": chat_template_utils.llama3_chat_template,
    "gemma": chat_template_utils.gemma_chat_template,
    "phi3": chat_template_utils.phi3_chat_template,
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_templates_that_trl_knows(name: str, loss: str, model: Any, tmp_path: Path) -> None:
    tokenizer = made(bos=True, template=KNOWN[name])
    rows: list[Row] = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    form = Format(rows, loss=loss)
    got = of_retain(rows, tokenizer, form)
    only = {"assistant_only_loss": loss == "assistant"}
    assert got == of_trl(model, tokenizer, rows, tmp_path, form.max_length, **only)


@pytest.mark.parametrize("name", ["llama3", "gemma", "phi3"])
def test_turns_found_by_comparing_are_those_that_trl_marks(
    name: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made(bos=True, template=KNOWN[name])
    rows: list[Row] = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    want = of_trl(model, tokenizer, rows, tmp_path, 400, assistant_only_loss=True)

    def unknown(*_: Any) -> None:
        raise ValueError

    monkeypatch.setattr(chat_template_utils, "get_training_chat_template", unknown)
    assert of_retain(rows, tokenizer, Format(rows)) == want
