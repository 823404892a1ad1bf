"""Writes docs/results.md and its figures from the studies in benchmarks/results.

    python benchmarks/results_page.py [--check]

With --check nothing is written: it exits with 1 when the page or a figure is not what the files
give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from retain.report.studies.results_page import (
    find_studies,
    results_page,
    stale_pictures,
    write_results_page,
)

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"


def check() -> list[str]:
    """What is not as the files give it."""
    studies = find_studies(STUDIES)
    text, _ = results_page(studies, PAGE, IMAGES)
    there = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else None
    wrong = [] if there == text else [str(PAGE.relative_to(ROOT))]
    return wrong + stale_pictures(studies, PAGE, IMAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    if parser.parse_args().check:
        wrong = check()
        for name in wrong:
            print(f"{name} is not what the studies give: run python benchmarks/results_page.py")
        sys.exit(1 if wrong else 0)
    print(*write_results_page(find_studies(STUDIES), PAGE, IMAGES), sep="\n")


if __name__ == "__main__":
    main()
