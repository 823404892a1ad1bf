"""One run: a model learns the tasks of an order one after another, and is measured after each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from retain.errors import ConfigError
from retain.evaluation.continual import OWN, continual_metrics
from retain.evaluation.size import update_size
from retain.models.adapters.registry import attach_adapter
from retain.records import RunSpec, bits_of, finite
from retain.retention.head import fit_head
from retain.retention.method import Context, Task
from retain.retention.registry import make_method
from retain.study.fits import SharedFits
from retain.study.grid import task_at
from retain.study.material import load_base, load_source, load_tasks, seed_of
from retain.study.measures import MEASURED, Measures
from retain.study.resources import Clock, peak_memory, reset_peak_memory
from retain.study.state import SequenceState
from retain.study.work import Work
from retain.training.loop import train

__all__ = ["run_sequence"]

SIZED = 8
"""Training rows of each task on which the size of the update is measured."""


def run_sequence(
    run: RunSpec,
    *,
    state: SequenceState,
    work: Work,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Does a run, from its last finished task on where it was stopped before.

    Returns:
        The body of a ``retain.run/1`` record, from ``tasks`` on.

    Raises:
        RetainError: whatever keeps it from being done.
    """
    gc.collect()  # the model of the run before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _Sequence(run, state, work, say).run()


class _Sequence:
    def __init__(
        self,
        config: RunSpec,
        state: SequenceState,
        work: Work,
        say: Callable[[str], None],
    ) -> None:
        reset_peak_memory()
        self.config, self.state, self.work, self.say = config, state, work, say
        self.clock, self.seed = Clock(), config.seed or 0
        say("loading")
        self.base = load_base(config, [task_at(t, work.base) for t in config.order.tasks])
        if config.evaluation.own_answers and not self.base.causal:
            raise ConfigError(
                "the model writes no answers", got=f"{config.model}, an encoder, and "
                f"evaluation.own_answers: {config.evaluation.own_answers}",
                allowed="a decoder", fix="leave evaluation.own_answers out",
            )  # fmt: skip
        self.tasks = load_tasks(config, self.base, work)
        self.source, self.held = load_source(config, self.base, work)
        self._attach()
        self.data: dict[str, Any] = {
            "matrix": [], "right": [], "retention": [], "predicted": [], "history": [],
        }  # fmt: skip

    def _attach(self) -> None:
        method, adapter = self.config.method, self.config.adapter
        self.method = make_method(method.kind, method.strength, **method.options)
        options = self.method.adapter_options(adapter.options, len(self.tasks))
        seed = seed_of(self.seed, -1)
        self.adapter = attach_adapter(self.base.model, adapter.kind, seed=seed, **options)
        self.context = Context(
            adapter=self.adapter,
            tokenizer=self.base.tokenizer,
            source=self.source,
            tasks=len(self.tasks),
            batch_size=min(MEASURED, self.config.evaluation.batch_size),
            seed=seed,
            progress=self.work.progress,
            shared=self._shared(),
        )

    def _shared(self) -> SharedFits | None:
        if self.config.key not in self.work.shares:
            return None
        return SharedFits(self.config, self.work, self.adapter, self.state.stamp, self.clock)

    def run(self) -> dict[str, Any]:
        attached, size = self.adapter.count()
        trainable = self.method.trained(attached, len(self.tasks))
        with self.clock.on("evaluate"):
            self.measures = Measures(
                self.config, self.work, self.base, self.adapter, self.tasks, self.held, self.say
            )
        kept = self.state.load()
        if kept is None:
            done = 0
            self._begin()
        else:
            done, self.data = kept.done, self.data | kept.data
            self.clock.restore(self.data["seconds"])
            self.method.context = self.context
            self.method.fit_adapter(kept.adapter)
            self.adapter.restore(kept.adapter)
            self.method.restore(kept.method)
        for index in range(done, len(self.tasks)):
            self._learn(index)
            self._keep(index + 1)
        return self._result(trainable, size)

    def _begin(self) -> None:
        """The scores of the untrained model, and what the method measures on it."""
        from transformers import set_seed

        self.say("scores before")
        known = self.measures.untrained(self.state.stamp, self.clock)
        self.data["before"], self.data["general"] = known["scores"], known["general"]
        self.data["answers"] = known.get("answers", [])
        self.say("the method begins")
        with self.clock.on("method"):
            set_seed(self.context.seed)
            self.method.begin(self.context)
        self._keep(0)

    def _keep(self, done: int) -> None:
        self.data["seconds"] = self.clock.state()
        self.state.save(
            done, finite(self.data), self.adapter.state(), self.method.state(), self.method.constant
        )

    def _learn(self, index: int) -> None:
        from transformers import set_seed

        data, seed = self.tasks[index], seed_of(self.seed, index)
        task = Task(data.spec.name, index, data.train, self.base.columns_of(index), seed)
        place = f"task {index + 1}/{len(self.tasks)} {data.spec.name}"
        self.say(f"{place}: training")
        set_seed(seed)
        with self.clock.on("method"):
            fits = self.config.head == "fitted" and self.method.fits_head
            if fits and task.columns is not None:
                self._fit_head(task)
            rows = self.method.before_task(task)
        with self.clock.on("train"):
            result = train(
                self.adapter.model,
                rows,
                self.config.settings(index, seed),
                method=self.method,
                columns=task.columns,
                regression=data.spec.kind == "regression",
                progress=self.work.progress,
                **self.measures.meanwhile(),
            )
        self.adapter.model.zero_grad(set_to_none=True)
        self.adapter.model.eval()
        with self.clock.on("method"):
            self.method.after_task(task)
        last = result.history[-1] if result.history else {}
        self.data["predicted"].append(last.get("predicted"))
        if self.config.evaluation.measure_every:
            before = self.data["history"][-1]["step"] if self.data["history"] else 0
            steps = ({**entry, "step": before + i} for i, entry in enumerate(result.history, 1))
            self.data["history"] += steps
        self.say(f"{place}: scoring")
        with self.clock.on("evaluate"):
            scores = self.measures.scores(index)
            self.data["matrix"].append([score and score.value for score in scores])
            self.data["right"].append(
                [None if score is None or score.right is None else bits_of(score.right)
                 for score in scores]
            )  # fmt: skip
            self.data["losses"] = [score and score.loss for score in scores]
            self.data["extras"] = [score and score.extras for score in scores]
            self.data["retention"] += self.measures.retention(index)

    def _fit_head(self, task: Task) -> None:
        fit_head(
            self.adapter.model, task.examples, columns=task.columns, seed=task.seed,
            batch_size=self.config.evaluation.batch_size, progress=False,
        )  # fmt: skip

    def _summary(self) -> dict[str, float | None]:
        def known(row: list[float | None]) -> list[float]:
            return [float("nan") if value is None else value for value in row]

        rows = [known(row) for row in self.data["matrix"]]
        found = continual_metrics(rows, known(self.data["before"])).to_dict()
        read = [example for task in self.tasks for example in task.train[:SIZED]]
        size = update_size(self.adapter.model, read, batch_size=self.context.batch_size)
        return found | {"update_size": size}

    def _result(self, trainable: int, size: int) -> dict[str, Any]:
        with self.clock.on("evaluate"):
            after = self.measures.general()
            told = self.measures.told(self.data.pop("answers", []))
            own = self.measures.own_answers()
        if self.work.adapters:
            self.adapter.save(self.work.adapter(self.config), self.config.model)
        before = self.data.pop("general")
        general = None if after is None else {"before": before, "after": after}
        return {
            "tasks": [t.spec.name for t in self.tasks],
            "metrics": [t.spec.metric for t in self.tasks],
            "before": self.data["before"],
            "matrix": self.data["matrix"],
            "right": self.data["right"],
            "sizes": {
                "train": [len(t.train) for t in self.tasks],
                "test": [len(t.test) for t in self.tasks],
            },
            "retention": self.data["retention"],
            "general": general,
            "metrics_summary": self._summary() | _of_answers(own),
            "parameters": {"trainable": trainable, "base": size, "share": trainable / size},
            "method_bytes": self.method.memory(),
            "seconds": self.clock.state(),
            "peak_memory_gib": peak_memory(),
            "losses": self.data["losses"],
            "extras": self.data["extras"],
            "predicted": self.data["predicted"],
            "history": self.data["history"],
            "generations": told,
            "own_answers": own,
        }


def _of_answers(own: Mapping[str, Any] | None) -> dict[str, float | None]:
    """What the tables have of the model's own answers."""
    return {} if own is None else {name: own["overall"][name]["value"] for name in OWN}
