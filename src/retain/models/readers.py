"""Who reads what in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from retain.errors import CurvatureError

__all__ = ["first_readers", "inputs_of"]


def inputs_of(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """Each layer's input in one forward pass.

    All inputs are held until its end, so that no memory is used twice.

    Args:
        layers: the modules, by name.
        run: makes the pass.

    Raises:
        CurvatureError: a layer that runs not at all, or more than once.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[..., None]:
        return lambda _m, args: seen[name].append(args[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name, inputs in seen.items():
        if len(inputs) != 1:
            raise CurvatureError(
                "a layer does not run exactly once in a forward pass",
                got=f"{len(inputs)} runs of {name}",
                allowed="1",
                fix="leave that layer out of the adapter's target_modules",
            )
    return {name: inputs[0] for name, inputs in seen.items()}


def first_readers(seen: Mapping[str, Tensor]) -> dict[str, str]:
    """Layer -> the first layer that reads the same tensor.

    Tensors are the same when they are the same view of the same storage, which on the meta device
    has no memory.
    """
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, x in seen.items():
        place = (x.untyped_storage()._cdata, x.storage_offset(), x._version)
        shared[name] = first.setdefault((*place, tuple(x.shape), x.stride()), name)
    return shared
