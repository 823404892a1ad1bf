"""Architectures, tiny and untrained, by the names of their configurations."""

from __future__ import annotations

from typing import Any

import torch
import transformers

WORDS = 40
COMMON: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
OLDER: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8},
    "Phi3": {},
    "Olmo2": {},
    "Falcon": {},
    "GPT2": OLDER,
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "Bloom": {"n_head": 2, "n_layer": 2},
    "Lfm2": {},
    "GptOss": {"head_dim": 8} | EXPERTS,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "DistilBert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "Electra": {"embedding_size": 16},
    "ModernBert": {"cls_token_id": 0, "sep_token_id": 1},
    "MPNet": {},
}
DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}


def built(auto: Any, family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON | changes)
    return auto.from_config(config, dtype=torch.float32)
