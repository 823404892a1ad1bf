"""What a run trains and is held by: its adapter, its curvature, its start of A."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from retain.config import RunConfig
from retain.errors import CurvatureError, MismatchError
from retain.files import first_rank
from retain.runs.messages import Messages
from retain.runs.months import Previous

__all__ = ["HeldBy", "adapter_for", "curvature_for", "recipe_for"]


class HeldBy(NamedTuple):
    """A curvature, where it lies, and the seconds that it took, if it was made now."""

    curvature: Any
    path: Path
    seconds: float | None


def adapter_for(
    base: Any, config: RunConfig, before: Previous | None, source: Any, past: Any
) -> Any:  # fmt: skip
    """The model with a fresh adapter, or with that of the run to continue from and fresh rows.

    `source` and `past` are the curvatures of that run.

    Raises:
        MismatchError: the state is not that of the adapter, or no filter can be made.
    """
    from retain.models.lora import attach_lora
    from retain.models.saved import load_adapter

    if before is None:
        return attach_lora(base, **config.adapter.model_dump())
    model: Any = load_adapter(base, before.adapter)
    before.check_adapter(model, past)
    recipe, month = recipe_for(config, source, past), len(before.state.runs)
    model = recipe.grow(
        model, config.adapter.rank, seed=config.adapter.seed + month, max_rank=config.max_rank
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or ".modules_to_save." in name)
    return model


def curvature_for(
    config: RunConfig, given: Any, out: Path, model: Any, tokenizer: Any, messages: Messages,
    *, anew: bool = False,
) -> HeldBy | None:  # fmt: skip
    """The curvature for a run, checked to fit its model; None for plain LoRA.

    `given` is that of ``config.curvature``, already read. With `anew` one that an earlier run has
    left in the folder is not used.

    Raises:
        MismatchError: the given curvature does not fit.
    """
    if config.method == "none":
        return None
    if config.curvature is not None:
        return HeldBy(_at_start(given, model), Path(config.curvature), None)
    from retain.curvature.curvature import load_curvature
    from retain.curvature.fit.fit import fit_curvature

    path, source = out / "curvature.safetensors", config.source or "self"
    if path.is_file() and not anew:
        try:
            found = _at_start(load_curvature(path), model)
            if config.source is None and found.info.note != source:
                raise MismatchError(f"it was measured on {found.info.note}")
            if config.factor_rank not in ("auto", found.info.rank):
                raise MismatchError(f"its factors are of rank {found.info.rank}")
            messages.say(f"using the curvature in {path}")
            return HeldBy(found, path, None)
        except CurvatureError as error:
            messages.note(f"{path} is not used, and made anew: {error.what}")
    what = "text that the model writes" if config.source is None else source
    messages.say(f"no curvature is given: measuring one on {what}")
    start = time.perf_counter()
    fitted = fit_curvature(
        model, source, tokenizer=tokenizer, seed=config.training.seed, progress=messages.progress,
        rank=config.factor_rank,
    )  # fmt: skip
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
        met, fix = not curvature.anchor, "fit it without --adapter, or train from Python"
    if not met:
        raise MismatchError(
            "the curvature was measured around another adapter",
            got="an adapter that this run cannot start from",
            allowed="a curvature around a fresh adapter",
            fix=fix,
        )
    return curvature


def recipe_for(config: RunConfig, curvature: Any, past: Any) -> Any:
    """The recipe of a run, with the curvatures of its source and of the tasks before."""
    from retain.retention.filter import Filter
    from retain.retention.recipe import Recipe

    parts = ["force"] if config.method == "laplace" and config.parts is None else config.parts
    return Recipe(
        curvature, config.strength, parts=parts, budget=config.budget, past=past,
        update=config.training.update, filter=Filter(gain=config.gain, weight=config.weight),
        kl=config.kl,
    )  # fmt: skip
