"""Several devices where there is one: tensors of the CPU that say they lie on others.

Inside `Devices` each tensor has a place. Whatever is computed from tensors of two places raises, as
it would on two GPUs, unless it is a copy between them; a result lies where its arguments do.
Numbers are those of the CPU. What autograd computes by itself is not seen: such gradients have no
place until one is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class Devices(TorchFunctionMode):
    """See the module."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._attribute(func, args)
        if name in ("to", "cuda", "cpu"):
            return self._moved(name, args, kwargs)
        where = kwargs.pop("device", None)
        if "generator" not in kwargs and where is not None:
            kwargs["device"] = CPU
        found = func(*args, **kwargs)
        if name in ("copy_", "_foreach_copy_", "__set__", "requires_grad_", "set_"):
            return found
        if where is not None:
            return _mark(found, torch.device(where))
        if name.startswith("_foreach_"):
            return self._each(name, args, found)
        return _mark(found, _common(name, (args, kwargs)))

    def _attribute(self, func: Any, args: tuple[Any, ...]) -> Any:
        found = func(*args)
        owner = getattr(func, "__self__", None)
        if getattr(owner, "__name__", "") == "device":
            return place(args[0]) or CPU
        return _mark(found, place(args[0]))

    def _moved(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(args[0], Tensor):
            raise AssertionError("only tensors move here")
        first, *rest = args
        there, plain = (CPU if name == "cpu" else None), []
        for value in [*rest, *kwargs.values()]:
            if isinstance(value, torch.device | str):
                there = torch.device(value)
            elif isinstance(value, Tensor):
                there, plain = place(value), [*plain, value.dtype]
            elif isinstance(value, torch.dtype):
                plain.append(value)
        dtype = plain[0] if plain else first.dtype
        moving = there is not None and there != (place(first) or there)
        with torch._C.DisableTorchFunction():
            found = first.to(dtype, copy=moving or bool(kwargs.get("copy")))
        if found is first and there in (None, place(first)):
            return first
        return _mark(found, there or place(first))

    def _each(self, name: str, args: tuple[Any, ...], found: Any) -> Any:
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        for i, parts in enumerate(zip(*lists, strict=True)):
            where = _common(name, parts)
            if found is not None:
                _mark(found[i], where)
        return found


def place(t: Tensor) -> torch.device | None:
    """Where a tensor lies; None where nothing is known."""
    found: torch.device | None = t.__dict__.get("_place")
    return found


def put(module: nn.Module, where: str) -> None:
    """Says where a module's weights and buffers lie."""
    for t in [*module.parameters(), *module.buffers()]:
        _mark(t, torch.device(where))


def _mark(found: Any, where: torch.device | None) -> Any:
    if where is not None:
        for t in _tensors(found):
            t.__dict__["_place"] = where
    return found


def _common(name: str, values: Any) -> torch.device | None:
    """The one place of all; a number (a tensor without dimensions) on the CPU may join any."""
    places = {
        where
        for t in _tensors(values)
        if (where := place(t)) is not None and not (where == CPU and t.dim() == 0)
    }
    if len(places) > 1:
        found = sorted(map(str, places))
        raise RuntimeError(f"{name}: expected all tensors on one device, found {found}")
    return next(iter(places), None)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def spread(model: nn.Module, body: Any, devices: list[str]) -> None:
    """Puts a decoder's layers on devices in turn, all else on the first, as ``device_map`` does.

    Hooks move what each layer is given to where it lies, and the last one's output back.
    """
    put(model, devices[0])
    for number, layer in enumerate(body.layers):
        where = devices[number * len(devices) // len(body.layers)]
        put(layer, where)
        layer.register_forward_pre_hook(_mover(where), with_kwargs=True)
    body.norm.register_forward_pre_hook(_mover(devices[0]), with_kwargs=True)


def _mover(where: str) -> Any:
    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(torch.device(where))
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value

    return lambda _m, args, kwargs: (moved(args), {k: moved(v) for k, v in kwargs.items()})
