"""What the study trains: a base model with some of its weights, or new ones, made trainable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from peft import PeftModel
from torch import Tensor, nn

from retain.config import Strict, validate
from retain.errors import ConfigError, ModelError
from retain.models.fingerprint import fingerprint
from retain.models.names import drawn_layers, head_of, inner_model, of_head
from retain.models.off import Swap, swapped, switched_off
from retain.models.saved import (
    check_adapter,
    misfit,
    read_tensors,
    refused,
    save_adapter,
    undone,
    write_tensors,
)
from retain.models.view import ModelView

__all__ = ["Adapter", "Options", "check_plain", "new_heads", "size_of"]


class Options(Strict):
    """What a kind of adapter may be attached with; an unknown key is refused."""


class Adapter(ABC):
    """One way to tune a base model, attached to one.

    The model knows its adapter as ``model.retain_adapter``, so that what measures against the
    base (`retain.models.off.adapter_off`) works with every kind.

    Attributes:
        kind: its name in a study.
        schema: its options, with their defaults and bounds.
        peft_type: what its folder says, where PEFT cannot write and load it; else None.
        begins_as_base: whether a fresh one computes what the base model does, for every seed.
        model: what is trained and run; its forward is that of the base model's class.
        options: what it was attached with, as plain data.
        size: parameters of the base model without a new head.
        base: the base model's fingerprint, where `peft_type` is ours.
        originals: values that take the places of the model's own while the adapter is off.
    """

    kind: ClassVar[str]
    schema: ClassVar[type[Options]]
    peft_type: ClassVar[str | None] = None
    begins_as_base: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, options: dict[str, Any], size: int = 0, base: str = ""
    ) -> None:
        self.model, self.options, self.size, self.base = model, options, size, base
        self.originals: list[Swap] = [(p, p.detach().clone()) for p in self.changed()]
        model.retain_adapter = self  # type: ignore[assignment]

    @classmethod
    def check(cls, options: dict[str, Any]) -> Any:
        """The options as an object of `schema`, with its defaults, or a ConfigError."""
        return validate(options, cls.schema)

    @classmethod
    def attach(cls, base: nn.Module, *, seed: int = 0, **options: Any) -> Self:
        """Attaches a fresh one to a base model, which then computes what it did before.

        (Prefix tuning cannot: see there.) A new classification head is trainable in every kind;
        embeddings, norms and the language-model head only where the kind says so. New weights are
        drawn from `seed`; the global random state is left as it was.

        Raises:
            ConfigError: an option that the kind does not have, or a value out of range.
            ModelError: a model that carries an adapter already, or that the kind cannot tune.
        """
        chosen = cls.check(options)
        check_plain(base)
        size, name = size_of(base), same_base(base) if cls.peft_type else ""
        return cls(cls.put_on(base, chosen, seed), chosen.model_dump(), size, name)

    @classmethod
    @abstractmethod
    def put_on(cls, base: nn.Module, options: Any, seed: int) -> nn.Module:
        """The base model with a fresh adapter's weights, in the mode it was in; see `attach`."""

    def changed(self) -> Iterable[nn.Parameter]:
        """Weights of the base that training changes, and no switch undoes."""
        return ()

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """The base model: the same modules with the adapter switched off, exactly.

        It may be nested. Inside, weights are neither to be trained nor restored. A head is the one
        that the base model came with.
        """
        with swapped(self.originals), switched_off(self.model):
            yield self.model

    def save(self, folder: Path, base: str) -> Path:
        """Writes a folder, whole, or raises OutputError; `base` is the base model's name."""
        model: Any = self.model
        if self.peft_type is None:
            return save_adapter(model, folder, base)
        config = {"peft_type": self.peft_type, "base_model_name_or_path": base, **self.options}
        return write_tensors(folder, {**config, "base_fingerprint": self.base}, self.stored())

    @classmethod
    def load(cls, base: nn.Module, folder: Path) -> Self:
        """Puts what `save` wrote on a base model, trainable; one that refuses it is what it was.

        Raises:
            ModelError: it is missing or damaged, or belongs to another model or kind.
        """
        check_plain(base)
        kind = str(cls.peft_type)
        config = check_adapter(folder, kind)
        try:
            options = cls.check({n: config[n] for n in cls.schema.model_fields if n in config})
        except ConfigError as error:
            raise refused("the adapter is damaged", f"{folder} ({error})", kind) from error
        if config.get("base_fingerprint") != same_base(base):
            got = f"{folder}, trained on {config.get('base_model_name_or_path')}"
            raise refused("the adapter belongs to another base model", got, kind)
        tensors = read_tensors(folder, kind)
        with undone(base):
            adapter = cls.attach(base, **options.model_dump())
            try:
                adapter.restore(tensors)
            except ModelError as error:
                raise misfit(f"{folder} ({error.got})", kind) from error
        return adapter

    def stored(self) -> dict[str, Tensor]:
        """What `save` writes, where PEFT does not: what `restore` takes."""
        return {**self.parameters()}

    @cached_property
    def view(self) -> ModelView:
        """What is asked of the model, found out once."""
        return ModelView(self.model)

    def count(self) -> tuple[int, int]:
        """(trainable parameters, parameters of the base model), both without a new head."""
        headed, new = bool(new_heads(inner_model(self.model))), head_of(self.model)
        found = self.parameters().items()
        return sum(p.numel() for n, p in found if not (headed and new(n))), self.size

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """A copy of all that training can change, for `restore`."""
        return {n: p.detach().clone() for n, p in self.parameters().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts a `state` back, exactly; raises as `check_state` does."""
        mine = self.parameters()
        check_state(mine, state)
        for name, parameter in mine.items():
            parameter.data.copy_(state[name])


def check_state(mine: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Raises ModelError for a state of other names or shapes than one's own."""
    odd = sorted(
        n for n in {*mine, *state} if n not in mine or n not in state
        or mine[n].shape != state[n].shape
    )  # fmt: skip
    if odd:
        raise ModelError(
            "the state belongs to another adapter",
            got=f"{len(odd)} tensors that differ, such as {odd[0]}",
            allowed="what state() gave for the same model, kind and options",
            fix="attach the adapter as it was when the state was taken",
        )


def new_heads(base: nn.Module) -> dict[str, nn.Module]:
    """The new layers of a ``...ForSequenceClassification`` model, by name.

    They are its classification heads, and what was drawn beside them (`drawn_layers`).
    """
    if "SequenceClassification" not in type(base).__name__:
        return {}
    heads = {n: m for n, m in base.named_children() if of_head(n)}
    return heads | {n: base.get_submodule(n) for n in sorted(drawn_layers(base))}


def size_of(base: nn.Module) -> int:
    """Parameters of a base model, tied ones once, without a new head."""
    heads = {id(p) for head in new_heads(base).values() for p in head.parameters()}
    return sum(p.numel() for p in base.parameters() if id(p) not in heads)


def same_base(base: nn.Module) -> str:
    """The `fingerprint` of a base model without a new head, which each loading draws anew."""
    heads = new_heads(base)
    rest = {n: m for n, m in base.named_children() if n not in heads}
    return fingerprint(nn.ModuleDict(rest), without=heads)


def check_plain(base: nn.Module) -> None:
    """Raises ModelError for a model that carries an adapter already."""
    if isinstance(base, PeftModel) or "retain_adapter" in vars(base):
        raise ModelError(
            "the model carries an adapter already",
            got=type(base).__name__,
            allowed="a plain model of transformers",
            fix="load the base model anew",
        )
