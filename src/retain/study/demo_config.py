"""Settings of the demo."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from retain.config import AdapterConfig, TrainConfig
from retain.types import Structure

__all__ = ["QUICK", "DemoConfig"]


class DemoConfig(TrainConfig):
    """Settings of the demo; the training settings are the same with and without retention."""

    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    adapter: AdapterConfig = AdapterConfig(rank=16, alpha=32)
    examples: int = 448
    problems: int = 200
    questions: int = 3
    source_rows: int = 64
    heldout_rows: int = 24
    source_length: int = 128
    largest: int = 30
    structure: Structure = "kfac"
    strengths: tuple[float, ...] = (3.0, 10.0, 30.0)
    chosen: float = 10.0
    learning_rate: float = 2e-3
    batch_size: int = 8
    measure_every: int = 16

    @model_validator(mode="after")
    def _tried(self) -> DemoConfig:
        if self.chosen not in self.strengths:
            raise ValueError("chosen must be one of the strengths")
        return self


QUICK: dict[str, Any] = {
    "examples": 32,
    "problems": 8,
    "questions": 1,
    "source_rows": 8,
    "heldout_rows": 8,
    "source_length": 48,
    "strengths": (10.0,),
    "measure_every": 2,
}
"""A run of a minute or two that shows that all stages work; its numbers mean nothing."""
