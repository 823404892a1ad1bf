"""Tells base models apart, so that a curvature is never used beside another one.

A `fingerprint` covers what the weights are as they are stored: of quantised ones (bitsandbytes,
GPTQ, AWQ, HQQ, torchao) the packed codes and their scales. So one base in bfloat16 and in 4 bits
has two of them. A `signature` tells that they are the same weights stored in another way: it is a
few signed sums of what each linear layer's weights stand for, which rounding to 4 bits moves by a
tenth, and another model turns altogether.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from retain.models.names import ADAPTERS, canonical, unwrap
from retain.models.shards import whole
from retain.models.sites import plain_weight

__all__ = ["ALIKE", "alike", "fingerprint", "near", "signature"]

_SAMPLES, _SUMS = 64, 4

_CODES = ("qweight", "qzeros", "scales", "g_idx", "W_q", "SCB", "bias")
"""Buffers and attributes of quantised layers that are no parameters."""

ALIKE = 0.95
"""The least cosine between signatures of the same weights. Rounding to 4 bits leaves 0.99 and
more; of two models that have nothing in common it is about 0, give or take one over the root of
four times the number of layers."""


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """A short hash of the base model under a model's adapter.

    It covers each frozen parameter's name, shape and 64 of its values, rounded to bfloat16 (so
    that the same checkpoint loaded in float32 or bfloat16 has the same fingerprint; in float16 it
    has another where that rounds), and of packed weights 64 of their codes, scales and zero points.
    What an adapter made of the base's biases (PEFT's ``bias``) counts as the base's. Adapter
    weights, trained copies of modules (PEFT's ``modules_to_save``) and new tokens are left out, and
    the layers named in `without`.
    """
    digest = hashlib.sha256()
    bare, left = unwrap(model), tuple(f"{name}." for name in without)
    for name, parameter in sorted(bare.named_parameters(), key=lambda kv: canonical(kv[0])):
        if any(part in name for part in ADAPTERS) or canonical(name).startswith(left):
            continue
        digest.update(f"{canonical(name)}:{tuple(parameter.shape)};".encode())
        if parameter.numel():
            digest.update(_bytes(parameter.detach()))
    for name, module in sorted(bare.named_modules(), key=lambda kv: canonical(kv[0])):
        if isinstance(module, BaseTunerLayer):
            continue  # it shows the weight of the layer inside it, which has its own turn
        for key, codes in _codes(module):
            digest.update(f"{canonical(name)}.{key}:{tuple(codes.shape)};".encode())
            digest.update(_bytes(codes))
    return digest.hexdigest()[:32]


def signature(model: nn.Module, layers: dict[str, nn.Module]) -> str:
    """What the linear layers' weights stand for, in a way that bears rounding.

    Args:
        model: it tells how its weights are stored.
        layers: by name, those that count, without their adapters.

    Returns:
        How they are stored, a colon, and the sums as bytes in base64.
    """
    sums: list[Tensor] = []
    random = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (_SUMS, _SAMPLES), generator=random).double() * 2 - 1
    stored = storage(model)
    for _, layer in sorted(layers.items()):
        try:
            weight = plain_weight(layer)
        except (AttributeError, TypeError, ValueError, RuntimeError, ImportError):
            return ""  # packed in a way that PEFT cannot read back
        values = _samples(weight).double().cpu()
        size = values.square().mean().sqrt().clamp(min=1e-30)
        sums.append(signs[:, : len(values)] @ values / (size * len(values) ** 0.5))
    total = torch.cat(sums).clamp(-4, 4) * 31 if sums else torch.zeros(0)
    packed = total.round().to(torch.int8).numpy().tobytes()
    return f"{stored}:{base64.b64encode(packed).decode()}"


def alike(one: str, other: str) -> bool:
    """Whether two signatures are of the same weights, stored in two ways.

    Of two models that are stored in one way the fingerprint alone tells whether they are the same.
    """
    sums = _sums(one, other)
    if sums is None or one.partition(":")[0] == other.partition(":")[0]:
        return False
    x, y = sums
    return float(x @ y) >= ALIKE * float(x.norm() * y.norm()) > 0


def near(one: str, other: str) -> bool:
    """Whether two signatures differ by no more than rounding may make of the same weights.

    It says no more than that: a tuned model may be as near.
    """
    sums = _sums(one, other)
    return sums is not None and bool(((sums[0] - sums[1]).abs() <= 1).all())


def _sums(one: str, other: str) -> tuple[Tensor, Tensor] | None:
    """Those of two signatures; None where one is not known, or they are of other layers."""
    a, b = (text.partition(":")[2] for text in (one, other))
    if not a or not b:
        return None
    try:
        x, y = (torch.tensor(list(base64.b64decode(s)), dtype=torch.uint8) for s in (a, b))
    except ValueError:
        return None
    if len(x) != len(y):
        return None
    return x.view(torch.int8).double(), y.view(torch.int8).double()


def storage(model: nn.Module) -> str:
    """How the linear layers' weights are stored: ``float``, or the class of the packed ones."""
    for module in unwrap(model).modules():
        weight = getattr(module, "weight", None)
        packed = isinstance(weight, Tensor) and type(weight).__module__.startswith("torchao.")
        if packed or type(weight).__name__ in ("Params4bit", "Int8Params"):
            state = getattr(weight, "quant_state", None)
            return getattr(state, "quant_type", None) or type(weight).__name__
        if _has_packed(module):
            return type(module).__name__
    return "float"


def _has_packed(module: nn.Module) -> bool:
    """Whether a layer is one of GPTQ's, AWQ's or HQQ's, which have no ``weight``."""
    return any(isinstance(getattr(module, key, None), Tensor) for key in ("qweight", "W_q"))


def _samples(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step][:_SAMPLES]


def _bytes(values: Tensor) -> bytes:
    """Of 64 of the values: as bfloat16, or, where they are whole numbers, as they are."""
    values = whole(values)
    if type(values).__module__.startswith("torchao."):
        values = values.dequantize()
    found = _samples(values)
    if values.is_floating_point():
        found = found.to(torch.bfloat16).view(torch.int16)
    return bytes(found.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _codes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a quantised layer keeps beside its parameters."""
    weight: Any = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        for key in ("absmax", "code"):
            if isinstance(found := getattr(state, key, None), Tensor):
                yield key, found
        inner = getattr(state, "state2", None)
        if inner is not None:
            yield "state2.absmax", inner.absmax
        return
    if type(weight).__name__ == "Int8Params":
        scales = getattr(weight, "SCB", None)
        if scales is None:  # moved by the first forward pass
            scales = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scales, Tensor):
            yield "SCB", scales
        return
    if _has_packed(module):
        held = dict(module.named_parameters(recurse=False))
        for key in _CODES:
            found = getattr(module, key, None)
            if isinstance(found, Tensor) and key not in held:
                yield key, found
        for key, found in sorted((getattr(module, "meta", None) or {}).items()):
            if isinstance(found, Tensor):
                yield f"meta.{key}", found
