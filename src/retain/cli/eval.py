"""``retain eval``: what an adapter learned, and what the model forgot."""

from __future__ import annotations

from shlex import quote
from typing import Any

from retain.cli.options import Screen, check_file, command
from retain.runs.eval import EvalConfig, eval_run

__all__ = ["EXAMPLE", "evaluate"]

EXAMPLE = "Example: retain eval --adapter runs/held/adapter --probe --task word-problems:100"


@command(EvalConfig)
def evaluate(config: EvalConfig, screen: Screen) -> None:
    """Measure what the model forgot, and what it learned, with an adapter on."""
    out = config.out and check_file(config.out)
    result = eval_run(config.model_copy(update={"out": out}), screen)
    kept: dict[str, Any] = result["forgetting"]
    low, high = kept["kl_interval"]
    spread = f"{kept['kl']:.3g} [{low:.3g}, {high:.3g}]"
    rows = [
        ["forgotten: KL to the base, nats per token", "0", spread],
        ["perplexity of the text", f"{kept['ppl_base']:.2f}", f"{kept['ppl']:.2f}"],
        ["predictions that changed", "0", f"{kept['flips']:.1%}"],
    ]
    for key, label in (("knowledge", "knowledge"), ("exact_match", "word problems, exact match")):
        if result[key]:
            rows.append(
                [label, *(f"{s['accuracy']:.1%} of {s['items']}" for s in result[key].values())]
            )
    screen.table("base and tuned", ["", "base", "with the adapter"], rows)
    if out is not None:
        screen.say(f"{out}\nnext: retain report {quote(str(out))}")
    screen.emit(result)
