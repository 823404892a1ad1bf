"""What every callback of this package asks of its trainer."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from retain.errors import ConfigError, ModelError, TrainingError

__all__ = ["check_gradients", "check_trainer", "go_first", "record"]


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


def check_trainer(args: TrainingArguments, optimizer: object) -> None:
    """Refuses a run in which no force can act.

    Raises:
        ModelError: a DeepSpeed run.
        ConfigError: float16 without clipping, so that gradients are still scaled when the force
            is added.
    """
    if getattr(args, "deepspeed", None) or type(optimizer).__name__.startswith("DeepSpeed"):
        raise ModelError(
            "DeepSpeed steps its optimiser inside the backward pass, where no force can act",
            got="a DeepSpeed run",
            allowed="one process, or DDP",
            fix="train without DeepSpeed",
        )
    if args.fp16 and not args.max_grad_norm:
        raise ConfigError(
            "the force would be divided by float16's loss scale",
            got=f"fp16=True and max_grad_norm={args.max_grad_norm}",
            allowed="clipping, which takes the scale out of the gradients first",
            fix="max_grad_norm=1e9 clips nothing; or bf16=True",
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
