"""Every head is read right, or refused by its name at the first door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from doors import trainer
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
)

import retain
from families import COMMON, built
from retain import attach_lora, fit_curvature, fit_head, measure_forgetting
from retain.config import TrainConfig
from retain.data.batches import Example, batches, collate
from retain.errors import ConfigError, CurvatureError, ModelError, SourceError
from retain.models.forward import forward_logits
from retain.models.heads import check_labels, head_kind, is_causal
from retain.models.off import adapter_off
from retain.models.sites import lora_sites
from retain.models.sizes import pad_id
from retain.retention.measure import Reference
from retain.training.loop import train
from tiny import move, relative

ROWS: list[dict[str, Any]] = [
    {"input_ids": [2 + (3 * i + k) % 30 for k in range(3 + i % 4)], "label": i % 2}
    for i in range(16)
]
VALUES = [-1.0 + 0.37 * i for i in range(16)]


def classifier(family: str = "Bert", **changes: Any) -> Any:
    wide = {"num_labels": 3, "initializer_range": 0.4, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0}  # fmt: skip
    return built(AutoModelForSequenceClassification, family, **wide | changes).double().eval()


def adapted(model: Any) -> Any:
    names = ["query", "value"] if hasattr(model, "bert") else ["q_proj", "v_proj"]
    return attach_lora(model, rank=2, targets=names).eval()


def regression(family: str = "Bert", outputs: int = 1) -> Any:
    more = {} if outputs == 1 else {"problem_type": "regression"}
    return adapted(classifier(family, num_labels=outputs, **more))


def valued(values: Sequence[float] = VALUES) -> list[Example]:
    rows = zip(ROWS, values, strict=False)
    return [Example(tuple(r["input_ids"]), (v,)) for r, v in rows]  # type: ignore[arg-type]


def text_rows() -> list[dict[str, Any]]:
    return [{"input_ids": r["input_ids"]} for r in ROWS]


def with_callback(
    model: Any, curvature: Any, labels: Sequence[Any], kind: torch.dtype | None, **more: Any
) -> Trainer:
    items = [{**r, "label": v} for r, v in zip(ROWS, labels, strict=False)]

    def gathered(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([Example(tuple(r["input_ids"]), (0,)) for r in rows], 1).inputs
        return batch | {"labels": torch.tensor([r["label"] for r in rows], dtype=kind)}

    return trainer(model, items, gathered, retain.RetentionCallback(curvature, **more))


READERS: dict[str, Callable[..., Any]] = {
    "fit_curvature": lambda m, rows=ROWS: fit_curvature(m, rows, progress=False),
    "measure_forgetting": lambda m, rows=ROWS: measure_forgetting(m, rows),
    "fit_head": lambda m, rows=ROWS: fit_head(m, rows, progress=False),
}
DOORS: dict[str, Callable[[Any], Any]] = READERS | {
    "activation": lambda m: fit_curvature(m, ROWS, structure="activation", progress=False),
    "train": lambda m: train(m, valued([0.0] * 16), TrainConfig(), progress=False),
}


class MyLlama(LlamaForCausalLM):
    """A user's own."""


class MyBert(BertForSequenceClassification):
    """A user's own."""


def test_the_kinds_that_are_known() -> None:
    assert (
        head_kind(built(AutoModelForCausalLM, "GPT2", n_embd=16, n_layer=1, n_head=2)) == "causal"
    )
    small = transformers.LlamaConfig(**COMMON)
    assert head_kind(MyLlama(small)) == head_kind(adapted(MyLlama(small))) == "causal"
    for name, problem, outputs in (
        ("classes", None, 3), ("classes", "single_label_classification", 3),
        ("regression", None, 1), ("regression", "regression", 1), ("regression", "regression", 3),
    ):  # fmt: skip
        config = transformers.BertConfig(**COMMON, num_labels=outputs, problem_type=problem)
        model = MyBert(config)
        assert head_kind(model) == name
        assert head_kind(adapted(model)) == name
        assert not is_causal(model)


T5: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
    "pad_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "eos_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "T5ForConditionalGeneration": (T5, "is an encoder-decoder", r"\.\.\.ForCausalLM"),
    "T5Model": (T5, "is an encoder-decoder", r"\.\.\.ForCausalLM"),
    "BartForConditionalGeneration": (BART, "is an encoder-decoder", r"\.\.\.ForCausalLM"),
    "BartModel": (BART, "is an encoder-decoder", r"\.\.\.ForCausalLM"),
    "BartForQuestionAnswering": (BART, "a part of a text", "ForCausalLM"),
    "BertForTokenClassification": (COMMON, "labels each token", "ForSequenceClassification"),
    "LlamaForTokenClassification": (COMMON, "labels each token", "ForSequenceClassification"),
    "BertForQuestionAnswering": (COMMON, "a part of a text", "ForCausalLM"),
    "LlamaForQuestionAnswering": (COMMON, "a part of a text", "ForCausalLM"),
    "BertForMultipleChoice": (COMMON, "several texts at once", "ForSequenceClassification"),
    "BertForMaskedLM": (COMMON, "fills gaps", "ForSequenceClassification"),
    "ModernBertForMaskedLM": (COMMON, "fills gaps", "ForSequenceClassification"),
    "BertForPreTraining": (COMMON, "fills gaps", "ForSequenceClassification"),
    "BertForNextSentencePrediction": (COMMON, "fills gaps", "ForSequenceClassification"),
    "BertModel": (COMMON, "has no head", "ForSequenceClassification"),
    "ModernBertModel": (COMMON, "has no head", "ForSequenceClassification"),
    "DistilBertModel": (COMMON | {"dim": 16, "n_heads": 2}, "has no head", "num_labels"),
    "LlamaModel": (COMMON, "has no head", "AutoModelForCausalLM"),
    "GPT2Model": ({"n_embd": 16, "n_layer": 1, "n_head": 2}, "has no head", "AutoModelForCausalLM"),
    "BertLMHeadModel": (COMMON, "sees the tokens that it is to predict", "is_decoder=True"),
    "RobertaForCausalLM": (COMMON, "sees the tokens that it is to predict", "is_decoder=True"),
    "ViTForImageClassification": (
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 8, "image_size": 8, "patch_size": 4},
        "more than text", "text alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_head_is_refused_with_advice_of_its_kind(name: str) -> None:
    settings, what, fix = OTHERS[name]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings)).eval()
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules()
                     if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"})  # fmt: skip
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=linear[:1]))
    for call in (head_kind, *DOORS.values()):
        for given in (model, lora):
            with pytest.raises(ModelError, match=rf"{what}.*got: {name}\b.*fix: .*{fix}"):
                call(given)


@pytest.mark.parametrize("part", ["vision_config", "audio_config"])
def test_a_model_that_reads_more_than_text(part: str) -> None:
    class SomeForConditionalGeneration(nn.Module):
        config = type("Config", (), {part: {}, "model_type": "some"})()

    with pytest.raises(ModelError, match="reads more than text; got: SomeForCond"):
        head_kind(SomeForConditionalGeneration())


def test_a_model_of_ones_own() -> None:
    with pytest.raises(ModelError, match="none of transformers; got: Linear"):
        head_kind(nn.Linear(2, 2))

    class AutoModelForCausalLMWithValueHead(nn.Module):
        config = transformers.LlamaConfig(**COMMON)

    with pytest.raises(ModelError, match=r"value head.*fix: .*model\.pretrained_model"):
        head_kind(AutoModelForCausalLMWithValueHead())


@pytest.mark.parametrize("call", [head_kind, *DOORS.values()], ids=["head_kind", *DOORS])
def test_a_mixed_model_is_refused_by_name(call: Any) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    mixed = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ModelError, match=r"mixed model.*got: PeftMixedModel.*without mixed=True"):
        call(mixed)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_tokens_before_a_text_are_refused_where_each_is_predicted(kind: Any) -> None:
    def prompted(base: Any, task: str, kind: Any = kind) -> Any:
        return get_peft_model(base, kind(task_type=task, num_virtual_tokens=2)).eval()

    tuned = prompted(built(AutoModelForCausalLM, "Llama"), "CAUSAL_LM")
    for measure in (lambda: measure_forgetting(tuned, text_rows()),
                    lambda: retain.measure_answers(tuned, ["a"])):  # fmt: skip
        with pytest.raises(ModelError, match=r"tokens of its own.*got: .* P\w*_TUNING"):
            measure()
    cached = prompted(built(AutoModelForCausalLM, "Llama"), "CAUSAL_LM", PrefixTuningConfig)
    assert measure_forgetting(cached, text_rows()).kl > 0
    assert measure_forgetting(prompted(classifier(), "SEQ_CLS"), ROWS).kl > 0  # one label a text


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("problem", "outputs", "what"),
    [("multi_label_classification", 3, "labels do not exclude each other"),
     ("multi_label_classification", 1, "labels do not exclude each other"),
     ("single_label_classification", 1, "one class says nothing")],
)  # fmt: skip
def test_problems_that_are_no_softmax(door: str, problem: str, outputs: int, what: str) -> None:
    model = adapted(classifier(num_labels=outputs))
    model.config.problem_type = problem
    with pytest.raises(ModelError, match=what):
        DOORS[door](model)
    curvature = fit_curvature(adapted(classifier()), ROWS, structure="identity", progress=False)
    with pytest.raises(ModelError, match=what):
        retain.Retention(model, curvature)
    with pytest.raises(ModelError, match=what):
        with_callback(model, curvature, [0] * 16, None).train()


SEVERAL: dict[str, Any] = {
    "floats": [0.0, 1.0, 1.0], "whole": [0, 1, 1], "flags": [True, False, True],
    "indices": [0, 2], "none of them": [], "tuple": (0.0, 1.0, 0.0), "tensor": torch.ones(3),
    "array": torch.ones(3).numpy(),
}  # fmt: skip


@pytest.mark.parametrize("key", ["label", "labels"])
@pytest.mark.parametrize("name", SEVERAL)
def test_labels_of_which_several_are_right_are_found_in_the_rows(name: str, key: str) -> None:
    rows = [*ROWS[:1], {"input_ids": [3, 4], key: SEVERAL[name]}, *ROWS[2:]]
    for call in READERS.values():
        model = adapted(classifier())
        with pytest.raises(ModelError, match=r"do not exclude each other; got: . labels in row 2"):
            call(model, rows)
        assert model.config.problem_type is None


@pytest.mark.parametrize("start", ["auto", None])
@pytest.mark.parametrize(
    ("labels", "kind"),
    [([[0.0, 1.0, 1.0]] * 16, torch.float32), ([[0.0, 1.0, 1.0]] * 16, torch.bfloat16),
     ([[0, 1, 1]] * 16, torch.long)],
)  # fmt: skip
def test_labels_of_which_several_are_right_are_found_before_the_first_loss(
    labels: Any, kind: torch.dtype, start: Any
) -> None:
    model = adapted(classifier())
    curvature = fit_curvature(model, text_rows(), progress=False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ModelError, match="labels do not exclude each other"):
        with_callback(model, curvature, labels, kind, start=start).train()
    assert model.config.problem_type is None
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("label", [3, 7, 2.5, float("nan"), float("inf")])
def test_a_class_that_the_head_lacks(label: float) -> None:
    rows = [*ROWS[:3], {"input_ids": [3, 4], "label": label}, *ROWS[4:]]
    match = (
        f"label of row 4 has no output; got: label {label:g}; allowed: whole numbers from 0 to 2"
    )
    for call in READERS.values():
        with pytest.raises(SourceError, match=match):
            call(adapted(classifier()), rows)
    model = adapted(classifier())
    curvature = fit_curvature(model, text_rows(), progress=False)
    if label in (3, 7):
        with pytest.raises(SourceError, match=r"label of tokenised row 4 has no output"):
            train(model, valued([0, 0, 0, label]), TrainConfig(batch_size=4), progress=False)
        with pytest.raises(SourceError, match=r"label of batch row . has no output"):
            with_callback(model, curvature, [int(label)] * 16, torch.long).train()


def test_labels_that_are_there_or_not() -> None:
    model = classifier()
    check_labels(model, [0, 2, None, "", -1, "1", True, 1.0, torch.tensor(2), [1]])
    check_labels(built(AutoModelForCausalLM, "Llama"), [99, [1, 2]])
    check_labels(classifier(num_labels=1), [0.5, "0.7", -3, None])
    with pytest.raises(SourceError, match="label of row 2 is not finite"):
        check_labels(classifier(num_labels=1), [0.5, float("nan")])


def test_a_callback_lets_whole_labels_and_ignored_ones_pass() -> None:
    model = adapted(classifier())
    curvature = fit_curvature(model, text_rows(), progress=False)
    with_callback(model, curvature, [-100, *[1] * 15], torch.long).train()


# regressions


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_the_kl_of_a_regression_is_half_the_squared_change(family: str, outputs: int) -> None:
    model = regression(family, outputs)
    assert measure_forgetting(model, text_rows()).kl == 0
    move(model, 3)
    batch = next(batches(valued(), 16, pad_id(model)))
    with torch.no_grad():
        tuned = forward_logits(model, batch)
        with adapter_off(model):
            base = forward_logits(model, batch)
    want = float(0.5 * (tuned - base).square().sum(-1).mean())
    found = measure_forgetting(model, text_rows(), batch_size=5)
    assert found.kl == pytest.approx(want, rel=1e-9)
    assert found.kl_interval[0] < found.kl < found.kl_interval[1]
    assert found.tokens == 16
    assert found.flips != found.flips and found.ppl != found.ppl  # NaN: there are no classes
    assert Reference(model, valued()).measure(model).kl == pytest.approx(want, rel=1e-9)


def gradients(model: Any) -> dict[str, list[torch.Tensor]]:
    """Of each row and output, the gradient in each effective weight."""
    found: dict[str, list[torch.Tensor]] = {s.name: [] for s in lora_sites(model)}
    for example in valued():
        batch = collate([example], pad_id(model))
        weights = [s.layer.get_base_layer().weight.requires_grad_(True) for s in lora_sites(model)]
        outputs = forward_logits(model, batch)[0]
        for value in outputs:
            grads = torch.autograd.grad(value, weights, retain_graph=True)
            for site, g in zip(lora_sites(model), grads, strict=True):
                found[site.name].append(g)
    return found


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_exact_fisher_of_a_regression_is_the_jacobians(outputs: int) -> None:
    model = regression(outputs=outputs)
    curvature = fit_curvature(model, valued(), structure="diagonal", fisher="exact", progress=False)
    sampled = fit_curvature(model, valued(), structure="diagonal", samples=200, progress=False)
    for name, rows in gradients(model).items():
        want = torch.stack(rows).square().sum(0) / 16
        assert relative(curvature.blocks[name].values, want) < 1e-9
        assert relative(sampled.blocks[name].values, want) < 0.3
    one = fit_curvature(model, valued(), structure="diagonal", progress=False)
    if outputs == 1:  # a random sign has no noise in its square
        for name in one.blocks:
            assert relative(one.blocks[name].values, curvature.blocks[name].values) < 1e-9


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "shampoo", "tridiagonal", "activation"])
def test_what_a_small_change_of_a_regression_costs_is_foretold(structure: Any) -> None:
    model = regression()
    curvature = fit_curvature(model, valued(), structure, fisher="exact", progress=False)
    for site in lora_sites(model):
        with torch.no_grad():
            site.b.normal_(0, 1e-4, generator=torch.Generator().manual_seed(len(site.name)))
    told, true = curvature.quadratic(model), measure_forgetting(model, text_rows()).kl
    assert 0.1 < told / true < 10


@pytest.mark.parametrize("fisher", ["empirical", "reversed"])
def test_labels_of_a_regression_are_no_fisher(fisher: Any) -> None:
    with pytest.raises(CurvatureError, match="a regression has no labels of this kind"):
        fit_curvature(regression(), valued(), fisher=fisher, progress=False)


def test_temper_divides_a_regression() -> None:
    model = regression()
    plain, cooled = (
        fit_curvature(model, valued(), structure="diagonal", progress=False, **options)
        for options in ({}, {"fisher": "tempered", "temperature": 2.0})
    )
    for name, block in plain.blocks.items():
        assert relative(4 * cooled.blocks[name].values, block.values) < 1e-9


def test_a_fitted_regression_says_what_the_labels_say() -> None:
    model = classifier(num_labels=1)
    told = [
        Example(
            tuple(2 + (5 * i + k) % 9 + 10 * (i % 3) for k in range(4)), (-0.7 + 1.3 * (i % 3),)
        )  # type: ignore[arg-type]
        for i in range(24)
    ]
    found = fit_head(model, told, progress=False)
    batch = next(batches(told, 24, 1))
    with torch.no_grad():
        said = forward_logits(model, batch)[:, 0]
    assert found.placed
    assert float((said - batch.targets).square().mean()) < 0.2 * float(batch.targets.var())
    rows = [{"input_ids": [2, 3], "label": None}, {"input_ids": [2, 4], "label": ""}, *ROWS]
    assert fit_head(classifier(num_labels=1), rows, progress=False).rows == 16
    with pytest.raises(SourceError, match="too little to fit a head on; got: 0 rows"):
        fit_head(classifier(num_labels=1), rows[:2], progress=False)


def test_several_outputs_have_no_labels_of_one_number() -> None:
    model = regression(outputs=3)
    for call in (
        lambda: fit_head(model, valued(), progress=False),
        lambda: train(model, valued(), TrainConfig(batch_size=4), progress=False),
    ):
        with pytest.raises(ModelError, match=r"several outputs.*fix: num_labels=1"):
            call()


def test_a_regression_is_trained_by_its_squared_error() -> None:
    model = regression()
    result = train(
        model, valued(), TrainConfig(batch_size=16, epochs=1, learning_rate=1e-3), progress=False
    )
    batch = next(batches(valued(), 16, 1))
    with adapter_off(model), torch.no_grad():
        want = float((forward_logits(model, batch)[:, 0] - batch.targets).square().mean())
    assert result.history[0]["loss"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    "more", [{}, {"start": None}, {"budget": 1e-4, "source": text_rows(), "start": None}]
)
def test_the_callback_holds_a_regression(outputs: int, more: dict[str, Any]) -> None:
    labels: Any = VALUES if outputs == 1 else [[v] * outputs for v in VALUES]

    def moved(strength: float) -> float:
        model = regression(outputs=outputs)
        curvature = fit_curvature(model, text_rows(), progress=False)
        for name, p in model.named_parameters():
            p.requires_grad_(".lora_" in name)
        held = {"strength": strength} | ({} if strength else {"start": None})
        options = held if not strength else held | more
        run = with_callback(model, curvature, labels, torch.float64, **options)
        run.args.max_steps, run.args.learning_rate = 20, 0.02
        run.train()
        return measure_forgetting(model, text_rows()).kl

    free, kept = moved(0.0), moved(300.0)
    assert 0 < kept < 0.5 * free
    if "budget" in more:
        assert kept <= 1.3e-4


def test_a_reward_model_is_held() -> None:
    model = regression("Llama")
    curvature = fit_curvature(model, text_rows(), progress=False)
    items = [{"input_ids": r["input_ids"]} for r in ROWS]

    class Pairs(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            good, bad = model(**inputs).logits[:, 0].chunk(2)
            return -nn.functional.logsigmoid(good - bad).mean()

    def gathered(rows: Any) -> dict[str, torch.Tensor]:
        both = [Example(tuple(r["input_ids"]), (0,)) for r in rows] * 2
        return collate(both, 1).inputs

    held = retain.RetentionCallback(curvature)
    trainer(model, items, gathered, held, Pairs).train()
    assert held.retention is not None
    assert held.retention.predicted() >= 0


def test_wrong_columns_are_refused() -> None:
    with pytest.raises(ConfigError, match="a regression has one output"):
        train(classifier(), valued(), TrainConfig(), columns=slice(0, 2), regression=True)
