"""What the demo measures of a model: the task, what was forgotten, and a few answers to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from retain.data.batches import Example, batches
from retain.data.knowledge import general_questions
from retain.data.problems import Problem, ask, problem_examples
from retain.evaluation.forgetting import Reference, answer_loss
from retain.evaluation.generation import generate
from retain.evaluation.probes import knowledge_score, problem_score
from retain.intervals import wilson
from retain.study.demo_config import DemoConfig
from retain.training.loop import TrainResult

__all__ = ["Measures"]


class Measures:
    """Measures one model again and again, with different adapters in it.

    Args:
        model: with its adapter.
        tokenizer: its own.
        config: of the demo.
        tests: problems that nothing is trained on.
        held: text that no curvature is measured on.
        progress: show bars.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: DemoConfig,
        tests: Sequence[Problem],
        held: Sequence[Example],
        *,
        progress: bool,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.tests, self.held, self.progress = list(tests), held, progress
        self._reference: Reference | None = None

    def row(self, result: TrainResult | None) -> dict[str, Any]:
        """One row of the demo's table.

        Args:
            result: of the training; None for the base model.
        """
        if self._reference is None:
            self._reference = Reference(self.model, self.held, progress=self.progress)
        target, answers = self._target()
        known, items = knowledge_score(self.model, self.tokenizer, progress=self.progress)
        return {
            "target": target,
            "forgetting": self._reference.measure(self.model).to_dict(),
            "probe": {
                "accuracy": known / items,
                "interval": wilson(known, items),
                "items": items,
            },
            "train": None
            if result is None
            else {
                "seconds": result.seconds,
                "steps": result.steps,
                "examples": self.config.examples,
            },
            "history": [] if result is None else result.history,
            "generations": self._told(),
            "answers": answers[:10],
        }

    def _target(self) -> tuple[dict[str, Any], list[str]]:
        """The task itself, and what the model answers."""
        right, answers = problem_score(
            self.model, self.tokenizer, self.tests, max_new_tokens=32, progress=self.progress
        )
        examples = problem_examples(self.tokenizer, self.tests, self.config.max_length)
        pad = self.tokenizer.pad_token_id
        every = list(batches(examples, min(50, len(examples)), pad, multiple=16))
        every = [b.to(next(self.model.parameters()).device) for b in every]
        n = len(self.tests)
        target = {
            "exact_match": right / n,
            "interval": wilson(right, n),
            "loss": answer_loss(self.model, every),
            "items": n,
        }
        return target, answers

    def _told(self) -> list[dict[str, str]]:
        """Answers to general questions."""
        questions = general_questions()[: self.config.questions]
        told = generate(
            self.model,
            self.tokenizer,
            [ask(self.tokenizer, q) for q in questions],
            max_new_tokens=60,
            progress=self.progress,
            label="questions",
        )
        return [{"prompt": q, "text": t} for q, t in zip(questions, told, strict=True)]
