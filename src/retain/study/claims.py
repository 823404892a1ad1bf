"""What a comparison claims, each claim with its measured value and its bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["summary"]


def summary(rows: Sequence[dict[str, Any]], chosen: float) -> list[dict[str, Any]]:
    """The claims of the demo, each with its measured value and its bound."""
    lora = next(r for r in rows if r["method"] == "none")
    ours = next(r for r in rows if r["strength"] == chosen)
    kl = lora["forgetting"]["kl"]
    lost = lora["probe"]["lost"]
    loss = ours["target"]["loss"] / lora["target"]["loss"]  # exact match of 200 is +- 5 points
    ratio = ours["forgetting"]["kl"] / kl if kl else None
    share = ours["probe"]["lost"] / lost if lost > 0 else None
    return [
        _claim("forgetting (KL to the base), retention / plain LoRA", ratio, 0.5),
        _claim("target loss on new problems, retention / plain LoRA", loss, 1.05),
        _claim("knowledge lost, retention / plain LoRA", share, 1 / 3),
    ]


def _claim(claim: str, value: float | None, bound: float) -> dict[str, Any]:
    holds = None if value is None else value <= bound
    return {"claim": claim, "value": value, "bound": bound, "relation": "<=", "holds": holds}
