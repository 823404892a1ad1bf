"""Plain text: all of a small file, drawn passages of a large one; and the memory of large files."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from retain.data.counts import RowCounts
from retain.data.draws import draw
from retain.data.readers.text import Text, block_length
from retain.data.rows import Passage
from retain.data.sources import encode, read_rows
from retain.errors import SourceError

WORDS = ["river", "stone", "lamp", "green", "quick", "seven", "paper", "cloud", "music", "north"]


def english(size: int) -> str:
    """Numbered sentences in paragraphs."""
    source, parts, length = random.Random(0), [], 0
    while length < size:
        count = source.randint(3, 12)
        parts.append(f"{len(parts)} {' '.join(source.choices(WORDS, k=count))}.")
        parts.append("\n\n" if source.random() < 0.2 else " ")
        length += len(parts[-1]) + len(parts[-2])
    return "".join(parts)


TEXTS = {
    "paragraphs": english(20_000),
    "one line": " ".join(WORDS * 400),
    "no blanks": "x" * 9_999,
    "no blanks, wide": "漢字" * 3_000,
    "emoji": "\U0001f600" * 3_000,
    "lines": "".join(f"{i}\n" for i in range(4_000)),
    "blank in the middle": "a b\n" * 900 + "\n" * 5_000 + "c d\n" * 900,
}


@pytest.mark.parametrize("length", [64, 1000, 4096])
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_blocks_make_up_the_text(name: str, kind: str, length: int, tmp_path: Path) -> None:
    raw, path = TEXTS[kind].encode(), tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    text = Text(path)
    text.divide(length)
    blocks = text.take(range(len(text)))
    joined = "".join(block["text"] for block in blocks)
    assert joined.split() == TEXTS[kind].split()
    if "middle" not in kind:  # blocks that are blank are left out
        assert joined == TEXTS[kind]
    for block in blocks:  # each is what is there at its place
        assert raw[block.number :].startswith(block["text"].encode())
    assert abs(len(text) * length - len(raw)) < length or len(text) == 1
    some = range(0, len(text), 3)
    alone = [block for place in some for block in text.take([place])]
    assert text.take(some) == alone  # whichever others are read
    assert all(block in blocks for block in alone)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
def test_passages_of_a_large_file(name: str, tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbf" + english(3_000_000).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    rows = read_rows(path, 32, seed=1)
    assert len(rows) == 32 and all(isinstance(row, Passage) for row in rows)
    places = [row.number for row in rows if isinstance(row, Passage)]
    assert places == sorted(places)
    assert places[0] < 500_000 and places[-1] > 2_500_000
    assert sum(len(row["text"]) for row in rows) < len(raw)
    assert min(len(row["text"]) for row in rows) > 20_000
    assert rows == read_rows(path, 32, seed=1) != read_rows(path, 32, seed=2)
    assert not any(row["text"].startswith("\ufeff") for row in read_rows(path, 90, max_length=4096))
    short = read_rows(path, 32, seed=1, max_length=64)
    assert all(384 <= len(row["text"]) <= 1280 for row in short)


@pytest.mark.parametrize("limit", [1, 128, 10_000])
def test_a_small_file_is_one_row(limit: int, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    for most in (None, limit):
        assert read_rows(path, most) == [{"text": "one\ntwo\nthree", "pack": True}]


def test_files_of_a_folder_share_the_draw(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(english(200_000 * number))
    assert len(read_rows(tmp_path)) == 3  # one is empty
    rows = read_rows(tmp_path, 30)
    counts = [sum(row.path.name == f"{n}.txt" for row in rows) for n in range(4)]  # type: ignore[attr-defined]
    assert sum(counts) == 30 and counts[0] == 0
    assert counts[3] > counts[1] > 0  # as much as each holds


def test_the_length_of_a_block() -> None:
    assert block_length(1 << 30, 128, None) == 32 << 10
    assert block_length(1 << 30, 128, 512) == 16 * 512
    assert block_length(1 << 20, 128, 1024) == 8 * 1024
    assert block_length(10, 128, None) == 2 << 10


def test_damage_is_found_where_it_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(english(400_000).encode() + b"\n" + b"caf\xe9 " * 100_000)
    with pytest.raises(SourceError, match=r"line \d+ of .*a.txt is not in UTF-8"):
        read_rows(path, 64)


SIZE = 32 << 20
MEASURE = """
import sys
from pathlib import Path
from retain.data.sources import read_rows
import pyarrow.parquet, pyarrow.ipc  # so that only the reading is measured
def memory(key):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)]
    return int(line.split()[1]) * 1024
few, large = sys.argv[1::2], sys.argv[2::2]
for path in few:
    read_rows(path, 4)
for path in large:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    rows = read_rows(path, 16)
    assert len(rows) == 16, path
    print(path, memory("VmHWM") - before)
"""


def put_everywhere(folder: Path, size: int) -> list[str]:
    """Files of every kind with `size` bytes of rows; their paths."""
    folder.mkdir()
    text = english(2_000)
    rows = [{"text": f"{i} {text}"} for i in range(size // len(text))]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.csv").write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows))
    (folder / "a.txt").write_text("".join(row["text"] for row in rows))
    (folder / "a.txt.gz").write_bytes(gzip.compress(lines.encode(), 1))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", compression="none")
    return sorted(str(path) for path in folder.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot begin anew")
def test_few_rows_of_a_large_file_need_little_memory(tmp_path: Path) -> None:
    few, large = put_everywhere(tmp_path / "few", 1 << 18), put_everywhere(tmp_path / "large", SIZE)
    paths = [path for pair in zip(few, large, strict=True) for path in pair]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], check=True, capture_output=True, text=True
    )
    grown = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert set(grown) == set(large)
    assert {path: size for path, size in grown.items() if int(size) > SIZE // 2} == {}


def test_a_draw_of_a_stream_holds_only_what_it_draws() -> None:
    alive, most = 0, 0

    class Row(dict[str, str]):
        def __init__(self) -> None:
            nonlocal alive, most
            super().__init__(text="so")
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    assert len(read_rows((Row() for _ in range(5_000)), 10)) == 10
    assert most < 20
    assert list(draw(5_000, 10, 0)) != list(range(10))


class TestPassages:
    """What becomes of a drawn passage: its first tokens, and nothing that is counted as lost."""

    @pytest.fixture(scope="class")
    def tokenizer(self, tiny_folder: Path) -> Any:
        return AutoTokenizer.from_pretrained(tiny_folder)

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.txt"
        path.write_text(english(400_000))
        return path

    @pytest.mark.parametrize("length", [16, 128, 1024])
    @pytest.mark.parametrize("known", [False, True])
    def test_one_row_each(self, path: Path, tokenizer: Any, length: int, known: bool) -> None:
        counts = RowCounts()
        rows = read_rows(path, 20, max_length=length if known else None)
        found = encode(rows, tokenizer, max_length=length, causal=True, counts=counts)
        assert len(found) == 20
        for row, example in zip(rows, found, strict=True):
            ids = [*example.tokens, example.targets[-1]]
            assert len(ids) == length
            assert row["text"].startswith(tokenizer.decode(ids))
            assert all(example.predict)
        assert counts.lines() == []

    def test_only_the_first_begins(self, path: Path, tiny_folder: Path) -> None:
        headed = AutoTokenizer.from_pretrained(tiny_folder)
        headed.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        rows = read_rows(path, 150, max_length=128)
        assert isinstance(rows[0], Passage) and rows[0].begins
        found = encode(rows, headed, max_length=128, causal=True)
        assert [e.tokens[0] == 0 for e in found] == [True] + [False] * 149
        assert not any(1 in e.targets for e in found)

    def test_the_line_of_the_file_is_named(self, tmp_path: Path, tokenizer: Any) -> None:
        path = tmp_path / "a.jsonl"
        lines = ['{"text": "so"}', "", '{"text": "so"}', '{"text": 5}']
        path.write_text("\n".join(lines))
        with pytest.raises(SourceError, match=r"line 4 of a\.jsonl"):
            encode(read_rows(path), tokenizer, max_length=8, causal=True)
        with pytest.raises(SourceError, match=r"row 2\b"):
            encode([{"text": "so"}, {"text": 5}], tokenizer, max_length=8, causal=True)
