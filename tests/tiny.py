"""Tiny random models, made from configurations: a causal one and a classifier.

They are float64 by default. The norms of transformers' Llama round to float32 on the way, which
would hide an error below 1e-7, so they are replaced by torch's own.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)  # fmt: skip

from retain.curvature.blocks.registry import names
from retain.models.lora import attach_lora
from retain.models.sites import LoraSite, find_sites, lora_sites

torch.set_num_threads(1)

KINDS = ("llama", "bert")
STRUCTURES = names()

ROWS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"input_ids": [3, 7, 1, 12, 5]},
        {"input_ids": [2, 9]},
        {"input_ids": [4, 4, 11]},
        {"input_ids": [6, 10, 8, 3]},
    ],
    "bert": [
        {"input_ids": [3, 7, 1, 15, 5], "label": 2},
        {"input_ids": [2, 9], "label": 0},
        {"input_ids": [4, 16, 11], "label": 1},
        {"input_ids": [6, 10, 8, 3], "label": 1},
    ],
}
"""Rows of different lengths, so that any batch of them holds padding."""


def deep(layers: int) -> LlamaForCausalLM:
    """A Llama in float32 of so many layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
                pad_token_id=0,
            )
        )  # fmt: skip


def base(
    kind: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
) -> nn.Module:
    """A base model in evaluation mode; all its weights and biases are random."""
    model: Any
    shape: dict[str, Any] = {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            shape |= {"num_key_value_heads": 1, "attention_dropout": dropout}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=13, **shape))
            if dtype == torch.float64:
                _replace_norms(model)
        else:
            shape |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
            model = BertForSequenceClassification(BertConfig(vocab_size=17, num_labels=3, **shape))
        model.double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                size = 0.1 if parameter.dim() == 1 else 0.6
                parameter.copy_(centre + size * torch.randn_like(parameter))
    return model.to(dtype).eval()


def _replace_norms(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, nn.RMSNorm(len(child.weight), eps=child.variance_epsilon))


def tiny(
    kind: str,
    *,
    moved: bool = False,
    rank: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    lora_dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
) -> PeftModel:
    """A tiny model with LoRA, in evaluation mode: at B = 0, or at a random (A, B) if `moved`."""
    names = targets if isinstance(targets, str) else tuple(targets)
    return deepcopy(_built(kind, moved, rank, seed, dtype, dropout, lora_dropout, names))


@cache
def _built(
    kind: str,
    moved: bool,
    rank: int,
    seed: int,
    dtype: torch.dtype,
    dropout: float,
    lora_dropout: float,
    targets: str | tuple[str, ...],
) -> PeftModel:
    """Made once: a copy takes a third of the time."""
    inner = base(kind, seed=seed, dtype=dtype, dropout=dropout)
    model = attach_lora(inner, rank=rank, dropout=lora_dropout, targets=targets, seed=seed + 1)
    if moved:
        move(model, seed + 2)
    return model.eval()


def move(model: nn.Module, seed: int, size: float = 0.3) -> None:
    """Adds a random displacement to each A and B, or to each weight of a plain model."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in find_sites(model):
            for weight in (site.a, site.b) if isinstance(site, LoraSite) else (site.weight,):
                step = torch.randn(weight.shape, generator=random, dtype=torch.float64)
                weight.add_((size * step).to(weight.dtype))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of each A and B."""
    return {
        f"{site.name}.{which}": weight.detach().clone()
        for site in lora_sites(model)
        for which, weight in (("lora_A", site.a), ("lora_B", site.b))
    }


exactly = partial(torch.testing.assert_close, rtol=0, atol=0)
"""Checks that two tensors, or two dictionaries of them, are alike to the bit."""


def relative(got: torch.Tensor | float, want: torch.Tensor | float) -> float:
    """Largest difference, over the largest entry of what is wanted."""
    got = torch.as_tensor(got, dtype=torch.float64)
    want = torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    scale = float(want.abs().max())
    return float((got - want).abs().max()) / scale if scale else float(got.abs().max())


def save_tiny(folder: Path, seed: int = 0, kind: str = "llama", **changes: Any) -> Path:
    """A random Llama or Bert of two layers with a byte-level tokenizer, as a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(seed)
    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 1,
    }
    model: Any
    if kind == "bert":
        size |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertModel(BertConfig(vocab_size=len(vocabulary), **size | changes))
    else:
        size |= {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **size | changes))
    model.save_pretrained(folder)
    return folder


def with_chat(folder: Path) -> Path:
    """The same folder with a chat form, so that the model can be asked."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder
