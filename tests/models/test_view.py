"""A view says of a model what the functions that it keeps the answers of say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retain.data.batches import Example
from retain.errors import ModelError, SourceError
from retain.models.forward import forward_logits
from retain.models.sites import lora_sites
from retain.models.view import ModelView
from tiny import KINDS, ROWS, base, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_says(kind: str) -> None:
    model = tiny(kind, moved=True)
    view = ModelView(torch.nn.DataParallel(model))
    assert view.model is model and view.inner is model.get_base_model()
    assert (view.causal, view.regression) == (kind == "llama", False)
    assert view.head == ("causal" if kind == "llama" else "classes")
    assert (view.pad, view.device.type, view.dtype) == (0, "cpu", torch.float64)
    assert [s.name for s in view.lora] == [s.name for s in view.sites]
    assert [s.name for s in view.lora] == [s.name for s in lora_sites(model)]
    assert view.fingerprint == ModelView(base(kind)).fingerprint
    assert view.fingerprint != ModelView(base(kind, seed=1)).fingerprint
    model.float()
    assert view.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_rows_become_checked_batches_in_order_of_length(kind: str) -> None:
    view = ModelView(tiny(kind))
    examples = view.read(ROWS[kind], 3, max_length=9)
    assert len(examples) == 3
    assert set(view.read(examples, 2, max_length=9)) < set(examples)
    first, last = view.batches(examples, 2)
    assert first.mask.sum(1).max() <= last.mask.sum(1).min()
    assert len(view.batches(examples, 99)) == 1
    with torch.no_grad(), view.evaluating():
        assert torch.equal(view.logits(first), forward_logits(view.model, first))
    with pytest.raises(SourceError, match="no row in the model's embedding"):
        view.read([Example((2, 99), (2, 99), (True, True))] * 4, 4, max_length=9)


def test_a_tokenizer_is_the_given_one_or_the_models_own() -> None:
    model: Any = base("llama")
    assert ModelView(model).tokenizer is None
    mine, theirs = object(), object()
    model.retain_tokenizer = theirs
    view = ModelView.of(model)
    assert view.tokenizer is theirs
    assert ModelView.of(view) is view is ModelView.of(view, theirs)  # type: ignore[arg-type]
    assert ModelView.of(view, mine).tokenizer is mine  # type: ignore[arg-type]


def test_the_base_is_the_model_with_its_adapter_off() -> None:
    view, bare = ModelView(tiny("llama", moved=True)), ModelView(base("llama"))
    (batch,) = view.batches(view.read(ROWS["llama"], 4, max_length=9), 4)
    with torch.no_grad():
        assert not torch.equal(view.logits(batch), bare.logits(batch))
        with view.off():
            assert torch.equal(view.logits(batch), bare.logits(batch))
    with pytest.raises(ModelError, match="no adapter to switch off"), bare.off():
        pass


def test_the_old_place_of_sites_warns() -> None:
    from retain.models import adapter

    with pytest.warns(DeprecationWarning, match=r"lora_sites is now in retain\.models\.sites"):
        assert adapter.lora_sites is lora_sites
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adapter.nothing


def test_a_head_that_is_not_known_is_refused_when_it_is_asked_for() -> None:
    view = ModelView(base("llama").model)  # type: ignore[arg-type]
    assert view.pad == 0
    with pytest.raises(ModelError, match="has no head"):
        view.read(ROWS["llama"], 4, max_length=9)
