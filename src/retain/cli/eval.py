"""``retain eval``: what adapters learned, and what the model forgot."""

from __future__ import annotations

from shlex import quote
from typing import Any

from retain.cli.options import Screen, check_file, command
from retain.records import EvalRecord, EvalScore, Measure
from retain.runs.eval import EvalConfig, eval_run
from retain.runs.folders import check_page

__all__ = ["EXAMPLE", "evaluate"]

EXAMPLE = (
    "Example: retain eval --adapter runs/held/adapter --data heldout.jsonl --general knowledge "
    "--out report.html"
)


@command(EvalConfig)
def evaluate(config: EvalConfig, screen: Screen) -> None:
    """Measure what the model forgot, and what it learned, with an adapter on."""
    out = config.out and check_file(config.out)
    page = out if out is not None and out.suffix == ".html" else None
    if page is not None:
        from retain.report import write_report

        check_page(page)
        check_file(page.with_suffix(".json"))
    result = eval_run(config.model_copy(update={"out": out}), screen)
    found = EvalRecord.model_validate(result)
    one = len(found.adapters) == 1
    names = ["with the adapter"] if one else [adapter.name for adapter in found.adapters]
    last = ["change"] if one else [f"{names[-1]} less {names[0]}"]
    screen.table(
        "base and tuned", ["", "base", *names, *last],
        [_scores(score) for score in found.scores.values()],
    )  # fmt: skip
    for adapter in found.adapters:
        if adapter.answers is None:
            continue
        head = ["", "log-ratio, nats a token", "first word as before", "in the task's form"]
        skills = adapter.answers.skills if len(adapter.answers.skills) > 1 else {}
        every = {**skills, "all": adapter.answers.overall}
        screen.table(
            "answers to prompts" if one else f"answers to prompts, {adapter.name}",
            [*head, "right before", "right after"],
            [_line(skill, group.plain()) for skill, group in every.items()],
        )
    if page is not None:
        json = page.with_suffix(".json")
        screen.say("\n".join(map(str, [json, *write_report([json], page)])))
    elif out is not None:
        screen.say(f"{out}\nnext: retain report {quote(str(out))}")
    screen.emit(result)


def _scores(score: EvalScore) -> list[str]:
    """One line of the table: the base, the adapters, and the last difference."""
    label = f"{score.label}, {score.unit}" if score.unit not in ("", "%") else score.label
    apart = [m for m in score.between if m.pair == (len(score.tuned) - 1, 0)]
    last = apart if len(score.tuned) > 1 else score.changes
    cells = [_cell(measure, score.unit) for measure in (score.base, *score.tuned)]
    return [label, *cells, _cell(last[0], score.unit, signed=True) if last else "–"]


def _cell(measure: Measure, unit: str, *, signed: bool = False) -> str:
    """A value with its interval, such as ``38.0% [24, 54]``."""
    if measure.value is None:
        return "–"
    share, sign = unit == "%", "+" if signed else ""

    def told(value: float) -> str:
        if share:
            return f"{100 * value:{sign}.1f}"
        return f"{value:{sign}{'.3g' if abs(value) < 999.5 else ',.0f'}}"  # 1,013, not 1.01e+03

    text = told(measure.value) + ("%" if share else "")
    if measure.interval is None:
        return text if measure.value else "0"
    low, high = map(told, measure.interval)
    return f"{text} [{low}, {high}]"


def _line(skill: str, group: dict[str, Any]) -> list[str]:
    """One line of the answers' table; a dash for what no script can score."""
    shares = ("first_word", "task_form", "right_before", "right_after")
    values = (group[name]["value"] for name in shares)
    cells = ("–" if value is None else f"{value:.0%}" for value in values)
    return [skill, f"{group['log_ratio']['value']:.3g}", *cells]
