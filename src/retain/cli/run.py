"""What ``retain train`` does once its settings are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retain.cli import checkpoints
from retain.cli.common import (
    Interrupted,
    Screen,
    check_choices,
    finite,
    problem_count,
    quieten,
)
from retain.cli.continuing import Chain, check_state, drop_state, keep_state, read_chain
from retain.cli.holding import Held, find_curvature
from retain.cli.train import RUN
from retain.config import RunConfig
from retain.errors import ConfigError, MismatchError, ModelError, OutputError
from retain.files import check_folder, first_rank
from retain.models.saved import save_adapter

__all__ = ["run_training"]


def run_training(config: RunConfig, screen: Screen, *, resume: bool, overwrite: bool) -> None:
    """Trains, and writes the adapter and ``train.json``.

    Raises:
        Interrupted: Ctrl-C; says what stays usable.
        RetainError: whatever the library has to say.
    """
    out = check_folder(Path(config.out))
    kept = out / "checkpoints"
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
    last = checkpoints.last_whole(kept, config.method != "none")
    if last is not None:
        return f"{last} is whole; go on with: retain train --resume --out {config.out}"
    none = "no checkpoint yet" if config.training.save_steps else "no checkpoint (--save-steps 50)"
    return f"{none}; an older adapter in {config.out} is unchanged"


class _Run:
    def __init__(self, config: RunConfig, screen: Screen, out: Path, resume: bool) -> None:
        self.config, self.screen, self.resume = config, screen, resume
        self.out, self.kept = out, out / "checkpoints"
        self.chain = None if config.continue_from is None else read_chain(config.continue_from)
        self.source: Any = None
        self.past: Any = None

    def run(self) -> None:
        c, training = self.config, self.config.training
        self.problems = problem_count(c.data, "train")
        early = self._early()
        quieten(self.screen.progress)
        from transformers.integrations.integration_utils import (
            get_available_reporting_integrations as installed,
        )

        from retain.curvature.artifact import load_curvature
        from retain.data.batches import batches
        from retain.data.draws import sample
        from retain.data.sources import encode
        from retain.files import write_json
        from retain.models.heads import is_causal
        from retain.models.load import load_model

        check_choices(("report_to", training.report_to, ["none", "all", *installed()]))
        self.screen.say(f"loading {c.model}")
        base, self.tokenizer, _ = load_model(
            c.model, dtype=c.dtype, trust_remote_code=c.trust_remote_code
        )
        if self.chain is not None:
            self.source = load_curvature(self.chain.source)
            self.past = load_curvature(self.chain.past)
        self.model = self._adapted(base)
        if not is_causal(self.model):
            raise ModelError(
                "the model is no causal language model",
                got=type(base).__name__,
                allowed="a model that continues text",
                fix="train classifiers from Python",
            )
        rows = early["rows"] if self.problems is None else self._problem_rows()
        every = encode(rows, self.tokenizer, max_length=training.max_length, causal=True)
        examples = sample(every, c.limit, training.seed)  # a text that is one row gives many
        next(iter(batches(examples, training.batch_size, 0)))  # refuses what fills no batch
        held = self._held(early["curvature"])
        if first_rank():
            if self.resume:
                checkpoints.set_aside_broken(self.kept, held is not None)
            else:
                checkpoints.clear(self.kept)  # --overwrite
            write_json(self.out / RUN, finite(c.model_dump(mode="json")))
        last = checkpoints.last_whole(self.kept, held is not None) if self.resume else None
        if self.resume:
            self.screen.say(f"going on from {last or 'the start: no checkpoint is whole'}")
        self.screen.say(f"training on {len(examples)} rows")
        history = checkpoints.history(last) if last else []  # before newer ones replace it
        result = self._train(examples, held)
        if not first_rank():
            return
        adapter = save_adapter(self.model, self.out / "adapter", c.model)
        if held is not None and c.keep_state:
            entry = {"data": c.data, "examples": len(examples), "seed": training.seed}
            entry |= {"budget": c.budget, "predicted_nats": held.curvature.quadratic(self.model)}
            keep_state(
                self.model, examples, held.path, self.past, self.out, finite(entry), self.chain,
                self.screen,
            )  # fmt: skip
        else:
            drop_state(self.out)
        record = self._record(held, len(examples), last) | {
            "steps": result.steps,
            "seconds": result.seconds,
            "history": history + result.history,
        }
        write_json(self.out / "train.json", finite(record))
        self._tell(record, adapter)

    def _adapted(self, base: Any) -> Any:
        """The model with a fresh adapter, or with that of the run to continue from."""
        from retain.models.adapter import attach_lora
        from retain.models.saved import load_adapter

        if self.chain is None:
            return attach_lora(base, **self.config.adapter.model_dump())
        model = load_adapter(base, self.chain.adapter)
        check_state(self.past, model, self.chain)
        model = self._grown(model, self.chain)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        return model

    @property
    def _filters(self) -> bool:
        """Whether the run has a filter, if its curvature allows it."""
        from retain.training.start import FILTER

        c = self.config
        return c.start == FILTER or (
            c.start is None and c.method == "auto" and bool(c.strength or c.budget is not None)
        )

    def _grown(self, model: Any, chain: Chain) -> Any:
        """The adapter of the run before, with fresh rows for a filter; cut first if it is large."""
        from retain.curvature.merge import reanchored
        from retain.models.adapter import lora_sites
        from retain.models.growing import grow_lora
        from retain.retention.compact import compacted
        from retain.training.start import FILTER, why_no_inputs

        c = self.config
        reason = why_no_inputs(self.source)
        if reason is not None and c.start == FILTER:
            raise MismatchError(
                "no filter can be made for this run",
                got=reason,
                allowed="a source curvature with input sides, such as kfac in weight space",
                fix="leave --start out, so that the force acts alone",
            )
        if not self._filters or reason is not None:
            return model
        sites, factors = lora_sites(model), None
        fresh, most = c.adapter.rank, c.max_rank or 4 * c.adapter.rank
        if sites[0].rank + fresh > most:
            felt = reanchored(self.source, model) + reanchored(self.past, model)
            factors, lost = compacted(sites, felt, most - fresh)
            self.screen.say(
                f"the adapter is cut from rank {sites[0].rank} to {most - fresh}, and loses "
                f"{lost:.2%} of what the curvature feels of it; max_rank={most}"
            )
        return grow_lora(model, fresh, factors=factors, seed=c.adapter.seed + len(chain.runs))

    def _start(self, held: Held) -> Any:
        from retain.training.start import FILTER, Start, why_no_filter

        c = self.config
        kind: str | None = c.start
        if kind is None and self._filters:
            reason = why_no_filter(self.model, held.curvature, self.past)
            if reason is not None:
                self.screen.say(f"held by the force alone, without a filter: {reason}")
            kind = FILTER if reason is None else None
        return None if kind in (None, "random") else Start(kind, gain=c.gain, weight=c.weight)

    def _held(self, given: Any) -> Held | None:
        if self.chain is None:
            return find_curvature(
                self.config, given, self.out, self.model, self.tokenizer, self.screen
            )
        return Held(self.source, self.chain.source, None)

    def _train(self, examples: Any, held: Held | None) -> Any:
        from safetensors import SafetensorError

        from retain.training.loop import train

        try:
            return train(
                self.model,
                examples,
                self.config.training,
                curvature=held and held.curvature,
                strength=self.config.strength,
                budget=self.config.budget if held else None,
                past=self.past,
                start=self._start(held) if held else None,
                out=self.kept,
                progress=self.screen.progress,
                resume=self.resume,
            )
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # that is torch's word for a file that it could not write
            raise OutputError(
                "a checkpoint cannot be written",
                got=f"{self.kept}: {error}",
                allowed="a folder that can be written, with room on the disk",
                fix="free some disk; earlier checkpoints are untouched, --resume goes on from them",
            ) from error
        finally:
            if first_rank():
                checkpoints.drop_broken(self.kept, held is not None)

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
        found: dict[str, Any] = {"rows": None, "curvature": None}
        if self.problems is None:
            from retain.data.sources import read_rows

            size = {"seed": c.training.seed, "max_length": c.training.max_length}
            found["rows"] = read_rows(c.data, c.limit, **size)
        if c.method != "none" and c.curvature is not None:
            from retain.curvature.artifact import load_curvature

            found["curvature"] = load_curvature(c.curvature)
        return found

    def _problem_rows(self) -> list[dict[str, str]]:
        from retain.data.problems import word_problems
        from retain.data.tasks import problem_rows

        count = min(self.problems or 1, self.config.limit or 10**9)
        return problem_rows(
            self.tokenizer, word_problems("train", count, self.config.training.seed)
        )

    def _record(self, held: Held | None, examples: int, last: Path | None) -> dict[str, Any]:
        from retain.models.adapter import share_trainable
        from retain.models.fingerprint import fingerprint
        from retain.study.provenance import provenance

        trainable, total = share_trainable(self.model)
        return {
            "schema": "retain.train/1",
            **provenance(self.config.training.seed),
            "config": self.config.model_dump(mode="json"),
            "model": {
                "name": self.config.model, "parameters": total - trainable,
                "trainable": trainable, "fingerprint": fingerprint(self.model),
            },
            "curvature": held and {
                "path": str(held.path), "seconds": held.seconds,
                "info": held.curvature.info.to_dict(),
            },
            "examples": examples,
            "resumed_from": last and last.name,
            "predicted_nats": held and held.curvature.quadratic(self.model),
        }  # fmt: skip

    def _tell(self, record: dict[str, Any], adapter: Path) -> None:
        losses = [entry["loss"] for entry in record["history"]]
        lines = [["steps", str(record["steps"])], ["seconds", f"{record['seconds']:.1f}"]]
        if losses:
            lines.append(["loss, first to last step", f"{losses[0]:.3f} to {losses[-1]:.3f}"])
        if record["predicted_nats"] is not None:
            nats = f"{record['predicted_nats']:.3g} nats per token"
            lines.append(["predicted forgetting", nats])
        self.screen.table("trained", ["", ""], [*lines, ["adapter", str(adapter)]])
        self.screen.say(
            f"next: retain eval --model {self.config.model} --adapter {adapter} --probe"
        )
        self.screen.emit({"adapter": adapter, "record": self.out / "train.json", **record})
