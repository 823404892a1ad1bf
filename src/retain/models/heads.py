"""What a model's head predicts, and the labels that it answers.

Three kinds of heads are known here. A causal one and a classifier give logits, whose softmax is
what they predict. A regression (one output, or ``problem_type="regression"``) gives values: they
are read as the means of normal distributions of variance 1, so that a change of d costs
``0.5 d^2`` nats and the Fisher in the outputs is the identity. All that reads a model's
predictions asks `head_kind` first, which refuses every other head by name, and an adapter by which
a causal one predicts at other places than the text's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn

from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from retain.errors import ModelError, SourceError
from retain.models.names import inner_model, unwrap

__all__ = [
    "Head",
    "are_values",
    "check_labels",
    "check_single",
    "has_fitted_head",
    "head_kind",
    "is_causal",
    "is_regression",
    "mark_fitted",
    "predicts_per",
    "row_label",
    "several_labels",
    "text_part",
    "writes",
]

Head = Literal["causal", "classes", "regression"]

_TOWERS = ("vision_config", "audio_config")

_LOADED = "AutoModelForSequenceClassification.from_pretrained(name, num_labels=...)"

_OTHERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("TokenClassification",), "the model labels each token of a text",
     f"for one label a text, {_LOADED}"),
    (("QuestionAnswering",), "the model points at a part of a text",
     "for answers in words, a ...ForCausalLM model with prompt and completion"),
    (("MultipleChoice",), "the model ranks several texts at once",
     f"for a label of each pair of texts, {_LOADED}"),
    (("MaskedLM", "PreTraining", "NextSentencePrediction", "WithLMHeadModel"),
     "the model fills gaps in a text", f"for classes, {_LOADED}; --num-labels on the command line"),
    (("PeftMixedModel",), "a mixed model of PEFT's may have adapters of several kinds",
     "get_peft_model(model, LoraConfig(...)) without mixed=True"),
    (("WithValueHead",), "the model has a value head beside its own",
     "give the model inside it: model.pretrained_model"),
    (("ImageTextToText", "Vision2Seq", "ImageClassification", "SpeechSeq2Seq", "CTC",
      "AudioClassification"), "the model reads more than text", "use a model of text alone"),
)  # fmt: skip
"""Ends of the names of heads that are none of ours; what such a model does; what to do instead."""

_TEXT_TOO = frozenset(
    name for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
)  # fmt: skip
"""Classes that read images too, and are what AutoModelForCausalLM loads of their checkpoints."""

_CACHED = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
"""PEFT's kinds of prompts that are keys and values alone: the text stays as long as it is."""


def head_kind(model: nn.Module) -> Head:
    """What a model's head predicts; a class that is derived from one of transformers is that one.

    Raises:
        ModelError: a head that is not known here, or whose labels do not exclude each other; or a
            causal model whose adapter puts tokens before each text.
    """
    inner = inner_model(model)
    config: Any = getattr(inner, "config", None)
    names = [kind.__name__ for kind in type(inner).__mro__]
    for name in names:
        if "ForSequenceClassification" in name:
            return _of_classifier(config)
        if name.endswith(("ForCausalLM", "LMHeadModel")) and "WithLMHead" not in name:
            _check_order(name, config)
            _check_length(model)
            return "causal"
        if name in _TEXT_TOO:
            _check_length(model)
            return "causal"
        if name == "PreTrainedModel":
            break
    _refuse(names, config)


def is_causal(model: nn.Module) -> bool:
    """True for a causal language model, false for a classifier or a regression; see `head_kind`."""
    return head_kind(model) == "causal"


def predicts_per(model: nn.Module) -> Literal["token", "row"]:
    """What one prediction is of: a token, or of a classifier or a regression a row."""
    return "token" if is_causal(model) else "row"


def text_part(model: nn.Module) -> Any:
    """The part of a model that reads text: its decoder, where it has towers for images or sound."""
    inner: Any = inner_model(model)
    config = getattr(inner, "config", None)
    towers = any(hasattr(config, part) for part in _TOWERS)
    return inner.get_decoder() if towers else inner


def is_regression(model: nn.Module) -> bool:
    """Whether the outputs are values, and no logits; see `head_kind`."""
    return head_kind(model) == "regression"


def are_values(model: nn.Module, outputs: Tensor) -> bool:
    """Whether outputs [predictions, outputs] are values, and no logits; see `head_kind`.

    A single one is a value whatever the head: it may be a regression's among other tasks' outputs.
    """
    return outputs.shape[-1] == 1 or is_regression(model)


def writes(config: Any) -> bool:
    """Whether models of this kind are decoders."""
    kind = getattr(config, "model_type", None)
    return (
        kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _of_classifier(config: Any) -> Head:
    problem, outputs = config.problem_type, int(config.num_labels)
    if problem == "multi_label_classification":
        raise several_labels("problem_type='multi_label_classification'")
    if problem == "regression" or (outputs == 1 and problem is None):
        return "regression"
    if outputs == 1:
        raise ModelError(
            "a classifier of one class says nothing",
            got=f"num_labels=1, problem_type={problem!r}",
            allowed="two classes or more, or a regression",
            fix="num_labels=2; or model.config.problem_type = 'regression'",
        )
    return "classes"


def several_labels(got: str) -> ModelError:
    """The error for a head, or for labels, of which several can be right at once."""
    return ModelError(
        "the head's labels do not exclude each other",
        got=got,
        allowed="one label a text: predictions are read as a softmax",
        fix="train one label at a time (num_labels=2), or plain LoRA with your own trainer",
    )


def _check_order(name: str, config: Any) -> None:
    """Refuses an encoder with a language-model head that still reads both ways."""
    kind = getattr(config, "model_type", None)
    both = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if both and getattr(config, "is_decoder", True) is False:
        raise ModelError(
            "the model sees the tokens that it is to predict",
            got=f"{name} with config.is_decoder=False",
            allowed="a decoder, which reads from left to right",
            fix=f"for classes, {_LOADED}; for text, load it with is_decoder=True",
        )


def _check_length(model: nn.Module) -> None:
    """Refuses prompt tuning and P-tuning, whose outputs are longer than the text."""
    for config in (getattr(unwrap(model), "peft_config", None) or {}).values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning and kind not in _CACHED:
            raise ModelError(
                "the adapter puts tokens of its own before each text",
                got=f"an adapter of the kind {kind}",
                allowed="an adapter that leaves a text as long as it is",
                fix="use another kind, such as LoRA",
            )


def _refuse(names: list[str], config: Any) -> NoReturn:
    """Says what a model is, and what to load in its place."""
    fix, what = f"for classes, {_LOADED}; --num-labels on the command line", "the model has no head"
    found = [(does, instead) for ends, does, instead in _OTHERS
             if any(name.endswith(ends) for name in names)]  # fmt: skip
    if found:
        what, fix = found[0]
    elif any(hasattr(config, part) for part in _TOWERS):
        what, fix = "the model reads more than text", "use a model of text alone"
    elif getattr(config, "is_encoder_decoder", False):
        what = "the model is an encoder-decoder"
        fix = "use a decoder (...ForCausalLM), or an encoder for classes"
    elif config is None or not hasattr(config, "model_type"):
        what, fix = "the model is none of transformers", "AutoModelForCausalLM.from_pretrained(...)"
    elif writes(config):
        fix = "AutoModelForCausalLM.from_pretrained(name)"
    allowed = "a ...ForCausalLM or ...ForSequenceClassification model"
    raise ModelError(what, got=names[0], allowed=allowed, fix=fix)


def check_labels(model: nn.Module, labels: Iterable[object], unit: str = "row") -> None:
    """Refuses labels that a model's head does not answer; of a causal model there are none.

    transformers itself tells a head of several labels by its first batch alone: labels that are
    lists, or floating-point numbers for several outputs. The labels are numbers, lists or tensors,
    counted from 1 by `unit`; None and "" are none, and neither is a class below 0.

    Raises:
        ModelError: see `head_kind`; several labels of one text.
        SourceError: a class that the head lacks, or a value that is not finite.
    """
    kind = head_kind(model)
    if kind == "causal":
        return
    outputs = int(inner_model(model).config.num_labels)
    for number, label in enumerate(labels, start=1):
        if label is None or (isinstance(label, str) and not label):
            continue
        values = _values(label)
        if kind == "regression":
            if not all(math.isfinite(v) for v in values):
                raise SourceError(
                    f"the label of {unit} {number} is not finite",
                    got=label, allowed="finite numbers", fix="leave the row out, or repair it",
                )  # fmt: skip
        elif len(values) != 1:
            raise several_labels(f"{len(values)} labels in {unit} {number}")
        elif not values[0] < outputs or values[0] % 1:  # NaN is not below
            raise SourceError(
                f"the label of {unit} {number} has no output",
                got=f"label {values[0]:g}",
                allowed=f"whole numbers from 0 to {outputs - 1}",
                fix="count the labels from 0, or load the model with as many as num_labels",
            )


def mark_fitted(layer: nn.Module) -> None:
    """Remembers of a head's layer that it was fitted; a copy of it remembers that too."""
    vars(layer)["retain_fitted"] = True


def has_fitted_head(model: nn.Module) -> bool:
    """Whether a layer of the model is one that `mark_fitted` was told of."""
    return any("retain_fitted" in vars(module) for module in model.modules())


def check_single(model: nn.Module) -> None:
    """Raises `ModelError` for a regression of several outputs, where rows have one label."""
    outputs = int(inner_model(model).config.num_labels)
    if is_regression(model) and outputs != 1:
        raise ModelError(
            "a regression of several outputs has several labels a text",
            got=f"problem_type='regression', num_labels={outputs}",
            allowed="one output; transformers.Trainer with RetentionCallback trains several",
            fix="num_labels=1",
        )


def row_label(row: Mapping[str, Any]) -> object:
    """What a row of text says is its label."""
    return next((row[key] for key in ("label", "labels") if row.get(key) is not None), None)


def _values(label: Any) -> list[float]:
    """A label as numbers; text that is no number is left to whoever reads the rows."""
    if hasattr(label, "tolist"):  # a tensor, or numpy's
        label = label.reshape(-1).tolist()
    try:
        return [float(v) for v in label] if isinstance(label, list | tuple) else [float(label)]
    except (TypeError, ValueError):
        return [0.0]
