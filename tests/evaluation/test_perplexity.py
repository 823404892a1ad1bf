"""Perplexity counts exactly the tokens that it says it counts."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from retain.errors import ConfigError
from retain.evaluation.forgetting import measure_forgetting
from retain.evaluation.perplexity import measure_perplexity

LONG = [3, 7, 1, 12, 5, 2, 9, 4, 4, 11, 6, 10, 8, 3, 1, 2, 12]


def nats(model: torch.nn.Module, context: list[int], token: int) -> float:
    with torch.no_grad():
        return -float(model(torch.tensor([context])).logits[0, -1].log_softmax(-1)[token])


def test_rows_are_cut_and_all_but_their_first_tokens_count() -> None:
    model, rows = tiny.tiny("llama", moved=True), [*tiny.ROWS["llama"], {"input_ids": LONG}]
    losses = [
        nats(model, row["input_ids"][:k], row["input_ids"][k])
        for row in rows
        for k in range(1, min(6, len(row["input_ids"])))
    ]
    for size in (1, 3, 8):
        got = measure_perplexity(model, rows, max_length=6, batch_size=size)
        assert (got.tokens, got.rows) == (len(losses), len(rows))
        assert got.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)
        assert got.value == pytest.approx(math.exp(got.loss))
    same = measure_forgetting(model, rows, max_length=6, batch_size=2)
    assert got.value == pytest.approx(same.ppl)
    assert measure_perplexity(model, rows, rows=2, max_length=6).rows == 2


@pytest.mark.parametrize(("length", "stride"), [(6, 3), (6, 5), (5, 1), (16, 4), (64, 8)])
def test_windows_count_each_token_once(length: int, stride: int) -> None:
    model = tiny.base("llama")
    losses = []
    for k in range(1, len(LONG)):
        windows = range(0, len(LONG), stride)
        first = next(s for s in windows if k < s + length)  # the first window that holds it
        losses.append(nats(model, LONG[first:k], LONG[k]))
    got = measure_perplexity(model, [{"input_ids": LONG}], max_length=length, stride=stride)
    assert got.tokens == len(LONG) - 1
    assert got.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_mistakes_are_named() -> None:
    model, rows = tiny.base("llama"), tiny.ROWS["llama"]
    for stride in (0, 8):
        with pytest.raises(ConfigError, match="stride"):
            measure_perplexity(model, rows, max_length=8, stride=stride)
    with pytest.raises(ConfigError, match="causal"):
        measure_perplexity(tiny.base("bert"), rows)
