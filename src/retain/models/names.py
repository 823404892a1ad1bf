"""What the names of modules say."""

from __future__ import annotations

from peft.utils.constants import SEQ_CLS_HEAD_NAMES

__all__ = ["of_head"]


def of_head(name: str) -> bool:
    """Whether a module or parameter is part of a new classification head, which PEFT trains whole.

    PEFT compares the ends of names, so DistilBERT's ``pre_classifier`` is one, as it should be.
    """
    return any(part.endswith(tuple(SEQ_CLS_HEAD_NAMES)) for part in name.split("."))
