"""``retain soften``: trade what a finished adapter learned for what it made the model forget."""

from __future__ import annotations

from shlex import quote
from typing import Any

from retain.cli.options import Screen, command
from retain.runs.soften import SoftenConfig, soften_run

__all__ = ["EXAMPLE", "soften"]

EXAMPLE = (
    "Example: retain soften runs/mine/adapter --curvature curvature.safetensors --budget 0.05 "
    "--out runs/soft"
)


@command(SoftenConfig, "adapter")
def soften(config: SoftenConfig, screen: Screen) -> None:
    """Pull a finished adapter back to a budget of forgetting, without training."""
    result = soften_run(config, _pictures, screen)
    written = config.out.expanduser() / "adapter"
    chosen, before = result["chosen"], result["curve"][0]
    if result["inside"]:
        screen.say("the adapter is inside the budget already: it is written as it is")
    lines = [
        ["predicted forgetting, nats per token", f"{before['nats']:.3g}", f"{chosen['nats']:.3g}"],
        ["learning kept, predicted", "100.0%", f"{chosen['learned']:.1%}"],
        ["the same by plain scaling", "100.0%", f"{chosen['scaled']:.1%}"],
    ]
    if chosen["measured"]:
        for key, name in (("measured", "measured KL"), ("scaled_measured", "by plain scaling")):
            kl = [p[key]["kl"] for p in (before, chosen)]
            lines.append([f"{name}, nats per token", *(f"{value:.3g}" for value in kl)])
    screen.table("softened", ["", "before", "after"], lines)
    screen.say(f"{written}\nnext: retain eval --adapter {quote(str(written))} --general knowledge")
    screen.emit({"adapter": written, "record": written.with_name("soften.json"), **result})


def _pictures(result: dict[str, Any]) -> dict[str, bytes]:
    from retain.report import soften_pictures

    return soften_pictures(result)
