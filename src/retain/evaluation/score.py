"""Score one task: a decoder ranks options or generates, an encoder's head answers.

Every item is scored, in the model's evaluation mode and as it is (an adapter stays on).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from retain.data.batches import Example
from retain.data.patterns import PatternError, first_match
from retain.data.specs import Item, TaskSpec
from retain.data.tokens import fit_prompt
from retain.errors import ConfigError, SourceError, not_finite, shown
from retain.evaluation.generation import generate
from retain.evaluation.metrics import TEXT_METRICS, compute, plain_minus
from retain.evaluation.ranking import score_options
from retain.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Score", "score_task"]


@dataclass(frozen=True)
class Score:
    """What a model scored on a task.

    Attributes:
        metric: the name of the task's metric.
        value: the score, a fraction from 0 to 1 (a correlation from -1 to 1).
        count: rows.
        loss: mean loss of the right answer, in nats per row: minus the log-probability of its
            text after the prompt, summed over its tokens (without an end of text), or the
            cross-entropy of an encoder's own columns. None for an encoder's regression.
        right: of each row whether its answer is right, whatever the metric: the class, or one of
            the texts as `exact_match` compares them. None of a regression.
        extras: further metrics by name; ``unparsed`` is the share of generated texts without an
            answer in them.
    """

    metric: str
    value: float
    count: int
    loss: float | None
    right: tuple[bool, ...] | None = None
    extras: dict[str, float] = field(default_factory=dict)


def score_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    items: Sequence[Item],
    *,
    columns: slice | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Score:
    """Scores a model on the items of one task.

    A decoder ranks the options of "choice" by their full log-likelihood, and writes the answers
    of the other kinds; the first match of the task's pattern (its first group, where it has one)
    in a text, and in the reference, is the answer. A text without a match is wrong; a reference
    without one is the answer itself. An encoder answers "choice" with the most likely of its
    task's columns and "regression" with the value of the first of them.

    Args:
        model: a causal model or a classifier.
        tokenizer: its tokenizer.
        spec: the task.
        items: its rows, one at least.
        columns: the outputs of an encoder that belong to the task; all by default.
        max_length: tokens of a prompt and its longest option (or of a prompt and its room to
            answer), the task's by default; prompts are cut from the left, options never. An
            encoder's texts are cut on the right, by its tokenizer.
        batch_size: rows a pass; for ranking, so many continuations.
        progress: show a bar.

    Raises:
        ConfigError: a task that this model cannot be asked.
        SourceError: no items.
        ModelError: predictions that are not finite, whose scores would look like any others.
    """
    if not items:
        raise SourceError(
            "no rows to score", got="0 items", allowed="1 or more", fix="a larger limit"
        )
    view, kind, room = ModelView.of(model, tokenizer), spec.kind, spec.max_new_tokens
    length = spec.max_length if max_length is None else max_length
    _fitting(items, kind, view.causal)
    if view.causal and kind != "choice" and room >= length:
        raise ConfigError(
            "an answer that leaves no room for its prompt",
            got=f"max_new_tokens {room}, max_length {length}",
            allowed="a max_length of more than max_new_tokens",
            fix=f"a max_length of {room + 128}",
        )
    bar: dict[str, Any] = {"progress": progress, "label": spec.name}
    extras: dict[str, float] = {}
    predictions: list[Any]
    prompts = [item.prompt for item in items]
    if not view.causal:
        predictions, loss = _encoder(view, items, kind, columns, length, batch_size, bar)
    elif kind == "choice":
        ranking = score_options(
            model, tokenizer, prompts, [item.options for item in items],
            max_length=length, batch_size=batch_size, **bar,
        )  # fmt: skip
        predictions = ranking.best()
        loss = ranking.nll([int(item.answer) for item in items])
    else:
        cut = [fit_prompt(prompt, tokenizer, length - room) for prompt in prompts]
        texts = generate(model, tokenizer, cut, max_new_tokens=room, batch_size=batch_size, **bar)
        found: list[Any] = [_extract(_until(text, spec.stop), spec.pattern) for text in texts]
        if kind == "regression":
            found = [_number(text or "") for text in found]
        extras["unparsed"] = sum(answer is None for answer in found) / len(found)
        nothing = "" if kind == "generate" else 0.0
        predictions = [nothing if answer is None else answer for answer in found]
        right = [(item.completion,) for item in items]
        loss = score_options(
            model, tokenizer, prompts, right, max_length=length, batch_size=batch_size
        ).nll([0] * len(items))
    groups = [i.group for i in items]

    def both(name: str) -> tuple[list[Any], list[Any], list[str]]:
        if name not in TEXT_METRICS:
            return predictions, [i.answer for i in items], groups
        if kind != "choice":
            return predictions, [_truths(i, spec.pattern) for i in items], groups
        shown = [i.options[p].strip() for i, p in zip(items, predictions, strict=True)]
        return shown, [_truths(i, "") for i in items], groups

    extras |= {name: compute(name, *both(name)) for name in spec.metrics}
    value = compute(spec.metric, *both(spec.metric))
    hits: tuple[bool, ...] | None = None
    if kind == "choice":
        hits = tuple(p == int(i.answer) for p, i in zip(predictions, items, strict=True))
    elif kind == "generate":
        texts, truths, _ = both("exact_match")
        pairs = zip(texts, truths, strict=True)
        hits = tuple(bool(compute("exact_match", [p], [t])) for p, t in pairs)
    return Score(spec.metric, value, len(items), loss, hits, extras)


def _fitting(items: Sequence[Item], kind: str, causal: bool) -> None:
    """Raises where a task cannot be asked of a model."""
    if causal and kind == "choice":
        bad = next((i for i in items if not i.options), None)
    elif causal:
        bad = None
    else:
        bad = items[0] if kind == "generate" else next((i for i in items if not i.texts), None)
    if bad is not None:
        raise ConfigError(
            "a task that this model cannot be asked",
            got=f"kind {kind!r}, row {bad.row} with {len(bad.options)} options and "
            f"{len(bad.texts)} texts, for {'a decoder' if causal else 'an encoder'}",
            allowed="options for a decoder's choice; texts, and no generation, for an encoder",
            fix="use another model, or complete the task's file",
        )


def _encoder(
    view: ModelView,
    items: Sequence[Item],
    kind: str,
    columns: slice | None,
    max_length: int,
    batch_size: int,
    bar: Mapping[str, Any],
) -> tuple[list[Any], float | None]:
    """Predictions of a classifier's head, and the mean cross-entropy of its columns."""
    examples, tokenizer = [], cast("Any", view.tokenizer)
    for item in items:
        out = tokenizer(*item.texts, truncation=True, max_length=max_length)
        segments = tuple(out.get("token_type_ids", ()))
        examples.append(Example(tuple(out["input_ids"]), (0,), (), segments))
    view.check(examples, labels=False)
    every = view.batches(examples, batch_size)
    rows: list[Tensor] = [torch.empty(0)] * len(items)
    with view.evaluating(), torch.no_grad():
        for batch in tqdm(every, desc=bar["label"], unit="batch", disable=not bar["progress"]):
            logits = view.logits(batch)[:, columns or slice(None)]
            for row, part in zip(batch.rows, logits.double().cpu(), strict=True):
                rows[row] = part
    outputs = torch.stack(rows)
    if not bool(outputs.isfinite().all()):
        raise not_finite()
    if kind == "regression":
        return outputs[:, 0].tolist(), None
    answers = torch.tensor([int(i.answer) for i in items])
    if int(answers.max()) >= outputs.shape[1]:
        raise ConfigError(
            "an answer outside the task's columns",
            got=f"class {int(answers.max())} of {outputs.shape[1]} columns",
            allowed="classes from 0, one column each",
            fix="give the head as many columns as the task has classes",
        )
    return outputs.argmax(-1).tolist(), float(nn.functional.cross_entropy(outputs, answers))


def _truths(item: Item, pattern: str) -> list[str]:
    """The texts that count as right."""
    every = item.references or (item.completion.strip() if item.options else str(item.answer),)
    return [_extract(text, pattern) or text.strip() for text in every]


def _extract(text: str, pattern: str) -> str | None:
    """The answer in a text, or None."""
    if not pattern:
        return text.strip() or None
    try:
        match = first_match(pattern, text)
    except PatternError as error:
        raise ConfigError(
            "the pattern of a task finds no answer",
            got=f"{shown(pattern)} in {shown(text)}: {error}",
            allowed="a pattern that comes to an end",
            fix="change pattern: in the task's file",
        ) from error
    if match is None:
        return None
    return (match.group(1) if match.re.groups else match.group(0) or "").strip() or None


def _until(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the strings that end it."""
    return text[: min((at for s in stop if s and (at := text.find(s)) >= 0), default=len(text))]


def _number(text: str) -> float | None:
    match = re.search(r"[-+]?\d*\.?\d+", plain_minus(text))
    return float(match.group(0)) if match else None
