"""What the plan says of a wide layer, against a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retain import attach_lora, fit_curvature
from retain.curvature.plan import factor_bytes, fitting_bytes
from retain.models.adapter import lora_sites

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
    from retain.curvature import gather

    keep = gather.Gather.turn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gather.Gather,
            "turn",
            lambda self: (states.append(dict(self.estimator.state)), keep(self))[1],
        )
        curvature = fit_curvature(
            model, rows, structure, rank=RANK, batch_size=2, max_length=64, progress=False
        )
    layers, shared = {site.name: site.shape}, {site.name: site.name}
    planned = factor_bytes(structure, layers, shared, RANK)
    assert curvature.memory() == pytest.approx(planned, rel=0.05)
    path = curvature.save(tmp_path / "c.safetensors")
    assert path.stat().st_size == pytest.approx(planned, rel=0.05)
    (state,) = states
    held = sum(t.numel() * t.element_size() for t in state.values())
    assert held == pytest.approx(fitting_bytes(structure, layers, shared, RANK), rel=0.05)
    # The whole factor of the wide side alone would be 822 MB.
    assert 4 * WIDE**2 > 50 * curvature.memory()
