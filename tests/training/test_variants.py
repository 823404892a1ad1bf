"""What people switch on in their trainers: the same training held in the same way.

Rows laid end to end (``padding_free``, packing), ``torch.compile``, optimisers that step inside the
backward pass, and kernels like Liger's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_trl import of_trl
from torch import nn
from torch.nn.functional import silu
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from retain import OutputKL, Retention, RetentionCallback, attach_lora, fit_curvature, load_model
from retain.curvature.curvature import Curvature
from retain.errors import ModelError
from retain.models.sites import lora_sites
from retain.models.view import ModelView
from retain.retention.loader import loader_examples
from tiny import ROWS, base, exactly, tiny, weights

SOURCE = ROWS["llama"] * 2
TEXTS = [[3, 7, 1, 12, 5], [2, 9, 4], [4, 4, 11, 6, 6, 1], [6, 10, 8, 3], [1, 8], [5, 2, 7, 9],
         [12, 11, 3], [9, 9, 1, 4, 2]]  # fmt: skip
DATA = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in TEXTS]
CLOSE: dict[str, float] = {"rtol": 1e-7, "atol": 1e-9}

Rows = list[dict[str, Any]]
close = partial(torch.testing.assert_close, **CLOSE)


def padded(items: Rows) -> dict[str, torch.Tensor]:
    longest = max(len(item["input_ids"]) for item in items)

    def table(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([r[name] + [fill] * (longest - len(r[name])) for r in items])

    mask = table("input_ids", -1) >= 0
    return {"input_ids": table("input_ids", -1) * mask, "labels": table("labels", -100),
            "attention_mask": mask.long()}  # fmt: skip


def packed(items: Rows) -> dict[str, torch.Tensor]:
    """Items of several texts each, end to end, with two tokens of padding."""
    found = {
        name: torch.tensor([[*chain.from_iterable(item[name] for item in items), fill, fill]])
        for name, fill in (("input_ids", 0), ("labels", -100))
    }
    places = [range(n) for item in items for n in item["lengths"]]
    return found | {"position_ids": torch.tensor([[*chain.from_iterable(places), 0, 0]])}


def in_twos(rows: Rows) -> Rows:
    """Packed rows of two texts each."""
    return [
        {n: rows[i][n] + rows[i + 1][n] for n in ("input_ids", "labels")}
        | {"lengths": [len(rows[i]["input_ids"]), len(rows[i + 1]["input_ids"])]}
        for i in range(0, len(rows), 2)
    ]


def held(model: Any) -> RetentionCallback:
    """All parts: rows, filter, force, a budget and the KL."""
    curvature = fit_curvature(model, SOURCE, progress=False)
    return RetentionCallback(curvature, budget=2e-3, source=SOURCE, kl=OutputKL(1.0, every=2))


def trained(
    folder: Path, data: Any = None, collate: Callable[[Rows], Any] = padded, model: Any = None,
    change: Callable[[Any], object] = lambda _: None, **said: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    model = tiny("llama") if model is None else model
    change(model)
    before = weights(model)
    arguments = TrainingArguments(
        str(folder), max_steps=4, learning_rate=1e-2, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_steps=1,
        **{"per_device_train_batch_size": 4} | said,
    )  # fmt: skip
    call = held(model)
    data = DATA if data is None else data
    trainer = Trainer(model, arguments, collate, data, data, callbacks=[call])
    trainer.train()
    assert call.why_no_filter is None
    history = trainer.state.log_history
    assert [e["predicted_nats"] > 0 for e in history if "predicted_nats" in e][1:] == [True] * 3
    found = weights(model)
    assert all(not torch.equal(found[name], old) for name, old in before.items())
    return {**found, "kl": torch.tensor([e["source_kl"] for e in history if "source_kl" in e])}


# Rows that are laid end to end.


@pytest.mark.shows("transformers.Trainer", "padding-free rows")
def test_without_padding_it_ends_as_with_it(tmp_path: Path) -> None:
    found = trained(tmp_path, collate=DataCollatorWithFlattening())
    close(found, trained(tmp_path))


def in_a_loop(
    collate: Callable[[Rows], Any], data: Rows = DATA, many: int = 4
) -> dict[str, torch.Tensor]:
    """The plain loop, with all parts."""
    model = tiny("llama")
    model.train()  # where transformers keeps documents apart
    curvature = fit_curvature(model, SOURCE, progress=False)
    source = ModelView(model).read(SOURCE, len(SOURCE), max_length=64)
    loader = torch.utils.data.DataLoader(cast(Any, data), many, collate_fn=collate)
    held = Retention(
        model, curvature, rows=loader, probe=source, source=source, budget=2e-3,
        kl=OutputKL(1.0, every=2),
    )  # fmt: skip
    assert held.recipe.filter is not None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for batch in [*loader, *loader]:
        model(**batch, use_cache=False).loss.backward()
        held.step(optimizer)
        optimizer.zero_grad()
    held.finish()
    assert held.predicted() > 0
    return weights(model)


@pytest.mark.shows("plain loop", "padding-free rows")
def test_a_loop_without_padding_ends_as_with_it() -> None:
    plain = in_a_loop(padded)
    close(in_a_loop(DataCollatorWithFlattening()), plain)
    close(in_a_loop(packed, in_twos(DATA), 2), plain)


@pytest.mark.parametrize("how", ["packed", "of_pairs"])
def test_packed_texts_are_held_as_texts_of_their_own(how: str, tmp_path: Path) -> None:
    collate = {"packed": packed, "of_pairs": of_pairs}[how]
    found = trained(tmp_path, in_twos(DATA), collate, per_device_train_batch_size=4)
    close(found, trained(tmp_path, per_device_train_batch_size=8))


def read(data: Rows, collate: Callable[[Rows], Any], count: int) -> list[list[int]]:
    loader = SimpleNamespace(dataset=data, collate_fn=collate)
    found = loader_examples(loader, count, 0, causal=True)
    assert all(all(e.predict) for e in found)
    return [[*e.tokens, e.targets[-1]] for e in found]


def of_attention(items: Rows) -> dict[str, Any]:
    """What flash attention is told, in place of positions."""
    batch = packed(items)
    starts = (batch.pop("position_ids")[0] == 0).nonzero().flatten().tolist()
    return batch | {"cu_seq_lens_q": torch.tensor([*starts, batch["input_ids"].shape[1]])}


def by_bool(items: Rows) -> dict[str, Any]:
    """Which position may read which."""
    batch = packed(items)
    number = (batch["position_ids"][0] == 0).cumsum(0)
    number[-2:] = 0  # the padding
    may = ((number[:, None] == number) & (number > 0)).tril()
    return batch | {"attention_mask": may[None, None]}


def of_pairs(items: Rows) -> dict[str, Any]:
    """The same as what is added, as LLaMA-Factory's neat_packing has it without flash attention."""
    batch = by_bool(items)
    lowest = torch.finfo(torch.float64).min
    return batch | {"attention_mask": lowest * (~batch["attention_mask"]).double()}


@pytest.mark.parametrize("collate", [packed, of_attention, by_bool, of_pairs])
def test_the_texts_of_a_packed_row_are_read_one_by_one(collate: Callable[[Rows], Any]) -> None:
    assert sorted(read(in_twos(DATA), collate, 64)) == sorted(TEXTS)


def test_texts_are_drawn_from_several_packed_rows() -> None:
    many = [{"input_ids": [1 + i, 2] * 20, "labels": [1 + i, 2] * 20, "lengths": [2] * 20}
            for i in range(8)]  # fmt: skip
    assert len({row[0] for row in read(many, packed, 6)}) > 2


def test_a_row_that_attention_crosses_is_read_as_one() -> None:
    wrapped = in_twos(DATA)  # as TRL's "wrapped" cuts the stream of texts: nothing tells them
    texts = [row["input_ids"] for row in wrapped]
    loader = SimpleNamespace(dataset=wrapped, collate_fn=padded)
    found = loader_examples(loader, 64, 0, causal=True)
    assert sorted([*e.tokens, e.targets[-1]] for e in found) == sorted(texts)


def by_trl(folder: Path, out: Path, **said: Any) -> dict[str, torch.Tensor]:
    made, config = of_trl("SFTTrainer", "SFTConfig")
    model, tokenizer, _ = load_model(folder, dtype="float32")
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    source = [{"text": f"the cat sat on mat {i}"} for i in range(8)]
    curvature = fit_curvature(model, source, tokenizer=tokenizer, progress=False)
    rows = Dataset.from_list([{"text": "say it once and no more"[: 5 + 2 * i]} for i in range(8)])
    arguments = config(
        str(out), max_steps=3, learning_rate=1e-2, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, bf16=False,
        **{"per_device_train_batch_size": 8, "max_length": None} | said,
    )  # fmt: skip
    call = RetentionCallback(curvature, parts=("rows", "filter", "force"))
    made(model, arguments, processing_class=tokenizer, train_dataset=rows, callbacks=[call]).train()
    assert call.recipe.predicted() > 0
    return weights(model)


@pytest.mark.shows("SFTTrainer", "padding-free rows")
def test_trl_without_padding_and_packed_ends_as_with_padding(
    tiny_folder: Path, tmp_path: Path
) -> None:
    plain = by_trl(tiny_folder, tmp_path)
    near = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5)
    near(by_trl(tiny_folder, tmp_path, padding_free=True), plain)
    one: dict[str, Any] = {"packing": True, "max_length": 250, "per_device_train_batch_size": 1}
    near(by_trl(tiny_folder, tmp_path, packing_strategy="bfd", **one), plain)
    across = by_trl(tiny_folder, tmp_path, packing_strategy="wrapped", **one)
    with pytest.raises(AssertionError):  # there texts read one another
        near(across, plain)


# torch.compile.


@pytest.mark.shows("transformers.Trainer", "torch.compile", only="eager")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_ends_as_it_does_otherwise(backend: str, tmp_path: Path) -> None:
    said: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    torch.compiler.reset()
    found = trained(tmp_path, **said, **compiled)
    close(found, trained(tmp_path, **said))


def compiled_in_place(model: Any) -> Any:
    """One that has run, and is to be one graph, in which hooks have no place."""
    torch.compiler.reset()
    model.compile(backend="eager", fullgraph=True)
    model.eval()(torch.tensor([[3, 7, 1]]), attention_mask=torch.ones(1, 3))
    return model


def same(found: Curvature, expected: Curvature) -> None:
    close(found.tensors(), expected.tensors())
    assert found.info.model == expected.info.model


def test_the_curvature_of_a_model_compiled_in_place(tmp_path: Path) -> None:
    expected = fit_curvature(tiny("llama"), SOURCE, progress=False)
    same(fit_curvature(compiled_in_place(tiny("llama")), SOURCE, progress=False), expected)


def test_a_training_of_a_model_compiled_in_place(tmp_path: Path) -> None:
    close(trained(tmp_path, change=compiled_in_place), trained(tmp_path))


def test_blocks_that_are_compiled_one_by_one_keep_their_names() -> None:
    plain: Any = base("llama")
    torch.compiler.reset()
    layers = plain.model.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    model = attach_lora(plain, rank=2, seed=1).eval()
    other = tiny("llama")
    assert [s.name for s in lora_sites(model)] == [s.name for s in lora_sites(other)]
    expected = fit_curvature(other, SOURCE, progress=False)
    same(fit_curvature(model, SOURCE, progress=False), expected)
    expected.bind(model)


# Optimisers that step inside the backward pass.

SAID = "steps inside the backward pass, where no force can act"


def in_backward(model: nn.Module) -> None:
    """The recipe of torch's tutorial, and what transformers does for GaLore layer by layer."""
    every = [p for p in model.parameters() if p.requires_grad]
    steppers = {p: torch.optim.SGD([p], 0.1) for p in every}

    def step(parameter: torch.Tensor) -> None:
        steppers[parameter].step()  # type: ignore[index]
        steppers[parameter].zero_grad()  # type: ignore[index]

    for parameter in every:
        parameter.register_post_accumulate_grad_hook(step)


def test_hooks_that_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{SAID}; got: a post-accumulate-grad hook on .*lora_A"):
        trained(tmp_path, change=in_backward)
    model = tiny("llama")
    curvature = fit_curvature(model, SOURCE, progress=False)
    in_backward(model)
    with pytest.raises(ModelError, match=SAID):
        Retention(model, curvature)


def test_hooks_of_torch_that_average_are_not(tmp_path: Path) -> None:
    def average(_: torch.Tensor) -> None:
        pass

    def averaged(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(hook)

    for module in ("torch.nn.parallel.distributed", "transformers.trainer"):
        average.__module__ = module
        hook = partial(average)
        exactly(trained(tmp_path, change=averaged), trained(tmp_path))


@pytest.mark.parametrize("kind", ["LayerWiseDummyOptimizer", "Lomo", "AdaLomo"])
def test_optimisers_that_step_so_are_refused(kind: str, tmp_path: Path) -> None:
    model = tiny("llama")
    optimizer: Any = LayerWiseDummyOptimizer(optimizer_dict={}, lr=0.1)
    if kind != "LayerWiseDummyOptimizer":
        optimizer = type(kind, (torch.optim.SGD,), {})(model.parameters(), 0.1)
    call = held(model)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = Trainer(
        model, arguments, padded, DATA, callbacks=[call], optimizers=(optimizer, schedule)
    )
    with pytest.raises(ModelError, match=f"{SAID}; got: {kind}"):
        trainer.train()
    with pytest.raises(ModelError, match=SAID):
        Retention(model, call.curvature).step(optimizer)


# Kernels like Liger's: a stand-in, which does what the patched modules do.


class Overwriting(torch.autograd.Function):
    """silu(a) * b, whose backward pass writes over what it has kept, unseen by autograd."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return silu(a) * b

    @staticmethod
    def backward(ctx: Any, dc: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        a, b = (t.data for t in ctx.saved_tensors)
        s = a.sigmoid()
        da, db = dc * b * s * (1 + a * (1 - s)), dc * a * s
        a.copy_(da)
        b.copy_(db)
        return a, b


def mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = self.down_proj(Overwriting.apply(self.gate_proj(x), self.up_proj(x)))
    return found


def lce_forward(self: Any, input_ids: Any = None, labels: Any = None, **rest: Any) -> Any:
    """Of a batch to train on the loss alone: no logits, and no call of the head."""
    mean = rest.pop("num_items_in_batch", None)
    hidden = self.model(input_ids=input_ids, **rest)[0]
    if not (self.training and labels is not None):
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
    logits = hidden @ self.lm_head.weight.T
    loss = self.loss_function(
        logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=mean
    )
    return CausalLMOutputWithPast(loss=loss)


for patch in (mlp_forward, lce_forward):
    patch.__module__ = "liger_kernel.transformers"


def patched(model: Any) -> None:
    inner = model.get_base_model()
    inner.forward = MethodType(lce_forward, inner)
    for layer in inner.model.layers:
        layer.mlp.forward = MethodType(mlp_forward, layer.mlp)


@pytest.mark.shows("transformers.Trainer", "Liger kernels")
def test_a_model_that_is_patched_as_liger_does_ends_as_it_does_otherwise(tmp_path: Path) -> None:
    close(trained(tmp_path, change=patched), trained(tmp_path))


@pytest.mark.parametrize("told", [{"samples": 3}, {"fisher": "exact"}, {"structure": "activation"}])
def test_the_curvature_of_such_a_model(told: dict[str, Any]) -> None:
    model = tiny("llama", moved=True)
    patched(model)
    found = fit_curvature(model, SOURCE, progress=False, **told)
    same(found, fit_curvature(tiny("llama", moved=True), SOURCE, progress=False, **told))
