"""The page of ``retain certify``: verdicts, the counts behind them, and what was lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retain.records import CertificateRecord, SkillRecord
from retain.report.cells import short_name
from retain.report.draw import asset
from retain.report.page import download, page_of
from retain.report.tables import Column, Entry, Row, Table

__all__ = ["certificate_page"]

_ABOUT = (
    "Lost: right before, wrong after. The share lost is of what the base knew, adjusted for what "
    "guessing gets right; at most: its upper bound"
)


def certificate_page(record: Mapping[str, Any]) -> str:
    """A certificate as one page of HTML."""
    found = CertificateRecord.model_validate(record)
    table = _table(found)
    part = {
        "id": "skills", "title": "Skills", "finding": f"{found.sentence()}.", "figures": [],
        "tables": [(table, download(table.csv()), "skills.csv")],
        "failures": [], "said": "Lost: right before, wrong after", "answers": _lost(found),
    }  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    facts = {
        "Adapter": found.adapter, "Weights": (found.digests.get("adapter") or "")[:16],
        "Base": found.model.get("name"), "Items": found.source, "Versions": versions,
        "Commit": found.commit,
    }  # fmt: skip
    return page_of(
        [asset("page.js")],
        title=f"Certificate of an adapter of {short_name(str(found.model.get('name', '?')))}",
        kicker=f"retain certify · {found.created[:10]}", descriptions=[],
        claims=[_claim(skill) for skill in found.skills if skill.verdict],
        claims_line=f"The bounds hold together at {found.level:.0%} confidence, one-sided, each at "
        "its share of the error (Bonferroni).",
        parts=[part], made=[(name, value) for name, value in facts.items() if value], refused=[],
    )  # fmt: skip


def _claim(skill: SkillRecord) -> dict[str, Any]:
    """A verdict of the page's head."""
    cells = dict(zip(SkillRecord.HEAD, skill.cells(), strict=True))
    text = f"{skill.skill}: {skill.lost} lost of {skill.before} right before"
    return {
        "verdict": skill.verdict, "bound": None,
        "claim": f"{text}; {skill.reason}" if skill.reason else text,
        "told": f"at most {cells['at most']}", "allowed": f"allowed {cells['allowed']}",
    }  # fmt: skip


def _table(record: CertificateRecord) -> Table:
    """The counts, a skill a row."""
    rows = []
    for skill in record.skills:
        values = [skill.items, skill.before, skill.after, skill.lost, skill.won, skill.chance,
                  skill.share, skill.bound, skill.allowed]  # fmt: skip
        texts = skill.cells()[1:-1]
        entries = [Entry(t, value=v) for t, v in zip(texts, values, strict=True)]
        rows.append(Row(skill.skill, skill.verdict, entries))
    head = [Column(name.capitalize()) for name in SkillRecord.HEAD[:-1]]
    return Table("skills", "What is left of each skill", _ABOUT, head, rows)


def _lost(record: CertificateRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """What both models say where the base was right, and the tuned model is not."""
    return [
        (f"{row['skill']}: {row['prompt']}", [("before", row["base"]), ("after", row["tuned"])])
        for row in record.rows
        if row["right_before"] and not row["right_after"]
    ]
