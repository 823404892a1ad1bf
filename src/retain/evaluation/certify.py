"""A certificate: of what the base model could do, no more than an allowed share is lost.

Items of a skill are put to the base and to the tuned model, see `retain.evaluation.skills`. Of the
n items the base gets R right, and the tuned model L of these wrong. What is bounded is the **loss
λ**: of the items of this kind whose answer the base knows, the share that it no longer does.

**Chance.** Where an item has m choices, a guess is right with the chance c = 1/m. Let the base know
a share k of the items, and guess the others. It is right with p = k + (1 - k) c, so that
k (1 - c) = p - c. An item that it knew and lost is guessed afterwards, and wrong with 1 - c; of the
items that it had right by luck, a share g is wrong afterwards. Of those right before, then,

    q = P(wrong after | right before) = (k λ (1 - c) + (1 - k) c g) / p,

    λ = (q p - (1 - k) c g) / (p - c)  <=  q / (1 - c / p),

with equality at g = 0, as where nothing changed. That is claimed whatever g is: g depends on how
much luck is drawn again, which nothing observed tells. The estimate is ``L / (R - c n)``.

**Bound.** Given R, L is binomial (R, q); R is binomial (n, p). Without chance the bound is the
exact one of Clopper and Pearson on L of R. With it, q is bounded from above at nine tenths of the
error, p from below at one tenth, and ``q / (1 - c / p)`` falls in p: by the union bound all of it
fails with at most the error. Where p is not shown to be above c, the bound is 1.

**Several skills** share the error equally (Bonferroni), so that all bounds hold together.

Assumed: the items are independent draws of what the skill is to stand for, and the adapter was not
chosen by them; who does not know is right with c at most, before and after (right choices that
stand at every place equally often, none told by its looks), and without choices never. Where a
skill's items have several numbers of choices, c is the largest, which only widens the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from retain.data.tokens import tokenize
from retain.errors import ConfigError, not_finite, shown, unknown
from retain.evaluation.answers import answered, row_log_probabilities
from retain.evaluation.generation import generate_ids
from retain.evaluation.prompts import check_counts, put, writer
from retain.evaluation.ranking import score_options
from retain.evaluation.skills import SkillItem, Skills, read_skills
from retain.intervals import binomial_lower, binomial_upper
from retain.models.off import adapter_off
from retain.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Allowed", "Certificate", "SkillLoss", "answers_of", "certify", "check_allowed", "items_needed",
    "loss_bound",
]  # fmt: skip

Allowed = Mapping[str, float | str]
"""What each skill may lose: a share such as 0.02, or ``2%``."""

LEVEL = 0.95
CHANCE_PART = 0.1
"""Of the error, what the bound of p takes where there is chance."""

_MOST = 10_000_000  # items that anybody would collect


@dataclass(frozen=True)
class SkillLoss:
    """What is left of a skill.

    Attributes:
        skill: its name.
        items, before, after: how many there are, and how many the base and the tuned model get
            right.
        lost, won: right before and wrong after, and the other way round.
        chance: c, the largest of the items.
        share: the estimated loss; None where the base is no better than chance.
        bound: the upper bound of the loss.
        allowed: the loss that is allowed; None where none was asked about.
        needed: with none lost, as many items would show that the allowance is kept; None where
            these are enough, or none would be.
    """

    skill: str
    items: int
    before: int
    after: int
    lost: int
    won: int
    chance: float
    share: float | None
    bound: float
    allowed: float | None
    needed: int | None

    @property
    def verdict(self) -> str:
        """``held``, ``broken``, or nothing where no loss is allowed or forbidden."""
        if self.allowed is None:
            return ""
        return "held" if self.bound <= self.allowed else "broken"

    @property
    def reason(self) -> str:
        """Why a skill could not have been held, if so."""
        if self.needed is not None:
            return f"too few items: {self.needed} would be needed at 0 lost"
        if self.verdict == "broken" and self.before <= self.chance * self.items:
            return "the base is no better than chance: use items that it gets right"
        return ""


@dataclass(frozen=True)
class Certificate:
    """Losses by skill, those with an allowance first, and the ``rows`` that they are counted from.

    Attributes:
        skills: what is left of each.
        level: at which all bounds of skills with an allowance hold together.
        rows: one an item, with the answers and whether they are right.
    """

    skills: tuple[SkillLoss, ...]
    level: float
    rows: tuple[dict[str, Any], ...]

    @property
    def held(self) -> bool:
        """Whether every skill with an allowance is held."""
        return all(skill.verdict != "broken" for skill in self.skills)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON."""
        skills = [asdict(s) | {"verdict": s.verdict, "reason": s.reason} for s in self.skills]
        return {
            "held": self.held, "level": self.level, "correction": "Bonferroni",
            "skills": skills, "rows": list(self.rows),
        }  # fmt: skip


def certify(
    model: nn.Module,
    items: Skills,
    *,
    allow: Allowed,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: int = 32,
    batch_size: int = 32,
    progress: bool = False,
) -> Certificate:
    """Whether a tuned model lost no more of its base's skills than is allowed, at 95 % confidence.

    The module's docstring says what the bound is of and what it assumes. A prompt is asked in the
    model's chat form, where the tokenizer has a template; answers are greedy.

    Args:
        model: a causal PEFT model; its base is itself with the adapter off.
        items: what `retain.evaluation.skills.read_skills` reads.
        allow: the loss allowed of each skill. Other skills are told, and not judged.
        tokenizer: the model's; one that was loaded from a name finds its own.
        new_tokens: where a written answer is cut.
        batch_size: prompts, or choices, at once. Memory and speed only.
        progress: show bars.

    Raises:
        SourceError: items that cannot be read, or are longer than the model can read.
        ModelError: the model writes no text, its predictions are not finite, or it has no adapter
            that can be switched off so that the base is what it was.
        ConfigError: an allowance of no such skill or that is no share, or a number out of range.
    """
    check_counts(new_tokens=new_tokens, batch_size=batch_size)
    asked = read_skills(items)
    allowed = check_allowed(allow, asked)
    view, words = writer(model, tokenizer)
    sizes = (new_tokens, batch_size)
    with adapter_off(model):  # a model without an adapter is refused before anything is written
        before = answers_of(view, words, asked, *sizes, progress, "base")
    after = answers_of(view, words, asked, *sizes, progress, "tuned")
    rows = [
        {
            "id": item.id, "skill": item.skill, "prompt": item.prompt, "base": b, "tuned": a,
            "right_before": right_b, "right_after": right_a,
        }
        for item, (b, right_b), (a, right_a) in zip(asked, before, after, strict=True)
    ]  # fmt: skip
    names = dict.fromkeys([*allowed, *(item.skill for item in asked)])
    level = 1 - (1 - LEVEL) / len(allowed)
    skills = [_loss(name, asked, rows, level, allowed.get(name)) for name in names]
    return Certificate(tuple(skills), LEVEL, tuple(rows))


def check_allowed(allow: Allowed, items: Sequence[SkillItem]) -> dict[str, float]:
    """The allowances as shares between 0 and 1.

    Raises:
        ConfigError: there is none, one is of no skill of the items, or one is no such share.
    """
    example = "allow={'facts': 0.02}, or --allow facts=2%"
    if not isinstance(allow, Mapping) or not allow:
        raise ConfigError(
            "nothing says what may be lost", got=shown(allow), allowed="skills with a share each",
            fix=example,
        )  # fmt: skip
    names = {item.skill for item in items}
    for skill in allow:
        if skill not in names:
            raise unknown("skill", str(skill), names)
    return {skill: _share(value, skill, example) for skill, value in allow.items()}


def _share(value: float | str, skill: str, example: str) -> float:
    """``2%`` or 0.02 as a number."""
    text = str(value).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if isinstance(value, bool) or not 0 < share < 1:
        raise ConfigError(
            f"the allowance of {skill} is no share", got=shown(value),
            allowed="above 0% and below 100%, such as 2% or 0.02", fix=example,
        )  # fmt: skip
    return share


def loss_bound(lost: int, before: float, items: int, chance: float, level: float) -> float:
    """The upper bound of λ: see the module's docstring.

    Args:
        lost: L, right before and wrong after.
        before: R, right before.
        items: n.
        chance: c.
        level: how sure it is.
    """
    if not chance:
        return binomial_upper(lost, before, level)
    error = 1 - level
    p = binomial_lower(before, items, 1 - CHANCE_PART * error)
    q = binomial_upper(lost, before, 1 - (1 - CHANCE_PART) * error)
    return min(1.0, q / (1 - chance / p)) if p > chance else 1.0


def items_needed(share: float, allowed: float, chance: float, level: float) -> int | None:
    """How many items would keep the bound within what is allowed, with none lost.

    It is the least number that does, as all larger ones do. Those that are right are whole items,
    so a few of the numbers just below it may do too.

    Args:
        share: of the items, how many the base gets right.
        allowed: the loss that is allowed.
        chance: c.
        level: how sure the bound is.

    Returns:
        None where no number would do.
    """

    def enough(n: int, right: float) -> bool:
        return loss_bound(0, right, n, chance, level) <= allowed

    low, high = 0, 1
    while not enough(high, share * high - 1):  # fewer than there are, and no steps in it
        if high > _MOST or share <= chance:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle, share * middle - 1) else (middle, high)
    while enough(high - 1, math.floor(share * (high - 1) + 1e-9)):
        high -= 1
    return high


def _loss(
    name: str,
    items: Sequence[SkillItem],
    rows: Sequence[Mapping[str, Any]],
    level: float,
    allowed: float | None,
) -> SkillLoss:
    """The counts of a skill, and what follows from them."""
    mine = [row for row in rows if row["skill"] == name]
    pairs = [(row["right_before"], row["right_after"]) for row in mine]
    n, before, lost = len(mine), sum(b for b, _ in pairs), pairs.count((True, False))
    chance = max(item.chance for item in items if item.skill == name)
    known = before - chance * n
    short = allowed is not None and loss_bound(0, before, n, chance, level) > allowed
    return SkillLoss(
        skill=name, items=n, before=before, after=sum(a for _, a in pairs), lost=lost,
        won=pairs.count((False, True)), chance=chance,
        share=min(1.0, lost / known) if known > 0 else None,
        bound=loss_bound(lost, before, n, chance, level), allowed=allowed,
        needed=items_needed(before / n, allowed or 0, chance, level) if short else None,
    )  # fmt: skip


def answers_of(
    view: ModelView,
    words: PreTrainedTokenizerBase,
    items: Sequence[SkillItem],
    new_tokens: int,
    batch_size: int,
    progress: bool = False,
    label: str = "",
) -> list[tuple[str, bool]]:
    """What the model as it is says to each item, and whether that is right; see `certify`.

    Raises:
        ModelError: its predictions are not finite. A written answer is read once more for that, as
            of such predictions the first token would be taken.
    """
    prompts = [put(words, item.prompt) for item in items]
    said = [""] * len(items)
    ranked = [i for i, item in enumerate(items) if item.choices]
    options = [
        [choice if prompts[i][-1:].isspace() else f" {choice}" for choice in items[i].choices]
        for i in ranked
    ]
    scores = score_options(
        view.model, words, [prompts[i] for i in ranked], options, batch_size=batch_size,
        progress=progress, label=f"{label}, choices",
    )  # fmt: skip
    for i, best in zip(ranked, scores.best(), strict=True):
        said[i] = items[i].choices[best]
    free = [i for i, item in enumerate(items) if not item.choices]
    if free:
        ids = [tokenize(words, prompts[i]) for i in free]
        written = generate_ids(
            view.model, words, ids, new_tokens=new_tokens, batch_size=batch_size,
            progress=progress, label=f"{label}, answers",
        )  # fmt: skip
        pairs = [answered(p, a) for p, a in zip(ids, written, strict=True)]
        likely = row_log_probabilities(view, pairs, batch_size, progress, f"{label}, read again")
        if not all(map(math.isfinite, likely)):
            raise not_finite()
        texts = words.batch_decode(written, skip_special_tokens=True)
        for i, text in zip(free, texts, strict=True):
            said[i] = text
    return [
        (text, text == item.choices[item.choice] if item.choices else item.right(text))
        for text, item in zip(said, items, strict=True)
    ]
