"""Retention for `transformers.Trainer` and `trl.SFTTrainer`: one callback."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from retain.curvature.curvature import Curvature
from retain.errors import ModelError, TrainingError, unknown
from retain.models.adapter import unwrap
from retain.retention.laplace import Retention, check_strength
from retain.types import UPDATES, Update

__all__ = ["RetentionCallback", "go_first", "refuse_deepspeed"]


class RetentionCallback(TrainerCallback):
    """Adds the force once an optimiser step, after accumulation and clipping.

    To each record of the trainer's log it adds ``task_loss``, ``predicted_nats`` and
    ``retention_strength``, so every ``report_to`` backend gets them.

    Args:
        curvature: fitted on the trainer's model.
        strength: how many nats of task loss one nat of predicted forgetting weighs.
        update: ``gradient`` or ``proximal``; see `retain.retention.laplace`.

    Raises:
        MismatchError: when training begins, if the curvature is of another model.
        TrainingError: when a gradient is not a finite number.
    """

    def __init__(
        self, curvature: Curvature, strength: float = 10.0, update: Update = "gradient"
    ) -> None:
        if update not in UPDATES:
            raise unknown("update", update, UPDATES)
        check_strength(strength)
        self.curvature, self.strength = curvature, strength
        self.update: Update = update
        self.retention: Retention | None = None
        self._nats: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_deepspeed(args, kwargs.get("optimizer"))
        model: nn.Module = unwrap(kwargs["model"])
        self.retention = Retention(
            model, self.curvature, self.strength, update=self.update, resuming=state.global_step > 0
        )
        go_first(self)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.retention is not None
        if not args.fp16:  # a gradient scaler skips such steps by itself
            check_gradients(self.retention.parameters(), state.global_step + 1)
        if self.update == "gradient":
            self._nats = self.retention.add_force()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.retention is not None
        skipped = getattr(kwargs["optimizer"], "step_was_skipped", False)
        if self.update == "proximal" and not skipped:
            self._nats = self.retention.apply_proximal(kwargs["optimizer"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._nats is None:
            return
        added = {
            "task_loss": logs["loss"],
            "predicted_nats": self._nats,
            "retention_strength": self.strength,
        }
        record(state, logs, added)


def check_gradients(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Checks the gradients before a step.

    Raises:
        TrainingError: one of them is not a finite number.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads and not bool(torch.stack([g.isfinite().all() for g in grads]).all()):
        raise TrainingError(
            "the loss or its gradient is not finite",
            got=f"NaN or infinity at step {step}",
            allowed="finite numbers",
            fix="lower the learning rate, or check the data",
        )


def record(state: TrainerState, logs: dict[str, float], added: dict[str, float]) -> None:
    """Adds to a record of the trainer's log, and to its copy in the history."""
    logs.update(added)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(added)


def refuse_deepspeed(args: TrainingArguments, optimizer: object) -> None:
    """Refuses a run in which no force can act.

    Raises:
        ModelError: a DeepSpeed run.
    """
    if getattr(args, "deepspeed", None) or type(optimizer).__name__.startswith("DeepSpeed"):
        raise ModelError(
            "DeepSpeed steps its optimiser inside the backward pass, where no force can act",
            got="a DeepSpeed run",
            allowed="one process, or DDP",
            fix="train without DeepSpeed",
        )


def go_first(callback: TrainerCallback) -> None:
    """Moves a callback to the front of its trainer's handler, which is calling it now.

    Backends of ``report_to`` come before a user's callbacks, and would log before `on_log`
    could add to the record. A callback is not told its handler, so it is found on the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            if callback in handler.callbacks:
                handler.callbacks.remove(callback)
                handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back  # type: ignore[assignment]
