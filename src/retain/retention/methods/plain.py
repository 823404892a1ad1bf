"""No retention: plain training, the row that all others are compared with."""

from __future__ import annotations

from typing import ClassVar

from retain.retention.method import Method

__all__ = ["Plain"]


class Plain(Method):
    """Plain training."""

    name = "none"
    weighted: ClassVar[bool] = False
