"""``retain eval``: what an adapter learned and what the model forgot, as a `retain.result/1`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from retain.errors import ConfigError, MismatchError, ModelError, unknown
from retain.files import clear_scratch, locked, write_json
from retain.records import finite
from retain.runs.bases import base_of, load_base, problem_count
from retain.runs.folders import check_result
from retain.runs.messages import Messages, interruption
from retain.runs.records import TRAIN, TrainRecord, read_record

__all__ = ["Sizes", "check_finite", "eval_run", "own_text"]


class Sizes(NamedTuple):
    """Text that is measured on: rows at most, tokens of each at most, rows at once."""

    rows: int
    max_length: int
    batch_size: int


def eval_run(
    adapter: Path | None, *, model: str | None, source: str | None, probe: bool, task: str | None,
    out: Path | None, sizes: Sizes, seed: int, dtype: str, trust_remote_code: bool,
    messages: Messages,
) -> dict[str, Any]:  # fmt: skip
    """Measures a model with the adapter of a folder against its base.

    Args:
        adapter: the folder.
        model: the base; None for the one that the adapter names.
        source: text to measure forgetting on; None lets the base write it.
        probe: ask the knowledge questions, before and after.
        task: to score, before and after: ``word-problems[:N]``.
        out: a file for the result.
        sizes: of the text.
        seed: of the text and of the task.
        dtype: of the base's weights.
        trust_remote_code: run code that comes with the model.
        messages: where to say what is done.

    Returns:
        The result.

    Raises:
        RetainError: what is missing, damaged, or of another model.
        Interrupted: Ctrl-C.
    """
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
    name = base_of(adapter, model)
    messages.libraries()
    from retain.data.draws import HELD_OUT
    from retain.data.sources import read_rows
    from retain.models.saved import load_adapter

    text = None
    if source is not None:
        text = read_rows(source, sizes.rows, seed=HELD_OUT + seed, max_length=sizes.max_length)
    with interruption("nothing was written"):
        messages.say(f"loading {name}")
        base, tokenizer, _ = load_base(
            name, None if model else "the adapter", dtype=dtype, trust_remote_code=trust_remote_code
        )
        tuned = load_adapter(base, adapter)
        record = _record_beside(adapter, tuned)
        if record is None:
            messages.note(
                "no train.json beside the adapter: that this is its base model is not checked"
            )
        found = _measure(tuned, tokenizer, text, sizes, seed, probe, problems, messages)
    result = _result(name, dtype, seed, tuned, record, found, source or "self", adapter)
    result = dict(finite(result | {"notes": messages.notes}))
    if out is not None:
        with locked(out, file=True):
            clear_scratch(out)
            write_json(out, result)
    return result


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


def own_text(model: Any, tokenizer: Any, sizes: Sizes, seed: int, messages: Messages) -> list[Any]:
    """Text that the base model writes, other than what ``retain fit`` reads with that seed."""
    from retain.data.draws import HELD_OUT
    from retain.models.generating import sample_rows

    messages.say("the base model writes the text that forgetting is measured on")
    return sample_rows(
        model, tokenizer, count=sizes.rows, max_length=sizes.max_length, seed=HELD_OUT + seed,
        progress=messages.progress,
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
    model: Any, tokenizer: Any, source: Any, sizes: Sizes, seed: int, probe: bool, problems: int,
    messages: Messages,
) -> dict[str, Any]:  # fmt: skip
    """Forgetting on source text, and the probe and the task where they are asked for."""
    from retain.data.draws import HELD_OUT
    from retain.data.problems import word_problems
    from retain.evaluation.forgetting import measure_forgetting
    from retain.evaluation.probes import knowledge_score, problem_score
    from retain.intervals import wilson
    from retain.models.off import adapter_off

    if source is None:
        source = own_text(model, tokenizer, sizes, seed, messages)
    progress = messages.progress
    forgetting = measure_forgetting(
        model, source, tokenizer=tokenizer, seed=HELD_OUT + seed, progress=progress,
        **sizes._asdict(),
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
        given = word_problems("test", problems, seed)
        return problem_score(model, tokenizer, given, progress=progress)[0], problems

    return {
        "forgetting": forgetting.to_dict(),
        "probe": both(lambda: knowledge_score(model, tokenizer, progress=progress))
        if probe
        else None,
        "task": both(solved) if problems else None,
    }


def _result(
    name: str, dtype: str, seed: int, model: Any, record: TrainRecord | None,
    found: dict[str, Any], source: str, adapter: Path,
) -> dict[str, Any]:  # fmt: skip
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
        "schema": "retain.result/1", "kind": "eval", **provenance(seed), "adapter": str(adapter),
        "model": {"name": name, "parameters": frozen, "trainable": trained, "dtype": dtype},
        "task": {
            "name": "word-problems" if task else learned,
            "test": task and task["tuned"]["items"], "metric": "exact_match",
        },
        "source": {"name": source, "heldout_tokens": forgetting["tokens"]},
        "forgetting": forgetting, "knowledge": probe, "exact_match": task, "rows": rows,
    }  # fmt: skip
