"""Real runs of a tiny model: what a record says, and that a resumed run is the same to the bit."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import BartConfig, BartModel

from retain import files
from retain.data.general_prompts import SKILLS, general_prompts
from retain.documents import sealed
from retain.errors import ConfigError, ModelError
from retain.records import RunEvaluation, RunSpec, flags_of
from retain.retention.method import Context
from retain.retention.methods.auto import Wiener
from retain.retention.registry import METHODS as REGISTRY
from retain.study import state
from retain.study.fits import forget_fits, sharing
from retain.study.grid import Grid, expand, task_at
from retain.study.material import load_base
from retain.study.runner import execute
from retain.study.sequence import run_sequence
from retain.study.spec import read_study
from retain.study.state import SequenceState
from retain.study.studies import run_study
from retain.study.tables import tables
from retain.study.work import Work, changed_inputs, model_digest, read_record, standing
from study_parts import TEXT, tiny_study


def opened(path: Path, out: Path, **options: Any) -> tuple[Grid, Work]:
    spec = read_study(path, **options)
    work = Work(spec.name, out, path.parent, path.parent / "data")
    return expand(spec, path.parent), work


class Stop(BaseException):
    """Stands for a kill."""


class Keep(SequenceState):
    """Stops right after a task was kept."""

    stop_after = -1

    def save(self, done: int, *rest: Any) -> None:
        super().save(done, *rest)
        if done == self.stop_after:
            raise Stop


def plain(record: dict[str, Any]) -> str:
    """A record without times and memory."""
    left = {k: v for k, v in record.items() if k not in ("seconds", "peak_memory_gib")}
    return json.dumps(left)


METHODS: dict[str, Any] = {
    "none": {},
    "kfac": {"strength": 100.0, "rows": 8},
    "replay": {"per_task": 2},
    "olora": {},
    "auto": {"rows": 4},
    "wiener": {"rows": 4},
}


def test_the_record_of_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    path = tiny_study(tmp_path / "study", tiny_folder, methods={"kfac": METHODS["kfac"]})
    grid, work = opened(path, tmp_path / "out")
    run = grid.runs[0]
    assert execute(run, work).error is None
    record = read_record(work.record(run.key))
    assert record is not None and record.sizes and record.parameters and record.seconds
    assert record.tasks == ["one", "two", "three"]
    assert record.metrics == ["accuracy"] * 3
    assert [len(row) for row in record.matrix] == [3, 3, 3]
    shares = [[sum(flags_of(bits)) / 8 for bits in row] for row in record.right]
    assert shares == record.matrix  # of accuracy, the score is the share of right rows
    assert math.isfinite(record.metrics_summary["update_size"])
    assert len(record.before) == len(record.losses) == len(record.predicted) == 3
    assert record.sizes.plain() == {"train": [12] * 3, "test": [8] * 3}
    assert [r.after for r in record.retention] == [0, 1, 2]
    assert all(r.kl > 0 for r in record.retention)
    assert all(nats > 0 for nats in record.predicted)
    assert record.metrics_summary["average"] == pytest.approx(sum(record.matrix[-1]) / 3)
    share = record.parameters.trainable / record.parameters.base
    assert record.parameters.share == share
    assert record.seconds.total >= record.seconds.train > 0
    assert record.peak_memory_gib > 0
    assert record.general is None
    assert not work.state(run.key).exists()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_own_answers_are_compared_with_the_bases(
    tiny_folder: Path, tmp_path: Path, adapter: str
) -> None:
    path = tiny_study(
        tmp_path / "study", tiny_folder, seeds=[0], methods={"none": {}},
        adapters={"lora": {"kind": adapter}}, evaluation={"own_answers": 10},
    )  # fmt: skip
    grid, work = opened(path, tmp_path / "out")
    assert execute(grid.runs[0], work).error is None
    record = read_record(work.record(grid.runs[0].key))
    assert record is not None and record.own_answers is not None
    rows = record.own_answers.rows
    assert [row["skill"] for row in rows] == [*SKILLS, *SKILLS[:2]]  # skills take turns
    assert {row["id"] for row in rows} <= {p.id for p in general_prompts(half="held-out")}
    assert any(row["base"] != row["tuned"] for row in rows)
    total = sum(row["log_ratio"] for row in rows) / sum(row["tokens"] for row in rows)
    assert record.metrics_summary["log_ratio"] == pytest.approx(total)
    assert total > 0  # what a model writes is likelier to itself
    same = sum(row["first_word"] for row in rows) / len(rows)
    assert record.metrics_summary["first_word"] == same
    (cell,) = tables([record])["cells"]
    assert cell["metrics"]["log_ratio"]["mean"] == pytest.approx(total)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.shows("studies", "resume")
def test_a_stopped_run_goes_on_to_the_same_record(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    path = tiny_study(
        tmp_path / "study", tiny_folder, methods={method: METHODS[method]},
        adapters={"lora": {"rank": 2, "dropout": 0.2}},
    )  # fmt: skip
    grid, work = opened(path, tmp_path / "out")
    run = grid.runs[0]
    whole = run_sequence(run, state=Keep(tmp_path / "a", {}), work=work)
    for stop in (0, 2):
        folder = tmp_path / f"stop-{stop}"
        state = Keep(folder, {"version": 1})
        state.stop_after = stop
        with pytest.raises(Stop):
            run_sequence(run, state=state, work=work)
        said: list[str] = []
        torch.manual_seed(99)  # nothing may depend on what was before
        again = run_sequence(run, state=Keep(folder, {"version": 1}), work=work, say=said.append)
        assert plain(again) == plain(whole)
        assert said.count("task 1/3 one: training") == (stop == 0)
        assert "scores before" not in said
        assert again["seconds"]["train"] > 0


SHARED: dict[str, Any] = {
    "auto": {"rows": 4},
    "no-force": {"kind": "auto", "rows": 4, "parts": ["rows", "filter"]},
    "kfac": {"strength": 100.0, "rows": 8},
    "diagonal": {"strength": 100.0, "rows": 8},
    "none": {},
}


def test_runs_alike_fit_their_source_once(tiny_folder: Path, tmp_path: Path) -> None:
    path = tiny_study(tmp_path / "study", tiny_folder, methods=SHARED, seeds=[0, 1])
    spec = read_study(path)
    grid, work = opened(path, tmp_path / "shared")
    assert len(sharing(grid.runs)) == 8  # all but the plain ones
    fits: list[int] = []
    there: list[set[str]] = []
    folder = work.out / "fits"

    def counted(self: Context, rows: Any, *args: Any, **options: Any) -> Any:
        fits.append(len(rows))
        return fit(self, rows, *args, **options)

    def tell(run: RunSpec, _outcome: Any) -> None:
        there.append({p.name for p in folder.glob("*")} if folder.exists() else set())

    fit = Context.fit
    with patch.object(Context, "fit", counted):
        run_study(spec, grid, work, tell=tell)
        shared = len(fits)
        grid, alone = opened(path, tmp_path / "alone")
        for run in grid.runs:
            assert execute(run, alone).error is None
    assert (shared, len(fits) - shared) == (2 * 9, 2 * 10)  # of auto and no-force one a seed
    assert not any(folder.rglob("*.safetensors"))
    assert {"seed-0"} in there and {"seed-1"} in there and {"seed-0", "seed-1"} not in there
    for run in grid.runs:
        one, other = (read_record(w.record(run.key)) for w in (work, alone))
        assert one is not None and other is not None and one.seconds and other.seconds
        assert one.matrix == other.matrix and one.losses == other.losses
        assert one.retention == other.retention and one.predicted == other.predicted
        assert one.method_bytes == other.method_bytes


def test_a_shared_fit_counts_its_time_and_is_made_again_where_it_is_damaged(
    tiny_folder: Path, tmp_path: Path
) -> None:
    path = tiny_study(tmp_path / "study", tiny_folder, methods=SHARED, seeds=[0])
    grid, work = opened(path, tmp_path / "out")
    work = replace(work, shares=sharing(grid.runs))
    run = {r.method.label: r for r in grid.runs}
    assert execute(run["auto"], work).error is None
    (note,) = (work.out / "fits").rglob("*.json")
    note.write_text(json.dumps(sealed({"seconds": 1000.0})))
    assert execute(run["no-force"], work).error is None
    record = read_record(work.record(run["no-force"].key))
    assert record is not None and record.seconds is not None
    assert record.seconds.method >= 1000 and record.seconds.total >= record.seconds.method
    (kept,) = (work.out / "fits").rglob("*.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    again = replace(work, out=tmp_path / "again")
    shutil.copytree(work.out / "fits", again.out / "fits")
    assert execute(run["no-force"], again).error is None
    assert next((again.out / "fits").rglob("*.safetensors")).read_bytes() == whole
    other = read_record(again.record(run["no-force"].key))
    assert other is not None and other.matrix == record.matrix
    assert other.seconds is not None and other.seconds.method < 1000


def test_a_fit_outlives_another_command_that_forgets_its_seed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_study(
        tmp_path / "study", tiny_folder, seeds=[0], orders={"one": ["tasks/one.yaml"]},
        methods={"kfac": METHODS["kfac"], "again": {**METHODS["kfac"], "kind": "kfac"}},
    )  # fmt: skip
    grid, work = opened(path, tmp_path / "out")
    run, forgotten = grid.runs[0], []

    def late(file: Path) -> None:
        to_disk(file)
        if "fits" in file.parts and not forgotten:  # before the file has its name
            forgotten.append(file.name)
            forget_fits(work, run, [])

    to_disk = files.to_disk
    monkeypatch.setattr(files, "to_disk", late)
    outcome = execute(run, replace(work, shares=sharing(grid.runs)))
    assert outcome.status == "done" and len(forgotten) == 1
    assert len(list((work.out / "fits").rglob("*.safetensors"))) == 1  # for its own other runs


def test_what_no_task_changes_is_written_once(tiny_folder: Path, tmp_path: Path) -> None:
    path = tiny_study(tmp_path / "study", tiny_folder, seeds=[0], methods={"auto": {"rows": 4}})
    grid, work = opened(path, tmp_path / "out")
    written: list[str] = []
    save = state._write_tensors

    def noted(file: Path, tensors: Any) -> None:
        written.append(f"{file.name}: {', '.join(sorted(tensors))}"[:40])
        save(file, tensors)

    with patch.object(state, "_write_tensors", noted):
        assert execute(grid.runs[0], work).error is None
    told = [line for line in written if not line.startswith("adapter")]
    assert told == [
        "method-0.safetensors: ", "constant.safetensors: curvature",
        "method-1.safetensors: past", "method-2.safetensors: past", "method-3.safetensors: past",
    ]  # fmt: skip


def test_seeds_and_methods_make_a_difference(tiny_folder: Path, tmp_path: Path) -> None:
    path = tiny_study(tmp_path / "study", tiny_folder)
    grid, work = opened(path, tmp_path / "out")
    found = [
        plain(run_sequence(run, state=Keep(tmp_path / run.key, {}), work=work))
        for run in grid.runs[:4]
    ]
    assert len(set(found)) == 4
    again = run_sequence(grid.runs[0], state=Keep(tmp_path / "again", {}), work=work)
    assert plain(again) == found[0]


def test_a_state_of_other_versions_is_not_gone_on_from(tmp_path: Path) -> None:
    kept = SequenceState(tmp_path / "s", {"torch": "1"})
    kept.save(1, {"matrix": [[0.5]]}, {"a": torch.ones(2, 3, dtype=torch.bfloat16).T}, {})
    both = torch.arange(4.0)
    method = {"f": torch.tensor(3.0), "g": both, "h": both, "half": both[2:]}
    kept.save(2, {"matrix": []}, {"a": torch.zeros(2)}, method)
    found = kept.load()
    assert found is not None and (found.done, found.data) == (2, {"matrix": []})
    assert {n: t.tolist() for n, t in found.method.items()} == {
        "f": 3.0, "g": [0, 1, 2, 3], "h": [0, 1, 2, 3], "half": [2, 3],
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "adapter-2.safetensors", "method-2.safetensors", "state.json",
    ]  # fmt: skip
    assert SequenceState(tmp_path / "s", {"torch": "2"}).load() is None
    (tmp_path / "s" / "adapter-2.safetensors").write_bytes(b"half")
    assert kept.load() is None
    SequenceState(tmp_path / "s", {}, writes=False).clear()
    assert (tmp_path / "s").exists()
    kept.clear()
    assert not (tmp_path / "s").exists()


OWN = """
from retain.retention.method import Method

class Own(Method):
    name, broken, seen = "own", True, []

    def before_task(self, task):
        self.seen.append(task.index)
        if task.index == 1 and self.broken:
            raise ValueError("odd")
        return task.examples
"""


def test_a_failed_run_goes_on_with_the_code_of_its_first_tasks_alone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own_method.py"
    file.write_text(OWN, encoding="utf-8")
    module = importlib.import_module("own_method")
    monkeypatch.setitem(REGISTRY, "own", module.Own)
    path = tiny_study(tmp_path / "study", tiny_folder, seeds=[0], methods={"own": {}})
    for change, seen in (("", [0, 1, 1, 2]), ("    mended = True\n", [0, 1, 2])):
        grid, work = opened(path, tmp_path / f"out-{len(seen)}")
        module.Own.broken = True
        assert execute(grid.runs[0], work).status == "failed"
        if change:
            file.write_text(OWN + change, encoding="utf-8")
            module = importlib.reload(module)
            monkeypatch.setitem(REGISTRY, "own", module.Own)
        module.Own.broken = False
        ended = execute(grid.runs[0], replace(work, retry_failed=True))
        assert ended.status == "done" and module.Own.seen == seen
        assert any("begins again" in note for note in ended.notes) == bool(change)
        module.Own.seen.clear()


def test_independent_runs_give_intransigence(tiny_folder: Path, tmp_path: Path) -> None:
    from retain.study.studies import run_study

    path = tiny_study(
        tmp_path / "study", tiny_folder, seeds=[0],
        methods={"none": {}, "l2": {"strength": 1.0}},
        runs=[{"independent": True, "method": "none"}, {}],
    )  # fmt: skip
    spec = read_study(path)
    grid, work = opened(path, tmp_path / "out")
    assert run_study(spec, grid, work)["done"] == 5
    found = json.loads((work.out / "study.json").read_text())
    alone = [r["matrix"][0][0] for r in found["runs"][:3]]
    held = found["runs"][-1]
    gaps = [a - held["matrix"][i][i] for i, a in enumerate(alone)]
    assert held["metrics_summary"]["intransigence"] == pytest.approx(sum(gaps) / 3)
    cells = {(c["method"], c["order"]): c for c in found["tables"]["cells"]}
    cell = cells["l2", "three"]
    average = held["metrics_summary"]["average"]
    assert cell["metrics"]["share_of_independent"]["values"] == [
        pytest.approx(average / (sum(alone) / 3))
    ]
    plain_average = cells["none", "three"]["metrics"]["average"]["mean"]
    assert cell["paired"]["average"] == {
        "mean": pytest.approx(average - plain_average), "low": None, "high": None, "n": 1,
    }  # fmt: skip
    assert "paired" in cells["none", "three"] and cells["none", "three"]["paired"] == {}


def test_an_encoder_holds_all_tasks_side_by_side(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = {t: i for i, t in enumerate(["[PAD]", "[UNK]", *"xyz0123"])}
    raw = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                   num_attention_heads=2, max_position_embeddings=32, pad_token_id=0,
                   initializer_range=0.5)
    ).save_pretrained(tmp_path / "bert")  # fmt: skip
    path = tiny_study(
        tmp_path / "study", tmp_path / "bert", seeds=[0],
        methods={"none": {}, "fitted": {"kind": "none", "head": "fitted"}},
        adapters={"lora": {"rank": 2}, "full": {}},
    )  # fmt: skip
    for task in (tmp_path / "study" / "tasks").iterdir():
        task.write_text(task.read_text() + 'texts: ["{{text}}"]\n')
    regression = tmp_path / "study" / "tasks" / "three.yaml"
    text = regression.read_text().replace("kind: choice", "kind: regression\nmetric: pearson")
    regression.write_text("".join(x for x in text.splitlines(True) if "options" not in x))
    grid, work = opened(path, tmp_path / "out")
    losses = {}
    for run in grid.runs:
        found = run_sequence(run, state=Keep(tmp_path / run.key, {}), work=work)
        losses[run.adapter.name, run.method.label] = found["losses"]
        assert found["metrics"] == ["accuracy", "accuracy", "pearson"]
        assert found["retention"] == []
        assert found["losses"][2] is None and found["losses"][0] > 0
        state = Keep(tmp_path / f"{run.key}-stopped", {})
        state.stop_after = 1
        with pytest.raises(Stop):
            run_sequence(run, state=state, work=work)
        state.stop_after = -1
        assert plain(run_sequence(run, state=state, work=work)) == plain(found)
    for adapter in ("lora", "full"):
        assert losses[adapter, "fitted"] != losses[adapter, "none"]

    asked = grid.runs[0].model_copy(update={"evaluation": RunEvaluation(own_answers=8)})
    with pytest.raises(ConfigError, match="the model writes no answers"):
        run_sequence(asked, state=Keep(tmp_path / "asked", {}), work=work)


def test_an_encoder_decoder_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bart"
    shutil.copytree(tiny_folder, folder)
    size: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8,
                            "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    BartModel(BartConfig(vocab_size=258, **size)).save_pretrained(folder)
    grid, work = opened(tiny_study(tmp_path / "study", folder), tmp_path / "out")
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        load_base(grid.runs[0], [task_at(t, work.base) for t in grid.runs[0].order.tasks])


def test_a_default_that_changes_is_another_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record says all that its result depends on, also where the study says nothing."""
    path = tiny_study(tmp_path, tiny_folder, methods={"wiener": {}})
    before = opened(path, tmp_path / "out")[0].runs[0]
    assert before.method.options["gain"] == 3.0
    assert before.adapter.options["dropout"] == 0.0
    init = Wiener.__init__
    monkeypatch.setattr(init, "__kwdefaults__", {**init.__kwdefaults__, "gain": 4.0})
    after = opened(path, tmp_path / "out")[0].runs[0]
    assert after.method.options["gain"] == 4.0
    assert after.key != before.key


NEXT = [[False, False, True], [False] * 3, [False] * 3]
FEW = [[False, True, True], [True, False, True], [False] * 3]


@pytest.mark.parametrize(
    ("asked", "unscored"),
    [({"unseen": "next"}, NEXT), ({"unseen": "none", "earlier": "last"}, FEW)],
)
def test_only_some_tasks_are_scored(
    asked: dict[str, str], unscored: list[list[bool]], tiny_folder: Path, tmp_path: Path
) -> None:
    found = []
    for name, evaluation in {"all": {}, "few": asked}.items():
        path = tiny_study(tmp_path / name, tiny_folder, methods={"none": {}}, evaluation=evaluation)
        grid, work = opened(path, tmp_path / f"out-{name}")
        run = grid.runs[0]
        assert ("earlier" in run.plain()["evaluation"]) is ("earlier" in evaluation)  # old keys
        found.append(run_sequence(run, state=Keep(tmp_path / run.key, {}), work=work))
    whole, part = found
    assert (part["before"], part["losses"]) == (whole["before"], whole["losses"])
    assert [[s is None for s in row] for row in part["matrix"]] == unscored
    for row, other in zip(part["matrix"], whole["matrix"], strict=True):
        assert all(a is None or a == b for a, b in zip(row, other, strict=True))
    said, wanted = part["metrics_summary"], whole["metrics_summary"]
    for name in ("average", "learning", "backward_transfer", "intransigence"):
        assert said[name] == wanted[name]
    assert said["forgetting"] <= wanted["forgetting"]  # its best may be of before it was learned
    if "earlier" in asked:
        assert said["forward_transfer"] is None and wanted["forward_transfer"] is not None
        assert said["forgetting"] == pytest.approx(-said["backward_transfer"])
    else:
        assert said["forward_transfer"] == wanted["forward_transfer"]


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_scores_before_training_are_made_once(
    adapter: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Two seeds of what begins as the base model share them; the record is the same either way."""
    path = tiny_study(
        tmp_path / "study", tiny_folder, seeds=[0, 1], adapters={adapter: {}},
        methods={"none": {}},
    )  # fmt: skip
    grid, work = opened(path, tmp_path / "out")
    alone = Work(work.study, tmp_path / "other", work.base, work.data_dir)
    for run in grid.runs:
        found = run_sequence(run, state=Keep(tmp_path / run.key, {}), work=work)
        again = Keep(tmp_path / f"{run.key}-alone", {})
        assert plain(run_sequence(run, state=again, work=alone)) == plain(found)
        for file in (alone.out / "untrained").iterdir():
            file.write_text("{")  # cut: made again
    files = list((work.out / "untrained").iterdir())
    assert len(files) == (1 if adapter == "lora" else 2)
    kept = json.loads(files[0].read_text())
    assert kept["seconds"]["evaluate"] > 0 and kept["seconds"]["total"] > 0
    stamp = Keep(tmp_path / "stamped", {"commit": "another"})
    with patch("retain.study.measures.write_shared") as write:
        run_sequence(grid.runs[0], state=stamp, work=work)
    assert write.call_count == 1  # scores of other code are not taken
    first = grid.runs[0].plain()
    shorter = RunSpec.model_validate(first | {"training": first["training"] | {"max_length": 8}})
    with patch("retain.study.measures.write_shared") as write:
        run_sequence(shorter, state=Keep(tmp_path / "shorter", {}), work=work)
    assert write.call_count == 1  # nor those of rows that were cut elsewhere
    with (
        patch("retain.study.measures.write_shared") as write,
        patch("retain.study.measures.hardware", return_value={"accelerator": "another"}),
    ):
        run_sequence(grid.runs[0], state=Keep(tmp_path / "moved", {}), work=work)
    assert write.call_count == 1  # nor another machine's


def test_a_text_file_is_cut_into_rows(tiny_folder: Path, tmp_path: Path) -> None:
    source = {"kind": "file", "path": "source.txt", "rows": 6, "heldout": 3, "max_length": 8}
    path = tiny_study(
        tmp_path / "study", tiny_folder, source=source, seeds=[0], methods={"kfac": {"rows": 6}}
    )
    (path.parent / "source.txt").write_text(f"{TEXT} " * 12, encoding="utf-8")
    grid, work = opened(path, tmp_path / "out")
    outcome = execute(grid.runs[0], work)
    assert outcome.status == "done", outcome
    record = read_record(work.record(grid.runs[0].key))
    assert record is not None
    assert record.retention[-1].tokens == 3 * 7  # three whole rows of eight tokens


def test_a_source_folder_that_changes_is_noticed(tiny_folder: Path, tmp_path: Path) -> None:
    source = {"kind": "data", "name": "text", "rows": 6, "heldout": 3, "max_length": 8}
    path = tiny_study(
        tmp_path / "study", tiny_folder, source=source, seeds=[0], methods={"none": {}},
        orders={"one": ["tasks/one.yaml"]},
    )  # fmt: skip
    grid, work = opened(path, tmp_path / "out")
    run, text = grid.runs[0], work.data_dir / "text" if work.data_dir else tmp_path
    failed = execute(run, work)
    assert failed.error is not None and "no such source" in failed.error
    text.mkdir()
    for split in ("validation", "test"):
        (text / f"{split}.txt").write_text(f"{TEXT} " * 12, encoding="utf-8")
    assert execute(run, work).error is None  # it has come since
    record = standing(run, work)
    assert record is not None and record.inputs is not None
    (text / "test.txt").write_text(f"{TEXT} and more " * 12, encoding="utf-8")
    assert changed_inputs(record, run, work) == ["source test"]
    assert standing(run, work) is None
    inputs = {name: d for name, d in record.inputs.items() if not name.startswith("source")}
    earlier = record.model_copy(update={"inputs": inputs})  # of a version that did not look
    assert changed_inputs(earlier, run, work) == []


def test_a_model_in_one_file_that_changes_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert model_digest(str(file)) is None
    file.write_bytes(b"GGUF")
    first = model_digest(str(file))
    file.write_bytes(b"GGUF and more")
    assert first is not None and model_digest(str(file)) not in (None, first)
