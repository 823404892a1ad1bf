"""Rows of any columns and values are read, or refused in one line; nothing else happens."""

from __future__ import annotations

import datetime
import random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers_made import MARKED, made

from retain.data.columns import _CHANGES
from retain.data.counts import RowCounts
from retain.data.sources import encode
from retain.errors import SourceError

FORMATS = [
    ["text"], ["content"], ["prompt", "completion"], ["messages"], ["conversations"],
    ["chosen", "rejected"], ["input_ids"], ["instruction", "output"], ["question", "answer"],
    ["system_prompt", "question", "response"], ["text", "text_pair"],
]  # fmt: skip
KEYS = [*sorted(_CHANGES), "label", "id", "anything", "pack", None, 5]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def deep(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


VALUES: list[Any] = [
    None, "", "a", "so it is", 7, -1, 0.5, float("nan"), float("inf"), True, False, b"x", [], {},
    [1, 2, 3], [1.5], ["a", "b"], [None], [[1]], (1, 2), {1, 2}, {"text": ["a"]}, {"a": 1},
    CHAT, [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], [{"role": None}],
    [{"role": "user", "content": {"a": 1}}], [{"role": "assistant", "tool_calls": [5]}],
    [{"role": "assistant", "content": "x", "tool_calls": "[1]"}],
    '[{"role": "user", "content": "hi"}]', "{}", "[" * 9999, np.array([1, 2, 3]), np.array(["a"]),
    np.array(None, dtype=object), np.array(CHAT, dtype=object), torch.tensor([1, 0, 1]),
    torch.tensor(1), datetime.datetime(2020, 1, 1), 10**30, "\ud800", deep(5000), object(),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_no_row_ends_in_anything_but_one_line(seed: int) -> None:
    pick = random.Random(seed)
    tokenizers = [
        made(), made(bos=True, eos=True, template=MARKED), made(cls=True, template=None), None,
    ]  # fmt: skip
    read = 0
    for _ in range(1500):
        row = {key: pick.choice(VALUES) for key in pick.choice(FORMATS)}
        for _ in range(pick.choice([0, 0, 1, 3])):
            row[pick.choice(KEYS)] = pick.choice(VALUES)
        try:
            read += len(
                encode(
                    [row],
                    pick.choice(tokenizers),
                    max_length=pick.choice([2, 8, 64]),
                    causal=pick.random() < 0.7,
                    loss=pick.choice(["assistant", "all"]),
                    counts=RowCounts(),
                    regression=pick.choice([None, True, False]),
                )
            )
        except SourceError as error:
            line = str(error)
            assert "\n" not in line and len(line) < 600, line
    assert read > 20
