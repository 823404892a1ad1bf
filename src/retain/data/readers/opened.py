"""Files as bytes: what compresses them, what they are written in, and what is said of damage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from retain.errors import SourceError
from retain.extras import classes_of, load

__all__ = ["COMPRESSIONS", "check_head", "decoded", "open_bytes", "open_text", "reading", "size_of"]


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    pyarrow = load("pyarrow", f"reading {path}")
    stream = pyarrow.input_stream(str(path), compression="zstd")
    return io.BufferedReader(cast(io.RawIOBase, stream), _CHUNK)


_OPENERS: dict[str, tuple[Callable[..., Any], str]] = {
    ".gz": (gzip.open, "gzip"), ".bz2": (bz2.open, "bzip2"), ".xz": (lzma.open, "xz"),
    ".zst": (_open_zstd, "zstd"),
}  # fmt: skip
COMPRESSIONS = tuple(_OPENERS)

_CHUNK, _HEAD = 1 << 20, 1 << 16
_UTF8 = "utf-8-sig"  # Excel and PowerShell begin a file with a byte order mark

_MAGIC = (
    (b"\x1f\x8b", "gzip data", ".gz"),
    (b"BZh", "bzip2 data", ".bz2"),
    (b"\xfd7zXZ", "xz data", ".xz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", ".zst"),
    (b"PAR1", "Parquet data", ".parquet"),
    (b"ARROW1", "Arrow data", ".arrow"),
    (b"PK\x03\x04", "a zip archive or an Office document", "unpack it, or save it as CSV UTF-8"),
    (b"%PDF", "a PDF", "extract its text"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as CSV UTF-8"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "git lfs pull"),
)
"""How files begin; what they are; the suffix that they should have, or what to do."""

_WESTERN = 0.3
"""Letters that are no ASCII, as a share: fewer in Western texts, more in others."""
_WIDE = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, decompressed."""
    if path.suffix.lower() in _OPENERS:
        return cast(IO[bytes], _OPENERS[path.suffix.lower()][0](path, "rb"))
    return path.open("rb")


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """A file's text, decompressed, without a byte order mark."""
    return io.TextIOWrapper(open_bytes(path), encoding=_UTF8, newline=newline)


def size_of(path: Path) -> int:
    """Bytes of a file, decompressed."""
    if path.suffix.lower() not in COMPRESSIONS:
        return path.stat().st_size
    with open_bytes(path) as file:
        return sum(map(len, iter(lambda: file.read(_CHUNK), b"")))


def decoded(raw: bytes, path: Path, first: bool) -> str:
    """A part of a file as text; raises `SourceError` for a NUL byte, UnicodeDecodeError else."""
    if b"\x00" in raw:
        raise nul(path)
    return raw.decode(_UTF8 if first else "utf-8")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever reading a file may raise, as a `SourceError` that names the place."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _encoding(path) from error
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise SourceError(
            f"{path} cannot be read",
            got=f"a file that is cut short, or is no {path.suffix.lower()} data "
            f"({type(error).__name__}: {str(error)[:80]})",
            allowed="a sound compressed file",
            fix="download or compress it again; a file that is not compressed needs a name "
            f"without {path.suffix}",
        ) from error
    except RecursionError as error:
        raise SourceError(
            f"{path} is nested too deeply",
            got="more brackets inside one another than can be read",
            allowed="rows of a few levels",
            fix="take that row out",
        ) from error
    except (OSError, ValueError, *classes_of("pyarrow", "ArrowException")) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SourceError(
            f"{path} cannot be read",
            got=f"{type(error).__name__}: {' '.join(str(reason).split())[:160]}",
            allowed="a sound file",
            fix="check that the file is whole and may be read; download or write it again",
        ) from error


def check_head(path: Path) -> None:
    """Raises `SourceError` for a file that is something else than its name says."""
    own = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(_HEAD)
    for magic, what, better in _MAGIC:
        if start.startswith(magic) and better != own:
            whole = path.name + better if better in COMPRESSIONS else f"{path.stem}{better}"
            raise SourceError(
                f"{path} is not what its name says",
                got=what,
                allowed="a name that says it, or text or Parquet",
                fix=f"mv {path} {path.with_name(whole)}" if better[0] == "." else better,
            )
    if own in {".parquet", ".arrow"} or not start:
        return
    if own in COMPRESSIONS:
        with open_bytes(path) as packed:
            start = packed.read(_HEAD)
    wide = next((name for mark, name in _WIDE if start.startswith(mark)), None)
    if wide is None and b"\x00" in start:
        sides = (("UTF-16LE", start[1::2]), ("UTF-16BE", start[::2]))
        wide = next((n for n, side in sides if side.count(0) > 0.4 * (len(start) // 2 or 1)), None)
        if wide is None:
            raise nul(path)
    if wide is not None:
        what, fix = f"{path} is not in UTF-8", _iconv(path, wide)
        raise SourceError(what, got=wide, allowed="UTF-8", fix=fix)


def nul(path: Path, number: int | None = None) -> SourceError:
    """The error for a NUL byte; without the line's number it is looked for."""
    if number is None:
        with open_bytes(path) as file:
            number = next((n for n, line in enumerate(file, start=1) if b"\x00" in line), 1)
    return SourceError(
        f"line {number} of {path} holds a NUL byte",
        got="binary data, or a file that was damaged",
        allowed="text in UTF-8",
        fix=f"look at the line: sed -n {number}p {path} | cat -v; then remove the byte",
    )


def _encoding(path: Path) -> SourceError:
    """What is said of a file that is no UTF-8, with the line and a guess."""
    with open_bytes(path) as file:
        some = file.read(_HEAD)
    number, line, byte = 1, b"", "bytes that are no UTF-8"
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                if not file.read(1) and "unexpected end" in error.reason:
                    return SourceError(
                        f"{path} ends in the middle of a character",
                        got=f"line {number}, its last, cut off after {len(line)} bytes",
                        allowed="a whole file",
                        fix="download or write it again",
                    )
                byte = f"byte 0x{line[error.start]:02x} in line {number}"
                break
    letters = [value for value in some + line if value >= 0x80 or chr(value).isalpha()]
    western = sum(value >= 0x80 for value in letters) < _WESTERN * max(1, len(letters))
    try:
        line.decode("cp1252")
    except UnicodeDecodeError:
        western = False
    return SourceError(
        f"line {number} of {path} is not in UTF-8",
        got=f"{byte}, as WINDOWS-1252 (Latin-1) has it"
        if western
        else f"{byte}, of an encoding such as WINDOWS-1251, GB18030 or SHIFT_JIS",
        allowed="UTF-8",
        fix=_iconv(path, "WINDOWS-1252" if western else "ITS_ENCODING"),
    )


def _iconv(path: Path, name: str) -> str:
    packed = path.suffix.lower() in COMPRESSIONS
    inner = path.with_suffix("") if packed else path
    out = inner.with_name(f"{inner.stem}.utf8{inner.suffix}")
    if not packed:
        return f"iconv -f {name} -t UTF-8 {path} > {out}"
    return f"{_OPENERS[path.suffix.lower()][1]} -dc {path} | iconv -f {name} -t UTF-8 > {out}"
