"""The model's own text, as a source."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from retain.errors import SourceError
from retain.models.generating import sample_rows
from tiny import base, tiny

BOS, HEAD = 11, [6, 7]


class Tokenizer(SimpleNamespace):
    """Encodes any text as token 5, behind a document's first token if it is one that writes it."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        if text == "head":
            return {"input_ids": HEAD}
        return {"input_ids": [BOS] * (self.writes and add_special_tokens) + [5]}

    def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
        return "head" + str(messages[0]["content"]) + "tail"


def tokenizer(*, writes: bool = False, chat: bool = False) -> Any:
    return Tokenizer(
        bos_token_id=BOS, eos_token_id=12, pad_token_id=0, writes=writes,
        chat_template="a template" if chat else None,
    )  # fmt: skip


def sampled(count: int = 6, **options: Any) -> list[list[int]]:
    rows = sample_rows(base("llama"), tokenizer(**options), count=count, max_length=9, seed=3)
    return [row["input_ids"] for row in rows]


def test_every_second_document_comes_bare_where_the_tokenizer_writes_no_mark() -> None:
    bare, marked = sampled(), sampled(writes=True)
    assert all(row[0] == BOS for row in marked)
    assert bare[0::2] == marked[0::2]
    for got, whole in zip(bare[1::2], marked[1::2], strict=True):
        assert got == (whole[1:] if len(whole) > 2 else whole)
    assert any(row[0] != BOS for row in bare)


def test_chats_keep_their_head() -> None:
    rows = sampled(7, chat=True)
    assert [row[: len(HEAD)] == HEAD for row in rows] == [False] * 4 + [True] * 3
    assert [row[0] == BOS for row in rows[:4:2]] == [True, True]


def test_a_row_is_no_longer_than_asked_and_the_adapter_is_off() -> None:
    rows = sampled(12, writes=True)
    assert all(2 <= len(row) <= 9 for row in rows)
    tuned = sample_rows(
        tiny("llama", moved=True), tokenizer(writes=True), count=12, max_length=9, seed=3
    )
    assert [row["input_ids"] for row in tuned] == rows
    again = sample_rows(base("llama"), tokenizer(writes=True), count=12, max_length=9, seed=4)
    assert [row["input_ids"] for row in again] != rows


def test_without_a_tokenizer_it_is_refused() -> None:
    with pytest.raises(SourceError, match="sampling needs a tokenizer"):
        sample_rows(base("llama"), None, count=1, max_length=4)


def test_without_a_pad_token_rows_end_where_their_text_does() -> None:
    model, plain = base("llama"), tokenizer(writes=True)
    plain.pad_token_id = None
    assert model.generation_config is not None
    ends = sorted({row[-1] for row in sampled(12, writes=True)})[:2]
    model.generation_config.eos_token_id = ends
    rows = [r["input_ids"] for r in sample_rows(model, plain, count=12, max_length=9, seed=3)]
    short = [row for row in rows if len(row) < 9]
    assert short
    for row in short:
        assert row[-1] in ends
        # Three tokens are kept at least, so a text that ends at once has its end twice.
        assert len(row) == 3 or not any(token in ends for token in row[1:-1])


def test_a_tokenizer_without_marks() -> None:
    bare = tokenizer()
    bare.bos_token_id = bare.eos_token_id = None
    with pytest.raises(SourceError, match="neither bos_token nor eos_token"):
        sample_rows(base("llama"), bare, count=2, max_length=9)
    bare.bos_token_id = BOS  # and nothing that ends one
    model = base("llama")
    model.generation_config.eos_token_id = None
    rows = sample_rows(model, bare, count=3, max_length=9)
    assert all(len(row["input_ids"]) >= 8 for row in rows)
