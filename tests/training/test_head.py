"""A new head that is fitted to the model as it is."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import retain
from families import DEBERTA, ENCODERS, built
from families import FAMILIES as DECODERS
from retain import RetentionCallback, attach_lora, fit_curvature, fit_head
from retain.data.batches import collate
from retain.data.sources import encode
from retain.errors import ModelError, RetainWarning, SourceError
from tiny import base, exactly

FAMILIES: dict[str, dict[str, Any]] = {
    **ENCODERS,
    "DebertaV2": DEBERTA,
    **{name: DECODERS[name] for name in ("Llama", "Qwen3", "GPT2")},
}


def classifier(family: str, **changes: Any) -> Any:
    """One with features wide enough apart to be told."""
    wide = {"num_labels": 3, "initializer_range": 0.4, **FAMILIES[family], **changes}
    return built(AutoModelForSequenceClassification, family, **wide).eval()


def labelled(count: int = 24, classes: int = 3) -> list[dict[str, Any]]:
    """Rows of several lengths, whose class is in their tokens."""
    return [
        {"input_ids": [2 + (5 * i + k) % 9 + 10 * (i % classes) for k in range(3 + i % 3)],
         "label": i % classes}
        for i in range(count)
    ]  # fmt: skip


def answers(model: Any, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    examples = encode(rows, None, max_length=16, causal=False)
    pad = model.config.pad_token_id or 0
    with torch.no_grad():
        logits = [model(**collate([e], pad).inputs).logits for e in examples]
    return torch.cat(logits).double(), torch.tensor([e.targets[0] for e in examples])


def entropy(model: Any, rows: list[dict[str, Any]], columns: slice = slice(None)) -> float:
    logits, targets = answers(model, rows)
    return float(nn.functional.cross_entropy(logits[:, columns], targets))


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_predicts_better_and_nothing_else_has_changed(family: str, lora: bool) -> None:
    model = classifier(family)
    if lora:
        model = attach_lora(model, rank=2, targets="all-linear").eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    drawn = entropy(model, labelled())
    found = fit_head(model, labelled(), progress=False)
    assert entropy(model, labelled()) < min(0.9, drawn)
    assert found.rows == 24
    assert found.placed
    assert found.loss < found.known
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert 1 <= len(changed) <= 2
    assert all(before[n].shape[0] == 3 for n in changed)
    assert not model.training


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_other_columns_stay_to_the_bit(family: str) -> None:
    model = classifier(family)
    before, _ = answers(model, labelled(classes=2))
    fit_head(model, labelled(classes=2), columns=slice(1, 3), progress=False)
    after, _ = answers(model, labelled(classes=2))
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.equal(after[:, 1:], before[:, 1:])
    assert entropy(model, labelled(classes=2), slice(1, 3)) < 0.6


def test_dropout_plays_no_part_and_the_mode_is_put_back() -> None:
    weights = []
    for dropout in (0.0, 0.5):
        model = classifier("Bert", hidden_dropout_prob=dropout).train()
        fit_head(model, labelled(), progress=False)
        assert model.training
        weights.append(model.classifier.weight.detach())
    assert torch.equal(*weights)


def test_a_regression() -> None:
    model = classifier("Bert", num_labels=1).double()
    rows = encode(labelled(), None, max_length=16, causal=False)
    wanted = [-1.5 + 0.5 * len(e.tokens) for e in rows]
    rows = [type(e)(e.tokens, (value,)) for e, value in zip(rows, wanted, strict=True)]  # type: ignore[arg-type]
    found = fit_head(model, rows, progress=False)
    with torch.no_grad():
        got = torch.cat([model(**collate([e], 1).inputs).logits[:, 0] for e in rows])
    aim = torch.tensor(wanted, dtype=torch.float64)
    assert float((got - aim).square().mean()) < float(aim.var()) / 2
    assert found.loss < float(aim.var())


def test_at_most_so_many_rows() -> None:
    model = classifier("Bert")
    assert fit_head(model, labelled(30), rows=10, progress=False).rows == 10
    unlabelled = [{**row, "label": None} for row in labelled(12)]
    assert fit_head(model, [*labelled(12), *unlabelled], progress=False).rows == 12


def test_what_it_refuses() -> None:
    with pytest.raises(ModelError, match="no new head"):
        fit_head(base("llama"), labelled(), progress=False)
    model = classifier("Bert")
    with pytest.raises(SourceError, match="a label has no output; got: label 2; allowed: 0 to 1"):
        fit_head(model, labelled(), columns=slice(0, 2), progress=False)
    with pytest.raises(SourceError, match="too little to fit a head on; got: 1 rows"):
        fit_head(model, labelled(1), progress=False)
    model.classifier = nn.Sequential(model.classifier, nn.Tanh())
    with pytest.raises(
        ModelError, match=r"does not end in a linear layer.*--parts rows,filter,force"
    ):
        fit_head(model, labelled(), progress=False)


def test_where_the_features_tell_nothing_the_head_stays_as_it_was_drawn() -> None:
    model = classifier("Bert")
    before = {n: p.clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": [2, 3, 4], "label": i % 3} for i in range(24)]
    found = fit_head(model, rows, progress=False)
    assert not found.placed
    assert found.loss >= 0.99 * found.known
    exactly(dict(model.named_parameters()), before)


def test_it_is_public() -> None:
    assert retain.fit_head is fit_head


@pytest.mark.parametrize("inside", [False, True])
def test_a_head_that_a_trainer_draws_anew_is_said(inside: bool, tmp_path: Path) -> None:
    """``model_init`` makes the model anew, as each trial of a search does."""

    def model_init() -> Any:
        model = classifier("Bert")
        if inside:
            fit_head(model, labelled(), progress=False)
        return attach_lora(model, rank=2, targets="all-linear")

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=1, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    run = Trainer(model_init=model_init, args=arguments, train_dataset=labelled())
    if not inside:
        fit_head(run.model, labelled(), progress=False)
    run.add_callback(RetentionCallback(fit_curvature(run.model, labelled(), progress=False)))
    told = pytest.warns(RetainWarning, match="call fit_head inside of model_init")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetainWarning)
        with nullcontext() if inside else told:
            run.train()
