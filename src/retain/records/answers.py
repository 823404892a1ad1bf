"""What was measured of answers, by skill, and the certificate of what was kept."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from retain.records.parts import Listed, Measure, Part

__all__ = [
    "CERTIFICATE_SCHEMA", "AnswerGroup", "AnswersRecord", "CertificateRecord", "SkillRecord",
]  # fmt: skip

CERTIFICATE_SCHEMA: Final = "retain.certificate/1"


class AnswerGroup(Part):
    """What was measured of the answers to some prompts; see `retain.evaluation.answers`.

    Attributes:
        log_ratio: nats per token of the tuned model's own answers.
        repeats, repeats_base, task_form, task_form_base: of the tuned model's, and of the base's.
        right_before, right_after, kept: of the prompts that a script can score.
    """

    prompts: int
    log_ratio: Measure
    first_word: Measure
    first_token: Measure
    unlikely: Measure
    repeats: Measure
    repeats_base: Measure
    task_form: Measure
    task_form_base: Measure
    right_before: Measure
    right_after: Measure
    kept: Measure


class AnswersRecord(Part):
    """What a tuned model and its base answered to general prompts.

    Attributes:
        threshold: nats per token; what the base finds less likely is `unlikely`.
        rows: the answers; their fields are those of `retain.evaluation.answers.Answer`.
    """

    new_tokens: int
    threshold: float | None = None
    overall: AnswerGroup
    skills: dict[str, AnswerGroup] = {}
    rows: Listed[dict[str, Any]] = []


class SkillRecord(Part):
    """What is left of a skill; the fields are those of `retain.evaluation.certify.SkillLoss`."""

    HEAD: ClassVar = (
        "skill", "items", "right before", "right after", "lost", "won", "chance", "share lost",
        "at most", "allowed", "verdict",
    )  # fmt: skip

    skill: str
    items: int
    before: int
    after: int
    lost: int
    won: int
    chance: float
    share: float | None
    bound: float
    allowed: float | None
    verdict: str
    reason: str = ""

    def cells(self) -> list[str]:
        """One line of a table, under `HEAD`; bounds are rounded up, and an en dash is nothing."""
        shares = [None if v is None else f"{v:.1%}" for v in (self.chance or None, self.share)]
        allowed = None if self.allowed is None else f"{100 * self.allowed:.4g}%"
        upper = f"{math.ceil(1e4 * self.bound - 1e-6) / 100:.2f}%"
        counts = (self.items, self.before, self.after, self.lost, self.won)
        told = [self.skill, *map(str, counts), *shares, upper, allowed, self.verdict or None]
        return ["–" if text is None else text for text in told]


class CertificateRecord(Part):
    """What ``retain certify`` writes: ``certify.json``.

    Attributes:
        level: at which the bounds of all skills with an allowance hold together.
        rows: one an item, with both answers and whether they are right.
    """

    schema_name: Literal["retain.certificate/1"] = Field(CERTIFICATE_SCHEMA, alias="schema")
    created: str
    versions: dict[str, str | None] = {}
    commit: str | None = None
    adapter: str
    model: dict[str, Any]
    source: str
    digests: dict[str, str | None] = {}
    held: bool
    level: float
    skills: list[SkillRecord]
    rows: list[dict[str, Any]]

    def sentence(self) -> str:
        """What was found, in one line."""
        found = [s.skill for s in self.skills if s.verdict == ("held" if self.held else "broken")]
        verdict = "Held: kept" if self.held else "Broken: not shown to be kept"
        return f"{verdict} at {self.level:.0%} confidence: {', '.join(found)}"
