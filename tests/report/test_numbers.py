"""Reading studies, and the means, intervals and differences that are made of them."""

from __future__ import annotations

import copy
import csv
import io
import json
import statistics

import pytest
from synthetic import (
    METHODS,
    TASKS,
    fail,
    group_of,
    make_adapters,
    make_run,
    make_study,
    make_wide,
    scoreless,
)

from retain.intervals import Estimate, wilson
from retain.records import StudyRecord
from retain.report.cells import Cell, Group, groups
from retain.report.charts import panels
from retain.report.finding import finding
from retain.report.metrics import METRICS, metric
from retain.report.names import names, series
from retain.report.tables import (
    Column,
    Entry,
    Row,
    Table,
    difference_table,
    failures,
    results_table,
    score_table,
    study_tables,
)


def _cell(group: Group, name: str) -> Cell:
    return group.cells[names(group).index(name)]


def test_cells_hold_what_the_runs_say() -> None:
    data = make_study()
    group = group_of(data)
    assert names(group) == [
        "plain LoRA", "l2", "EWC", "K-FAC 1", "K-FAC 10", "K-FAC 100", "output KL", "O-LoRA",
        "self-replay", "replay",
    ]  # fmt: skip
    assert series(group)[3:6] == ["K-FAC"] * 3
    assert [cell.stores for cell in group.cells].index(True) == 9
    runs = [r for r in data["runs"] if r["config"]["method"]["label"] == "K-FAC 10"]
    cell = _cell(group, "K-FAC 10")
    found = cell.mean("forgetting")
    assert found and found.mean == pytest.approx(
        statistics.mean(r["metrics_summary"]["forgetting"] for r in runs)
    )
    last = cell.mean("kl")
    assert last and last.mean == pytest.approx(
        statistics.mean(r["retention"][-1]["kl"] for r in runs)
    )
    matrix = cell.matrix()
    assert len(matrix) == 5
    for i in range(4):
        for j in range(4):
            score = matrix[i + 1][j]
            assert score
            assert score.mean == pytest.approx(statistics.mean(r["matrix"][i][j] for r in runs))
    top = matrix[0][1]
    assert top and top.mean == pytest.approx(statistics.mean(r["before"][1] for r in runs))
    seen = cell.curve("seen")[2]
    assert seen and seen.mean == pytest.approx(
        statistics.mean(statistics.mean(r["matrix"][2][:3]) for r in runs)
    )
    assert _cell(group, "self-replay").mean("average") == Estimate(
        next(
            r["metrics_summary"]["average"]
            for r in data["runs"]
            if r["config"]["method"]["name"] == "self-replay"
        ),
        None,
        None,
        1,
    )


def test_scores_go_by_the_task_where_seeds_draw_the_order() -> None:
    orders = [["sst2", "mnli", "boolq"], ["boolq", "sst2", "mnli"], ["mnli", "boolq", "sst2"]]
    data = make_study()
    data["runs"] = [make_run(order, METHODS[0], seed) for seed, order in enumerate(orders)]
    group = group_of(data)
    table = score_table(group)
    assert table is not None and [c.name for c in table.head[1:]] == orders[0]
    assert [row.name for row in table.rows] == ["before learning", "plain LoRA"]
    for j, task in enumerate(orders[0]):
        places = [order.index(task) for order in orders]
        for row, scores in zip(table.rows, ("before", "last"), strict=True):
            want = statistics.mean(
                (r["before"] if scores == "before" else r["matrix"][-1])[place]
                for r, place in zip(data["runs"], places, strict=True)
            )
            assert row.entries[j].value == pytest.approx(want)
    said = json.dumps([panel.rows for panel in panels(group)])
    assert "task 2" in said and "2. mnli" not in said and "after mnli" not in said
    data["runs"] = data["runs"][:1]
    said = json.dumps([panel.rows for panel in panels(group_of(data))])
    assert "2. mnli" in said and "after mnli (task 2)" in said


def test_names_say_the_adapter_only_where_it_differs() -> None:
    group = group_of(make_wide())
    assert names(group)[-5:] == [
        "olora", "full (no method)", "bottleneck (no method)", "prefix (no method)", "osf",
    ]  # fmt: skip
    assert len(set(series(group))) == 15


def test_differences_are_paired_by_seed() -> None:
    data = make_study()
    group = group_of(data)
    by_seed = {
        name: {
            r["seed"]: r["metrics_summary"]["average"]
            for r in data["runs"]
            if r["config"]["method"]["name"] == name and r["status"] == "done"
        }
        for name in ("none", "O-LoRA")
    }
    gaps = [by_seed["O-LoRA"][seed] - by_seed["none"][seed] for seed in (0, 1)]
    found = _cell(group, "O-LoRA").diffs["average"]
    assert found and found.n == 2
    assert found.mean == pytest.approx(statistics.mean(gaps))
    assert group.plain is not None and group.plain.diffs == {}


@pytest.mark.parametrize("after", [[0, 1, 2, 3], [1, 2, 3, 4]])
def test_retention_counts_from_nought_or_one(after: list[int]) -> None:
    run = make_run(TASKS, METHODS[0], 0)
    for row, place in zip(run["retention"], after, strict=True):
        row["after"] = place
    last = [row["kl"] for row in run["retention"]]
    run["retention"] = run["retention"][2:]
    group = group_of({"name": "s", "runs": [run]})
    curve = [found and found.mean for found in group.cells[0].curve("kl")]
    assert curve == [None, None, *last[2:]]


def test_tasks_learned_alone_are_put_together() -> None:
    data = make_adapters()
    found = groups([StudyRecord.model_validate(data)])
    assert [group.pooled for group in found] == [True] + [False] * 6
    pooled = found[0]
    assert pooled.tasks == ["cola", "sst2", "mrpc", "stsb", "rte", "qnli"]
    cell = _cell(pooled, "lora-r1")
    for seed in (0, 1):
        scores = [
            r["matrix"][0][0]
            for r in data["runs"]
            if r["config"]["adapter"]["name"] == "lora-r1" and r["seed"] == seed
        ]
        assert cell.values["average"][seed] == pytest.approx(statistics.mean(scores))
    assert _cell(pooled, "prefix").mean("kl") is None
    scores_of = score_table(pooled)
    assert scores_of and [column.name for column in scores_of.head[1:]] == pooled.tasks


def test_where_scores_tell_nothing_the_loss_tells_what_was_learned() -> None:
    alike, told = scoreless(), scoreless()
    assert group_of(alike).learned == "loss"
    told["runs"][0]["metrics_summary"]["learning"] = 0.04
    assert group_of(told).learned == "loss"
    told["runs"][0]["metrics_summary"]["learning"] = 0.3
    assert group_of(told).learned == "learning"
    for run in alike["runs"]:
        run["losses"] = []
    assert group_of(alike).learned == "learning"


def test_models_whose_folders_share_a_name_are_told_apart() -> None:
    models = ["tiny", "other/tiny", "/a/x/last", "/a/y/last/", "someone/alone"]
    runs = [make_run(TASKS, METHODS[0], 0, model=model) for model in models]
    found = groups([StudyRecord.model_validate({"name": "s", "runs": runs})])
    assert [g.model for g in found] == ["tiny", "other/tiny", "x/last", "y/last", "alone"]


def test_sequences_come_before_tasks_alone() -> None:
    sequence = [make_run(TASKS, METHODS[0], 0)]
    alone = [make_run([task], METHODS[0], 0, order=task) for task in TASKS]
    found = groups([StudyRecord.model_validate({"name": "s", "runs": alone + sequence})])
    assert [(group.length, group.pooled) for group in found] == [(4, False), (1, True)] + [
        (1, False)
    ] * 4
    assert all(group.plain is not None for group in found)


def test_a_name_in_latex_is_no_option_of_the_line_before() -> None:
    rows = [Row(name, "", [Entry("1")]) for name in ("lora", "[ours]", "*x")]
    text = Table("t", "T", "t", [Column("Method"), Column("Seeds")], rows).latex("t")
    assert text.splitlines()[-5:-3] == [r"{}[ours] & 1 \\", r"{}*x & 1 \\"]
    assert "\nlora & 1" in text


def test_a_task_that_two_orders_learn_alone_counts_once() -> None:
    """The table of scores ended in an IndexError, and the mean had the task twice."""
    orders = {"solo": "sst2", "sst2": "sst2", "mnli": "mnli"}
    runs = [make_run([task], METHODS[0], 0, order=name) for name, task in orders.items()]
    found = groups([StudyRecord.model_validate({"name": "s", "runs": runs})])
    assert [group.pooled for group in found] == [True] + [False] * 3
    pooled, table = found[0], score_table(found[0])
    assert pooled.tasks == ["sst2", "mnli"] and pooled.title.endswith("2 tasks, each alone")
    assert table and len(table.rows[0].entries) == 2
    both = [run["metrics_summary"]["average"] for run in runs[1:]]
    assert pooled.cells[0].values["average"] == {0: pytest.approx(sum(both) / 2)}
    found = groups([StudyRecord.model_validate({"name": "s", "runs": runs[:2]})])
    assert not any(group.pooled for group in found)


def test_a_seed_counts_only_where_every_task_has_it() -> None:
    data = make_adapters()
    for i, run in enumerate(data["runs"]):
        config = run["config"]
        if config["adapter"]["name"] == "full" and run["seed"] == 1 and "rte" in run["tasks"]:
            data["runs"][i] = fail(run, "out of memory")
    pooled = group_of(data)
    cell = _cell(pooled, "full")
    assert set(cell.values["average"]) == {0}
    assert failures(pooled) == ["full (rte), seed 1: out of memory"]


def test_only_failures() -> None:
    run = fail(make_run(TASKS, METHODS[0], 0), "no memory")
    group = group_of({"name": "s", "runs": [run]})
    assert group.tasks == TASKS
    assert failures(group) == ["plain LoRA, seed 0: no memory"]
    assert [row.note for row in results_table(group).rows] == ["1 failed"]
    assert "not done" in finding(group) or "No run" in finding(group)


class TestTables:
    def test_missing_values_are_dashes(self) -> None:
        table = results_table(group_of(make_adapters()))
        at = [column.key for column in table.head[1:]].index("kl")
        prefix = next(row for row in table.rows if row.name == "prefix")
        assert prefix.entries[at].text == "\N{EM DASH}"
        assert prefix.entries[at].value is None
        line = next(x for x in table.markdown().splitlines() if x.startswith("| prefix"))
        assert "\N{EM DASH}" in line
        assert "---" in next(x for x in table.latex("t").splitlines() if x.startswith("prefix"))
        rows = list(csv.reader(io.StringIO(table.csv())))
        place = rows[0].index("KL to the base (nats per token)")
        assert rows[[r[0] for r in rows].index("prefix")][place : place + 3] == ["", "", ""]
        for text in (table.markdown(), table.latex("t"), table.csv()):
            assert "None" not in text and "nan" not in text

    def test_rows_say_what_they_are(self) -> None:
        table = results_table(group_of(make_study()))
        notes = {row.name: row.note for row in table.rows}
        assert notes["replay"] == "stores data"
        assert notes["O-LoRA"] == "1 failed"
        assert notes["self-replay"] == ""
        assert "| replay (stores data) | 3 | " in table.markdown()
        one = next(row for row in table.rows if row.name == "self-replay")
        assert all("±" not in entry.line() for entry in one.entries)

    def test_differences_are_strong_only_away_from_nought(self) -> None:
        group = group_of(make_study())
        table = difference_table(group)
        assert table
        for row in table.rows:
            for column, entry in zip(table.head[1:], row.entries, strict=True):
                away = entry.low is not None and (entry.low > 0 or (entry.high or 0) < 0)
                assert bool(entry.verdict) == away
                if away:
                    good = (entry.value or 0) * metric(column.key).better > 0
                    assert entry.verdict == ("better" if good else "worse")

    def test_latex_is_sound(self) -> None:
        data = make_study("a_b & 50% {x}")
        for run in data["runs"]:
            run["config"]["method"]["label"] += "_$#"
        for table in study_tables(group_of(data)):
            text = table.latex("t")
            assert text.count(r"\begin{") == text.count(r"\end{") == 2
            columns = len(table.head)
            for line in text.splitlines():
                if line.endswith(r"\\"):
                    assert line.replace(r"\&", "").count("&") == columns - 1
            bare = text.replace(r"\_", "").replace(r"\$", "").replace(r"\#", "")
            assert "_" not in bare and "#" not in bare

    def test_names_cannot_break_markdown(self) -> None:
        data = make_study()
        for run in data["runs"]:
            run["config"]["method"]["label"] += "|<b>*"
        table = results_table(group_of(data))
        for line in table.markdown().splitlines():
            assert line.replace("\\|", "").count("|") == len(table.head) + 1
        assert "<b>" not in table.markdown().replace("\\<b>", "")

    @pytest.mark.parametrize(
        ("key", "mean", "half", "said"),
        [
            ("average", 0.61234, 0.0149, ("61.2", "1.5")),
            ("average", -0.0001, 0.02, ("0.0", "2.0")),
            ("forgetting", -0.05, None, ("−5.0", "")),
            ("kl", 0.0501, 0.00483, ("0.0501", "0.0048")),
            ("kl", 0.0, 0.0, ("0", "0")),
            ("kl", 3e-7, None, ("3e-7", "")),
            ("kl", -3e-7, None, ("−3e-7", "")),
            ("perplexity", 1.0389, 0.004, ("1.039", "0.004")),
            ("share", 0.0011, None, ("0.11", "")),
            ("seconds", 316.2, None, ("316", "")),
        ],
    )
    def test_numbers_as_text(
        self, key: str, mean: float, half: float | None, said: tuple[str, str]
    ) -> None:
        ends = (None, None) if half is None else (mean - half, mean + half)
        assert metric(key).pair(Estimate(mean, *ends, 1 if half is None else 3)) == said

    def test_metrics_have_a_name_each(self) -> None:
        assert len({m.key for m in METRICS}) == len({m.name for m in METRICS}) == len(METRICS)


class TestFinding:
    def test_says_how_sure(self) -> None:
        text = finding(group_of(make_study()))
        assert "plain LoRA forgets 17.2 ± 1.9 points" in text
        assert "K-FAC 10 forgets least: 7.1 ± 2.7" in text
        assert "leaves 0 out" in text and "picked after the fact" in text
        assert "With stored data, replay forgets 4.4" in text

    def test_says_when_nothing_helps(self) -> None:
        worse = [(n, k, s, d, 1.0 if not s else 0.3, f, m) for n, k, s, d, _, f, m in METHODS]
        few = [worse[0], worse[4], worse[5]]
        runs = [make_run(TASKS, way, seed) for seed in range(3) for way in few]
        text = finding(group_of({"name": "s", "runs": runs}))
        assert "learns clearly less than plain LoRA" in text
        same = [METHODS[0], ("K-FAC", "kfac", 1.0, False, 1.0, 0.9, 0.5)]
        runs = [make_run(TASKS, way, seed) for seed in range(3) for way in same]
        assert "none forgets less" in finding(group_of({"name": "s", "runs": runs}))

    def test_says_why_nothing_is_compared(self) -> None:
        """It said that every setting learned clearly less."""
        plain, held = [make_run(TASKS, METHODS[0], 0)], make_run(TASKS, METHODS[4], 0)
        replay = make_run(TASKS, METHODS[9], 0)
        for others in ([replay], [fail(held, "no memory"), replay]):
            text = finding(group_of({"name": "s", "runs": plain + others}))
            assert "points; no setting without stored data was measured. With stored" in text
        far = [make_run(TASKS, METHODS[4], 1)]
        text = finding(group_of({"name": "s", "runs": plain + far}))
        assert "no setting without stored data has a seed of plain LoRA's" in text
        less = make_run(TASKS, METHODS[5], 0)
        less["metrics_summary"]["learning"] = 0.0
        other = make_run(TASKS, METHODS[5], 1)
        other["metrics_summary"]["learning"] = 0.01
        plain.append(make_run(TASKS, METHODS[0], 1))
        far = [make_run(TASKS, METHODS[3], 2)]
        text = finding(group_of({"name": "s", "runs": [*plain, less, other, *far]}))
        assert "that has a seed of plain LoRA's learns clearly less" in text

    def test_single_tasks_without_kl_have_scores_to_tell(self) -> None:
        """It said that plain LoRA was not done, beside its row in the table."""
        ways = [METHODS[0], METHODS[4]]
        runs = [make_run(TASKS[:1], way, seed) for seed in range(3) for way in ways]
        for run in runs:
            run["retention"] = []
        text = finding(group_of({"name": "s", "runs": runs}))
        assert "not done" not in text
        assert "average score" in text and "forgets" not in text

    def test_overlap_is_said(self) -> None:
        ways = [METHODS[0], ("K-FAC", "kfac", 1.0, False, 1.0, 0.545, 0.4)]
        runs = [make_run(TASKS, way, seed) for seed in range(3) for way in ways]
        text = finding(group_of({"name": "s", "runs": runs}))
        assert "contains 0" in text or "none forgets less" in text

    def test_one_seed(self) -> None:
        runs = [make_run(TASKS, way, 0) for way in (METHODS[0], METHODS[4])]
        assert "one seed, so no interval" in finding(group_of({"name": "s", "runs": runs}))

    def test_a_lucky_seed_does_not_win(self) -> None:
        ways = [(METHODS[0], 3), (METHODS[3], 3), (METHODS[6], 3), (METHODS[5], 1)]
        runs = [make_run(TASKS, way, seed) for way, seeds in ways for seed in range(seeds)]
        for run in runs:  # all learn alike, and the one seed forgets least
            run["metrics_summary"]["learning"] = 0.8
        text = finding(group_of({"name": "s", "runs": runs}))
        assert "of the 2 settings without stored data and of 3 seeds" in text
        assert "one seed" not in text

    def test_one_row_compares_with_nothing(self) -> None:
        pooled = groups([StudyRecord.model_validate(make_wide())])[1]
        text = finding(pooled)
        assert text.startswith("On fixture-135m, 4 tasks, each alone, plain LoRA has an average")

    def test_without_plain_lora(self) -> None:
        runs = [make_run(TASKS, METHODS[4], 0)]
        assert "nothing to compare with" in finding(group_of({"name": "s", "runs": runs}))


def test_plain_training_with_settings_of_its_own_says_which() -> None:
    data = make_wide()
    runs = [r for r in data["runs"] if r["config"]["method"]["kind"] == "none"]
    for run in copy.deepcopy(runs):
        run["config"]["method"] |= {"name": "low-rate", "label": "low-rate"}
        run["key"] += "b"
        data["runs"].append(run)
    found = names(group_of(data))
    assert found[0] == "plain LoRA"
    assert found[-4:] == [
        "plain LoRA, low-rate", "full, low-rate", "bottleneck, low-rate", "prefix, low-rate",
    ]  # fmt: skip


def test_one_seed_of_one_task_has_the_intervals_of_its_rows() -> None:
    runs = [make_run(["word-problems"], METHODS[i], 0) for i in (0, 4)]
    runs[0]["matrix"], runs[0]["metrics_summary"]["average"] = [[0.25]], 0.25
    plain = group_of({"name": "s", "runs": runs}).plain
    assert plain is not None
    score, kl = plain.mean("average"), plain.mean("kl")
    assert score and (score.low, score.high) == pytest.approx(wilson(50, 200))
    assert kl and [kl.low, kl.high] == runs[0]["retention"][0]["kl_interval"]
    again = [make_run(["word-problems"], METHODS[i], seed) for i in (0, 4) for seed in (0, 1)]
    (found, *_) = group_of({"name": "s", "runs": again}).cells
    assert found.within == {}
