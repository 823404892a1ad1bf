"""An adapter cut from its files alone: equal to brute force, and to what PEFT loads of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import retain
from retain.errors import ModelError
from retain.models.saved import save_adapter, too_wide
from retain.models.sites import lora_sites
from tiny import base, move, tiny

PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 2, "down_proj": 3},
        "alpha_pattern": {"v_proj": 5, "down_proj": 1.5},
    },
}
PATTERNS["all"] = PATTERNS["rslora"] | PATTERNS["patterns"]


def saved(
    folder: Path, dtype: torch.dtype = torch.float64, *, moved: bool = True, **options: Any
) -> Path:
    """An adapter on the tiny decoder, as PEFT saves it."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | options
    )
    model = get_peft_model(base("llama", dtype=dtype), config, autocast_adapter_dtype=False)
    if moved:
        move(model, 1)
    model.save_pretrained(folder)
    return folder


def updates(folder: Path, kind: str = "llama") -> dict[str, Tensor]:
    """The update of each layer, as PEFT makes it."""
    model: Any = PeftModel.from_pretrained(base(kind), str(folder), autocast_adapter_dtype=False)
    return {s.name: s.scaling * (s.b.double() @ s.a.double()).detach() for s in lora_sites(model)}


def cut(dense: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def served(folder: Path, largest: int = 16) -> dict[str, Tensor]:
    """What a server applies that knows of an adapter what vLLM reads: a stand-in, not vLLM.

    From its settings ``r``, ``lora_alpha`` and ``use_rslora``, no pattern; no ``modules_to_save``,
    no DoRA, no bias; from its tensors pairs of ``lora_A.weight`` and ``lora_B.weight`` alone, of
    the layers in ``target_modules``. llama.cpp reads the same, but takes the rank of each tensor.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert not (config["modules_to_save"] or config["use_dora"] or config["bias"] != "none")
    assert config["r"] <= largest and not config["use_rslora"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)
        assert match and match[1].endswith(tuple(config["target_modules"])), key
        stem = key.removesuffix("lora_A.weight").removesuffix("lora_B.weight")
        a, b = tensors[f"{stem}lora_A.weight"], tensors[f"{stem}lora_B.weight"]
        assert a.shape[0] == b.shape[1] == config["r"]
        found[match[1]] = config["lora_alpha"] / config["r"] * (b.double() @ a.double())
    return found


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_it_is_the_shortest_cut_and_plain(name: str, rank: int, tmp_path: Path) -> None:
    before = updates(saved(tmp_path / "wide", **PATTERNS[name]))
    record = retain.compact(tmp_path / "wide", tmp_path / "out", rank, quiet=True)
    after, plain = updates(tmp_path / "out" / "adapter"), served(tmp_path / "out" / "adapter")
    assert before.keys() == after.keys() == plain.keys()
    lost = whole = 0.0
    for layer, dense in before.items():
        wanted = cut(dense, rank)
        torch.testing.assert_close(after[layer], wanted, rtol=0, atol=1e-12 * float(dense.norm()))
        torch.testing.assert_close(plain[layer], wanted, rtol=0, atol=1e-12 * float(dense.norm()))
        gap, every = float((dense - wanted).square().sum()), float(dense.square().sum())
        assert record["lost"]["layers"][layer] == pytest.approx(gap / every, abs=1e-12)
        lost, whole = lost + gap, whole + every
    assert record["lost"]["share"] == pytest.approx(lost / whole, abs=1e-12)
    worst = max(record["lost"]["layers"].values())
    assert record["lost"]["worst"]["share"] == worst
    widest = 6 if "rank_pattern" in PATTERNS[name] else 4
    assert record["rank"] == {"before": widest, "after": min(rank, widest)}
    assert (worst > 1e-9) == (rank < widest)


@pytest.mark.parametrize("start", ["orthogonal", "eva"])
def test_how_it_began_is_not_kept(
    start: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """PEFT draws an orthogonal start of even ranks alone, and warns of settings of another one."""
    before = updates(saved(tmp_path / "wide", torch.float32, init_lora_weights=start))
    retain.compact(tmp_path / "wide", tmp_path / "out", 3, quiet=True)
    recwarn.clear()
    after = updates(tmp_path / "out" / "adapter")
    assert not [str(w.message) for w in recwarn if "eva" in str(w.message)]
    for layer, found in after.items():
        torch.testing.assert_close(found, cut(before[layer], 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_precision_stays_and_what_fits_is_not_touched(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    saved(tmp_path / "wide", dtype, rank_pattern={"q_proj": 2})
    retain.compact(tmp_path / "wide", tmp_path / "same", 4, quiet=True)
    retain.compact(tmp_path / "wide", tmp_path / "cut", 3, quiet=True)
    old, same, less = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("wide", "same/adapter", "cut/adapter")
    )
    assert {t.dtype for found in (old, same, less) for t in found.values()} == {dtype}
    for key in old:
        if "q_proj" not in key:
            assert torch.equal(old[key], same[key])
    dense = updates(tmp_path / "wide")
    for layer, found in updates(tmp_path / "cut" / "adapter").items():
        gap = float((found - cut(dense[layer], 3)).norm() / dense[layer].norm())
        assert gap < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("others", [(), ("default",)])
def test_the_active_adapter_is_saved_whatever_its_name(
    others: tuple[str, ...], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base("llama"), config, "mine", autocast_adapter_dtype=False)
    for name in others:
        model.add_adapter(name, config)
    move(model, 1)
    save_adapter(model, tmp_path / "a", "tiny")
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    want = {s.name: s.scaling * (s.b @ s.a).detach() for s in lora_sites(model)}
    for found in (served(tmp_path / "a"), updates(tmp_path / "a")):
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_head_goes_along(tmp_path: Path) -> None:
    wide, out = tmp_path / "wide", tmp_path / "out" / "adapter"
    save_adapter(tiny("bert", moved=True, rank=4), wide, "b")
    record = retain.compact(wide, tmp_path / "out", 2, quiet=True)
    assert record["notes"] == ["written as they are, and refused by vLLM: classifier"]
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (wide, out))
    heads = [key for key in old if "lora" not in key]
    assert heads and all(torch.equal(old[key], new[key]) for key in heads)
    assert (wide / "config.json").read_bytes() == (out / "config.json").read_bytes()
    before, after = updates(wide, "bert"), updates(out, "bert")
    for layer, dense in before.items():
        torch.testing.assert_close(after[layer], cut(dense, 2), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "depends on the rank"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    saved(tmp_path / "wide", torch.float32, moved=False, **options)
    with pytest.raises(ModelError, match=said):
        retain.compact(tmp_path / "wide", tmp_path / "out", 2, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(next(iter(t))), "do not match"),
        (lambda t: t.clear(), "without A and B"),
        (lambda t: t.update({k: v * float("nan") for k, v in t.items()}), "not finite"),
    ],
)
def test_damaged_weights_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "wide") / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=said):
        retain.compact(tmp_path / "wide", tmp_path / "out", 2, quiet=True)


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": 0}, {"lora_alpha": "7"}, {"alpha_pattern": {"(": 1}}, {"alpha_pattern": [1]}],
)
def test_settings_that_peft_would_not_take_are_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    file = saved(tmp_path / "wide") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ModelError, match="with an alpha of"):
        retain.compact(tmp_path / "wide", tmp_path / "out", 2, quiet=True)


@pytest.mark.parametrize(
    ("rank", "said"),
    [(16, None), (24, "--max-lora-rank 32, or"), (64, "--max-lora-rank 64,"), (600, "no further")],
)
def test_what_is_said_of_a_wide_one(rank: int, said: str | None) -> None:
    told = too_wide(rank, Path("runs/my july/adapter"))
    assert told is said is None or (said and said in str(told))
    assert told is None or "retain compact 'runs/my july/adapter' --rank 16" in told
