"""The plan's arithmetic, by hand and against real blocks; its layers, against real models."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.fit.capture import shared_inputs
from retain.curvature.plan import cost, kept_bytes
from retain.data.batches import Batch
from retain.errors import ConfigError, CurvatureError, ModelError
from retain.models.lora import attach_lora
from retain.models.sites import lora_sites
from retain.models.skeleton import Outline, load_skeleton, outline
from tiny import STRUCTURES

LAYERS = {"q": (4, 6), "k": (2, 6), "o": (6, 4)}
SHARED = {"q": "q", "k": "q", "o": "o"}
SMALL = Outline("Small", 200, linear=100, head=10, layers=LAYERS, shared=SHARED)


class TestNumbers:
    """All by hand, for two layers that share an input of 6 and a third after them."""

    @pytest.mark.parametrize(
        ("structure", "numbers"),
        [
            ("identity", 1),
            ("diagonal", 24 + 12 + 24),
            ("kfac", (36 + 16) + (16 + 4 + 36)),
            ("shampoo", (36 + 36 + 16) + (16 + 4 + 36)),
            ("ekfac", 108 + 60),
            ("activation", (36 + 16) + 3),
            ("tridiagonal", 108 + 4 * 2 + (2 * 6 + 6 * 4)),
        ],
    )
    def test_whole_factors(self, structure: str, numbers: int) -> None:
        assert kept_bytes(structure, LAYERS, SHARED) == 4 * numbers
        assert kept_bytes(structure, LAYERS, SHARED, fitting=True) == 4 * numbers

    @pytest.mark.parametrize(
        ("structure", "rank", "stored", "fitting"),
        [
            # rank 2 sketches 6 (19 numbers, 14 columns in the fit) and 4 (13, 12), and not 2
            ("kfac", 2, (19 + 13) + (13 + 4 + 19), (96 + 56) + (56 + 4 + 96)),
            ("shampoo", 2, (19 + 19 + 13) + (13 + 4 + 19), (96 + 96 + 56) + (56 + 4 + 96)),
            ("activation", 2, (19 + 13) + 3, (96 + 56) + 3),
            ("kfac", 3, (25 + 16) + (16 + 4 + 25), (96 + 16) + (16 + 4 + 96)),
            ("kfac", 4, 108, 108),
            ("identity", 2, 1, 1),
            ("diagonal", 2, 60, 60),
        ],
    )
    def test_sketches(self, structure: str, rank: int, stored: int, fitting: int) -> None:
        assert kept_bytes(structure, LAYERS, SHARED, rank) == 4 * stored
        assert kept_bytes(structure, LAYERS, SHARED, rank, fitting=True) == 4 * fitting

    def test_a_pooled_layer_has_no_link(self) -> None:
        found = kept_bytes("tridiagonal", LAYERS, SHARED, pooled={"o"})
        assert found == 4 * (108 + 4 * 2)

    @pytest.mark.parametrize("structure", ["ekfac", "tridiagonal"])
    def test_no_sketches(self, structure: str) -> None:
        assert cost(structure, SMALL, factor_rank=2) is None
        with pytest.raises(ConfigError, match="kfac, shampoo, activation"):
            kept_bytes(structure, LAYERS, SHARED, 2)

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'kfac'"):
            cost("kafc", SMALL)
        with pytest.raises(ConfigError, match="factor rank is too small; got: 0"):
            cost("kfac", SMALL, factor_rank=0)


class TestWork:
    @pytest.mark.parametrize(
        ("structure", "work"),
        [  # two passes of 100, traces of 60 (no Gram matrix is cheaper), and the products
            ("identity", 200 + 60),
            ("diagonal", 200 + 60 + 60),
            ("kfac", 200 + 60 + 108),
            ("shampoo", 200 + 60 + 128 * (12 + 10) + 128 * (12 + 16) + 144),
            ("ekfac", 2 * (200 + 60) + 108 + 60 + 108),
            ("activation", 100 - 10 + 25 + 52),
            ("tridiagonal", 200 + 60 + 152),
        ],
    )
    def test_of_a_fit(self, structure: str, work: int) -> None:
        found = cost(structure, SMALL)
        assert found is not None
        assert found.fit_work == work
        assert found.passes == work / 200

    @pytest.mark.parametrize(
        ("structure", "work", "reads"),
        [
            ("identity", 8 * 28, 1),
            ("diagonal", (3 * 2 + 1) * 60, 60),
            ("kfac", 2 * 144 + 8 * 28, 108),
            ("shampoo", 2 * 144 + 8 * 28, 144),
            ("ekfac", 4 * 144 + (3 * 2 + 1) * 60, 2 * 144 + 60),
            ("activation", 2 * 88 + 8 * 28, 52 + 3),
            ("tridiagonal", 512 + 4 * (44 + 36) + 8 * (18 + 18), 108 + 2 * (44 + 36)),
        ],
    )
    def test_of_a_step(self, structure: str, work: int, reads: int) -> None:
        found = cost(structure, SMALL, rank=2, tokens=10)
        assert found is not None
        assert (found.step_work, found.step_reads) == (work, 4 * reads)
        assert found.step_overhead == work / (10 * (200 + 3 * 2 * 28))

    def test_of_sketches(self) -> None:
        found = cost("kfac", SMALL, rank=2, factor_rank=2)
        assert found is not None
        six, four, two = 2 * 14 * 6, 2 * 12 * 4, 2 * 2
        assert found.fit_work == 200 + 60 + (six + four) + (four + two + six)
        six, four = 2 * 2 * 6 + 6, 2 * 2 * 4 + 4
        assert found.step_work == 2 * (3 * six + 2 * four + two) + 8 * 28
        assert found.step_reads == 4 * (2 * six + 2 * four + two)

    def test_grams_are_counted_where_they_are_cheaper(self) -> None:
        layers, shared = {"a": (500, 600), "b": (700, 600)}, {"a": "a", "b": "a"}
        found = cost("identity", Outline("Wide", 0, 10**6, 0, layers, shared))
        assert found is not None
        assert found.fit_work == 2 * 10**6 + 128 * (600 + 500 + 700)

    def test_a_block_does_the_multiply_adds_that_are_planned(self) -> None:
        d_out, d_in, r = 40, 30, 3
        block = KroneckerBlock(torch.eye(d_in), torch.eye(d_out))
        counter = FlopCounterMode(display=False)
        with counter:
            block.thin(torch.ones(d_out, r), torch.ones(r, d_in))
        model = Outline("One", 0, d_out * d_in, 0, {"w": (d_out, d_in)}, {"w": "w"})
        found = cost("kfac", model, rank=r)
        assert found is not None
        assert counter.get_total_flops() == 2 * found.step_work


SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
GROUPED = SIZE | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = {"q_proj k_proj v_proj", "gate_proj up_proj"}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}
LATE = {"bos_token_id": 1, "eos_token_id": 2}

KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": (GROUPED, GATED),
    "qwen2": (GROUPED, GATED),
    "mistral": (GROUPED, GATED),
    "gemma": (GROUPED | {"head_dim": 8}, GATED),
    "gpt_neox": (SIZE | LATE, set()),
    "phi": (SIZE | LATE, {"q_proj k_proj v_proj fc1"}),
    "gpt2": (GPT2 | LATE, set()),
    "bert": (SIZE, {"query key value"}),
    "roberta": (SIZE | {"pad_token_id": 0}, {"query key value"}),
    "distilbert": (DISTIL, {"q_lin k_lin v_lin"}),
}


def written(kind: str, folder: Path, **settings: Any) -> tuple[Path, Any]:
    config: Any = tf.AutoConfig.for_model(kind, **settings)
    config.save_pretrained(folder)
    return folder, config


def groups(found: Outline) -> set[str]:
    """Layers that share an input, by the last parts of their names."""
    readers: dict[str, list[str]] = {}
    for name, first in found.shared.items():
        readers.setdefault(first, []).append(name.rsplit(".", 1)[-1])
    return {" ".join(names) for names in readers.values() if len(names) > 1}


def on_meta(model: torch.nn.Module) -> bool:
    return all(t.device.type == "meta" for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_are_those_of_a_real_model(kind: str, tmp_path: Path) -> None:
    settings, sharing = KINDS[kind]
    folder, config = written(kind, tmp_path, **settings)
    skeleton = load_skeleton(folder)
    assert on_meta(skeleton)
    found = outline(skeleton, rank=2)
    assert on_meta(skeleton)
    assert (found.notes, groups(found)) == ((), sharing)

    encoder = kind in {"bert", "roberta", "distilbert"}
    auto: Any = tf.AutoModelForSequenceClassification if encoder else tf.AutoModelForCausalLM
    real = auto.from_config(config).eval()
    assert (found.kind, found.parameters) == (type(real).__name__, real.num_parameters())
    adapted = attach_lora(real, rank=2)
    sites = lora_sites(adapted)
    assert found.layers == {site.name: site.shape for site in sites}
    assert list(found.layers) == [site.name for site in sites]
    ids = torch.arange(10).reshape(2, 5) + 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    predict = None if encoder else torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(inputs, predict, ids.reshape(-1), [5, 5], [0, 1])
    layers: dict[str, Any] = {site.name: site.layer for site in sites}
    assert found.shared == shared_inputs(adapted, layers, batch)
    assert found.pooled == (frozenset({"bert.pooler.dense"}) if kind == "bert" else frozenset())


class TestSize:
    def test_all_linear_layers_count(self, tmp_path: Path) -> None:
        found = outline(load_skeleton(written("llama", tmp_path, **GROUPED)[0]), rank=2)
        layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
        assert (found.linear, found.head) == (2 * layer + 50 * 32, 50 * 32)

    def test_the_experts_that_a_token_meets_count(self, tmp_path: Path) -> None:
        settings = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
        folder, _ = written("mixtral", tmp_path, **settings)
        with pytest.raises(ModelError, match=r"a bare parameter .*--targets"):
            outline(load_skeleton(folder))
        found = outline(load_skeleton(folder), targets=["q_proj", "k_proj", "v_proj", "o_proj"])
        layer = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 3 * 32 * 48
        assert (found.linear, len(found.layers)) == (2 * layer + 50 * 32, 8)
        assert (found.notes, groups(found)) == ((), {"q_proj k_proj v_proj"})

    def test_classifiers(self, tmp_path: Path) -> None:
        folder, _ = written("llama", tmp_path, **GROUPED)
        found = outline(load_skeleton(folder, num_labels=7))
        assert (found.kind, found.head) == ("LlamaForSequenceClassification", 0)
        assert len(found.layers) == 14

    def test_a_llama_of_8_billion_weights(self, tmp_path: Path) -> None:
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        }
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        skeleton = load_skeleton(path)
        found = outline(skeleton)
        costs = {k: cost(k, found, factor_rank=256) for k in STRUCTURES}
        usual = {k: cost(k, found) for k in STRUCTURES}
        seconds = time.perf_counter() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert seconds < 30
        assert grown < 2**20  # KiB: the weights would be 30 times that
        assert on_meta(skeleton)
        assert (found.parameters, len(found.layers)) == (8_030_261_248, 224)
        assert groups(found) == GATED
        kfac = costs["kfac"]
        assert kfac is not None
        assert kfac.stored_bytes == kept_bytes("kfac", found.layers, found.shared, 256)
        assert kfac.stored_bytes <= 3 * 2**30
        side = {d: d * 257 + 1 for d in (1024, 4096, 14336)}
        inputs = 3 * side[4096] + side[14336]
        outputs = 3 * side[4096] + 2 * side[1024] + 2 * side[14336]
        assert kfac.stored_bytes == 4 * 32 * (inputs + outputs)
        narrow = 4 * 32 * 2 * (1024**2 - side[1024])  # k and v answer 1024 values: whole
        assert usual["kfac"] is not None
        assert usual["kfac"].stored_bytes == kfac.stored_bytes + narrow
        for name in ("ekfac", "tridiagonal"):  # which are never sketched
            assert usual[name] == cost(name, found, factor_rank=None)


class TestRefusals:
    def test_a_forward_pass_that_needs_numbers(self, tmp_path: Path) -> None:
        found = outline(load_skeleton(written("deberta-v2", tmp_path, **SIZE)[0]))
        assert all(name == first for name, first in found.shared.items())
        assert "no input is counted as shared" in found.notes[0]

    def test_a_layer_that_runs_twice(self, tmp_path: Path) -> None:
        with pytest.raises(CurvatureError, match="exactly once"):
            outline(load_skeleton(written("albert", tmp_path, **SIZE)[0]))

    def test_layers_that_peft_cannot_wrap(self, tmp_path: Path) -> None:
        skeleton = load_skeleton(written("distilbert", tmp_path, **DISTIL)[0])
        said = "not for LoRA; got: .*pre_classifier.*; allowed: all-linear, classifier, k_lin"
        with pytest.raises(ConfigError, match=said):
            outline(skeleton, targets=["pre_classifier"])

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"model_type": "vit"}, "a decoder, or an encoder"),
            ({"model_type": "nope"}, "unknown model"),
            ({"model_type": "llama", "hidden_size": "wide"}, "expected int, got str"),
            ({"model_type": "llama", "hidden_size": 33}, "not a multiple"),
            (
                {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
                "neither a decoder nor an encoder",
            ),
        ],
    )
    def test_a_configuration_without_a_model(
        self, config: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=said):
            load_skeleton(tmp_path)

    def test_a_built_in_name_needs_no_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RETAIN_CACHE", str(tmp_path))
        written("llama", tmp_path / "smollm2-135m", **GROUPED)
        assert len(outline(load_skeleton("smollm2-135m")).layers) == 14
