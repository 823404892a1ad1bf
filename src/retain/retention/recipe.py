"""The recipe: how a model learns a task, and forgets little of what it knew.

It is a chain of parts, each of which can be left out by name:

- ``head``: the outputs of a classifier's task begin fitted to the model as it is, which whoever
  drives the recipe sees to (`retain.retention.head`).
- ``rows``: each task learns in rows of its own of LoRA's A and B; those of earlier tasks stay
  (`retain.retention.fresh_rows`).
- ``filter``: A learns behind a filter that passes what the task's rows use, and stops what the
  source text and the earlier tasks use (`retain.retention.filter`).
- ``force``: the curvature of the source text, and that of the earlier tasks, pull the weights back
  (`retain.retention.force`), with a strength, or with a budget that finds it.

Beside them, where it is asked for, the true divergence on rows of the source (`kl`,
`retain.retention.output_kl`).

Each does what the others cannot: the filter knows nothing of outputs, and a force acts only after a
step has been made. Every door drives this one object: `retain.RetentionCallback` in a trainer,
`retain.Retention` in a plain loop, ``retain train`` and ``--continue-from``, and the study's method
``auto``. The order of calls, for each task::

    fit_head(model, rows)              a classifier with new outputs, before its curvature
    model = recipe.grow(model, rank)   fresh rows, where the adapter has learned something before
    recipe.begin(model, rows)          warns of what is held in a lesser way than asked for
    each step: before_step, backward, before_optimizer, the optimiser, after_step
    recipe.end()
    recipe.consolidate(model, rows)    what the task relies on joins `past`

`state` and `restore` carry what is known between tasks, `progress` what a checkpoint has. What is
called between `begin` and `consolidate` lies in `retain.retention.acting`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from retain.curvature.curvature import Curvature, reanchored
from retain.data.batches import Example, rows_digest
from retain.errors import ConfigError, ModelError, warn
from retain.models.heads import head_kind, predicts_per
from retain.models.lora import grow_lora
from retain.models.processes import check_same, several, share
from retain.models.shards import check_divided, scatter, shard_of
from retain.models.sites import LoraSite, Site, lora_sites
from retain.models.view import ModelView
from retain.retention.acting import Acting
from retain.retention.bounds import PARTS, check_max_rank
from retain.retention.displacement import anchored
from retain.retention.filter import Filter, InputFilter
from retain.retention.filter_checks import NO_STRENGTH, why_left_out, why_no_inputs
from retain.retention.filter_rows import new_moments, old_moments
from retain.retention.force import Force
from retain.retention.fresh_rows import FrozenRows, fresh_rows
from retain.retention.given import check_given
from retain.retention.hooks import check_backward
from retain.retention.loader import RowReader
from retain.retention.marks import mark, release_left
from retain.retention.named import Budgets, Curvatures, by_name, named
from retain.retention.optimizers import check_descends, check_lengths, check_points, keeps_two
from retain.retention.output_kl import OutputKL, Outputs
from retain.retention.soften.truncate import truncated
from retain.retention.state import pack_curvature, unpack_curvature
from retain.retention.task_curvature import task_curvature
from retain.retention.telling import tell_begun_from, tell_drawn, tell_unheld
from retain.types import STRENGTH, FactorRank, Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Recipe"]

Probe = Sequence[Example] | Mapping[str, Sequence[Example]]


class Recipe(Acting):
    """See the module; its attributes after `begin` are those of `Acting`.

    Args:
        curvature: of the source text, around the base model; None where there is none. Several by
            name, of a source each, want a budget each.
        strength: how many nats of task loss one nat of predicted forgetting weighs.
        parts: those that act; by default all, the filter wherever it is possible (`why_no_filter`
            tells why it is not). One that is named and impossible is refused.
        budget: in place of the strength, nats of KL divergence per source token (of a classifier
            per row) that may be spent; of several curvatures by the same names. The force alone
            keeps it.
        confidence: with which it is to hold on text like that which is measured; see `Force`.
        past: the curvature of the tasks before, around the model's present weights.
        update: ``gradient`` or ``proximal``; see `retain.retention.force`.
        filter: options of the filter.
        kl: nats of task loss that one nat of divergence on source rows weighs, or its options; 0
            for none.

    Raises:
        ConfigError: what is no curvature or filter, an unknown part, a value out of range, names
            that differ, or a budget without the force.
    """

    def __init__(
        self,
        curvature: Curvatures | None = None,
        strength: float = STRENGTH,
        *,
        parts: Sequence[str] | None = None,
        budget: Budgets | None = None,
        confidence: float | None = None,
        past: Curvature | None = None,
        update: Update = "gradient",
        filter: Filter | None = None,
        kl: float | OutputKL = 0.0,
    ) -> None:
        check_given(
            curvature, strength, parts=parts, budget=budget, confidence=confidence, past=past,
            update=update, filter=filter,
        )  # fmt: skip
        super().__init__(update)
        self.curvature, self.past = curvature, past
        self.strength = strength
        self.budget, self.confidence = budget, confidence
        self.parts_named = parts is not None
        self.parts = frozenset(PARTS if parts is None else parts)
        self.options = Filter() if filter is None else filter
        self.kl = kl if isinstance(kl, OutputKL) else OutputKL(kl)
        if not self.parts and not self.kl.weight:
            warn("parts is empty, so nothing holds the model; leave it out for all of them")
        self._two_points = False  # of the optimiser, as far as it was seen

    # Before training.

    def grow(self, model: Any, rank: int, *, seed: int = 0, max_rank: int | None = None) -> Any:
        """The model with fresh rows for its next task, where its LoRA has learned something.

        An adapter that would be larger than `max_rank` is cut first, as its curvature feels least;
        a warning says what that loses.

        Args:
            model: a PEFT model with LoRA; it is spent, its base is in the new one.
            rank: fresh rows.
            seed: of PEFT's draw.
            max_rank: of the whole, twice `rank` at least; four times `rank` by default.

        Raises:
            ConfigError: a `max_rank` that leaves no room for what was learned before.
        """
        check_max_rank(max_rank, rank)
        if (
            "rows" not in self.parts
            or not self._acts()
            or why_no_inputs(self.curvature, self.past) is not None
        ):
            return model
        sites, factors = lora_sites(model), None
        if fresh_rows(sites) is not None:
            return model
        most = 4 * rank if max_rank is None else max_rank
        felt = [reanchored(c, model) for c in self._curvatures()]
        if sites[0].rank + rank > most and felt:
            whole = reduce(operator.add, felt)
            factors, lost = truncated(sites, whole, most - rank)
            warn(
                f"the adapter is cut from rank {sites[0].rank} to {most - rank}, and loses "
                f"{lost:.2%} of what the curvature feels of it; max_rank={most}"
            )
        return grow_lora(model, rank, factors=factors, seed=seed)

    def begin(
        self,
        model: nn.Module,
        rows: RowReader | None,
        *,
        seed: int = 0,
        probe: Probe = (),
        source: Sequence[Example] = (),
        elsewhere: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: Mapping[str, Any] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Sets and holds the model for a training.

        Args:
            model: with its adapter; or, for the force alone, one whose weights train.
            rows: reads the training data, for the filter; None where they cannot be read.
            seed: of the choice of rows.
            probe: tokenised source text, on which a budget is measured, of several by name; see
                `Force`.
            source: tokenised source text, for `kl`.
            elsewhere: whether `probe` and `source` are the model's own text, and the curvature is
                of other.
            tokenizer: tells where its answers begin; the model's own by default.
            progress: of a training that goes on, what `progress` gave for its checkpoint.
            kept: of one, what `kept` gave; without it A begins as rounded as the checkpoint has it.

        Raises:
            ModelError: no LoRA, or none whose rows are fresh, for a filter that is named; or a
                model that the force cannot hold.
            MismatchError: a curvature of another model, or one that a named filter cannot use.
            ConfigError: no rows for the filter of a training that goes on.
            SourceError: rows that hold no tokens.
        """
        release_left(model, resuming=progress is not None)
        self._clear()
        try:
            told = self.weighs() or bool(self.kl.weight)
            self.from_adapter = tell_begun_from(model, self.curvature, told=told)
            self.elsewhere = elsewhere
            read = {named("budget", n): r for n, r in by_name(probe).items()} | {"kl": source}
            self.texts = {name: rows_digest(rows)[:12] for name, rows in read.items() if rows}
            if other := self.other_texts((progress or {}).get("texts")):
                warn(f"measured on other text than when the training was stopped: {other}")
            if self.kl.weight:
                self.outputs = Outputs(
                    ModelView(model, tokenizer), source, self.kl, seed=seed,
                    steps=int((progress or {}).get("steps", 0)), base=self._kl_base(model),
                )  # fmt: skip
            self._begin(model, rows, seed, probe, progress)
            self._held = weakref.ref(model)
            if self.filter is not None and progress is not None:
                lost = self.filter.restore(kept or {})
                if lost and progress.get("kept"):
                    warn(
                        f"what the checkpoint kept beside a filtered A is not there for {lost} of "
                        f"{len(self.sites)} layers, or is of another A or shape: there the "
                        "training goes on from A itself, and so otherwise than the stopped one"
                    )
        except BaseException:  # nothing is left half held
            release_left(model, resuming=progress is not None)
            raise

    def _begin(
        self, model: nn.Module, rows: RowReader | None, seed: int, probe: Probe,
        progress: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        resuming = progress is not None
        check_divided(model)
        check_backward(model)
        head_kind(model)  # refuses one that is not known
        tell_drawn(model)
        for each in self._curvatures():
            each.bind(model)  # it is of this model, and on its device
            _share(each)
        if "filter" in self.parts:
            self.why_no_filter = why_left_out(
                model, self.curvature, self.past, rows, progress, named=self.parts_named,
                acts=self._acts(), two_points=self._two_points,
                fresh="rows" in self.parts and not resuming,
            )  # fmt: skip
        filters = "filter" in self.parts and self.why_no_filter is None
        if filters or ("rows" in self.parts and self._acts()):
            self._begin_rows(model, filters, progress)
        if filters:
            assert rows is not None
            new = new_moments(model, self.sites, rows, self.options, self.curvature, seed=seed)
            share([t for factor in new.factors.values() for t in factor.tensors().values()])
            old = old_moments(new, self.curvature, self.past)
            self.filter = InputFilter(
                self.sites, new, old, self.options, active=self.active,
                resuming=resuming or fresh_rows(self.sites) is None,
            )  # fmt: skip
        if self.active != slice(None):
            self.frozen = FrozenRows(self.sites, self.active)
        if self.filter is not None or self.frozen is not None:
            self._marked = [site.a for site in self.sites]
            mark(self._marked, self)
        scatter(_weights(self.sites))  # before anyone gathers them again
        held = self.past if self.curvature is None else self.curvature
        if "force" in self.parts and held is not None:
            self._begin_force(model, held, probe, progress)
        if self.sites:
            share([t for site in self.sites for t in (site.a, site.b)])
        held_sites = self.sites if self.force is None else self.force.sites
        self._shards = [w for w in _weights(held_sites) if shard_of(w) is not None]
        scatter(self._shards)
        if self.why_no_filter not in (None, NO_STRENGTH):
            alone = "the force alone" if self.force is not None else "nothing"
            warn(f"held by {alone}, without a filter: {self.why_no_filter}")

    def _kl_base(self, model: nn.Module) -> Callable[[], AbstractContextManager[Any]] | None:
        """Where the KL counts from: the adapter that the curvature is around, None for the base."""
        if not self.from_adapter:
            return None
        first, sites = self._curvatures()[0], lora_sites(model, sharded=True)
        with anchored(first, sites, grown=True):  # refused before the first step, if at all
            pass
        return partial(anchored, first, sites, grown=True)

    def _begin_rows(
        self, model: nn.Module, filters: bool, progress: Mapping[str, Any] | None
    ) -> None:
        """Which rows train, of an adapter that is LoRA."""
        try:
            self.sites = lora_sites(model, sharded=True)
        except ModelError:
            if filters:
                raise
            return
        if progress is not None:
            self.active = slice(progress.get("first") or None, None)
        elif "rows" in self.parts:
            self.active = fresh_rows(self.sites) or slice(None)

    def _begin_force(
        self, model: nn.Module, held: Curvatures, probe: Probe,
        progress: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        spaces = {each.info.space for each in self._curvatures()}
        if self.frozen is not None and self.update == "proximal" and "adapter" in spaces:
            raise ConfigError(
                "a proximal step in adapter space moves all rows of the adapter",
                got="an adapter of which some rows are to stay",
                allowed="a curvature of space='weight', or update='gradient'",
                fix="leave update out",
            )
        past = None if held is self.past else self.past
        self.force = Force(
            model, held, self.strength, budget=self.budget, confidence=self.confidence, past=past,
            probe=probe, update=self.update, resuming=progress is not None or held is self.past,
        )  # fmt: skip
        if self.weighs():
            self.unheld = tell_unheld(model, self.force)
        if self.frozen is not None:
            self.force.only(self.active)
            if progress is None:
                self._make_room(self.force, self.frozen)
        if progress:
            self.force.restore(progress)
            self.scaled_back = progress.get("scaled_back")
        if self.scaled_back is not None:
            warn(self.scaled_back)

    def _make_room(self, force: Force, frozen: FrozenRows) -> None:
        """Earlier rows are scaled back to four fifths of the budget, which is to be said."""
        if self.budget is None:
            return
        before = force.predicted()
        if force.make_room():
            frozen.renew()
            named, per = isinstance(self.budget, Mapping), predicts_per(force.model)
            self.scaled_back = (
                "what earlier training learned is scaled back to four fifths of "
                f"{'each budget' if named else f'the budget of {self.budget:g}'}, from "
                f"{before:.3g} to {force.predicted():.3g} predicted nats per {per}"
            )

    def _acts(self) -> bool:
        """Whether the parts act: with none named, a strength of 0 is plain training."""
        return self.parts_named or self.weighs()

    def weighs(self) -> bool:
        """Whether a force has a strength, or a budget that gives it one."""
        return bool(self.strength) or self.budget is not None

    def _curvatures(self) -> list[Curvature]:
        """Of the sources and of the tasks before."""
        return [*by_name(self.curvature).values(), *by_name(self.past).values()]

    # While it trains, beside `Acting`.

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuses one beside whose steps a part cannot act; see `check_lengths`, `check_points`
        and `check_descends`.

        Where it is known before `begin`, a filter that nobody has named is left out instead.

        Raises:
            ConfigError: it is one.
        """
        pulls = "force" in self.parts and self.weighs()
        proximal = pulls and self.update == "proximal"
        held = self.filter if self._held is not None else None
        self._two_points = keeps_two(optimizer)
        for part, acts in (
            ("a budget", self.budget is not None),
            ("a proximal step", proximal),
            ("the filter", held is not None or (self.parts_named and "filter" in self.parts)),
        ):
            if acts:
                check_points(optimizer, part)
        if proximal:
            check_lengths(optimizer)
        if self.kl.weight or (pulls and not proximal):
            check_descends(optimizer)

    def weight(self) -> float:
        """What one predicted nat weighs now."""
        return self.strength if self.force is None else self.force.strength

    # After a task.

    def consolidate(
        self,
        model: nn.Module,
        rows: Sequence[Example | Mapping[str, Any]],
        *,
        columns: slice | None = None,
        seed: int = 0,
        rank: FactorRank = "auto",
        progress: bool = False,
    ) -> Curvature:
        """What a task that has been learned relies on joins the past, around the present weights.

        Args:
            model: that has learned it.
            rows: its rows, of which 32 are read, of a classifier's 128: tokenised (`input_ids`), or
                others of docs/data.md, cut to 256 tokens, where the model's name has a tokenizer.
            columns: the outputs of a classifier that answer them; None for all.
            seed: of the choice of rows, and of label draws.
            rank: of `retain.fit_curvature`, where there is no source, whose curvature tells it.
            progress: show a bar.
        """
        source = next(iter(by_name(self.curvature).values()), None)
        found = task_curvature(
            model, rows, None if source is None else source.info,
            columns=columns, seed=seed, rank=rank, progress=progress,
        )  # fmt: skip
        self.past = found if self.past is None else reanchored(self.past, model) + found
        return self.past

    def state(self, *, source: bool = True, past: bool = True) -> dict[str, Tensor]:
        """What is known between tasks, as tensors that `safetensors` can write.

        Args:
            source: the source's curvatures, which no task changes.
            past: that of the tasks before.
        """
        known: dict[str, Curvature] = {}
        if source:
            known |= {named("curvature", n): c for n, c in by_name(self.curvature).items()}
        if past and self.past is not None:
            known["past"] = self.past
        return {name: pack_curvature(held) for name, held in known.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts a `state` back.

        Raises:
            ArtifactError: it is damaged.
        """
        self.release()
        self._clear()
        kept = {n: unpack_curvature(t) for n, t in state.items() if n.startswith("curvature")}
        self.curvature = kept.get("curvature")
        if isinstance(self.budget, Mapping) and kept:  # in their order, whatever the file's is
            self.curvature = {name: kept[named("curvature", name)] for name in self.budget}
        self.past = unpack_curvature(state["past"]) if "past" in state else None

    def memory(self) -> int:
        """Bytes that are kept between tasks."""
        return sum(held.memory() for held in self._curvatures())


def _weights(sites: Sequence[Site]) -> list[nn.Parameter]:
    """What trains of LoRA layers."""
    return [w for site in sites if isinstance(site, LoraSite) for w in (site.a, site.b)]


def _share(curvature: Curvature) -> None:
    """Among several processes, the first one's curvature is everybody's.

    Raises:
        MismatchError: one of them holds quite another.
    """
    if several():
        tensors = list({id(t): t for t in curvature.tensors().values()}.values())
        size = sum(float(t.double().abs().sum()) for t in tensors)
        check_same(
            "curvatures", size, tensors[0].device,
            fix="fit with one seed in all processes, or load one file",
        )  # fmt: skip
        share(tensors)
