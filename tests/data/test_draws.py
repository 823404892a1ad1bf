"""Seeded draws: the same rows whatever they are stored in, from everywhere, and never the first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from datasets import Dataset, IterableDataset
from pyarrow import ipc

from retain.data.draws import draw, draw_from, sample
from retain.data.readers.given import STREAMED
from retain.data.sources import read_rows
from retain.errors import ConfigError

COUNT = 300
ROWS = [{"text": f"row {i}", "label": i} for i in range(COUNT)]
TABLE = pyarrow.Table.from_pylist(ROWS)


class ByNumber(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, place: int) -> Any:
        return ROWS[place]


class OneByOne(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


class OtherTable:
    """A table of a library that gives itself to Arrow, as Polars and DuckDB do."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return TABLE.__arrow_c_stream__(requested_schema)


GIVEN: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "Dataset": lambda: Dataset.from_list(ROWS),
    "Dataset with_format torch": lambda: Dataset.from_list(ROWS).with_format("torch"),
    "Dataset with_format pandas": lambda: Dataset.from_list(ROWS).with_format("pandas"),
    "IterableDataset": lambda: Dataset.from_list(ROWS).to_iterable_dataset(),
    "IterableDataset from_generator": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
    "torch Dataset": ByNumber,
    "torch IterableDataset": OneByOne,
    "torch Subset": lambda: torch.utils.data.Subset(ByNumber(), range(COUNT)),
    "DataFrame": lambda: pandas.DataFrame(ROWS, index=range(7, 7 + COUNT)),
    "Table": lambda: TABLE,
    "RecordBatch": lambda: TABLE.combine_chunks().to_batches()[0],
    "another table": OtherTable,
}


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _csv(mark: str) -> bytes:
    rows = "".join(f'"{r["text"]}"{mark}{r["label"]}\n' for r in ROWS)
    return f"text{mark}label\n{rows}".encode()


def _parquet(path: Path) -> None:
    parquet.write_table(TABLE, path, row_group_size=70)


def _arrow(path: Path) -> None:
    with ipc.new_file(path, TABLE.schema) as file:
        file.write_table(TABLE, max_chunksize=64)


def _stream(path: Path) -> None:
    with ipc.new_stream(path, TABLE.schema) as file:
        file.write_table(TABLE, max_chunksize=64)


def _shards(path: Path) -> None:
    path.mkdir()
    for number in range(3):
        (path / f"part-{number:05}.jsonl").write_bytes(_lines(ROWS[number * 100 :][:100]))
    (path / "README.md").write_text("what these are")


def _parquet_shards(path: Path) -> None:
    path.mkdir()
    for number in range(3):
        parquet.write_table(TABLE.slice(number * 100, 100), path / f"train-{number}-of-3.parquet")


FILES: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_bytes(_lines(ROWS)),
    "A.JSONL": lambda p: p.write_bytes(_lines(ROWS)),
    "blank-lines.jsonl": lambda p: p.write_bytes(_lines(ROWS).replace(b"\n", b"\n\n")),
    "lines.json": lambda p: p.write_bytes(_lines(ROWS)),
    "array.json": lambda p: p.write_text(json.dumps(ROWS)),
    "indented.json": lambda p: p.write_text(json.dumps(ROWS, indent=2)),
    "under-a-key.json": lambda p: p.write_text(json.dumps({"version": 1, "data": ROWS})),
    "a.csv": lambda p: p.write_bytes(_csv(",")),
    "semicolons.csv": lambda p: p.write_bytes(_csv(";")),
    "windows.csv": lambda p: p.write_bytes(b"\xef\xbb\xbf" + _csv(",").replace(b"\n", b"\r\n")),
    "a.tsv": lambda p: p.write_bytes(_csv("\t")),
    "a.parquet": _parquet,
    "a.arrow": _arrow,
    "stream.arrow": _stream,
    "shards": _shards,
    "parquet-shards": _parquet_shards,
    "saved": lambda p: Dataset.from_list(ROWS).save_to_disk(p),
}  # fmt: skip


def numbers(source: Any, limit: int | None, **more: Any) -> list[int]:
    rows = read_rows(source, limit, **more)
    assert all(row["text"] == f"row {row['label']}" for row in rows)
    return [int(row["label"]) for row in rows]


@pytest.mark.parametrize("kind", GIVEN)
def test_one_draw_from_whatever_is_given(kind: str) -> None:
    for limit in (1, 7, 299):
        assert numbers(GIVEN[kind](), limit, seed=3) == list(draw(COUNT, limit, 3))
    for all_of_them in (None, COUNT, 5000):
        assert numbers(GIVEN[kind](), all_of_them) == list(range(COUNT))


@pytest.mark.parametrize("kind", FILES)
def test_one_draw_from_every_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    FILES[kind](path)
    for limit in (1, 7, 299):
        assert numbers(str(path), limit, seed=3) == list(draw(COUNT, limit, 3))
    for all_of_them in (None, COUNT, 5000):
        assert numbers(path, all_of_them) == list(range(COUNT))


def test_a_pattern_names_shards(tmp_path: Path) -> None:
    _shards(tmp_path / "s")
    assert numbers(str(tmp_path / "s" / "*.jsonl"), 9) == list(draw(COUNT, 9, 0))
    assert numbers(str(tmp_path / "s" / "part-00001*"), None) == list(range(100, 200))


class TestDraw:
    def test_seeds(self) -> None:
        assert list(draw(1000, 20, 0)) == list(draw(1000, 20, 0))
        assert list(draw(1000, 20, 0)) != list(draw(1000, 20, 1))
        assert list(draw(1000, 20, -1)) == sorted(set(draw(1000, 20, -1)))

    def test_it_is_the_same_for_ever(self) -> None:
        assert list(draw(20, 5, 0)) == [2, 4, 11, 12, 15]
        assert list(draw(100_000, 4, 7)) == [25580, 69406, 84540, 89205]

    @pytest.mark.parametrize("count", [1, 20, 16_384, 16_385, 100_000])
    def test_a_smaller_one_is_part_of_a_larger_one(self, count: int) -> None:
        small, large = (set(draw(count, limit, 5)) for limit in (13, 200))
        assert small <= large
        assert len(small) == min(13, count)

    @pytest.mark.parametrize("limit", [1, 100, 20_000])
    def test_a_stream_gives_the_same(self, limit: int) -> None:
        found = draw_from(iter(range(40_000)), limit, 2)
        assert [place for place, _ in found] == [item for _, item in found]
        assert [place for place, _ in found] == list(draw(40_000, limit, 2))

    def test_every_row_alike(self) -> None:
        hits = [0] * 50
        for seed in range(2000):
            for place in draw(50, 10, seed):
                hits[place] += 1
        assert all(abs(h - 400) < 5 * (400 * 0.8) ** 0.5 for h in hits)  # five deviations

    def test_sample(self) -> None:
        assert sample("abcdefgh", 3, 0) == ["abcdefgh"[i] for i in draw(8, 3, 0)]
        assert sample("abc", None, 0) == sample("abc", 9, 0) == ["a", "b", "c"]

    @pytest.mark.parametrize("limit", [0, -1, True, 2.0, "3"])
    def test_no_limit(self, limit: Any) -> None:
        with pytest.raises(ConfigError, match=r"limit.*allowed: 1 or more"):
            read_rows(ROWS, limit)


class TestStreams:
    def test_an_endless_one(self) -> None:
        def endless() -> Iterator[str]:
            place = 0
            while True:
                yield f"row {place}"
                place += 1

        with pytest.warns(UserWarning, match=f"5 rows are drawn from its first {STREAMED}"):
            found = read_rows(endless(), 5, seed=1)
        want = [{"text": f"row {i}"} for i in draw(STREAMED, 5, 1)]
        assert found == want

    def test_one_that_ends_says_nothing(self, recwarn: pytest.WarningsRecorder) -> None:
        read_rows((f"row {i}" for i in range(STREAMED)), 5)
        assert not recwarn.list
