"""What every callback of this package asks of its trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]
from torch import distributed, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from retain.errors import ConfigError, ModelError, TrainingError
from retain.models.shards import is_sharded, local
from retain.retention.optimizers import check_steps, no_deepspeed
from retain.retention.watch import Watched
from retain.training.zero import zero_of

__all__ = [
    "check_alone",
    "check_gradients",
    "check_trainer",
    "check_trains",
    "go_first",
    "no_smaller_batches",
    "not_finite",
    "record",
    "watched_gradients",
]


def check_alone(
    callback: TrainerCallback, handler: CallbackHandler | None, *, more: int = 0
) -> None:
    """Refuses a second callback of the same kind: a cell of a notebook that was run again, mostly.

    `handler` is that of its trainer's callbacks, where it is known; `more` are about to be added.

    Raises:
        ConfigError: its trainer has another one.
    """
    kind = type(callback)
    held = [] if handler is None else handler.callbacks
    count = sum(isinstance(other, kind) for other in held) + more
    if count > 1:
        raise ConfigError(
            "the trainer's model would be held twice",
            got=f"{count} of {kind.__name__} on one trainer",
            allowed="one",
            fix=f"trainer.remove_callback({kind.__name__}) removes the first of them",
        )


def check_gradients(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Raises `TrainingError` before a step whose gradients are not all finite."""
    watched = watched_gradients(parameters, step)
    if watched is not None:
        watched.judge(float(watched.value))


def watched_gradients(parameters: Iterable[nn.Parameter], step: int) -> Watched | None:
    """The largest entry of the gradients, judged as `check_gradients` does; None without any."""
    every = [p.grad for p in parameters if p.grad is not None]
    grads = [local(g) for g in every if g.numel()]
    if not grads:
        return None

    def judge(largest: float) -> None:
        if not math.isfinite(largest):
            raise not_finite(step)

    some, device = [g for g in grads if g.numel()], grads[0].device
    norms = torch._foreach_norm(some, math.inf) if some else [torch.zeros((), device=device)]
    largest = torch.stack([n.to(device) for n in norms]).max()
    if any(map(is_sharded, every)):
        largest = largest.nan_to_num(math.inf)  # which a maximum over processes may drop
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return Watched(largest, judge)


def not_finite(step: int) -> TrainingError:
    """What a step is refused with whose gradients are not finite."""
    return TrainingError(
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


def check_trainer(args: TrainingArguments, optimizer: object, *, zero: bool = False) -> None:
    """Refuses a run in which no force can act.

    Args:
        args: of the trainer.
        optimizer: the one that it steps.
        zero: whether steps of ZeRO stages 1 and 2 are known (`retain.training.zero`).

    Raises:
        ModelError: another DeepSpeed run.
        ConfigError: float16 without clipping, so that gradients are still scaled when the force
            is added.
    """
    if zero and zero_of(optimizer) is not None:
        return  # it takes the scale out by itself
    if getattr(args, "deepspeed", None):
        raise no_deepspeed()
    check_steps(optimizer)
    if args.fp16 and not args.max_grad_norm:
        raise ConfigError(
            "the force would be divided by float16's loss scale",
            got=f"fp16=True and max_grad_norm={args.max_grad_norm}",
            allowed="clipping, which takes the scale out of the gradients first",
            fix="max_grad_norm=1e9 clips nothing; or bf16=True",
        )


@contextmanager
def no_smaller_batches(args: TrainingArguments) -> Iterator[None]:
    """Inside it ``auto_find_batch_size`` tries no smaller batches: what is read before the first
    step has nothing of their size.

    Raises:
        TrainingError: in place of what it would take for batches that are too large.
    """
    try:
        yield
    except RuntimeError as error:
        if not (args.auto_find_batch_size and should_reduce_batch_size(error)):
            raise
        raise TrainingError(
            "memory is full before the first step, and smaller batches read no less",
            got=str(error).splitlines()[0],
            allowed="room for what a fit, the filter, a budget and a KL read before training",
            fix="filter=Filter(tokens=2048, rows=16), fewer source rows, or a fit's batch_size=1",
        ) from error


def check_trains(model: nn.Module) -> None:
    """Raises `ModelError` for a model of which nothing trains, as one loaded for inference."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            "no weight of the model trains",
            got="requires_grad=False everywhere, as an adapter loaded for inference has it",
            allowed="an adapter that trains",
            fix="PeftModel.from_pretrained(model, folder, is_trainable=True)",
        )


def go_first(callback: TrainerCallback, handler: CallbackHandler | None) -> None:
    """Moves a callback to the front of its trainer's handler.

    Backends of ``report_to`` come before a user's callbacks, and would log before `on_log`
    could add to the record.
    """
    if handler is not None and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
