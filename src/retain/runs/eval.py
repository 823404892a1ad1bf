"""``retain eval``: what an adapter learned and what the model forgot, as a `retain.result/1`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from retain.config import Measured
from retain.errors import ConfigError, MismatchError, ModelError, unknown
from retain.files import clear_scratch, locked, write_json
from retain.records import AnswersRecord, finite
from retain.runs.bases import base_of, load_base, problem_count
from retain.runs.folders import check_result
from retain.runs.messages import Messages, interruption
from retain.runs.records import TRAIN, TrainRecord, read_record

__all__ = ["EvalConfig", "check_finite", "eval_run", "load_tuned", "own_text"]


class EvalConfig(Measured):
    """Settings of ``retain eval``."""

    adapter: Path | None = Field(
        None, description="Folder of the PEFT adapter, such as runs/held/adapter"
    )
    model: str | None = Field(
        None, description="The base model; the one that the adapter names by default"
    )
    source: str | None = Field(
        None, description="Text to measure forgetting on; by default the base writes it anew"
    )
    probe: bool = Field(False, description="Also ask the knowledge questions, before and after")
    task: str | None = Field(
        None, description="Also score a task, before and after: word-problems[:N]"
    )
    prompts: str | None = Field(
        None,
        description="Also compare the answers to prompts, before and after: general, or a file of "
        "one prompt a line, or of rows with a prompt",
    )
    out: Path | None = Field(None, description="Write the result to this JSON file")


def eval_run(config: EvalConfig, messages: Messages) -> dict[str, Any]:
    """Measures a model with the adapter of a folder against its base.

    Returns:
        The result, a `retain.result/1`, which is in ``config.out`` too, if there is one.

    Raises:
        RetainError: what is missing, damaged, or of another model.
        Interrupted: Ctrl-C.
    """
    adapter, task, out = config.adapter, config.task, config.out
    problems = problem_count(task, "test") if task is not None else 0
    if problems is None:
        raise unknown("task", str(task), ["word-problems"])
    if adapter is None:
        raise ConfigError(
            "nothing says which adapter to measure",
            got="no --adapter",
            allowed="the folder of a PEFT adapter",
            fix="--adapter runs/held/adapter",
        )
    if out is not None:
        check_result(out)
    name = base_of(adapter, config.model)
    messages.libraries()
    from retain.data.draws import HELD_OUT
    from retain.data.general_prompts import read_prompts
    from retain.data.sources import read_rows

    asked = None if config.prompts is None else read_prompts(config.prompts)
    text = None
    if config.source is not None:
        seed = HELD_OUT + config.seed
        text = read_rows(config.source, config.rows, seed=seed, max_length=config.max_length)
    with interruption("nothing was written"):
        messages.say(f"loading {name}")
        tuned, tokenizer, record = load_tuned(name, adapter, config, messages)
        found = _measure(tuned, tokenizer, text, config, problems, messages)
        answers = None if asked is None else _answers(tuned, tokenizer, asked, config, messages)
    result = dict(finite(
        _result(name, config, tuned, record, found)
        | ({} if answers is None else {"answers": answers})
        | {"notes": messages.notes}
    ))  # fmt: skip
    if out is not None:
        with locked(out, file=True):
            clear_scratch(out)
            write_json(out, result)
    return result


def load_tuned(
    name: str, adapter: Path, config: Any, messages: Messages
) -> tuple[Any, Any, TrainRecord | None]:
    """An adapter on its base, the tokenizer, and what `_record_beside` says of them.

    Args:
        name: of the base.
        adapter: its folder.
        config: with ``model``, ``dtype`` and ``trust_remote_code``.
        messages: told where nothing says that this is its base.
    """
    from retain.models.saved import load_adapter

    base, tokenizer, _ = load_base(
        name, None if config.model else "the adapter", dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    tuned = load_adapter(base, adapter)
    record = _record_beside(adapter, tuned)
    if record is None:
        messages.note(
            "no train.json beside the adapter: that this is its base model is not checked"
        )
    return tuned, tokenizer, record


def _record_beside(adapter: Path, model: Any) -> TrainRecord | None:
    """What ``train.json`` beside the adapter says, if it is there; the base must be its base."""
    from retain.models.fingerprint import fingerprint

    try:
        record = read_record(adapter.expanduser().resolve().parent / TRAIN, TrainRecord)
    except (OSError, ValueError, RecursionError):
        return None
    mine = fingerprint(model)
    if mine != record.model.fingerprint:
        raise MismatchError(
            "the adapter was trained on another base model",
            got=f"a model with fingerprint {mine}",
            allowed=f"{record.model.fingerprint} ({record.model.name})",
            fix="give that model with --model",
        )
    return record


def own_text(model: Any, tokenizer: Any, config: Measured, messages: Messages) -> list[Any]:
    """Text that the base model writes, other than what ``retain fit`` reads with that seed."""
    from retain.data.draws import HELD_OUT
    from retain.models.generating import sample_rows

    messages.say("the base model writes the text that forgetting is measured on")
    return sample_rows(
        model, tokenizer, count=config.rows, max_length=config.max_length,
        seed=HELD_OUT + config.seed, half="held-out", progress=messages.progress,
    )  # fmt: skip


def check_finite(kl: float) -> None:
    """Raises `ModelError` unless a measured KL is a number that a report can show."""
    if not math.isfinite(kl):
        raise ModelError(
            "the model's predictions are not finite",
            got=f"a KL of {kl}",
            allowed="finite numbers",
            fix="check the adapter and the base, or use --dtype float32",
        )


def _measure(
    model: Any, tokenizer: Any, source: Any, config: EvalConfig, problems: int, messages: Messages
) -> dict[str, Any]:
    """Forgetting on source text, and the probe and the task where they are asked for."""
    from retain.data.draws import HELD_OUT
    from retain.data.problems import word_problems
    from retain.evaluation.forgetting import measure_forgetting
    from retain.evaluation.general import knowledge_score, problem_score
    from retain.intervals import wilson
    from retain.models.off import adapter_off

    if source is None:
        source = own_text(model, tokenizer, config, messages)
    progress = messages.progress
    forgetting = measure_forgetting(
        model, source, tokenizer=tokenizer, rows=config.rows, max_length=config.max_length,
        batch_size=config.batch_size, seed=HELD_OUT + config.seed, progress=progress,
    )  # fmt: skip
    check_finite(forgetting.kl)

    def both(score: Callable[[], tuple[int, int]]) -> dict[str, dict[str, Any]]:
        """A score with the adapter off and on."""
        with adapter_off(model):
            base = score()
        return {
            name: {"accuracy": hits / n, "interval": wilson(hits, n), "items": n}
            for name, (hits, n) in (("base", base), ("tuned", score()))
        }

    def solved() -> tuple[int, int]:
        given = word_problems("test", problems, config.seed)
        return problem_score(model, tokenizer, given, progress=progress)[0], problems

    return {
        "forgetting": forgetting.to_dict(),
        "probe": both(lambda: knowledge_score(model, tokenizer, progress=progress))
        if config.probe
        else None,
        "task": both(solved) if problems else None,
    }


def _answers(
    model: Any, tokenizer: Any, asked: Any, config: EvalConfig, messages: Messages
) -> dict[str, Any]:
    """The answers to prompts, as plain data of an `AnswersRecord`."""
    from retain.evaluation.answers import measure_answers

    found = measure_answers(
        model, asked, tokenizer=tokenizer, batch_size=config.batch_size, seed=config.seed,
        progress=messages.progress,
    )  # fmt: skip
    return AnswersRecord.model_validate(found.to_dict()).plain()


def _result(
    name: str, config: EvalConfig, model: Any, record: TrainRecord | None, found: dict[str, Any]
) -> dict[str, Any]:
    """A `retain.result/1`: what was measured by name, and as the rows that the report reads."""
    from retain.models.sites import lora_sites
    from retain.provenance import provenance

    frozen = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    trained = sum(s.a.numel() + s.b.numel() for s in lora_sites(model))
    forgetting, probe, task = found["forgetting"], found["probe"], found["task"]
    held = record is not None and record.held
    before = {"kl": 0.0, "ppl_base": forgetting["ppl_base"], "ppl": forgetting["ppl_base"],
              "flips": 0.0, "tokens": forgetting["tokens"]}  # fmt: skip
    told = {} if record is None else record.model_dump(mode="json")
    rows: list[dict[str, Any]] = [
        {"name": "base", "label": "base model", "method": None, "forgetting": before},
        {
            "name": "adapter", "label": "LoRA + retention" if held else "LoRA",
            "method": record.config.method if held and record else "none",
            "forgetting": forgetting,
            "strength": record.strength if held and record else None,
            "train": {key: told.get(key) for key in ("seconds", "steps", "examples")},
            "history": told.get("history", []),
        },
    ]  # fmt: skip
    for row, which in zip(rows, ("base", "tuned"), strict=True):
        if probe:
            lost = probe["base"]["accuracy"] - probe[which]["accuracy"]
            row["probe"] = probe[which] | {"lost": lost}
        if task:
            score = dict(task[which])
            row["target"] = {"exact_match": score.pop("accuracy"), **score}
    learned = record.config.data if record else "unknown"
    return {
        "schema": "retain.result/1", "kind": "eval", **provenance(config.seed),
        "adapter": str(config.adapter),
        "model": {"name": name, "parameters": frozen, "trainable": trained, "dtype": config.dtype},
        "task": {
            "name": "word-problems" if task else learned,
            "test": task and task["tuned"]["items"], "metric": "exact_match",
        },
        "source": {"name": config.source or "self", "heldout_tokens": forgetting["tokens"]},
        "forgetting": forgetting, "knowledge": probe, "exact_match": task, "rows": rows,
    }  # fmt: skip
