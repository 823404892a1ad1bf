"""``retain train`` of a classifier: its labels, its new head, and what it can be held by.

A new head is fitted to the model as it is before anything else (`retain.retention.head`): a
curvature that is measured before would be that of a head that says nothing. What else the base's
checkpoint lacks trains and is saved with it, such as a pooler (`retain.models.names`).
A classifier writes no text of its own, so it is held on text that is given (``--source``), and on
none without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from retain.config import RunConfig, names_of
from retain.errors import ConfigError, SourceError
from retain.runs.bases import load_base
from retain.runs.messages import Messages
from retain.runs.months import Previous
from retain.runs.records import Labels

__all__ = [
    "check_settings", "fit_new_head", "labels_of", "load_classifier", "wanted", "why_not_held",
]  # fmt: skip


def wanted(config: RunConfig) -> bool:
    """Whether a run trains a classifier: where it says so, or its model is an encoder."""
    from retain.models.load import is_encoder

    return config.num_labels is not None or is_encoder(config.model)


def check_settings(config: RunConfig, problems: int | None) -> None:
    """Refuses, before the model is loaded, what a classifier cannot do.

    Raises:
        ConfigError: text to continue, or a way of holding without the text to measure it on.
    """
    if problems is not None:
        raise ConfigError(
            "a classifier learns rows with a label",
            got=f"data {config.data}",
            allowed="a file of text (or pairs of texts) and label",
            fix="give such a file with --data, or a decoder with --model",
        )
    if names_of(config.budget):
        raise ConfigError(
            "named budgets are of a model that writes", got="a classifier",
            allowed="one budget and one --source for a classifier, or a decoder",
            fix="--budget 0.05 --source texts.jsonl",
        )  # fmt: skip
    if config.confidence is not None and config.method != "none":
        raise ConfigError(
            "the confidence in a budget comes of the spread over measured rows",
            got="a classifier, whose budget is predicted", allowed="none of a classifier",
            fix="leave --confidence out",
        )  # fmt: skip
    held = config.method == "laplace" or config.budget is not None or config.parts is not None
    sources = (config.source, config.curvature, config.continue_from)
    if (held or config.keep_state) and sources == (None, None, None):
        raise ConfigError(
            "a classifier writes no text that it could be held on",
            got="no --source",
            allowed="a file of texts like those whose answers are to stay",
            fix="--source texts.jsonl; or leave --method, --budget, --parts and --keep-state out",
        )


def labels_of(
    rows: Sequence[Mapping[str, Any]], config: RunConfig, before: Previous | None = None
) -> tuple[list[Mapping[str, Any]], Labels]:
    """The rows with their labels as numbers, and what these are.

    Labels that are all text name the classes, in alphabetical order (or in that of the base
    model's own head, where it has the same names); whole numbers from 0 count them; other numbers
    are values. A run that continues has the classes of the run before, in their order.

    Raises:
        SourceError: a row without a label, or labels that are no classes.
        ConfigError: more or fewer of them than asked for, or others than those of the run before.
    """
    from retain.models.heads import row_label
    from retain.models.load import own_labels

    own = own_labels(config.model)
    asked = None if config.num_labels in (None, "auto") else int(config.num_labels or 0)
    known = None
    if before is not None:
        known = before.labels or Labels(count=0)
        if asked not in (None, known.count):
            raise _other_labels(f"--num-labels {asked}", before)
        asked = known.count
    found = [row_label(row) for row in rows]
    if all(label is None for label in found):
        raise SourceError(
            "the rows have no labels, and a classifier learns them",
            got=f"the columns {', '.join(map(str, rows[0]))}" if rows else "no rows",
            allowed="text (or a pair of texts) and label",
            fix="name the column label; to learn text, give a decoder with --model",
        )
    for number, label in enumerate(found, start=1):
        text = "" if label is None else str(label).strip()
        if not text or (text in ("-1", "-100") and asked != 1):
            raise _no_label(number, label)
    named = [isinstance(label, str) and not _is_number(label) for label in found]
    if before is not None and known is not None and any(named) != bool(known.names):
        raise _other_labels(f"labels such as {found[named.index(any(named))]!r}", before)
    if not any(named):
        labels = _numbered(found, asked, own, len(rows), before)
        return list(rows), known or labels
    odd = next((n for n, label in enumerate(found, 1) if not isinstance(label, str)), None)
    if odd is not None:
        raise SourceError(
            f"row {odd} of the data has a label of another kind",
            got=f"label {found[odd - 1]!r}, beside {found[named.index(True)]!r}",
            allowed="names alone, or numbers alone",
            fix="write all labels as text",
        )
    texts = [str(label).strip() for label in found]
    names = sorted(set(texts))
    if before is not None and known is not None:
        if others := [name for name in names if name not in known.names]:
            raise _other_labels(f"label {others[0]!r}", before)
        labels = known
    else:
        same = own is not None and sorted(own) == names
        names = list(own) if own is not None and same else names
        _check_count(len(names), asked, len(rows), f"{len(names)} names")
        labels = Labels(count=len(names), names=tuple(names), known=same)
    places = {name: place for place, name in enumerate(labels.names)}
    return [_with(row, places[text]) for row, text in zip(rows, texts, strict=True)], labels


def _numbered(
    found: Sequence[Any], asked: int | None, own: Sequence[str] | None, rows: int,
    before: Previous | None,
) -> Labels:  # fmt: skip
    """What labels that are numbers are."""
    from retain.data.classifier import UNLABELLED, target_of

    values: list[int | float] = []
    for number, label in enumerate(found, start=1):
        try:
            values.append(target_of(label, True if asked == 1 else None))
        except SourceError as error:
            raise SourceError(
                error.what, got=f"{error.got} (row {number})", allowed=error.allowed, fix=error.fix
            ) from error
    if asked == 1 or (asked is None and any(isinstance(v, float) for v in values)):
        return Labels(count=1, known=own is not None and len(own) == 1)
    if UNLABELLED in values:  # -1.0, which beside fractions is a value
        number = values.index(UNLABELLED)
        raise _no_label(number + 1, found[number])
    if asked is None:
        least, most = min(values), int(max(values))
        if least > 0:
            raise SourceError(
                "the labels are not counted from 0",
                got=f"{least} to {most}",
                allowed="0 to one less than the number of classes",
                fix=f"number them from 0, or --num-labels {most + 1}; --num-labels 1 for values",
            )
        _check_count(most + 1, None, rows, f"labels up to {most}")
    for number, value in enumerate(values, start=1):
        if asked is not None and isinstance(value, int) and not 0 <= value < asked:
            got = f"label {value} in row {number} of the data"
            if before is not None:
                raise _other_labels(got, before)
            raise SourceError(
                "a label is of no class", got=got, allowed=f"0 to {asked - 1}",
                fix=f"--num-labels {int(max(values)) + 1}, or number the labels from 0",
            )  # fmt: skip
    count = asked or int(max(values)) + 1
    return Labels(count=count, known=own is not None and len(own) == count)


def _no_label(number: int, label: object) -> SourceError:
    return SourceError(
        f"row {number} of the data has no label",
        got=f"label {label!r}",
        allowed="a label in each row; -1 stands for none",
        fix="leave the row out; or number the labels from 0, where -1 is one of them",
    )


def _other_labels(got: str, before: Previous) -> ConfigError:
    labels = before.labels
    allowed = "text to continue: it is no classifier"
    if labels is not None:
        numbers = "values" if labels.regression else f"whole numbers from 0 to {labels.count - 1}"
        allowed = ", ".join(labels.names) or numbers
    return ConfigError(
        "the run to continue from has other labels",
        got=got,
        allowed=allowed,
        fix="leave those rows out, or train a new classifier from the base model",
    )


def why_not_held(config: RunConfig, labels: Labels) -> str | None:
    """Why a classifier is not held; None where it is.

    Raises:
        ConfigError: a curvature that was measured before the head was fitted.
    """
    if config.curvature is not None and not labels.known:
        raise ConfigError(
            "a curvature that was measured before the head was fitted tells nothing of it",
            got=f"curvature {config.curvature}, and a new head of {labels.count} outputs",
            allowed="text, on which it is measured once the head is fitted",
            fix="--source texts.jsonl in place of --curvature",
        )
    if config.curvature is None and config.source is None:
        return "a classifier writes no text of its own; --source gives some"
    return None


def _check_count(count: int, asked: int | None, rows: int, got: str) -> None:
    if asked is not None and asked != count:
        raise ConfigError(
            "the labels are not as many as asked for",
            got=f"{got}, --num-labels {asked}",
            allowed=f"--num-labels {count}",
            fix="leave --num-labels out, or check the labels",
        )
    if not 2 <= count <= rows:
        raise SourceError(
            "the labels are no classes",
            got=f"{got} in {rows} rows",
            allowed="two classes or more, and no more of them than rows",
            fix="check the labels; --num-labels 1 for values, or the number of classes",
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _with(row: Mapping[str, Any], label: int) -> Mapping[str, Any]:
    return {**{k: v for k, v in row.items() if k != "labels"}, "label": label}


def load_classifier(config: RunConfig, labels: Labels, of: str | None) -> Any:
    """The base model with its head, and its tokenizer; a new head is drawn by the run's seed.

    Raises:
        ModelError: it cannot be loaded.
    """
    import torch

    more: dict[str, Any] = {}
    if labels.names:
        more["id2label"] = dict(enumerate(labels.names))
        more["label2id"] = {name: place for place, name in enumerate(labels.names)}
    if not labels.known:  # what the files of a known head say of it stays
        kinds = {True: "regression", False: "single_label_classification"}
        more["problem_type"] = kinds[labels.regression]
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed)
        return load_base(
            config.model, of, dtype=config.dtype, trust_remote_code=config.trust_remote_code,
            num_labels=labels.count, ignore_mismatched_sizes=True, **more,
        )  # fmt: skip


def fit_new_head(
    model: Any, examples: Sequence[Any], labels: Labels, config: RunConfig, messages: Messages,
    *, learned: bool,
) -> Labels:  # fmt: skip
    """Fits a new head, says so, and keeps what was found with the labels.

    One that was `learned` comes with the adapter of an earlier run.

    Raises:
        RetainError: see `retain.fit_head`.
    """
    seen = set() if labels.regression else {int(e.targets[0]) for e in examples}
    unseen = [str(number) for number in range(labels.count) if seen and number not in seen]
    if labels.regression and config.num_labels in (None, "auto"):
        value = next((e.targets[0] for e in examples if e.targets[0] % 1), examples[0].targets[0])
        messages.note(
            f"a regression is learned, since the labels are values, such as {value:.3g}; "
            "--num-labels gives the number of classes"
        )
    if unseen:
        which = ", ".join([*unseen[:10], *(["..."] if len(unseen) > 10 else [])])
        messages.note(f"{len(unseen)} of {labels.count} classes have no row to learn from: {which}")
    if learned:
        messages.say(f"the head of {labels.count} outputs goes on from the run before")
        return labels.model_copy(update={"head": None})
    if labels.known:
        messages.note(
            f"the base model's own head of {labels.count} outputs goes on; none is fitted"
        )
        return labels
    if config.parts is not None and "head" not in config.parts:
        messages.note(
            f"a new head of {labels.count} outputs stays as it was drawn: --parts leaves head out"
        )
        return labels
    from retain.retention.head import fit_head

    found = fit_head(model, list(examples), seed=config.training.seed, progress=messages.progress)
    unit = "squared error" if labels.regression else "nats"
    messages.say(
        f"a new head of {labels.count} outputs, fitted on {found.rows} rows: "
        f"{found.loss:.3g} {unit} a row, {found.known:.3g} without the text"
    )
    if not found.placed:
        messages.note(
            "the head stays as it was drawn: the model's features do not foretell a label"
        )
    return labels.model_copy(update={"head": asdict(found)})
