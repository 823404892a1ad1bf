"""Tiny base models of five families, every kind of adapter on them, and a few steps of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from families import OLDER, built
from retain.data.batches import Batch, Example, collate
from retain.models.adapters.base import Adapter
from retain.models.adapters.registry import attach_adapter
from retain.models.forward import forward_logits
from tiny import ROWS, base

MODELS = ("llama", "bert", "neox")
MORE = ("gpt2", "roberta")
DECODERS = ("llama", "neox", "gpt2")

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2},
    "full": {"kind": "full"},
    "full-but-embeddings": {"kind": "full", "embeddings": False},
    "pfeiffer": {"kind": "bottleneck", "size": 3},
    "houlsby": {"kind": "bottleneck", "size": 3, "placement": "houlsby", "scaling": 2.0},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 3},
    "projected": {"kind": "prefix", "num_virtual_tokens": 3, "projection": True},
}

SMALL: dict[str, Any] = {
    "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "neox": (AutoModelForCausalLM, "GPTNeoX", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "gpt2": (
        AutoModelForCausalLM, "GPT2",  # its head is tied to its embeddings
        OLDER | {"n_embd": 8, "n_inner": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                 "attn_pdrop": 0.0},
    ),
    "roberta": (AutoModelForSequenceClassification, "Roberta", DRY | {"num_labels": 3}),
}  # fmt: skip


def plain(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny base model with random weights, in evaluation mode."""
    if name in ("llama", "bert"):
        return base(name, seed=seed, dtype=dtype)
    auto, family, more = FAMILIES[name]
    with torch.random.fork_rng():
        model: nn.Module = built(auto, family, **SMALL | more).double()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def attached(
    name: str, how: str, *, seed: int = 5, dtype: torch.dtype = torch.float64, **more: Any
) -> Any:
    """A fresh adapter of `OPTIONS` on a fresh base model."""
    return attach_adapter(plain(name, dtype=dtype), seed=seed, **{**OPTIONS[how], **more})


def examples_of(name: str) -> list[Example]:
    """Four rows of different lengths; a decoder's are scored at every second token."""
    examples = []
    for row in ROWS["llama" if name in DECODERS else "bert"]:
        ids = tuple(row["input_ids"])
        if name in DECODERS:
            where = tuple(i % 2 == 0 for i in range(len(ids) - 1))
            examples.append(Example(ids[:-1], ids[1:], where))
        else:
            examples.append(Example(ids, (row["label"],)))
    return examples


def batch_of(name: str) -> Batch:
    """All of `examples_of`."""
    return collate(examples_of(name), 0)


def logits(model: nn.Module, name: str) -> torch.Tensor:
    """What the model computes for `batch_of`, without a graph."""
    with torch.no_grad():
        return forward_logits(model, batch_of(name)).clone()


def step(adapter: Adapter, name: str, times: int = 1, rate: float = 0.05) -> None:
    """Plain gradient descent, which has no state."""
    for _ in range(times):
        batch = batch_of(name)
        loss = nn.functional.cross_entropy(forward_logits(adapter.model, batch), batch.targets)
        loss.backward()
        with torch.no_grad():
            for parameter in adapter.parameters().values():
                assert parameter.grad is not None
                parameter -= rate * parameter.grad
                parameter.grad = None
