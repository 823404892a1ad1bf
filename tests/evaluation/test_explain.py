"""Which rows a model's predicted nats were spent on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from fits import fit
from retain import explain
from retain.data.batches import Example
from retain.errors import ConfigError, MismatchError, ModelError, RetainWarning, SourceError
from retain.models.lora import attach_lora
from retain.models.sites import lora_sites
from tiny import ROWS, base, move, tiny, weights

TASK: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 5, 6]}, {"input_ids": [1, 11, 3]}, {"input_ids": [7, 2, 8, 4, 9, 1]},
]  # fmt: skip


def learn(model: PeftModel, rows: list[Any], steps: int = 12, rate: float = 0.02) -> None:
    """Plain gradient steps on all rows at once, in B alone."""
    held = [site.b for site in lora_sites(model)]
    optimizer = torch.optim.SGD(held, lr=rate / len(rows))
    for _ in range(steps):
        optimizer.zero_grad()
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            (model(input_ids=ids, labels=ids).loss * (ids.numel() - 1)).backward()
        optimizer.step()


def test_the_parts_are_those_of_autograd_a_row_at_a_time() -> None:
    model = tiny("llama")
    curvature = fit(model, "llama")
    learn(model, TASK)
    sites = lora_sites(model)
    before = weights(model)
    found = explain(model, curvature, TASK)
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())

    def quadratic() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for site in sites:
            moved = (site.scaling * site.b @ site.a.detach()).flatten()
            total = total + 0.5 * moved @ curvature.blocks[site.name].to_dense() @ moved
        return total

    nats = quadratic()
    pull = torch.autograd.grad(nats, [site.b for site in sites])
    with torch.no_grad():
        for site in sites:
            site.b.mul_(0.5)
    parts = []
    for row in TASK:
        ids = torch.tensor([row["input_ids"]])
        loss = model(input_ids=ids, labels=ids).loss * (ids.numel() - 1)
        grads = torch.autograd.grad(loss, [site.b for site in sites])
        parts.append([-float((g * f).sum()) for g, f in zip(grads, pull, strict=True)])
    wanted = torch.tensor(parts, dtype=torch.float64)
    wanted *= float(nats) / wanted.sum()
    assert found.predicted == pytest.approx(float(nats))
    assert [r.row for r in found.rows] == wanted.sum(1).argsort(descending=True).tolist()
    for row in found.rows:
        assert row.nats == pytest.approx(float(wanted[row.row].sum()), rel=1e-4)
        assert row.share == pytest.approx(row.nats / found.predicted)
        names = [site.name.partition("model.layers.")[2] for site in sites]
        assert row.places[0][0] == names[int(wanted[row.row].argmax())]
        assert row.places[0][1] == pytest.approx(float(wanted[row.row].max()), rel=1e-4)
    assert sum(found.layers.values()) == pytest.approx(found.predicted)


def test_rows_that_are_left_out_are_counted() -> None:
    model = tiny("llama")
    curvature = fit(model, "llama")
    learn(model, TASK)
    with pytest.warns(RetainWarning, match="left out"):
        found = explain(model, curvature, [{"input_ids": [4]}, *TASK])
    wanted = [row.row + 1 for row in explain(model, curvature, TASK).rows]
    assert [row.row for row in found.rows] == wanted


def test_the_rows_that_moved_the_model_are_found() -> None:
    """One row in eight is not what the model says: without it, least is spent."""
    model = tiny("llama")
    curvature = fit(model, "llama")
    rows: list[Any] = []
    with torch.no_grad():
        for first in range(1, 9):
            ids = [first]
            for _ in range(5):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            rows.append({"input_ids": ids})
        last = model(input_ids=torch.tensor([[3, 3]])).logits[0, -1].argmin()
    rows[5] = {"input_ids": [3, int(last), 3, int(last), int(last), 3]}
    learn(model, rows, rate=0.01)
    found = explain(model, curvature, rows)
    assert found.rows[0].row == 5 and found.rows[0].tokens == 5
    spent = []
    for left_out in range(len(rows)):
        other = tiny("llama")
        learn(other, rows[:left_out] + rows[left_out + 1 :], rate=0.01 * 7 / 8)
        spent.append(curvature.quadratic(other))
    assert min(spent) == spent[5]


def test_rows_that_were_drawn_have_their_share_of_all() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(1, 13, (6,), generator=draw).tolist()} for _ in range(12)]
    model = tiny("llama")
    curvature = fit(model, "llama")
    learn(model, rows)
    whole = explain(model, curvature, rows)
    halves = [explain(model, curvature, rows[i::2], of=12) for i in (0, 1)]
    for half in halves:
        assert half.predicted == whole.predicted
        assert sum(row.nats for row in half.rows) == pytest.approx(whole.predicted / 2)
        assert sum(row.share for row in half.rows) == pytest.approx(0.5)
        assert sum(half.layers.values()) == pytest.approx(whole.predicted)
    with pytest.raises(ConfigError, match="of=5 and 12 rows"):
        explain(model, curvature, rows, of=5)


def test_what_cannot_be_explained_is_refused() -> None:
    model = tiny("llama")
    curvature = fit(model, "llama")
    path: Any = "c.safetensors"
    with pytest.raises(ConfigError, match=r"got: str 'c.safetensors'.*load_curvature"):
        explain(model, path, TASK)
    with pytest.raises(ModelError, match="learned nothing"):
        explain(model, curvature, TASK)
    learn(model, TASK)
    after = fit(model, "llama")
    with pytest.raises(MismatchError, match="an anchor at another point"):
        explain(model, after, TASK)
    with pytest.raises(MismatchError, match="adapter space"):
        explain(model, fit(tiny("llama"), "llama", space="adapter"), TASK)
    with pytest.raises(SourceError, match="a row predicts nothing"):
        explain(model, curvature, [Example((4, 5), (5, 0), (False, False))])
    with torch.no_grad():  # as far the other way
        for site in lora_sites(model):
            site.b.mul_(-1)
    with pytest.raises(ModelError, match="do not push the adapter to where it is"):
        explain(model, curvature, TASK)
    bert = tiny("bert", moved=True)
    with pytest.raises(ModelError, match="only rows of a language model"):
        explain(bert, curvature, ROWS["bert"])
    other = attach_lora(base("llama", seed=4), rank=2)
    move(other, seed=1)
    with pytest.raises(MismatchError):
        explain(other, curvature, TASK)
