"""The rows that a run learns: as its file has them, and tokenised."""

from __future__ import annotations

from typing import Any

from retain.config import RunConfig

__all__ = ["run_examples", "run_rows"]


def run_rows(config: RunConfig) -> Any:
    """The rows of a run's file, as they are read before any model is loaded."""
    from retain.data.sources import read_rows

    t = config.training
    return read_rows(config.data, config.limit, seed=t.seed, max_length=t.max_length)


def run_examples(
    config: RunConfig, rows: Any, problems: int | None, tokenizer: Any, *,
    origins: list[int] | None = None, **options: Any,
) -> list[Any]:  # fmt: skip
    """What a run learns, tokenised: its `run_rows`, or so many word problems.

    Into `origins` goes the number of the row that each is of.
    """
    from retain.data.draws import sample
    from retain.data.problems import problem_rows, word_problems
    from retain.data.sources import encode

    t = config.training
    if problems is not None:
        count = min(problems or 1, config.limit or 10**9)
        rows = problem_rows(tokenizer, word_problems("train", count, t.seed))
    every = encode(
        rows, tokenizer, max_length=t.max_length, loss=config.loss, origins=origins, **options
    )
    if origins is not None:
        origins[:] = sample(origins, config.limit, t.seed)
    return list(sample(every, config.limit, t.seed))  # a text that is one row gives many
