"""YAML and JSON that others wrote: plain data within bounds, or one line with the place."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from retain.config import RunConfig, read_config
from retain.data.specs import load_task
from retain.documents import (
    DEPTH,
    YAML_BYTES,
    Unreadable,
    parse_json,
    parse_yaml,
    read_json,
    read_mapping,
    read_text,
)
from retain.errors import ConfigError, RetainError, shown
from retain.study.spec import read_study

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 30)
)
HOSTILE = {
    "aliases": BOMB,
    "aliases in a mapping": BOMB.replace("[", "{k: ").replace(", *", ", l*").replace("]", "}"),
    "merged aliases": "a: &a {x: 1}\n"
    + "".join(f"b{n}: &b{n} {{y: [*a, {', '.join(['*a'] * 2000)}]}}\n" for n in range(20)),
    "an alias of itself": "a: &a [1, *a]",
    "an unknown alias": "a: *b",
    "deep lists": "a: " + "[" * 5000 + "]" * 5000,
    "deep lists, open": "a: " + "[" * 200_000,
    "deep mappings": "".join(" " * n + "a:\n" for n in range(400)),
    "deep dashes": "- " * 3000 + "x",
    "many values": "a: [" + "1," * 50_000 + "]",
    "large": "a: " + "x" * YAML_BYTES,
    "a large number": "seeds: [" + "9" * 5000 + "]",
    "a large hexadecimal": "seeds: 0x" + "f" * 70,
    "no finite number": "strength: .inf",
    "no number": "strength: .nan",
    "too large a float": "strength: 1e999",
    "a NUL": 'a: "x\0y"',
    "a control character": "a: \x07",
    "half a pair": 'a: "\\ud800"',
    "a bad escape": 'a: "\\q"',
    "twice": "name: a\nname: b",
    "twice below": "a: {b: 1, 'b': 2}",
    "a list for a key": "? [a, b]\n: c",
    "two documents": "a: 1\n---\nb: 2",
    "a tab": "a:\n\t- b",
    "not closed": "a: [1, 2",
    "a newer YAML": "%YAML 9.9\n---\na: 1",
    **{f"tag {tag}": f"name: {tag} x" for tag in ("!!int", "!!bool", "!!float", "!!null",
        "!!timestamp", "!!binary", "!!set", "!!omap", "!!pairs", "!mine", "!!python/none",
        "!!python/object/apply:os.getcwd", "!!merge", "!!python/name:os.system", "!!int ''",
        "!!map", "!!seq", "!!str")},
}  # fmt: skip


def line_of(call: Any) -> str:
    """The one line of a refusal, which comes soon."""
    begin = time.monotonic()
    with pytest.raises(RetainError) as caught:
        call()
    assert time.monotonic() - begin < 5
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 1500
    assert said.isprintable()
    return said


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_yaml_is_refused_in_one_line_by_every_reader(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE[name], encoding="utf-8")
    for read in (
        lambda: read_config(path, {}, RunConfig),
        lambda: read_study(path),
        lambda: load_task(path),
    ):
        said = line_of(read)
        assert "cannot be read" in said and "hostile.yaml" in said
        assert "line " in said or "larger than" in said


@pytest.mark.parametrize(
    "data",
    [b"a: \xff", b"\xff\xfea\0:\0", b"a: 1\nb: \xc3", b"\x80", b"name: \xed\xa0\x80"],
)
def test_no_utf8(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    assert "no UTF-8 text" in line_of(lambda: read_mapping(path, "it", "mend it"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with a name")
@pytest.mark.parametrize("kind", ["zero", "null", "pipe", "folder", "nothing", "NUL", "loop"])
def test_what_is_no_regular_file(kind: str, tmp_path: Path) -> None:
    path = {
        "zero": Path("/dev/zero"), "null": Path("/dev/null"), "pipe": tmp_path / "pipe",
        "folder": tmp_path, "nothing": tmp_path / "nothing.yaml", "NUL": tmp_path / "a\0b.yaml",
        "loop": tmp_path / "loop.yaml",
    }[kind]  # fmt: skip
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for read in (
        lambda: read_config(path, {}, RunConfig),
        lambda: read_study(path),
        lambda: read_mapping(path, "it", "mend it"),
    ):
        line_of(read)


def test_yaml_is_the_core_schema() -> None:
    text = """
        words: [on, off, yes, no, y, n, 2024-13-45, 2024-01-01, 1:30, 1_000, =, 0b1]
        numbers: [010, -3, +4, 0x1F, 0o17, 1e-4, 1.5, .5, 2., -1.5E+3]
        truth: [true, False, TRUE]
        nothing: [null, ~, '', ]
        1: one
        true: two
        base: &base {a: 1, b: 2}
        merged: {<<: *base, b: 3}
        """
    assert parse_yaml(text) == {
        "words": [
            "on", "off", "yes", "no", "y", "n", "2024-13-45", "2024-01-01", "1:30", "1_000", "=",
            "0b1",
        ],
        "numbers": [10, -3, 4, 31, 15, 1e-4, 1.5, 0.5, 2.0, -1500.0],
        "truth": [True, False, True],
        "nothing": [None, None, ""],
        "1": "one",
        "true": "two",
        "base": {"a": 1, "b": 2},
        "merged": {"a": 1, "b": 3},
    }  # fmt: skip


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_plain_data_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_plain_yaml_is_read_as_it_was_written(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump({"v": json.loads(json.dumps(value))})) == {"v": value}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text("[]{}:,-&*!|>'\"%@`#? \n\ta1.e<", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        said = ""
        try:
            parse(text)
        except Unreadable as error:
            said = str(error)
        assert "\n" not in said


@pytest.mark.parametrize(("text", "said"), [
    ("[" * 100_000, "deep"), ('{"a":' * 100_000, "deep"), ("[" * 101 + "]" * 101, "deep"),
    ('["' + "[" * 5000, "no JSON"), ("[1" + "0" * 5000 + "]", "64 bits"),
    ("[-18446744073709551616]", "64 bits"), ("[NaN]", "no finite number"),
    ("[-Infinity]", "no finite number"), ("[1e999]", "no finite number"),
    ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice"), (r'["\ud800"]', "surrogate"),
    (r'{"\uDFFF": 1}', "surrogate"), ("", "no JSON"), ("{'a': 1}", "no JSON"),
    ('[1,\n2,\n"x\0"]', "line 3"),
])  # fmt: skip
def test_hostile_json(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Unreadable, match=said):
        read_json(path)


def test_json_within_the_bounds() -> None:
    assert parse_json("[" * DEPTH + "]" * DEPTH)
    assert parse_json(json.dumps("[" * 1000 + '"' + "]" * 999)) == "[" * 1000 + '"' + "]" * 999
    assert parse_json(r'["\ud83d\ude00"]') == ["😀"]
    assert str(parse_json("[NaN, -Infinity]", nan=True)) == "[nan, -inf]"


def test_a_file_has_a_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x" * 11)
    assert read_text(path, 11) == "x" * 11
    with pytest.raises(Unreadable, match="larger than 10"):
        read_text(path, 10)


def test_what_is_shown_is_bounded() -> None:
    bomb: list[Any] = ["x"] * 9
    for _ in range(60):
        bomb = [bomb] * 9
    for value in (
        bomb,
        {"a": bomb},
        (bomb,),
        10**100_000,
        "x" * 10**6,
        [10**5000],
        {1: "\n" * 999},
    ):
        begin = time.monotonic()
        assert len(shown(value)) <= 120
        assert time.monotonic() - begin < 1
    assert shown("a'b") == '"a\'b"'
    assert shown([1, 2.5, None]) == "[1, 2.5, None]"
    said = str(ConfigError("what", got="\x1b[31m" + "y" * 10**6, allowed="a", fix="b"))
    assert len(said) < 700 and "\x1b" not in said and said.endswith("; fix: b")
