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
    if "answers" in result:
        head = ["", "log-ratio, nats a token", "first word as before", "in the task's form"]
        every = {**result["answers"]["skills"], "all": result["answers"]["overall"]}
        screen.table(
            "answers to prompts",
            [*head, "right before", "right after"],
            [_line(skill, group) for skill, group in every.items()],
        )
    if out is not None:
        screen.say(f"{out}\nnext: retain report {quote(str(out))}")
    screen.emit(result)


def _line(skill: str, group: dict[str, Any]) -> list[str]:
    """One line of the answers' table; a dash for what no script can score."""
    shares = ("first_word", "task_form", "right_before", "right_after")
    values = (group[name]["value"] for name in shares)
    cells = ("–" if value is None else f"{value:.0%}" for value in values)
    return [skill, f"{group['log_ratio']['value']:.3g}", *cells]
