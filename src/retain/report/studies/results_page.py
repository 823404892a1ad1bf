"""The Markdown page of committed studies: tables and figures, made from their files alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from retain.files import whole_file
from retain.report.studies.cells import Group, groups
from retain.report.studies.finding import finding
from retain.report.studies.page import made, refused
from retain.report.studies.payload import group_ids, payload
from retain.report.studies.pictures import group_png, has_picture
from retain.report.studies.records import STUDY, Study, read_studies, schema_of
from retain.report.studies.tables import failures, study_tables

__all__ = ["find_studies", "results_page", "stale_pictures", "write_results_page"]

_HEAD = """\
<!-- Made by `python benchmarks/results_page.py` from the files it names. Do not edit. -->

# Results

Each number is a mean over seeds with half the width of its 95 % interval (Student's t).
Differences to plain LoRA are paired over the same seeds and strong where the interval omits 0;
no correction is made for how many are compared. Forgetting is in points of score, KL to the base
in nats per token on held-out source text. Rows that store data keep examples of earlier tasks.
A dash stands for what was not measured.
"""


def find_studies(folder: Path) -> list[Path]:
    """All study files in a folder, by path."""
    return [path for path in sorted(folder.rglob("*.json")) if schema_of(path) == STUDY]


def _digest(group: Group) -> str:
    return hashlib.sha256(payload([group]).encode()).hexdigest()


def _picture(name: str) -> str:
    return f"results-{name}.png"


def _drawn(found: Sequence[Group]) -> list[bool]:
    """Which groups are on the page: of tasks learned alone only the mean over them."""
    pooled = {(g.study, g.model) for g in found if g.pooled}
    return [g.pooled or g.length > 1 or (g.study, g.model) not in pooled for g in found]


def _section(group: Group, image: str | None) -> list[str]:
    out = [f"### {group.title}", finding(group)]
    if image is not None:
        out.append(f"![{group.title}: trade-off and course of forgetting]({image})")
    for table in study_tables(group):
        out += [f"**{table.title}**", table.markdown().rstrip(), f"{table.about}."]
    failed = failures(group)
    if failed:
        out += ["**Failed runs**", "\n".join(f"- {line}" for line in failed)]
    return out


def results_page(studies: Sequence[Path], out: Path, images: Path) -> tuple[str, dict[str, Group]]:
    """The page as text, and the group behind each picture that it shows.

    Args:
        studies: study files.
        out: where the page is going to be.
        images: the folder of its pictures.
    """
    parts = [_HEAD.rstrip()]
    pictures: dict[str, Group] = {}
    for path in studies:
        study: Study = read_studies([path])[0]
        found = groups([study])
        parts += [f"## {study.name}", *([study.description] if study.description else [])]
        where = Path(os.path.relpath(path, out.parent)).as_posix()
        facts = [f"- {name}: {value}" for name, value in made([study])]
        parts.append("\n".join([*facts, f"- File: [{path.name}]({where})"]))
        for name, group, drawn in zip(group_ids(found), found, _drawn(found), strict=True):
            image = None
            if drawn and has_picture(group):
                pictures[_picture(name)] = group
                image = Path(os.path.relpath(images / _picture(name), out.parent)).as_posix()
            elif not drawn:
                continue  # its scores stand in the table of the mean
            parts += _section(group, image)
        if skipped := refused([study]):
            parts += ["**Not run**", "\n".join(f"- {line}" for line in skipped)]
    return "\n\n".join(parts) + "\n", pictures


def write_results_page(studies: list[Path], out: Path, images: Path) -> list[Path]:
    """Write the page and its pictures; the same files give the same page.

    Args:
        studies: study files, in the order of the page.
        out: the Markdown file.
        images: the folder for the pictures.

    Returns:
        The paths that were written.

    Raises:
        SourceError: a study cannot be read.
        OutputError: a file cannot be written.
    """
    text, pictures = results_page(studies, out, images)
    written = []
    for name, group in pictures.items():
        content = group_png(group, _digest(group))
        if content is not None:
            with whole_file(images / name, "a figure") as scratch:
                scratch.write_bytes(content)
            written.append(images / name)
    with whole_file(out, "the page of results") as scratch:
        scratch.write_text(text, encoding="utf-8")
    return [out, *written]


def stale_pictures(studies: list[Path], out: Path, images: Path) -> list[str]:
    """The pictures of the page that are missing or were drawn from other numbers."""
    _, pictures = results_page(studies, out, images)
    stale = []
    for name, group in pictures.items():
        path = images / name
        said = f"numbers sha256 {_digest(group)}".encode()
        if not path.is_file() or said not in path.read_bytes():
            stale.append(name)
    return stale
