"""Kernels that compute LoRA without calling its layers, as Unsloth's do on a GPU: a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_fitting import FIT, trained
from torch import nn

from retain import Curvature, RetentionCallback, fit_curvature
from retain.errors import CurvatureError
from retain.integrations import FittingCallback
from tiny import ROWS, tiny

SOURCE = ROWS["llama"]


def computed(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer from its weights alone: no hook of it is called."""
    found = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    if layer.disable_adapters:
        return found
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return found + layer.scaling["default"] * (x @ a.T @ b.T)


def fused() -> Any:
    model = tiny("llama")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.__class__ = type("Fused", (type(layer),), {"__call__": computed})
    return model


@pytest.fixture(scope="module")
def curvature() -> Curvature:
    return fit_curvature(tiny("llama"), SOURCE, **FIT)  # of the plain model


def last(
    folder: Path, callback: RetentionCallback, said: str = "predicted_nats", steps: int = 4
) -> float:
    history = trained(folder, callback, fused(), max_steps=steps).state.log_history
    return float([e[said] for e in history if said in e][-1])


def test_the_force_alone_holds(curvature: Curvature, tmp_path: Path) -> None:
    force: dict[str, Any] = {"parts": ["force"]}
    free = last(tmp_path, RetentionCallback(curvature, 0.0, **force))
    assert 0 < last(tmp_path, RetentionCallback(curvature, 1000.0, **force)) < free / 2
    told = {"budget": free / 10, "source": SOURCE}
    assert 0 < last(tmp_path, RetentionCallback(curvature, **told, **force)) < free / 5
    call = RetentionCallback(curvature, kl=1.0, source=SOURCE, **force)
    assert last(tmp_path, call, "source_kl", steps=6) > 0


def test_what_reads_inputs_is_refused(curvature: Curvature, tmp_path: Path) -> None:
    for callback in (RetentionCallback(curvature), FittingCallback(SOURCE, fit=FIT)):
        with pytest.raises(CurvatureError, match="does not run exactly once"):
            trained(tmp_path, callback, fused())
