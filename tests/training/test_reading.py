"""Rows of a trainer's data that the model has no place for, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

from retain import RetentionCallback, fit_curvature
from retain.errors import SourceError
from tiny import ROWS, tiny

HOLDERS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "list of tensors": lambda rows: [{k: torch.tensor(v) for k, v in r.items()} for r in rows],
    "list of arrays": lambda rows: [{k: np.array(v) for k, v in r.items()} for r in rows],
    "data set": Dataset.from_list,
    "data set of tensors": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "another order": lambda rows: Dataset.from_list(rows[::-1]).select(range(len(rows))[::-1]),
    "two shards": lambda rows: Dataset.from_list(rows * 80).select(range(len(rows))),
}


def run(kind: str, data: Any, folder: Path, collate: Any = default_data_collator) -> None:
    model = tiny(kind, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    call = RetentionCallback(
        fit_curvature(model, ROWS[kind] * 2, progress=False), 1.0, parts=("force",)
    )
    Trainer(model, arguments, collate, data, callbacks=[call]).train()


def rows(count: int, **last: Any) -> list[dict[str, Any]]:
    """Of which the last but one is to be odd."""
    found: list[dict[str, Any]] = [
        {"input_ids": [3, 7, 1, i % 5], "labels": i % 3} for i in range(count)
    ]
    found[-2].update(last)
    return found


ABOVE = ({"input_ids": [3, 17, 1, 2]}, "token 17 in tokenised row 19; allowed: 0 to 16")
NO_LABEL = ({"labels": 3}, "label of row 19 has no output; got: label 3; allowed: .* 0 to 2")


@pytest.mark.parametrize(
    ("holder", "odd", "said"),
    [
        *((holder, *wrong) for holder in HOLDERS for wrong in (ABOVE, NO_LABEL)),
        ("list", {"input_ids": [3, -1, 1, 2]}, "token -1 in tokenised row 19"),
        ("data set", {"labels": -1}, "label of row 19 has no output; got: label -1"),
    ],
)
def test_each_row_is_looked_at_before_the_first_step(
    odd: dict[str, Any], said: str, holder: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=said):
        run("bert", HOLDERS[holder](rows(20, **odd)), tmp_path)


@pytest.mark.parametrize("holder", HOLDERS)
def test_rows_in_their_places_pass(holder: str, tmp_path: Path) -> None:
    run("bert", HOLDERS[holder](rows(20, labels=-100)), tmp_path)
    run("llama", HOLDERS[holder](rows(20, input_ids=[12, 0, 1, 2])), tmp_path, causal)


def causal(items: list[Any]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[int(i) for i in item["input_ids"]] for item in items])
    return {"input_ids": ids, "labels": ids}


def test_a_row_far_down_is_named(tmp_path: Path) -> None:
    data = Dataset.from_list(rows(2503, input_ids=[3, 13, 1, 2]))
    with pytest.raises(SourceError, match="token 13 in tokenised row 2502; allowed: 0 to 12"):
        run("llama", data, tmp_path, causal)


@pytest.mark.parametrize("holder", ["list", "data set"])
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("positive", "label 'positive' in row 1"),
        ("1", "label '1' in row 1"),
        (True, "label True in row 1"),
        (1.0, "got: labels of float32"),
        (None, "label of row 1 has no output; got: label None"),
    ],
)
def test_labels_that_are_no_classes(labels: Any, said: str, holder: str, tmp_path: Path) -> None:
    data = [{"input_ids": [3, 7], "labels": labels} for _ in range(4)]
    with pytest.raises(SourceError, match=said):
        run("bert", HOLDERS[holder](data), tmp_path)


@pytest.mark.parametrize("values", [[0.0, 1.0], [True, False], ["no", "yes"]])
def test_the_advice_makes_classes_of_them(values: list[Any], tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": [[3, 7]] * 4, "label": values * 2})
    with pytest.raises(SourceError, match=r"class_encode_column"):
        run("bert", data, tmp_path)
    run("bert", data.class_encode_column("label"), tmp_path)


def test_a_collator_of_the_user_s_may_make_labels_of_anything(tmp_path: Path) -> None:
    def collate(items: list[Any]) -> dict[str, torch.Tensor]:
        names = torch.tensor([len(item["labels"]) % 3 for item in items])
        return {"input_ids": torch.tensor([i["input_ids"] for i in items]), "labels": names}

    data = Dataset.from_list([{"input_ids": [3, 7], "labels": "yes"} for _ in range(4)])
    run("bert", data, tmp_path, collate)


class Grouped(Trainer):
    """Rows of one length make a batch, so that none is padded."""

    def get_train_dataloader(self) -> Any:
        data = [{"input_ids": [3, 7, 1, 2][: 2 + i % 2]} for i in range(8)]
        batches = [[0, 2], [1, 3], [4, 6], [5, 7]]
        return DataLoader(data, batch_sampler=batches, collate_fn=causal)  # type: ignore[arg-type]


class Batches(Trainer):
    """A loader of one's own, that nothing but batches can be had from."""

    def get_train_dataloader(self) -> Any:
        return [causal([{"input_ids": [3, 7, 1]}] * 2)] * 4


@pytest.mark.parametrize(("kind", "why"), [(Grouped, None), (Batches, "there are no rows to read")])
def test_any_loader_that_a_trainer_takes_is_held(
    kind: type[Trainer], why: str | None, tmp_path: Path
) -> None:
    model = tiny("llama", dtype=torch.float32)
    call = RetentionCallback(fit_curvature(model, ROWS["llama"] * 2, progress=False))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    kind(model, arguments, callbacks=[call]).train()
    assert call.why_no_filter == why
    assert call.force is not None and call.force.predicted() > 0
