"""Ranking by likelihood equals scoring each option by itself; intervals; generation order."""

import pytest
import torch

import tiny
from retain.evaluation.generation import generate
from retain.evaluation.intervals import wilson
from retain.evaluation.ranking import rank_options


class Letters:
    """A tokenizer of the letters a to k; ids 1 to 11."""

    pad_token_id, eos_token_id = 0, 12

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - ord("a") + 1 for c in text]}

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(96 + t) for t in row if 0 < t < 12) for row in rows.tolist()]


def by_itself(model: torch.nn.Module, prompt: str, option: str) -> float:
    head, ids = (Letters()(t)["input_ids"] for t in (prompt, option))
    logp = model(torch.tensor([head + ids])).logits[0].log_softmax(-1)
    return sum(float(logp[len(head) - 1 + k, t]) for k, t in enumerate(ids))


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny.base("llama")


def test_ranking_equals_scoring_each_option_alone(model: torch.nn.Module) -> None:
    prompts = ["abc", "ab", "kj", "abcd", "c"]
    options = [["a", "b", "cd"], ["ca", "cb", "k"], ["abc", "abd", "a"], ["e", "f"], ["gg", "gh"]]
    with torch.no_grad():
        scores = [
            [by_itself(model, p, o) for o in row] for p, row in zip(prompts, options, strict=True)
        ]
    best = [max(range(len(s)), key=s.__getitem__) for s in scores]
    assert len(set(best)) > 1
    for size in (1, 2, 64):
        assert rank_options(model, Letters(), prompts, options, batch_size=size) == best


def test_generation_keeps_the_order_and_ignores_padding(model: torch.nn.Module) -> None:
    prompts = ["abcdef", "a", "kji", "bb"]
    together = generate(model, Letters(), prompts, max_new_tokens=5, batch_size=4)
    alone = [generate(model, Letters(), [p], max_new_tokens=5)[0] for p in prompts]
    assert together == alone
    assert len(set(alone)) > 1


def test_wilson_intervals() -> None:
    low, high = wilson(0, 200)
    assert low == 0
    assert high == pytest.approx(0.0188, abs=1e-3)
    assert wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)
