"""What is replayed, and rows as tensors."""

from __future__ import annotations

import torch
from sequences import alone, begun, learn, source, tasks_of

from retain.data.batches import Example
from retain.retention.method import Task
from retain.retention.registry import make_method
from retain.retention.state import StoredRow, choose, pack_rows, unpack_rows


def test_replay_counts() -> None:
    method = make_method("replay", share=0.2)
    tasks = [Task(str(i), i, source("llama") * (i + 1), None, i) for i in range(4)]
    for index, kept in enumerate([0, 2, 2 + 3, 2 + 3 + 4]):
        rows = method.before_task(tasks[index])
        assert len(rows) == 6 * (index + 1) + kept
        assert list(rows[: 6 * (index + 1)]) == list(tasks[index].examples)
        method.after_task(tasks[index])
    method = make_method("replay", per_task=4)
    for task in tasks:
        method.before_task(task)
        method.after_task(task)
    assert [len(method.kept), len(set(method.kept[:4]))] == [16, 4]
    assert set(method.kept[:4]) <= {StoredRow.of(e, None) for e in source("llama")}


def test_replayed_rows_are_answered_with_their_own_columns() -> None:
    ends = []
    for target in (0.0, 1.0):  # what the kept rows of the first task say
        method = make_method("replay", share=1.0)
        attached = begun(method, "lora", "bert")
        first, second = tasks_of("bert")
        first.examples = [Example(e.tokens, (int(target),)) for e in first.examples]
        second.examples = [Example(e.tokens, e.targets) for e in second.examples]
        method.before_task(first)
        method.after_task(first)
        learn(method, attached, second, max_steps=20, batch_size=16)
        with torch.no_grad():
            found = torch.cat([alone(attached.model, e) for e in first.examples])
        ends.append(float((found[:, 1] - found[:, 0]).mean()))
    assert ends[0] < -1 and ends[1] > 1


def test_self_replay_mixes_in_the_models_own_text() -> None:
    method = make_method("self_replay", share=0.5, rows=3, max_length=8)
    begun(method, "lora", "llama")
    assert len(method.samples) == 3
    assert all(all(e.predict) for e in method.samples)
    assert all(e.tokens[0] == 1 for e in method.samples[0::2])
    task = tasks_of("llama")[0]
    rows = method.before_task(task)
    assert list(rows[:16]) == list(task.examples)
    added = list(rows[16:])
    assert len(added) == 8  # more than there are: they come again
    assert {added.count(s) for s in method.samples} <= {2, 3}
    assert list(method.before_task(task)) == list(rows)


def test_rows_survive_their_tensors() -> None:
    rows = [StoredRow.of(e, None) for e in source("llama")]
    rows += [StoredRow.of(e, t.columns) for t in tasks_of("bert") for e in t.examples]
    again = unpack_rows(pack_rows(rows))
    assert again == rows
    for a, b in zip(again, rows, strict=True):
        assert [type(t) for t in a.targets] == [type(t) for t in b.targets]
    assert unpack_rows(pack_rows([])) == []
    assert choose(rows, 100, 0) == rows
