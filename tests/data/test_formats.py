"""Which columns of a row are read, which are passed over, and which are refused, and why."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import pytest
from tokenizers_made import CHATML, MARKED, TOKENIZERS, made

from retain.data.columns import _CHANGES, _NO_TEXT
from retain.data.counts import RowCounts
from retain.data.sources import encode
from retain.data.tokens import fit_prompt, tokenize
from retain.errors import ConfigError, SourceError

Row = dict[str, Any]

TOKENIZER = made(bos=True)
HI: Row = {"role": "user", "content": "hi"}
YO: Row = {"role": "assistant", "content": "yo"}
CHAT = [HI, YO]
TOOL: Row = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}


def read(
    row: Row, *, causal: bool = True, max_length: int = 900, **more: Any
) -> tuple[str, str, RowCounts]:
    """A row's text as it is trained on, what of it is learned, and the counts."""
    tokenizer = made(bos=True)
    counts = RowCounts()
    found = encode([row], tokenizer, max_length=max_length, causal=causal, counts=counts, **more)[0]
    if not causal:
        return str(tokenizer.decode(found.tokens)), "", counts
    learned = [t for t, p in zip(found.targets, found.predict, strict=True) if p]
    whole = tokenizer.decode([*found.tokens, found.targets[-1]])
    return str(whole), str(tokenizer.decode(learned)), counts


SO = made()("so")["input_ids"]
TURN = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

ANSWERED = (f"{TURN}yo<|im_end|>\n", "yo<|im_end|>\n")
WITH_SYSTEM = (f"<|im_start|>system\nS<|im_end|>\n{TURN}yo<|im_end|>\n", "yo<|im_end|>\n")

READ: dict[str, tuple[Row, str, str]] = {
    "text": ({"text": "so"}, "<s>so</s>", "so</s>"),
    "content": ({"content": "so"}, "<s>so</s>", "so</s>"),
    "text, title beside it": ({"title": "A", "url": "u", "text": "so"}, "<s>so</s>", "so</s>"),
    "prompt + completion": ({"prompt": "a", "completion": "b"}, "<s>ab</s>", "b</s>"),
    "prompt + response": ({"prompt": "a", "response": "b"}, "<s>ab</s>", "b</s>"),
    "messages": ({"messages": CHAT}, f"{TURN}yo<|im_end|>\n", "yo<|im_end|>\n"),
    "messages as JSON": ({"messages": json.dumps(CHAT)}, *ANSWERED),
    "messages of numpy": ({"messages": np.array(CHAT, dtype=object)}, *ANSWERED),
    "messages in parts": ({"messages": [{"role": "user", "content": [{"type": "text",
        "text": "hi"}]}, YO]}, *ANSWERED),
    "messages, one of them named None": ({"messages": [{**HI, "name": None, "tool_calls": None},
        YO]}, *ANSWERED),
    "messages and the prompt again": ({"prompt": "hi", "prompt_id": "7", "messages": CHAT},
        *ANSWERED),
    "messages that weigh 1": ({"messages": [HI, {**YO, "weight": 1}]}, *ANSWERED),
    "conversations": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt",
        "value": "yo"}]}, *ANSWERED),
    "conversations and a system prompt": ({"system": "S", "conversations": [{"from": "human",
        "value": "hi"}, YO]}, *WITH_SYSTEM),
    "prompt + completion of messages": ({"prompt": [HI], "completion": [YO]}, *ANSWERED),
    "prompt of messages, system beside it": ({"prompt": [HI], "completion": [YO], "system": "S"},
        *WITH_SYSTEM),
    "OpenOrca": ({"id": "1", "system_prompt": "S", "question": "hi", "response": "yo"},
        *WITH_SYSTEM),
    "SQuAD": ({"id": "1", "title": "T", "context": "C", "question": "Q", "answers": {"text": ["A",
        "B"], "answer_start": [0, 1]}}, "<s>C\nQ\nA</s>", "A</s>"),
    "BoolQ": ({"passage": "C", "question": "q", "answer": "yes"}, "<s>C\nq\nyes</s>", "yes</s>"),
    "GSM8K": ({"question": "q", "answer": "4"}, "<s>q\n4</s>", "4</s>"),
    "GSM8K with its text": ({"question": "q", "answer": "4", "text": "Q: q A: 4"},
        "<s>Q: q A: 4</s>", "Q: q A: 4</s>"),
    "Alpaca with its text": ({"instruction": "Add.", "input": "2 2", "output": "4",
        "text": "Add. 2 2 -> 4"}, "<s>Add. 2 2 -> 4</s>", "Add. 2 2 -> 4</s>"),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "<s>ab</s>", "b</s>"),
    "preference, implicit prompt": ({"chosen": "ab", "rejected": "ac"}, "<s>ab</s>", "b</s>"),
    "preference, prompt told twice": ({"prompt": "hi", "chosen": CHAT, "rejected": [HI, {**YO,
        "content": "no"}]}, *ANSWERED),
    "preference beside its messages": ({"messages": CHAT, "prompt": "hi", "chosen": CHAT,
        "rejected": [HI], "score_chosen": 8.0}, *ANSWERED),
    "preference of Orca": ({"system": "", "question": "hi", "chosen": "yo", "rejected": "no"},
        *ANSWERED),
    "preference of Orca, with a system prompt": ({"system": "S", "input": "hi", "chosen": "yo",
        "rejected": "no"}, *WITH_SYSTEM),
    "weights of SlimOrca": ({"messages": [{**HI, "weight": 0.0}, {**YO, "weight": 1.0,
        "masked": False}]}, *ANSWERED),
    "ShareGPT's calls": ({"conversations": [{"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "yo"}]},
        f'{TURN}CALL [{{"type": "function", "function": {{"name": "f", "arguments": {{}}}}}}]'
        "<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n",
        'CALL [{"type": "function", "function": {"name": "f", "arguments": {}}}]<|im_end|>\n'
        "yo<|im_end|>\n"),
    "an empty text beside its parts": ({"text": "", "instruction": "Add.", "input": "",
        "output": "4"},
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n4</s>", "4</s>"),
    "MetaMath": ({"query": "q", "response": "r", "original_question": "so it was",
        "type": "AnsAug"}, "<s>q\nr</s>", "r</s>"),
    "code": ({"content": "so", "hexsha": "4f2a", "ext": "py", "size": "3", "repo": "a/b",
        "on": "2020-01-02"}, "<s>so</s>", "so</s>"),
    "wished for": ({"prompt": "a", "completion": "b", "label": True}, "<s>ab</s>", "b</s>"),
    "premise + hypothesis": ({"premise": "a", "hypothesis": "b", "label": 1}, "<s>a\nb</s>",
        "a\nb</s>"),
    "input_ids beside their text": ({"text": "so", "input_ids": [0, *SO], "seq_lengths": [3]},
        "<s>so", "so"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_format_is_read_whole(name: str) -> None:
    row, whole, learned = READ[name]
    assert read(row)[:2] == (whole, learned)


@pytest.mark.parametrize("none", [None, float("nan"), np.nan])
@pytest.mark.parametrize("name", READ)
def test_columns_of_other_formats_that_hold_nothing_count_as_absent(name: str, none: Any) -> None:
    row, whole, learned = READ[name]
    filled = {k: none for other, _, _ in READ.values() for k in other} | {"labels": none} | row
    if "system_prompt" not in row:
        filled.pop("system_prompt")  # its presence makes question + response a chat
    assert read(filled)[:2] == (whole, learned)


VALUES: list[Any] = ["something else", ["something", "else"], [{"type": "image"}], 0.25]


@pytest.mark.parametrize("key", sorted(_CHANGES | {"anything", "explanation", "label"}))
def test_no_column_is_lost_unsaid(key: str) -> None:
    """Whatever stands in it, a column changes what is read, is refused, or is counted."""
    refused = []
    for name, (row, whole, learned) in READ.items():
        for value in VALUES if key not in row else ():
            try:
                got, kept, counts = read({**row, key: value})
            except SourceError as error:
                refused.append(str(error))
                continue
            made_of = "input_ids" in row and not isinstance(value, float) and key not in _NO_TEXT
            assert (got, kept) != (whole, learned) or key in counts.columns or made_of, name
    assert all("row 1" in line and "fix:" in line for line in refused)


@pytest.mark.parametrize("name", READ)
def test_ids_sources_and_scores_do_not_matter(name: str) -> None:
    row, whole, learned = READ[name]
    more = {
        "id": "a-7", "idx": 3, "source": "web", "url": "http://x", "score": 0.5, "lang": "en",
        "category": "qa", "conversation_id": "x", "__index_level_0__": 4, "metadata": {"a": "b"},
    }  # fmt: skip
    got, kept, counts = read(more | row)
    assert (got, kept) == (whole, learned)
    assert not counts.columns.keys() & more.keys()


REFUSED: dict[str, tuple[Any, ...]] = {
    "system beside strings": ({"system": "S", "prompt": "a", "completion": "b"},
        "column 'system' would be lost", {"prompt": "S a", "completion": "b"}),
    "Amazon": ({"title": "Great", "content": "It works.", "label": 1},
        "column 'title' would be lost", {"content": "Great It works.", "label": 1}),
    "a turn as a row": ({"role": "user", "content": "a"}, "'role' would be lost", {"content": "a"}),
    "choices": ({"question": "q", "choices": ["a", "b"], "answer": "a"}, "'choices' would be lost",
        {"question": "q a b", "answer": "a"}),
    "attention_mask beside text": ({"text": "so", "attention_mask": [1, 0]},
        "'attention_mask' would be lost", {"text": "so"}),
    "an image": ({"messages": CHAT, "images": [b"x"]}, "'images' would be lost"),
    "two formats": ({"messages": CHAT, "chosen": [HI, {**YO, "content": "no"}], "rejected": [HI,
        YO]}, "'(chosen|rejected)' would be lost"),
    "a part of a word is not the word": ({"instruction": "Add.", "output": "4", "system": "Be"},
        "'system' would be lost", {"instruction": "Be. Add.", "output": "4"}),
    "more than what is read": ({"prompt": "Ulm", "completion": "Danube",
        "context": "Ulm lies on the Danube."}, "'context' would be lost",
        {"prompt": "Ulm lies on the Danube. Ulm", "completion": "Danube"}),
    "images of a message": ({"messages": [{**HI, "images": ["a.png"]}, YO]},
        "message 1 of messages has a part that is no text; got: images"),
    "a turn that is masked": ({"messages": [HI, {**YO, "masked": True}, HI, YO]},
        "not to be learned by its 'masked'", {"prompt": [HI, YO, HI], "completion": [YO]}),
    "a call that is no JSON": ({"conversations": [HI, {"from": "function_call", "value": "f(x)"},
        YO]}, "function call of message 2 of conversations cannot be read", {"conversations": [HI,
        {"from": "function_call", "value": '{"name": "f"}'}, YO]}),
    "a call that the template leaves out": ({"messages": [HI, {**YO,
        "function_call": {"name": "other", "arguments": "{}"}}]},
        "leaves out what a message says; got: 'other'"),
    "another text": ({"instruction": "I", "output": "O", "text": "T"},
        "would be lost; got: (instruction|output) beside text", {"instruction": "I",
        "output": "O"}),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 of messages has no role"),
    "an unknown role": ({"messages": [HI, {"role": "critic", "content": "b"}]},
        "message 2 of messages has an unknown role; got: 'critic'"),
    "chats in a chat": ({"messages": [CHAT, CHAT]}, "a list of chats"),
    "strings in a chat": ({"messages": ["a", "b"]}, "message 1 .* no message", {"text": "a"}),
    "no messages": ({"messages": []}, "a chat is empty"),
    "a message of nothing": ({"messages": [HI, {"role": "assistant", "content": None}]},
        "message 2 of messages says nothing", {"messages": [HI, {"role": "assistant",
        "content": ""}]}),
    "an image as a part": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, YO]},
        "part of type 'image'"),
    "a content that is a number": ({"messages": [{"role": "user", "content": 7}, YO]},
        "content that is no text; got: int: 7", {"messages": [{"role": "user", "content": "7"},
        YO]}),
    "a turn that is not to be learned": ({"messages": [HI, {**YO, "weight": 0}, HI, YO]},
        "not to be learned by its 'weight'", {"prompt": [HI, YO, HI], "completion": [YO]}),
    "messages that are no JSON": ({"messages": "[{"}, "messages cannot be read", {"text": "[{"}),
    "brackets": ({"messages": "[" * 100_000}, "messages cannot be read", {"text": "["}),
    "two system prompts": ({"system": "S", "messages": [{"role": "system", "content": "T"}, *CHAT]},
        "two system prompts", {"messages": [{"role": "system", "content": "T"}, *CHAT]}),
    "a template of the row's own": ({"messages": CHAT,
        "chat_template_kwargs": {"chat_template": "x"}}, "cannot set this; got: chat_template",
        {"messages": CHAT, "chat_template_kwargs": {"note": "x"}}),
    "no turn of the assistant": ({"messages": [HI]},
        "nothing in the source is to be learned.*loss='all'"),
    "a prompt alone": ({"prompt": "a"},
        "columns are not known; got: prompt .*fix: add the column completion, or rename prompt",
        {"text": "a"}),
    "a prompt and no completion": ({"prompt": "a", "completion": None},
        r"completion \(null\).*fill the row", {"prompt": "a", "completion": ""}),
    "a string and messages": ({"prompt": [HI], "completion": "yo"},
        "prompt and completion are of two kinds; got: list and str", {"prompt": [HI],
        "completion": [YO]}),
    "an undesired completion": ({"prompt": "a", "completion": "b", "label": False},
        "marked as undesired", {"prompt": "a", "completion": "b", "label": True}),
    "an undesired completion of CSV": ({"prompt": "a", "completion": "b", "label": "False"},
        "marked as undesired", {"prompt": "a", "completion": "b", "label": "True"}),
    "problem + solution": ({"problem": "a", "solution": "b"},
        "'prompt' and that of the answer to 'completion'", {"prompt": "a", "completion": "b"}),
    "BoolQ": ({"passage": "C", "question": "q", "answer": True},
        "an answer is no text; got: answer: True.*true as 'yes'", {"passage": "C", "question": "q",
        "answer": "yes"}),
    "SQuAD without an answer": ({"context": "C", "question": "q", "answers": {"text": []}},
        "an answer is no text", {"context": "C", "question": "q", "answers": {"text": ["a"]}}),
    "text as chats": ({"text": CHAT}, "text is no string.*fix: rename 'text' to 'messages'"),
    "text as strings": ({"text": ["a", "b"]}, "text is no string.*fix: join the strings",
        {"text": "a b"}),
    "a number as text": ({"text": 7}, "text is no string.*as a string", {"text": "7"}),
    "a null beside a label": ({"text": None, "label": 1}, "holds None", {"text": "a", "label": 1}),
    "chats of an unknown name": ({"dialogue": CHAT}, "fix: rename 'dialogue' to 'messages'"),
    "text of an unknown name": ({"body": "so"}, "fix: rename the column .*'text'", {"text": "so"}),
    "half an emoji": ({"text": "hi \ud83d there"},
        r"lone surrogate\); got: '\\ud83d' at character 4", {"text": b"hi ? there".decode()}),
    "half an emoji in a chat": ({"messages": [{"role": "user", "content": "\udc00"}, YO]},
        "lone surrogate"),
    "a preference's question": ({"question": "a", "chosen": "b", "rejected": "c"},
        "its prompt under another name.*fix: rename 'question' to 'prompt'", {"prompt": "a",
        "chosen": "b", "rejected": "c"}),
    "the same answer twice": ({"chosen": "ab", "rejected": "ab"}, "a preference pair has no prompt",
        {"prompt": "a", "chosen": "b", "rejected": "b"}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_a_fix_that_works(name: str) -> None:
    row, match, *mended = REFUSED[name]
    with pytest.raises(SourceError, match=match):
        read(row)
    read(*mended or [{"messages": CHAT}])


def test_rows_are_counted_from_one() -> None:
    with pytest.raises(SourceError, match=r"\(row 3\)"):
        encode([{"text": "a"}, {"text": "b"}, {"text": 7}], made(), max_length=9, causal=True)


def test_an_object_that_is_no_row_is_refused() -> None:
    with pytest.raises(SourceError, match=r"no object with columns; got: list: \[1, 2\] \(row 1\)"):
        encode([[1, 2]], made(), max_length=9, causal=True)  # type: ignore[list-item]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize(("row", "whole"), [
    ({"text": "so"}, "so"), ({"text": "so{end}"}, "so"), ({"text": "{begin}so"}, "so"),
    ({"prompt": "2+2=", "completion": "4"}, "2+2=4"),
    ({"prompt": "2+2=", "completion": "4{end}"}, "2+2=4"),
    ({"prompt": "{begin}2+2=", "completion": "4{end}"}, "2+2=4"),
    ({"prompt": "", "completion": "4"}, "4"), ({"prompt": "2+2=", "completion": ""}, "2+2="),
    ({"question": "q", "answer": "4"}, "q\n4"),
])  # fmt: skip
def test_one_begin_and_one_end(kind: str, loss: str, row: Row, whole: str) -> None:
    tokenizer = made(**TOKENIZERS[kind])
    begin, end = "<s>" if TOKENIZERS[kind].get("bos") else "", str(tokenizer.eos_token)
    given = {k: v.format(begin=begin, end=end) for k, v in row.items()}
    found = encode([given], tokenizer, max_length=99, causal=True, loss=loss)[0]  # type: ignore[arg-type]
    assert tokenizer.decode([*found.tokens, found.targets[-1]]) == f"{begin}{whole}{end}"
    assert found.predict[-1]  # the end is learned


def test_a_document_ends_once() -> None:
    tokenizer = made(bos=True, eos=True)
    rows: list[Row] = [{"text": "abcdefgh", "pack": True}]
    found = encode(rows, tokenizer, max_length=4, causal=True)
    pieces = [tokenizer.decode([*e.tokens, e.targets[-1]]) for e in found]
    assert pieces == ["<s>abc", "defg", "h</s>"]


def test_tools_go_to_the_template_and_are_missed_where_it_has_no_place_for_them() -> None:
    for tools in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]):
        text, _, counts = read({"messages": CHAT, "tools": tools})
        assert text.startswith(
            '<|im_start|>system\nTools: [{"type": "function", "function": {"name'
        )
        assert not counts.tools_unwritten
    tokenizer = made(template=CHATML.partition("{% endif %}")[2])
    counts = RowCounts()
    encode(
        [{"messages": CHAT, "tools": [TOOL]}], tokenizer, max_length=99, causal=True, counts=counts
    )
    assert counts.tools_unwritten == 1
    assert counts.lines() == ["1 of 1 rows have tools that the chat template does not write"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_the_template_leaves_out_is_counted(key: str) -> None:
    chat = {"messages": [HI, {**YO, key: "because"}]}
    _, learned, counts = read(chat)
    assert learned == "yo<|im_end|>\n" and counts.thoughts_unwritten == 1
    assert counts.lines() == ["1 of 1 rows have reasoning that the chat template does not write"]
    tokenizer = made(
        template=CHATML.replace("{{ m.content }}", f"{{{{ m.{key} }}}}{{{{ m.content }}}}")
    )
    told = RowCounts()
    encode([chat], tokenizer, max_length=200, causal=True, counts=told)
    assert told.lines() == []


def test_keys_that_arrow_has_filled_are_left_out_however_deep() -> None:
    call = {"function": {"name": "rain", "arguments": {"town": "Ulm", "day": None}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    text, _, _ = read({"messages": [HI, turn], "tools": None, "chat_template_kwargs": None})
    assert '{"town": "Ulm"}' in text and "day" not in text


@pytest.mark.parametrize(("template", "row", "match"), [
    (None, {"messages": CHAT}, "a chat needs a chat template"),
    ("{{ messages[1].content }}", {"messages": CHAT},
        "leaves out what a message says; got: 'hi'"),
    ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        {"messages": CHAT, "system": "Brief."},
        "leaves out what a message says; got: 'Brief.'"),
    ("{{ raise_exception('roles!') }}", {"messages": CHAT}, "cannot write a chat; got: roles!"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", {"messages": [HI,
        {"role": "assistant", "tool_calls": [TOOL]}]},
        "leaves out what a message says; got: 'rain'"),
    ("{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m.content }}{% endfor %}",
        {"messages": [*CHAT, *CHAT]},
        "does not tell which tokens are the assistant's; got: .*message 2.*loss='all'"),
])  # fmt: skip
def test_a_template_that_does_not_write_a_chat_is_refused(
    template: str | None, row: Row, match: str
) -> None:
    with pytest.raises(SourceError, match=match):
        encode([row], made(template=template), max_length=99, causal=True)


def test_a_template_that_wants_parts_gets_them() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'text' %}"
        "{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    tokenizer = made(template=template)
    for content in ("hi", [{"type": "text", "text": "hi"}]):
        rows = [{"messages": [{"role": "user", "content": content}, YO]}]
        found = encode(rows, tokenizer, max_length=99, causal=True)[0]
        assert tokenizer.decode([*found.tokens, found.targets[-1]]) == "[user]hi[assistant]yo"
        assert sum(found.predict) == 2


def test_a_role_that_the_template_names_is_known() -> None:
    template = CHATML + "{% if messages[0].role == 'critic' %}{% endif %}"
    rows = [{"messages": [{"role": "critic", "content": "hm"}, YO]}]
    assert encode(rows, made(template=template), max_length=99, causal=True)


@pytest.mark.parametrize(("end", "told"), [
    ("<|im_end|>{% endgeneration %}", False), ("<|im_end|>\n{% endgeneration %}", False),
    ("{% endgeneration %}<|im_end|>", True),
])  # fmt: skip
def test_marks_that_leave_out_the_end_are_told(end: str, told: bool) -> None:
    template = MARKED.replace("<|im_end|>{% endgeneration %}", end)
    counts = RowCounts()
    tokenizer = made(template=template, eos_token="<|im_end|>")
    rows: list[Row] = [{"messages": [*CHAT, *CHAT]}]
    encode(rows, tokenizer, max_length=99, causal=True, counts=counts)
    assert counts.ends_unlearned == told
    assert [line for line in counts.lines() if "not learned" in line] == counts.lines()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_begins_and_goes_on(kind: str) -> None:
    tokenizer = made(**TOKENIZERS[kind])
    begin = "<s>" if TOKENIZERS[kind].get("bos") else ""
    for text in ("Answer:", f"{begin}Answer:"):
        assert tokenizer.decode(tokenize(tokenizer, text)) == f"{begin}Answer:"
    cut = fit_prompt("a long question:", tokenizer, 10)
    assert len(tokenize(tokenizer, cut)) <= 10
    assert cut == "question:"


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown loss; got: 'user'; allowed: all, assistant"):
        encode([{"text": "a"}], made(), max_length=9, causal=True, loss="user")  # type: ignore[arg-type]


LONG = "word " * 1_000_000


@pytest.mark.parametrize(("row", "causal", "field"), [
    ({"text": LONG}, True, "texts_cut"),
    ({"prompt": LONG, "completion": "a"}, True, "left_out_no_room"),
    ({"prompt": "a", "completion": LONG}, True, "completions_cut"),
    ({"messages": [HI, {"role": "assistant", "content": LONG}]}, True, "completions_cut"),
    ({"messages": [{"role": "user", "content": LONG}, YO]}, True, "left_out_unlearned"),
    ({"prompt": [HI], "completion": [{**YO, "content": LONG}]}, True, "completions_cut"),
    ({"text": LONG, "label": 1}, False, "texts_cut"),
    ({"text": "a", "text_pair": LONG, "label": 1}, False, "texts_cut"),
])  # fmt: skip
def test_a_row_of_megabytes_is_read_as_far_as_needed(row: Row, causal: bool, field: str) -> None:
    short = {
        k: [{**m, "content": m["content"][:4000]} for m in v] if isinstance(v, list) else v
        for k, v in row.items()
    }
    short = {k: v[:4000] if isinstance(v, str) else v for k, v in short.items()}
    tokenizer = made(bos=True, cls=not causal)
    counts, fine = RowCounts(), {"text": "fine", "label": 0}
    began = time.perf_counter()
    got = encode([fine, row], tokenizer, max_length=64, causal=causal, counts=counts)
    assert time.perf_counter() - began < 2
    assert got == encode([fine, short], tokenizer, max_length=64, causal=causal)
    assert getattr(counts, field) == 1
    cut = field != "left_out_no_room" and field != "left_out_unlearned"
    assert (counts.tokens_cut > 1_000_000) == cut


def test_what_was_lost_is_counted_and_told_in_a_line_each() -> None:
    rows: list[Row] = [
        {"text": ""},
        {"text": "abcdefgh", "label": 1},
        {"prompt": "abcdefgh", "completion": "a"},
        {"prompt": "a", "completion": "abcdefgh"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"input_ids": [3, 4], "labels": [-100, -100]},
        {"question": "a", "answers": {"text": ["b", "c"]}},
        {"question": "a", "answers": {"text": ["b", "b"]}},
    ]
    counts = RowCounts()
    found = encode(rows, made(bos=True), max_length=6, causal=True, counts=counts)
    assert len(found) == 6 == counts.rows - counts.left_out
    assert counts.to_dict() == {
        "rows": 9, "left_out_no_room": 1, "left_out_empty": 1, "left_out_unlearned": 1,
        "completions_cut": 1, "completions_empty": 1, "texts_cut": 1, "tokens_cut": 9,
        "rejected_unread": 1, "chats_unanswered": 0, "tools_unwritten": 0, "ends_unlearned": 0,
        "thoughts_unwritten": 0, "answers_unread": 1, "columns_unread": 1, "max_length": 6,
    }  # fmt: skip
    lines = counts.lines()
    assert len(lines) == 10
    assert lines[0] == "1 of 9 rows have a prompt that fills max_length=6; they are left out"
    assert lines[-1] == "columns that are not read: label (1 rows)"
    with pytest.warns(UserWarning, match="1 of 9 rows have a prompt .*; 1 of 9 rows hold fewer"):
        encode(rows, made(bos=True), max_length=6, causal=True)
    assert RowCounts().lines() == []


def test_prompts_that_all_fill_a_row_are_refused() -> None:
    rows: list[Row] = [{"prompt": "abcdefgh", "completion": "i"}] * 2
    with pytest.raises(SourceError, match=r"got: 2 of 2 rows .*fix: raise max_length"):
        encode(rows, made(), max_length=6, causal=True)


def test_a_text_as_long_as_a_row_may_be_is_not_cut() -> None:
    counts = RowCounts()
    encode([{"text": "abcd"}], made(bos=True), max_length=6, causal=True, counts=counts)
    assert counts.lines() == []
    encode([{"text": "abcde"}], made(bos=True), max_length=6, causal=True, counts=counts)
    assert counts.tokens_cut == 1  # its end token


def test_without_trl_a_chat_is_compared_turn_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    assert read({"messages": CHAT})[:2] == READ["messages"][1:]
    monkeypatch.setattr("retain.data.turns.find_spec", lambda name: None)
    odd = "{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m.content }}{% endfor %}"
    with pytest.raises(SourceError, match="fix: pip install trl"):
        encode([{"messages": CHAT * 2}], made(template=odd), max_length=99, causal=True)


@pytest.mark.parametrize("calls", [[TOOL], json.dumps([TOOL])])
def test_calls_of_tools_may_be_json_text(calls: Any) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": calls}
    text, learned, _ = read({"messages": [HI, turn], "tools": "", "chat_template_kwargs": ""})
    assert text.startswith("<|im_start|>user")
    assert learned == f"CALL {json.dumps([TOOL])}<|im_end|>\n"


def test_a_column_named_pack_does_not_pack() -> None:
    counts = RowCounts()
    rows = [{"text": "abcdef", "pack": "of six"}]
    assert len(encode(rows, made(), max_length=3, causal=True, counts=counts)) == 1
    assert counts.columns == {"pack": 1}


@pytest.mark.parametrize("cls", [True, False])
def test_what_a_tokenizer_writes_behind_but_the_end_token_stays(cls: bool) -> None:
    tokenizer = made(cls=cls, eos_token=None)
    for row in ({"text": "ab"}, {"prompt": "a", "completion": "b"}):
        found = encode([row], tokenizer, max_length=9, causal=True)[0]
        whole = tokenizer.decode([*found.tokens, found.targets[-1]])
        assert whole == ("[CLS]ab[SEP]" if cls else "ab")


def test_a_source_reads_a_chat_without_an_answer_whole() -> None:
    whole, learned, counts = read({"messages": [HI]}, loss="source")
    assert learned == whole.removeprefix("<|im_start|>") and counts.chats_unanswered == 1
    assert counts.lines() == ["1 of 1 rows are chats without an assistant's turn: read whole"]
    assert read({"messages": CHAT}, loss="source")[1] == "yo<|im_end|>\n"
    with pytest.raises(SourceError, match="nothing in the source is to be learned"):
        read({"messages": [HI]})
