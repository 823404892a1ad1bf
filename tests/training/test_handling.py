"""What a callback refuses of its trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from retain.errors import ConfigError, ModelError
from retain.training.handling import check_trainer


def arguments(**changes: Any) -> Any:
    return SimpleNamespace(**{"deepspeed": None, "fp16": False, "max_grad_norm": 1.0} | changes)


def test_ordinary_runs_pass() -> None:
    for changes in ({}, {"fp16": True}, {"max_grad_norm": 0.0}, {"fp16": True, "max_grad_norm": 9}):
        check_trainer(arguments(**changes), object())


def test_deepspeed_is_refused() -> None:
    wrapper = type("DeepSpeedOptimizerWrapper", (), {})()
    for args, optimizer in ((arguments(deepspeed="c.json"), object()), (arguments(), wrapper)):
        with pytest.raises(ModelError, match="got: a DeepSpeed run"):
            check_trainer(args, optimizer)


@pytest.mark.parametrize("norm", [0.0, None])
def test_scaled_gradients_are_refused(norm: float | None) -> None:
    with pytest.raises(ConfigError, match="max_grad_norm=1e9 clips nothing"):
        check_trainer(arguments(fp16=True, max_grad_norm=norm), object())
