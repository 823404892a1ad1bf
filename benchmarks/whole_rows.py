"""Where the factor is that a curvature of blocks misses, and a force from gradients of whole rows.

    python benchmarks/whole_rows.py                                  # the first table
    python benchmarks/whole_rows.py --arms 100,0 100,10 --steps 120 --device cuda

SmolLM2-135M in float32 learns word problems behind the recipe. First, along its first step of Adam:
half the mean squared directional derivative of log p(y), y drawn from the model, a predicted token,
with more and more of it summed before it is squared: one token of one layer, ..., a whole row in
all layers, which is the true quadratic of the KL. Then, for each arm ``strength,mu``: a training
that also pulls with ``mu * sum of g g^T B``, g the gradients in B of whole rows at B = 0. One JSON
line an arm. docs/log.md has what came out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from first_words import BATCH, loss_of
from torch import Tensor, nn

import retain
from retain.curvature.fit.source import source_examples
from retain.data.batches import Example
from retain.data.problems import problem_examples, word_problems
from retain.data.tokens import need
from retain.models.sites import LoraSite, lora_sites
from retain.models.view import ModelView
from retain.provenance import provenance
from retain.retention.measure import Reference

LENGTH = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arms", nargs="*", default=[], help="strength,mu")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=64, help="of the source")
    parser.add_argument("--draws", type=int, default=2, help="of the labels of each row")
    parser.add_argument("--heldout", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(json.dumps(provenance(0)), flush=True)
    work = Work(options)
    if options.arms:
        for arm in options.arms:
            strength, mu = map(float, arm.split(","))
            print(json.dumps(work.trained(strength, mu)), flush=True)
    else:
        print(json.dumps(work.parts(10.0), indent=1))


class Work:
    """A model with its text, its curvature and its problems."""

    def __init__(self, options: Any) -> None:
        self.options = options
        loaded = retain.load_model("smollm2-135m", dtype="float32")
        self.model = retain.attach_lora(loaded.model.to(options.device), rank=16)
        self.view = ModelView.of(self.model, loaded.tokenizer)
        count = options.rows + options.heldout
        texts = source_examples(self.view, "self", count, LENGTH, 0, progress=False)
        self.source, self.heldout = texts[: options.rows], texts[options.rows :]
        self.curvature = retain.fit_curvature(self.model, self.source, progress=False)
        self.sites = list(lora_sites(self.model))
        self.begin = [(s.a.detach().clone(), s.b.detach().clone()) for s in self.sites]
        self.reference = Reference(self.model, self.heldout)
        self.train = self._problems("train", options.steps * BATCH)
        self.test = self._problems("test", 64)

    def _problems(self, split: Any, count: int) -> list[Example]:
        return problem_examples(need(self.view.tokenizer), word_problems(split, count, 0, 30))

    def trained(self, strength: float, mu: float, steps: int | None = None) -> dict[str, Any]:
        """One training from the start; its loss on new problems and its KL."""
        planned = self.options.steps
        with torch.no_grad():
            for site, (a, b) in zip(self.sites, self.begin, strict=True):
                site.a.copy_(a)
                site.b.copy_(b)
        held = retain.Retention(self.model, self.curvature, strength, rows=self.train)
        rows = self.gradients(self.source) if mu else None
        weights = [w for s in self.sites for w in (s.a, s.b)]
        optimizer = torch.optim.AdamW(weights, lr=self.options.rate)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / planned)
        for step in range(planned if steps is None else steps):
            self.model.train()
            loss_of(self.view, self.train[step * BATCH : (step + 1) * BATCH]).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            if rows is not None:
                moved = torch.cat([s.b.detach().flatten() for s in self.sites])
                pull = mu * (rows @ moved) @ rows
                for site, part in zip(self.sites, self._split(pull), strict=True):
                    assert site.b.grad is not None
                    site.b.grad += part.view_as(site.b)
            held.step(optimizer)
            falling.step()
            optimizer.zero_grad()
        self.model.eval()
        with torch.no_grad():
            loss = float(loss_of(self.view, self.test)) if steps is None else None
        found = {
            "strength": strength, "mu": mu, "loss": loss,
            "kl": self.reference.measure(self.model).kl,
            "predicted": self.curvature.quadratic(self.model),
        }  # fmt: skip
        held.recipe.release()
        return found

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = flat.split([s.b.numel() for s in self.sites])
        return parts

    def parts(self, strength: float) -> dict[str, Any]:
        """The first step's quadratic, by what is summed before it is squared."""
        found: dict[str, Any] = self.trained(strength, 0.0, steps=1)
        for name, rows in (("source", self.source), ("heldout", self.heldout)):
            moved = [s.b.detach().clone() for s in self.sites]
            sums: dict[str, float] = {}
            tokens = 0
            for inner, count in self._derivatives(rows, moved):
                tokens += count
                for key, groups in GROUPS.items():
                    square = _squares(inner, groups, key.endswith("tokens"))
                    sums[key] = sums.get(key, 0.0) + square
            found[name] = {key: 0.5 * value / tokens for key, value in sums.items()}
        return found

    def _derivatives(
        self, rows: Sequence[Example], moved: Sequence[Tensor]
    ) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Of log p(y) along ``moved``, by layer: [rows, tokens] each, and the predicted tokens."""
        for read, written, count in self._passes(rows):
            yield (
                {
                    s.name: (written[s.name] * (_lowered(s, read) @ b.T)).sum(-1)
                    for s, b in zip(self.sites, moved, strict=True)
                },
                count,
            )

    def gradients(self, rows: Sequence[Example]) -> Tensor:
        """In B at B = 0, of whole rows, [rows x draws, all of B]; their Gram is a mean a token."""
        found, tokens = [], 0
        for read, written, count in self._passes(rows):
            tokens += count
            of = [torch.einsum("bto,btr->bor", written[s.name], _lowered(s, read)).flatten(1)
                  for s in self.sites]  # fmt: skip
            found.append(torch.cat(of, 1))
        return torch.cat(found).div_(tokens**0.5)

    def _passes(
        self, rows: Sequence[Example]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], int]]:
        """What each layer reads, and the gradient in what it writes, of the base model."""
        random = torch.Generator(device=self.options.device).manual_seed(1)
        self.model.eval()
        with self._caught() as (read, written), self._without():
            for batch in self.view.batches(rows, BATCH):
                for _ in range(self.options.draws):
                    logp = self.view.logits(batch).float().log_softmax(-1)
                    drawn = torch.multinomial(logp.detach().exp(), 1, generator=random)
                    logp.gather(1, drawn).sum().backward()
                    grads = {n: out.grad for n, out in written.items() if out.grad is not None}
                    yield read, grads, len(drawn)
        self.model.zero_grad()

    @contextmanager
    def _without(self) -> Iterator[None]:
        kept = [s.b.detach().clone() for s in self.sites]
        with torch.no_grad():
            for site in self.sites:
                site.b.zero_()
        yield
        with torch.no_grad():
            for site, b in zip(self.sites, kept, strict=True):
                site.b.copy_(b)

    @contextmanager
    def _caught(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        read: dict[str, Tensor] = {}
        written: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., Tensor]:
            def caught(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                found = out if out.requires_grad else out.detach().requires_grad_()
                found.retain_grad()
                read[name], written[name] = args[0].detach(), found
                return found

            return caught

        layers = [(s, s.layer.get_base_layer()) for s in self.sites]
        handles = [layer.register_forward_hook(hook(s.name)) for s, layer in layers]
        yield read, written
        for handle in handles:
            handle.remove()


def _lowered(site: LoraSite, read: dict[str, Tensor]) -> Tensor:
    """``s A x``, [rows, tokens, r]."""
    lowered: Tensor = site.scaling * read[site.name] @ site.a.detach().T
    return lowered


GROUPS: dict[str, Callable[[str], str]] = {
    "each layer, single tokens": lambda name: name,
    "each layer, whole rows": lambda name: name,
    "layers of a kind, whole rows": lambda name: name.rpartition(".")[2],
    "a decoder layer, whole rows": lambda name: re.findall(r"\d+", name)[0],
    "all layers, single tokens": lambda name: "",
    "all layers, whole rows": lambda name: "",
}


def _squares(inner: dict[str, Tensor], group: Callable[[str], str], tokens: bool) -> float:
    sums: dict[str, Tensor] = {}
    for name, value in inner.items():
        part = value if tokens else value.sum(1)
        sums[group(name)] = sums[group(name)] + part if group(name) in sums else part
    return float(sum((total**2).sum() for total in sums.values()))


if __name__ == "__main__":
    main()
