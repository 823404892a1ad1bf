"""Counts what torch is asked to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts calls of torch's operators; one of a stack of tensors is one.

    Args:
        kind: of an operator's name, under which it is counted; None for not at all.
    """

    def __init__(self, kind: Callable[[str], str | None]) -> None:
        super().__init__()
        self.kind, self.found = kind, Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = self.kind(func.overloadpacket.__name__)
        if kind is not None:
            self.found[kind] += 1
        return func(*args, **(kwargs or {}))
