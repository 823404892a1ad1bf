"""Writes docs/results.md and its figures from the studies in benchmarks/results.

    python benchmarks/results_page.py [--check]

With --check nothing is written: it exits with 1 when the page or a figure is not what the files
give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from retain.files import whole_file
from retain.records import STUDY_SCHEMA
from retain.report.cells import Group, groups
from retain.report.charts import panels
from retain.report.draw import picture, png
from retain.report.page import group_ids, made, refused, section
from retain.report.read import read_studies, schema_of

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"

HEAD = """\
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
    return [path for path in sorted(folder.rglob("*.json")) if schema_of(path) == STUDY_SCHEMA]


def digest(group: Group) -> str:
    """Of the numbers that are drawn."""
    rows = json.dumps([panel.rows for panel in panels(group) if panel.document])
    short = json.loads(rows, parse_float=lambda text: f"{float(text):.6g}")
    return hashlib.sha256(json.dumps(short).encode()).hexdigest()


def _drawn(found: Sequence[Group]) -> list[bool]:
    """Which groups are on the page: of tasks learned alone only the mean over them."""
    pooled = {(g.study, g.model) for g in found if g.pooled}
    return [g.pooled or g.length > 1 or (g.study, g.model) not in pooled for g in found]


def results_page(studies: Sequence[Path], out: Path, images: Path) -> tuple[str, dict[str, Group]]:
    """The page as text, and the group behind each picture that it shows.

    Args:
        studies: study files.
        out: where the page is going to be.
        images: the folder of its pictures.
    """
    parts = [HEAD.rstrip()]
    pictures: dict[str, Group] = {}
    for path in studies:
        study = read_studies([path])[0]
        found = groups([study])
        parts += [f"## {study.name}", *([study.description] if study.description else [])]
        where = Path(os.path.relpath(path, out.parent)).as_posix()
        facts = [f"- {name}: {value}" for name, value in made([study])]
        parts.append("\n".join([*facts, f"- File: [{path.name}]({where})"]))
        for name, group, drawn in zip(group_ids(found), found, _drawn(found), strict=True):
            if not drawn:
                continue  # its scores stand in the table of the mean
            text = section(group, f"### {group.title}", "**{}**")
            if any(panel.document for panel in panels(group)):
                pictures[f"results-{name}.png"] = group
                image = Path(os.path.relpath(images / f"results-{name}.png", out.parent)).as_posix()
                text.insert(2, f"![{group.title}: trade-off and course of forgetting]({image})")
            parts += text
        if skipped := refused([study]):
            parts += ["**Not run**", "\n".join(f"- {line}" for line in skipped)]
    return "\n\n".join(parts) + "\n", pictures


def write_results_page(studies: list[Path], out: Path, images: Path) -> list[Path]:
    """Write the page and its pictures; the same files give the same page.

    Returns:
        The paths that were written.
    """
    text, pictures = results_page(studies, out, images)
    files = {out: text.encode()}
    for name, group in pictures.items():
        if (drawn := picture(panels(group))) is not None:
            files[images / name] = png(drawn, digest(group))
    for path, content in files.items():
        with whole_file(path, "the page of results") as scratch:
            scratch.write_bytes(content)
    return list(files)


def stale(studies: list[Path], out: Path, images: Path) -> list[str]:
    """What is missing, or not as the files give it: the page, and pictures of other numbers."""
    text, pictures = results_page(studies, out, images)
    wrong = [] if out.is_file() and out.read_text(encoding="utf-8") == text else [out.name]
    for name, group in pictures.items():
        path = images / name
        if not path.is_file() or digest(group).encode() not in path.read_bytes():
            wrong.append(name)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    if parser.parse_args().check:
        wrong = stale(find_studies(STUDIES), PAGE, IMAGES)
        for name in wrong:
            print(f"{name} is not what the studies give: run python benchmarks/results_page.py")
        sys.exit(1 if wrong else 0)
    print(*write_results_page(find_studies(STUDIES), PAGE, IMAGES), sep="\n")


if __name__ == "__main__":
    main()
