"""What ``retain eval`` measures: a base model, and adapters on it, on the same material."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retain.data.draws import HELD_OUT
from retain.data.problems import word_problems
from retain.evaluation.answers import measure_answers
from retain.evaluation.compare import compared
from retain.evaluation.forgetting import Forgetting, measure_forgetting
from retain.evaluation.general import KNOWLEDGE, knowledge_right, problems_right
from retain.evaluation.held_out import HeldOut, RowValues, held_out, measure_rows
from retain.models.off import adapter_off
from retain.models.view import ModelView
from retain.records import AnswersRecord
from retain.runs.messages import Messages

__all__ = ["Evaluation", "Given"]

_RIGHT, _LOSS = ("%", 1), ("nats per token", -1)
_LABELS: dict[str, tuple[str, str, int]] = {
    "data.loss": ("loss of the rows", *_LOSS),
    "data.row_loss": ("loss of the rows", "nats per row", -1),
    "data.right": ("exact match of the rows", *_RIGHT),
    "task.word-problems": ("word problems, exact match", *_RIGHT),
    "general.knowledge": ("common knowledge", *_RIGHT),
    "source.kl": ("forgotten: KL to the base", *_LOSS),
    "source.perplexity": ("perplexity of the text", "", -1),
    "source.flips": ("predictions that changed", "%", -1),
    "answers.right": ("right answers to prompts", *_RIGHT),
    "answers.first_word": ("begin with another word", "%", -1),
    "answers.task_form": ("answers in the task's form", "%", -1),
    "answers.repeats": ("answers that repeat themselves", "%", -1),
    "answers.log_ratio": ("log-ratio of own answers", *_LOSS),
}
"""Of each score its label, its unit, and whether more is better."""


@dataclass(frozen=True)
class Given:
    """What was read before any model was loaded.

    Attributes:
        text: to measure forgetting on; None until the base has written it.
        rows: held-out ones of a task.
        prompts: that are answered.
        problems: how many word problems.
        general: tasks, each with how many rows of it at most.
    """

    text: Any = None
    rows: Any = None
    prompts: Any = None
    problems: int = 0
    general: Mapping[str, int | None] = field(default_factory=dict)


@dataclass
class _Seen:
    """What was measured of one model: a value an item, by the score's name."""

    items: dict[str, Sequence[float]] = field(default_factory=dict)
    alone: dict[str, float | None] = field(default_factory=dict)  # scores without items
    rows: RowValues | None = None


class Evaluation:
    """Measures adapters one after the other; the base once, with the first of them.

    A text is there by the time that an adapter is measured.
    """

    def __init__(self, config: Any, given: Given, messages: Messages) -> None:
        self.config, self.given, self.messages = config, given, messages
        self.text: Any = given.text
        self.rows: HeldOut | None = None
        self.base = _Seen()
        self.tuned: list[_Seen] = []
        self.forgetting: list[Forgetting] = []
        self.answers: list[AnswersRecord] = []
        self.texts: list[tuple[str | None, str]] = []
        self.better: dict[str, int] = {}

    def measure(self, model: Any, tokenizer: Any, name: str) -> Forgetting:
        """Measures one adapter, which is on; `name` is for what is said of it.

        Raises:
            RetainError: rows or prompts that the model cannot be asked.
        """
        c, view = self.config, ModelView(model, tokenizer)
        if not self.tuned:
            if self.given.rows is not None:
                self._read_rows(view)
            with adapter_off(model):
                self.base = self._seen(view, "the base")
        found = measure_forgetting(
            model, self.text, tokenizer=tokenizer, rows=c.rows, max_length=c.max_length,
            batch_size=c.batch_size, seed=HELD_OUT + c.seed, progress=self.messages.progress,
        )  # fmt: skip
        self.tuned.append(self._seen(view, name))
        self.forgetting.append(found)
        if self.given.prompts is not None:
            said = measure_answers(
                model, self.given.prompts, tokenizer=tokenizer, batch_size=c.batch_size,
                seed=c.seed, progress=self.messages.progress,
            )  # fmt: skip
            self.answers.append(AnswersRecord.model_validate(said.to_dict()))
        return found

    def _read_rows(self, view: ModelView) -> None:
        c = self.config
        rows = held_out(
            view, self.given.rows, max_length=c.data_length, limit=c.limit,
            new_tokens=c.new_tokens, seed=HELD_OUT + c.seed,
        )  # fmt: skip
        for line in rows.counts.lines():
            self.messages.note(line)
        if (count := len(rows.examples) - len(rows.asked)) and rows.asked:
            self.messages.note(f"{count} of {len(rows.examples)} rows are not asked: no whole "
                               "answer, or no prompt before it")  # fmt: skip
        words: Any = view.tokenizer

        def text(ids: Sequence[int]) -> str:
            return str(words.decode(list(ids), skip_special_tokens=True)).strip()

        parts = zip(rows.prompts, rows.answers, strict=True)
        if words is not None:
            self.texts = [(None if p is None else text(p), text(a)) for p, a in parts]
        self.rows = rows

    def _seen(self, view: ModelView, name: str) -> _Seen:
        """What the model as it is gets right."""
        c, found = self.config, _Seen()
        model, tokenizer, progress = view.model, view.tokenizer, self.messages.progress
        assert tokenizer is not None
        if self.rows is not None:
            seen = measure_rows(view, self.rows, batch_size=c.batch_size, progress=progress)
            found.rows = seen
            found.items |= {"data.loss": seen.nats, "data.row_loss": seen.nats}
            if asked := self.rows.asked:
                found.items["data.right"] = [bool(seen.right[i]) for i in asked]
            if seen.cut:
                self.messages.note(
                    f"{seen.cut} of {len(asked)} answers of {name} do not end within "
                    f"{self.rows.new_tokens} tokens"
                )
        if self.given.problems:
            problems = word_problems("test", self.given.problems, c.seed)
            found.items["task.word-problems"] = problems_right(
                model, tokenizer, problems, progress=progress
            )
        for task, limit in self.given.general.items():
            key = f"general.{task}"
            if task == KNOWLEDGE:
                found.items[key] = knowledge_right(model, tokenizer, limit, progress=progress)
                continue
            from retain.evaluation.lm_eval import general_items

            self.messages.say(f"{task}, by lm-evaluation-harness, of {name}")
            items = general_items(
                model, tokenizer, task, limit=limit, data_dir=c.data_dir, batch_size=c.batch_size
            )
            self.better[key] = items.better
            if items.rows:
                found.items[key] = items.rows
            else:
                found.alone[key] = items.score
        return found

    def scores(self) -> dict[str, Any]:
        """All of them, as the plain data of `retain.records.EvalScore`, by name."""
        seed, every = self.config.seed, (self.base, *self.tuned)
        out: dict[str, Any] = {}
        for key in {**self.base.items, **self.base.alone}:
            label, unit, better = _LABELS.get(
                key, (key.partition(".")[2], "", self.better.get(key, 0))
            )
            if not unit and all(0 <= v <= 1 for seen in every for v in _numbers(seen, key)):
                unit = "%"
            told: dict[str, Any] = {"label": label, "unit": unit, "better": better}
            if all(key in seen.items for seen in every):
                sizes = self.rows.tokens if self.rows and key == "data.loss" else None
                tuned = [seen.items[key] for seen in self.tuned]
                out[key] = compared(self.base.items[key], tuned, sizes, seed=seed, **told)
            else:
                out[key] = _alone(
                    *(next(iter(_numbers(seen, key)), None) for seen in every), **told
                )
        return out | self._of_answers() | self._of_source()

    def _of_source(self) -> dict[str, Any]:
        """How far the adapters have moved from the base on the text."""
        found, first = self.forgetting, self.forgetting[0]
        tokens = [n for _, n in first.sequences]
        moved = [[nats for nats, _ in each.sequences] for each in found]
        kl = compared(None, moved, tokens, seed=self.config.seed, **_told("source.kl"))
        for one, each in zip(kl["tuned"], found, strict=True):
            low, high = each.kl_interval
            one["interval"] = [low, high] if low < high else None  # of one passage there is none
        n = first.tokens
        perplexity = _alone(
            first.ppl_base, *(each.ppl for each in found), n=n, **_told("source.perplexity")
        )
        flips = _alone(0.0, *(each.flips for each in found), n=n, **_told("source.flips"))
        return {"source.kl": kl, "source.perplexity": perplexity, "source.flips": flips}

    def _of_answers(self) -> dict[str, Any]:
        """What the answers to prompts say in sum; those of skills are in `AnswersRecord`."""
        out: dict[str, Any] = {}
        rows = [record.rows for record in self.answers]
        if not rows:
            return out

        def put(key: str, of: str, before: str | None) -> None:
            known = [row.get(of) is not None for row in rows[0]]
            if not any(known):
                return
            kept = [[r for r, there in zip(each, known, strict=True) if there] for each in rows]
            base = None if before is None else [float(row[before]) for row in kept[0]]
            tuned = [[float(row[of]) for row in each] for each in kept]
            more = {"seed": self.config.seed, **_told(f"answers.{key}")}
            out[f"answers.{key}"] = compared(base, tuned, **more)

        put("right", "right_after", "right_before")
        put("task_form", "task_form", "task_form_base")
        put("repeats", "repeats", "repeats_base")
        other = [[float(not row["first_word"]) for row in each] for each in rows]
        out["answers.first_word"] = compared(
            None, other, seed=self.config.seed, **_told("answers.first_word")
        )
        ratios = [record.overall.log_ratio.plain() for record in self.answers]
        out["answers.log_ratio"] = _alone(0.0, *(r["value"] for r in ratios),
                                          **_told("answers.log_ratio"))  # fmt: skip
        out["answers.log_ratio"]["tuned"] = ratios
        return out

    def data(self) -> dict[str, Any] | None:
        """The held-out rows, as the plain data of `retain.records.EvalData` but for its file."""
        if self.rows is None or self.base.rows is None:
            return None
        seen = [self.base.rows, *(s.rows for s in self.tuned if s.rows is not None)]
        items = []
        for i, tokens in enumerate(self.rows.tokens):
            prompt, answer = self.texts[i] if self.texts else (None, "")
            base, *tuned = (
                {"nats": s.nats[i], "said": s.said[i], "right": s.right[i]} for s in seen
            )
            items.append({"prompt": prompt, "answer": answer, "tokens": tokens, "base": base,
                          "tuned": tuned})  # fmt: skip
        return {
            "rows": len(items), "asked": len(self.rows.asked), "new_tokens": self.rows.new_tokens,
            "counts": self.rows.counts.to_dict(), "items": items,
        }  # fmt: skip


def _told(key: str) -> dict[str, Any]:
    return dict(zip(("label", "unit", "better"), _LABELS[key], strict=True))


def _numbers(seen: _Seen, key: str) -> list[float]:
    """A score's values, or the one that it has without items."""
    if key in seen.items:
        return list(seen.items[key])
    value = seen.alone.get(key)
    return [] if value is None else [value]


def _alone(base: float | None, *tuned: float | None, n: int = 0, **told: Any) -> dict[str, Any]:
    """A score of which no interval is known."""
    every = [{"value": value, "interval": None, "n": n} for value in (base, *tuned)]
    return {**told, "base": every[0], "tuned": every[1:], "changes": [], "between": []}
