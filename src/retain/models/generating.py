"""Text that a model writes, as the model is; and such text as a source for those who have none.

A model's ``generation_config.json`` may hold a temperature, penalties, forbidden or forced tokens,
beams, lengths, stop strings and more. `transformers` takes each that a call does not name, so a
call can never name them all. Here the settings are taken away for the while. What stays is which
tokens end a text, for that is part of what the model says.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from retain.data.batches import Example
from retain.data.general_prompts import HALVES, Half, mixed_prompts
from retain.errors import SourceError, not_finite
from retain.models.forward import compact_head, evaluating
from retain.models.names import unwrap
from retain.models.off import base_to_sample
from retain.models.reuse import beginning
from retain.models.sizes import check_length, check_sizes, cut_length, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["OWN", "plain_generation", "sample_rows", "write"]

CHATS = 0.75
"""Of the rows that a chat model samples, the share that are chats; the others are documents."""

ASKED, ANSWERED = 28, 24
"""Tokens of a sampled user's turn, and of the answer to it, at most."""

OWN = 4
"""One user's turn of so many is the model's own; what the others say is given."""

_MARK = "\x00"


@contextmanager
def plain_generation(model: nn.Module) -> Iterator[None]:
    """Inside it, a model generates without settings of its own, but for the tokens that end a text.

    A ``generate`` that came with the model's files is set aside too.
    """
    kinds = {"generation_config": GenerationConfig, "generate": functools.partial}
    before = [
        (own, name, own[name])
        for own in map(vars, unwrap(model).modules())
        for name, kind in kinds.items()
        if isinstance(own.get(name), kind)
    ]
    try:
        for own, name, value in before:
            del own[name]
            if name == "generation_config":
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
    shared: int = 0,
) -> list[list[int]]:
    """What a causal model writes after prompts (tokens), up to and with the token that ends it.

    Args:
        model: in any mode; it is put into evaluation mode for the while.
        tokenizer: its own.
        prompts: shorter ones are padded on the left, behind what all share.
        new_tokens: that are written at most.
        temperature: of what is sampled, 1 for the model as it is; None takes the most likely token.
        shared: so many tokens that all prompts begin with are run once, of a model that can go on
            from them (`retain.models.reuse`).

    Raises:
        SourceError: a prompt and its answer are longer than the model can read.
        RuntimeError: the predictions are not finite.
    """
    width, pad, ends = max(map(len, prompts)), pad_id(model), _end_tokens(model, tokenizer)
    check_length(
        model, [width + new_tokens - 1], "the longest prompt with its answer",
        fix="shorter prompts, fewer new tokens, or a model of more positions",
    )  # fmt: skip
    device = next(model.parameters()).device
    gaps = [width - len(p) for p in prompts]
    ids = torch.tensor(
        [[*p[:shared], *[pad] * gap, *p[shared:]] for p, gap in zip(prompts, gaps, strict=True)],
        device=device,
    )
    mask = torch.tensor(
        [[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in gaps], device=device
    )
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        do_sample=temperature is not None,
        # without a top_k of 0 transformers would sample from the 50 most likely
        **({} if temperature is None else {"temperature": temperature, "top_k": 0}),
    )
    with evaluating(model), torch.no_grad(), compact_head(model), plain_generation(model):
        known: dict[str, Any] = {}
        if shared:
            known["past_key_values"] = beginning(model, ids[:1, :shared], len(prompts))
        out = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=settings, **known
        )
    found = out[:, width:].tolist()
    stops = (next((i for i, t in enumerate(row) if t in ends), len(row)) for row in found)
    return [row[: stop + 1] for row, stop in zip(found, stops, strict=True)]


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which the model's text ends; none for a model that never stops."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    given = tokenizer.eos_token_id if given is None else given
    if given is None:
        return []
    return sorted(set(given)) if isinstance(given, list | tuple) else [int(given)]


def sample_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    max_length: int,
    seed: int = 0,
    batch_size: int = 64,
    temperature: float = 1.0,
    prompts: Sequence[str] | None = None,
    half: Half = "source",
    documents: bool = True,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Rows of ``input_ids`` sampled from the base model: the adapter, if any, is off.

    Where the tokenizer has a chat template, three quarters of the rows are short chats, each of
    which reaches its answer: the template puts the assistant's header behind a user's turn, and the
    model writes the first 24 tokens of an answer. That is where people read, and a source without
    such places leaves them free (docs/log.md). Three of four users' turns are general prompts of
    `retain.data.general_prompts`, of all skills in their shares; the fourth the model writes, of at
    most 28 tokens, whatever its language or its trade is. The other rows are documents: all rows of
    a model without a chat form.

    Where the tokenizer does not write the first token of a document by itself, every second
    document comes without it. Users' texts then begin with any token, and what attention parks on
    the first position of a row (arXiv 2309.17453) is there another state, which a source must show
    as well: a curvature that never met it leaves it free (docs/log.md).

    Args:
        model: a causal model, with or without an adapter.
        tokenizer: tells where documents and chats begin.
        count: rows.
        max_length: tokens a row, the prefix included; a row ends early at the end of its text.
        seed: of the draws. The global random state is left as it was.
        batch_size: rows sampled at once.
        temperature: 1 samples the model as it is.
        prompts: what the users of all chats say, in place of the above: all in an order by the
            seed, then all again, as often as there are chats. The model writes the answers alone.
        half: of the general prompts; text that something is measured on has ``held-out``.
        documents: False where a chat model's rows are to be chats alone.
        progress: show a bar.

    Raises:
        SourceError: there is no tokenizer, or it has no token that begins a text; prompts without
            a chat form, or none.
        ModelError: the model predicts NaN.
    """
    if tokenizer is None:
        raise SourceError(
            "sampling needs a tokenizer",
            got="tokenizer=None",
            allowed="the model's tokenizer",
            fix="pass tokenizer=...",
        )
    document, chat = _document(tokenizer), chat_form(tokenizer)
    max_length = cut_length(model, max_length)
    head, tail = chat or ([], [])
    ends = set(_end_tokens(model, tokenizer))
    given: list[list[int]] = []
    if chat or prompts is not None:
        given = _turns(tokenizer, prompts, half, ends, seed, chat=bool(chat))
    every = OWN if prompts is None else count + 1  # or none is the model's own
    starts = [
        Example(tuple(p), tuple(p), (True,) * len(p)) for p in (document, head, tail, *given) if p
    ]
    check_sizes(model, starts, tokenizer, lengths=not given)
    bare = list(tokenizer("a")["input_ids"])[:1] != document
    device = next(model.parameters()).device
    chats = round((CHATS if documents else 1) * count) if chat else 0
    rows: list[list[int]] = []
    bar = tqdm(total=count, desc="self-samples", unit="row", disable=not progress)
    devices = [device] if device.type == "cuda" else []

    def written(prompts: list[list[int]], new: int) -> list[list[int]]:
        return _written(model, tokenizer, prompts, new, temperature)

    with base_to_sample(model), torch.random.fork_rng(devices), bar:
        torch.manual_seed(seed)
        for size in _sizes(count - chats, batch_size):
            found = _joined([document] * size, written([document] * size, max_length - 1))
            if bare:
                found[1::2] = [ids[1:] if len(ids) > 2 else ids for ids in found[1::2]]
            rows += found
            bar.update(size)
        room = max_length - len(head) - len(tail)
        asked = min(ASKED, max(1, room * ASKED // (ASKED + ANSWERED)))
        most = max(asked, room - ANSWERED)
        for start, size in zip(range(0, chats, batch_size), _sizes(chats, batch_size), strict=True):
            numbers = range(start, start + size)
            own = [i for i in numbers if i % every == every - 1]
            turns = written([head] * len(own), asked) if own else []
            by_model = dict(zip(own, ([t for t in u if t not in ends] for u in turns), strict=True))
            asks = [given[(i - i // every) % len(given)][:most] for i in numbers]
            said = [by_model.get(i) or ask for i, ask in zip(numbers, asks, strict=True)]
            found = [[*head, *turn, *tail] for turn in said]
            answered = min(ANSWERED, room - max(map(len, said)))
            if answered > 0:
                found = _joined(found, written(found, answered))
            rows += [ids[:max_length] for ids in found]
            bar.update(size)
    return [{"input_ids": ids} for ids in rows]


def sampled_form() -> str:
    """Names how rows are sampled and what is asked, for the keys of files that keep some."""
    asked = "\n".join(text for half in HALVES for text in mixed_prompts(half, 0))
    return f"chats 2 {hashlib.sha256(asked.encode()).hexdigest()[:16]}"


def _turns(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | None, half: Half, ends: set[int],
    seed: int, *, chat: bool,
) -> list[list[int]]:  # fmt: skip
    """The tokens of users' turns, in an order by the seed, without those that `ends` a text.

    They are `prompts`, or the general prompts of a half.
    """
    if not chat or (prompts is not None and not prompts):
        raise SourceError(
            "prompts are asked in a chat",
            got="a tokenizer without a chat template" if not chat else "no prompts",
            allowed="the model's chat template, and 1 prompt or more",
            fix="give text as the source" if not chat else "give some, or leave prompts out",
        )
    if prompts is None:
        texts = mixed_prompts(half, seed)
    else:
        texts = random.Random(seed).sample(list(prompts), len(prompts))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [[t for t in turn if t not in ends] for turn in ids]


def _sizes(count: int, most: int) -> list[int]:
    """Of batches."""
    return [min(most, count - start) for start in range(0, count, most)]


def _joined(prompts: list[list[int]], written: list[list[int]]) -> list[list[int]]:
    return [[*prompt, *more] for prompt, more in zip(prompts, written, strict=True)]


def _written(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new: int,
    temperature: float,
) -> list[list[int]]:  # fmt: skip
    try:
        return write(model, tokenizer, prompts, new_tokens=max(2, new), temperature=temperature)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise not_finite() from error


def _document(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first token of a document."""
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise SourceError(
            "the tokenizer has no token that begins a text",
            got="neither bos_token nor eos_token",
            allowed="one of the two",
            fix="set tokenizer.bos_token, or give source text",
        )
    return [int(start)]


def chat_form(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """Tokens before a user's turn, and between it and the answer; None without a chat form."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    head, _, tail = str(chat).partition(_MARK)
    options = {"add_special_tokens": False}
    return list(tokenizer(head, **options)["input_ids"]), list(
        tokenizer(tail, **options)["input_ids"]
    )
