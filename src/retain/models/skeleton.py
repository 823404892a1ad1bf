"""A model without its weights: on the meta device, where a tensor has a shape and no memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retain.errors import ModelError
from retain.models.builtin import locate, offline, unknown_model
from retain.models.forward import first_readers, inputs_of
from retain.models.heads import writes
from retain.models.load import has_causal_head
from retain.models.lora import attach_lora
from retain.models.sites import LoraSite, lora_sites, output_head

__all__ = ["Outline", "load_skeleton", "outline"]

_TOKENS = 8
"""Length of the sequence that finds out who shares an input."""

_BROKEN = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError,
    struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """What a plan needs to know of a model.

    Attributes:
        kind: the model's class.
        parameters: of the base model.
        linear: multiply-adds a token of all its linear layers, the head among them; of a mixture
            of experts, those of the experts that a token meets.
        head: those of the language-model head; 0 for a classifier.
        layers: LoRA layer -> (d_out, d_in), in the order of the modules.
        shared: LoRA layer -> the first layer with the same input (itself, when it is the first).
        pooled: LoRA layers that see one position of a sequence.
        notes: what could not be found out.
    """

    kind: str
    parameters: int
    linear: int
    head: int
    layers: dict[str, tuple[int, int]]
    shared: dict[str, str]
    pooled: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def load_skeleton(
    name: str | Path, *, num_labels: int | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Builds a model from its configuration alone, all tensors on the meta device.

    Args:
        name: a built-in name, a folder with a ``config.json``, such a file itself, a ``.gguf``
            file, or a hub id (of which the configuration alone is fetched, and nothing when
            ``HF_HUB_OFFLINE`` is set).
        num_labels: a classifier with so many classes. Without it a decoder gets its
            language-model head, and an encoder a classifier with the classes it is configured
            for (2, where nothing is said).
        trust_remote_code: run code that comes with the model. Off unless asked for.

    Raises:
        ModelError: the configuration cannot be found or read, or transformers knows no model
            with a head that predicts for it.
    """
    import transformers as tf
    from huggingface_hub.errors import StrictDataclassError

    where, extra = locate(str(name), convert=False)
    trust = {"trust_remote_code": trust_remote_code}
    allowed = "a decoder, or an encoder with a sequence-classification head"
    fix = "check config.json, or give --num-labels for a classifier"
    try:
        config = tf.AutoConfig.from_pretrained(where, local_files_only=offline(), **trust, **extra)
    except (*_BROKEN, StrictDataclassError) as error:
        raise unknown_model(str(name), error, also="a config.json, ") from error
    named = config.architectures or []
    if num_labels is None and any("Conditional" in a for a in named):
        raise ModelError(
            "the model is neither a decoder nor an encoder",
            got=f"{name}: {', '.join(named)}",
            allowed=allowed,
            fix=fix,
        )
    auto: Any = tf.AutoModelForSequenceClassification
    if num_labels is not None:
        config.num_labels = num_labels
    elif has_causal_head(named) if named else writes(config):
        auto = tf.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: nn.Module = auto.from_config(config, **trust)
    except (*_BROKEN, StrictDataclassError) as error:
        raise ModelError(
            "no model can be built from the configuration",
            got=f"{name} ({config.model_type}): {_short(error)}",
            allowed=allowed,
            fix=fix,
        ) from error
    return model.eval()


def outline(
    model: nn.Module, *, rank: int = 16, targets: str | Sequence[str] = "all-linear"
) -> Outline:
    """Puts LoRA on a skeleton, as training would, and reads off what a plan needs.

    Args:
        model: of `load_skeleton`; it carries the adapter afterwards.
        rank: r.
        targets: PEFT's ``target_modules``: names, or ``all-linear``.

    Raises:
        ConfigError: targets that the model does not have or PEFT cannot wrap.
        ModelError: layers that a curvature cannot handle.
        CurvatureError: a layer that runs not at all, or more than once, in one forward pass.
    """
    kind, parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
    linear, out = _linear_work(model), output_head(model)
    head = 0 if out is None else out.weight.numel()
    with torch.device("meta"):
        adapted = attach_lora(model, rank=rank, targets=targets)
    sites = lora_sites(adapted)
    layers = {site.name: site.shape for site in sites}
    try:
        seen = _inputs(adapted, sites)
    except _BROKEN as error:
        why = f"{type(error).__name__}: {_short(error, 80)}"
        note = (
            f"a forward pass without weights failed ({why}), so no input is counted as shared: "
            "what input factors cost is an upper bound"
        )
        alone = {name: name for name in layers}
        return Outline(kind, parameters, linear, head, layers, alone, notes=(note,))
    pooled = frozenset(n for n, x in seen.items() if x.shape[:-1].numel() != _TOKENS)
    return Outline(kind, parameters, linear, head, layers, first_readers(seen), pooled)


def _linear_work(model: nn.Module) -> int:
    """Multiply-adds a token in the linear layers and in the experts that a token meets."""
    linear: list[Any] = [
        m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    ]  # GPT-2's Conv1D is one, with its weight transposed
    total: int = sum(m.weight.numel() for m in linear)
    meets = getattr(model.config, "num_experts_per_tok", None)
    for expert in _experts(model):
        for weight in expert.parameters(recurse=False):
            if weight.ndim == 3:
                total += weight[0].numel() * (meets or weight.shape[0])
    return total


def _experts(model: nn.Module) -> list[nn.Module]:
    """Modules that hold the weights of all experts of a layer in one tensor."""
    return [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] == "experts"]


def _inputs(model: nn.Module, sites: list[LoraSite]) -> dict[str, Tensor]:
    """Each layer's input in one forward pass of one sequence, on the meta device.

    Experts, whose work hangs on numbers that are not there, hand on an empty tensor of the shape
    of their input.
    """
    modules: dict[str, Any] = {site.name: site.layer for site in sites}
    for module in _experts(model):
        module.forward = lambda x, *_args, **_more: torch.empty_like(x)
    try:
        with torch.device("meta"), torch.no_grad():
            ids = torch.zeros(1, _TOKENS, dtype=torch.long)
            return inputs_of(modules, lambda: model(input_ids=ids))
    finally:
        for module in _experts(model):
            del module.forward


def _short(error: Exception, size: int = 160) -> str:
    return " ".join(str(error).split())[:size] or type(error).__name__
