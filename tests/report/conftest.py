"""A made-up result for the tests of the report. None of these numbers was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

PROMPTS = {
    "What is the capital of France?": (
        "The capital of France is Paris.",
        "Paris has 3 boxes with 4 apples each. 3 * 4 = 12. The answer is 12.",
        "The capital of France is Paris.",
    ),
    "Why is the sky blue?": (
        "The sky is blue because air scatters blue light more than red light, so blue reaches "
        "the eye from all directions.",
        "The sky is blue 2 times a day. 2 * 7 = 14. The answer is 14.",
        "The sky is blue because short wavelengths are scattered more by the air.",
    ),
    "Write one sentence about the sea <b>&</b> the moon.": (
        "The moon pulls at the sea,\nand the sea answers with tides.",
        "",
        "The sea rises and falls under the moon.",
    ),
    "Name three primary colours.": ("Red, yellow and blue.", "3.", "Red, yellow, blue."),
}


def _share(value: float, items: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(value * (1 - value) / items)
    interval = [round(max(0.0, value - half), 3), round(min(1.0, value + half), 3)]
    return {"interval": interval, "items": items}


def _history(kl: float, final: float, strength: float) -> list[dict[str, Any]]:
    steps = []
    for step in range(1, 65):
        rise = 1 - math.exp(-step / 22)
        noise = 0.12 * math.sin(step * 12.9898) + 0.08 * math.sin(step * 4.1414)
        steps.append(
            {
                "step": step,
                "loss": round(final + (2.1 - final) * math.exp(-step / 14) + noise, 4),
                "predicted": round(kl * rise * 1.15, 6),
                "measured": round(kl * rise, 6) if step % 8 == 0 else None,
                "strength": strength,
            }
        )
    return steps


def _row(
    name: str,
    index: int,
    strength: float | None,
    score: float,
    loss: float,
    kl: float,
    probe: float,
) -> dict[str, Any]:
    base = strength is None
    return {
        "name": name,
        "label": ("base model", "LoRA", "LoRA + retention")[index],
        "method": (None, "none", "laplace")[index],
        "strength": strength,
        "chosen": name == "retain-100",
        "target": {"exact_match": score, "loss": loss, **_share(score, 200)},
        "forgetting": {
            "kl": kl,
            "kl_interval": [round(kl * 0.9, 5), round(kl * 1.1, 5)],
            "ppl_base": 9.1,
            "ppl": round(9.1 * math.exp(kl * 0.8), 3),
            "flips": round(min(0.4, kl**0.7 * 0.3), 4),
            "tokens": 4096,
        },
        "probe": {"accuracy": probe, "lost": round(0.8 - probe, 4), **_share(probe, 240)},
        "train": None
        if base
        else {"seconds": 100.2, "steps": 64, "examples": 512, "peak_memory_mib": 2100.0},
        "history": [] if base else _history(kl, loss - 0.15, strength or 0.0),
        "generations": [{"prompt": p, "text": texts[index]} for p, texts in PROMPTS.items()],
    }


def make_result() -> dict[str, Any]:
    """A whole result with five strengths; made up."""
    return {
        "schema": "retain.result/1",
        "kind": "fixture",
        "created": "2030-01-02T03:04:05Z",
        "seed": 0,
        "versions": {"retain": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        "commit": "0123abc",
        "hardware": {"cpu": "Test CPU", "cores": 2, "memory_gib": 23.0, "accelerator": None},
        "model": {
            "name": "fixture-135m",
            "parameters": 134515008,
            "trainable": 4884480,
            "dtype": "bfloat16",
        },
        "task": {"name": "word-problems", "train": 512, "test": 200, "metric": "exact_match"},
        "source": {"name": "self", "fit_tokens": 8192, "heldout_tokens": 4096},
        "curvature": {
            "structure": "kfac",
            "space": "weight",
            "fisher": "mc",
            "tokens": 8192,
            "seconds": 40.1,
            "bytes": 12345678,
        },
        "rows": [
            _row("base", 0, None, 0.02, 2.1, 0.0, 0.8),
            _row("lora", 1, 0.0, 0.315, 0.61, 0.412, 0.617),
            _row("retain-10", 2, 10.0, 0.31, 0.62, 0.236, 0.704),
            _row("retain-30", 2, 30.0, 0.305, 0.64, 0.131, 0.746),
            _row("retain-100", 2, 100.0, 0.3, 0.66, 0.0521, 0.779),
            _row("retain-300", 2, 300.0, 0.225, 0.83, 0.0208, 0.792),
            _row("retain-1000", 2, 1000.0, 0.115, 1.22, 0.0071, 0.796),
        ],
        "summary": [
            {
                "claim": "KL to the base, retention / plain LoRA",
                "value": 0.1265,
                "bound": 0.5,
                "relation": "<=",
                "holds": True,
            },
            {
                "claim": "exact match, retention - plain LoRA",
                "value": -0.015,
                "bound": -0.05,
                "relation": ">=",
                "holds": True,
            },
            {
                "claim": "probe points lost, retention / plain LoRA",
                "value": 0.115,
                "bound": 0.5,
                "relation": "<=",
                "holds": True,
            },
        ],
    }


def nulled(value: Any, keep: frozenset[str]) -> Any:
    """The same structure with every leaf null but those under the names to keep."""
    if isinstance(value, dict):
        return {k: v if k in keep else nulled(v, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [nulled(v, keep) for v in value]
    return None


@pytest.fixture
def result() -> dict[str, Any]:
    """A made-up result as the data of a `result.json`."""
    return make_result()


@pytest.fixture
def bare(result: dict[str, Any]) -> dict[str, Any]:
    """The made-up result with everything unmeasured."""
    keep = frozenset({"schema", "kind", "name", "label", "method", "prompt", "step", "claim"})
    out = nulled(result, keep)
    assert isinstance(out, dict)
    return out


@pytest.fixture
def result_path(tmp_path: Path, result: dict[str, Any]) -> Path:
    """A `result.json` with the made-up result."""
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    return path
