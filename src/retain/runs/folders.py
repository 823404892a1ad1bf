"""The folders of results: what in them is of an earlier run, and what is somebody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retain.documents import read_json
from retain.errors import OutputError
from retain.files import (
    check_ours,
    clear_scratch,
    has_schema,
    recover,
    remove_ours,
    write_json,
    writing,
)
from retain.runs.records import RUN, STATE_SCHEMA, TRAIN, TRAIN_SCHEMA

__all__ = [
    "SOFTEN_PICTURES", "STATE", "by_file", "check_demo", "check_made", "check_page", "check_record",
    "check_run", "check_study", "drop_state", "is_curvature", "is_settings", "recorded",
]  # fmt: skip

STATE = (
    "source.safetensors", "source-*.safetensors", "past.safetensors", "head.safetensors",
    "state.json",
)  # fmt: skip
"""What ``state/`` holds."""

SOFTEN_PICTURES = ("soften.svg", "soften.png")
"""What ``retain soften`` draws."""

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


def by_file(what: str, name: str) -> str:
    """The name of a curvature's file: ``what.safetensors``, of a named one ``what-NAME``."""
    return f"{what}-{name}.safetensors" if name else f"{what}.safetensors"


def check_run(out: Path, *, curvatures: Sequence[str]) -> None:
    """Refuses a folder in which a run of ``retain train`` would write over others' files.

    `curvatures` are the names of the files that the run keeps of its own there.

    Raises:
        OutputError: something in it is not of an earlier run.
    """
    _put_back(out, "adapter", "state", RUN, TRAIN, *curvatures)
    settings, record = out / RUN, out / TRAIN

    def adapter(path: Path) -> bool:
        return (is_settings(settings) or _of(TRAIN_SCHEMA)(record)) and _is_adapter(path)

    def kept(path: Path) -> bool:
        """Checkpoints are ours beside our settings; a folder of other things is let be."""
        return path.is_dir() and (is_settings(settings) or not any(path.glob("*checkpoint-*")))

    _check(out, {
        RUN: (is_settings, "the settings of a run"),
        TRAIN: (_of(TRAIN_SCHEMA), "the record of a run"),
        "adapter": (adapter, "the adapter of a run"),
        "state": (lambda path: _of(STATE_SCHEMA)(path / "state.json"), "the state of a run"),
        "checkpoints": (kept, "checkpoints of a run"),
    })  # fmt: skip
    _check(out, dict.fromkeys(curvatures, (is_curvature, "the curvature of a run")))


def check_made(out: Path, command: str, of: str, pictures: Sequence[str] = ()) -> None:
    """`check_run` for a command that makes another adapter, and a record with its own name."""
    name = f"{command}.json"
    _put_back(out, "adapter", name, *pictures)
    record = out / name

    def mine(path: Path) -> bool:
        return has_schema(record, f"retain.{command}/1")

    _check(out, {
        name: (mine, f"the record of {of}"),
        "adapter": (lambda path: mine(path) and _is_adapter(path), f"the adapter of {of}"),
        **dict.fromkeys(pictures, (mine, f"a picture of {of}")),
    })  # fmt: skip


@contextmanager
def recorded(path: Path, record: Any) -> Iterator[None]:
    """Writes a record before the block where there is none, since it tells that the folder is ours.

    That one is gone if the block fails; an earlier one stays until the block has ended well.

    Raises:
        OutputError: it cannot be written.
    """
    first = not path.exists()
    if first:
        write_json(path, record)
    try:
        yield
    except BaseException:
        if first:
            path.unlink(missing_ok=True)
        raise
    if not first:
        write_json(path, record)


def check_demo(out: Path) -> None:
    """The same for ``retain demo``, which is a study with its data beside it.

    Raises:
        OutputError: something in it is not of an earlier demo.
    """

    def marked(path: Path) -> bool:
        return path.is_file() and path.read_bytes().startswith(b"# Written by retain demo\n")

    mine = marked(out / "study.yaml") or _of("retain.result/1")(out / "result.json")
    files = dict.fromkeys(("study.yaml", "word-problems.yaml"), (marked, "a file of a demo"))
    others = ("data", "adapters", "source", "report.html")
    _check(out, files | dict.fromkeys(others, (lambda _: mine, "a result of a demo")))
    check_study(out, "demo")


def check_study(out: Path, name: str) -> None:
    """The same for ``retain study``, whose other files have names that nobody else gives.

    Raises:
        OutputError: something in it is not of an earlier study, or is of one of another name.
    """

    def table(path: Path) -> bool:
        """It is made of the runs' records, which stand for it where it is damaged."""
        records = out.glob("runs/*.json")
        return _of("retain.study/1")(path) or any(map(_of("retain.run/1"), records))

    folders = ("runs", "state", "locks", "failures", "source", "untrained", "earlier")
    _check(out, {
        "study.json": (table, "the table of a study"),
        **dict.fromkeys(folders, (Path.is_dir, "a folder of a study")),
    })  # fmt: skip
    found = _json(out / "study.json")
    other = found.get("name", name) if isinstance(found, dict) else name
    if other != name:
        raise OutputError(
            f"the folder is that of another study than {name}",
            got=f"{other} in {out}",
            allowed="a new folder, or one of a study of this name",
            fix=f"choose another --out (--known {out} takes over finished runs that are alike)",
        )


def check_record(path: Path, what: str, *schemas: str) -> None:
    """Refuses to write a record over a file with none of its schemas; `what` is it called.

    Raises:
        OutputError: there is one.
    """
    check_ours(path, lambda file: any(has_schema(file, schema) for schema in schemas), what, path)


def check_page(page: Path) -> None:
    """Refuses to write a page over one that ``retain report`` did not make.

    Raises:
        OutputError: there is one.
    """
    check_ours(page, _is_page, "the page of a report", page)


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return b"<title>retain report: " in head


def _of(schema: str) -> Callable[[Path], bool]:
    return lambda path: has_schema(path, schema)


def _check(out: Path, files: Mapping[str, tuple[Callable[[Path], bool], str]]) -> None:
    """`check_ours` of files in a folder, by name: what tells that one is ours, and what it is."""
    for name, (ours, what) in files.items():
        check_ours(out / name, ours, what, out)


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
    """Whether a folder holds an adapter; or the weights alone, which a killed writer may leave."""
    config = path / "adapter_config.json"
    found = _json(config)
    if isinstance(found, dict) and "peft_type" in found:
        return True
    return not config.exists() and (path / "adapter_model.safetensors").is_file()


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
