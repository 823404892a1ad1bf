"""``retain eval``: what adapters learned and what the model forgot, as a `retain.result/2`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from retain.config import Measured, validate
from retain.errors import ConfigError, MismatchError, unknown
from retain.files import file_digest, write_record
from retain.records import RESULT_SCHEMA, EvalRecord, finite
from retain.runs.bases import Base, base_of, problem_count
from retain.runs.folders import check_record
from retain.runs.messages import Messages, interruption
from retain.runs.tuned import check_finite, load_tuned, name_of, own_text, source_rows

__all__ = ["EvalConfig", "eval_run", "general_tasks"]


class EvalConfig(Measured):
    """Settings of ``retain eval``."""

    adapter: list[Path] = Field(
        [],
        description="Folder of the PEFT adapter, such as runs/held/adapter; again for each that it "
        "is compared with",
    )
    model: Base = None
    data: str | None = Field(
        None,
        description="Ask held-out rows of the task, before and after: a file, as for retain train",
    )
    limit: int | None = Field(None, ge=1, description="Of --data at most so many rows, drawn")
    data_length: int = Field(512, ge=2, description="Cut rows of --data to so many tokens")
    new_tokens: int | None = Field(
        None, ge=1,
        description="Cut written answers to --data at so many tokens; by default at one and a half "
        "times the longest right one, 16 at least",
    )  # fmt: skip
    general: str | None = Field(
        None,
        description="Also ask general tasks, before and after: knowledge, hellaswag, arc_easy:200, "
        "any of lm-evaluation-harness; commas between, each with :N for its first N rows",
    )
    data_dir: Path | None = Field(
        None, description="Folder with the rows of general tasks; without it they come from the hub"
    )
    probe: bool = Field(False, description="The same as --general knowledge")
    task: str | None = Field(
        None, description="Also score a task, before and after: word-problems[:N]"
    )
    prompts: str | None = Field(
        None,
        description="Also compare the answers to prompts, before and after: general, or a file of "
        "one prompt a line, or of rows with a prompt",
    )
    source: str | None = Field(
        None, description="Text to measure forgetting on; by default the base writes it anew"
    )
    out: Path | None = Field(
        None, description="Write the result to this JSON file; or a page, with the JSON beside it"
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


def eval_run(
    config: EvalConfig | Mapping[str, Any] | None = None,
    messages: Messages | None = None,
    *,
    progress: bool = True,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Measures a model with an adapter, or with several, against its base: ``retain eval``.

    Args:
        config: an `EvalConfig`, a mapping of its fields, or nothing.
        messages: where to say what is done; by default on stdout.
        progress: show bars.
        quiet: print nothing.
        **settings: fields of `EvalConfig`; they come before those of `config`.

    Returns:
        The result, a `retain.result/2`, whose fields are those of `retain.records.EvalRecord`. It
        is in ``out`` too, if that is given; beside it, as ``.json``, if that is the name of a page,
        which ``retain report`` makes.

    Raises:
        RetainError: what is missing, damaged, or of another model.
        Interrupted: Ctrl-C.
    """
    if isinstance(config, EvalConfig):
        config = config.model_dump()
    c = validate({**(config or {}), **settings}, EvalConfig)
    if messages is not None:
        return _run(c, messages)
    own = Messages(quiet=quiet, progress=progress)
    with own.listening():
        return _run(c, own)


def _run(config: EvalConfig, messages: Messages) -> dict[str, Any]:
    problems = problem_count(config.task, "test") if config.task is not None else 0
    if problems is None:
        raise unknown("task", str(config.task), ["word-problems"])
    general = general_tasks(config.general) if config.general else {}
    if config.probe:
        general = {"knowledge": None, **general}
    if not config.adapter:
        raise ConfigError(
            "nothing says which adapter to measure",
            got="no --adapter",
            allowed="the folder of a PEFT adapter",
            fix="--adapter runs/held/adapter",
        )
    out = config.out
    if out is not None:
        if out.suffix not in ("", ".json", ".html"):
            raise ConfigError(
                "the name says neither JSON nor a page", got=f"--out {out}",
                allowed="a file that ends in .json or .html",
                fix=f"--out {out.with_suffix('.html')}",
            )  # fmt: skip
        out = out.with_suffix(".json") if out.suffix == ".html" else out
        check_record(out, "the result of an eval", RESULT_SCHEMA, "retain.result/1")
    name = _one_base(config)
    messages.libraries()
    from retain.data.draws import HELD_OUT
    from retain.data.general_prompts import check_distinct, read_prompts
    from retain.data.sources import read_rows
    from retain.evaluation.general import check_general
    from retain.models.saved import adapter_digest
    from retain.provenance import provenance
    from retain.runs.evaluation import Evaluation, Given

    check_general(list(general), config.data_dir)
    text, rows, seed = source_rows(config, config.source), None, HELD_OUT + config.seed
    if config.data is not None:
        rows = read_rows(config.data, config.limit, seed=seed, max_length=config.data_length)
    asked = None if config.prompts is None else read_prompts(config.prompts)
    check_distinct(asked or [])
    found = Evaluation(config, Given(text, rows, asked, problems, general), messages)
    adapters: list[dict[str, Any]] = []
    model: dict[str, Any] = {}
    with interruption("nothing was written"):
        for folder, short in zip(config.adapter, _names(config.adapter), strict=True):
            messages.say(f"loading {name} with {folder}" if adapters else f"loading {name}")
            tuned, tokenizer, record = load_tuned(name, folder, config, messages)
            if found.text is None:
                found.text = own_text(tuned, tokenizer, config, messages)
            check_finite(found.measure(tuned, tokenizer, short).kl)
            about, trained = _sizes(tuned), record and record.model_dump(mode="json")
            model = {"name": name, "parameters": about[0], "dtype": config.dtype}
            adapters.append({
                "name": short, "path": str(folder), "trainable": about[1],
                "digest": adapter_digest(folder.expanduser()),
                "label": "LoRA + retention" if record is not None and record.held else "LoRA",
                "history": trained["history"] if trained else [],
            })  # fmt: skip
            del tuned
    for one, answers in zip(adapters, found.answers, strict=False):
        one["answers"] = answers.plain()
    data = found.data()
    if data is not None:
        given = Path(str(config.data)).expanduser()
        digest = file_digest(given) if given.is_file() else None
        data = {"name": str(config.data), "digest": digest, **data}
    result = EvalRecord.model_validate(finite({
        "schema": RESULT_SCHEMA, "kind": "eval", **provenance(config.seed), "model": model,
        "source": {"name": config.source or "self", "tokens": found.forgetting[0].tokens},
        "adapters": adapters, "data": data,
        "general": {"tasks": general, "data_dir": config.data_dir} if general else None,
        "scores": found.scores(), "notes": messages.notes,
    })).plain()  # fmt: skip
    if out is not None:
        write_record(out, result)
    return result


def general_tasks(given: str) -> dict[str, int | None]:
    """``hellaswag,arc_easy:200`` as tasks, each with how many rows of it at most.

    Raises:
        ConfigError: a task that is named twice or not at all, or an N that is no number above 0.
    """
    found: dict[str, int | None] = {}
    for part in given.split(","):
        name, mark, count = (piece.strip() for piece in part.partition(":"))
        if not name or name in found or (mark and not (count.isdecimal() and int(count))):
            raise ConfigError(
                "a general task is not understood", got=repr(part),
                allowed="tasks with commas between, each once, maybe with :N", 
                fix="--general knowledge,hellaswag,arc_easy:200",
            )  # fmt: skip
        found[name] = int(count) if mark else None
    return found


def _one_base(config: EvalConfig) -> str:
    """The base model of all adapters, whose folders are checked.

    Raises:
        RetainError: a folder without an adapter, or several bases.
    """
    names = list(dict.fromkeys(base_of(folder, config.model) for folder in config.adapter))
    if len(names) > 1:
        raise MismatchError(
            "the adapters name several base models", got=", ".join(names), allowed="one",
            fix="say with --model which it is, where they are the same",
        )  # fmt: skip
    return names[0]


def _names(folders: Sequence[Path]) -> list[str]:
    """What to call adapters, each by another name."""
    found: list[str] = []
    for folder in folders:
        name = name_of(folder)
        more = sum(other == name or other.startswith(f"{name} (") for other in found)
        found.append(f"{name} ({more + 1})" if more else name)
    return found


def _sizes(model: Any) -> tuple[int, int]:
    """The base's parameters, and the adapter's: all that PEFT saves, such as a copy of a head."""
    from peft import get_peft_model_state_dict

    from retain.models.names import ADAPTERS

    base = (p for n, p in model.named_parameters() if not any(part in n for part in ADAPTERS))
    own = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    return sum(p.numel() for p in base), sum(p.numel() for p in own)
