"""What is given from Python: what counts as rows, and what is said of what does not."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers import BatchEncoding, Trainer

from retain.data.draws import draw
from retain.data.rows import Passage, PlacedRow, place_of
from retain.data.sources import read_rows
from retain.errors import SourceError

ROWS = [{"text": f"row {i}", "label": i % 2} for i in range(6)]
FEW = Dataset.from_list(ROWS)
CHAT = [{"role": "user", "content": "hi"}]
IDS = [[1, 2], [3, 4]]

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DatasetDict": (lambda: DatasetDict(train=FEW, test=FEW), "source['train']"),
    "DatasetDict without train": (lambda: DatasetDict(b=FEW, a=FEW), "source['b']"),
    "empty DatasetDict": (DatasetDict, "source['train']"),
    "IterableDatasetDict": (lambda: IterableDatasetDict(train=FEW.to_iterable_dataset()),
        "source['train']"),
    "dict of data sets": (lambda: {"one": FEW}, "source['one']"),
    "dict of lists of rows": (lambda: {"train": ROWS, "test": ROWS}, "source['train']"),
    "dict of columns": (lambda: FEW.to_dict(), "Dataset.from_dict(dict(source))"),
    "BatchEncoding": (lambda: BatchEncoding({"input_ids": IDS, "attention_mask": [[1, 1], [1, 1]]}),
        "Dataset.from_dict(dict(source))"),
    "BatchEncoding of tensors": (lambda: BatchEncoding({"input_ids": torch.tensor(IDS)}),
        "Dataset.from_dict(dict(source))"),
    "one row": (lambda: ROWS[0], "[source]"),
    "one chat": (lambda: {"messages": CHAT}, "[source]"),
    "no row": (dict, "[source]"),
    "bytes": (lambda: b"some text", "[text]"),
    "bytearray": (lambda: bytearray(b"some text"), "[text]"),
    "array of texts": (lambda: numpy.array(["a", "b"]), "source.tolist()"),
    "array of tokens": (lambda: numpy.array(IDS), "'input_ids': ids} for ids in source.tolist()"),
    "tensor": (lambda: torch.tensor(IDS), "'input_ids': ids} for ids in source.tolist()"),
    "set": (lambda: {"a", "b"}, "sorted(source)"),
    "frozenset": (lambda: frozenset("ab"), "sorted(source)"),
    "keys": (lambda: {"a": 1}.keys(), "sorted(source)"),
    "DataLoader": (lambda: torch.utils.data.DataLoader(FEW), "source.dataset"),
    "open file": (lambda: open(__file__), "path"),  # noqa: SIM115
    "StringIO": (lambda: io.StringIO("a\nb"), "path"),
    "arrow array": (lambda: pyarrow.array(["a", "b"]), "source.to_pylist()"),
    "column": (lambda: pyarrow.chunked_array([["a"], ["b"]]), "source.to_pylist()"),
    "None": (lambda: None, "[{'text': ...}, ...]"),
    "number": (lambda: 5, "[{'text': ...}, ...]"),
    "function": (lambda: lambda: ROWS, "call it"),
    "class": (lambda: list, "source(...)"),
    "trainer": (lambda: object.__new__(Trainer), "source.train_dataset"),
    "frame with a column twice": (lambda: pandas.concat([pandas.DataFrame(ROWS)] * 2, axis=1),
        "frame.columns"),
    "table with a column twice": (lambda: pyarrow.table([["a"], ["b"]], names=["text", "text"]),
        "rename_columns"),
    "mixed column": (lambda: pandas.DataFrame({"text": ["a", 1]}), "frame.to_dict('records')"),
    "empty list": (list, "give a data set"),
    "empty generator": (lambda: iter(()), "make it anew"),
    "empty frame": (pandas.DataFrame, "give a data set"),
}  # fmt: skip
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "None": (None, "leave the row out"),
    "NaN": (float("nan"), "leave the row out"),
    "number": (7, "{'text': ...}"),
    "bytes": (b"abc", "row.decode('utf-8')"),
    "text and label": (("a", 1), "[{'text': text, 'label': label} for text, label in rows]"),
    "tokens": ([1, 2, 3], "[{'input_ids': ids} for ids in rows]"),
    "messages": (CHAT, "[{'messages': chat} for chat in rows]"),
    "tensor": (torch.tensor([1, 2]), "{'text': ...}"),
    "no key": ({None: "a"}, "{'text': ...}"),
    "numbered column": ({0: "a"}, "{'text': ...}"),
    "half a character": ({"text": "hi \ud83d there"}, "'replace'"),
    "half a character deep down": ({"messages": [{"role": "user", "content": "\ude00"}]},
        "'replace'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_rows_is_refused(kind: str) -> None:
    make, fix = REFUSED[kind]
    for limit in (None, 2):
        with pytest.raises(SourceError) as error:
            read_rows(make(), limit)
        assert fix in str(error.value.fix)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_row_that_is_none_is_named(kind: str, lazy: bool) -> None:
    row, fix = BAD_ROWS[kind]
    rows = [*ROWS, row, *ROWS]
    with pytest.raises(SourceError, match=r"^row 7 ") as error:
        read_rows(iter(rows) if lazy else rows)
    assert fix in str(error.value.fix)


class TestFixes:
    """The fixes that errors name, tried."""

    def test_columns(self) -> None:
        source: Any = BatchEncoding({"input_ids": torch.tensor(IDS)})
        assert read_rows(datasets.Dataset.from_dict(dict(source))) == [
            {"input_ids": ids} for ids in IDS
        ]

    def test_arrays(self) -> None:
        source = numpy.array(IDS)
        assert read_rows([{"input_ids": ids} for ids in source.tolist()])[1] == {
            "input_ids": [3, 4]
        }
        assert read_rows(numpy.array(["a", "b"]).tolist()) == [{"text": "a"}, {"text": "b"}]

    def test_loader(self) -> None:
        assert read_rows(torch.utils.data.DataLoader(FEW).dataset) == ROWS

    def test_half_a_character(self) -> None:
        text = "hi \ud83d there"
        mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert read_rows([mended]) == [{"text": "hi \ufffd there"}]

    def test_mixed_frame(self) -> None:
        frame = pandas.DataFrame({"text": ["a", 1]})
        assert read_rows(frame.to_dict("records")) == [{"text": "a"}, {"text": 1}]


def test_a_series_and_strings() -> None:
    want = [{"text": "a"}, {"text": "b"}]
    for source in (["a", "b"], pandas.Series(["a", "b"], index=[5, 9]), map(str, "ab")):
        assert read_rows(source) == want


def test_chosen_columns_stay_chosen() -> None:
    rows = read_rows(FEW.with_format("torch", columns=["label"]))
    assert rows[:2] == [{"label": 0}, {"label": 1}]


def test_a_transform_is_applied() -> None:
    loud = FEW.with_transform(lambda batch: {"text": [t.upper() for t in batch["text"]]})
    assert read_rows(loud, 2, seed=1) == [{"text": f"ROW {i}"} for i in draw(6, 2, 1)]


def test_what_is_missing_in_pandas_is_none() -> None:
    frame = pandas.DataFrame({"text": ["a", None], "label": [1, 2], "note": ["x", float("nan")]})
    for source in (frame, frame.to_dict("records")):
        assert read_rows(source)[1] == {"text": None, "label": 2, "note": None}


def test_a_label_that_is_no_number_is_kept_for_the_error() -> None:
    (row,) = read_rows([{"text": "a", "label": float("nan")}])
    assert row["label"] != row["label"]


def test_places() -> None:
    drawn = read_rows(ROWS, 2, seed=4)
    assert [place_of(row, 0) for row in drawn] == [f"row {i + 1}" for i in draw(6, 2, 4)]
    assert place_of({"text": "a"}, 3) == "row 3"
    again = pickle.loads(pickle.dumps(drawn[0]))
    assert isinstance(again, PlacedRow) and again.place == place_of(drawn[0], 0)


def test_rows_that_were_read_keep_their_place(tmp_path: Path) -> None:
    """The command line draws rows and hands them on, to be read as any list."""
    lines, text = tmp_path / "a.jsonl", tmp_path / "a.txt"
    lines.write_text("\n".join(f'{{"text": "row {i}"}}' for i in range(20)))
    text.write_text("One sentence after the other.\n" * 3000)
    for path in (lines, text):
        drawn = read_rows(path, 5, seed=1)
        again = read_rows(drawn)
        assert [place_of(row, 0) for row in again] == [place_of(row, 0) for row in drawn]
        assert [type(row) for row in again] == [type(row) for row in drawn]
        assert {type(row) for row in again} == {PlacedRow if path is lines else Passage}
