"""What a run measures of its model: scores, forgetting, general abilities, answers to read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retain.data.batches import Example
from retain.data.general_prompts import spread_prompts
from retain.data.knowledge import general_questions
from retain.data.problems import ask
from retain.documents import sealed
from retain.evaluation.answers import measure_answers
from retain.evaluation.forgetting import Reference
from retain.evaluation.general import general_scores
from retain.evaluation.generation import generate
from retain.evaluation.score import Score, score_task
from retain.files import first_rank
from retain.models.adapters.base import Adapter
from retain.provenance import hardware, versions
from retain.records import RunSpec, digest_of, finite
from retain.study.material import Base, TaskData
from retain.study.resources import Clock
from retain.study.work import Work, read_shared, write_shared

__all__ = ["MEASURED", "Measures"]

MEASURED = 16
"""Rows a pass at most where logits or a curvature are held: a curvature of 64 holds 17 GiB."""


class Measures:
    """Measures one model again and again while it learns; forgetting on `held` text, maybe none."""

    def __init__(
        self,
        run: RunSpec,
        work: Work,
        base: Base,
        adapter: Adapter,
        tasks: Sequence[TaskData],
        held: Sequence[Example],
        say: Callable[[str], None],
    ) -> None:
        self.run, self.work, self.base, self.adapter = run, work, base, adapter
        self.tasks, self.held, self.say = tasks, held, say
        self.asked = run.evaluation
        size = min(MEASURED, self.asked.batch_size)
        self.reference = Reference(adapter.model, held, batch_size=size) if held else None

    def untrained(self, stamp: Mapping[str, Any], clock: Clock) -> dict[str, Any]:
        """Of the untrained model: another run's, with the time that it took, or made now.

        Returns:
            ``{"scores", "general", "answers", "seconds"}``.
        """
        path = self._untrained_file(stamp)
        known = read_shared(path)
        if known is not None and {"scores", "general", "seconds"} <= set(known):
            clock.restore(known["seconds"])
            return known
        start = clock.state()
        with clock.on("evaluate"):
            made = {
                "scores": [score and score.value for score in self.scores(None)],
                "general": self.general(),
                "answers": self.answers(),
            }
        seconds = {name: end - start[name] for name, end in clock.state().items()}
        made["seconds"] = seconds
        if first_rank():
            write_shared(self.work, path, sealed(finite(made)))
        return made

    def _untrained_file(self, stamp: Mapping[str, Any]) -> Path:
        """The file for all runs whose model measures the same before training.

        Its name depends on the model, the adapter, how and on what is scored, the versions, the
        machine and the threads; on the seed only where that is in the scores already: of an
        encoder, whose head is new, and of an adapter that does not begin as the base model.
        """
        run, asked = self.run, self.run.general
        general = asked and [asked.plain(), versions("lm_eval"), str(self.work.data_dir)]
        settled = self.base.causal and self.adapter.begins_as_base
        parts = {
            "model": run.model,
            "dtype": run.dtype,
            "attention": run.attention,
            "adapter": run.adapter.plain(),
            "options": self.adapter.options,
            "tasks": [
                (definition, hashlib.sha256(repr(task.test).encode()).hexdigest(), task.max_length)
                for definition, task in zip(run.definitions, self.tasks, strict=True)
            ],
            "batch_size": self.asked.batch_size,
            "general": general,
            "answers": self.asked.answers,
            "seed": None if settled else run.seed,
            "code": dict(stamp),
            "machine": [hardware(), torch.get_num_threads()],
        }
        return self.work.out / "untrained" / f"{digest_of(parts)}.json"

    def scores(self, after: int | None) -> list[Score | None]:
        """Of all tasks, after that at a place, or before the first; None of those not wanted."""
        return [
            self._score(index) if self._is_scored(index, after) else None
            for index in range(len(self.tasks))
        ]

    def _is_scored(self, index: int, after: int | None) -> bool:
        if after is None or index == after:
            return True
        if index < after:
            return self.asked.earlier == "each" or after + 1 == len(self.tasks)
        return self.asked.unseen == "all" or (self.asked.unseen == "next" and index == after + 1)

    def _score(self, index: int) -> Score:
        task = self.tasks[index]
        return score_task(
            self.adapter.model, self.base.tokenizer, task.spec, task.test,
            columns=self.base.columns_of(index), max_length=task.max_length,
            batch_size=self.asked.batch_size, progress=self.work.progress,
        )  # fmt: skip

    def retention(self, after: int) -> list[dict[str, Any]]:
        """How far the model is from the base after a task, where it is asked for."""
        wanted = self.asked.retention == "each" or after + 1 == len(self.tasks)
        if self.reference is None or not wanted:
            return []
        return [{"after": after, **self.reference.measure(self.adapter.model).to_dict()}]

    def meanwhile(self) -> dict[str, Any]:
        """Arguments of `retain.training.loop.train` that measure the KL on a few rows meanwhile."""
        if not self.asked.measure_every or not self.held:
            return {}
        few = Reference(self.adapter.model, self.held[:8], batch_size=8)
        return {
            "measure": lambda model: few.measure(model).kl,
            "measure_every": self.asked.measure_every,
        }

    def general(self) -> dict[str, float] | None:
        """One number for each general task that is asked for."""
        asked = self.run.general
        if asked is None:
            return None
        self.say("general tasks")
        return general_scores(
            self.adapter.model, self.base.tokenizer, asked.tasks, limit=asked.limit,
            data_dir=self.work.data_dir, batch_size=self.asked.batch_size,
            progress=self.work.progress,
        )  # fmt: skip

    def answers(self) -> list[str]:
        """Answers to the first general questions, as many as are asked for."""
        prompts = [ask(self.base.tokenizer, question) for question in self._questions()]
        if not prompts:
            return []
        return generate(self.adapter.model, self.base.tokenizer, prompts, max_new_tokens=60)

    def told(self, before: Sequence[str]) -> list[dict[str, str]]:
        """The questions with the answers before and now."""
        rows = zip(self._questions(), before, self.answers(), strict=True)
        return [{"prompt": q, "before": first, "text": text} for q, first, text in rows]

    def own_answers(self) -> dict[str, Any] | None:
        """What the trained model answers to general prompts beside its base, if it is asked for."""
        if not self.asked.own_answers:
            return None
        self.say("own answers")
        return measure_answers(
            self.adapter.model, spread_prompts(self.asked.own_answers),
            tokenizer=self.base.tokenizer, batch_size=self.asked.batch_size,
            seed=self.run.seed or 0, progress=self.work.progress,
        ).to_dict()  # fmt: skip

    def _questions(self) -> Sequence[str]:
        return general_questions()[: self.asked.answers]
