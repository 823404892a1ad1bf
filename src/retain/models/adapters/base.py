"""What the study trains: a base model with some of its weights, or new ones, made trainable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from peft import PeftModel
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from retain.config import validate
from retain.errors import ModelError
from retain.models.names import of_head
from retain.models.view import ModelView

__all__ = ["Adapter", "Options", "check_plain", "checkpointed", "new_heads", "size_of"]


class Options(BaseModel):
    """What a kind of adapter may be attached with; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Adapter(ABC):
    """One way to tune a base model, attached to one.

    The model knows its adapter as ``model.retain_adapter``, so that what measures against the
    base (`retain.models.adapter.adapter_off`) works with every kind.

    Args:
        model: what is trained and run.
        options: what it was attached with, as plain data.
        size: parameters of the base model without a new head (`size_of`), for `count`.

    Attributes:
        kind: its name in a study.
        schema: its options, with their defaults and bounds.
        begins_as_base: whether a fresh one computes what the base model does, for every seed.
        model: what is trained and run; its forward is that of the base model's class.
        options: what it was attached with, as plain data.
    """

    kind: ClassVar[str]
    schema: ClassVar[type[Options]]
    begins_as_base: ClassVar[bool] = True

    def __init__(self, model: nn.Module, options: dict[str, Any], size: int = 0) -> None:
        self.model, self.options, self.size = model, options, size
        model.retain_adapter = self  # type: ignore[assignment]

    @classmethod
    def check(cls, options: dict[str, Any]) -> Any:
        """The options as an object of `schema`, with its defaults.

        Raises:
            ConfigError: an option that the kind does not have, or a value out of range.
        """
        return validate(options, cls.schema)

    @classmethod
    @abstractmethod
    def attach(cls, base: nn.Module, *, seed: int = 0, **options: Any) -> Self:
        """Attaches a fresh one to a base model, which then computes what it did before.

        (Prefix tuning cannot: see there.) A new classification head (names in PEFT's
        ``SEQ_CLS_HEAD_NAMES``) is trainable in every kind; embeddings, norms and the
        language-model head only where the kind says so. New weights are drawn from `seed`; the
        global random state is left as it was.

        Raises:
            ConfigError: an option that the kind does not have, or a value out of range.
            ModelError: a model that carries an adapter already, or that the kind cannot tune.
        """

    @abstractmethod
    def off(self) -> AbstractContextManager[nn.Module]:
        """The base model: the same modules with the adapter switched off, exactly.

        It may be nested. Inside, weights are neither to be trained nor restored.
        """

    @abstractmethod
    def save(self, folder: Path, base: str) -> Path:
        """Writes a folder (safetensors and JSON), whole; `base` is the base model's name.

        Raises:
            OutputError: the place cannot be written.
        """

    @classmethod
    @abstractmethod
    def load(cls, base: nn.Module, folder: Path) -> Self:
        """Puts what `save` wrote on a base model, trainable.

        Raises:
            ModelError: it is missing or damaged, or belongs to another model or kind.
        """

    @cached_property
    def view(self) -> ModelView:
        """What is asked of the model, found out once."""
        return ModelView(self.model)

    def count(self) -> tuple[int, int]:
        """(trainable parameters, parameters of the base model), both without a new head."""
        headed = bool(new_heads(_inner(self.model)))
        found = self.parameters().items()
        return sum(p.numel() for n, p in found if not (headed and of_head(n))), self.size

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """A copy of all that training can change, for `restore`."""
        return {n: p.detach().clone() for n, p in self.parameters().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts a `state` back, exactly.

        Raises:
            ModelError: it is the state of another adapter.
        """
        mine = self.parameters()
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
        for name, parameter in mine.items():
            parameter.data.copy_(state[name])


def new_heads(base: nn.Module) -> dict[str, nn.Module]:
    """The classification heads of a ``...ForSequenceClassification`` model, by name."""
    if "SequenceClassification" not in type(base).__name__:
        return {}
    return {n: m for n, m in base.named_children() if of_head(n)}


def size_of(base: nn.Module) -> int:
    """Parameters of a base model, tied ones once, without a new head."""
    heads = {id(p) for head in new_heads(base).values() for p in head.parameters()}
    return sum(p.numel() for p in base.parameters() if id(p) not in heads)


def check_plain(base: nn.Module) -> None:
    """Refuses a model that carries an adapter already.

    Raises:
        ModelError: it does.
    """
    if isinstance(base, PeftModel) or "retain_adapter" in vars(base):
        raise ModelError(
            "the model carries an adapter already",
            got=type(base).__name__,
            allowed="a plain model of transformers",
            fix="load the base model anew",
        )


def checkpointed(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on, which works in training mode alone."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def _inner(model: nn.Module) -> nn.Module:
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base
