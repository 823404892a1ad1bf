"""What ``retain eval`` measures, and its result as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retain.cli.common import Screen
from retain.data.draws import HELD_OUT
from retain.documents import read_json
from retain.errors import MismatchError, ModelError

__all__ = ["check_finite", "measure", "own_text", "result_of", "train_record"]


def train_record(adapter: Path, model: Any) -> dict[str, Any]:
    """What ``train.json`` beside the adapter says, if it is there; the base must be its base."""
    from retain.models.fingerprint import fingerprint

    try:
        record = read_json(adapter.expanduser().resolve().parent / "train.json")
        known = record["model"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    mine = fingerprint(model)
    if mine != known:
        raise MismatchError(
            "the adapter was trained on another base model",
            got=f"a model with fingerprint {mine}",
            allowed=f"{known} ({record['model'].get('name')})",
            fix="give that model with --model",
        )
    return dict(record)


def own_text(
    model: Any, tokenizer: Any, size: dict[str, int], seed: int, screen: Screen
) -> list[Any]:
    """Text that the base model writes, other than what ``retain fit`` reads with that seed."""
    from retain.models.generating import sample_rows

    screen.say("the base model writes the text that forgetting is measured on")
    return sample_rows(
        model,
        tokenizer,
        count=size["rows"],
        max_length=size["max_length"],
        seed=HELD_OUT + seed,
        progress=screen.progress,
    )


def check_finite(kl: float) -> None:
    """Raises `ModelError` unless a measured KL is a number that a report can show."""
    if not math.isfinite(kl):
        raise ModelError(
            "the model's predictions are not finite",
            got=f"a KL of {kl}",
            allowed="finite numbers",
            fix="check the adapter and the base, or use --dtype float32",
        )


def measure(
    model: Any, tokenizer: Any, source: Any, size: dict[str, int], seed: int, probe: bool,
    problems: int, screen: Screen,
) -> dict[str, Any]:  # fmt: skip
    """Forgetting on source text, and the probe and the task where they are asked for."""
    from retain.evaluation.forgetting import measure_forgetting
    from retain.evaluation.probes import knowledge_score

    if source is None:
        source = own_text(model, tokenizer, size, seed, screen)
    forgetting = measure_forgetting(
        model, source, tokenizer=tokenizer, seed=HELD_OUT + seed, progress=screen.progress, **size
    )
    check_finite(forgetting.kl)
    found: dict[str, Any] = {"forgetting": forgetting.to_dict(), "probe": None, "task": None}
    if probe:
        found["probe"] = _both(
            model, lambda: knowledge_score(model, tokenizer, progress=screen.progress)
        )
    if problems:
        found["task"] = _both(
            model, lambda: _word_problems(model, tokenizer, problems, seed, screen)
        )
    return found


def _both(model: Any, score: Callable[[], tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """A score with the adapter off and on."""
    from retain.intervals import wilson
    from retain.models.off import adapter_off

    with adapter_off(model):
        base = score()
    return {
        name: {"accuracy": hits / n, "interval": wilson(hits, n), "items": n}
        for name, (hits, n) in (("base", base), ("tuned", score()))
    }


def _word_problems(
    model: Any, tokenizer: Any, count: int, seed: int, screen: Screen
) -> tuple[int, int]:
    from retain.data.problems import word_problems
    from retain.evaluation.probes import problem_score

    problems = word_problems("test", count, seed)
    right, _ = problem_score(model, tokenizer, problems, progress=screen.progress)
    return right, count


def _strength(settings: dict[str, Any], record: dict[str, Any]) -> float | None:
    """The strength that a run was given, or the last one that its budget found."""
    if settings.get("budget") is None:
        return settings.get("strength")
    found = [e["strength"] for e in record.get("history", []) if e.get("strength") is not None]
    return found[-1] if found else None


def result_of(
    name: str, dtype: str, seed: int, model: Any, record: dict[str, Any], found: dict[str, Any],
    source: str, adapter: Path,
) -> dict[str, Any]:  # fmt: skip
    """A `retain.result/1`: what was measured by name, and as the rows that the report reads."""
    from retain.models.sites import lora_sites
    from retain.provenance import provenance

    frozen = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    trained = sum(s.a.numel() + s.b.numel() for s in lora_sites(model))
    settings, forgetting, probe = record.get("config", {}), found["forgetting"], found["probe"]
    held = settings.get("method", "none") != "none"
    before = {"kl": 0.0, "ppl_base": forgetting["ppl_base"], "ppl": forgetting["ppl_base"],
              "flips": 0.0, "tokens": forgetting["tokens"]}  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"name": "base", "label": "base model", "method": None, "forgetting": before},
        {
            "name": "adapter", "label": "LoRA + retention" if held else "LoRA",
            "method": settings["method"] if held else "none", "forgetting": forgetting,
            "strength": _strength(settings, record) if held else None,
            "train": {k: record.get(k) for k in ("seconds", "steps", "examples")},
            "history": record.get("history", []),
        },
    ]  # fmt: skip
    for row, which in zip(rows, ("base", "tuned"), strict=True):
        if probe:
            lost = probe["base"]["accuracy"] - probe[which]["accuracy"]
            row["probe"] = probe[which] | {"lost": lost}
        if found["task"]:
            score = dict(found["task"][which])
            row["target"] = {"exact_match": score.pop("accuracy"), **score}
    learned = settings.get("data", "unknown")
    return {
        "schema": "retain.result/1", "kind": "eval", **provenance(seed), "adapter": str(adapter),
        "model": {"name": name, "parameters": frozen, "trainable": trained, "dtype": dtype},
        "task": {
            "name": "word-problems" if found["task"] else learned,
            "test": found["task"] and found["task"]["tuned"]["items"], "metric": "exact_match",
        },
        "source": {"name": source, "heldout_tokens": forgetting["tokens"]},
        "forgetting": forgetting, "knowledge": probe, "exact_match": found["task"], "rows": rows,
    }  # fmt: skip
