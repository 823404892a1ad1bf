"""docs/support.md says what the marks of the tests say, and leaves no cell blank."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def table() -> Any:
    spec = importlib.util.spec_from_file_location("t", ROOT / "scripts" / "support_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_agrees_with_the_marks() -> None:
    script, text = table(), (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    cells: dict[tuple[str, str], tuple[str, str]] = {}
    for part in text.split("\n## ")[1:]:
        trainer, *lines = part.splitlines()
        for line in lines[3:]:
            names, what, how = line.strip("| ").split(" | ", 2)
            cells |= {(trainer, name): (what, how) for name in names.split(", ")}
    assert set(cells) == {(t, f) for t in script.TRAINERS for f in script.FEATURES}
    named = {key: re.findall(r"`(tests/\S+\.py)::(.+)`", how) for key, (_, how) in cells.items()}
    files = sorted({file for found in named.values() for file, _ in found})
    marked = {
        (s.trainer, s.feature, s.test, s.refused)
        for s in script.collected("--collect-only", *(str(ROOT / f) for f in files)).shown
    }
    for key, (what, how) in cells.items():
        assert what and how, key
        if what in ("✓", "refused"):
            ((file, test),) = named[key]
            assert (*key, f"{file}::{test}", what == "refused") in marked, (key, how)
        else:
            assert script.DECLARED[key] == (what, how), key
    for trainer, feature, _, refused in marked:  # and what is marked is said
        assert cells[trainer, feature][0] == ("refused" if refused else "✓")
