"""What a run trains and is held by: its adapter, and its curvatures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from retain.config import RunConfig
from retain.errors import CurvatureError, MismatchError
from retain.files import first_rank
from retain.runs import named
from retain.runs.folders import by_file
from retain.runs.messages import Messages
from retain.runs.months import Previous

__all__ = ["Held", "HeldBy", "adapter_for", "curvatures_for", "recipe_for"]


class HeldBy(NamedTuple):
    """A curvature, where it lies, and the seconds that it took, if it was made now."""

    curvature: Any
    path: Path
    seconds: float | None


Held = Mapping[str, HeldBy]
"""What holds a run, by the names of its budgets; of one without names under ``""``. Empty for plain
LoRA."""


def adapter_for(
    base: Any, config: RunConfig, before: Previous | None, sources: Mapping[str, Any], past: Any
) -> Any:  # fmt: skip
    """The model with a fresh adapter, or with that of the run to continue from and fresh rows.

    `sources`, by name, and `past` are the curvatures of that run.

    Raises:
        MismatchError: the state is not that of the adapter, or no filter can be made.
    """
    from retain.models.lora import attach_lora
    from retain.models.saved import load_adapter

    if before is None:
        return attach_lora(base, **config.adapter.model_dump())
    model: Any = load_adapter(base, before.adapter)
    before.check_adapter(model, past)
    recipe, month = recipe_for(config, sources, past), len(before.state.runs)
    model = recipe.grow(
        model, config.adapter.rank, seed=config.adapter.seed + month, max_rank=config.max_rank
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or ".modules_to_save." in name)
    return model


def curvatures_for(
    config: RunConfig, given: Any, texts: Mapping[str, Any], out: Path, model: Any,
    tokenizer: Any, messages: Messages, *, resume: bool = False,
) -> Held:  # fmt: skip
    """The curvatures for a run, checked to fit its model: one, or those of its named budgets.

    `given` is that of ``config.curvature``, already read, and `texts` are the rows of names, as far
    as they are. Those of the model's own text that an earlier run has left in the folder are used
    again, where they were fitted as this run would fit them, but for the model's precision, which
    their files do not tell; of other text where the run goes on.

    Raises:
        MismatchError: the given curvature does not fit.
        SourceError: a name's text cannot be had.
    """
    if config.method == "none":
        return {}
    if config.curvature is not None:
        return {"": HeldBy(_at_start(given, model), Path(config.curvature), None)}
    found: dict[str, HeldBy] = {}
    for name in named.budget_names(config):
        path, note = out / by_file("curvature", name), named.note_of(config, name)
        kept = None
        if resume or _is_own(note):
            kept = _kept(config, path, note, model, messages, resume=resume)
        found[name] = kept or _made(
            config, name, path, note, texts.get(name), model, tokenizer, messages
        )
    return found


def _is_own(note: str) -> bool:
    """Whether the model wrote that text, or answers in it."""
    return note == named.OWN or note.startswith(f"{named.OWN}:")


def _kept(
    config: RunConfig, path: Path, note: str, model: Any, messages: Messages, *, resume: bool
) -> HeldBy | None:
    """The curvature that an earlier run has left; None where there is none that can be used.

    A run that goes on takes its own, whatever text it is of; another one that of the text which it
    would sample itself, fitted as it would fit it.
    """
    from retain.curvature.curvature import load_curvature
    from retain.provenance import versions

    if not path.is_file():
        return None
    try:
        found = _at_start(load_curvature(path), model)
        if _is_own(note) and found.info.note != note:
            raise MismatchError(f"it was measured on {found.info.note}")
        if not resume and found.info.seed != config.training.seed:
            raise MismatchError(f"its text was sampled with seed {found.info.seed}")
        made_by = found.info.versions.get("retain")
        if not resume and made_by != versions().get("retain"):  # it samples in another way, maybe
            raise MismatchError(f"its text was sampled by retain {made_by}")
        if not resume:
            _check_made_alike(found, config)
        messages.say(f"using the curvature in {path}")
        return HeldBy(found, path, None)
    except CurvatureError as error:
        messages.note(f"{path} is not used, and made anew: {error.what}")
        return None


def _check_made_alike(found: Any, config: RunConfig) -> None:
    """Refuses a curvature that was fitted in another way than the run would fit its own.

    Raises:
        MismatchError: it was.
    """
    from retain.curvature.blocks.factor import SketchFactor
    from retain.curvature.blocks.ranks import sketch_rank
    from retain.curvature.fit.settings import FitSettings

    own, info = FitSettings(rank=config.factor_rank), found.info
    alike = ("structure", "space", "fisher", "samples", "max_length", "share")
    for name, was, would in (
        *((name, getattr(info, name), getattr(own, name)) for name in alike),
        ("rows", info.sequences, own.rows),
        ("merged", info.merged, 1),
    ):
        if was != would:
            raise MismatchError(f"it was fitted with {name} {was}, and this run would with {would}")
    sides = [side for block in found.blocks.values() for side in block.factors().values()]
    sketched = [isinstance(side, SketchFactor) for side in sides]
    asked = [sketch_rank(side.size, own.rank) is not None for side in sides]
    if sketched != asked or (any(asked) and own.rank not in ("auto", info.rank)):
        was = "whole" if info.rank is None else f"of rank {info.rank}"
        raise MismatchError(f"its factors are {was}, and factor_rank is {own.rank} now")


def _made(
    config: RunConfig, name: str, path: Path, note: str, text: Any, model: Any, tokenizer: Any,
    messages: Messages,
) -> HeldBy:  # fmt: skip
    """A curvature that is measured now, and written."""
    from retain.curvature.fit.fit import fit_curvature

    what = note
    if _is_own(note):
        skill = note.partition(":")[2]
        what = f"what the model answers on {skill}" if skill else "text that the model writes"
    messages.say(f"no curvature is given: measuring one on {what}")
    start = time.perf_counter()
    if text is None:
        text = named.text_of(config, name, model, tokenizer, messages)
    fitted = fit_curvature(
        model, text, tokenizer=tokenizer, seed=config.training.seed, progress=messages.progress,
        rank=config.factor_rank,
    )  # fmt: skip
    fitted.info = replace(fitted.info, note=note)
    if first_rank():
        fitted.save(path)
    return HeldBy(fitted, path, time.perf_counter() - start)


def _at_start(curvature: Any, model: Any) -> Any:
    """The curvature, checked to fit, and the adapter at the point where it was measured."""
    sites = curvature.bind(model)
    fix = "fit it with the same --rank, --alpha, --targets and --dtype, or with --space weight"
    if curvature.info.space == "adapter":
        curvature.load_anchor(model)
        met = curvature.at_anchor(sites)
    else:
        met, fix = not curvature.around_adapter, "fit it without --adapter, or train from Python"
    if not met:
        raise MismatchError(
            "the curvature was measured around another adapter",
            got="an adapter that this run cannot start from",
            allowed="a curvature around a fresh adapter",
            fix=fix,
        )
    return curvature


def recipe_for(config: RunConfig, sources: Mapping[str, Any], past: Any) -> Any:
    """The recipe of a run, with the curvatures of its sources, by name, and of the tasks before."""
    from retain.retention.filter import Filter
    from retain.retention.named import alone
    from retain.retention.recipe import Recipe

    parts = ["force"] if config.method == "laplace" and config.parts is None else config.parts
    return Recipe(
        alone(sources), config.strength, parts=parts, budget=config.budget,
        confidence=config.confidence, past=past, update=config.training.update,
        filter=Filter(gain=config.gain, weight=config.weight), kl=config.kl,
    )  # fmt: skip
