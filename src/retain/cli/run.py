"""What ``retain train`` does once its settings are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retain.cli import checkpoints, classify
from retain.cli.common import (
    Interrupted,
    Screen,
    check_choices,
    finite,
    load_base,
    problem_count,
    quieten,
)
from retain.cli.continuing import keep_state, read_chain
from retain.cli.folders import check_run, drop_state
from retain.cli.holding import Held, find_curvature
from retain.cli.recording import record_of, tell
from retain.cli.train import RUN
from retain.config import RunConfig
from retain.documents import sealed
from retain.errors import ConfigError
from retain.files import check_folder, file_digest, first_rank, locked, write_json, writing
from retain.models.saved import save_adapter

__all__ = ["run_training"]


def run_training(config: RunConfig, screen: Screen, *, resume: bool, overwrite: bool) -> None:
    """Trains, and writes the adapter and ``train.json``.

    Raises:
        Interrupted: Ctrl-C; says what stays usable.
        RetainError: whatever the library has to say.
    """
    out = check_folder(Path(config.out))
    before = config.continue_from
    if before is not None and Path(before).expanduser().resolve() == out.resolve():
        raise ConfigError(
            "the run would take the place of the one that it continues from",
            got=f"--out {out}",
            allowed="another folder; a run that is stopped half-way would leave neither",
            fix="choose another --out",
        )
    kept = out / "checkpoints"
    own = config.method != "none" and config.curvature is None and config.continue_from is None
    with locked(out):
        if first_rank():
            check_run(out, curvature=own)
        if not resume and not overwrite:
            checkpoints.refuse_leftovers(kept)
        try:
            _Run(config, screen, out, resume).run()
        except KeyboardInterrupt:
            raise Interrupted(_usable(config, kept)) from None
        finally:
            if first_rank():
                checkpoints.tidy(out, kept, RUN)


def _usable(config: RunConfig, kept: Path) -> str:
    from retain.training.checkpoints import last_whole

    last = last_whole(kept)
    if last is not None:
        return f"{last} is whole; go on with: retain train --resume --out {config.out}"
    none = "no checkpoint yet" if config.training.save_steps else "no checkpoint (--save-steps 50)"
    return f"{none}; an older adapter in {config.out} is unchanged"


def unused(config: RunConfig) -> list[str]:
    """A line for settings that a run of this kind does not read."""
    if config.method == "none":
        given = [n for n in ("curvature", "source", "budget", "start") if getattr(config, n)]
        return [f"method none holds nothing: not used: {', '.join(given)}"] if given else []
    if config.budget is not None and config.strength != RunConfig.model_fields["strength"].default:
        return [f"the budget finds the strength: strength {config.strength:g} is not used"]
    return []


class _Run:
    def __init__(self, config: RunConfig, screen: Screen, out: Path, resume: bool) -> None:
        self.config, self.screen, self.resume = config, screen, resume
        self.out, self.kept = out, out / "checkpoints"
        self.chain = None if config.continue_from is None else read_chain(config.continue_from)
        self.source: Any = None
        self.past: Any = None
        self.why_no_filter: str | None = None
        self.labels: classify.Labels | None = None

    def run(self) -> None:
        c, training = self.config, self.config.training
        self.problems = problem_count(c.data, "train")
        early = self._early()
        for line in unused(c):
            self.screen.note(line)
        quieten(self.screen.progress)
        if classify.wanted(c):
            classify.check_settings(c, self.problems)
            early["rows"], self.labels = classify.labels_of(early["rows"], c)
        from transformers.integrations.integration_utils import (
            get_available_reporting_integrations as installed,
        )

        from retain.cli.adapting import adapted
        from retain.cli.identity import placed, rows_digest
        from retain.curvature.artifact import load_curvature
        from retain.data.batches import batches
        from retain.data.counts import RowCounts
        from retain.data.draws import sample
        from retain.data.sources import encode
        from retain.models.fingerprint import fingerprint
        from retain.models.heads import is_causal

        check_choices(("report_to", training.report_to, ["none", "all", *installed()]))
        self.config = c = placed(c)
        base = self._base()
        if self.chain is not None:
            self.source = load_curvature(self.chain.source)
            self.past = load_curvature(self.chain.past)
            self.chain.check_base(fingerprint(base), self.source.info.model, c.model)
        causal, labels = is_causal(base), self.labels
        rows = early["rows"] if self.problems is None else self._problem_rows()
        counts = RowCounts()
        every = encode(
            rows, self.tokenizer, max_length=training.max_length, causal=causal, loss=c.loss,
            counts=counts, regression=None if labels is None else labels.regression,
        )  # fmt: skip
        examples = sample(every, c.limit, training.seed)  # a text that is one row gives many
        for line in counts.lines():
            self.screen.note(line)
        next(iter(batches(examples, training.batch_size, 0)))  # refuses what fills no batch
        head = labels and classify.fit_new_head(base, examples, labels, c, self.screen)
        self.model = adapted(base, c, self.chain, self.source, self.past, self.screen)
        held = self._held(early["curvature"])
        identity = {
            "data": rows_digest(examples),
            "base": fingerprint(self.model),
            "source": held and (early["digest"] or self._digest(held.path)),
            "past": self.chain and self._digest(self.chain.past),
        }
        last = self._last(identity)
        if first_rank():
            write_json(self.out / RUN, sealed(finite(c.model_dump(mode="json"))))
        self.screen.say(f"training on {len(examples)} rows")
        history = checkpoints.history(last) if last else []  # before newer ones replace it
        result = self._train(examples, held, identity)
        if not first_rank():
            return
        adapter = save_adapter(self.model, self.out / "adapter", c.model)
        record = record_of(c, self.model, held, last) | {
            "examples": len(examples),
            "rows": counts.to_dict(),
            "labels": labels and labels.to_dict() | {"head": head},
            "digests": identity,
            "why_no_filter": self.why_no_filter,
            "notes": self.screen.notes,
            "steps": result.steps,
            "seconds": result.seconds,
            "history": history + result.history,
        }
        write_json(self.out / "train.json", finite(record))
        if held is not None and c.keep_state:
            entry = {"data": c.data, "examples": len(examples), "seed": training.seed}
            entry |= {"data_digest": identity["data"], "budget": c.budget}
            entry |= {"predicted_nats": held.curvature.quadratic(self.model)}
            keep_state(
                self.model, examples, held.curvature, self.past, self.out, finite(entry),
                self.chain, self.screen,
            )  # fmt: skip
        else:
            drop_state(self.out)
        checkpoints.drop_unfinished(self.kept)
        tell(record, adapter, self.out, self.screen)

    def _base(self) -> Any:
        """The base model; its tokenizer is kept.

        Raises:
            ModelError: it cannot be loaded.
        """
        c = self.config
        self.screen.say(f"loading {c.model}")
        if self.labels is not None:
            base, self.tokenizer, _ = classify.load_classifier(c, self.labels)
            return base
        of = "the run to resume" if self.resume else None
        if self.chain is not None and self.chain.model == c.model:
            of = "the run to continue from"
        base, self.tokenizer, _ = load_base(
            c.model, of, dtype=c.dtype, trust_remote_code=c.trust_remote_code
        )
        return base

    def _last(self, identity: dict[str, Any]) -> Path | None:
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
            self.screen.note(line)
        last = last_whole(self.kept)
        if last is None:
            self.screen.note("no checkpoint is whole: the run begins anew")
        else:
            if first_rank():  # which knows the digests of the files
                checkpoints.check_identity(last, identity)
            self.screen.say(f"going on from {last}")
        return last

    @staticmethod
    def _digest(path: Path) -> str | None:
        """Of a file; the first process alone keeps it."""
        return file_digest(path) if first_rank() else None

    def _held(self, given: Any) -> Held | None:
        if self.labels is not None and self.config.method != "none":
            reason = classify.why_not_held(self.config, self.labels)
            if reason is not None:
                self.screen.note(f"nothing is held: {reason}")
                return None
        if self.chain is None:
            return find_curvature(
                self.config, given, self.out, self.model, self.tokenizer, self.screen,
                anew=self.config.source is not None and not self.resume,
            )  # fmt: skip
        return Held(self.source, self.chain.source, None)

    def _train(self, examples: Any, held: Held | None, identity: dict[str, Any]) -> Any:
        from retain.cli.adapting import start_of
        from retain.training.loop import train

        start = None
        if held is not None:
            start, self.why_no_filter = start_of(self.config, self.model, held.curvature, self.past)
            if self.why_no_filter is not None:
                why = self.why_no_filter
                self.screen.note(f"held by the force alone, without a filter: {why}")
        fix = "free some disk; --resume goes on from the last whole checkpoint, where there is one"
        try:
            with writing("a checkpoint", self.kept, fix=fix):
                return train(
                    self.model,
                    examples,
                    self.config.training,
                    curvature=held and held.curvature,
                    strength=self.config.strength,
                    budget=self.config.budget if held else None,
                    past=self.past,
                    start=start,
                    out=self.kept,
                    progress=self.screen.progress,
                    resume=self.resume,
                    identity=identity,
                )
        finally:
            if first_rank():
                checkpoints.drop_broken(self.kept)

    def _early(self) -> dict[str, Any]:
        """What can be read, and refused, before the model is loaded."""
        c = self.config
        if c.keep_state and c.method == "none":
            raise ConfigError(
                "plain LoRA has no state to keep",
                got="keep_state with method none",
                allowed="auto or laplace; --strength 0 holds nothing",
                fix="leave --keep-state or --method none out",
            )
        if c.max_rank is not None and c.max_rank < 2 * c.adapter.rank:
            raise ConfigError(
                "max_rank leaves no room for what was learned before",
                got=f"max_rank {c.max_rank}, rank {c.adapter.rank}",
                allowed="twice the rank at least",
                fix=f"--set max_rank={4 * c.adapter.rank}",
            )
        found: dict[str, Any] = {"rows": None, "curvature": None, "digest": None}
        if self.problems is None:
            from retain.data.sources import read_rows

            size = {"seed": c.training.seed, "max_length": c.training.max_length}
            found["rows"] = read_rows(c.data, c.limit, **size)
        if c.method != "none" and c.curvature is not None:
            from retain.curvature.artifact import load_curvature

            found["curvature"] = load_curvature(c.curvature)
            found["digest"] = self._digest(Path(c.curvature).expanduser())
        return found

    def _problem_rows(self) -> list[dict[str, str]]:
        from retain.data.problems import word_problems
        from retain.data.tasks import problem_rows

        count = min(self.problems or 1, self.config.limit or 10**9)
        return problem_rows(
            self.tokenizer, word_problems("train", count, self.config.training.seed)
        )
