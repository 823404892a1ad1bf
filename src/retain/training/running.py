"""Whether a training still runs, or was broken off."""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from transformers.trainer_callback import CallbackHandler

__all__ = ["Running", "calling_handler", "resumed_from"]


_LOOPS = ("_inner_training_loop", "train")
"""What transformers calls the function that runs while a trainer trains."""


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
        frame, codes = _handler_frame(), []
        while frame is not None:
            found: Any = frame.f_locals.get("self")
            if self._trainer is None and hasattr(found, "callback_handler"):
                self._trainer, self._state = weakref.ref(found), weakref.ref(found.state)
            if self._trainer is not None and found is self._trainer():
                codes.append(frame.f_code)
            frame = frame.f_back
        loops = [c for name in _LOOPS for c in codes if c.co_name == name]
        if codes:
            self._code = (loops or codes)[0]

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

    def _on_stack(self, frame: FrameType | None, trainer: Any) -> bool:
        while frame is not None:
            if frame.f_code is self._code and frame.f_locals.get("self") is trainer:
                return True
            frame = frame.f_back
        return False


def calling_handler() -> CallbackHandler | None:
    """The handler of a trainer's callbacks that is calling one of them now."""
    frame = _handler_frame()
    return None if frame is None else frame.f_locals["self"]


def resumed_from() -> Path | None:
    """The checkpoint that the trainer which is calling a callback now goes on from."""
    frame = _handler_frame()
    while frame is not None:
        found = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_code.co_name in _LOOPS and isinstance(found, str | os.PathLike):
            return Path(found)
        frame = frame.f_back
    return None


def _handler_frame() -> FrameType | None:
    """The nearest frame of a trainer's handler of callbacks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    return frame
