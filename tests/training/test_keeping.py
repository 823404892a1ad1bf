"""Resuming in a user's own Trainer: what was kept is read from the checkpoint that is resumed."""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import test_callback
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

from retain import Filter, OutputKL, RetentionCallback, fit_curvature
from retain.errors import RetainWarning, TrainingError
from tiny import ROWS, exactly, tiny, weights

STEPS, HALF = 6, 3


def held(**options: Any) -> tuple[nn.Module, RetentionCallback]:
    model = tiny("llama")
    curvature = fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    return model, RetentionCallback(curvature, **options)


def trainer(folder: Path, model: nn.Module, calls: list[Any], **options: Any) -> Trainer:
    saving = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": HALF}
    return test_callback.trainer(model, folder, calls, **saving | options)


@pytest.fixture(scope="module", params=[{}, {"budget": 0.02, "source": ROWS["llama"]}])
def whole(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Options, the folder of an uninterrupted run, and what it ended with."""
    folder = tmp_path_factory.mktemp("whole")
    model, call = held(**request.param)
    trainer(folder, model, [call]).train()
    return request.param, folder, weights(model)


@pytest.mark.parametrize(
    "how",
    ["same folder", "true", "new folder", "renamed", "another run's checkpoint of that number",
     "deep path", "a trailing slash"],
)  # fmt: skip
def test_a_checkpoint_is_resumed_wherever_it_lies(how: str, whole: Any, tmp_path: Path) -> None:
    options, folder, want = whole
    place, out = folder / f"checkpoint-{HALF}", tmp_path / "out"
    resumed: str | bool = str(place)
    if how in ("same folder", "true"):
        shutil.copytree(place, out / place.name)
        resumed = how == "true" or str(out / place.name)
    elif how == "renamed":
        resumed = str(shutil.copytree(place, tmp_path / "backup of the third"))
    elif how == "deep path":
        resumed = str(shutil.copytree(place, tmp_path / "a" / "b" / "checkpoint-77"))
    elif how == "a trailing slash":
        resumed = f"{place}/"
    elif how.startswith("another"):
        other, call = held(parts=("force",), strength=500.0)
        trainer(out, other, [call]).train()
    model, call = held(**options)
    run = trainer(out, model, [call])
    run.train(resume_from_checkpoint=resumed)
    exactly(weights(model), want)


def test_another_curvature_or_strength_is_said(whole: Any, tmp_path: Path) -> None:
    options, folder, _ = whole
    place = str(folder / f"checkpoint-{HALF}")

    def goes_on(**more: Any) -> list[str]:
        model, call = held(**options | more)
        if "source" in more:
            call = RetentionCallback(fit_curvature(model, ROWS["llama"][:3], progress=False))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RetainWarning)
            trainer(tmp_path / "o", model, [call]).train(resume_from_checkpoint=place)
        return [text for w in caught if "another way" in (text := str(w.message))]

    assert goes_on() == []
    (other,) = goes_on(update="proximal", kl=0.0)
    assert other.endswith("goes on in this: update gradient then, proximal now")
    (other,) = goes_on(source=None)
    assert "curvature " in other and ("budget 0.02 then, None now" in other) == bool(options)


def test_a_past_parts_and_options_that_change_are_said(tmp_path: Path) -> None:
    """Of an older checkpoint, which says nothing of them, nothing is said."""
    past = fit_curvature(tiny("llama"), ROWS["llama"][:3], progress=False)
    first = {"past": past, "kl": OutputKL(every=1), "source": ROWS["llama"]}
    model, call = held(**first)
    trainer(tmp_path, model, [call]).train()

    def goes_on(place: Path, **more: Any) -> list[str]:
        model, call = held(**first | more)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RetainWarning)
            run = trainer(tmp_path / "o", model, [call], max_steps=HALF + 1)
            run.train(resume_from_checkpoint=str(place))
        return [text for w in caught if "another way" in (text := str(w.message))]

    place = tmp_path / f"checkpoint-{HALF}"
    assert goes_on(place) == []
    assert goes_on(place, parts=("rows", "filter", "force")) == []  # as by default
    (other,) = goes_on(place, past=None, filter=Filter(weight=0.0), kl=OutputKL(every=2))
    assert ": filter.weight 1.0 then, 0.0 now, kl.every 1 then, 2 now, past " in other
    assert other.endswith(" then, None now") and "parts" not in other
    (other,) = goes_on(place, parts=("rows", "force"), kl=0.0, source="auto")
    told = "kl 1.0 then, 0.0 now, parts ['filter', 'force', 'rows'] then, ['force', 'rows'] now"
    assert other.endswith(told)

    state = json.loads((place / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["retain"]
    new = ("parts", "past", "filter.", "kl.")
    kept["held"] = {n: v for n, v in kept["held"].items() if not n.startswith(new)}
    (place / "trainer_state.json").write_text(json.dumps(state))
    assert goes_on(place) == []


def test_other_text_to_measure_on_is_said(whole: Any, tmp_path: Path) -> None:
    options, folder, _ = whole
    for source, said in ((ROWS["llama"], 0), (ROWS["llama"][::-1], len(options) // 2)):
        model, call = held(**options | ({"source": source} if options else {}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RetainWarning)
            run = trainer(tmp_path / "o", model, [call], max_steps=HALF + 1)
            run.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}"))
        told = [str(w.message) for w in caught if "measured on other text" in str(w.message)]
        assert [text.rpartition(": ")[2] for text in told] == ["budget"] * said


def test_an_entry_of_0_1_is_read_too(whole: Any, tmp_path: Path) -> None:
    options, folder, want = whole
    place = Path(shutil.copytree(folder / f"checkpoint-{HALF}", tmp_path / "old"))
    state = json.loads((place / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["retain"]
    kept["start"] = "wiener" if kept.pop("filter") else None
    (place / "trainer_state.json").write_text(json.dumps(state))
    model, call = held(**options)
    trainer(tmp_path / "out", model, [call]).train(resume_from_checkpoint=str(place))
    exactly(weights(model), want)


def test_one_that_was_trained_without_it_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    trainer(tmp_path, model, []).train()
    alone = {"parts": ("force",)}
    fix = r"how it was held.*parts=\('force',\) with a strength, and without a budget"
    for options, refused in (
        ({}, True), (alone, False), (alone | {"strength": 7.0}, False),
        (alone | {"budget": 0.02, "source": ROWS["llama"]}, True),
    ):  # fmt: skip
        again, call = held(**options)
        with pytest.raises(TrainingError, match=fix) if refused else nullcontext():
            trainer(tmp_path / "o", again, [call]).train(
                resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}")
            )


def test_steps_without_it_in_between_are_noticed(whole: Any, tmp_path: Path) -> None:
    _, folder, _ = whole
    plain = trainer(tmp_path, tiny("llama"), [], max_steps=5, save_steps=5)
    plain.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}"))
    model, call = held()
    with pytest.raises(TrainingError, match="steps 3 to 5 were trained without"):
        trainer(tmp_path, model, [call]).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-5")
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("first", None), ("first", "ten"), ("first", [1]), ("first", float("nan")),
        ("budgets", []), ("budgets", {"facts": 1}), ("budgets", {"facts": {"strength": "ten"}}),
    ],
)  # fmt: skip
def test_damaged_values_are_refused(key: str, value: Any, whole: Any, tmp_path: Path) -> None:
    options, folder, _ = whole
    place = Path(shutil.copytree(folder / f"checkpoint-{HALF}", tmp_path / "damaged"))
    state = json.loads((place / "trainer_state.json").read_text())
    state["stateful_callbacks"]["retain"][key] = value
    (place / "trainer_state.json").write_text(json.dumps(state))
    model, call = held(**options)
    with pytest.raises(TrainingError, match="damaged values"):
        trainer(tmp_path / "o", model, [call]).train(resume_from_checkpoint=str(place))


def test_other_callbacks_may_be_restored(whole: Any, tmp_path: Path) -> None:
    options, folder, want = whole
    model, call = held(**options)
    run = trainer(tmp_path, model, [call], restore_callback_states_from_checkpoint=True)
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}"))
    exactly(weights(model), want)


def test_only_the_model_saved_goes_on_too(tmp_path: Path) -> None:
    model, call = held()
    trainer(tmp_path, model, [call], save_only_model=True).train()
    place = tmp_path / f"checkpoint-{HALF}"
    assert not (place / "optimizer.pt").exists()
    again, call = held()
    trainer(tmp_path / "o", again, [call]).train(resume_from_checkpoint=str(place))
    assert call.why_no_filter is None and call.recipe.filter is not None


class Trial(dict[str, Any]):
    """Of Optuna, as far as a trainer looks at it."""

    number, params = 1, {}


def test_a_search_writes_into_its_own_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    model, call = held(update="proximal")
    trainer(tmp_path, model, [call]).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model, call = held(update="proximal", strength=3.0)
    run = trainer(tmp_path, model, [call])
    run.hp_search_backend, run.hp_name = HPSearchBackend.OPTUNA, None
    run.hp_space = lambda trial: trial.params
    run.train(trial=Trial())
    assert {path: path.read_bytes() for path in before} == before
    place = tmp_path / "run-1" / f"checkpoint-{HALF}"
    assert "- Strength: 3\n" in (place / "README.md").read_text()
    assert (place / "filtered.safetensors").is_file()


def test_what_is_kept_of_another_a_is_said(tmp_path: Path) -> None:
    """As where another run's files were copied into the checkpoint."""
    for name, strength in (("one", 100.0), ("other", 3.0)):
        model, call = held(update="proximal", strength=strength)
        trainer(tmp_path / name, model, [call]).train()
    place, kept = tmp_path / "one" / f"checkpoint-{HALF}", "filtered.safetensors"
    shutil.copy(tmp_path / "other" / place.name / kept, place / kept)
    model, call = held(update="proximal")
    with pytest.warns(RetainWarning, match="of 14 layers, or is of another A or shape"):
        trainer(tmp_path / "o", model, [call]).train(resume_from_checkpoint=str(place))
