"""``retain compact``: an adapter at a rank that servers take, and what that loses."""

from __future__ import annotations

from shlex import quote

from retain.cli.options import Screen, command
from retain.runs.compact import CompactConfig, compact_run

__all__ = ["EXAMPLE", "compact"]

EXAMPLE = "Example: retain compact runs/july --rank 16 --measure --out runs/served"


@command(CompactConfig, "adapter")
def compact(config: CompactConfig, screen: Screen) -> None:
    """Make an adapter narrower, as servers want it, and say what that loses."""
    result = compact_run(config, screen)
    written = config.out.expanduser() / "adapter"
    lost, rank = result["lost"], result["rank"]
    from retain.models.saved import check_adapter

    classifies = check_adapter(written).get("task_type") == "SEQ_CLS"
    per = "row" if classifies else "token"
    lines = [["rank", str(rank["before"]), str(rank["after"]), f"{lost['share']:.2%} of |dW|^2"]]
    for key, name in (("nats", "predicted nats"), ("kl", "measured KL")):
        if result[key]:
            found = (result[key][part] for part in ("before", "after", "cut"))
            values = (part if key == "nats" else part["kl"] for part in found)
            lines.append([f"{name} per {per}", *(f"{value:.3g}" for value in values)])
    screen.table("cut", ["", "before", "after", "lost"], lines)
    worst = lost["worst"]
    said = f"most is lost at {worst['layer']}: {worst['share']:.2%}\n{written}\nnext: "
    if classifies:
        screen.say(f"{said}load it as docs/classifiers.md says")
    else:
        screen.say(f"{said}retain eval --adapter {quote(str(written))} --general knowledge")
    screen.emit({"adapter": written, "record": written.with_name("compact.json"), **result})
