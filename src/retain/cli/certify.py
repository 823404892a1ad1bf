"""``retain certify``: whether an adapter lost no more of each skill than is allowed."""

from __future__ import annotations

import typer

from retain.cli.options import Screen, check_file, command
from retain.errors import ConfigError
from retain.files import clear_scratch, locked, whole_file
from retain.records import CertificateRecord, SkillRecord
from retain.runs.certify import CertifyConfig, certify_run
from retain.runs.folders import check_page

__all__ = ["EXAMPLE", "certify"]

EXAMPLE = "Example: retain certify runs/may/adapter --skills skills.jsonl --allow facts=2%"


@command(CertifyConfig, "adapter")
def certify(config: CertifyConfig, screen: Screen) -> None:
    """Check what an adapter lost of its base's skills; exit code 1 where it is too much."""
    page = config.out and check_file(config.out)
    if page is not None and page.suffix != ".html":
        raise ConfigError(
            "the certificate is a page", got=f"--out {page}", allowed="a file that ends in .html",
            fix=f"--out {page.with_suffix('.html')}",
        )  # fmt: skip
    if page is not None:
        check_page(page)
    record = certify_run(config, screen)
    found = CertificateRecord.model_validate(record)
    head = ["skill", "right", "lost", "won", "share", "at most", "verdict"]
    screen.table("lost of each skill", head, map(_line, found.skills))
    for skill in found.skills:
        if skill.reason:
            screen.say(f"{skill.skill}: {skill.reason}")
    screen.say(found.sentence())
    if page is not None:
        from retain.report import certificate_page

        with locked(page, file=True):
            clear_scratch(page)
            with whole_file(page, "the page") as scratch:
                scratch.write_text(certificate_page(record), encoding="utf-8")
        screen.say(str(page))
    screen.emit(record)
    if not found.held:
        raise typer.Exit(1)


def _line(skill: SkillRecord) -> list[str]:
    """A skill as a line of 80 characters has room for it."""
    cells = dict(zip(SkillRecord.HEAD, skill.cells(), strict=True))
    right, bound = f"{skill.before}→{skill.after} of {skill.items}", cells["at most"]
    if skill.verdict:
        bound += f" {'≤' if skill.verdict == 'held' else '>'} {cells['allowed']}"
    told = (cells[key] for key in ("lost", "won", "share lost"))
    return [skill.skill, right, *told, bound, cells["verdict"]]
