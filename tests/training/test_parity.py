"""One recipe: every door ends with the same A, B, head and state, bit for bit, on the same rows.

The doors are the callback in a trainer, a plain loop, ``retain train`` with ``--continue-from``,
and a study. A head is carried on from month to month by ``retain train``, where a study gives each
task outputs of its own, so of a classifier ``retain train`` is compared on one task.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

import retain
from retain.data.batches import Example, collate
from retain.models.forward import forward_logits
from retain.models.lora import attach_lora
from retain.models.sizes import pad_id
from retain.records import RunSpec
from retain.retention.bounds import PARTS
from retain.retention.head import fit_head
from retain.retention.loader import reader_of
from retain.retention.methods.auto import Auto
from retain.retention.recipe import Recipe
from retain.retention.state import choose, unpack_curvature
from retain.study.grid import expand, task_at
from retain.study.material import load_base, load_source, load_tasks, seed_of
from retain.study.sequence import run_sequence
from retain.study.spec import read_study
from retain.study.state import Constant, SequenceState
from retain.study.work import Work
from retain.training.loop import train
from retain.training.loss import head_of, task_loss
from retain.training.trainer import Rows, RowTrainer
from retain.types import Update
from study_parts import tiny_study
from tiny import exactly, save_tiny

State = dict[str, Tensor]
Ends = tuple[State, list[State]]
"""The trained weights, and what was known after each task but the last."""

TRAINING = {
    "learning_rate": 0.02, "batch_size": 4, "pad_multiple": 1, "schedule": "constant", "warmup": 0,
    "max_grad_norm": 0.0, "weight_decay": 0.01,
}  # fmt: skip


class Kept(SequenceState):
    """Keeps what was kept after each task."""

    seen: list[tuple[int, State, State]]

    def save(
        self, done: int, data: Any, adapter: State, method: State, constant: Constant = dict
    ) -> None:
        self.seen.append((done, adapter, {**method, **constant()}))
        super().save(done, data, adapter, method, constant)


class Case:
    """A study of one run, and the rows that all doors learn."""

    def __init__(
        self, folder: Path, model: Path, tasks: int, parts: Sequence[str] | None, kl: float = 0.0,
        update: Update = "gradient",
    ) -> None:  # fmt: skip
        names = ("one", "two", "three")[:tasks]
        options: dict[str, Any] = {} if parts is None else {"parts": list(parts)}
        options |= {"kl": kl, "update": update}
        path = tiny_study(
            folder, model, seeds=[0], methods={"auto": options}, training=TRAINING,
            orders={"some": [f"tasks/{n}.yaml" for n in names]}, dtype="float32",
            evaluation={"batch_size": 64},
        )  # fmt: skip
        for task in (folder / "tasks").iterdir():
            task.write_text(task.read_text() + 'texts: ["{{ text }}"]\n')
            rows = [  # what a fitted head can tell apart, so that it is placed
                {"text": ("ab" if i % 2 else "yz") * (1 + i % 3), "label": i % 2} for i in range(12)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data" / task.stem / "train.jsonl").write_text(lines)
        self.spec: RunSpec = expand(read_study(path), folder).runs[0]
        self.work = Work("tiny", folder / "out", folder, data_dir=folder / "data")
        self.folder, self.model, self.parts = folder, model, parts
        self.kl, self.update = kl, update
        base = self.base()
        self.causal, self.columns = base.causal, base.columns or [None] * tasks
        self.rows = [task.train for task in load_tasks(self.spec, base, self.work)]
        self.source = load_source(self.spec, base, self.work)[0]
        self.tokenizer = base.tokenizer
        self.seeds = [seed_of(0, i) for i in range(tasks)]

    def base(self) -> Any:
        names = self.spec.order.tasks
        return load_base(self.spec, [task_at(n, self.work.base) for n in names])

    def begun(self) -> tuple[Any, Recipe]:
        """The model with a fresh adapter, and the recipe with the curvature of the source."""
        model = attach_lora(self.base().model, rank=2, seed=seed_of(0, -1))
        recipe = Recipe(None, parts=self.parts, kl=self.kl, update=self.update)
        if self.source and recipe.parts & {"filter", "force"}:
            recipe.curvature = self.curvature(model)
        return model, recipe

    def curvature(self, model: nn.Module) -> retain.Curvature:
        seed = seed_of(0, -1)
        rows = choose(self.source, 64, seed)
        set_seed(seed)
        return retain.fit_curvature(
            model, rows, "kfac", rows=len(rows), batch_size=min(16, len(rows)), seed=seed,
            max_length=max(len(e.tokens) for e in rows) + 1, progress=False,
        )  # fmt: skip

    def config(self, index: int) -> Any:
        return self.spec.settings(index, self.seeds[index])

    def trainer(self, model: nn.Module, index: int, folder: Path) -> RowTrainer:
        """A trainer of a user's own, with the settings of the study."""
        columns, pad = self.columns[index], pad_id(model)
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.02,
            lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.01, use_cpu=True,
            seed=self.seeds[index], data_seed=self.seeds[index], report_to="none",
            remove_unused_columns=False, disable_tqdm=True, save_strategy="no", logging_steps=1,
            dataloader_pin_memory=False,
        )  # fmt: skip

        def gathered(rows: list[tuple[int, Example]]) -> dict[str, Any]:
            found = [example for _, example in rows]
            heads = [head_of(example, columns, False) for example in found]
            return {"batch": collate(found, pad, [n for n, _ in rows], 1), "heads": heads}

        run = RowTrainer(
            model=model, args=arguments, train_dataset=Rows(self.rows[index]),
            data_collator=gathered,
        )  # fmt: skip
        run.remove_callback(PrinterCallback)
        return run


def _each(case: Case, folder: Path, learn: Callable[[Case, Any, Recipe, int, Path], None]) -> Ends:
    """Task after task through a door that is told how to learn one."""
    model, recipe = case.begun()
    known = []
    for index, rows in enumerate(case.rows):
        set_seed(case.seeds[index])
        if case.columns[index] is not None and "head" in recipe.parts:
            fit_head(
                model, rows, columns=case.columns[index], seed=case.seeds[index], batch_size=64,
                progress=False,
            )  # fmt: skip
        recipe.release()
        model = recipe.grow(model, 2, seed=seed_of(0, -1) + index)
        learn(case, model, recipe, index, folder)
        if index + 1 < len(case.rows) and recipe.parts & {"filter", "force"}:
            model.zero_grad(set_to_none=True)
            model.eval()
            recipe.consolidate(model, rows, columns=case.columns[index], seed=case.seeds[index])
        if index + 1 < len(case.rows):
            known.append(recipe.state())
    return _trained(model), known


def _trained(model: nn.Module) -> State:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def by_callback(case: Case, folder: Path) -> Ends:
    def learn(case: Case, model: Any, recipe: Recipe, index: int, folder: Path) -> None:
        run = case.trainer(model, index, folder / "callback")
        call = retain.RetentionCallback.driving(recipe, case.source or "auto")
        if index % 2:
            call.attach(run)
        else:
            run.add_callback(call)
        run.train()

    return _each(case, folder, learn)


def by_loop(case: Case, folder: Path) -> Ends:
    def learn(case: Case, model: Any, recipe: Recipe, index: int, folder: Path) -> None:
        run = case.trainer(model, index, folder / "loop")
        set_seed(case.seeds[index])
        loader = run.get_train_dataloader()
        retention = retain.Retention(
            model, recipe.curvature, past=recipe.past, parts=case.parts, rows=case.rows[index],
            seed=case.seeds[index], kl=case.kl, source=case.source,
            update=case.update,
        )  # fmt: skip
        optimizer = run.create_optimizer()
        model.train()
        for batch in loader:
            rows = batch["batch"]
            loss = task_loss(forward_logits(model, rows), rows, batch["heads"])
            (loss / len(rows.targets)).backward()
            retention.step(optimizer)
            optimizer.zero_grad()
        retention.finish()

    return _each(case, folder, learn)


def by_study(case: Case, folder: Path) -> Ends:
    state = Kept(folder / "kept", {})
    state.seen = []
    run_sequence(case.spec, state=state, work=case.work)
    known = [method for done, _, method in state.seen if 0 < done < len(case.rows)]
    return state.seen[-1][1], known


def by_runs(case: Case, folder: Path) -> Ends:
    """What ``retain train`` and ``--continue-from`` do, on rows of tokens."""
    model, recipe = case.begun()
    curvature, keeps = None, bool(recipe.parts & {"filter", "force"})
    if case.source:  # months are held by one, whichever parts act
        curvature = str(case.curvature(model).save(folder / "source.safetensors"))
    del model
    known: list[State] = []
    run: Any = None
    for index, rows in enumerate(case.rows):
        data = folder / f"rows-{index}.jsonl"
        data.write_text("".join(json.dumps(_row(e)) + "\n" for e in rows))
        settings: dict[str, Any] = {
            "data": data, "out": folder / f"run-{index}", "seed": case.seeds[index],
            "training": {
                **TRAINING, "max_length": 256, "seed": case.seeds[index], "update": case.update,
            },
        }  # fmt: skip
        settings.pop("seed")
        if case.parts is not None:
            settings["parts"] = list(case.parts)
        if run is None:
            adapter = {"rank": 2, "seed": seed_of(0, -1)}
            settings |= {"model": case.model, "adapter": adapter, "dtype": "float32"}
            if curvature is not None:
                settings |= {"curvature": curvature, "keep_state": len(case.rows) > 1}
            run = retain.train_run(quiet=True, progress=False, **settings)
        else:
            run = retain.continue_run(run.out, quiet=True, progress=False, **settings)
        state = run.out / "state"
        if index + 1 < len(case.rows) and not keeps:
            known.append({})
        elif index + 1 < len(case.rows):
            known.append(
                {"curvature": _bytes(state / "source.safetensors"),
                 "past": _bytes(state / "past.safetensors")}
            )  # fmt: skip
    saved = load_file(run.out / "adapter" / "adapter_model.safetensors")
    return saved, known


def _bytes(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _row(e: Example) -> dict[str, Any]:
    if not e.predict:
        return {"input_ids": list(e.tokens), "label": int(e.targets[0])}
    ids = [*e.tokens, e.targets[-1]]
    labels = [-100, *(t if p else -100 for t, p in zip(e.targets, e.predict, strict=True))]
    return {"input_ids": ids, "labels": labels}


def _saved(state: State) -> State:
    """Names as PEFT saves them."""
    return {
        n.replace("modules_to_save.default.", "").replace(".default.weight", ".weight"): t
        for n, t in state.items()
    }


def same(one: Ends, other: Ends) -> None:
    exactly(_saved(one[0]), _saved(other[0]), check_device=False)
    assert len(one[1]) == len(other[1])
    for known, found in zip(one[1], other[1], strict=True):
        assert known.keys() == found.keys()
        for name in known:
            a, b = unpack_curvature(known[name]), unpack_curvature(found[name])
            mine, theirs = (
                {n: t for block in c.blocks for n, t in _tensors(c, block)} for c in (a, b)
            )
            exactly(mine, theirs)


def _tensors(curvature: Any, name: str) -> list[tuple[str, Tensor]]:
    kept = [(f"{name}/{n}", t) for n, t in curvature.blocks[name].tensors().items()]
    anchor = curvature.anchor.get(name, ())
    return [*kept, *((f"{name}/anchor{i}", t) for i, t in enumerate(anchor))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_tiny(tmp_path_factory.mktemp(kind), kind=kind) for kind in ("llama", "bert")}


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.shows("studies", "force", "filter", "fresh rows", only="llama-3")
@pytest.mark.shows("plain loop", "head", only="bert-1")
@pytest.mark.shows("studies", "head", only="bert-1")
@pytest.mark.shows("retain train", "head", only="bert-1")
def test_every_door_ends_at_the_same_place(
    kind: str, tasks: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    case = Case(tmp_path / "study", folders[kind], tasks, None)
    want = by_callback(case, tmp_path)
    assert any(float(t.abs().max()) > 0 for n, t in want[0].items() if "lora_B" in n)
    doors = [by_loop, by_study]
    if kind == "llama" or tasks == 1:
        doors.append(by_runs)
    for door in doors:
        same(want, door(case, tmp_path))


COMBINED = [tuple(p for p in PARTS if p not in left)
            for n in (1, 2) for left in itertools.combinations(PARTS, n)]  # fmt: skip


@pytest.mark.parametrize("parts", COMBINED, ids="+".join)
def test_every_part_may_be_left_out_in_every_door(
    parts: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Alone and in pairs, over two tasks of a decoder; the head's of a classifier."""
    case = Case(tmp_path / "study", folders["llama"], 2, parts)
    want = by_callback(case, tmp_path)
    for door in (by_loop, by_study, by_runs):
        same(want, door(case, tmp_path))


@pytest.mark.shows("studies", "KL on answers")
def test_the_divergence_in_every_door(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of ``retain train`` the source is a file: see `tests/training/test_resume.py`."""
    case = Case(tmp_path / "study", folders["llama"], 2, None, kl=2.0)
    want = by_callback(case, tmp_path)
    for door in (by_loop, by_study):
        same(want, door(case, tmp_path))
    plain, _ = by_callback(Case(tmp_path / "plain", folders["llama"], 2, None), tmp_path)
    assert any(not torch.equal(plain[name], want[0][name]) for name in plain)


def test_a_proximal_step_in_every_door(folders: dict[str, Path], tmp_path: Path) -> None:
    """In fresh rows beside those of earlier tasks, which stay."""
    case = Case(tmp_path / "study", folders["llama"], 3, None, update="proximal")
    want = by_callback(case, tmp_path)
    for door in (by_loop, by_study, by_runs):
        same(want, door(case, tmp_path))
    plain, _ = by_callback(Case(tmp_path / "plain", folders["llama"], 3, None), tmp_path)
    assert any(not torch.equal(plain[name], want[0][name]) for name in plain)


@pytest.mark.parametrize("parts", [("head",), ("rows", "filter"), ()], ids=str)
def test_parts_of_a_classifier(
    parts: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    case = Case(tmp_path / "study", folders["bert"], 2, parts)
    want = by_callback(case, tmp_path)
    same(want, by_loop(case, tmp_path))
    same(want, by_study(case, tmp_path))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_strength_zero_and_no_other_part_is_plain_training(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    case = Case(tmp_path / "study", folders[kind], 1, ["force"])
    model, recipe = case.begun()
    recipe.strength = 0.0
    plain, _ = case.begun()
    for each, held in ((model, recipe), (plain, None)):
        train(
            each, case.rows[0], case.config(0), recipe=held, columns=case.columns[0],
            progress=False,
        )  # fmt: skip
    exactly(_trained(model), _trained(plain))


def test_an_auto_that_is_told_its_parts_has_no_others() -> None:
    method = Auto(parts=["rows"])
    assert not method.fits_head
    assert method.recipe.parts == {"rows"}
    assert reader_of([])(3, 0) == []
