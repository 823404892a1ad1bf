"""What a trial of `faults.py` left, in a form in which equal results are equal."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["listing", "meaning", "named_inputs", "results"]

VOLATILE = frozenset([
    "seconds", "created", "peak_memory_gib", "memory", "commit", "digest", "resumed_from", "notes",
    "train_runtime", "train_samples_per_second", "train_steps_per_second",
])  # fmt: skip
"""Keys of records that differ between two runs of a command: times, what was said, a seal."""

INPUTS = ("config", "digests", "data", "inputs", "model", "examples", "start", "source")
"""Keys of records that say what a result was made from."""

_PICTURES = (".png", ".svg", ".md", ".pdf")
_LOGS = ("out/traces/",)


def listing(folder: Path, names: Iterable[str]) -> set[str]:
    """All files below some names of a folder."""
    return {
        str(path.relative_to(folder))
        for name in names
        for path in [folder / name, *(folder / name).rglob("*")]
        if path.is_file() or path.is_symlink()
    }


def results(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digest of each file that counts as a result: bytes, or of JSON what does not vary."""
    return {
        name: _digest(folder / name, folder)
        for name in sorted(listing(folder, names))
        if (folder / name).is_file() and not _is_left_out(name)
    }


def _is_left_out(name: str) -> bool:
    """Pictures, logs, locks, and checkpoints: their trainer's state holds times."""
    return name.startswith(_LOGS) or name.endswith((*_PICTURES, ".lock")) or "checkpoint-" in name


def _digest(path: Path, folder: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".json":
        try:
            tree = _steady(json.loads(data))
        except (ValueError, RecursionError):
            return "no JSON"
        data = json.dumps(tree, sort_keys=True).replace(str(folder), "@").encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(part) for key, part in value.items() if key not in VOLATILE}
    return [_steady(part) for part in value] if isinstance(value, list) else value


def named_inputs(folder: Path, names: Iterable[str]) -> str:
    """What the records of a result say that it was made from."""
    found = []
    for name in sorted(listing(folder, names)):
        if name.endswith(".json") and "/checkpoint-" not in name and (folder / name).is_file():
            try:
                tree = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(tree, dict):
                found.append([name, {k: tree[k] for k in INPUTS if k in tree}])
    return json.dumps(_steady(found), sort_keys=True).replace(str(folder), "@")


def meaning(path: Path) -> Any:
    """What a file of rows, settings or tensors says, read by the plainest reader."""
    try:
        data = path.read_bytes()
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        if path.suffix == ".safetensors":
            return data
        text = data.decode("utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if path.suffix == ".csv":
            return list(csv.reader(io.StringIO(text)))
        if path.suffix == ".yaml":
            import yaml

            return re.sub(r"\s+", " ", str(yaml.safe_load(text)))
        return text
    except Exception:
        return None
