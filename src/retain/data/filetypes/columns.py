"""Parquet and Arrow files: how many rows there are is known, and any of them can be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retain.data.placed import PlacedRow, as_row
from retain.errors import SourceError

__all__ = ["Arrow", "Parquet", "check_names"]

_BATCH = 1024
_BYTES = 2 << 20
"""Rows, and bytes, of a Parquet batch at most; the bytes as they are on average."""
_BUFFER = 1 << 16


class Parquet:
    """A Parquet file. Of a row group, batches are read up to the last row that is wanted.

    Args:
        path: of the file.

    Raises:
        SourceError: two columns have one name.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as parquet

        self.path = path
        # without a buffer a whole column of a row group is read at once
        self._file = parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        check_names(self._file.schema_arrow.names, str(path))

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def take(self, places: Sequence[int]) -> list[PlacedRow]:
        """The rows at sorted places, counted from 0."""
        rows: list[PlacedRow] = []
        done, start = 0, 0
        for group in range(self._file.num_row_groups):
            about = self._file.metadata.row_group(group)
            stop = start + about.num_rows
            if done < len(places) and places[done] < stop:
                at, size = start, 1 + about.total_byte_size // about.num_rows
                batches = self._file.iter_batches(
                    max(1, min(_BATCH, _BYTES // size)), row_groups=[group], use_threads=False
                )
                for batch in batches:
                    found, done = _within(places, done, at, batch, self.path)
                    rows += found
                    at += batch.num_rows
                    if done == len(places) or places[done] >= stop:
                        break
            start = stop
        return rows


class Arrow:
    """An Arrow file or stream, such as `datasets` keeps; it is mapped, not copied.

    Args:
        path: of the file.

    Raises:
        SourceError: two columns have one name.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import ipc

        self.path = path
        mapped = pyarrow.memory_map(str(path))
        try:
            reader = ipc.open_file(mapped)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            reader = ipc.open_stream(mapped)
            self._batches = list(reader)
        check_names(reader.schema.names, str(path))

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def take(self, places: Sequence[int]) -> list[PlacedRow]:
        """The rows at sorted places, counted from 0."""
        rows: list[PlacedRow] = []
        done, at = 0, 0
        for batch in self._batches:
            found, done = _within(places, done, at, batch, self.path)
            rows += found
            at += batch.num_rows
        return rows


def _within(
    places: Sequence[int], done: int, at: int, batch: Any, path: Path
) -> tuple[list[PlacedRow], int]:
    """The rows of a batch that begins at row `at`; and how many places are done after it."""
    stop = done
    while stop < len(places) and places[stop] < at + batch.num_rows:
        stop += 1
    if stop == done:
        return [], done
    some = batch.take([place - at for place in places[done:stop]]).to_pylist()
    numbers = (place + 1 for place in places[done:stop])
    return [as_row(r, n, "row", path) for r, n in zip(some, numbers, strict=True)], stop


def check_names(
    names: Sequence[str], what: str, fix: str = "table.rename_columns([...]) in pyarrow"
) -> None:
    """Raises `SourceError` if two columns have one name."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise SourceError(
            f"{what} has two columns of one name",
            got=twice,
            allowed="each column's name once",
            fix=f"rename one of them: {fix}",
        )
