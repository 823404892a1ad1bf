"""Score one task: a decoder ranks options or generates, an encoder's head answers.

Every item is scored, in the model's evaluation mode and as it is (an adapter stays on).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from retain.data.batches import Example
from retain.data.patterns import PatternError, first_match
from retain.data.specs import Item
from retain.data.tokens import fit_prompt
from retain.errors import ConfigError, SourceError, shown, unknown
from retain.evaluation.generation import generate
from retain.evaluation.metrics import METRICS, TEXT_METRICS, compute
from retain.evaluation.ranking import score_options
from retain.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Score", "score_items"]

Kind = Literal["choice", "generate", "regression"]


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
        extras: further metrics by name; ``unparsed`` is the share of generated texts without an
            answer in them.
    """

    metric: str
    value: float
    count: int
    loss: float | None
    extras: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def score_items(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    kind: Kind,
    metric: str,
    metrics: Sequence[str] = (),
    columns: slice | None = None,
    max_length: int = 256,
    max_new_tokens: int = 128,
    pattern: str | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    progress: bool = False,
    label: str = "scoring",
) -> Score:
    """Scores a model on the items of one task.

    A decoder ranks the options of "choice" by their full log-likelihood, and writes the answers
    of the other kinds. An encoder answers "choice" with the most likely of its task's columns and
    "regression" with the value of the first of them.

    Args:
        model: a causal model or a classifier.
        tokenizer: its tokenizer.
        items: the rows, one at least.
        kind: how the task is answered.
        metric: a name in `retain.evaluation.metrics.METRICS`.
        metrics: further ones, for `Score.extras`.
        columns: the outputs of an encoder that belong to the task; all by default.
        max_length: tokens of a prompt and its longest option (or of a prompt and its room to
            answer); prompts are cut from the left, options never. An encoder's texts are cut on
            the right, by its tokenizer.
        max_new_tokens: where a generated answer is cut.
        pattern: regular expression; its first match (first group, where it has one) in a
            generated text, and in the reference, is the answer. A text without a match is wrong;
            a reference without one is the answer itself. None takes the whole text.
        stop: strings at which a generated text is cut.
        batch_size: rows a pass; for ranking, so many continuations.
        progress: show a bar.
        label: of the bar.

    Raises:
        ConfigError: an unknown kind or metric, a task that this model cannot be asked.
        SourceError: no items.
    """
    for name in (metric, *metrics):
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    if kind not in ("choice", "generate", "regression"):
        raise unknown("kind of task", str(kind), ("choice", "generate", "regression"))
    if not items:
        raise SourceError(
            "no rows to score", got="0 items", allowed="1 or more", fix="a larger limit"
        )
    view = ModelView.of(model, tokenizer)
    causal = view.causal
    _fitting(items, kind, causal)
    if causal and kind != "choice" and max_new_tokens >= max_length:
        raise ConfigError(
            "an answer that leaves no room for its prompt",
            got=f"max_new_tokens {max_new_tokens}, max_length {max_length}",
            allowed="a max_length of more than max_new_tokens",
            fix=f"a max_length of {max_new_tokens + 128}",
        )
    extras: dict[str, float] = {}
    predictions: list[Any]
    if not causal:
        predictions, loss = _encoder(
            view, items, kind, columns, max_length, batch_size, progress, label
        )
    elif kind == "choice":
        ranking = score_options(
            model,
            tokenizer,
            [i.prompt for i in items],
            [i.options for i in items],
            max_length=max_length,
            batch_size=batch_size,
            progress=progress,
            label=label,
        )
        predictions = ranking.best()
        loss = ranking.nll([int(i.answer) for i in items])
    else:
        texts = generate(
            model,
            tokenizer,
            [fit_prompt(i.prompt, tokenizer, max_length - max_new_tokens) for i in items],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
            label=label,
        )
        found = [_extract(_until(text, stop), pattern) for text in texts]
        extras["unparsed"] = sum(f is None for f in found) / len(found)
        predictions = [f or "" for f in found]
        if kind == "regression":
            numbers = [_number(p) for p in predictions]
            extras["unparsed"] = sum(n is None for n in numbers) / len(numbers)
            predictions = [n or 0.0 for n in numbers]
        loss = score_options(
            model,
            tokenizer,
            [i.prompt for i in items],
            [(i.completion,) for i in items],
            max_length=max_length,
            batch_size=batch_size,
        ).nll([0] * len(items))
    groups = [i.group for i in items]

    def both(name: str) -> tuple[list[Any], list[Any], list[str]]:
        if name not in TEXT_METRICS:
            return predictions, [i.answer for i in items], groups
        if kind != "choice":
            return predictions, [_truths(i, pattern) for i in items], groups
        shown = [i.options[p].strip() for i, p in zip(items, predictions, strict=True)]
        return shown, [_truths(i, None) for i in items], groups

    for name in metrics:
        extras[name] = compute(name, *both(name))
    return Score(metric, compute(metric, *both(metric)), len(items), loss, extras)


def _fitting(items: Sequence[Item], kind: Kind, causal: bool) -> None:
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
    kind: Kind,
    columns: slice | None,
    max_length: int,
    batch_size: int,
    progress: bool,
    label: str,
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
        for batch in tqdm(every, desc=label, unit="batch", disable=not progress):
            logits = view.logits(batch)[:, columns or slice(None)]
            for row, part in zip(batch.rows, logits.double().cpu(), strict=True):
                rows[row] = part
    outputs = torch.stack(rows)
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


def _truths(item: Item, pattern: str | None) -> list[str]:
    """The texts that count as right."""
    every = item.references or (item.completion.strip() if item.options else str(item.answer),)
    return [_extract(text, pattern) or text.strip() for text in every]


def _extract(text: str, pattern: str | None) -> str | None:
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
    match = re.search(r"[-+]?\d*\.?\d+", text)
    return float(match.group(0)) if match else None
