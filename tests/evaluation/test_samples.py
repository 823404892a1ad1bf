"""Whatever reads a part of its rows reads a seeded draw of all of them, and never the first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import retain
from retain.curvature.fit.source import source_examples
from retain.data.batches import Example
from retain.data.draws import HELD_OUT, draw, sample
from retain.data.sources import encode
from retain.models.view import ModelView
from retain.training.probes import PROBE_ROWS, PROBE_SEED, probe_of
from tiny import tiny

COUNT, ASKED = 40, 6
ROWS: list[dict[str, Any]] = [
    {"input_ids": [2 + i % 11, 3 + i % 7, 4 + i % 5, 2 + i // 4 % 9], "label": i % 3}
    for i in range(COUNT)
]


def drawn(seed: int) -> list[dict[str, Any]]:
    return [ROWS[i] for i in draw(COUNT, ASKED, seed)]


def sources(folder: Path) -> list[Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [path, ROWS, iter(ROWS)]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_curvature(seed: int, tmp_path: Path) -> None:
    for source in [*sources(tmp_path), encode(ROWS, None, max_length=8, causal=True)]:
        found = source_examples(ModelView(tiny("llama")), source, ASKED, 8, seed)
        assert found == encode(drawn(seed), None, max_length=8, causal=True)
        assert found != encode(ROWS[:ASKED], None, max_length=8, causal=True)


@pytest.mark.parametrize("seed", [0, 3])
def test_a_fit(seed: int, tmp_path: Path) -> None:
    want = retain.fit_curvature(
        tiny("llama"), drawn(seed), rows=ASKED, batch_size=2, seed=seed, progress=False
    )
    for source in sources(tmp_path):
        found = retain.fit_curvature(
            tiny("llama"), source, rows=ASKED, batch_size=2, seed=seed, progress=False
        )
        assert replace(found.info, note="") == replace(want.info, note="")


def test_forgetting(tmp_path: Path) -> None:
    model = tiny("llama", moved=True)
    for seed in (HELD_OUT, 3):
        more = {} if seed == HELD_OUT else {"seed": seed}
        want = retain.measure_forgetting(model, drawn(seed))
        for source in sources(tmp_path):
            assert retain.measure_forgetting(model, source, rows=ASKED, **more) == want
    assert drawn(HELD_OUT) != drawn(0)  # other rows than a curvature's


def test_a_head(tmp_path: Path) -> None:
    def head(data: Any, **more: Any) -> torch.Tensor:
        model: Any = tiny("bert")
        retain.fit_head(model, data, seed=3, progress=False, **more)
        return model.base_model.model.classifier.weight.detach().clone()

    many = 24
    want = head([ROWS[i] for i in draw(COUNT, many, 3)])
    assert all(torch.equal(head(s, rows=many), want) for s in sources(tmp_path))


def test_the_probe_of_a_budget(tmp_path: Path) -> None:
    model = tiny("llama")
    curvature = retain.fit_curvature(model, ROWS, batch_size=4, progress=False)
    for source in sources(tmp_path):
        callback = retain.RetentionCallback(curvature, budget=0.1, source=source)
        found = probe_of(callback.recipe, ModelView(model), callback.source)
        want = [ROWS[i] for i in draw(COUNT, PROBE_ROWS, PROBE_SEED)]
        assert found == encode(want, None, max_length=8, causal=True)


class TestText:
    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.txt"
        path.write_text("".join(f"{i:05} words here.\n" for i in range(3000)))
        return path

    def test_passages(self, text: Path, tiny_folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)

        def places(seed: int) -> list[int]:
            found = source_examples(ModelView(model, tokenizer), text, ASKED, 32, seed)
            assert len(found) == ASKED
            assert all(len(e.tokens) == 31 for e in found)
            return [int(tokenizer.decode(e.tokens).split("\n")[0][:5]) for e in found]

        assert places(0) == places(0) == sorted(places(0))
        assert places(0) != places(1)
        assert max(max(places(seed)) for seed in range(4)) > 2000

    def test_pieces_of_a_short_one(self, tmp_path: Path, tiny_folder: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("".join(f"{i:03} " for i in range(200)))
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        found = source_examples(ModelView(model, tokenizer), path, ASKED, 32, 2)
        rows = [{"text": path.read_text(), "pack": True}]
        every = encode(rows, tokenizer, max_length=32, causal=True)
        assert len(every) == 25
        assert list(found) == sample(every, ASKED, 2) != every[:ASKED]

    def test_forgetting_on_a_long_one(self, text: Path, tiny_folder: Path) -> None:
        model = retain.attach_lora(AutoModelForCausalLM.from_pretrained(tiny_folder), rank=2)
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        found = retain.measure_forgetting(
            model, text, tokenizer=tokenizer, rows=ASKED, max_length=32
        )
        assert found.tokens == ASKED * 31


def test_examples_are_drawn_too() -> None:
    examples = [Example((i,), (i,), (True,)) for i in range(9)]
    assert [e.tokens[0] for e in sample(examples, 3, 5)] == list(draw(9, 3, 5))
