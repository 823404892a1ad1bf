"""``retain explain``: which of its rows a finished run spent its predicted nats on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from retain.config import Options
from retain.data.rows import place_of
from retain.errors import ConfigError, MismatchError
from retain.files import file_digest, write_record
from retain.records import finite
from retain.runs.bases import problem_count
from retain.runs.folders import check_record
from retain.runs.messages import Messages, interruption
from retain.runs.records import TRAIN, TrainRecord, read_record, why_unread
from retain.runs.rows import run_examples, run_rows
from retain.runs.tuned import load_tuned

__all__ = ["SCHEMA", "ExplainConfig", "explain_run"]

SCHEMA = "retain.explain/1"


class ExplainConfig(Options):
    """Settings of ``retain explain``."""

    run: Path = Field(description="Folder of a finished run of retain train")
    rows: int | None = Field(
        None, ge=1, description="Look at no more of its rows, drawn from all; all by default"
    )
    top: int = Field(20, ge=1, description="Show so many, the dearest first")
    seed: int = Field(0, ge=0, description="Seed of the draw")
    model: str | None = Field(None, description="Where the base model lies now")
    out: Path | None = Field(None, description="Write the record to this JSON file")


def explain_run(config: ExplainConfig, messages: Messages) -> dict[str, Any]:
    """Explains a run.

    Returns:
        The record, a `retain.explain/1`, which is in ``config.out`` too, if there is one.

    Raises:
        RetainError: what is missing or has changed, or what `retain.explain` refuses.
        Interrupted: Ctrl-C.
    """
    folder, out = config.run.expanduser(), config.out and config.out.expanduser()
    record = _record(folder)
    curvature_file = _curvature(folder, record)
    if out is not None:
        check_record(out, "an explanation", SCHEMA)
    messages.libraries()
    from retain.curvature.curvature import load_curvature
    from retain.data.draws import sample
    from retain.evaluation.explain import explain
    from retain.provenance import provenance

    c = record.config
    options = c.model_copy(update={"model": config.model})
    name = config.model or c.model
    with interruption("nothing was written"):
        messages.say(f"loading {name}")
        tuned, tokenizer, _ = load_tuned(name, folder / "adapter", options, messages)
        examples, places = _examples(record, tokenizer)
        numbers = sample(range(len(examples)), config.rows, config.seed)
        found = explain(
            tuned, load_curvature(curvature_file), [examples[n] for n in numbers],
            tokenizer=tokenizer, of=len(examples), progress=messages.progress,
        ).to_dict()  # fmt: skip
    for row in found["rows"]:
        row["row"], row["place"] = places[numbers[row["row"]]]
    result = dict(finite({
        "schema": SCHEMA, **provenance(config.seed), "run": str(config.run),
        "model": {"name": name, "fingerprint": record.model.fingerprint}, "data": c.data,
        "examples": len(examples), "notes": messages.notes, **found,
    }))  # fmt: skip
    if out is not None:
        write_record(out, result)
    return result


def _record(folder: Path) -> TrainRecord:
    """What the run says of itself.

    Raises:
        ConfigError: it is no finished run, or one whose rows cannot be told apart.
    """
    try:
        record = read_record(folder / TRAIN, TrainRecord)
    except (OSError, ValueError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        around = missing and (folder.parent / TRAIN).is_file()
        raise ConfigError(
            "there is no finished run to explain",
            got=f"{folder} without {TRAIN}" if missing else f"{folder}: {why_unread(error)}",
            allowed=f"the --out of retain train, with its {TRAIN}",
            fix=f"did you mean {folder.parent}?" if around else "check the folder",
        ) from error  # fmt: skip
    reason = None
    fix = "retain.explain(model, curvature, rows) in Python, where you have a curvature"
    if record.held_to:
        reason = f"a run with named budgets ({', '.join(record.held_to)}), each with a curvature"
    elif record.curvature is None:
        reason = "a run of plain LoRA, which no curvature held"
    elif record.labels is not None:
        reason = "a classifier"
        fix = "give the run of a decoder; what a classifier forgets is predicted as a whole"
    elif record.config.continue_from is not None:
        reason = "a run that continues another, whose adapter other rows have made too"
    if reason is not None:
        raise ConfigError(
            "the run cannot be explained", got=reason,
            allowed="a run of a language model from a fresh adapter on, held by a curvature",
            fix=fix,
        )  # fmt: skip
    return record


def _curvature(folder: Path, record: TrainRecord) -> Path:
    """The file that held the run, in its folder or where the run read it."""
    assert record.curvature is not None
    wanted = record.digests and record.digests.source
    places = [folder / "curvature.safetensors", Path(record.curvature.path)]
    for path in places:
        if path.is_file() and wanted in (None, file_digest(path)):
            return path
    raise MismatchError(
        "the curvature that held the run is not there any more",
        got=" and ".join(map(str, places)),
        allowed="the file as the run read it",
        fix=f"put it back as {places[0]}",
    )


def _examples(record: TrainRecord, tokenizer: Any) -> tuple[list[Any], list[tuple[int, str]]]:
    """The run's tokenised rows; each one's number among those that it has read, and its place.

    These differ where rows were left out, drawn, or divided.

    Raises:
        MismatchError: they are others now.
    """
    from retain.data.batches import rows_digest

    c, problems = record.config, problem_count(record.config.data, "train")
    rows = run_rows(c) if problems is None else None
    origins: list[int] = []
    found = run_examples(c, rows, problems, tokenizer, causal=True, origins=origins)
    wanted = record.digests and record.digests.data
    if wanted is not None and rows_digest(found) != wanted:
        raise MismatchError(
            "the rows are not those that the run has learned", got=f"{c.data} as it is now",
            allowed="the file as it was", fix="put it back; or explain the rows in Python",
        )  # fmt: skip
    return found, [(i, place_of({} if rows is None else rows[i], i + 1)) for i in origins]
