"""Text that a model writes, as the model is: nothing is inherited from its generation settings.

A model's ``generation_config.json`` may hold a temperature, penalties, forbidden or forced tokens,
beams, lengths, stop strings and more. `transformers` takes each that a call does not name, so a
call can never name them all. Here the settings are taken away for the while. What stays is which
tokens end a text, for that is part of what the model says.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig

from retain.models.adapter import unwrap
from retain.models.heads import compact_head, pad_id
from retain.models.modes import evaluating
from retain.models.sizes import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["end_tokens", "plain_generation", "write"]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which the model's text ends; none for a model that never stops."""
    config = getattr(model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    given = tokenizer.eos_token_id if given is None else given
    if given is None:
        return []
    return sorted(set(given)) if isinstance(given, list | tuple) else [int(given)]


@contextmanager
def plain_generation(model: nn.Module) -> Iterator[None]:
    """Inside it, a model generates without settings of its own, but for the tokens that end a text.

    A ``generate`` that came with the model's files is set aside too.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module in unwrap(model).modules():
        own = vars(module)
        if isinstance(own.get("generation_config"), GenerationConfig):
            before.append((own, "generation_config", own["generation_config"]))
        if isinstance(own.get("generate"), functools.partial):
            before.append((own, "generate", own["generate"]))
    try:
        for own, name, value in before:
            if name == "generate":
                del own[name]
            else:
                own[name] = GenerationConfig(eos_token_id=value.eos_token_id)
        yield
    finally:
        for own, name, value in before:
            own[name] = value


def write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    temperature: float | None = None,
) -> list[list[int]]:
    """What a model writes after prompts, up to and with the token that ends it.

    Args:
        model: a causal model in any mode; it is put into evaluation mode for the while.
        tokenizer: its own.
        prompts: tokens; shorter ones are padded on the left.
        new_tokens: that are written at most.
        temperature: of what is sampled from the softmax of the logits, 1 for the model as it is;
            None takes the most likely token each time.

    Raises:
        SourceError: a prompt and its answer are longer than the model can read.
        RuntimeError: the predictions are not finite.
    """
    width, pad, ends = max(map(len, prompts)), pad_id(model), end_tokens(model, tokenizer)
    check_length(
        model, [width + new_tokens - 1], "the longest prompt with its answer",
        fix="shorter prompts, fewer new tokens, or a model of more positions",
    )  # fmt: skip
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        do_sample=temperature is not None,
        # without a top_k of 0 transformers would sample from the 50 most likely
        **({} if temperature is None else {"temperature": temperature, "top_k": 0}),
    )
    with evaluating(model), torch.no_grad(), compact_head(model), plain_generation(model):
        out = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=settings
        )
    return [_ended(row, ends) for row in out[:, width:].tolist()]


def _ended(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Without what comes after the token that ends the text."""
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]
