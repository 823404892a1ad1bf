"""The divergence on source rows: what it adds to gradients, on which rows, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import retain
from retain import OutputKL, Retention, fit_curvature
from retain.data.batches import Example
from retain.errors import ConfigError, ModelError, SourceError
from retain.models.off import adapter_off
from retain.models.sites import lora_sites
from retain.models.view import ModelView
from retain.retention import output_kl
from retain.retention.output_kl import Outputs, beginnings
from tiny import ROWS, base, move, relative, save_tiny, tiny


def moved() -> tuple[Any, list[Example]]:
    model = tiny("llama", lora_dropout=0.5)
    move(model, 3)
    rows = ModelView(model).read(ROWS["llama"], 4, max_length=16, seed=0, labels=False)
    return model, list(rows)


def test_every_second_step_has_the_gradient_of_the_divergence() -> None:
    model, rows = moved()
    trained = [w for site in lora_sites(model) for w in (site.a, site.b)]
    outputs = Outputs(ModelView(model), rows, OutputKL(3.0, every=2, batch=4))
    for w in trained:
        w.grad = torch.full_like(w, 100.0)
    outputs.add()
    got = [w.grad.clone() - 100.0 for w in trained if w.grad is not None]
    for w in trained:
        w.grad = torch.full_like(w, 1e-3)
    bounded = Outputs(ModelView(model), rows, OutputKL(3.0, every=2, batch=4))
    bounded.add()
    short = [w.grad.clone() - 1e-3 for w in trained if w.grad is not None]
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:  # one by one, and without what the package has for it
        ids = torch.tensor([row.tokens])
        with torch.no_grad(), adapter_off(model):
            p = model(input_ids=ids).logits.softmax(-1)
        q = model(input_ids=ids).logits.softmax(-1)
        total = total + (p * (p.log() - q.log())).sum()
        count += len(row.tokens)
    want = torch.autograd.grad(2 * 3.0 * total / count, trained)
    assert all(relative(g, w) < 1e-9 for g, w in zip(got, want, strict=True))
    length = sum(float(w.square().sum()) for w in want) ** 0.5
    most = 1e-3 * sum(w.numel() for w in trained) ** 0.5
    assert length > 2 * most  # so that it is made as long as what it is added to
    share = most / length
    assert all(relative(g, share * w) < 1e-6 for g, w in zip(short, want, strict=True))
    assert float(outputs.last) == pytest.approx(float(total) / count)
    before = [None if w.grad is None else w.grad.clone() for w in trained]
    outputs.add()  # the step between
    assert all(torch.equal(a, w.grad) for a, w in zip(before, trained, strict=True))  # type: ignore[arg-type]
    assert outputs.steps == 2


def test_rows_come_in_turn_and_where_a_training_was_left() -> None:
    model, rows = moved()
    outputs = Outputs(ModelView(model), rows, OutputKL(every=1, batch=3), seed=5)
    read = [row for time in range(4) for row in outputs._chosen(time)]
    for epoch in range(3):
        assert {id(r) for r in read[4 * epoch : 4 * epoch + 4]} == {id(r) for r in rows}
    assert read[:4] != read[4:8]
    later = Outputs(ModelView(model), rows, OutputKL(every=1, batch=3), seed=5, steps=2)
    later.add()
    assert later.steps == 3
    assert float(later.last) > 0


def test_of_chats_the_beginnings_of_answers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = moved()
    view = ModelView(model)
    chat = [9, 1, 2, 7, 8, 3, 4, 5, 6]  # 7 8 stands between what is asked and what is answered
    rows = [
        Example(tuple(ids[:-1]), tuple(ids[1:]), (True,) * (len(ids) - 1))
        for ids in (chat, [1, 2, 3], [4, 7, 8], [7, 8, 5])
    ]
    assert beginnings(view, rows, 2) == rows  # no tokenizer, so no chats
    view.tokenizer = object()  # type: ignore[assignment]
    monkeypatch.setattr(output_kl, "chat_form", lambda tokenizer: ([9], [7, 8]))
    first, second = beginnings(view, rows, 2)
    assert (first.tokens, first.targets) == ((9, 1, 2, 7, 8, 3), (1, 2, 7, 8, 3, 4))
    assert [t for t, p in zip(first.targets, first.predict, strict=True) if p] == [3, 4]
    assert [t for t, p in zip(second.targets, second.predict, strict=True) if p] == [5]
    assert beginnings(view, rows[1:3], 2) == rows[1:3]  # no answer in any of them


def test_what_is_refused() -> None:
    model, rows = moved()
    curvature = fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    with pytest.raises(SourceError, match="no text to be measured on"):
        Retention(model, curvature, kl=1.0)
    bert = tiny("bert")
    held = fit_curvature(bert, ROWS["bert"], batch_size=4, progress=False)
    with pytest.raises(ConfigError, match="a classifier's base has no answer"):
        Retention(bert, held, kl=1.0, source=rows)
    assert not any(hasattr(s.a, "_retain_held") for s in lora_sites(bert))  # nothing half held
    for options in ({"weight": -1.0}, {"every": 0}, {"batch": 0}, {"answers": -1}):
        with pytest.raises(ConfigError, match="out of range"):
            OutputKL(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_trainer_switches_on_is_nothing_to_it(dtype: torch.dtype) -> None:
    """Autocast, and layers that run their forward pass again, in the weights' own precision."""
    found = []
    for switched in (False, True):
        model = tiny("llama", dtype=dtype)
        move(model, 3)
        rows = ModelView(model).read(ROWS["llama"], 4, max_length=16, labels=False)
        outputs = Outputs(ModelView(model), rows, OutputKL(3.0, every=1))
        if switched:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        trained = [w for site in lora_sites(model) for w in (site.a, site.b)]
        for w in trained:
            w.grad = torch.full_like(w, 1e-3)
        with torch.autocast("cpu", torch.bfloat16, enabled=switched):
            outputs.add()
        found.append([w.grad for w in trained])
        assert model.training and float(outputs.last) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]
    assert any(bool((g != g.flatten()[0]).any()) for g in found[0])


def test_a_model_without_a_base_to_go_back_to_is_refused_as_training_begins() -> None:
    model, rows = moved()
    curvature = fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    beside = model.get_base_model().model.norm.weight.requires_grad_()
    full = base("llama").requires_grad_()
    whole = fit_curvature(full, ROWS["llama"], batch_size=4, progress=False)
    cases = (
        (full, whole, "no base to be measured from: the model has no adapter"),
        (model, curvature, "weights of the base that train beside it: 1, such as model.norm"),
    )
    for each, known, said in cases:
        with pytest.raises(ModelError, match=said):
            Retention(each, known, kl=1.0, source=rows, parts=["force"])
        assert not any(p._backward_hooks for p in each.parameters())
    beside.requires_grad_(False)
    beside.full_tensor = lambda: None  # what a DTensor has; it does not train
    Retention(model, curvature, kl=1.0, source=rows, parts=["force"]).finish()


@pytest.mark.shows("retain train", "KL on answers")
def test_a_run_and_the_month_after_it_read_the_source(tmp_path: Path) -> None:
    model, source, data = save_tiny(tmp_path / "m"), tmp_path / "source.jsonl", tmp_path / "d.jsonl"
    texts = [{"text": f"the cat sat on mat {i}"} for i in range(16)]
    rows = [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(8)]
    for path, lines in ((source, texts), (data, rows)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common: dict[str, Any] = {
        "data": data, "max_length": 16, "batch_size": 4, "quiet": True, "progress": False,
    }  # fmt: skip
    read: list[int] = []
    made = Outputs.__init__

    def counted(self: Outputs, view: Any, rows: Any, *args: Any, **options: Any) -> None:
        read.append(len(rows))
        made(self, view, rows, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outputs, "__init__", counted)
        first = retain.train_run(
            model=model, out=tmp_path / "a", source=source, kl=0.5, keep_state=True, rank=2,
            **common,
        )  # fmt: skip
        second = retain.continue_run(first.out, out=tmp_path / "b", **common)
    assert read == [16, 16]  # and not what the model writes
    config = second.record.config
    assert (config.kl, config.source) == (0.5, str(source))
