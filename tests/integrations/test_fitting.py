"""The callback that fits its curvature itself, in a plain trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from retain import RetentionCallback, fit_curvature
from retain.errors import ConfigError, RetainError, RetainWarning, TrainingError
from retain.integrations import FittingCallback
from retain.integrations.fitting import FILE
from tiny import ROWS, tiny, weights

DATA = [
    {"input_ids": [1 + i, 2 + i % 3, 12 - i, 5], "labels": [1 + i, 2 + i % 3, 12 - i, 5]}
    for i in range(8)
]
FIT: dict[str, Any] = {"progress": False, "batch_size": 4}


def trained(
    folder: Path, callback: RetentionCallback, model: Any = None, resume: Any = None,
    data: Any = DATA, **options: Any,
) -> Trainer:  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.01, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True,
        **{"max_steps": 4, "save_strategy": "no"} | options,
    )  # fmt: skip
    model = tiny("llama") if model is None else model
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_it_trains_as_one_whose_curvature_was_fitted_before(tmp_path: Path) -> None:
    model = tiny("llama")
    before = RetentionCallback(fit_curvature(model, ROWS["llama"], **FIT), strength=3.0)
    expected = trained(tmp_path, before, model)
    found = trained(tmp_path, FittingCallback(ROWS["llama"], fit=FIT, strength=3.0))
    assert found.state.log_history[-2]["predicted_nats"] > 0
    for a, b in zip(weights(found.model).values(), weights(expected.model).values(), strict=True):
        assert torch.equal(a, b)
    assert not (tmp_path / FILE).exists()  # nothing is saved, so nothing goes on


@pytest.mark.parametrize("options", [{"strength": 3.0}, {"budget": 1e-4}])
def test_a_resumed_training_ends_as_one_that_was_not(
    options: dict[str, Any], tmp_path: Path
) -> None:
    def made() -> FittingCallback:
        return FittingCallback(ROWS["llama"], fit=FIT, **options)

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path, made(), **saving)
    assert (tmp_path / FILE).is_file()
    again = trained(tmp_path, made(), resume=str(tmp_path / "checkpoint-2"), **saving)
    for a, b in zip(weights(again.model).values(), weights(whole.model).values(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_training_without_its_curvature_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, FittingCallback(ROWS["llama"], fit=FIT), **saving)
    kept = (tmp_path / FILE).rename(tmp_path / "elsewhere.safetensors")
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ConfigError, match="curvature of the training that goes on is missing"):
        trained(tmp_path, FittingCallback(ROWS["llama"], fit=FIT), resume=checkpoint, **saving)
    whole = trained(tmp_path, FittingCallback(curvature=kept), resume=checkpoint, **saving)
    assert whole.state.global_step == 4


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_refused(source: str) -> None:
    """It is a shell's unset variable, and not the model's own text."""
    with pytest.raises(ConfigError, match="the source is an empty text"):
        FittingCallback(source, budget=0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fit": {"rowz": 3}}, "unknown option of fit.*did you mean 'rows'"),
        ({"fit": {"source": "self"}}, "unknown option of fit"),
        ({"fit": {"structure": "kfacc"}}, "unknown structure.*did you mean 'kfac'"),
        ({"fit": {"structure": ["kfac"]}}, "unknown structure"),
        ({"fit": {"rows": "8"}}, "rows is no whole number"),
        ({"curvature": "none.safetensors"}, "no such curvature file"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_there_is_a_model(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RetainError, match=said):
        FittingCallback(**options)


@pytest.mark.parametrize("options", [{"budget": 0.1}, {"kl": 1.0}])
def test_rows_that_come_once_are_not_measured_on_too(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"read more than once.*list_iterator.*list\(rows\)"):
        FittingCallback(iter(ROWS["llama"]), **options)
    curvature = fit_curvature(tiny("llama"), ROWS["llama"], **FIT)
    FittingCallback(iter(ROWS["llama"]), curvature=curvature, **options)
    FittingCallback(iter(ROWS["llama"]))


def test_a_budget_of_a_classifier_is_of_predicted_nats(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(DATA)]
    callback = FittingCallback(ROWS["bert"], fit=FIT, budget=1e-4)
    with pytest.warns(RetainWarning, match="the budget is of predicted nats: a classifier"):
        trained(tmp_path, callback, tiny("bert", dtype=torch.float32), data=rows)
    spent = callback.recipe.spent()[""]
    assert 0 < spent.predicted <= 1e-4 and spent.measured is None


def test_a_budget_beside_a_curvature_of_other_text_is_of_predicted_nats_without_a_tokenizer(
    tmp_path: Path,
) -> None:
    fitted = fit_curvature(tiny("llama"), ROWS["llama"], **FIT)
    callback = FittingCallback(curvature=fitted, budget=1e-4)
    with pytest.warns(RetainWarning, match=r"of predicted nats: without a tokenizer.*source="):
        trained(tmp_path, callback)
    assert callback.recipe.spent()[""].measured is None


def test_llamafactory_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its entry point's signature alone: run_exp(args=None, callbacks=None)."""
    import sys
    from types import ModuleType

    from retain.integrations import llamafactory

    heard: list[Any] = []
    tuner = ModuleType("llamafactory.train.tuner")

    def run_exp(args: Any = None, callbacks: Any = None) -> None:
        heard.append((args, callbacks, sys.argv[1:]))

    tuner.run_exp = run_exp  # type: ignore[attr-defined]
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
    monkeypatch.setattr(sys, "argv", ["python"])
    llamafactory.main(["may.yaml", "--budget", "0.05", "learning_rate=1e-4"])
    ((args, (callback,), rest),) = heard
    more = ["--update", "proximal", "--parts", "force", "--parts", "rows", "--kl", "1"]
    llamafactory.main(["may.yaml", *more])
    other = heard[1][1][0].recipe
    assert (other.update, other.kl.weight) == ("proximal", 1)
    assert set(other.parts) == {"force", "rows"}
    assert args is None
    assert rest == ["may.yaml", "learning_rate=1e-4"]
    assert callback.recipe.budget == 0.05
    assert callback.source == "self"


def test_swift_finds_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the form of ms-swift's table: callbacks_map[name](args, trainer)."""
    import sys
    from types import ModuleType

    callbacks = ModuleType("swift.callbacks")
    callbacks.callbacks_map = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.callbacks", callbacks)
    monkeypatch.delitem(sys.modules, "retain.integrations.swift", raising=False)
    from retain.integrations.swift import register

    register(source="self", budget=0.05)
    callback = callbacks.callbacks_map["retention"](None, None)
    assert isinstance(callback, FittingCallback)
    assert callback is not callbacks.callbacks_map["retention"](None, None)
    with pytest.raises(ConfigError, match="budget"):
        register("other", budget=-1.0)
    assert "other" not in callbacks.callbacks_map


def axolotl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in on a stand-in for axolotl's base class, which is empty methods there."""
    import importlib
    import sys
    from types import ModuleType

    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    monkeypatch.delitem(sys.modules, "retain.integrations.axolotl", raising=False)
    return importlib.import_module("retain.integrations.axolotl")


def test_axolotl_s_plugin_reads_its_part_of_the_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    module = axolotl(monkeypatch)
    plugin = module.RetentionPlugin()
    assert plugin.get_input_args() == "retain.integrations.axolotl.RetentionArgs"
    args = module.RetentionArgs.model_validate({"retention": {"budget": 0.05, "fit": {"rows": 8}}})
    for asked in (args.retention, args.retention.model_dump()):
        (callback,) = plugin.add_callbacks_post_trainer({"retention": asked}, None)
        assert (callback.recipe.budget, callback.fit) == (0.05, {"rows": 8})
    (plain,) = plugin.add_callbacks_post_trainer({}, None)
    assert (plain.source, plain.recipe.strength) == ("self", 100.0)
    with pytest.raises(ValueError, match="bugdet"):
        module.RetentionArgs.model_validate({"retention": {"bugdet": 0.05}})


def test_axolotl_s_fused_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = axolotl(monkeypatch)
    cfg = {"lora_mlp_kernel": True, "lora_qkv_kernel": False, "lora_o_kernel": True}
    with pytest.raises(ConfigError) as refused:
        module.RetentionPlugin().add_callbacks_post_trainer(cfg, None)
    assert "set lora_mlp_kernel: false, lora_o_kernel: false" in str(refused.value)


def test_a_fit_out_of_memory_is_no_reason_for_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(FittingCallback, "_curvature", full)
    with pytest.raises(TrainingError, match=r"memory is full before the first step.*batch_size=1"):
        trained(tmp_path, FittingCallback(ROWS["llama"], fit=FIT), auto_find_batch_size=True)
    assert calls == [1]
