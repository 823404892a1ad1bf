"""Adapters written to disk and read again; folders that are damaged or another's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import MODELS, OPTIONS, attached, logits, plain, step
from peft import PeftModel
from safetensors.torch import load_file, save_file

from retain.errors import ModelError, OutputError
from retain.models.adapters.registry import ADAPTERS, attach_adapter
from retain.models.cards import CARD
from retain.models.saved import HEAD, check_adapter

kinds = pytest.mark.parametrize("how", OPTIONS)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def saved(folder: Path, name: str, how: str) -> tuple[Any, torch.Tensor]:
    adapter = attached(name, how)
    step(adapter, name, 3)
    assert adapter.save(folder, "tiny") == folder
    return adapter, logits(adapter.model, name)


def same(got: torch.Tensor, want: torch.Tensor, how: str) -> bool:
    """Bit for bit; the network of a projected prefix is run on one row when it is saved."""
    return torch.allclose(got, want, atol=1e-12) if how == "projected" else torch.equal(got, want)


@pytest.mark.parametrize("name", MODELS)
@kinds
def test_what_is_saved_is_loaded_exactly(tmp_path: Path, name: str, how: str) -> None:
    adapter, want = saved(tmp_path / "a", name, how)
    # PEFT's own kinds have a card, and the configuration that names a classifier's classes.
    peft = how in ("lora", "prefix", "projected")
    more = [CARD, *([HEAD] if name == "bert" else [])] if peft else []
    assert {p.name for p in (tmp_path / "a").iterdir()} == {CONFIG, WEIGHTS, *more}
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["base_model_name_or_path"] == "tiny"
    base = plain(name)
    before = torch.get_rng_state()
    loaded = type(adapter).load(base, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert same(logits(loaded.model, name), want, how)
    assert not loaded.model.training
    with loaded.off():
        assert torch.equal(logits(loaded.model, name), logits(plain(name), name))
    if how == "projected":  # the network behind the prefix is gone
        assert loaded.options["projection"] is False
    else:
        assert loaded.count() == adapter.count()
        assert sorted(loaded.parameters()) == sorted(adapter.parameters())
        step(loaded, name, 2)
        step(adapter, name, 2)
        assert torch.equal(logits(loaded.model, name), logits(adapter.model, name))
        loaded.save(tmp_path / "a", "tiny")  # over the older one
        again = type(adapter).load(plain(name), tmp_path / "a")
        assert torch.equal(logits(again.model, name), logits(adapter.model, name))
        assert again.options == loaded.options


@kinds
def test_the_options_come_back(tmp_path: Path, how: str) -> None:
    adapter, _ = saved(tmp_path / "a", "llama", how)
    options = type(adapter).load(plain("llama"), tmp_path / "a").options
    if how == "lora":
        assert (options["rank"], options["alpha"]) == (2, 4)
        assert any(t.endswith("q_proj") for t in options["targets"])
    elif adapter.kind == "prefix":  # how it began is not in PEFT's folder
        assert options == {"num_virtual_tokens": 3, "projection": False}
    else:
        assert options == adapter.options


def test_plain_peft_reads_lora_and_prefix(tmp_path: Path) -> None:
    for how in ("lora", "prefix", "projected"):
        for name in ("llama", "bert"):
            folder = tmp_path / f"{how}-{name}"
            _, want = saved(folder, name, how)
            model = PeftModel.from_pretrained(plain(name), folder, autocast_adapter_dtype=False)
            got = logits(model, name)
            assert torch.allclose(got, want, atol=1e-6 if "pr" in how else 0, rtol=0)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_may_not_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As far as the check can tell: root may read any."""
    saved(tmp_path / "a", "bert", "lora")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != name)
    with pytest.raises(ModelError, match=rf"may not be read; got: .*{name}.*fix: chmod u\+r"):
        check_adapter(tmp_path / "a")


@kinds
def test_a_damaged_folder_is_refused(tmp_path: Path, how: str) -> None:
    adapter, _ = saved(tmp_path / "whole", "bert", how)
    load = type(adapter).load

    def refused(folder: Path, words: str) -> None:
        with pytest.raises(ModelError, match=words) as caught:
            load(plain("bert"), folder)
        assert "\n" not in str(caught.value) and "fix:" in str(caught.value)

    refused(tmp_path / "none", "no")
    for name in (CONFIG, WEIGHTS):
        folder = tmp_path / f"without-{name}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / name).unlink()
        refused(folder, "holds no adapter")
        whole = (tmp_path / "whole" / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        refused(folder, "damaged")
    for change in ("drop", "shape", "extra"):
        folder = tmp_path / change
        shutil.copytree(tmp_path / "whole", folder)
        tensors = load_file(folder / WEIGHTS)
        first = min(n for n in tensors if "classifier" not in n)
        if change == "drop":
            del tensors[first]
        elif change == "shape":
            tensors[first] = torch.cat([tensors[first], tensors[first]])
        else:
            tensors["base_model.model.more.weight"] = torch.zeros(2)
        if how == "lora" and change == "extra":
            continue  # PEFT passes over what it does not know
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        refused(folder, r"does not fit|damaged")


@pytest.mark.parametrize("change", ["shape", "drop"])
@kinds
def test_a_refused_folder_leaves_the_base_alone(tmp_path: Path, how: str, change: str) -> None:
    adapter, _ = saved(tmp_path / "a", "bert", how)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    last = max(n for n in tensors if "classifier" not in n)
    if change == "drop":
        del tensors[last]
    else:
        tensors[last] = torch.cat([tensors[last], tensors[last]])
    save_file(tensors, tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})

    def state(model: torch.nn.Module) -> list[Any]:
        flags = {n: m.training for n, m in model.named_modules()}
        return [flags, {n: p.requires_grad for n, p in model.named_parameters()}]

    base = plain("bert").train()
    before, want = state(base), {n: p.detach().clone() for n, p in base.named_parameters()}
    for _ in range(2):
        with pytest.raises(ModelError, match=r"does not fit|damaged"):
            type(adapter).load(base, tmp_path / "a")
        assert state(base) == before
        assert all(torch.equal(p, want[n]) for n, p in base.named_parameters())
    fresh = attach_adapter(base, **OPTIONS[how])
    assert set(fresh.parameters()) == set(adapter.parameters())


@kinds
def test_a_foreign_folder_is_refused(tmp_path: Path, how: str) -> None:
    adapter, _ = saved(tmp_path / "a", "llama", how)
    for kind, other in ADAPTERS.items():
        if kind != adapter.kind:
            with pytest.raises(ModelError, match="another kind"):
                other.load(plain("llama"), tmp_path / "a")
    with pytest.raises(ModelError, match=r"does not fit|another base|architecture"):
        type(adapter).load(plain("bert"), tmp_path / "a")
    if adapter.kind in ("full", "bottleneck"):  # the same shapes, other weights
        with pytest.raises(ModelError, match="another base model"):
            type(adapter).load(plain("llama", seed=9), tmp_path / "a")


@pytest.mark.parametrize("how", ["full", "houlsby"])
def test_a_new_head_of_another_draw_is_the_same_base(tmp_path: Path, how: str) -> None:
    adapter, want = saved(tmp_path / "a", "bert", how)
    base: Any = plain("bert")
    with torch.no_grad():
        base.classifier.weight.add_(1.0)
    head = base.classifier.weight.detach().clone()
    loaded = type(adapter).load(base, tmp_path / "a")
    assert torch.equal(logits(loaded.model, "bert"), want)
    with loaded.off():
        assert torch.equal(base.classifier.weight, head)


@kinds
def test_an_older_folder_stays_until_the_new_one_is_whole(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, want = saved(tmp_path / "a", "bert", how)

    def full_disk(*_args: Any, **_more: Any) -> None:
        raise OSError(28, "No space left on device")

    step(adapter, "bert")
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_disk)
        patch.setattr("peft.peft_model.safe_save_file", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            adapter.save(tmp_path / "a", "tiny")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    loaded = type(adapter).load(plain("bert"), tmp_path / "a")
    assert same(logits(loaded.model, "bert"), want, how)
