"""What files and rows may hold, and what is said of those that hold something else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retain.data.classifier import UNLABELLED
from retain.data.sources import encode, read_rows
from retain.errors import SourceError


class Letters(SimpleNamespace):
    """A tokenizer with one token a letter."""

    eos_token_id = 99

    def __call__(self, *texts: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 96 for letter in "".join(texts)]}


def encoded(rows: list[dict[str, Any]], causal: bool = True, max_length: int = 6) -> list[Any]:
    letters: Any = Letters()
    return encode(rows, letters, max_length=max_length, causal=causal)


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("a.csv", "text,label\nso,1\n", "text"),
        ("a.jsonl", '{"text": "so"}\n', "text"),
        ("a.json", '[{"text": "so"}]', "text"),
        ("a.txt", "so", "text"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_text(
    tmp_path: Path, name: str, text: str, column: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig")
    assert read_rows(path)[0][column] == "so"


def test_prompts_that_fill_a_row_are_named() -> None:
    long, short = {"prompt": "abcdefgh", "completion": "i"}, {"prompt": "ab", "completion": "c"}
    with pytest.warns(UserWarning, match=r"1 of 2 rows .*fills max_length=6; they are left out"):
        assert len(encoded([long, short])) == 1
    with pytest.raises(SourceError, match=r"got: 2 of 2 rows .*fix: raise max_length"):
        encoded([long, long])


def test_a_row_without_text_is_named_by_its_number() -> None:
    with pytest.raises(
        SourceError, match=r"text is no string; got: text that holds None \(row 2\)"
    ):
        encoded([{"text": "so"}, {"text": None}])
    with pytest.raises(SourceError, match=r"columns are not known; got: body \(row 1\)"):
        encoded([{"body": "so"}])


@pytest.mark.parametrize("label", [None, ""])
def test_a_row_without_a_label_has_none(label: object) -> None:
    rows = [{"text": "so", "label": label}, {"text": "so"}, {"text": "so", "label": "2"}]
    assert [e.targets for e in encoded(rows, causal=False)] == [(UNLABELLED,), (UNLABELLED,), (2,)]


def test_the_name_self_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="leave the source out"):
        read_rows("self")
    Path("self").mkdir()
    with pytest.raises(SourceError, match="holds no file of rows; got: self: nothing"):
        read_rows("self")
