"""Ranking by likelihood equals scoring each option by itself; generation keeps the order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from letters import Letters, logp
from peft import PrefixTuningConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import tiny
from retain.errors import ConfigError
from retain.evaluation.generation import generate
from retain.evaluation.ranking import Ranking, score_options
from retain.models.reuse import can_reuse

PROMPTS = ["abc", "ab", "kj", "abcd", "c", "hgfedcba"]
OPTIONS = [
    ["a", "b", "cd"],  # a beginning rides along: one branch
    ["ca", "cb", "k"],
    ["abc", "abd", "a", "bcd"],  # two branches
    ["e", "f"],
    ["gg", "hg", "ihgfe"],  # three branches
    ["ab", "abab", "ka", "k"],
]


def build(kind: str) -> Any:
    torch.manual_seed(3)
    small = {"vocab_size": 13, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 0}
    if kind == "llama":
        return tiny.base("llama")
    if kind == "lora":
        return tiny.tiny("llama", moved=True)
    if kind == "neox":
        model: Any = GPTNeoXForCausalLM(
            GPTNeoXConfig(**small, num_hidden_layers=2, intermediate_size=24, rotary_pct=0.5)
        )
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        )
    elif kind == "mistral":  # sliding windows, shorter than the prompts
        model = MistralForCausalLM(
            MistralConfig(
                **small,
                num_hidden_layers=2,
                intermediate_size=24,
                num_key_value_heads=1,
                sliding_window=4,
            )
        )
    else:
        model = BloomForCausalLM(BloomConfig(vocab_size=13, hidden_size=16, n_layer=2, n_head=2))
    with torch.no_grad():  # far from uniform
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    return model.double().eval()


def counted(model: Any) -> tuple[list[int], list[int]]:
    """Of each pass from now on, the tokens that are read, and the positions at the head."""
    fed: list[int] = []
    headed: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, o: fed.append(a[0].numel()))
    model.get_output_embeddings().register_forward_hook(
        lambda m, a, o: headed.append(o.numel() // o.shape[-1])
    )
    return fed, headed


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny.base("llama")


@pytest.mark.parametrize("shared", ["", "bcdefghikj"])
@pytest.mark.parametrize("kind", ["llama", "lora", "neox", "gpt2", "mistral", "bloom"])
def test_ranking_equals_scoring_each_option_alone(kind: str, shared: str) -> None:
    model, prompts = build(kind), [shared + prompt for prompt in PROMPTS]
    with torch.no_grad():
        want = [[logp(model, p, o) for o in row] for p, row in zip(prompts, OPTIONS, strict=True)]
    best = [max(range(len(s)), key=s.__getitem__) for s in want]
    assert len(set(best)) > 1
    assert can_reuse(model) == (kind != "bloom")
    for size in (1, 2, 5, 64):
        for reuse in (True, False):
            got = score_options(model, Letters(), prompts, OPTIONS, batch_size=size, reuse=reuse)
            for row, right in zip(got.logp, want, strict=True):
                assert row == pytest.approx(right, abs=1e-4)
            assert got.best() == best


def test_prefix_tuning_runs_every_branch_logp() -> None:
    inner = tiny.base("llama")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(inner, config).double().eval()
    assert not can_reuse(model)
    got = score_options(model, Letters(), PROMPTS, OPTIONS)
    with torch.no_grad():
        for prompt, row, scores in zip(PROMPTS, OPTIONS, got.logp, strict=True):
            assert scores == pytest.approx([logp(model, prompt, o) for o in row], abs=1e-4)


def test_a_prompt_is_run_once_and_the_head_where_something_is_predicted(
    model: torch.nn.Module,
) -> None:
    fed, headed = counted(model)
    prompt = "abcdefgh" * 2
    score_options(model, Letters(), [prompt] * 5, [["a", "b", "c"]] * 5)
    assert (fed, headed) == ([16], [1])  # equal questions too are run once
    fed.clear(), headed.clear()
    score_options(model, Letters(), [prompt], [["abc", "bca", "cabd"]])
    assert (fed, headed) == ([16, 3 * 3], [1, 2 + 2 + 3])
    fed.clear()
    score_options(model, Letters(), [prompt], [["abc", "bca", "cabd"]], reuse=False)
    assert sum(fed) == 3 * 24  # each branch with its prompt, padded to a multiple of 8


def test_what_all_prompts_begin_with_is_run_once_a_batch(model: torch.nn.Module) -> None:
    fed, headed = counted(model)
    prompts, options = ["abcdefgh" + end for end in ("a", "bc", "cab")], [["a", "bc"]] * 3
    score_options(model, Letters(), prompts, options, batch_size=2)
    # The beginning; the two shortest ends, each with the first token of the longer option.
    assert (fed, headed) == ([8, 2 * 3, 8, 4], [1, 2 * 2, 1, 2])
    fed.clear()
    score_options(model, Letters(), [p[1:] for p in prompts], options)  # too few to be worth it
    assert len(fed) == 1
    fed.clear()
    score_options(model, Letters(), ["abcdefgh", "abcdefghi"], options[:2])
    assert len(fed) == 1  # a prompt's last token is its own: 7 are left


def test_keys_and_values_are_held_of_so_many_tokens(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    inner: Any = model
    inner.get_input_embeddings().register_forward_hook(lambda m, a, o: passes.append(len(a[0])))
    prompts = ["abcdefgh" + end for end in "abcde"]
    whole = score_options(model, Letters(), prompts, [["a", "b"]] * 5)
    assert passes == [1, 5]
    passes.clear()
    monkeypatch.setattr("retain.evaluation.ranking.HELD", 2 * 9)
    few = score_options(model, Letters(), prompts, [["a", "b"]] * 5)
    assert passes == [1, 2, 1, 2, 1, 1]
    for one, other in zip(whole.logp, few.logp, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def test_rotary_positions_by_the_length_of_a_pass_are_not_reused(model: torch.nn.Module) -> None:
    assert can_reuse(model)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not can_reuse(model)
    model.config.rope_parameters = {"full_attention": {"rope_type": "longrope"}}
    assert not can_reuse(model)


def test_long_prompts_lose_their_beginning_and_options_nothing(model: torch.nn.Module) -> None:
    long, options = "kkkkkkkkabc", ["de", "fgh", "ed"]
    cut = score_options(model, Letters(), [long], [options], max_length=6)
    short = score_options(model, Letters(), ["abc"], [options])
    assert cut.logp[0] == pytest.approx(short.logp[0], abs=1e-9)
    whole = score_options(model, Letters(), [long], [options], max_length=14)
    assert whole.logp[0] == score_options(model, Letters(), [long], [options]).logp[0]
    assert whole.logp[0] != pytest.approx(short.logp[0], abs=1e-3)

    class Begun(Letters):
        bos_token, bos_token_id = "k", 11

    kept = score_options(model, Begun(), [long], [options], max_length=6)
    by_hand = score_options(model, Letters(), ["kbc"], [options])
    assert kept.logp[0] == pytest.approx(by_hand.logp[0], abs=1e-9)


def test_the_best_option_and_its_loss() -> None:
    got = Ranking([[-2.0, -4.5, -4.0], [-3.0, -1.0, -1.0]])
    assert got.best() == [0, 1]
    assert got.nll([2, 0]) == 3.5


def test_what_cannot_be_ranked_is_refused(model: torch.nn.Module) -> None:
    for prompt, options in (("", ["a"]), ("a", []), ("a", ["b", "zz"])):
        with pytest.raises(ConfigError, match="cannot be ranked"):
            score_options(model, Letters(), [prompt], [options])


@pytest.mark.parametrize("shared", ["", "bcdefghikj"])
@pytest.mark.parametrize("kind", ["llama", "lora", "neox", "gpt2", "mistral", "bloom"])
def test_generation_keeps_the_order_and_ignores_padding(kind: str, shared: str) -> None:
    model = build(kind)
    if kind == "bloom":  # whose masked softmax is of single precision
        model = model.float()
    prompts = [shared + end for end in ("abcdef", "a", "kji", "bb")]
    fed: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, o: fed.append(a[0].shape[1]))
    together = generate(model, Letters(), prompts, max_new_tokens=5, batch_size=4)
    alone = [generate(model, Letters(), [p], max_new_tokens=5)[0] for p in prompts]
    assert together == alone
    assert len(set(alone)) > 1
    once = bool(shared) and kind not in ("mistral", "bloom")  # sliding windows; no cache to share
    assert fed[:2] == ([len(shared), 6] if once else [len(shared) + 6, 1])
