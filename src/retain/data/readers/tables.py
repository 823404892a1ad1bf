"""Parquet and Arrow files: how many rows there are is known, and any of them can be read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retain.data.rows import PlacedRow, as_row
from retain.errors import SourceError
from retain.extras import load

__all__ = ["Table", "check_names"]

_BATCH, _BYTES = 1024, 2 << 20
"""Rows, and bytes, of a Parquet batch at most; the bytes as they are on average."""
_BUFFER = 1 << 16


class Table:
    """A Parquet file; or an Arrow file or stream, such as `datasets` keeps, mapped, not copied.

    Raises:
        SourceError: two columns have one name.
        MissingExtra: pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() == ".parquet":
            file = self._parquet()
            names, self._count = file.schema_arrow.names, int(file.metadata.num_rows)
        else:
            names, batches = self._arrow()
            self._count = sum(batch.num_rows for batch in batches)
        check_names(names, str(path), "table.rename_columns([...]) in pyarrow")

    def __len__(self) -> int:
        return self._count

    def take(self, places: Sequence[int]) -> list[PlacedRow]:
        """The rows at sorted places, counted from 0."""
        rows: list[PlacedRow] = []
        for start, batch in self._batches(places):
            first, last = (bisect_left(places, at) for at in (start, start + batch.num_rows))
            if first < last:
                some = places[first:last]
                found = batch.take([place - start for place in some]).to_pylist()
                numbers = (place + 1 for place in some)
                rows += [
                    as_row(r, n, "row", self.path) for n, r in zip(numbers, found, strict=True)
                ]
        return rows

    def _batches(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Batches, each with its first row's place; of a row group only up to the last wanted."""
        start = 0
        if self.path.suffix.lower() != ".parquet":
            for batch in self._arrow()[1]:
                yield start, batch
                start += batch.num_rows
            return
        file = self._parquet()
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            at, stop = start, start + about.num_rows
            wanted = bisect_left(places, stop)
            if bisect_left(places, start) < wanted:
                size = max(1, min(_BATCH, _BYTES // (1 + about.total_byte_size // about.num_rows)))
                for batch in file.iter_batches(size, row_groups=[group], use_threads=False):
                    yield at, batch
                    at += batch.num_rows
                    if bisect_left(places, at) == wanted:
                        break
            start = stop

    def _parquet(self) -> Any:
        # without a buffer a whole column of a row group is read at once
        parquet = load("pyarrow.parquet", f"reading {self.path}")
        return parquet.ParquetFile(self.path, buffer_size=_BUFFER, pre_buffer=False)

    def _arrow(self) -> tuple[list[str], list[Any]]:
        pyarrow, ipc = (load(name, f"reading {self.path}") for name in ("pyarrow", "pyarrow.ipc"))
        mapped = pyarrow.memory_map(str(self.path))
        try:
            reader = ipc.open_file(mapped)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            reader = ipc.open_stream(mapped)
            batches = list(reader)
        return reader.schema.names, batches


def check_names(names: Sequence[str], what: str, fix: str, where: str = "") -> None:
    """Raises `SourceError` if two columns have one name."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise SourceError(
            f"{what} has two columns of one name",
            got=f"{twice}{where}",
            allowed="each column's name once",
            fix=f"rename one of them: {fix}",
        )
