"""Damage to files, as `faults.py` does it: bytes, lines, and values in JSON and YAML."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["damage"]

_HUGE = "9" * 400
_BOMB = "b0: &b0 [x, x]\n" + "".join(
    f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}, *b{n - 1}]\n" for n in range(1, 40)
)
_JUNK = ["\x00", "\ud7ff\u202e", "\ufeff", "𝕏" * 50, "é", "\x1b[2J", "\u2028", "\r", "\t"]


def damage(path: Path, draw: random.Random) -> str:
    """Damages one file of a trial, in place; returns how."""
    kinds = [*_BYTES, *_PLACES]
    if path.suffix in (".yaml", ".json", ".jsonl", ".csv", ".txt"):
        kinds += [*_LINES, *_LINES]
    if path.suffix in (".yaml", ".json", ".jsonl"):
        kinds += [*_VALUES] * 3
    if path.suffix == ".safetensors":
        kinds += [*_HEADERS] * 2
    name = draw.choice(kinds)
    before = path.read_bytes()
    every = _BYTES | _PLACES | _LINES | _VALUES | _HEADERS
    try:
        every[name](path, draw)
    except (ValueError, IndexError, KeyError, TypeError):  # nothing there to damage so
        name = "one bit"
        path.write_bytes(before)
        _one_bit(path, draw)
    return name


def _bytes(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Any:
    def run(path: Path, draw: random.Random) -> None:
        path.write_bytes(change(bytearray(path.read_bytes()), draw))

    return run


def _flip(data: bytearray, draw: random.Random, times: int = 1) -> bytearray:
    for _ in range(times):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def _zeroed(data: bytearray, draw: random.Random) -> bytearray:
    at, size = draw.randrange(len(data)), draw.randint(1, 64)
    data[at : at + size] = bytes(len(data[at : at + size]))
    return data


def _inserted(data: bytearray, draw: random.Random) -> bytearray:
    at = draw.randrange(len(data) + 1)
    data[at:at] = draw.choice([b"\0", b"\xff\xfe", draw.randbytes(16), b"\x80"])
    return data


_one_bit = _bytes(_flip)
_BYTES: dict[str, Any] = {
    "one bit": _one_bit,
    "many bits": _bytes(lambda data, draw: _flip(data, draw, 20)),
    "cut": _bytes(lambda data, draw: data[: draw.randrange(len(data))]),
    "emptied": _bytes(lambda data, draw: b""),
    "zeros": _bytes(_zeroed),
    "inserted bytes": _bytes(_inserted),
    "appended bytes": _bytes(lambda data, draw: data + draw.randbytes(draw.randint(1, 99))),
    "twice": _bytes(lambda data, draw: data + data),
    "random bytes": _bytes(lambda data, draw: draw.randbytes(len(data))),
}


def _swapped(path: Path, draw: random.Random) -> None:
    """Another file of the trial in its place."""
    root = path
    while root.name != "trial":
        root = root.parent
    others = sorted(p for p in root.rglob("*") if p.is_file() and p != path)
    shutil.copyfile(draw.choice(others), path)


def _placed(make: Callable[[Path], object]) -> Any:
    def run(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return run


_PLACES: dict[str, Any] = {
    "deleted": _placed(lambda path: None),
    "swapped with another file": _swapped,
    "a folder": _placed(lambda path: path.mkdir()),
    "a pipe": _placed(os.mkfifo),
    "a link to itself": _placed(lambda path: path.symlink_to(path.name)),
    "a link to /dev/zero": _placed(lambda path: path.symlink_to("/dev/zero")),
}


def _lines(change: Callable[[list[str], random.Random], object]) -> Any:
    def run(path: Path, draw: random.Random) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        change(lines, draw)
        path.write_text("".join(lines), encoding="utf-8")

    return run


def _at(lines: list[str], draw: random.Random) -> int:
    return draw.randrange(len(lines))


def _pair(lines: list[str], draw: random.Random) -> None:
    i, j = _at(lines, draw), _at(lines, draw)
    lines[i], lines[j] = lines[j], lines[i]


def _spaced(lines: list[str], draw: random.Random) -> None:
    i = _at(lines, draw)
    lines[i] = draw.choice(["\n", " ", "\t", "  \n"]) + lines[i]


def _junk(lines: list[str], draw: random.Random) -> None:
    i = _at(lines, draw)
    at = draw.randrange(len(lines[i]) + 1)
    lines[i] = lines[i][:at] + draw.choice(_JUNK) + lines[i][at:]


_LINES: dict[str, Any] = {
    "a line twice": _lines(lambda lines, draw: lines.insert(_at(lines, draw), draw.choice(lines))),
    "a line less": _lines(lambda lines, draw: lines.pop(_at(lines, draw))),
    "two lines swapped": _lines(_pair),
    "space": _lines(_spaced),
    "junk": _lines(_junk),
}

_HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 1e308, -1.5, 1e-320, "", " ", "x", "NaN",
    "\0", "../../x", "/dev/zero", "{{ 'a' * 10**10 }}", "\u202eabc", "9" * 400, "x" * 5000, [], {},
    [[]], {"": None}, [None] * 50, {"a": {"b": {"c": [1]}}}, "!!python/none", "~", "on",
]  # fmt: skip


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, part in items:
        found += _nodes(part, (*path, key))
    return found


def _tree(change: Callable[[Any, Any, random.Random], object]) -> Any:
    """Changes the place of one value in a document; of rows, in one of them."""

    def run(path: Path, draw: random.Random) -> None:
        import yaml

        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else None
        if rows is not None:
            tree: Any = rows[draw.randrange(len(rows))]
        else:
            tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        *parents, leaf = draw.choice(_nodes(tree))
        here = tree
        for key in parents:
            here = here[key]
        change(here, leaf, draw)
        if rows is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows)
        elif path.suffix == ".yaml":
            text = yaml.safe_dump(tree, sort_keys=False)
        else:
            text = json.dumps(tree, indent=1)
        path.write_text(text, encoding="utf-8")

    return run


def _set_hostile(here: Any, leaf: Any, draw: random.Random) -> None:
    here[leaf] = draw.choice(_HOSTILE)


def _set_other(here: Any, leaf: Any, draw: random.Random) -> None:
    """Another value of the same type."""
    value = here[leaf]
    if isinstance(value, bool):
        here[leaf] = not value
    elif isinstance(value, int | float):
        here[leaf] = draw.choice([value + 1, -value, value * 10, value / 3, value * 10**9])
    elif isinstance(value, str):
        here[leaf] = draw.choice([value + "x", value[1:], value.upper(), value[::-1]])
    else:
        here[leaf] = type(value)(value) * 2 if isinstance(value, list) else {}


def _rename(here: Any, leaf: Any, draw: random.Random) -> None:
    value = here.pop(leaf)
    here[draw.choice([f"{leaf}x", str(leaf)[1:], str(leaf).upper(), "", "\0", "labels"])] = value


def _deep(path: Path, draw: random.Random) -> None:
    depth = draw.choice([120, 1000, 100_000])
    text = path.read_text(encoding="utf-8")
    nest = "[" * depth + "]" * depth
    if path.suffix == ".yaml":
        path.write_text(f"{text}deep: {nest}\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text(text + f'{{"text": {nest}}}\n', encoding="utf-8")
    else:
        at = text.index("{") + 1
        path.write_text(f'{text[:at]}"deep": {nest}, {text[at:]}', encoding="utf-8")


def _number(path: Path, draw: random.Random) -> None:
    """A number beyond all bounds in place of one."""
    import re

    text = path.read_text(encoding="utf-8")
    match = draw.choice([*re.finditer(r"(?<=[ \[])-?\d+(?:\.\d+)?\b", text)])
    by = draw.choice(
        [_HUGE, "1e999", "-1e999", "NaN", "Infinity", ".inf", "0x" + "f" * 99, "1e400"]
    )
    path.write_text(text[: match.start()] + by + text[match.end() :], encoding="utf-8")


def _bomb(path: Path, draw: random.Random) -> None:
    if path.suffix != ".yaml":
        raise ValueError
    path.write_text(_BOMB + path.read_text(encoding="utf-8"), encoding="utf-8")


_VALUES: dict[str, Any] = {
    "a hostile value": _tree(_set_hostile),
    "another value": _tree(_set_other),
    "a key less": _tree(lambda here, leaf, draw: here.pop(leaf)),
    "a key renamed": _tree(_rename),
    "deep": _deep,
    "a huge number": _number,
    "an alias bomb": _bomb,
}


def _header(change: Callable[[dict[str, Any], random.Random], object]) -> Any:
    """Changes the header of a safetensors file, which stays well-formed."""

    def run(path: Path, draw: random.Random) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header, draw)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return run


def _tensor(header: dict[str, Any], draw: random.Random) -> str:
    return draw.choice(sorted(key for key in header if key != "__metadata__"))


def _set_shape(header: dict[str, Any], draw: random.Random) -> None:
    header[_tensor(header, draw)]["shape"] = draw.choice([[], [0], [2**62, 2**62], [1, 1], [-1]])


def _set_type(header: dict[str, Any], draw: random.Random) -> None:
    header[_tensor(header, draw)]["dtype"] = draw.choice(["I32", "BF16", "U8", "X9", "F64", "BOOL"])


def _set_name(header: dict[str, Any], draw: random.Random) -> None:
    name = _tensor(header, draw)
    header[draw.choice([name + "x", "", "\0", "anchor/x/W"])] = header.pop(name)


def _swap_tensors(header: dict[str, Any], draw: random.Random) -> None:
    one, two = _tensor(header, draw), _tensor(header, draw)
    header[one], header[two] = header[two], header[one]


def _set_length(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    length = draw.choice([0, 1, 2**40, 2**64 - 1, len(data)])
    path.write_bytes(length.to_bytes(8, "little") + data[8:])


_HEADERS: dict[str, Any] = {
    "a tensor's shape": _header(_set_shape),
    "a tensor's type": _header(_set_type),
    "a tensor's name": _header(_set_name),
    "two tensors swapped": _header(_swap_tensors),
    "a tensor less": _header(lambda header, draw: header.pop(_tensor(header, draw))),
    "no metadata": _header(lambda header, draw: header.pop("__metadata__")),
    "a wrong length": _set_length,
}
