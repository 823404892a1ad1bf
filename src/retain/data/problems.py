r"""The demo's task: seeded grade-school word problems with worked answers, as a chat asks them.

A question such as "Mia has 3 boxes with 4 pens each. She gives away 5 pens. How many pens are
left?" has the answer ``"3*4=12\n12-5=7\n#### 7"``: one equation a line, then the result.

The templates are data (``problems.toml``). Training and test problems share no template, and
they share no numbers: `number_split` sends every collection of numbers to one side, whatever
their order, and a template draws only from its own side.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

from retain.data.batches import Example
from retain.data.encoding import encode
from retain.errors import ConfigError, SourceError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MARK", "Problem", "Split", "ask", "final_number", "number_split", "problem_examples",
    "problem_rows", "recall", "templates", "word_problems",
]  # fmt: skip

Split = Literal["train", "test"]

MARK = "####"
"""Before the result of an answer, as in GSM8K."""

_SMALLEST = 2  # no step of an answer comes out below this, so none is trivial
_NUMBER = re.compile(r"[ \t]*\$?[ \t]*(-?\d+(?:,\d{3})*)(?![\d,]*\.?\d)")
_PRONOUNS = {
    "she": {"she": "she", "She": "She", "her": "her", "Her": "Her"},
    "he": {"she": "he", "She": "He", "her": "his", "Her": "His"},
}


@dataclass(frozen=True)
class Problem:
    """A word problem, its worked answer, and what both were made from."""

    template: str  # its name
    question: str
    answer: str  # one equation a line, then ``#### result``
    result: int
    numbers: tuple[int, ...]  # those drawn for the template, in its order


@dataclass(frozen=True)
class _Template:
    name: str
    text: str
    ranges: tuple[tuple[str, range], ...]
    steps: tuple[tuple[str, str, str], ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> _Template:
        """A template from its table in the file."""
        ranges = {
            letter: range(low, high + 1, *stride)
            for letter, (low, high, *stride) in entry["numbers"].items()
        }
        steps = tuple(tuple(text.split(" ")) for text in entry["steps"])
        return cls(entry["name"], entry["text"], tuple(ranges.items()), steps)

    def work(self, numbers: Sequence[int]) -> tuple[list[str], int] | None:
        """The equations and the result, or None where a step does not come out well."""
        values = {letter: n for (letter, _), n in zip(self.ranges, numbers, strict=True)}
        lines, result = [], 0
        for index, (left, operator, right) in enumerate(self.steps, start=1):
            x, y = (int(t) if t.isdigit() else values[t] for t in (left, right))
            result = values[f"s{index}"] = _calculate(x, operator, y)
            if result < _SMALLEST:
                return None
            lines.append(f"{x}{operator}{y}={result}")
        return lines, result

    def fill(self, numbers: tuple[int, ...], words: Mapping[str, str]) -> Problem:
        """The problem with these numbers and words."""
        worked = self.work(numbers)
        assert worked is not None, "only numbers that come out well are drawn"
        lines, result = worked
        drawn = {letter: str(n) for (letter, _), n in zip(self.ranges, numbers, strict=True)}
        question = self.text.format_map({**words, **drawn})
        answer = "\n".join([*lines, f"{MARK} {result}"])
        return Problem(self.name, question, answer, result, numbers)


def number_split(numbers: Iterable[int]) -> Split:
    """The split that may use these numbers: test where their sum divides by 4, else train."""
    return "test" if sum(numbers) % 4 == 0 else "train"


def templates(split: Split) -> tuple[str, ...]:
    """The names of the templates of a split."""
    return tuple(template.name for template in _templates(_checked(split)))


def word_problems(
    split: Split, count: int, seed: int = 0, largest: int | None = None
) -> list[Problem]:
    """Word problems of a split, the same for the same arguments.

    The templates take turns, in a new random order each round, until one runs out of numbers;
    none repeats its numbers, so no question comes twice. With the same seed, a smaller count
    gives the beginning of a larger one.

    Args:
        split: "train" or "test".
        count: how many problems.
        seed: seed of the random choices.
        largest: leave out problems in which a larger number than this is drawn or worked out.

    Raises:
        ConfigError: for an unknown split or a negative count.
        SourceError: if the split has fewer problems than asked for.
    """
    known = _templates(_checked(split))
    if count < 0:
        raise ConfigError("negative count of word problems", got=count, allowed="0 or more")
    pools = {t.name: _drawable(t, split, largest) for t in known}
    limit = sum(map(len, pools.values()))
    if count > limit:
        raise SourceError(
            f"too few {split} word problems",
            got=f"count {count}",
            allowed=f"at most {limit}",
            fix="ask for fewer, or add templates",
        )
    rng = random.Random(f"{split}/{seed}")
    supply = {name: rng.sample(pool, len(pool)) for name, pool in pools.items()}
    problems: list[Problem] = []
    while len(problems) < count:
        turn = [template for template in known if supply[template.name]]
        rng.shuffle(turn)
        problems += [t.fill(supply[t.name].pop(), _words(rng)) for t in turn]
    return problems[:count]


def final_number(text: str) -> int | None:
    """The whole number after the first ``####``, or None where there is none.

    Thousands commas, a dollar sign and a final period are allowed; what follows is ignored.
    """
    match = _NUMBER.match(text.partition(MARK)[2])
    return int(match[1].replace(",", "")) if match else None


def _calculate(x: int, operator: str, y: int) -> int:
    """The result of a step, or 0 for a division with a remainder."""
    if operator == "/":
        return x // y if x % y == 0 else 0
    return {"+": x + y, "-": x - y, "*": x * y}[operator]


def _checked(split: Split) -> Split:
    if split not in get_args(Split):
        raise unknown("split", str(split), get_args(Split))
    return split


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath("problems.toml").read_text("utf-8"))


@cache
def _templates(split: Split) -> tuple[_Template, ...]:
    return tuple(map(_Template.of, _data()[split]))


@cache
def _drawable(
    template: _Template, split: Split, largest: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """All numbers a template may draw in a split.

    They are on the side of the split, every step comes out well, and the result is none of them.
    """
    found = []
    for numbers in product(*(values for _, values in template.ranges)):
        worked = template.work(numbers) if number_split(numbers) == split else None
        if worked is None or worked[1] in numbers:
            continue
        peak = max(*numbers, *(int(line.partition("=")[2]) for line in worked[0]), 0)
        if largest is None or peak <= largest:
            found.append(numbers)
    return tuple(found)


def _words(rng: random.Random) -> dict[str, str]:
    """Two people, the pronouns of the first, and two different words of each pool."""
    people = [(name, kind) for kind, names in _data()["people"].items() for name in names]
    (name, kind), (other, _) = rng.sample(people, 2)
    words = {"name": name, "name2": other, **_PRONOUNS[kind]}
    for pool, choices in _data()["pools"].items():
        words[pool], words[f"{pool}2"] = rng.sample(choices, 2)
    return words


# --- as rows


def ask(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A question as the model's chat template puts it, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        return f"Question: {question}\nAnswer:\n"
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def recall(tokenizer: PreTrainedTokenizerBase, beginning: str) -> str:
    """A sentence to complete, as the model's chat puts it: the answer begins with it.

    Without a chat template it is the sentence's beginning alone.
    """
    if not getattr(tokenizer, "chat_template", None):
        return beginning
    return ask(tokenizer, f"Complete the sentence: {beginning}") + beginning


def problem_rows(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> list[dict[str, str]]:
    """Rows of ``prompt`` and ``completion``."""
    return [{"prompt": ask(tokenizer, p.question), "completion": p.answer} for p in problems]


def problem_examples(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], max_length: int = 256
) -> list[Example]:
    """Tokenised problems; only the answers are predicted."""
    rows = problem_rows(tokenizer, problems)
    return encode(rows, tokenizer, max_length=max_length, causal=True)
