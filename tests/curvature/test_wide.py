"""What the plan says of a wide layer, against a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retain import attach_lora, fit_curvature
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.plan import kept_bytes
from retain.curvature.stack import WIDE as STACKED
from retain.curvature.stack import Move, stacks
from retain.models.sites import lora_sites

WIDE, RANK = 14336, 256


@pytest.mark.parametrize("structure", ["kfac", "activation"])
def test_a_layer_of_14336_inputs_takes_what_the_plan_says(structure: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=WIDE,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = attach_lora(LlamaForCausalLM(config).eval(), rank=4, targets=["down_proj"])
    (site,) = lora_sites(model)
    assert site.shape == (512, WIDE)
    random = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(1, 64, (64,), generator=random).tolist()} for _ in range(10)
    ]
    states: list[dict[str, torch.Tensor]] = []
    from retain.curvature.fit import accumulator

    keep = accumulator.Accumulator.end_pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            accumulator.Accumulator,
            "end_pass",
            lambda self: (states.append(dict(self.estimator.state)), keep(self))[1],
        )
        curvature = fit_curvature(
            model, rows, structure, rank=RANK, batch_size=2, max_length=64, progress=False
        )
    layers, shared = {site.name: site.shape}, {site.name: site.name}
    planned = kept_bytes(structure, layers, shared, RANK)
    assert curvature.memory() == pytest.approx(planned, rel=0.05)
    path = curvature.save(tmp_path / "c.safetensors")
    assert path.stat().st_size == pytest.approx(planned, rel=0.05)
    (state,) = states
    held = sum(t.numel() * t.element_size() for t in state.values())
    assert held == pytest.approx(
        kept_bytes(structure, layers, shared, RANK, fitting=True), rel=0.05
    )
    # The whole factor of the wide side alone would be 822 MB.
    assert 4 * WIDE**2 > 50 * curvature.memory()


def test_few_rows_of_a_wide_stack_are_what_they_are_one_by_one() -> None:
    random = torch.Generator().manual_seed(0)
    blocks = {}
    for name in ("a", "b"):
        root = torch.randn(STACKED, 4, generator=random, dtype=torch.float64)
        g = torch.randn(8, 3, generator=random, dtype=torch.float64)
        blocks[name] = KroneckerBlock(root @ root.T, g @ g.T)
    thins = {
        name: (
            torch.randn(8, 3, generator=random, dtype=torch.float64),
            torch.randn(3, STACKED, generator=random, dtype=torch.float64),
        )
        for name in blocks
    }
    want = {name: blocks[name].thin(*thins[name]) for name in blocks}
    (stack,) = stacks(blocks)
    moves = {name: Move(1.0, b, a, torch.float64) for name, (b, a) in thins.items()}
    values, found = stack.pull(moves)
    assert sum(map(float, values)) == pytest.approx(
        sum(float(w.value) for w in want.values()), rel=1e-12
    )
    for name, (left, right) in found.items():
        torch.testing.assert_close(left, want[name].left, rtol=1e-11, atol=1e-9)
        torch.testing.assert_close(right, want[name].right, rtol=1e-11, atol=1e-9)
