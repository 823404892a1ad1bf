"""All retention methods by name. A new one is one file in `methods` and one line here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from retain.errors import ConfigError, shown, unknown
from retain.retention.method import Method
from retain.retention.methods.auto import Auto, Wiener
from retain.retention.methods.corda import CorDA
from retain.retention.methods.finch import Finch
from retain.retention.methods.joint import Joint
from retain.retention.methods.kl import KL, MaskedKL
from retain.retention.methods.l2 import L2
from retain.retention.methods.lora_null import LoRANull
from retain.retention.methods.olora import OLoRA
from retain.retention.methods.osf import OSF
from retain.retention.methods.penalty import KFAC, Activation, Diagonal, Tridiagonal
from retain.retention.methods.plain import Plain
from retain.retention.methods.replay import Replay, SelfReplay
from retain.retention.methods.sc_lora import SCLoRA
from retain.retention.methods.soften import Soften

__all__ = ["METHODS", "make_method", "method_options", "register"]

METHODS: dict[str, type[Method]] = {
    "none": Plain,
    "l2": L2,
    "diagonal": Diagonal,
    "kfac": KFAC,
    "tridiagonal": Tridiagonal,
    "activation": Activation,
    "kl": KL,
    "masked_kl": MaskedKL,
    "replay": Replay,
    "self_replay": SelfReplay,
    "auto": Auto,
    "wiener": Wiener,
    "soften": Soften,
    "olora": OLoRA,
    "osf": OSF,
    "lora_null": LoRANull,
    "sc_lora": SCLoRA,
    "corda": CorDA,
    "finch": Finch,
    "joint": Joint,
}


def register(method: type[Method]) -> type[Method]:
    """Adds a method of one's own under its `name`; also as a decorator.

    Raises:
        ConfigError: the name is taken.
    """
    if METHODS.get(method.name, method) is not method:
        raise ConfigError(
            "a method of this name is there already",
            got=method.name,
            allowed=f"a name other than {', '.join(METHODS)}",
            fix="give the class another name",
        )
    METHODS[method.name] = method
    return method


def method_options(kind: str) -> dict[str, Any]:
    """The options of a method with their defaults, without its strength.

    Raises:
        ConfigError: no such method.
    """
    if kind not in METHODS:
        raise unknown("method", kind, METHODS)
    found: dict[str, Any] = {}
    for member in METHODS[kind].__mro__:  # `**options` stand for those of the class above
        if "__init__" in vars(member):
            parameters = inspect.signature(vars(member)["__init__"]).parameters.values()
            found |= {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    return found


def make_method(kind: str, strength: float | None = None, **options: Any) -> Method:
    """A method by its name in a study, with its `method_options`; strength None is its own.

    Raises:
        ConfigError: an unknown name or option, a value out of range, or a strength where it means
            nothing.
    """
    known = method_options(kind)
    for name in options:
        if name not in known:
            raise unknown(f"option of the method {kind}", name, known)
    if isinstance(options.get("budget"), Mapping):
        raise ConfigError(
            "a study has one source, and named budgets have each its own",
            got=f"budgets of {shown(list(options['budget']))}", allowed="a number",
            fix="budget: 0.05; or retain train --budget NAME=NUMBER",
        )  # fmt: skip
    if METHODS[kind].weighted:
        return METHODS[kind](**options | ({} if strength is None else {"strength": strength}))
    if strength:
        raise ConfigError(
            f"the method {kind} has no strength",
            got=strength,
            allowed="0, or none",
            fix=f"set one of: {', '.join(known)}" if known else "leave it out",
        )
    return METHODS[kind](**options)
