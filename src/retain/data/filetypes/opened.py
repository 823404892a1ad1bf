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
from typing import IO, cast

from retain.errors import SourceError

__all__ = [
    "COMPRESSIONS",
    "check_head",
    "decoded",
    "open_bytes",
    "open_text",
    "reading",
    "size_of",
]

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_CHUNK = 1 << 20
_HEAD = 1 << 16
_UTF8 = "utf-8-sig"  # Excel and PowerShell begin a file with a byte order mark

_MAGIC = (
    (b"\x1f\x8b", "gzip data", ".gz"),
    (b"BZh", "bzip2 data", ".bz2"),
    (b"\xfd7zXZ", "xz data", ".xz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", ".zst"),
    (b"PAR1", "Parquet data", ".parquet"),
    (b"ARROW1", "Arrow data", ".arrow"),
)
_OTHERS = (
    (b"PK\x03\x04", "a zip archive or an Office document", "unpack it, or save it as CSV UTF-8"),
    (b"%PDF", "a PDF", "extract its text"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as CSV UTF-8"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "git lfs pull"),
)
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
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow

        stream = pyarrow.input_stream(str(path), compression="zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream), _CHUNK)
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
    """A part of a file as text.

    Raises:
        SourceError: it holds a NUL byte.
        UnicodeDecodeError: it is no UTF-8.
    """
    if b"\x00" in raw:
        raise _nul(path)
    return raw.decode(_UTF8 if first else "utf-8")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever reading a file may raise, as a `SourceError` that names the place."""
    import pyarrow

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
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SourceError(
            f"{path} cannot be read",
            got=f"{type(error).__name__}: {' '.join(str(reason).split())[:160]}",
            allowed="a sound file",
            fix="check that the file is whole and may be read; download or write it again",
        ) from error


def check_head(path: Path) -> None:
    """Refuses what is something else than its name says.

    Raises:
        SourceError: it is.
    """
    packed = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(_HEAD)
    for magic, what, suffix in _MAGIC:
        if start.startswith(magic) and suffix != packed:
            whole = path.name + suffix if suffix in COMPRESSIONS else f"{path.stem}{suffix}"
            raise SourceError(
                f"{path} is not what its name says", got=what, allowed=f"a name in {suffix}",
                fix=f"mv {path} {path.with_name(whole)}",
            )  # fmt: skip
    for magic, what, fix in _OTHERS:
        if start.startswith(magic):
            raise SourceError(
                f"{path} is not what its name says", got=what, allowed="text or Parquet", fix=fix
            )
    if packed in {".parquet", ".arrow", ".feather"} or not start:
        return
    if packed in COMPRESSIONS:
        with open_bytes(path) as packed_file:
            start = packed_file.read(_HEAD)
    for mark, name in _WIDE:
        if start.startswith(mark):
            raise _wide(path, name)
    if b"\x00" in start:
        half = len(start) // 2 or 1
        for name, side in (("UTF-16LE", start[1::2]), ("UTF-16BE", start[::2])):
            if side.count(0) > 0.4 * half:
                raise _wide(path, name)
        raise _nul(path)


def _wide(path: Path, name: str) -> SourceError:
    return SourceError(f"{path} is not in UTF-8", got=name, allowed="UTF-8", fix=_iconv(path, name))


def _nul(path: Path) -> SourceError:
    number = _first_line(path, lambda line: b"\x00" not in line)
    return SourceError(
        f"line {number} of {path} holds a NUL byte",
        got="binary data, or a file that was damaged",
        allowed="text in UTF-8",
        fix=f"look at the line: sed -n {number}p {path.name} | cat -v; then remove the byte",
    )


def _encoding(path: Path) -> SourceError:
    """What is said of a file that is no UTF-8, with the line and a guess."""

    def sound(line: bytes) -> bool:
        try:
            line.decode(_UTF8)
        except UnicodeDecodeError:
            return False
        return True

    number, line, last = _first_line(path, sound), b"", False
    with open_bytes(path) as file:
        some = file.read(_HEAD)
    with open_bytes(path) as file:
        for _ in range(number):
            line = file.readline()
        last = not file.read(1)
    try:
        line.decode("utf-8")
        place = 0
    except UnicodeDecodeError as error:
        place = error.start
        if last and "unexpected end" in error.reason:
            return SourceError(
                f"{path} ends in the middle of a character",
                got=f"line {number}, its last, cut off after {len(line)} bytes",
                allowed="a whole file",
                fix="download or write it again",
            )
    byte = f"byte 0x{line[place]:02x} in line {number}" if line else "bytes that are no UTF-8"
    some += line
    high = sum(value >= 0x80 for value in some)
    letters = sum(value >= 0x80 or chr(value).isalpha() for value in some) or 1
    try:
        line.decode("cp1252")
        western = high / letters < _WESTERN
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
    packed = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    inner = path.with_suffix("") if packed else path
    out = inner.with_name(f"{inner.stem}.utf8{inner.suffix}")
    if not packed:
        return f"iconv -f {name} -t UTF-8 {path} > {out}"
    tool = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}[packed]
    return f"{tool} -dc {path} | iconv -f {name} -t UTF-8 > {out}"


def _first_line(path: Path, sound: Callable[[bytes], bool]) -> int:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if not sound(line):
                return number
    return 1
