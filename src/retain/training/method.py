"""The hooks of a retention method in `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retain.models.names import unwrap
from retain.retention.method import Method
from retain.training.handling import check_gradients, check_trainer, go_first, record
from retain.training.running import calling_handler

__all__ = ["MethodCallback"]


class MethodCallback(TrainerCallback):
    """Calls a method once an optimiser step: before it, after clipping; and after it.

    To each record of the trainer's log it adds ``retention_strength``, and ``predicted_nats``
    where the method predicts any.

    Args:
        method: whose `before_task` has been called.

    Raises:
        TrainingError: when a gradient is not a finite number.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._nats: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_trainer(args, kwargs.get("optimizer"))
        go_first(self, calling_handler())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = unwrap(kwargs["model"])
        if not args.fp16:  # a gradient scaler skips such steps by itself
            check_gradients(model.parameters(), state.global_step + 1)
        self._nats = self.method.before_step(model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            return
        nats = self.method.after_step(unwrap(kwargs["model"]), kwargs["optimizer"])
        self._nats = self._nats if nats is None else nats

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        added = {"retention_strength": self.method.strength}
        if self._nats is not None:
            added["predicted_nats"] = self._nats
        record(state, logs, added)
