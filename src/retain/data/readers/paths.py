"""Which files a path names, and what each of them is by its name."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from retain.data.readers.opened import COMPRESSIONS
from retain.errors import SourceError

__all__ = ["KINDS", "files_of", "kind_of"]

_SUFFIXES = {
    ".txt": ".txt", ".md": ".txt", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".json": ".json",
    ".csv": ".csv", ".tsv": ".tsv", ".parquet": ".parquet", ".arrow": ".arrow",
}  # fmt: skip
_BINARY = (".parquet", ".arrow")  # these compress by themselves
_BESIDE = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|sources|dataset_infos?|dataset_dict|state"
    r"|_success)(\..*)?$",
    re.IGNORECASE,
)
_SHARD = re.compile(
    r"([-_.]?(part|shard|chunk)?[-_.]?\d+([-_.]?of[-_.]?\d+)?)+(-[0-9a-f]{6,40})?$", re.IGNORECASE
)
_SPLITS = frozenset(
    {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "development"}
    | {"eval", "evaluation", "heldout", "held_out"}
)
_LOOKED = 10_000  # files and folders that are looked at for advice
_MENDED = {
    ".jsonlines": ".jsonl", ".text": ".txt", ".log": ".txt", ".json5": ".json", ".tab": ".tsv",
    ".pq": ".parquet",
    ".xlsx": "save it as CSV UTF-8", ".xls": "save it as CSV UTF-8", ".zip": "unpack it",
    ".tar": "unpack it", ".tgz": "unpack it",
    ".pkl": "pickles run code: write it as JSON Lines or Parquet",
    ".pickle": "pickles run code: write it as JSON Lines or Parquet",
    ".safetensors": "give text; a curvature goes to --curvature",
}  # fmt: skip
"""Suffixes that are not read: the one to take, or what to do."""

KINDS = f"{', '.join(_SUFFIXES)} (all but the last two also compressed: {', '.join(COMPRESSIONS)})"


def kind_of(path: Path) -> str | None:
    """What a file is by its name, such as ".jsonl"; None if it is nothing that can be read."""
    packed = path.suffix.lower() in COMPRESSIONS
    kind = _SUFFIXES.get((path.with_suffix("") if packed else path).suffix.lower())
    return None if packed and kind in _BINARY else kind


def files_of(source: str | Path) -> list[Path]:
    """The files of a path, a folder or a pattern such as ``data/*.parquet``; none if it is none.

    Raises:
        SourceError: a folder without files to read, or with files of several kinds or splits; a
            file of an unknown kind.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [_known(path)]
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        rows = [p for p in inside if not _BESIDE.match(p.name) and kind_of(p) is not None]
        if not rows:
            raise _no_rows(path, inside)
        return _alike(rows, path)
    if path.exists():
        raise SourceError(
            "the source is no regular file",
            got=f"{path}, a device or a pipe",
            allowed="a file or a folder",
            fix="write what it holds into a file",
        )
    found = (
        sorted(map(Path, glob.glob(str(path), recursive=True))) if glob.has_magic(str(path)) else []
    )
    return _alike([_known(p) for p in found if p.is_file()], path, named=True)


def _known(path: Path) -> Path:
    """The same file, if it is of a kind that can be read."""
    if kind_of(path) is not None:
        return path
    fix = _MENDED.get(path.suffix.lower(), "give it the suffix of what it holds")
    raise SourceError(
        "a source of an unknown kind",
        got=str(path),
        allowed=KINDS,
        fix=f"mv {path} {path.with_suffix(fix)}" if fix[0] == "." else fix,
    )


def _alike(files: list[Path], where: Path, named: bool = False) -> list[Path]:
    """The same files, if they hold rows of one kind and of one split."""
    kinds = sorted({str(kind_of(p)) for p in files})
    if len(kinds) > 1:
        likely = max(files, key=lambda p: (bool(_words(_split(p))), p.stat().st_size))
        raise SourceError(
            "the files are of several kinds",
            got=f"{', '.join(kinds)} in {where}",
            allowed="shards of one kind",
            fix=f"name one file, such as {likely}, or a pattern: "
            f"'{likely.parent}/*{_suffixes(likely)}'",
        )
    twice = [p for p in files if p.suffix.lower() in COMPRESSIONS and p.with_suffix("") in files]
    if twice:
        raise SourceError(
            "a file is there twice, compressed and not",
            got=f"{twice[0].stem} and {twice[0].name} in {where}",
            allowed="each shard once",
            fix=f"name one of them: {twice[0]}",
        )
    splits = sorted({_split(p) for p in files})
    several = any(s in _SPLITS for s in splits) or len(set().union(*map(_words, splits))) > 1
    if not named and len(splits) > 1 and several:
        raise SourceError(
            "the folder holds several splits",
            got=f"{', '.join(splits)} in {where}",
            allowed="the shards of one",
            fix=f"pick one: {_pick(splits, files)}",
        )
    return files


def _words(split: str) -> set[str]:
    """The words in a split's name that name a split, such as "train" in "train_sft"."""
    return set(re.split(r"[^a-z0-9]+", split)) & _SPLITS


def _pick(splits: Sequence[str], files: Sequence[Path]) -> str:
    """A file or a pattern of one split; the one to train on where there is one."""
    best = min(splits, key=lambda s: (s != "train", "train" not in _words(s), not _words(s), s))
    first, *more = (p for p in files if _split(p) == best)
    return f"'{first.parent}/{first.name[: len(best)]}*{_suffixes(first)}'" if more else str(first)


def _suffixes(path: Path) -> str:
    packed = path.suffix.lower() in COMPRESSIONS
    return "".join(path.suffixes[-2:]) if packed else path.suffix


def _split(path: Path) -> str:
    """The name of a file without suffixes and numbers of shards."""
    return _SHARD.sub("", path.name.removesuffix(_suffixes(path))).lower()


def _no_rows(path: Path, inside: Sequence[Path]) -> SourceError:
    below = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    others = ", ".join(p.name for p in (*inside, *below)[:5])
    deep = {p.parent for p in islice(path.rglob("*"), _LOOKED) if kind_of(p) and p.is_file()}
    deep = {p for p in deep if not any(q[0] == "." for q in p.relative_to(path).parts)} - {path}
    best = min(deep, key=lambda p: ("train" not in _words(p.name.lower()), p), default=None)
    return SourceError(
        "the folder holds no file of rows",
        got=f"{path}: {others or 'nothing'}",
        allowed=KINDS,
        fix=f"name the folder below: {best}" if best else "name another folder",
    )
