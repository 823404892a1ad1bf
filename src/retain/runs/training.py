"""One training run: what can be refused early, the model and what holds it, what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain.config import RunConfig, TrainConfig, names_of
from retain.documents import sealed
from retain.errors import ConfigError, CurvatureError, unknown
from retain.files import file_digest, first_rank, write_json, writing
from retain.records import Step, digest_of, finite
from retain.retention.bounds import check_max_rank, check_parts
from retain.runs import checkpoints, classify, named
from retain.runs.bases import load_base, problem_count
from retain.runs.folders import by_file, drop_state
from retain.runs.hold import Held, HeldBy, adapter_for, curvatures_for, recipe_for
from retain.runs.messages import Messages
from retain.runs.months import Previous, keep_state, previous_run
from retain.runs.records import (
    RUN,
    TRAIN,
    CurvatureOf,
    Digests,
    HeldTo,
    Labels,
    ModelOf,
    Month,
    TrainRecord,
    write_record,
)
from retain.runs.rows import run_examples, run_rows
from retain.runs.settings import placed, unused

__all__ = ["RunResult", "Training"]

MANY, ROSE, SURELY, FELT = 16, 1.1, 2.0, 0.01
"""How much larger a loss is at the end than at the start before that is said: after so many steps,
after fewer, and in nats."""


@dataclass(frozen=True)
class RunResult:
    """What a run has left.

    Attributes:
        out: its folder.
        record: ``train.json``.
    """

    out: Path
    record: TrainRecord

    @property
    def adapter(self) -> Path:
        """The folder of the PEFT adapter."""
        return self.out / "adapter"


class Training:
    """One run, done once by `run`."""

    def __init__(self, config: RunConfig, messages: Messages, out: Path, resume: bool) -> None:
        self.config, self.messages, self.resume = config, messages, resume
        self.out, self.kept = out, out / "checkpoints"
        self.before: Previous | None = None
        if config.continue_from is not None:
            self.before = previous_run(config.continue_from)
        self.sources: dict[str, Any] = {}
        self.past: Any = None
        self.recipe: Any = None
        self.labels: Labels | None = None
        self.unheld = False

    def run(self) -> RunResult:
        self._read()
        from retain.data.batches import check_fills, rows_digest
        from retain.data.counts import RowCounts
        from retain.models.fingerprint import fingerprint
        from retain.models.heads import is_causal

        self._check_trackers()
        self.config = c = placed(self.config)
        training, labels = c.training, self.labels
        base = self._base()
        named.check_chat(c, self.tokenizer)
        if self.before is not None:
            self.sources, self.past = self.before.curvatures()
            self.before.restore_head(base)
            known = next(iter(self.sources.values())).info.model
            self.before.check_base(base, known, c.model)
        counts = RowCounts()
        examples = run_examples(
            c, self.rows, self.problems, self.tokenizer, causal=is_causal(base), counts=counts,
            regression=None if labels is None else labels.regression,
        )  # fmt: skip
        for line in counts.lines():
            self.messages.note(line)
        check_fills(len(examples), training.batch_size, "--batch-size ")
        if labels is not None:
            self.labels = classify.fit_new_head(
                base, examples, labels, c, self.messages, learned=self.before is not None
            )
        self.model = adapter_for(base, c, self.before, self.sources, self.past)
        digests = Digests(
            data=rows_digest(examples),
            base=fingerprint(self.model),
            source=self.digest,
            past=self.before and _digest(self.before.past, self.before),
        )
        if self.resume and (ended := checkpoints.ended(self.out, self.kept, digests)):
            self.messages.say("the run has ended: there is nothing to resume")
            return RunResult(self.out, ended)
        held = self._held()
        source = self.digest or _digest_of(held, self.before)
        digests = digests.model_copy(update={"source": source})
        last = self._last(digests)
        if first_rank():
            write_json(self.out / RUN, sealed(finite(c.model_dump(mode="json"))))
        self.messages.say(f"training on {len(examples)} rows")
        earlier = checkpoints.history(last) if last else []  # before newer ones replace it
        result = self._fit(examples, held, digests)
        self._tell_texts()
        if told := rose([entry.get("loss") for entry in earlier + result.history], training):
            self.messages.note(told)
        record = self._record(held, last, digests) | {
            "examples": len(examples), "rows": counts.to_dict(), "labels": self.labels,
            "steps": result.steps, "seconds": result.seconds,
            "history": [Step(**finite(entry)) for entry in earlier + result.history],
        }  # fmt: skip
        done = RunResult(self.out, TrainRecord(**record))
        if first_rank():
            self._leave(done, examples, held)
        return done

    def _read(self) -> None:
        """Reads and refuses what can be read and refused before the model is loaded."""
        c = self.config
        self.problems = problem_count(c.data, "train")
        if c.keep_state and c.method == "none":
            raise ConfigError(
                "plain LoRA has no state to keep",
                got="keep_state with method none",
                allowed="auto or laplace; --strength 0 holds nothing",
                fix="leave --keep-state or --method none out",
            )
        if c.method != "none":
            check_max_rank(c.max_rank, c.adapter.rank, "--set ")
            check_parts(c.parts, c.budget)
        self.rows: Any = None
        self.given: Any = None
        self.digest: str | None = None
        if self.problems is None:
            self.rows = run_rows(c)
        self.messages.libraries()
        if c.method != "none" and c.curvature is not None:
            from retain.curvature.curvature import load_curvature

            self.given = load_curvature(c.curvature)
            self.digest = _digest(Path(c.curvature).expanduser())
        for line in unused(c):
            self.messages.note(line)
        if classify.wanted(c) or (self.before is not None and self.before.labels is not None):
            classify.check_settings(c, self.problems)
            self.rows, self.labels = classify.labels_of(self.rows, c, self.before)
        names = [name for name in named.budget_names(c) if self._reads(name)]
        self.texts = named.read_texts(c, names)

    def _reads(self, name: str) -> bool:
        """Whether a source is sure to be read: for its curvature, or to measure on it."""
        c = self.config
        ended = self.resume and (self.out / TRAIN).is_file()  # maybe: then nothing is read
        if c.method == "none" or ended:
            return False
        known = c.curvature is not None or self.before is not None
        if self.resume and not known:
            known = (self.out / by_file("curvature", name)).is_file()
        measured = self.labels is None and (c.budget is not None or c.kl > 0)
        return measured or not known

    def _check_trackers(self) -> None:
        from transformers.integrations.integration_utils import (
            get_available_reporting_integrations as installed,
        )

        names, got = ["none", "all", *installed()], self.config.training.report_to
        if got not in names:
            raise unknown("report_to", got, names)

    def _base(self) -> Any:
        """The base model; its tokenizer is kept."""
        c = self.config
        self.messages.say(f"loading {c.model}")
        of = "the run to resume" if self.resume else None
        if self.before is not None and self.before.settings.model == c.model:
            of = "the run to continue from"
        if self.labels is not None:
            base, self.tokenizer, _ = classify.load_classifier(c, self.labels, of)
            return base
        base, self.tokenizer, _ = load_base(
            c.model, of, dtype=c.dtype, trust_remote_code=c.trust_remote_code
        )
        return base

    def _held(self) -> Held:
        if self.before is not None:
            places = self.before.sources
            return {n: HeldBy(held, places[n], None) for n, held in self.sources.items()}
        if self.labels is not None and self.config.method != "none":
            reason = classify.why_not_held(self.config, self.labels)
            if reason is not None:
                self.messages.note(f"the base model is not held: {reason}")
                self.unheld = True
                return {}
        return curvatures_for(
            self.config, self.given, self.texts, self.out, self.model, self.tokenizer,
            self.messages, resume=self.resume,
        )  # fmt: skip

    def _text(self) -> Any:
        """On which a budget or a KL is measured; a classifier's budget is of predicted nats."""
        if self.labels is not None:
            return "auto"
        if names_of(self.config.budget):
            return named.probes(self.config, self.model, self.tokenizer, self.messages)
        return self.config.source or "auto"

    def _last(self, digests: Digests) -> Path | None:
        """The checkpoint to go on from, of the same run; what is broken goes out of the way.

        Raises:
            ConfigError: the run was of other rows, another base or another curvature.
        """
        from retain.training.checkpoints import last_whole

        if not self.resume:
            if first_rank():
                checkpoints.clear(self.kept)  # --overwrite
            return None
        for line in checkpoints.set_aside_broken(self.kept) if first_rank() else ():
            self.messages.note(line)
        last = last_whole(self.kept)
        if last is None:
            self.messages.note("no checkpoint is whole: the run begins anew")
        else:
            if first_rank():  # which knows the digests of the files
                checkpoints.check_digests(last, digests)
            self.messages.say(f"going on from {last}")
        return last

    def _fit(self, examples: Any, held: Held, digests: Digests) -> Any:
        """The one call of the training loop."""
        from retain.training.loop import train

        if held or self.unheld:  # without a source, its other parts act
            sources = {name: one.curvature for name, one in held.items()}
            self.recipe = recipe_for(self.config, sources, self.past)
        text = self._text() if held else "auto"
        fix = "free some disk; --resume goes on from the last whole checkpoint, where there is one"
        try:
            with writing("a checkpoint", self.kept, fix=fix):
                return train(
                    self.model,
                    examples,
                    self.config.training,
                    recipe=self.recipe,
                    source=text,
                    out=self.kept,
                    progress=self.messages.progress,
                    resume=self.resume,
                    identity=digests.model_dump(),
                )
        finally:
            if first_rank():
                checkpoints.drop_broken(self.kept)

    def _tell_texts(self) -> None:
        """Notes where a file that the run before measured on has other text now.

        The base model's own text is sampled anew, by the run's seed.
        """
        if self.before is None or self.recipe is None:
            return
        source, then = self.config.source, self.before.state.texts
        if isinstance(source, str):
            given = {"budget", "kl"} if source != named.OWN else set()
        else:
            given = {f"budget/{name}" for name in names_of(source)}
        if other := self.recipe.other_texts({n: d for n, d in then.items() if n in given}):
            self.messages.note(f"measured on other text than the run before was: {other}")

    def _record(self, held: Held, last: Path | None, digests: Digests) -> dict[str, Any]:
        """What the finished model tells."""
        from retain.models.sites import lora_sites
        from retain.provenance import provenance

        c = self.config
        if self.labels is None:  # where months have made the adapter wider
            rank = max(site.rank for site in lora_sites(self.model))
            self.messages.note_width(rank, self.out / "adapter")
        trainable, total = self.model.get_nb_trainable_parameters()
        return {
            "schema": "retain.train/1",
            **provenance(c.training.seed),
            "config": c,
            "model": ModelOf(
                name=c.model, parameters=total - trainable, trainable=trainable,
                fingerprint=digests.base or "",
            ),
            **self._spent(held),
            "resumed_from": last and last.name,
            "digests": digests,
            "why_no_filter": self.recipe and self.recipe.why_no_filter,
            "notes": self.messages.notes,
        }  # fmt: skip

    def _spent(self, held: Held) -> dict[str, Any]:
        """What the run was held by, and how far it moved."""
        found = {
            name: CurvatureOf(
                path=str(one.path), seconds=one.seconds, info=one.curvature.info.to_dict()
            )
            for name, one in held.items()
        }
        nats = {name: one.curvature.quadratic(self.model) for name, one in held.items()}
        mean = finite(sum(nats.values()) / len(nats)) if nats else None
        budgets = self.config.budget
        spent = {} if self.recipe is None else self.recipe.spent()
        if not isinstance(budgets, Mapping):
            one = spent.get("")
            return {
                "curvature": found.get(""),
                "predicted_nats": mean,
                "measured_nats": finite(one and one.measured),
                "bound_nats": finite(one and one.bound),
            }
        to = {
            name: HeldTo(
                budget=budgets[name], predicted_nats=finite(nats[name]), curvature=one,
                **({} if name not in spent else finite({
                    "measured_nats": spent[name].measured, "bound_nats": spent[name].bound,
                    "strength": spent[name].strength,
                })),
            )
            for name, one in found.items()
        }  # fmt: skip
        return {"held_to": to, "predicted_nats": mean}

    def _leave(self, done: RunResult, examples: Any, held: Held) -> None:
        """Writes the adapter, the record and the state."""
        from retain.models.saved import save_adapter

        c, record = self.config, done.record
        month = Month(
            data=c.data, examples=len(examples), seed=c.training.seed, budget=c.budget,
            data_digest=record.digests and record.digests.data,
            predicted_nats=record.predicted_nats,
        )  # fmt: skip

        def write() -> None:
            save_adapter(self.model, done.adapter, c.model, self._facts(record, month))
            write_record(self.out / TRAIN, record, seal=True)

        if held and c.keep_state:
            try:
                keep_state(
                    self.model, examples, self.recipe, self.out, month, self.before,
                    self.labels, self.messages, write,
                )  # fmt: skip
            except CurvatureError as error:  # no reason to lose what was learned
                self.messages.note(f"no state is kept for later runs: {error.what}")
                record.notes[:] = self.messages.notes
                write()
                drop_state(self.out)
        else:
            write()
            drop_state(self.out)
        checkpoints.drop_unfinished(self.kept)

    def _facts(self, record: TrainRecord, month: Month) -> dict[str, str]:
        """What the adapter's card says of the run, and of those that it continues."""
        from retain.models.cards import plain_name
        from retain.retention.facts import facts, trained

        runs = [*(self.before.state.runs if self.before else ()), month]
        rate = self.config.training.learning_rate
        return {
            "Data": ", then ".join(f"{plain_name(m.data)} ({m.examples} rows)" for m in runs),
            "Trained": trained(record.steps, rate, month.seed),
            **({"Held by": "nothing"} if self.recipe is None else facts(self.recipe)),
        }


def rose(losses: Sequence[float | None], config: TrainConfig) -> str | None:
    """What is said where training has made the loss larger; None where it has not.

    A step's loss is of a few rows, so the means of the first and the last quarter are compared, and
    of a short training more is asked for.
    """
    known = [loss for loss in losses if loss is not None]
    some = max(1, len(known) // 4)
    if len(known) < 2:
        return None
    first, last = sum(known[:some]) / some, sum(known[-some:]) / some
    if last - first < FELT or last <= (ROSE if len(known) >= MANY else SURELY) * first:
        return None
    rate = f"--learning-rate {config.learning_rate / 3:.1g}"
    return f"the loss rose, from {first:.3g} to {last:.3g}: try {rate}"


def _digest_of(held: Held, before: Previous | None) -> str | None:
    """Of the files of one curvature, or of several, maybe of a run before; None of none."""
    found = {name: _digest(one.path, before) for name, one in held.items()}
    return found.get("") if "" in found or not found else digest_of(found)


def _digest(path: Path, before: Previous | None = None) -> str | None:
    """Of a file, or of one of a run before, which knows it; the first process alone keeps it."""
    if not first_rank():
        return None
    return file_digest(path) if before is None else before.digest(path)
