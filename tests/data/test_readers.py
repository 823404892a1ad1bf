"""Files as people have them: read right, or refused with the line and a fix that works."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, DatasetDict

from retain.data.rows import place_of
from retain.data.sources import read_rows
from retain.errors import SourceError

ROWS = [{"text": f"row {i} é", "label": i} for i in range(20)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
FRAME = pandas.DataFrame(ROWS)
CYRILLIC = '{"text": "привет мир"}\n'


def zstd(raw: bytes) -> bytes:
    return bytes(pyarrow.compress(raw, codec="zstd", asbytes=True))


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}

READ: dict[str, tuple[str, str | bytes, list[dict[str, Any]]]] = {
    "old Mac's line ends": ("a.csv", CSV.replace("\n", "\r"), []),
    "a mark before lines": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode(), []),
    "a mark before an array": ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), []),
    "tabs in .csv": ("a.csv", CSV.replace(",", "\t"), []),
    "bars": ("a.csv", CSV.replace(",", "|"), []),
    "Excel's sep=": ("a.csv", "sep=;\n" + CSV.replace(",", ";"), []),
    "blanks in the header": ("a.csv", CSV.replace("text,label", " text , label "), []),
    "blank lines in CSV": ("a.csv", CSV.replace("\n", "\n\n"), []),
    "a cell of several lines": ("a.csv", 'text,label\n"a\nb, ""c""",1\n', [{"text": 'a\nb, "c"',
        "label": "1"}]),
    "quotes inside": ("a.csv", 'text\na "b" c\n', [{"text": 'a "b" c'}]),
    "a large cell": ("a.csv", f"text\n{'x' * 200_000}\n", [{"text": "x" * 200_000}]),
    "an index column": ("a.csv", ",text\n0,a\n", [{"Unnamed: 0": "0", "text": "a"}]),
    "a comma in semicolons": ("a.csv", "text;label\na, b;1\n", [{"text": "a, b", "label": "1"}]),
    "objects over lines": ("a.json", "\n".join(json.dumps(r, indent=2) for r in ROWS), []),
    "an array of texts": ("a.json", '["a", "b"]', [{"text": "a"}, {"text": "b"}]),
    "one object": ("a.json", json.dumps(ROWS[0], indent=1), ROWS[:1]),
    "one chat": ("a.json", '{"messages": [{"role": "user", "content": "x"}]}',
        [{"messages": [{"role": "user", "content": "x"}]}]),
    "pandas' records": ("a.json", FRAME.to_json(orient="records"), []),
    "pandas' lines": ("a.jsonl", FRAME.to_json(orient="records", lines=True), []),
    ".ndjson": ("a.ndjson", LINES, []),
    "strings": ("a.jsonl", '"a"\n"b"\n', [{"text": "a"}, {"text": "b"}]),
    "NaN": ("a.jsonl", '{"text": NaN}', [{"text": None}]),
    "a line separator in a text": ("a.jsonl", '{"text": "a\u2028b"}\n', [{"text": "a\u2028b"}]),
    "an emoji as two halves": ("a.jsonl", '{"text": "\\ud83d\\ude00"}\n', [{"text": "\U0001f600"}]),
}  # fmt: skip

REFUSED: dict[str, tuple[str, str | bytes, str, str]] = {
    # a name, what it holds, what is said, and a piece of the fix
    "a broken line": ("a.jsonl", LINES.replace('"row 6 ', "row 6 "), "line 7 of", "sed -n 7p"),
    "a broken line after blanks": ("a.jsonl", "\n\n" + LINES + "{", "line 23 of", ".json"),
    "an array in a line": ("a.jsonl", json.dumps(ROWS), "line 1 of .* array of rows", "a.json"),
    "an object over lines": ("a.jsonl", json.dumps(ROWS[0], indent=1), "line 1 of", "a.json"),
    "two objects in a line": ("a.jsonl", '{"text":"a"}{"text":"b"}', "Extra data", "new line"),
    "a field twice": ("a.jsonl", '{"text":"a","text":"b"}', "'text' is there twice", "sed -n 1p"),
    "null": ("a.jsonl", LINES + "null\n", "line 21 of .*None", "leave the row out"),
    "a number": ("a.jsonl", "1\n", "line 1 of .*an int", "{'text': ...}"),
    "half a character": ("a.jsonl", '{"text": "\\ud83d"}', "line 1 of .* half a char", "replace"),
    "brackets": ("a.jsonl", LINES + "[" * 100_000, "line 21 of .*nested", "sed -i 21d"),
    "brackets in .json": ("a.json", "[" * 100_000, "nested too deeply", "take that row out"),
    "a long number": ("a.jsonl", '{"label": ' + "9" * 5000 + "}", "line 1 of .*digits", "sed"),
    "a broken array": ("a.json", json.dumps(ROWS, indent=1).replace('"row 7', "row 7"),
        "line 31 of", "sed -n 31p"),
    "a cut array": ("a.json", json.dumps(ROWS)[:-9], "line 1 of .*Unterminated|Expecting", "sed"),
    "no comma": ("a.json", '[{"text":"a"}\n{"text":"b"}]', "line 2 of .*comma", "sed -n 2p"),
    "a field twice in .json": ("a.json", '[{"text":"a","text":"b"}]', "there twice", "sed -n 1p"),
    "splits in .json": ("a.json", json.dumps({"train": ROWS, "test": ROWS}),
        "several lists of rows; got: train, test", "['train']"),
    "a frame": ("a.json", FRAME.to_json(), "columns, not rows", "orient='records'"),
    "a frame, split": ("a.json", FRAME.to_json(orient="split"), "columns", "orient='records'"),
    "one comma too many": ("a.csv", "text,label\na,1\nb, c,2\n", "line 3 of .*3 cells",
        "commas in"),
    "one semicolon too many": ("a.csv", "text;label\na; b;1\n", "line 2 of .*3 cells",
        "semicolons in quotation marks"),
    "a cell too few": ("a.csv", "text,label\na,1\n\nb\n", "line 4 of .*1 cell;", "fill the row"),
    "after a cell of lines": ("a.csv", 'text,label\n"a\nb",1\nc\n', "line 4 of", "fill the row"),
    "a column twice": ("a.csv", "text,text\na,b\n", "two columns of one name; got: text", "rename"),
    "a column twice but for blanks": ("a.csv", "text, text\na,b\n", "two columns", "rename"),
    "an open quote": ("a.csv", 'text,label\na,1\n"b,2\nc,3\n', "line 3 of .*no CSV", "sed -n 3p"),
    "a stray quote": ("a.csv", 'text,label\n"a"b,1\n', "line 2 of .*no CSV", "orient='records'"),
    "commas in .tsv": ("a.tsv", CSV, "no tabs; got: commas", "mv "),
    "a NUL in CSV": ("a.csv", b"text\n" + b"a\n" * 40_000 + b"b\0\n", "line 40002 of .*NUL", "sed"),
    "a NUL": ("a.jsonl", LINES * 400 + '{"text": "a\0"}', "line 8001 of .*NUL", "sed -n 8001p"),
    "a NUL in text": ("a.txt", b"a\n" * 9 + b"b\0\n", "line 10 of .*NUL", "sed -n 10p"),
    "gzip without .gz": ("a.jsonl", gzip.compress(LINES.encode()), "got: gzip data", "mv "),
    "zstd without .zst": ("a.csv", zstd(CSV.encode()), "got: zstd data", "mv "),
    "no gzip in .gz": ("a.csv.gz", CSV, "cannot be read.*no .gz data", "without .gz"),
    "a cut .gz": ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], "cut short", "download"),
    "a cut .xz": ("a.jsonl.xz", lzma.compress(LINES.encode())[:-9], "cut short", "download"),
    "a cut .zst": ("a.jsonl.zst", zstd(LINES.encode())[:-9], "Truncated", "download"),
    "Parquet named .csv": ("a.csv", b"PAR1....", "got: Parquet data", "mv "),
    "a workbook named .csv": ("a.csv", b"PK\x03\x04....", "Office document", "CSV UTF-8"),
    "an LFS pointer": ("a.parquet", "version https://git-lfs.github.com/", "pointer", "lfs pull"),
    "no Parquet": ("a.parquet", b"nothing", "cannot be read", "download"),
    "no Arrow": ("a.arrow", b"nothing", "cannot be read", "download"),
    "UTF-16": ("a.csv", CSV.encode("utf-16"), "not in UTF-8; got: UTF-16", "-f UTF-16 "),
    "UTF-16 without a mark": ("a.csv", CSV.encode("utf-16-be"), "UTF-16BE", "-f UTF-16BE "),
    "UTF-32": ("a.jsonl", LINES.encode("utf-32"), "got: UTF-32", "-f UTF-32 "),
    "Windows-1252": ("a.csv", CSV.encode("cp1252"), "line 2 of .*0xe9", "-f WINDOWS-1252 "),
    "Windows-1252 lines": ("a.jsonl", LINES.encode("cp1252"), "line 1 of", "-f WINDOWS-1252 "),
    "Windows-1252 text": ("a.txt", b"so\n" * 9 + "“naïve”".encode("cp1252"), "line 10 of .*0x93",
        "-f WINDOWS-1252 "),
    "Windows-1252 array": ("a.json", json.dumps(ROWS, ensure_ascii=False).encode("cp1252"),
        "not in UTF-8", "-f WINDOWS-1252 "),
    "UTF-16 in .gz": ("a.csv.gz", gzip.compress(CSV.encode("utf-16")), "UTF-16", "gzip -dc"),
    "another encoding": ("a.jsonl", CYRILLIC.encode("cp1251"), "WINDOWS-1251", "ITS_ENCODING"),
    "a cut character": ("a.jsonl", '{"text": "é'.encode()[:-1], "middle of a char", "download"),
    "nothing": ("a.jsonl", "", "the source is empty", "with text"),
    "blank lines only": ("a.jsonl", "\n \n", "the source is empty", "with text"),
    "a header only": ("a.csv", "text,label\n", "the source is empty", "with text"),
    "an empty array": ("a.json", "[]", "the source is empty", "with text"),
    "blank text": ("a.txt", " \n\n", "the source is empty", "with text"),
    "a workbook": ("a.xlsx", b"PK\x03\x04", "an unknown kind", "CSV UTF-8"),
    "a pickle": ("a.pkl", b"", "an unknown kind", "pickles run code"),
    "a log": ("a.log", "so", "an unknown kind", ".txt"),
    "no suffix": ("a", "so", "an unknown kind", "suffix"),
}  # fmt: skip


def put(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def same(rows: Any) -> list[dict[str, str]]:
    return [{key: str(value) for key, value in row.items()} for row in rows]


@pytest.mark.parametrize("kind", READ)
def test_read(kind: str, tmp_path: Path) -> None:
    name, data, want = READ[kind]
    assert same(read_rows(put(tmp_path, name, data))) == same(want or ROWS)


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
def test_compressed(name: str, packed: str, tmp_path: Path) -> None:
    text = {".csv": CSV, ".tsv": CSV.replace(",", "\t")}.get(Path(name).suffix, LINES)
    plain = read_rows(put(tmp_path, name, text))
    small = read_rows(put(tmp_path, name + packed, PACKERS[packed](text.encode())))
    assert small == plain


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("error")
def test_refused(kind: str, tmp_path: Path) -> None:
    name, data, said, fix = REFUSED[kind]
    path = put(tmp_path, name, data)
    for limit in (None, 10_000):
        with pytest.raises(SourceError, match=said) as error:
            read_rows(path, limit)
        assert fix in str(error.value.fix)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


MENDED = [
    kind
    for kind, (_, _, _, fix) in REFUSED.items()
    if fix.startswith(("-f WIN", "-f UTF", "gzip -dc", "mv ", "a.json", "sed -i"))
]


@pytest.mark.parametrize("kind", MENDED)
def test_the_fix_works(kind: str, tmp_path: Path) -> None:
    name, data, _, _ = REFUSED[kind]
    with pytest.raises(SourceError) as error:
        read_rows(put(tmp_path, name, data))
    command = "mv " + str(error.value.fix).partition("mv ")[2]
    if "iconv" in str(error.value.fix) or "sed -i" in str(error.value.fix):
        command = str(error.value.fix).removeprefix("take the line out: ")
    for tool in ("iconv", "gzip", "sed"):
        if tool in command and not shutil.which(tool):
            pytest.skip(f"no {tool} here")
    before = set(tmp_path.iterdir())
    subprocess.run(command, shell=True, check=True)
    made = sorted(set(tmp_path.iterdir()) - before) or sorted(before)
    if kind == "Parquet named .csv":  # of which only the first bytes are here
        assert made[0].suffix == ".parquet"
        return
    assert len(read_rows(made[0])) in {1, 20}


def test_a_draw_reads_only_what_it_draws(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", LINES.replace('"row 6 ', "row 6 "))
    seeds = {seed: _tries(path, seed) for seed in range(30)}
    assert {True, False} == set(seeds.values())  # the broken line shows when it is drawn


def _tries(path: Path, seed: int) -> bool:
    try:
        read_rows(path, 10, seed=seed)
    except SourceError:
        return False
    return True


def test_every_row_of_csv_is_checked(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", CSV + "one,two,three\n")
    with pytest.raises(SourceError, match="line 22 of"):
        read_rows(path, 1)


def test_a_cell_of_another_module_has_its_limit_back(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    read_rows(put(tmp_path, "a.csv", CSV))
    with pytest.raises(SourceError):
        read_rows(put(tmp_path, "b.csv", "text\na,b\n"))
    assert csv.field_size_limit() == before


class TestPlaces:
    @pytest.mark.parametrize(("name", "text", "place"), [
        ("a.jsonl", LINES, "line 20 of a.jsonl"),
        ("a.jsonl", "\n\n" + LINES, "line 22 of a.jsonl"), ("a.csv", CSV, "line 21 of a.csv"),
        ("a.csv", CSV.replace("row 3 é", '"row\n3"'), "line 22 of a.csv"),
        ("a.csv", "sep=,\n" + CSV, "line 22 of a.csv"),
        ("a.json", json.dumps(ROWS), "row 20 of a.json"),
    ])  # fmt: skip
    def test_the_last_row(self, name: str, text: str, place: str, tmp_path: Path) -> None:
        assert place_of(read_rows(put(tmp_path, name, text))[-1], 0) == place

    def test_parquet(self, tmp_path: Path) -> None:
        FRAME.to_parquet(tmp_path / "a.parquet")
        rows = read_rows(tmp_path / "a.parquet", 3)
        for row in rows:
            assert place_of(row, 0) == f"row {row['label'] + 1} of a.parquet"


class TestFolders:
    @pytest.mark.parametrize(("files", "said", "fix"), [
        (["a.jsonl", "b.csv"], "several kinds; got: .csv, .jsonl", "a.jsonl"),
        (["train.jsonl", "test.jsonl"], "several splits; got: test, train", "train.jsonl"),
        (["train.jsonl.gz", "validation.jsonl"], "several splits", "train.jsonl.gz"),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-0.jsonl"],
            "several splits", "train*.jsonl'"),
        (["README.md", "LICENSE.txt"], "holds no file of rows", "another folder"),
        ([".hidden.jsonl"], "holds no file of rows", "another folder"),
        (["data/train.jsonl"], "holds no file of rows", "data"),
        ([], "holds no file of rows", "another folder"),
        (["train-00000-of-00001-a09b74b3ef9c3b56.jsonl",
            "test-00000-of-00001-1b2c3d4e5f6a.jsonl"], "several splits; got: test, train",
            "train-00000-of-00001-a09b74b3ef9c3b56.jsonl"),
        (["train_sft-0.jsonl", "test_sft-0.jsonl", "train_sft-1.jsonl"],
            "several splits; got: test_sft, train_sft", "train_sft*.jsonl'"),
        (["news.train.jsonl", "news.dev.jsonl"], "several splits", "news.train.jsonl"),
        (["Train-0.jsonl.gz", "Train-1.jsonl.gz", "Test.jsonl.gz"], "several splits",
            "Train*.jsonl.gz'"),
        (["a.jsonl", "a.jsonl.gz"], "twice.*; got: a.jsonl and a.jsonl.gz", "a.jsonl.gz"),
        (["x/b/refs.bin", "x/snapshots/1/data/train.jsonl"], "no file of rows", "1/data"),
        (["x/test/0.jsonl", "x/train/0.jsonl", "README.md"], "no file of rows", "x/train"),
        (["config.json", "train.jsonl"], "several kinds", "train.jsonl, or"),
    ])  # fmt: skip
    def test_refused(self, files: list[str], said: str, fix: str, tmp_path: Path) -> None:
        for file in files:
            data = LINES.encode()
            put(tmp_path, file, gzip.compress(data) if file.endswith(".gz") else data)
        with pytest.raises(SourceError, match=said) as error:
            read_rows(tmp_path)
        assert fix in str(error.value.fix)

    def test_splits_by_a_pattern(self, tmp_path: Path) -> None:
        for file in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
            put(tmp_path, file, LINES)
        assert len(read_rows(f"{tmp_path}/train*.jsonl")) == 40
        with pytest.raises(SourceError, match="no such source"):
            read_rows(f"{tmp_path}/dev*.jsonl")

    def test_what_datasets_has_saved(self, tmp_path: Path) -> None:
        data = Dataset.from_list(ROWS)
        data.save_to_disk(tmp_path / "one")
        assert read_rows(tmp_path / "one") == ROWS
        DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
        with pytest.raises(SourceError, match="splits, not rows; got: test, train") as error:
            read_rows(tmp_path / "two")
        assert str(error.value.fix).endswith("two/train")
        assert read_rows(tmp_path / "two" / "train") == ROWS
        shutil.rmtree(tmp_path / "one" / ".x", ignore_errors=True)
        (tmp_path / "one" / "state.json").write_text("{")
        with pytest.raises(SourceError, match="cannot be read"):
            read_rows(tmp_path / "one")


class TestPaths:
    @pytest.mark.parametrize(("source", "fix"), [
        ("", "check the path"), ("nowhere.jsonl", "check the path"),
        ("data/nowhere.jsonl", "check the path"), ("*.nothing", "check the path"),
        ("a\0b", "check the path"), ("The quick brown fox jumps over the dog.", "[text]"),
        ("Two\nlines", "[text]"), ("x" * 5000, "[text]"),
        ("https://example.com/a.jsonl", "curl -LO"),
        ("https://huggingface.co/datasets/tatsu-lab/alpaca", "name: tatsu-lab/alpaca"),
        ("https://huggingface.co/datasets/a/b/blob/main/c.jsonl", "name: a/b"),
        ("https://huggingface.co/datasets/a/b/resolve/main/c.jsonl", "curl -LO"),
        ("hf://datasets/a/b/data/c.parquet", "name: a/b"),
        ("s3://bucket/a.jsonl", "download it first, and"), ("imdb", "OWNER/imdb"),
        ("self", "leave the source out"),
    ])  # fmt: skip
    def test_missing(
        self, source: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SourceError) as error:
            read_rows(source)
        assert fix in str(error.value.fix)
        assert len(str(error.value)) < 600

    def test_no_regular_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.jsonl")
        for path in ("/dev/zero", tmp_path / "a.jsonl"):
            with pytest.raises(SourceError, match="a device or a pipe"):
                read_rows(path)

    def test_links(self, tmp_path: Path) -> None:
        os.symlink("nowhere.jsonl", tmp_path / "broken.jsonl")
        os.symlink("loop.jsonl", tmp_path / "loop.jsonl")
        for name in ("broken.jsonl", "loop.jsonl"):
            with pytest.raises(SourceError, match="no such source"):
                read_rows(tmp_path / name)
        os.symlink(put(tmp_path, "x/a.jsonl", LINES), tmp_path / "link.jsonl")
        assert read_rows(tmp_path / "link.jsonl") == ROWS

    def test_a_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        path = put(tmp_path, "a.jsonl", LINES)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root reads everything")
        with pytest.raises(SourceError, match=r"cannot be read.*Permission denied"):
            read_rows(path)


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="two columns of one name"):
        read_rows(tmp_path / "a.parquet")


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
        """A hub with one data set of two splits and one of one."""
        monkeypatch.chdir(tmp_path)
        asked: list[Any] = []

        def load(path: str, name: str | None, *, split: str | None) -> Any:
            asked.append((path, name, split))
            data = Dataset.from_list(ROWS)
            if path == "own/several" and name is None:
                raise ValueError("Config name is missing. Please pick one among ['a', 'b']")
            if split is not None:
                return data
            return DatasetDict(train=data) if path == "own/one" else DatasetDict(b=data, train=data)

        monkeypatch.setattr("datasets.load_dataset", load)
        return asked

    @pytest.mark.parametrize(("name", "want"), [
        ("own/two:train", ("own/two", None, "train")), ("own/one", ("own/one", None, None)),
        ("own/several/a:train", ("own/several", "a", "train")),
        ("own/two:train[:10%]", ("own/two", None, "train[:10%]")),
        ("own/v1.5-two:test", ("own/v1.5-two", None, "test")),
    ])  # fmt: skip
    def test_read(self, name: str, want: Any, hub: list[Any]) -> None:
        assert read_rows(name, 3) == read_rows(ROWS, 3)
        assert hub == [want]

    def test_a_split_is_needed(self, hub: list[Any]) -> None:
        with pytest.raises(SourceError, match="several splits; got: b, train") as error:
            read_rows("own/two")
        assert error.value.fix == "pick a split: own/two:train"
        with pytest.raises(SourceError, match=r"several configurations.*'a', 'b'"):
            read_rows("own/several")

    @pytest.mark.parametrize(
        "source",
        ["data/train.jsonl", "here/nowhere", "one", "own/a/b/c", "/own/one", "./own/one", "own/"],
    )
    def test_a_path_is_no_name(self, source: str, hub: list[Any], tmp_path: Path) -> None:
        (tmp_path / "here").mkdir()
        with pytest.raises(SourceError, match="no such source"):
            read_rows(source)
        with pytest.raises(SourceError, match="no such source"):
            read_rows(Path("own/one"))
        assert hub == []

    def test_offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import datasets

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(SourceError, match=r"no file or folder own/none.*fix: check") as error:
            read_rows("own/none:train")
        assert "\n" not in str(error.value)


def test_nothing_is_copied_to_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Callable[[], Any] = lambda: list((tmp_path / "cache").rglob("*"))  # noqa: E731
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, text in (("a.csv", CSV), ("a.jsonl", LINES), ("a.json", json.dumps(ROWS))):
        read_rows(put(tmp_path, name, text))
    FRAME.to_parquet(tmp_path / "a.parquet")
    read_rows(tmp_path / "a.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    before = sorted(p.name for p in (tmp_path / "saved").iterdir())
    read_rows(tmp_path / "saved", 3)
    assert cache() == [] and sorted(p.name for p in (tmp_path / "saved").iterdir()) == before
