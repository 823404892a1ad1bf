"""Made-up studies and results for the tests of the report. None of these numbers was measured."""

from __future__ import annotations

import hashlib
import json
import math
import random
from typing import Any

from retain.evaluation.continual import continual_metrics
from retain.records import StudyRecord
from retain.report.cells import Group, groups

TASKS = ["sst2", "mnli", "boolq", "word-problems"]
METRICS = ["accuracy", "accuracy", "accuracy", "exact_match"]
_START = {"sst2": 0.52, "mnli": 0.34, "boolq": 0.55, "word-problems": 0.02}
_GAIN = {"sst2": 0.36, "mnli": 0.35, "boolq": 0.15, "word-problems": 0.3}

# name, kind, strength, stores data, share that is learned, share that is forgotten, nats moved
METHODS: list[tuple[str, str, float, bool, float, float, float]] = [
    ("none", "none", 0.0, False, 1.0, 0.55, 0.41),
    ("l2", "l2", 0.1, False, 0.88, 0.4, 0.2),
    ("EWC", "diagonal", 100.0, False, 0.95, 0.42, 0.22),
    ("K-FAC", "kfac", 1.0, False, 1.0, 0.33, 0.12),
    ("K-FAC", "kfac", 10.0, False, 0.97, 0.18, 0.05),
    ("K-FAC", "kfac", 100.0, False, 0.7, 0.06, 0.012),
    ("output KL", "kl", 1.0, False, 0.96, 0.26, 0.03),
    ("O-LoRA", "olora", 0.5, False, 0.93, 0.45, 0.38),
    ("self-replay", "self_replay", 0.0, False, 0.98, 0.3, 0.1),
    ("replay", "replay", 0.0, True, 1.0, 0.1, 0.3),
]


def scoreless() -> dict[str, Any]:
    """A study of one generation task that no method gets right yet, though all learn."""
    data = make_study("scoreless")
    data["runs"] = [make_run(["word-problems"], m, s) for m in METHODS[:4] for s in range(3)]
    for run in data["runs"]:
        run["matrix"] = [[0.0]]
        run["metrics_summary"] = continual_metrics([[0.0]], [0.0]).to_dict()
    return data


def _key(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def make_run(
    tasks: list[str],
    method: tuple[str, str, float, bool, float, float, float],
    seed: int,
    *,
    study: str = "made-up",
    adapter: str = "lora",
    order: str = "A",
    share: float = 0.0073,
    model: str = "someone/fixture-135m",
    several: bool = False,
) -> dict[str, Any]:
    """The record of one run, made up from the method's shares."""
    name, kind, strength, stores, learns, forgets, nats = method
    label = f"{name} {strength:g}" if several else name
    draw = random.Random(f"{tasks}{name}{strength}{seed}{adapter}{model}")

    def noise(size: float = 0.008) -> float:
        return draw.gauss(0.0, size)

    before = [min(1.0, max(0.0, _START.get(t, 0.4) + noise(0.004))) for t in tasks]
    matrix: list[list[float]] = []
    for i in range(len(tasks)):
        row = []
        for j, task in enumerate(tasks):
            gain = _GAIN.get(task, 0.3) * learns
            if j > i:
                value = before[j] + 0.02 * (i + 1) * gain
            else:
                value = before[j] + gain * math.exp(-forgets * (i - j) * 0.8)
            row.append(round(min(1.0, max(0.0, value + noise())), 4))
        matrix.append(row)
    config = {
        "model": model,
        "dtype": "bfloat16",
        "adapter": {"name": adapter, "kind": adapter.split("-")[0], "rank": 8},
        "method": {
            "name": name,
            "label": label,
            "kind": kind,
            "strength": strength,
            "stores_data": stores,
        },
        "order": {"name": order, "tasks": tasks},
        "seed": seed,
        "training": {"epochs": 1},
        "data": {"train": 512, "test": 200},
        "source": {"kind": "self"},
    }
    retention = []
    for after in range(len(tasks)):
        kl = round(nats * (after + 1) / len(tasks) * (1 + noise(0.05)), 5)
        retention.append(
            {
                "after": after,
                "kl": kl,
                "kl_interval": [round(0.9 * kl, 5), round(1.1 * kl, 5)],
                "ppl_base": 9.1,
                "ppl": round(9.1 * math.exp(0.8 * kl), 3),
                "flips": round(min(0.5, 0.3 * kl**0.7), 4),
                "tokens": 4096,
            }
        )
    trained = int(share * 134515008)
    return {
        "schema": "retain.run/1",
        "study": study,
        "key": _key(config),
        "status": "done",
        "error": None,
        "config": config,
        "created": f"2030-01-0{2 + seed}T03:04:05Z",
        "versions": {"python": "3.11.2", "retain": "0.1.0", "torch": "2.13.0"},
        "commit": "0123abcd4567",
        "hardware": {"cpu": "Test CPU", "cores": 2, "memory_gib": 23.0, "accelerator": None},
        "seed": seed,
        "tasks": tasks,
        "metrics": [METRICS[TASKS.index(t)] if t in TASKS else "accuracy" for t in tasks],
        "before": before,
        "matrix": matrix,
        "sizes": {"train": [512] * len(tasks), "test": [200] * len(tasks)},
        "retention": retention,
        "general": None,
        "metrics_summary": continual_metrics(matrix, before).to_dict(),
        "parameters": {"trainable": trained, "base": 134515008, "share": share},
        "seconds": {
            "train": 210.0 + 10 * seed,
            "method": 2.0 if name == "none" else 41.0,
            "evaluate": 65.0,
            "total": round(280 + 60 * draw.random() + (60 if stores else 0), 1),
        },
        "peak_memory_gib": round(2.1 + 0.4 * draw.random(), 2),
        "losses": [round(0.4 + 0.1 * draw.random(), 4) for _ in tasks],
        "predicted": [None if name == "none" else round(0.9 * nats, 4) for _ in tasks],
    }


def group_of(data: dict[str, Any]) -> Group:
    """The first group of a study."""
    return groups([StudyRecord.model_validate(data)])[0]


def fail(run: dict[str, Any], why: str) -> dict[str, Any]:
    """The record of a run that failed instead."""
    nothing: dict[str, Any] = {
        "status": "failed", "error": why, "tasks": [], "metrics": [], "before": [], "matrix": [],
        "retention": [], "metrics_summary": None, "parameters": None, "seconds": None,
        "peak_memory_gib": None, "losses": [], "predicted": [],
    }  # fmt: skip
    return run | nothing


def _study(name: str, about: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": "retain.study/1",
        "name": name,
        "description": about,
        "spec": {"name": name},
        "skipped": [],
        "runs": runs,
        "tables": {"cells": []},
    }


def make_study(name: str = "made-up") -> dict[str, Any]:
    """Eight methods (one in three strengths), 3 seeds, 4 tasks; one run failed, one cell has one
    seed, one method replays stored rows."""
    names = [method[0] for method in METHODS]
    runs = []
    for seed in range(3):
        for method in METHODS:
            if method[0] == "self-replay" and seed:
                continue
            run = make_run(TASKS, method, seed, study=name, several=names.count(method[0]) > 1)
            if method[0] == "O-LoRA" and seed == 2:
                run = fail(run, "the loss is not finite; got: nan at step 31 of mnli")
            runs.append(run)
    made = _study(name, "A made-up study of four tasks; no number here was measured.", runs)
    made["skipped"] = [{"adapter": "prefix", "method": "O-LoRA", "reason": "it wants A and B"}]
    return made


def make_wide() -> dict[str, Any]:
    """Fifteen rows: eleven methods on LoRA, other ways of tuning, and each task alone."""
    tasks = ["dbpedia", "sst2", "agnews", "amazon"]
    ways = [("none", 1.0, 0.55, 0.41), ("l2", 0.88, 0.4, 0.2), ("diagonal", 0.95, 0.42, 0.22),
            ("kfac", 0.97, 0.18, 0.05), ("tridiagonal", 0.96, 0.2, 0.06),
            ("activation", 0.99, 0.3, 0.1), ("kl", 0.96, 0.26, 0.03),
            ("masked_kl", 0.985, 0.25, 0.05), ("replay", 1.0, 0.1, 0.3),
            ("self_replay", 0.98, 0.3, 0.1), ("olora", 0.93, 0.45, 0.38)]  # fmt: skip
    runs = []
    for seed in range(3):
        for name, *shares in ways:
            way = (name, name, float(name != "none"), name == "replay", *shares)
            runs.append(make_run(tasks, way, seed, study="wide", order="four"))
        for adapter, share, name in (("full", 1.0, "none"), ("bottleneck", 0.02, "none"),
                                     ("prefix", 0.004, "none"), ("osf", 0.5, "osf")):  # fmt: skip
            way = (name, name, 0.0, False, 0.9, 0.5 + share / 3, 0.3 + share)
            runs.append(
                make_run(tasks, way, seed, study="wide", order="four", adapter=adapter, share=share)
            )
        for task in tasks:
            runs.append(make_run([task], METHODS[0], seed, study="wide", order=task))
    return _study("wide", "Made up: every method on four tasks.", runs)


def make_adapters() -> dict[str, Any]:
    """Five ways of tuning without a method, six tasks each learned alone, 2 seeds."""
    ways = [("lora", 0.0121), ("lora-r1", 0.0011), ("bottleneck", 0.0091), ("prefix", 0.0024),
            ("full", 1.0)]  # fmt: skip
    runs = []
    for seed in range(2):
        for task in ["cola", "sst2", "mrpc", "stsb", "rte", "qnli"]:
            for k, (adapter, share) in enumerate(ways):
                shares = (1 - 0.09 * k if k < 4 else 1.02, 0.0, (0.2, 0.05, 0.15, 0.3, 1.4)[k])
                run = make_run(
                    [task], ("none", "none", 0.0, False, *shares), seed, study="glue",
                    adapter=adapter, order=task, share=share, model="all-MiniLM-L6-v2",
                )  # fmt: skip
                run["retention"] = [] if adapter == "prefix" else run["retention"]
                runs.append(run)
    return _study("glue", "Made up: five ways of tuning on six tasks, each alone.", runs)


def make_long() -> dict[str, Any]:
    """Three methods over 14 tasks in two orders, one seed."""
    tasks = ["mnli", "cb", "wic", "copa", "qqp", "boolq", "rte", "imdb", "yelp", "amazon", "sst2",
             "dbpedia", "ag_news", "yahoo_answers"]  # fmt: skip
    runs = [
        make_run(order, method, 0, study="long", order=name)
        for name, order in (("1", tasks), ("2", tasks[::-1]))
        for method in (METHODS[0], METHODS[4], METHODS[9])
    ]
    return _study("long", "Made up: fourteen tasks in two orders.", runs)


PROMPTS = {
    "What is the capital of France?": ("Paris.", "3 * 4 = 12. The answer is 12.", "Paris."),
    "Write about the sea <b>&</b> the moon.": ("The moon pulls at\nthe sea.", "", "The sea rises."),
    "Name three colours.": ("Red, yellow, blue.", "3.", "Red, yellow, blue."),
    "Why is the sky blue?": ("Air scatters blue light.", "2 * 7 = 14.", "Air scatters it."),
}


def _history(kl: float, final: float, strength: float) -> list[dict[str, Any]]:
    rise = [1 - math.exp(-step / 22) for step in range(65)]
    return [
        {
            "step": step,
            "loss": round(final + (2.1 - final) * math.exp(-step / 14), 4),
            "predicted": round(kl * rise[step] * 1.15, 6),
            "measured": round(kl * rise[step], 6) if step % 8 == 0 else None,
            "strength": strength,
        }
        for step in range(1, 65)
    ]


def _row(
    name: str,
    index: int,
    strength: float | None,
    score: float,
    loss: float,
    kl: float,
    asked: float,
) -> dict[str, Any]:
    half = 1.96 * math.sqrt(score * (1 - score) / 200)
    interval = [round(max(0.0, score - half), 3), round(min(1.0, score + half), 3)]
    return {
        "name": name,
        "label": ("base model", "LoRA", "LoRA + retention")[index],
        "method": (None, "none", "laplace")[index],
        "strength": strength,
        "chosen": name == "retain-100",
        "target": {"exact_match": score, "loss": loss, "interval": interval, "items": 200},
        "forgetting": {
            "kl": kl,
            "kl_interval": [round(kl * 0.9, 5), round(kl * 1.1, 5)],
            "ppl_base": 9.1,
            "ppl": round(9.1 * math.exp(kl * 0.8), 3),
            "flips": round(min(0.4, kl**0.7 * 0.3), 4),
            "tokens": 4096,
        },
        "probe": {"accuracy": asked, "lost": round(0.8 - asked, 4), "items": 240},
        "train": {"seconds": 100.2, "steps": 64, "peak_memory_mib": 2100.0} if index else None,
        "history": _history(kl, loss - 0.15, strength or 0.0) if index else [],
        "generations": [{"prompt": p, "text": texts[index]} for p, texts in PROMPTS.items()],
    }


def make_result() -> dict[str, Any]:
    """A whole result with three strengths; made up."""
    bounds = [
        ("KL to the base, retention / plain LoRA", 0.1265, 0.5, "<="),
        ("exact match, retention - plain LoRA", -0.015, -0.05, ">="),
        ("probe points lost, retention / plain LoRA", 0.115, 0.5, "<="),
    ]
    return {
        "schema": "retain.result/1",
        "kind": "fixture",
        "created": "2030-01-02T03:04:05Z",
        "seed": 0,
        "versions": {"retain": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        "commit": "0123abc",
        "hardware": {"cpu": "Test CPU", "cores": 2, "memory_gib": 23.0, "accelerator": None},
        "model": {"name": "fixture-135m", "parameters": 134515008, "trainable": 4884480},
        "task": {"name": "word-problems", "train": 512, "test": 200, "metric": "exact_match"},
        "source": {"name": "self", "fit_tokens": 8192, "heldout_tokens": 4096},
        "curvature": {"structure": "kfac", "fisher": "mc", "tokens": 8192, "bytes": 12345678},
        "rows": [
            _row("base", 0, None, 0.02, 2.1, 0.0, 0.8),
            _row("lora", 1, 0.0, 0.315, 0.61, 0.412, 0.617),
            _row("retain-10", 2, 10.0, 0.31, 0.62, 0.236, 0.704),
            _row("retain-100", 2, 100.0, 0.3, 0.66, 0.0521, 0.779),
            _row("retain-1000", 2, 1000.0, 0.115, 1.22, 0.0071, 0.796),
        ],
        "summary": [
            {"claim": claim, "value": value, "bound": bound, "relation": relation, "holds": True}
            for claim, value, bound, relation in bounds
        ],
    }


def make_softening() -> dict[str, Any]:
    """A softening of five points, one of them measured; made up."""
    curve = [
        {"nats": 0.4 * share**2, "learned": share**0.5, "scaled": share, "measured": None,
         "scaled_measured": None}
        for share in (1.0, 0.6, 0.3, 0.1)
    ]  # fmt: skip
    moved = {"kl": 0.35, "kl_interval": [0.3, 0.4], "ppl_base": 9.1, "ppl": 12.0, "flips": 0.2}
    curve[0] |= {"measured": moved, "scaled_measured": moved}
    chosen = {"nats": 0.1, "learned": 0.7, "scaled": 0.5}
    model = {"name": "someone/fixture-135m"}
    return {"schema": "retain.soften/1", "model": model, "chosen": chosen, "curve": curve}


def make_eval(adapters: int = 2) -> dict[str, Any]:
    """A ``retain eval`` of adapters with long names and answers; made up."""

    def measure(value: float, half: float = 0.1) -> dict[str, Any]:
        return {"value": value, "interval": [value - half, value + half], "n": 40}

    several = range(adapters)

    def score(label: str, unit: str, better: int = 1) -> dict[str, Any]:
        return {
            "label": label, "unit": unit, "better": better, "base": measure(0.2),
            "tuned": [measure(0.4 + i / 10) for i in several],
            "changes": [measure(0.2 + i / 10) for i in several],
            "between": [{"pair": [1, 0], **measure(0.1, 0.2)}][: adapters - 1],
        }  # fmt: skip

    measures = (
        "log_ratio", "first_word", "first_token", "unlikely", "repeats", "repeats_base",
        "task_form", "task_form_base", "right_before", "right_after", "kept",
    )  # fmt: skip
    group = {"prompts": 7, **{name: measure(0.5) for name in measures}}
    said = {"base": "word " * 30, "tuned": "x" * 200, "right_before": True, "right_after": False,
            "task_form": True, "repeats": True}  # fmt: skip
    rows = [{"prompt": f"<i>Prompt</i> {i}", "skill": "ab"[i % 2], **said} for i in range(14)]
    answers = {"new_tokens": 32, "overall": group, "skills": {"a": group, "b": group}, "rows": rows}
    item = {"prompt": "y" * 300, "answer": "#### 1", "tokens": 4, "base": {"nats": 2.0},
            "tuned": [{"nats": 1.0, "said": "#### 1", "right": True}] * adapters}  # fmt: skip
    scores = {"data.loss": score("loss of the rows", "nats per token", -1),
              "data.right": score("exact match of the rows", "%"),
              "general.hellaswag": score("hellaswag", "%"),
              "source.kl": score("forgotten: KL to the base", "nats per token", -1),
              "answers.right": score("right answers to prompts", "%")}  # fmt: skip
    return {
        "schema": "retain.result/2", "created": "2030-01-02T03:04:05Z", "seed": 0,
        "versions": {"torch": "2.13.0"}, "model": {"name": "fixture-135m", "dtype": "float32"},
        "source": {"name": "self", "tokens": 300}, "scores": scores, "notes": ["a note"],
        "adapters": [{"name": f"a-long-name-{i}", "path": f"runs/{i}", "answers": answers}
                     for i in several],
        "data": {"name": "rows.jsonl", "rows": 12, "asked": 12, "new_tokens": 16,
                 "counts": {"left_out_no_room": 2}, "items": [item] * 12},
    }  # fmt: skip


def nulled(value: Any, keep: frozenset[str]) -> Any:
    """The same structure with every leaf null but those under the names to keep."""
    if isinstance(value, dict):
        return {k: v if k in keep else nulled(v, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [nulled(v, keep) for v in value]
    return None
