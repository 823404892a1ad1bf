"""One run: a model learns the tasks of an order one after another, and is measured after each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from retain.data.knowledge import general_questions
from retain.data.problems import ask
from retain.documents import sealed
from retain.evaluation.continual import continual_metrics
from retain.evaluation.forgetting import Reference
from retain.evaluation.generation import generate
from retain.evaluation.probes import KNOWLEDGE, knowledge_score
from retain.evaluation.score import Score, score_items
from retain.files import first_rank
from retain.models.adapters.registry import attach_adapter
from retain.records import RunSpec, finite
from retain.retention.head import fit_head
from retain.retention.method import Context, Task
from retain.retention.registry import make_method
from retain.study.grid import task_at
from retain.study.material import load_base, load_source, load_tasks, seed_of
from retain.study.resources import Clock, peak_memory, reset_peak_memory
from retain.study.state import SequenceState
from retain.study.untrained import read_untrained, untrained_file
from retain.study.work import Work, write_shared
from retain.training.loop import train

__all__ = ["run_sequence"]

MEASURED = 16
"""Rows a pass at most where a method measures something: a curvature of 64 holds 17 GiB."""


def run_sequence(
    run: RunSpec,
    *,
    state: SequenceState,
    work: Work,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Does a run, from its last finished task on where it was stopped before.

    Args:
        run: all that is asked for.
        state: what is kept between tasks.
        work: where the data lie.
        say: told in a few words what is being done.

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
        self.tasks = load_tasks(config, self.base, work)
        self.source, self.held = load_source(config, self.base, work)
        self._attach()
        self.data: dict[str, Any] = {"matrix": [], "retention": [], "predicted": [], "history": []}

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
        )

    def run(self) -> dict[str, Any]:
        trainable, size = self.adapter.count()
        with self.clock.on("evaluate"):
            self.reference = self._reference()
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
        known = self._untrained()
        self.data["before"], self.data["general"] = known["scores"], known["general"]
        self.data["answers"] = known.get("answers", [])
        self.say("the method begins")
        with self.clock.on("method"):
            set_seed(self.context.seed)
            self.method.begin(self.context)
        self._keep(0)

    def _keep(self, done: int) -> None:
        self.data["seconds"] = self.clock.state()
        self.state.save(done, finite(self.data), self.adapter.state(), self.method.state())

    def _learn(self, index: int) -> None:
        from transformers import set_seed

        data, seed = self.tasks[index], seed_of(self.seed, index)
        task = Task(data.spec.name, index, data.train, self._columns(index), seed)
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
                **self._measured(),
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
            scores = self._scores(index)
            self.data["matrix"].append([score and score.value for score in scores])
            self.data["losses"] = [score and score.loss for score in scores]
            self.data["extras"] = [score and score.extras for score in scores]
            each = self.config.evaluation.retention == "each"
            if self.reference is not None and (each or index + 1 == len(self.tasks)):
                found = self.reference.measure(self.adapter.model).to_dict()
                self.data["retention"].append({"after": index, **found})

    def _measured(self) -> dict[str, Any]:
        """Arguments of `train` that measure the KL on a few rows meanwhile."""
        every = self.config.evaluation.measure_every
        if not every or not self.held:
            return {}
        few = Reference(self.adapter.model, self.held[:8], batch_size=8)
        return {"measure": lambda model: few.measure(model).kl, "measure_every": every}

    def _fit_head(self, task: Task) -> None:
        fit_head(
            self.adapter.model, task.examples, columns=task.columns, seed=task.seed,
            batch_size=self.config.evaluation.batch_size, progress=False,
        )  # fmt: skip

    def _untrained(self) -> dict[str, Any]:
        """Scores before training: another run's, with the time that they took, or made now."""
        stamp = self.state.stamp
        path = untrained_file(self.config, self.work, self.adapter, stamp, self.tasks)
        known = read_untrained(path)
        if known is not None:
            self.clock.restore(known["seconds"])
            return known
        start = self.clock.state()
        with self.clock.on("evaluate"):
            scores = [score and score.value for score in self._scores(None)]
            general, answers = self._general(), self._answers()
        seconds = {name: end - start[name] for name, end in self.clock.state().items()}
        known = {"scores": scores, "general": general, "answers": answers, "seconds": seconds}
        if first_rank():
            write_shared(self.work, path, sealed(finite(known)))
        return known

    def _is_scored(self, index: int, after: int | None) -> bool:
        """Whether a task is scored after another, or before all."""
        if after is None or index == after:
            return True
        asked = self.config.evaluation
        if index < after:
            return asked.earlier == "each" or after + 1 == len(self.tasks)
        return asked.unseen == "all" or (asked.unseen == "next" and index == after + 1)

    def _scores(self, after: int | None) -> list[Score | None]:
        """Of all tasks; None of those that the study does not want scored here."""
        out: list[Score | None] = []
        for index, data in enumerate(self.tasks):
            if not self._is_scored(index, after):
                out.append(None)
                continue
            spec = data.spec
            out.append(
                score_items(
                    self.adapter.model,
                    self.base.tokenizer,
                    data.test,
                    kind=spec.kind,
                    metric=spec.metric,
                    metrics=spec.metrics,
                    columns=self._columns(index),
                    max_length=data.max_length,
                    max_new_tokens=spec.max_new_tokens,
                    pattern=spec.pattern or None,
                    stop=spec.stop,
                    batch_size=self.config.evaluation.batch_size,
                    progress=self.work.progress,
                    label=spec.name,
                )
            )
        return out

    def _columns(self, index: int) -> slice | None:
        return None if self.base.columns is None else self.base.columns[index]

    def _reference(self) -> Reference | None:
        if not self.held:
            return None
        size = min(MEASURED, self.config.evaluation.batch_size)
        return Reference(self.adapter.model, self.held, batch_size=size)

    def _general(self) -> dict[str, float] | None:
        asked = self.config.general
        if asked is None:
            return None
        self.say("general tasks")
        model, tokenizer, found = self.adapter.model, self.base.tokenizer, {}
        if KNOWLEDGE in asked.tasks:
            right, items = knowledge_score(model, tokenizer, progress=self.work.progress)
            found[KNOWLEDGE] = right / items
        others = [task for task in asked.tasks if task != KNOWLEDGE]
        if others:
            from retain.evaluation.lm_eval import evaluate_general, headline

            scores = evaluate_general(
                model,
                tokenizer,
                others,
                limit=asked.limit,
                data_dir=self.work.data_dir,
                batch_size=self.config.evaluation.batch_size,
            )
            found |= headline(scores)
        return found

    def _answers(self) -> list[str]:
        """Answers to the first general questions."""
        questions = general_questions()[: self.config.evaluation.answers]
        prompts = [ask(self.base.tokenizer, question) for question in questions]
        if not prompts:
            return []
        return generate(self.adapter.model, self.base.tokenizer, prompts, max_new_tokens=60)

    def _told(self) -> list[dict[str, str]]:
        questions = general_questions()[: self.config.evaluation.answers]
        rows = zip(questions, self.data.pop("answers", []), self._answers(), strict=True)
        return [{"prompt": q, "before": before, "text": text} for q, before, text in rows]

    def _summary(self) -> dict[str, float | None]:
        def known(row: list[float | None]) -> list[float]:
            return [float("nan") if value is None else value for value in row]

        rows = [known(row) for row in self.data["matrix"]]
        return continual_metrics(rows, known(self.data["before"])).to_dict()

    def _result(self, trainable: int, size: int) -> dict[str, Any]:
        with self.clock.on("evaluate"):
            after, told = self._general(), self._told()
        if self.work.adapters:
            self.adapter.save(self.work.adapter(self.config), self.config.model)
        before = self.data.pop("general")
        general = None if after is None else {"before": before, "after": after}
        return {
            "tasks": [t.spec.name for t in self.tasks],
            "metrics": [t.spec.metric for t in self.tasks],
            "before": self.data["before"],
            "matrix": self.data["matrix"],
            "sizes": {
                "train": [len(t.train) for t in self.tasks],
                "test": [len(t.test) for t in self.tasks],
            },
            "retention": self.data["retention"],
            "general": general,
            "metrics_summary": self._summary(),
            "parameters": {"trainable": trainable, "base": size, "share": trainable / size},
            "method_bytes": self.method.memory(),
            "seconds": self.clock.state(),
            "peak_memory_gib": peak_memory(),
            "losses": self.data["losses"],
            "extras": self.data["extras"],
            "predicted": self.data["predicted"],
            "history": self.data["history"],
            "generations": told,
        }
