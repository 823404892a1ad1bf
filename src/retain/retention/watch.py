"""Numbers of a step that the host asks for, all at once: each answer waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Watched", "read"]


class Watched(NamedTuple):
    """A number that is read with others.

    Attributes:
        value: a tensor with one entry.
        judge: is called with it, and may raise.
    """

    value: Tensor
    judge: Callable[[float], None]


def read(values: Sequence[Tensor]) -> list[float]:
    """The values of tensors with one entry each; the host waits once."""
    device = values[0].device
    found: list[float] = torch.stack([value.to(device) for value in values]).tolist()
    return found
