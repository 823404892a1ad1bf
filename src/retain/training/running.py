"""Whether a training still runs, or was broken off."""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

__all__ = ["Running", "begun_anew", "calling_handler", "resumed_from", "saved_in", "train_call"]


_LOOPS = ("_inner_training_loop", "train")
"""What transformers calls the function that runs while a trainer trains."""

_EVENTS = {"call_event", *(name for name in vars(TrainerCallback) if name.startswith("on_"))}
"""What a handler's methods are called that call its callbacks."""


class Running:
    """Tells whether the training that is calling a callback now is still going on.

    Nobody tells a callback of an exception or of Ctrl-C, and the frames of a training that ended so
    may live on in a traceback. What tells is whether its loop is on a thread's stack. One that is
    made while no trainer calls says yes for ever.
    """

    def __init__(self) -> None:
        self._trainer: Any = None
        self._state: Any = None
        self._code: CodeType | None = None
        frame = _loop_frame()
        if frame is not None:
            trainer = _self_of(frame)
            self._trainer, self._state = weakref.ref(trainer), weakref.ref(trainer.state)
            self._code = frame.f_code

    def __call__(self) -> bool:
        if self._trainer is None:
            return True
        trainer = self._trainer()
        if trainer is None or trainer.state is not self._state():  # it has begun another one
            return False
        if self._on_stack(sys._getframe(), trainer):
            return True
        others = sys._current_frames().values()  # a GPU's gradients come in threads of their own
        return any(self._on_stack(frame, trainer) for frame in others)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, such as a pickled one, is of no training that goes on."""
        if self._trainer is None:
            return self.__dict__
        return {"_trainer": _gone, "_state": _gone, "_code": None}

    def _on_stack(self, frame: FrameType | None, trainer: Any) -> bool:
        while frame is not None:
            if frame.f_code is self._code and frame.f_locals.get("self") is trainer:
                return True
            frame = frame.f_back
        return False


def _gone() -> None:
    """In place of a weak reference, which cannot be pickled."""


def calling_handler() -> CallbackHandler | None:
    """The handler of a trainer's callbacks that is calling one of them now."""
    frame = _handler_frame()
    return None if frame is None else _self_of(frame)


def begun_anew() -> bool:
    """Whether the trainer that is calling a callback now makes its model anew when it trains."""
    frame = _loop_frame()
    return frame is not None and getattr(_self_of(frame), "model_init", None) is not None


def resumed_from() -> Path | None:
    """The checkpoint that the trainer which is calling a callback now goes on from."""
    frame = _loop_frame()
    found = None if frame is None else frame.f_locals.get("resume_from_checkpoint")
    return Path(found) if isinstance(found, str | os.PathLike) else None


def train_call() -> Any:
    """What stands for the call of ``train()`` which is calling a callback now: it is one object as
    often as that call tries again with smaller batches, and another in the next call.

    None where it is not known, and where each attempt loads a checkpoint's weights anew.
    """
    frame = _loop_frame()
    trainer = None if frame is None else _self_of(frame)
    if any(getattr(trainer, f"is_{kind}_enabled", False) for kind in ("deepspeed", "fsdp")):
        return None
    while frame is not None and (frame.f_code.co_name != "train" or _self_of(frame) is not trainer):
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("inner_training_loop")


def saved_in(args: TrainingArguments) -> Path:
    """The folder of the checkpoints of the trainer which is calling a callback now.

    It is ``output_dir``, or, of a trial of a hyperparameter search, that trial's own in it.
    """
    frame = _loop_frame()
    named = None if frame is None else getattr(_self_of(frame), "_get_output_dir", None)
    if frame is None or named is None:
        return Path(str(args.output_dir))
    return Path(named(frame.f_locals.get("trial")))


def _handler_frame() -> FrameType | None:
    """The nearest frame of a trainer's handler of callbacks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _EVENTS and isinstance(_self_of(frame), CallbackHandler):
            return frame
        frame = frame.f_back
    return None


def _loop_frame() -> FrameType | None:
    """The frame of the training loop of the trainer that is calling a callback now.

    Of a trainer whose loop has another name it is that of the method which called the handler.
    """
    frame = _handler_frame()
    while frame is not None and frame.f_code.co_name in _EVENTS:
        frame = frame.f_back
    caller = frame
    while frame is not None:
        if frame.f_code.co_name in _LOOPS and hasattr(_self_of(frame), "callback_handler"):
            return frame
        frame = frame.f_back
    if caller is not None and hasattr(_self_of(caller), "callback_handler"):
        return caller
    return None


def _self_of(frame: FrameType) -> Any:
    """Whose method a frame runs; None of a function.

    What a frame's variables hold stays alive until it ends, once they were read (before Python
    3.13). So of the caller's own functions nothing is read.
    """
    return frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
