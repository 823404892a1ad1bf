"""``retain certify``: an adapter's certificate, its record and its section of the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from retain.config import Options, Precision
from retain.errors import ConfigError, OutputError
from retain.files import (
    check_folder,
    clear_scratch,
    file_digest,
    locked,
    whole_file,
    write_json,
)
from retain.models.cards import CARD, read_card, with_section
from retain.records import CERTIFICATE_SCHEMA, CertificateRecord, SkillRecord, finite
from retain.runs.bases import Base, base_of
from retain.runs.folders import check_record
from retain.runs.messages import Messages, interruption
from retain.runs.tuned import load_tuned

__all__ = ["RECORD", "CertifyConfig", "certify_run"]

RECORD = "certify.json"
"""What is written into the adapter's folder, beside the card."""


class CertifyConfig(Options):
    """Settings of ``retain certify``."""

    adapter: Path = Field(description="Folder of the finished PEFT adapter")
    skills: str = Field(
        description="Items of skills, a file of rows with skill, prompt, and answer, or choices "
        "and answer; or general, those of retain"
    )
    allow: list[str] = Field(
        [], description="What a skill may lose, such as facts=2%; again for each skill"
    )
    out: Path | None = Field(
        None,
        description="Also write a page to this HTML file; the record goes beside it as .json where "
        "the adapter's folder cannot be written",
    )
    model: Base = None
    new_tokens: int = Field(32, ge=1, description="Cut written answers at so many tokens")
    batch_size: int = Field(32, ge=1, description="Prompts, or choices, at once")
    dtype: Precision = Field("float32", description="Precision: float32, bfloat16, float64")
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the model. For models you trust"
    )


def certify_run(config: CertifyConfig, messages: Messages) -> dict[str, Any]:
    """Certifies the adapter of a folder, and says so in the folder.

    Returns:
        The record, a `retain.certificate/1`, which is in the folder's ``certify.json``; beside the
        page, under its name, where the folder cannot be written.

    Raises:
        RetainError: what is missing, damaged, or of another model, or cannot be written.
        Interrupted: Ctrl-C.
    """
    allow = _allowances(config.allow)
    name = base_of(config.adapter, config.model)
    folder = config.adapter.expanduser()
    file, card = _places(folder, config.out, messages)
    check_record(file, "a certificate", CERTIFICATE_SCHEMA)
    if card is not None:
        read_card(card)  # refused before minutes of measuring
    messages.libraries()
    from retain.evaluation.certify import certify, check_allowed
    from retain.evaluation.skills import read_skills
    from retain.models.fingerprint import fingerprint
    from retain.models.saved import adapter_digest
    from retain.provenance import provenance

    items = read_skills(config.skills)
    check_allowed(allow, items)
    with interruption("nothing was written"):
        messages.say(f"loading {name}")
        tuned, tokenizer, _ = load_tuned(name, config.adapter, config, messages)
        found = certify(
            tuned, items, allow=allow, tokenizer=tokenizer, new_tokens=config.new_tokens,
            batch_size=config.batch_size, progress=messages.progress,
        ).to_dict()  # fmt: skip
        given = Path(config.skills).expanduser()
        record = dict(finite({
            "schema": CERTIFICATE_SCHEMA, **provenance(0), "adapter": str(config.adapter),
            "model": {"name": name, "dtype": config.dtype, "fingerprint": fingerprint(tuned)},
            "source": config.skills, "new_tokens": config.new_tokens,
            "digests": {
                "adapter": adapter_digest(folder),
                "source": file_digest(given) if given.is_file() else None,
            },
            "notes": messages.notes, **found,
        }))  # fmt: skip
    with locked(file, file=True):
        clear_scratch(file)
        write_json(file, record)
        if card is not None:
            clear_scratch(card)
            with whole_file(card, "the model card") as scratch:
                told = _section(CertificateRecord.model_validate(record))
                text = with_section(read_card(card), told, "retain certify")
                scratch.write_text(text, encoding="utf-8", newline="")
    return record


def _places(folder: Path, page: Path | None, messages: Messages) -> tuple[Path, Path | None]:
    """Where the record and the card's section go: to the adapter.

    Where its folder cannot be written the record goes beside the page, under the page's name, as
    several adapters may have theirs there; and the card is let be.

    Raises:
        OutputError: neither can be written.
    """
    try:
        check_folder(folder)
    except OutputError as error:
        if page is None:
            raise OutputError(
                error.what,
                got=error.got,
                allowed=error.allowed,
                fix="--out certificate.html: certificate.json goes beside it",
            ) from error
        page = page.expanduser()
        file = check_folder(page.parent) / page.with_suffix(".json").name
        messages.note(
            "the adapter's folder cannot be written: the card is as it was, and the record is "
            f"{file}"
        )
        return file, None
    return folder / RECORD, folder / CARD


def _allowances(given: Sequence[str]) -> dict[str, str]:
    """``facts=2%`` by skill."""
    found: dict[str, str] = {}
    for text in given:
        skill, mark, value = (part.strip() for part in text.rpartition("="))
        if not (skill and mark and value) or skill in found:
            raise ConfigError(
                "an allowance is not understood", got=text,
                allowed="SKILL=SHARE, each skill once", fix="--allow facts=2%",
            )  # fmt: skip
        found[skill] = value
    return found


def _section(record: CertificateRecord) -> str:
    """The certificate as Markdown."""
    lines = [SkillRecord.HEAD, [":--", *["--:"] * (len(SkillRecord.HEAD) - 1)]]
    lines += [skill.cells() for skill in record.skills]
    table = [f"| {' | '.join(_plain(c).replace('|', '/') for c in line)} |" for line in lines]
    notes = [f"- {_plain(s.skill)}: {s.reason}" for s in record.skills if s.reason]
    digest = (record.digests["adapter"] or "")[:12]
    return "\n".join([
        "## What was kept", "",
        f"{_plain(record.sentence())}. Of what the base model could do, this share is lost, "
        "adjusted for chance, and so much at most:", "", *table, "", *notes, *[""] * bool(notes),
        f"By `retain certify` {record.versions.get('retain', '?')}, of the weights with digest "
        f"`{digest}`; every item is in `{RECORD}`.",
    ])  # fmt: skip


def _plain(text: str) -> str:
    """A text, such as a skill's name, in one line."""
    return " ".join(text.split())
