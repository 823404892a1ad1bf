"""The folders of results: what in them is of an earlier run, and what is somebody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retain.documents import read_json
from retain.files import check_ours, clear_scratch, has_schema, recover, remove_ours, writing

__all__ = [
    "STATE",
    "check_curvature",
    "check_demo",
    "check_page",
    "check_result",
    "check_run",
    "check_soften",
    "check_study",
    "drop_state",
    "is_curvature",
    "is_settings",
]

STATE = ("source.safetensors", "past.safetensors", "state.json")
"""What ``state/`` holds."""

_SETTINGS = {"model", "data", "out", "method", "adapter", "training"}


def is_settings(path: Path) -> bool:
    """Whether a file holds the settings of a run of ``retain train``."""
    found = _json(path)
    return isinstance(found, dict) and found.keys() >= _SETTINGS


def is_curvature(path: Path) -> bool:
    """Whether a file is a curvature of ours, sound or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "retain" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def check_run(out: Path, *, curvature: bool) -> None:
    """Refuses a folder in which a run of ``retain train`` would write over others' files.

    Args:
        out: the folder; it need not exist.
        curvature: the run keeps a curvature of its own there.

    Raises:
        OutputError: something in it is not of an earlier run.
    """
    _put_back(out, "adapter", "state", "run.json", "train.json")
    settings, record = out / "run.json", out / "train.json"

    def adapter(path: Path) -> bool:
        mine = is_settings(settings) or has_schema(record, "retain.train/1")
        return mine and _is_adapter(path)

    check_ours(settings, is_settings, "the settings of a run", out)
    check_ours(record, _with_schema("retain.train/1"), "the record of a run", out)
    check_ours(out / "adapter", adapter, "the adapter of a run", out)
    check_ours(out / "state", _is_state, "the state of a run", out)
    check_ours(out / "checkpoints", lambda p: _is_kept(p, settings), "checkpoints of a run", out)
    if curvature:
        check_ours(out / "curvature.safetensors", is_curvature, "the curvature of a run", out)


def check_soften(out: Path) -> None:
    """The same for ``retain soften``.

    Raises:
        OutputError: something in it is not of an earlier softening.
    """
    _put_back(out, "adapter", "soften.json")
    record = out / "soften.json"

    def mine(path: Path) -> bool:
        return has_schema(record, "retain.soften/1")

    check_ours(record, mine, "the record of a softening", out)
    check_ours(
        out / "adapter", lambda p: mine(p) and _is_adapter(p), "the adapter of a softening", out
    )
    for name in ("soften.svg", "soften.png"):
        check_ours(out / name, mine, "a picture of a softening", out)


def check_demo(out: Path) -> None:
    """The same for ``retain demo``.

    Raises:
        OutputError: something in it is not of an earlier demo.
    """
    sampled = _json(out / "source" / "source.json")
    mine = has_schema(out / "result.json", "retain.result/1") or (
        isinstance(sampled, dict) and sampled.keys() >= {"key", "rows", "text"}
    )
    names = ("source", "rows", "adapters", "curvature.safetensors", "result.json", "report.html",
             "tradeoff.png", "training.png")  # fmt: skip
    for name in names:
        check_ours(out / name, lambda path: mine, "a result of a demo", out)


def check_study(out: Path) -> None:
    """The same for ``retain study``, whose other files have names that nobody else gives.

    Raises:
        OutputError: something in it is not of an earlier study.
    """

    def table(path: Path) -> bool:
        """It is made of the runs' records, which stand for it where it is damaged."""
        return has_schema(path, "retain.study/1") or any(
            has_schema(record, "retain.run/1") for record in out.glob("runs/*.json")
        )

    check_ours(out / "study.json", table, "the table of a study", out)
    for name in ("runs", "state", "locks", "failures", "source", "untrained", "earlier"):
        check_ours(out / name, Path.is_dir, "a folder of a study", out)


def check_result(path: Path) -> None:
    """Refuses to write a result of ``retain eval`` over another file.

    Raises:
        OutputError: there is one.
    """
    check_ours(path, _with_schema("retain.result/1"), "the result of an eval", path)


def check_curvature(path: Path) -> None:
    """Refuses to write a curvature over another file.

    Raises:
        OutputError: there is one.
    """
    check_ours(path, is_curvature, "the curvature of a fit", path)


def check_page(page: Path, *beside: str) -> None:
    """Refuses to write a page over one that ``retain report`` did not make.

    Args:
        page: the page.
        beside: names of pictures that are written beside it.

    Raises:
        OutputError: there is one, or a picture without such a page.
    """
    check_ours(page, _is_page, "the page of a report", page)
    for path in (page.with_name(name) for name in beside):
        check_ours(path, _beside_page, "a picture of a report", page)


def _beside_page(picture: Path) -> bool:
    """Pages in one folder share their pictures' names: those of the last page stay."""
    return any(_is_page(path) for path in picture.parent.glob("*.htm*"))


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return b"<title>retain report: " in head


def _with_schema(schema: str) -> Any:
    return lambda path: has_schema(path, schema)


def drop_state(out: Path) -> None:
    """Removes the state that an earlier run left in a folder whose adapter is a new one now.

    Raises:
        OutputError: it cannot be removed.
    """
    with writing("the state of a run", out / "state"):
        remove_ours(out / "state", STATE)


def _put_back(out: Path, *names: str) -> None:
    """What a killed writer moved aside goes back, and its scratch files go."""
    for name in names if out.is_dir() else ():
        with writing("the output folder", out):
            recover(out / name)
            clear_scratch(out / name)


def _is_adapter(path: Path) -> bool:
    found = _json(path / "adapter_config.json")
    return isinstance(found, dict) and "peft_type" in found


def _is_state(path: Path) -> bool:
    return path.is_dir() and has_schema(path / "state.json", "retain.state/1")


def _is_kept(path: Path, settings: Path) -> bool:
    """Checkpoints are ours beside our settings; a folder of other things is let be."""
    return path.is_dir() and (is_settings(settings) or not any(path.glob("*checkpoint-*")))


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
