"""Text that a model samples itself: the source for those who have none.

Half of the rows continue from the start of a document, half from the start of a chat (where
the tokenizer has a chat template), so that both the plain and the instructed side of the model
speak. The adapter, if any, is off (or with the rest the base: `base_to_sample`).

Where the tokenizer does not write the first token of a document by itself, every second document
comes without it. Users' texts then begin with any token, and what attention parks on the first
position of a row (arXiv 2309.17453) is there another state, which a source must show as well:
a curvature that never met it leaves it free (docs/log.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from retain.data.batches import Example
from retain.errors import ModelError, SourceError
from retain.models.generating import write
from retain.models.off import base_to_sample
from retain.models.sizes import check_sizes, cut_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["sample_rows"]

_MARK = "\x00"


def sample_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    max_length: int,
    seed: int = 0,
    batch_size: int = 64,
    temperature: float = 1.0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Rows of ``input_ids`` sampled from the base model.

    Args:
        model: a causal model, with or without an adapter.
        tokenizer: tells where documents and chats begin.
        count: rows.
        max_length: tokens a row, the prefix included; a row ends early at the end of its text.
        seed: of the draws. The global random state is left as it was.
        batch_size: rows sampled at once.
        temperature: 1 samples the model as it is.
        progress: show a bar.

    Raises:
        SourceError: there is no tokenizer, or it has no token that begins a text.
        ModelError: the model predicts NaN.
    """
    if tokenizer is None:
        raise SourceError(
            "sampling needs a tokenizer",
            got="tokenizer=None",
            allowed="the model's tokenizer",
            fix="pass tokenizer=...",
        )
    prefixes = _prefixes(tokenizer)
    max_length = cut_length(model, max_length)
    check_sizes(model, [_as_example(p) for p in prefixes], tokenizer)
    bare = list(tokenizer("a")["input_ids"])[:1] != prefixes[0]
    device = next(model.parameters()).device
    rows: list[dict[str, Any]] = []
    bar = tqdm(total=count, desc="self-samples", unit="row", disable=not progress)
    devices = [device] if device.type == "cuda" else []
    with base_to_sample(model), torch.random.fork_rng(devices), bar:
        torch.manual_seed(seed)
        for i, prefix in enumerate(prefixes):
            share = count // len(prefixes) + (i < count % len(prefixes))
            for start in range(0, share, batch_size):
                size = min(batch_size, share - start)
                new = max(2, max_length - len(prefix))
                try:
                    out = write(
                        model, tokenizer, [prefix] * size, new_tokens=new, temperature=temperature
                    )
                except RuntimeError as error:
                    if "probability tensor" not in str(error):
                        raise
                    raise ModelError(
                        "the model's predictions are not finite",
                        got="NaN or infinity",
                        allowed="finite numbers",
                        fix="check the model's weights, or dtype='float32'",
                    ) from error
                found = [[*prefix, *new_ids] for new_ids in out]
                if bare and not i:
                    found[1::2] = [ids[1:] if len(ids) > 2 else ids for ids in found[1::2]]
                rows += [{"input_ids": ids} for ids in found]
                bar.update(size)
    return rows


def _prefixes(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Where a text may begin: a document's first token, and the user's side of a chat."""
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise SourceError(
            "the tokenizer has no token that begins a text",
            got="neither bos_token nor eos_token",
            allowed="one of the two",
            fix="set tokenizer.bos_token, or give source text",
        )
    prefixes = [[int(start)]]
    if getattr(tokenizer, "chat_template", None):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
        head = str(chat).partition(_MARK)[0]
        prefixes.append(list(tokenizer(head, add_special_tokens=False)["input_ids"]))
    return prefixes


def _as_example(tokens: list[int]) -> Example:
    return Example(tuple(tokens), tuple(tokens), (True,) * len(tokens))
