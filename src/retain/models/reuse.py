"""Score or write the continuations of a text from one pass of it, through the keys and values it
left.

The prompts of a batch are padded on the left, as generation pads them, run once, and their cache
is copied to the rows of their continuations, which alone are run then.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retain.models.forward import head_reads
from retain.models.names import inner_model, unwrap
from retain.models.view import ModelView

__all__ = ["beginning", "branch_logits", "can_reuse", "shared_tokens"]

SHARED = 8
"""Tokens that all texts begin with, from which on they are run once."""


def shared_tokens(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with, and none ends with; 0 where they are few."""
    if len(texts) < 2:
        return 0
    least, most = (order(map(list, texts)) for order in (min, max))
    pairs = enumerate(zip(least, most, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), len(least))
    same = min(same, min(map(len, texts)) - 1)
    return same if same >= SHARED else 0


def can_reuse(model: nn.Module, *, sliding: bool = True) -> bool:
    """Whether a model can go on from a cache that was copied and padded on the left.

    True where its forward takes ``position_ids`` and ``past_key_values`` and every layer's cache
    holds keys and values alone (full or sliding attention). False for recurrent layers, for
    position biases that the model counts itself (BLOOM), for rotary positions whose frequencies go
    by the length of a pass (``dynamic``, ``longrope``), and under PEFT's prompt learning, which
    puts a cache of its own in the place of any other.

    Args:
        model: a causal one.
        sliding: whether sliding attention will do; padding between texts would move its windows.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    config = getattr(unwrap(model), "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        return False
    base = inner_model(model)
    if _rotary(base.config) & {"dynamic", "longrope"}:  # whose frequencies go by a pass's length
        return False
    if not {"position_ids", "past_key_values"} <= set(inspect.signature(base.forward).parameters):
        return False
    try:
        layers = DynamicCache(config=base.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    kinds = (DynamicLayer, DynamicSlidingWindowLayer) if sliding else (DynamicLayer,)
    return all(type(layer) in kinds for layer in layers)


def _rotary(config: Any) -> set[str]:
    """The kinds of rotary positions that a model has."""
    told = getattr(config, "rope_parameters", None) or {}
    each = [told, *(value for value in told.values() if isinstance(value, dict))]
    return {str(found.get("rope_type")) for found in each}


def beginning(model: nn.Module, ids: Tensor, count: int) -> Any:
    """The cache of a text's beginning [1, seq], for so many rows that go on from it."""
    from transformers import DynamicCache

    cache = DynamicCache(config=inner_model(model).config)
    with head_reads(model, lambda hidden: hidden[:, -1:]):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(count)
    return cache


def branch_logits(
    view: ModelView,
    heads: Sequence[Sequence[int]],
    leaves: Sequence[Sequence[Sequence[int]]],
    last: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits after each prompt, and after the tokens of its continuations.

    Args:
        view: of a causal model for which `can_reuse` holds, in evaluation mode.
        heads: tokens of each prompt, one at least.
        leaves: of each prompt, the continuations' tokens, one at least each.
        last: of each continuation, after how many of its last tokens; after all by default.

    Returns:
        Logits [prompts, vocabulary] after the prompts, and [tokens, vocabulary] after those tokens
        of the continuations, in their order.
    """
    from transformers import DynamicCache

    width = max(map(len, heads))
    ids = torch.full((len(heads), width), view.pad)
    mask = torch.zeros((len(heads), width), dtype=torch.long)
    for i, head in enumerate(heads):
        ids[i, width - len(head) :] = torch.tensor(head)
        mask[i, width - len(head) :] = 1
    end = torch.zeros_like(mask, dtype=torch.bool)
    end[:, -1] = True
    cache = DynamicCache(config=view.config)
    first = _run(view, ids, mask, mask, end, cache)

    flat = [leaf for row in leaves for leaf in row]
    owner = torch.tensor([i for i, row in enumerate(leaves) for _ in row])
    longest = max(map(len, flat))
    more = torch.full((len(flat), longest), view.pad)
    new = torch.zeros((len(flat), longest), dtype=torch.long)
    wanted = torch.zeros_like(new, dtype=torch.bool)
    for i, leaf in enumerate(flat):
        more[i, : len(leaf)] = torch.tensor(leaf)
        new[i, : len(leaf)] = 1
        wanted[i, len(leaf) - (len(leaf) if last is None else last[i]) : len(leaf)] = True
    cache.batch_select_indices(owner.to(view.device))
    whole = torch.cat([mask[owner], new], 1)
    return first, _run(view, more, whole, new, wanted, cache)


def _run(
    view: ModelView, ids: Tensor, mask: Tensor, new: Tensor, predict: Tensor, cache: Any
) -> Tensor:
    """One pass on from a cache; `mask` covers the cache too. Logits [predictions, vocabulary]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - new.shape[1] :]
    device, predict = view.device, predict.to(view.device)
    with head_reads(view.model, lambda hidden: hidden[predict][None]):
        out = view.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
        )
    logits: Tensor = out.logits[0]
    return logits
