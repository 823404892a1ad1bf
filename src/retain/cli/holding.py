"""The curvature of a training run: given, kept from before, or measured now."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from retain.cli.common import Screen
from retain.config import RunConfig
from retain.errors import CurvatureError, MismatchError
from retain.files import first_rank

__all__ = ["Held", "find_curvature"]


class Held(NamedTuple):
    """A curvature, where it lies, and the seconds that it took, if it was made now."""

    curvature: Any
    path: Path
    seconds: float | None


def find_curvature(
    config: RunConfig, given: Any, out: Path, model: Any, tokenizer: Any, screen: Screen,
    *, anew: bool = False,
) -> Held | None:  # fmt: skip
    """The curvature for a run, checked to fit its model; None for plain LoRA.

    Args:
        config: of the run.
        given: the curvature of ``config.curvature``, already read.
        out: the run's folder, in which one is kept.
        model: with its fresh adapter.
        tokenizer: its tokenizer.
        screen: where to say what is done.
        anew: one that an earlier run has left in the folder is not used.

    Raises:
        MismatchError: the given curvature does not fit.
    """
    if config.method == "none":
        return None
    if config.curvature is not None:
        return Held(_start_at(given, model), Path(config.curvature), None)
    from retain.curvature.artifact import load_curvature
    from retain.curvature.fit.fit import fit_curvature

    path, source = out / "curvature.safetensors", config.source or "self"
    if path.is_file() and not anew:
        try:
            found = _start_at(load_curvature(path), model)
            if config.source is None and found.info.note != source:
                raise MismatchError(f"it was measured on {found.info.note}")
            screen.say(f"using the curvature in {path}")
            return Held(found, path, None)
        except CurvatureError as error:
            screen.note(f"{path} is not used, and made anew: {error.what}")
    what = "text that the model writes" if config.source is None else source
    screen.say(f"no curvature is given: measuring one on {what}")
    start = time.perf_counter()
    fitted = fit_curvature(
        model, source, tokenizer=tokenizer, seed=config.training.seed, progress=screen.progress
    )
    if first_rank():
        fitted.save(path)
    return Held(fitted, path, time.perf_counter() - start)


def _start_at(curvature: Any, model: Any) -> Any:
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
