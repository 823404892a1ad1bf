"""Rows that are tokenised already: padding, masks, token types, packed texts; and labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers_made import made

from retain.data.batches import Example, batches, collate
from retain.data.classifier import UNLABELLED
from retain.data.counts import RowCounts
from retain.data.sources import encode
from retain.errors import SourceError
from retain.retention.state import StoredRow, pack_rows, unpack_rows

Row = dict[str, Any]
IDS = [5, 6, 7, 8, 9]


def whole(row: Row, **more: Any) -> list[tuple[list[int], list[int]]]:
    """Each text of a row, and what of it is learned."""
    found = encode([row], None, max_length=more.pop("max_length", 20), causal=True, **more)
    return [
        (
            [*e.tokens, int(e.targets[-1])],
            [int(t) for t, p in zip(e.targets, e.predict, strict=True) if p],
        )
        for e in found
    ]


@pytest.mark.parametrize(("more", "learned"), [
    ({}, [6, 7, 8, 9]), ({"attention_mask": [1] * 5}, [6, 7, 8, 9]),
    ({"labels": [-100, -100, 7, 8, 9]}, [7, 8, 9]), ({"labels": [5, 6, -100, -100, 9]}, [6, 9]),
    ({"labels": [5, 6, 7, 8, -100]}, [6, 7, 8]),
    ({"completion_mask": [0, 0, 1, 1, 1]}, [7, 8, 9]),
    ({"assistant_masks": [0, 1, 0, 0, 1]}, [6, 9]),
    ({"completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [1, 1, 1, 0, 1]}, [7, 9]),
    ({"labels": [5, 6, 7, -100, 9], "completion_mask": [0, 0, 1, 1, 1]}, [6, 7, 9]),  # as TRL
    ({"token_type_ids": [0] * 5, "special_tokens_mask": [1, 0, 0, 0, 1]}, [6, 7, 8, 9]),
    ({"position_ids": [0, 1, 2, 3, 4]}, [6, 7, 8, 9]),
    ({"labels": None, "attention_mask": None, "completion_mask": math.nan}, [6, 7, 8, 9]),
])  # fmt: skip
@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("right", [0, 2])
def test_pads_are_no_text_and_masks_say_what_is_learned(
    more: Row, learned: list[int], left: int, right: int
) -> None:
    row = {"input_ids": IDS} | more
    if left or right:
        mask = row.get("attention_mask") or [1] * 5
        fill = {"input_ids": 9, "labels": -100}
        row = {k: [fill.get(k, 0)] * left + v + [fill.get(k, 0)] * right
               for k, v in row.items() if isinstance(v, list)}  # fmt: skip
        row["attention_mask"] = [0] * left + mask + [0] * right
    for kind in (list, tuple, np.array, torch.tensor):
        made_of = {k: kind(v) if isinstance(v, list) else v for k, v in row.items()}
        assert whole(made_of) == [(IDS, learned)], kind


def test_all_learns_what_masks_leave_out_but_not_labels_of_minus_100() -> None:
    row = {"input_ids": IDS, "completion_mask": [0, 0, 1, 1, 1]}
    assert whole(row, loss="all") == [(IDS, [6, 7, 8, 9])]
    row = {"input_ids": IDS, "labels": [-100, -100, 7, 8, 9]}
    assert whole(row, loss="all") == [(IDS, [7, 8, 9])]


@pytest.mark.parametrize(
    "more", [{"seq_lengths": [2, 3]}, {"position_ids": [0, 1, 0, 1, 2]},
             {"seq_lengths": [2, 3], "position_ids": [0, 1, 0, 1, 2]}]
)  # fmt: skip
def test_packed_rows_are_several_texts(more: Row) -> None:
    assert whole({"input_ids": IDS} | more) == [([5, 6], [6]), ([7, 8, 9], [8, 9])]
    labelled = {"input_ids": IDS, "labels": [5, 6, 7, -100, 9]} | more
    assert whole(labelled) == [([5, 6], [6]), ([7, 8, 9], [9])]


REFUSED: dict[str, tuple[Row, str]] = {
    "holes": ({"attention_mask": [1, 0, 1, 1, 1]}, "has holes; got: 0 at position 2"),
    "a short mask": ({"attention_mask": [1, 1]}, "another length than input_ids; got: 2 and 5"),
    "a mask of twos": ({"attention_mask": [2] * 5}, "attention_mask is no mask; got: 2"),
    "short labels": ({"labels": [1]}, "labels is of another length"),
    "shifted labels": ({"labels": [6, 7, 8, 9, -100]}, "not the row's own tokens.*shifts them"),
    "one label": ({"labels": 1}, "labels is no list of whole numbers"),
    "real labels": ({"labels": [0.5] * 5}, "labels is no list of whole numbers; got: 0.5"),
    "a short completion": ({"completion_mask": [0, 1]}, "completion_mask is of another length"),
    "token types": ({"token_type_ids": [0, 0, 1, 1, 1]}, "token types are no input"),
    "lengths": ({"seq_lengths": [2, 2]}, "do not add up to the row; got: 4 of 5"),
    "positions": ({"position_ids": [1, 2, 3, 4, 5]}, "position_ids do not count up"),
    "positions that jump": ({"position_ids": [0, 1, 5, 6, 7]}, "position_ids do not count up"),
    "positions and lengths": ({"position_ids": [0, 1, 2, 3, 4], "seq_lengths": [2, 3]},
        "position_ids do not count up"),
    "another mask": ({"global_attention_mask": [1, 0, 0, 0, 0]}, "'global_attention_mask' would"),
    "weights": ({"weights": [0.5] * 5}, "'weights' would be lost"),
    "an image": ({"pixel_values": [[0.1]]}, "'pixel_values' would be lost"),
    "real ids": ({"input_ids": [5.0, 6.0]}, "input_ids is no list of whole numbers; got: 5.0"),
    "cut ids": ({"input_ids": [5, 6.7]}, "got: 6.7 at position 2"),
    "true and false": ({"input_ids": [True, False]}, "got: True at position 1"),
    "strings": ({"input_ids": ["5", "6"]}, "got: '5' at position 1"),
    "a string": ({"input_ids": "5 6"}, "input_ids is no list"),
    "negative ids": ({"input_ids": [5, -1]}, "got: -1 at position 2"),
    "a batch": ({"input_ids": [IDS]}, "without return_tensors"),
    "no tokens learned": ({"labels": [-100] * 5}, "nothing in the source is to be learned"),
    "pads alone": ({"attention_mask": [0] * 5}, "the source holds no text to predict"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_columns_that_do_not_fit_are_refused(name: str) -> None:
    more, match = REFUSED[name]
    with pytest.raises(SourceError, match=match):
        whole({"input_ids": IDS} | more)


def test_a_padded_row_is_cut_behind_its_padding() -> None:
    row = {"input_ids": [0, 0, *IDS], "attention_mask": [0, 0, 1, 1, 1, 1, 1]}
    assert whole(row, max_length=3) == [([5, 6, 7], [6, 7])]


def test_a_classifier_keeps_token_types_and_drops_pads() -> None:
    tokenizer = made(cls=True)
    pairs = [("so", "it is"), ("a", "bcd")]
    text: list[Row] = [{"text": a, "text_pair": b, "label": 1} for a, b in pairs]
    want = encode(text, tokenizer, max_length=32, causal=False)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        ready: list[Row] = [
            dict(tokenizer(a, b, padding="max_length", max_length=32), label=1) for a, b in pairs
        ]
        assert encode(ready, None, max_length=32, causal=False) == want
    assert set(want[0].segments) == {0, 1}


def test_a_batch_keeps_token_types_whichever_row_has_them() -> None:
    rows = [Example((5, 6), (0,)), Example((5, 6, 7), (1,), (), (0, 1, 1))]
    for found in (rows, rows[::-1]):
        types = collate(found, 0).inputs["token_type_ids"]
        assert sorted(types.tolist()) == [[0, 0, 0], [0, 1, 1]]


GOOD: list[tuple[Any, bool | None, float]] = [
    (2, None, 2), (2, False, 2), (2, True, 2.0), ("2", False, 2), (" 2 ", None, 2), (2.0, False, 2),
    ("2.0", False, 2), (np.int64(2), False, 2), (np.float32(2), False, 2),
    (torch.tensor(2), None, 2), (1e300, True, 1e300),
    (0.38, None, 0.38), (0.38, True, 0.38), ("0.38", True, 0.38), ("0.38", None, 0.38),
    (-0.5, True, -0.5), (-1, True, -1.0), (-1, False, UNLABELLED), (-100, None, UNLABELLED),
    ("-1", False, UNLABELLED), (None, None, UNLABELLED), ("", False, UNLABELLED),
]  # fmt: skip


@pytest.mark.parametrize(("label", "regression", "target"), GOOD)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_a_label_is_read_exactly(
    label: Any, regression: bool | None, target: float, name: str
) -> None:
    rows = [{"text": "so", name: label}]
    found = encode(rows, made(), max_length=9, causal=False, regression=regression)[0].targets[0]
    assert found == target and type(found) is type(target)


def test_a_row_without_a_label_has_none() -> None:
    found = encode([{"text": "so"}], made(), max_length=9, causal=False)
    assert found[0].targets == (UNLABELLED,)
    for row in ({"text": "so"}, {"text": "so", "label": None}, {"text": "so", "label": ""}):
        found = encode([row], made(), max_length=9, causal=False, regression=True)
        assert math.isnan(found[0].targets[0])


@pytest.mark.parametrize(("label", "regression", "fix"), [
    (math.nan, None, "repair the label"), (math.nan, True, "repair the label"),
    (math.inf, True, "repair the label"), ("nan", False, "repair the label"),
    ("1e999", True, "repair the label"), (0.7, False, "num_labels=1 for a regression"),
    ("0.38", False, "num_labels=1 for a regression"),
    (1.0000001, False, "num_labels=1 for a regression"), (-2, False, "repair the label"),
    (10**30, None, "repair the label"), (1e20, False, "repair the label"),
    (True, None, "write false as 0 and true as 1"),
    (np.bool_(True), False, "write false as 0 and true as 1"),
    ("positive", False, "number the classes from 0"),
    ("positive", None, "number the classes from 0"),
    ("1_000", None, "number the classes from 0"), ([0, 1], False, "give one label a row"),
    ([1], None, "give one label a row"), ({"a": 1}, None, "repair the label"),
])  # fmt: skip
def test_a_label_that_is_no_number_is_refused_with_its_row(
    label: Any, regression: bool | None, fix: str
) -> None:
    rows = [{"text": "so", "label": 1}, {"text": "so", "label": label}]
    with pytest.raises(SourceError, match=rf"a label cannot be read; got: .*\(row 2\).*{fix}"):
        encode(rows, made(), max_length=9, causal=False, regression=regression)


def test_two_labels_that_differ_are_refused() -> None:
    rows: list[Row] = [{"text": "so", "label": 1, "labels": 2}]
    with pytest.raises(SourceError, match=r"two labels; got: label 1 and labels 2 \(row 1\)"):
        encode(rows, made(), max_length=9, causal=False)


@pytest.mark.parametrize(("row", "match"), [
    ({"messages": [{"role": "user", "content": "a"}], "label": 1}, "columns are not known"),
    ({"prompt": "a", "completion": "b", "label": 1}, "columns are not known"),
    ({"title": "a", "content": "b", "label": 1}, "'title' would be lost"),
    ({"title": "a", "text": "b", "label": 1}, "'title' would be lost"),
    ({"passage": "a", "question": "b", "answer": "c", "label": 1}, "'passage' would be lost"),
    ({"text": "a", "attention_mask": [1], "label": 1}, "'attention_mask' would be lost"),
    ({"text": "a", "image": b"x", "label": 1}, "'image' would be lost"),
    ({"sentence": None, "label": 1}, "text is no string"),
])  # fmt: skip
def test_a_classifiers_columns_are_not_lost(row: Row, match: str) -> None:
    with pytest.raises(SourceError, match=match):
        encode([row], made(), max_length=9, causal=False)


@pytest.mark.parametrize("row", [
    {"text": "ab", "label_text": "x"}, {"sentence": "ab", "idx": 3},
    {"premise": "a", "hypothesis": "b", "reason": "c"}, {"question": "a", "answer": "b"},
    {"sentence1": "a", "sentence2": "b"},
])  # fmt: skip
def test_a_classifiers_texts(row: Row) -> None:
    tokenizer = made()
    found = encode([row | {"label": 1}], tokenizer, max_length=9, causal=False, counts=RowCounts())
    assert tokenizer.decode(found[0].tokens) == "ab" and found[0].targets == (1,)


def test_targets_of_a_regression_stay_as_they_are_through_batches_and_files() -> None:
    rows = [Example((5, 6), (0.38,)), Example((5, 7), (2.0,)), Example((5, 8), (-1.5,))]
    assert [b.targets.tolist() for b in batches(rows, 3, 0)] == [
        torch.tensor([0.38, 2.0, -1.5]).tolist()
    ]
    kept = [StoredRow.of(e, None) for e in rows]
    assert [k.targets for k in unpack_rows(pack_rows(kept))] == [e.targets for e in rows]
    classes = [StoredRow.of(Example((5, 6), (2,)), None)]
    assert type(unpack_rows(pack_rows(classes))[0].targets[0]) is int
