"""``retain explain``: which training rows a run spent its predicted nats on."""

from __future__ import annotations

from retain.cli.options import Screen, check_file, command
from retain.runs.explain import ExplainConfig, explain_run

__all__ = ["EXAMPLE", "explain"]

EXAMPLE = "Example: retain explain runs/may --top 20 --out dearest.json"


@command(ExplainConfig, "run")
def explain(config: ExplainConfig, screen: Screen) -> None:
    """Rank a run's training rows by the predicted forgetting that they push for."""
    if config.out is not None:
        check_file(config.out)
    record = explain_run(config, screen)
    rows = record["rows"]
    head = ["row", "share", "nats", "loss", "layers", "text"]
    drawn = (
        f" (drawn from {record['examples']}: estimates)" if len(rows) < record["examples"] else ""
    )
    title = f"the dearest of {len(rows)} rows{drawn}, of {record['predicted']:.3g} predicted nats"
    screen.table(title, head, map(_line, rows[: config.top]))
    screen.emit(record)


def _line(row: dict[str, object]) -> list[str]:
    places: list[tuple[str, float]] = row["places"]  # type: ignore[assignment]
    named = "\n".join(name for name, _ in places)
    numbers = (f"{row['share']:.1%}", f"{row['nats']:.2g}", f"{row['loss']:.2f}")
    return [str(row["place"]), *numbers, named, str(row["text"])]
