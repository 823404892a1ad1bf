"""Damage to files, as `faults.py` does it: bytes, lines, and values in JSON and YAML."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["damage"]

Draw = random.Random
Damage = Callable[[Path, Draw], object]

_BOMB = "b0: &b0 [x, x]\n" + "".join(
    f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}, *b{n - 1}]\n" for n in range(1, 40)
)
_JUNK = ["\x00", "\ud7ff\u202e", "\ufeff", "𝕏" * 50, "é", "\x1b[2J", "\u2028", "\r", "\t"]
_HUGE = ["9" * 400, "1e999", "-1e999", "NaN", "Infinity", ".inf", "0x" + "f" * 99, "1e400"]
_HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 1e308, -1.5, 1e-320, "", " ", "x", "NaN",
    "\0", "../../x", "/dev/zero", "{{ 'a' * 10**10 }}", "\u202eabc", "9" * 400, "x" * 5000, [], {},
    [[]], {"": None}, [None] * 50, {"a": {"b": {"c": [1]}}}, "!!python/none", "~", "on",
]  # fmt: skip


def damage(path: Path, draw: Draw) -> str:
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
        _BYTES[name](path, draw)
    return name


def _bytes(change: Callable[[bytearray, Draw], bytes | bytearray]) -> Damage:
    return lambda path, draw: path.write_bytes(change(bytearray(path.read_bytes()), draw))


def _flip(data: bytearray, draw: Draw, times: int = 1) -> bytearray:
    for _ in range(times):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def _zeroed(data: bytearray, draw: Draw) -> bytearray:
    at, size = draw.randrange(len(data)), draw.randint(1, 64)
    data[at : at + size] = bytes(len(data[at : at + size]))
    return data


def _inserted(data: bytearray, draw: Draw) -> bytearray:
    at = draw.randrange(len(data) + 1)
    data[at:at] = draw.choice([b"\0", b"\xff\xfe", draw.randbytes(16), b"\x80"])
    return data


_BYTES: dict[str, Damage] = {
    "one bit": _bytes(_flip),
    "many bits": _bytes(lambda data, draw: _flip(data, draw, 20)),
    "cut": _bytes(lambda data, draw: data[: draw.randrange(len(data))]),
    "emptied": _bytes(lambda data, draw: b""),
    "zeros": _bytes(_zeroed),
    "inserted bytes": _bytes(_inserted),
    "appended bytes": _bytes(lambda data, draw: data + draw.randbytes(draw.randint(1, 99))),
    "twice": _bytes(lambda data, draw: data + data),
    "random bytes": _bytes(lambda data, draw: draw.randbytes(len(data))),
}


def _swapped(path: Path, draw: Draw) -> None:
    """Another file of the trial in its place."""
    root = next(folder for folder in path.parents if folder.name == "trial")
    others = sorted(p for p in root.rglob("*") if p.is_file() and p != path)
    shutil.copyfile(draw.choice(others), path)


def _placed(make: Callable[[Path], object]) -> Damage:
    def run(path: Path, draw: Draw) -> None:
        path.unlink()
        make(path)

    return run


_PLACES: dict[str, Damage] = {
    "deleted": _placed(lambda path: None),
    "swapped with another file": _swapped,
    "a folder": _placed(lambda path: path.mkdir()),
    "a pipe": _placed(os.mkfifo),
    "a link to itself": _placed(lambda path: path.symlink_to(path.name)),
    "a link to /dev/zero": _placed(lambda path: path.symlink_to("/dev/zero")),
}


def _lines(change: Callable[[list[str], int, Draw], object]) -> Damage:
    """Changes the lines of a text at one of them."""

    def run(path: Path, draw: Draw) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        change(lines, draw.randrange(len(lines)), draw)
        path.write_text("".join(lines), encoding="utf-8")

    return run


def _exchanged(lines: list[str], i: int, draw: Draw) -> None:
    j = draw.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]


def _spaced(lines: list[str], i: int, draw: Draw) -> None:
    lines[i] = draw.choice(["\n", " ", "\t", "  \n"]) + lines[i]


def _junk(lines: list[str], i: int, draw: Draw) -> None:
    at = draw.randrange(len(lines[i]) + 1)
    lines[i] = lines[i][:at] + draw.choice(_JUNK) + lines[i][at:]


_LINES: dict[str, Damage] = {
    "a line twice": _lines(lambda lines, i, draw: lines.insert(i, draw.choice(lines))),
    "a line less": _lines(lambda lines, i, draw: lines.pop(i)),
    "two lines swapped": _lines(_exchanged),
    "space": _lines(_spaced),
    "junk": _lines(_junk),
}


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of each value of a document."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            found += [(value, key), *_places(value[key])]
    return found


def _tree(change: Callable[[Any, Any, Draw], object]) -> Damage:
    """Changes the place of one value in a document; of rows, in one of them."""

    def run(path: Path, draw: Draw) -> None:
        import yaml

        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            tree = yaml.safe_load(text)
            change(*draw.choice(_places(tree)), draw)
            text = yaml.safe_dump(tree, sort_keys=False)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines()]
            change(*draw.choice(_places(draw.choice(rows))), draw)
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            tree = json.loads(text)
            change(*draw.choice(_places(tree)), draw)
            text = json.dumps(tree, indent=1)
        path.write_text(text, encoding="utf-8")

    return run


def _set_hostile(here: Any, key: Any, draw: Draw) -> None:
    here[key] = draw.choice(_HOSTILE)


def _set_other(here: Any, key: Any, draw: Draw) -> None:
    """Another value of the same type."""
    value = here[key]
    if isinstance(value, bool):
        here[key] = not value
    elif isinstance(value, int | float):
        here[key] = draw.choice([value + 1, -value, value * 10, value / 3, value * 10**9])
    elif isinstance(value, str):
        here[key] = draw.choice([value + "x", value[1:], value.upper(), value[::-1]])
    else:
        here[key] = value * 2 if isinstance(value, list) else {}


def _rename(here: Any, key: Any, draw: Draw) -> None:
    value = here.pop(key)
    here[draw.choice([f"{key}x", str(key)[1:], str(key).upper(), "", "\0", "labels"])] = value


def _deep(path: Path, draw: Draw) -> None:
    depth = draw.choice([120, 1000, 100_000])
    text, nest = path.read_text(encoding="utf-8"), "[" * depth + "]" * depth
    if path.suffix == ".yaml":
        text = f"{text}deep: {nest}\n"
    elif path.suffix == ".jsonl":
        text += f'{{"text": {nest}}}\n'
    else:
        at = text.index("{") + 1
        text = f'{text[:at]}"deep": {nest}, {text[at:]}'
    path.write_text(text, encoding="utf-8")


def _number(path: Path, draw: Draw) -> None:
    """A number beyond all bounds in place of one."""
    text = path.read_text(encoding="utf-8")
    match = draw.choice([*re.finditer(r"(?<=[ \[])-?\d+(?:\.\d+)?\b", text)])
    text = text[: match.start()] + draw.choice(_HUGE) + text[match.end() :]
    path.write_text(text, encoding="utf-8")


def _bomb(path: Path, draw: Draw) -> None:
    if path.suffix != ".yaml":
        raise ValueError
    path.write_text(_BOMB + path.read_text(encoding="utf-8"), encoding="utf-8")


_VALUES: dict[str, Damage] = {
    "a hostile value": _tree(_set_hostile),
    "another value": _tree(_set_other),
    "a key less": _tree(lambda here, key, draw: here.pop(key)),
    "a key renamed": _tree(_rename),
    "deep": _deep,
    "a huge number": _number,
    "an alias bomb": _bomb,
}


def _header(change: Callable[[dict[str, Any], str, Draw], object]) -> Damage:
    """Changes the header of a safetensors file, which stays well-formed, at one tensor."""

    def run(path: Path, draw: Draw) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header, _tensor(header, draw), draw)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return run


def _tensor(header: dict[str, Any], draw: Draw) -> str:
    return draw.choice(sorted(key for key in header if key != "__metadata__"))


def _set(key: str, values: list[Any]) -> Damage:
    return _header(lambda header, name, draw: header[name].update({key: draw.choice(values)}))


def _set_name(header: dict[str, Any], name: str, draw: Draw) -> None:
    header[draw.choice([name + "x", "", "\0", "anchor/x/W"])] = header.pop(name)


def _swap_tensors(header: dict[str, Any], name: str, draw: Draw) -> None:
    other = _tensor(header, draw)
    header[name], header[other] = header[other], header[name]


def _set_length(path: Path, draw: Draw) -> None:
    data = path.read_bytes()
    length = draw.choice([0, 1, 2**40, 2**64 - 1, len(data)])
    path.write_bytes(length.to_bytes(8, "little") + data[8:])


_HEADERS: dict[str, Damage] = {
    "a tensor's shape": _set("shape", [[], [0], [2**62, 2**62], [1, 1], [-1]]),
    "a tensor's type": _set("dtype", ["I32", "BF16", "U8", "X9", "F64", "BOOL"]),
    "a tensor's name": _header(_set_name),
    "two tensors swapped": _header(_swap_tensors),
    "a tensor less": _header(lambda header, name, draw: header.pop(name)),
    "no metadata": _header(lambda header, name, draw: header.pop("__metadata__")),
    "a wrong length": _set_length,
}
