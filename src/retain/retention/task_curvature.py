"""What a task's own rows rely on: their curvature at the weights that have learned them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from retain.curvature.curvature import Curvature
from retain.curvature.fit.fit import fit_curvature
from retain.data.batches import Example
from retain.errors import ConfigError
from retain.types import Structure

__all__ = ["answering", "task_curvature"]


def task_curvature(
    model: nn.Module,
    rows: Sequence[Example],
    structure: Structure = "kfac",
    *,
    columns: slice | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Curvature:
    """The curvature of all these rows at the model's present weights, in nats.

    Args:
        model: that has learned them.
        rows: tokenised.
        structure: see `retain.types.Structure`.
        columns: the outputs of a classifier that answer them; None for all. A single one is a
            regression.
        batch_size: rows a pass at most.
        seed: of label draws.
        progress: show a bar.
        **options: of `retain.fit_curvature`.

    Raises:
        ConfigError: labels of a kind that a regression does not have.
    """
    regression = columns is not None and columns.stop - columns.start == 1
    if regression and options.get("fisher") in ("empirical", "reversed"):
        raise ConfigError(
            "a regression has no labels of this kind",
            got=f"fisher={options['fisher']!r}",
            allowed="mc, exact, tempered",
            fix="fisher: mc",
        )
    with answering(model, columns):
        found = fit_curvature(
            model, list(rows), structure, rows=len(rows),
            max_length=max(len(e.tokens) for e in rows) + 1,
            batch_size=min(batch_size, len(rows)), seed=seed, progress=progress, **options,
        )  # fmt: skip
    # The loss (z - y)^2 is, in nats, that of a normal distribution of variance 1/2, whose Fisher
    # is 2; the curvature of a regression is that of variance 1.
    return 2 * found if regression else found


@contextmanager
def answering(model: nn.Module, columns: slice | None) -> Iterator[None]:
    """Lets a classifier answer with a task's own columns alone, as it is trained on it."""
    if columns is None:
        yield
        return

    def narrow(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.logits = output.logits[:, columns]
        return output

    handle = model.register_forward_hook(narrow)
    try:
        yield
    finally:
        handle.remove()
