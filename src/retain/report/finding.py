"""The finding in one sentence, made from the numbers and no kinder than they are."""

from __future__ import annotations

from retain.report.scales import number
from retain.report.schema import Forgetting, Interval, Result, Row
from retain.report.series import strength_text

__all__ = ["claims_line", "finding"]


def _apart(a: Interval, b: Interval) -> bool | None:
    """Whether two intervals do not meet; None where one is unknown."""
    if a is None or b is None:
        return None
    return a[1] < b[0] or b[1] < a[0]


def _kept(lora: Row, held: Row) -> str:
    """What the held run forgot, against plain LoRA."""
    there, here = lora.forgetting or Forgetting(), held.forgetting or Forgetting()
    plain, ours = there.kl, here.kl
    if plain is None or ours is None or plain <= 0:
        return "was trained, but how much it forgot against plain LoRA is not known"
    numbers = f"{number(ours)} against {number(plain)} nats per token"
    if ours >= plain:
        return f"does not forget less than plain LoRA ({numbers})"
    apart = _apart(here.kl_interval, there.kl_interval)
    doubt = ", with overlapping 95% intervals" if apart is False else ""
    saved = 100 * (1 - ours / plain)
    percent = f"{saved:.0f}" if 1 <= saved <= 99 else f"{saved:.1f}"
    return f"forgets {percent}% less than plain LoRA ({numbers}{doubt})"


def _learned(base: Row | None, lora: Row, held: Row) -> str:
    """What the held run learned, against plain LoRA and the base."""
    plain, ours = lora.target, held.target
    if not plain or not ours or plain.exact_match is None or ours.exact_match is None:
        return "its score on the task is not known"
    start = base.target.exact_match if base and base.target else None
    origin = "" if start is None else f"; the base {100 * start:.1f}%"
    score = f"{100 * ours.exact_match:.1f}% exact match against {100 * plain.exact_match:.1f}%"
    if start is not None and ours.exact_match <= start:
        return f"it does not learn the task ({score}{origin})"
    apart = _apart(ours.interval, plain.interval)
    if apart and ours.exact_match < plain.exact_match:
        return f"it learns less of the task ({score}{origin})"
    if apart:
        return f"it learns more of the task ({score}{origin})"
    if ours.exact_match == plain.exact_match:
        return f"it scores the same on the task ({score}{origin})"
    word = "lower" if ours.exact_match < plain.exact_match else "higher"
    doubt = "" if apart is None else ", with overlapping 95% intervals"
    return f"it scores {word} on the task ({score}{doubt}{origin})"


def finding(result: Result) -> str:
    """One sentence on what was forgotten, what was learned and which claims fail."""
    model, task = result.model.name, result.task.name
    lora, held = result.lora, result.chosen
    if held is None:
        text = f"No strength was chosen for {model} on {task}, so there is no finding to report"
    elif lora is None:
        text = f"Plain LoRA was not run for {model} on {task}, so there is nothing to compare"
    else:
        text = (
            f"Trained on {task} with retention at strength {strength_text(held)}, {model} "
            f"{_kept(lora, held)}, and {_learned(result.base, lora, held)}"
        )
    failed = sum(claim.verdict == "does not hold" for claim in result.summary)
    if failed:
        verb = "does" if failed == 1 else "do"
        text += f"; {failed} of {len(result.summary)} claims {verb} not hold"
    return text + "."


def claims_line(result: Result) -> str:
    """How many of the claims hold."""
    verdicts = [claim.verdict for claim in result.summary]
    total = len(verdicts)
    if not total:
        return "No claims were checked."
    holding = verdicts.count("holds")
    if holding == total:
        return "The claim holds." if total == 1 else f"All {total} claims hold."
    parts = [f"{holding} of {total} claims hold"]
    if failed := verdicts.count("does not hold"):
        parts.append(f"{failed} {'does' if failed == 1 else 'do'} not")
    if unknown := verdicts.count("not measured"):
        parts.append(f"{unknown} not measured")
    return ", ".join(parts) + "."
