"""Measured forgetting: exactly nothing for an untouched adapter, and the KL for a moved one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from retain import measure_forgetting
from retain.errors import ModelError, SourceError
from retain.retention.measure import Forgetting
from tiny import KINDS, ROWS, base, tiny

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_adapter_has_forgotten_exactly_nothing(
    kind: str, dtype: torch.dtype, size: int
) -> None:
    model = tiny(kind, dtype=dtype, lora_dropout=0.3, dropout=0.3)
    model.train()  # dropout must not count as forgetting
    found = measure_forgetting(model, ROWS[kind], batch_size=size)
    assert found.kl == 0.0
    assert found.flips == 0.0
    assert found.kl_interval == (0.0, 0.0)
    assert found.ppl == found.ppl_base
    assert model.training


def predictions(model: Any, row: dict[str, Any], causal: bool) -> tuple[torch.Tensor, list[int]]:
    ids = row["input_ids"]
    with torch.no_grad():
        if causal:
            return model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1), ids[1:]
        return model(torch.tensor([ids])).logits.log_softmax(-1), [row["label"]]


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_adapter_measures_the_kl_from_the_base(kind: str, size: int) -> None:
    model, before = tiny(kind, moved=True), base(kind)
    first = predictions(model, ROWS[kind][0], kind == "llama")[0]
    found = measure_forgetting(model, ROWS[kind], batch_size=size)
    assert torch.equal(predictions(model, ROWS[kind][0], kind == "llama")[0], first)  # still on
    assert not model.training
    kl, flips, loss_base, loss, n = 0.0, 0, 0.0, 0.0, 0
    for row in ROWS[kind]:
        p, targets = predictions(before, row, kind == "llama")
        q, _ = predictions(model, row, kind == "llama")
        for t, target in enumerate(targets):
            kl += sum(
                math.exp(a) * (a - b) for a, b in zip(p[t].tolist(), q[t].tolist(), strict=True)
            )
            flips += int(p[t].argmax() != q[t].argmax())
            loss_base -= float(p[t, target])
            loss -= float(q[t, target])
            n += 1
    assert found.tokens == n
    assert found.kl == pytest.approx(kl / n, rel=1e-9)
    assert found.kl > 0
    assert found.flips == flips / n
    assert found.ppl_base == pytest.approx(math.exp(loss_base / n), rel=1e-9)
    assert found.ppl == pytest.approx(math.exp(loss / n), rel=1e-9)
    assert found.kl_interval[1] == pytest.approx(found.bound(0.975))
    assert found.kl_interval[0] == pytest.approx(max(0.0, 2 * found.kl - found.kl_interval[1]))


def test_the_bound_is_student_s_t_over_sequences() -> None:
    def bound(nats: list[float], sizes: list[int], confidence: float) -> float:
        kl = sum(nats) / sum(sizes)
        pairs = tuple(zip(nats, sizes, strict=True))
        return Forgetting(kl, (0, 0), 1, 1, 0, sum(sizes), pairs).bound(confidence)

    values = np.array([0.3, 0.1, 0.7, 0.2, 0.4])
    by_hand = values.mean() + stats.t.ppf(0.9, 4) * values.std(ddof=1) / math.sqrt(5)
    assert bound(list(values), [1] * 5, 0.9) == pytest.approx(by_hand)
    assert bound(list(values * 3), [3] * 5, 0.9) == pytest.approx(by_hand)
    assert bound(list(values), [1] * 5, 0.5) == pytest.approx(values.mean())
    assert bound([0.3], [4], 0.9) == math.inf
    # Of sequences that differ in length and in their nats per token, the bound is as often above
    # the true mean as it says.
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        sizes = random.integers(16, 129, 8)
        nats = sizes * random.gamma(6.0, 1.0 / 6.0, 8)  # of mean 1 a token
        covered += bound(list(nats), list(sizes), 0.95) >= 1.0
    assert covered / 2000 == pytest.approx(0.92, abs=0.03)  # somewhat less, for they are skewed


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ModelError, match="no adapter to switch off"):
        measure_forgetting(base("llama"), ROWS["llama"])
    with pytest.raises(SourceError, match="text that is given"):
        measure_forgetting(tiny("llama"), "self")


def test_rows_without_a_label_have_no_perplexity() -> None:
    model, rows = tiny("bert", moved=True), ROWS["bert"]
    bare = [{k: v for k, v in row.items() if k != "label"} for row in rows]
    found, whole = measure_forgetting(model, bare), measure_forgetting(model, rows)
    assert (found.kl, found.flips, found.tokens) == (whole.kl, whole.flips, whole.tokens)
    assert math.isnan(found.ppl) and math.isnan(found.ppl_base)
    some = measure_forgetting(model, [*rows[:2], *bare[2:]])
    assert some.ppl == pytest.approx(measure_forgetting(model, rows[:2]).ppl, rel=1e-9)
    assert some.kl == whole.kl
