"""Where LoRA's A may read in a training run, from the trainer's own rows and the source text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from retain.curvature.blocks.factor import SketchFactor
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.curvature import Curvature
from retain.errors import ModelError, SourceError, unknown
from retain.models.heads import is_causal
from retain.models.names import unwrap
from retain.models.off import adapter_off
from retain.models.sites import LoraSite, lora_sites
from retain.retention.filters import InputFilter, check_filter
from retain.retention.moments import Moments, input_moments, moments_of
from retain.retention.start import STARTS, check_start, set_start
from retain.training.held import Held
from retain.training.reading import loader_examples

__all__ = [
    "AUTO",
    "FILTER",
    "Start",
    "fresh_rows",
    "why_no_filter",
    "why_no_inputs",
]

FILTER = "wiener"

AUTO = "auto"

WIDEST = 8192
"""Values that a layer reads, up to which the recipe has a whole filter for it: 256 MiB each."""


def fresh_rows(sites: Sequence[LoraSite]) -> slice | None:
    """The last rows of A, whose columns of B are 0 in every layer; None where there are none."""
    used = 0
    for site in sites:
        columns = site.b.detach().any(dim=0).nonzero()
        used = max(used, int(columns[-1]) + 1 if len(columns) else 0)
    if not used:
        return slice(None)
    alike = len({site.rank for site in sites}) == 1
    return slice(used, None) if alike and used < sites[0].rank else None


def why_no_filter(
    model: nn.Module, curvature: Curvature, past: Curvature | None = None, loader: Any = None
) -> str | None:
    """Why the recipe (``start="auto"``) leaves the filter out; None where it does not.

    Args:
        model: with its adapter, before the first step.
        curvature: of the source text.
        past: of the tasks before.
        loader: of the training data, which the filter is to read.
    """
    try:
        sites = lora_sites(model)
    except ModelError as error:
        return error.what
    if not all(site.a.requires_grad for site in sites):
        return "A does not train"
    if fresh_rows(sites) is None:
        return _why_not_fresh(model)
    reason = why_no_inputs(curvature)
    if reason is None and past is not None:
        reason = why_no_inputs(past, around=True)
    if (
        reason is None
        and loader is not None
        and not loader_examples(loader, 1, 0, is_causal(model))
    ):
        reason = "the trainer's batches hold no input_ids"
    return reason


def _why_not_fresh(model: nn.Module) -> str:
    configs: dict[str, Any] = getattr(unwrap(model), "peft_config", None) or {}
    for config in configs.values():
        given = getattr(config, "init_lora_weights", True)
        if given is False or str(given).lower() not in ("true", "none", "gaussian", "eva"):
            return f"init_lora_weights={given!r} begins with a B that is not 0"
    return "the adapter is not fresh"


def why_no_inputs(curvature: Curvature, *, around: bool = False) -> str | None:
    """Why no filter can be made from a curvature; None where one can.

    Args:
        curvature: of the source text, or of the tasks before.
        around: it may be that of a tuned model.
    """
    if curvature.info.space != "weight" or (curvature.anchor and not around):
        return "the curvature is not of the base model's weights"
    widest = 0
    for block in curvature.blocks.values():
        if not isinstance(block, KroneckerBlock):
            return f"structure {curvature.info.structure} does not tell what a layer reads"
        if not isinstance(block.inputs, SketchFactor):
            widest = max(widest, block.inputs.size)
    if widest > WIDEST:
        return (
            f"a layer reads {widest} values, and a filter has as many rows and columns; "
            "with a curvature of sketched factors (rank=256) it has fewer"
        )
    return None


@dataclass(frozen=True)
class Start:
    """What LoRA's A may read: behind a filter it learns, from any other start it is held.

    Args:
        kind: ``wiener``, a filter that passes what the training rows use and the source does not
            (`retain.retention.filters`); or a start: ``discriminant``, ``principal`` or ``null``
            (`retain.retention.start`), ``random`` for PEFT's own draw, held, so that B alone trains
            (a callback's ``start=None`` lets A train freely).
        gain: of A's size over PEFT's. The filter shrinks what it is given; and from a start B
            trains alone, so that under Adam the gain is a factor of its learning rate.
        epsilon: of the ridge, relative to a mean second moment: of the rows for the filter (1e-3 by
            default), of the source for a start (0.01).
        answers: the share of predicting positions in the rows' second moments.
        rows: of the training data that are read.
        weight: of the filter: what reading the source costs. The source's second moments are
            brought to the unit of the rows', so it means the same for any curvature.

    Raises:
        ConfigError: a value out of range.
    """

    kind: str = "wiener"
    gain: float = 3.0
    epsilon: float | None = None
    answers: float = 0.5
    rows: int = 64
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in (FILTER, *STARTS):
            raise unknown("start", self.kind, (FILTER, *STARTS))
        if self.kind == FILTER:
            check_filter(self.weight, self.ridge, self.gain, self.answers, self.rows)
        else:
            check_start(self.kind, self.gain, self.ridge, self.answers, self.rows)

    @property
    def ridge(self) -> float:
        """Epsilon, or its default."""
        usual = 1e-3 if self.kind == FILTER else 0.01
        return usual if self.epsilon is None else self.epsilon

    def begin(
        self,
        model: nn.Module,
        curvature: Curvature,
        loader: Any,
        *,
        seed: int,
        past: Curvature | None = None,
        resuming: bool = False,
        first: int = 0,
    ) -> Held:
        """Sets A, unless the run goes on, and holds it or puts it behind its filter.

        Args:
            model: with a fresh LoRA, or one with fresh rows (`retain.models.lora`): those train,
                the others stay.
            curvature: its input sides are those of the source text.
            loader: the trainer's `DataLoader`, whose data set and collator are used.
            seed: of the choice of rows.
            past: the curvature of the tasks before, whose input sides count once for each task.
            resuming: A has been set before the checkpoint.
            first: of a run that goes on, the first row that trains.

        Returns:
            What holds A until its `release`; its `after_step` is to be called after each step of
            the optimiser.

        Raises:
            ModelError: no LoRA, or one without fresh rows.
            MismatchError: a curvature of another model, or without input sides.
            SourceError: data that hold no tokens.
        """
        sites = lora_sites(model)
        for held in (curvature, past):
            if held is not None:
                held.bind(model)  # it is of this model, and on its device
        fresh = slice(first or None, None) if resuming else fresh_rows(sites)
        if fresh is None and self.kind == "random":
            fresh = slice(None)
        if fresh is None:
            raise ModelError(
                "a start needs a fresh adapter",
                got="a LoRA whose B is not 0",
                allowed="B = 0 as PEFT attaches it, in the last rows at least",
                fix="leave start out to go on with this adapter",
            )
        if self.kind == FILTER and not all(site.a.requires_grad for site in sites):
            raise ModelError(
                "a filter is for an A that trains",
                got="A with requires_grad=False",
                allowed="LoRA whose A trains",
                fix="start=None holds the model by the force alone",
            )
        if self.kind == FILTER:
            source = moments_of(curvature)
            new = self._read(model, loader, seed, source.ranks())
            filtered = InputFilter(
                sites, new, _old(source, past, new), weight=self.weight,
                epsilon=self.ridge, gain=self.gain, span=fresh, resuming=resuming,
            )  # fmt: skip
            return Held(sites, fresh, filtered)
        if not resuming:
            rows = None if self.kind == "random" else self._read(model, loader, seed)
            set_start(
                sites, rows, None if rows is None else _old(moments_of(curvature), past, rows),
                kind=self.kind, gain=self.gain, epsilon=self.ridge, seed=seed, span=fresh,
            )  # fmt: skip
        return Held(sites, fresh, None)

    def _read(
        self, model: nn.Module, loader: Any, seed: int, ranks: Mapping[str, int] | None = None
    ) -> Moments:
        """The second moments of the training rows, in the base model."""
        examples = loader_examples(loader, self.rows, seed, is_causal(model))
        if not examples:
            raise SourceError(
                "the training data hold no tokens to start from",
                got=f"{type(loader.dataset).__name__} without rows of two tokens or more",
                allowed="rows whose collator gives input_ids",
                fix="check the data, or leave start out",
            )
        with adapter_off(model):
            return input_moments(
                model, lora_sites(model), examples, answers=self.answers, first=False, ranks=ranks
            )


def _old(source: Moments, past: Curvature | None, new: Moments) -> Moments:
    """S_old: the source weighs as much as the rows, and so does each task before."""
    found = source.sized_as(new)
    if past is not None:
        found.plus(moments_of(past).sized_as(new).times(past.info.merged))
    return found
