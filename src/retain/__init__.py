"""Fine-tune language models with LoRA without forgetting what they knew.

Two lines in a training script that works already::

    curvature = retain.fit_curvature(trainer.model, "self", tokenizer=tokenizer)
    trainer.add_callback(retain.RetentionCallback(curvature))

Names are imported on first use, so ``import retain`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retain.curvature.curvature import Curvature, load_curvature, reanchored
    from retain.curvature.fit.fit import fit_curvature
    from retain.errors import RetainError
    from retain.evaluation.answers import measure_answers
    from retain.evaluation.certify import certify
    from retain.evaluation.explain import explain
    from retain.evaluation.forgetting import measure_forgetting
    from retain.models.load import load_model
    from retain.models.lora import attach_lora, grow_lora
    from retain.models.saved import save_adapter
    from retain.retention.filter import Filter
    from retain.retention.head import fit_head
    from retain.retention.output_kl import OutputKL
    from retain.retention.retention import Retention
    from retain.retention.soften.adapter import soften
    from retain.runs.compact import compact
    from retain.runs.eval import eval_run
    from retain.runs.push import push_to_hub
    from retain.runs.train import continue_run, train_run
    from retain.training.callback import RetentionCallback
    from retain.training.renamed import Start

__version__ = "0.2.0"

__all__ = [
    "Curvature",
    "Filter",
    "OutputKL",
    "RetainError",
    "Retention",
    "RetentionCallback",
    "Start",
    "__version__",
    "attach_lora",
    "certify",
    "compact",
    "continue_run",
    "eval_run",
    "explain",
    "fit_curvature",
    "fit_head",
    "grow_lora",
    "load_curvature",
    "load_model",
    "measure_answers",
    "measure_forgetting",
    "push_to_hub",
    "reanchored",
    "save_adapter",
    "soften",
    "train_run",
]

_HOMES = {
    "Curvature": "retain.curvature.curvature",
    "RetainError": "retain.errors",
    "Filter": "retain.retention.filter",
    "OutputKL": "retain.retention.output_kl",
    "Retention": "retain.retention.retention",
    "RetentionCallback": "retain.training.callback",
    "Start": "retain.training.renamed",
    "attach_lora": "retain.models.lora",
    "certify": "retain.evaluation.certify",
    "compact": "retain.runs.compact",
    "continue_run": "retain.runs.train",
    "eval_run": "retain.runs.eval",
    "explain": "retain.evaluation.explain",
    "fit_curvature": "retain.curvature.fit.fit",
    "fit_head": "retain.retention.head",
    "grow_lora": "retain.models.lora",
    "load_curvature": "retain.curvature.curvature",
    "load_model": "retain.models.load",
    "measure_answers": "retain.evaluation.answers",
    "measure_forgetting": "retain.evaluation.forgetting",
    "push_to_hub": "retain.runs.push",
    "reanchored": "retain.curvature.curvature",
    "save_adapter": "retain.models.saved",
    "soften": "retain.retention.soften.adapter",
    "train_run": "retain.runs.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'retain' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        from retain.extras import missing

        known = missing(error, f"retain.{name}")
        if known is None:
            raise
        raise known from error


def __dir__() -> list[str]:
    return __all__
