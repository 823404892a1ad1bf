"""A second size of decoder where there is no hub: a model without some of its layers.

    python benchmarks/shorter.py --layers 24 --out runs/models/smollm2-24

Of all stretches of neighbouring layers, the one is left out without which the model's predictions
on text that it samples change least (KL divergence in nats per token), as in Gromov et al., The
Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887). Nothing is trained after.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from retain.data.sources import encode
from retain.files import check_folder
from retain.models.generating import sample_rows
from retain.models.load import load_model
from retain.retention.measure import Reference


def without(layers: list[nn.Module], start: int, count: int) -> nn.ModuleList:
    """The layers but for `count` from `start` on, numbered anew for the cache."""
    kept = nn.ModuleList(layers[:start] + layers[start + count :])
    for index, layer in enumerate(kept):
        attention: Any = layer.self_attn
        attention.layer_idx = index
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=24, help="how many stay")
    parser.add_argument("--rows", type=int, default=8, help="of text to tell by")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    check_folder(args.out)
    model, tokenizer, _ = load_model(args.model)
    body: Any = model.base_model
    layers = list(body.layers)
    drop = len(layers) - args.layers
    if not 0 < drop < len(layers):
        parser.error(f"--layers {args.layers}: the model has {len(layers)}")
    drawn = sample_rows(model, tokenizer, count=args.rows, max_length=128)
    rows = encode(drawn, tokenizer, max_length=128, causal=True)
    reference = Reference(model, rows, base=nullcontext)
    found = {}
    for start in tqdm(range(1, args.layers + 1), unit="stretch"):
        body.layers = without(layers, start, drop)
        found[start] = reference.measure(model)
    best = min(found, key=lambda start: found[start].kl)
    body.layers = without(layers, best, drop)
    model.config.num_hidden_layers = args.layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: args.layers]
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"left out: layers {best} to {best + drop - 1} of {len(layers)}; on {found[best].tokens} "
          f"tokens KL {found[best].kl:.3f} nats, perplexity {found[best].ppl_base:.2f} -> "
          f"{found[best].ppl:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
