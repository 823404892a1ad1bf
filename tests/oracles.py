"""Brute-force twins of the library's curvatures.

Nothing here is fast or streamed. Each sequence is run alone, without padding, and for each of
its predictions t and each class y one call of `torch.autograd.grad` gives the gradient of
``log p_t(y)`` in the weights themselves: W (the frozen weight, which asks for a gradient for
the while), A and B. From these single-token gradients all the Fishers are made as dense
matrices, ``F = (1/N) sum weight * vec(J) vec(J)^T`` with vec row-major and N predictions.

Some Fishers square the gradient of another function of the logits z. Its cotangent k in z sums
to zero, so its gradient is ``sum_c k_c dz_t(c) = sum_c k_c dlog p_t(c)``: the same single-token
gradients do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retain.curvature.fit.labels import _draw

__all__ = ["FACTORS", "Oracle", "calibrate", "kfac", "shampoo"]


@dataclass
class _Sequence:
    """One sequence: its logits and probabilities [T, classes], labels [T] and all gradients."""

    row: int
    logits: Tensor
    p: Tensor
    labels: Tensor
    inputs: dict[str, Tensor]
    """layer -> x, [positions, d_in]"""
    in_weights: dict[str, Tensor]
    """layer -> gradients of log p_t(y) in the weight, [T, classes, d_out, d_in]"""
    at_outputs: dict[str, Tensor]
    """layer -> gradients of log p_t(y) at the outputs, [T, classes, positions, d_out]"""


class Oracle:
    """All single-token gradients of a model on some rows.

    Args:
        model: a tiny PEFT model in evaluation mode.
        rows: of ``input_ids``; a causal model predicts each next token, a classifier ``label``.
        causal: which of the two the model is.
    """

    def __init__(self, model: nn.Module, rows: Sequence[dict[str, Any]], *, causal: bool) -> None:
        self.names: dict[str, list[str]] = {"weight": [], "adapter": []}
        modules: dict[str, nn.Module] = {}
        parameters: dict[str, nn.Parameter] = {}
        for path, module in model.named_modules():
            if not (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
                continue
            name = path.removeprefix("base_model.model.")
            a, b = module.lora_A["default"], module.lora_B["default"]
            frozen = module.base_layer.weight
            for space, key, inner, weight in (
                ("weight", name, module, frozen),
                ("adapter", f"{name}.lora_A", a, a.weight),
                ("adapter", f"{name}.lora_B", b, b.weight),
            ):
                self.names[space].append(key)
                modules[key], parameters[key] = inner, weight
        self.shapes = {key: tuple(weight.shape) for key, weight in parameters.items()}
        with _asking(parameters.values()):
            self.sequences = [
                _differentiate(model, number, row, modules, parameters, causal)
                for number, row in enumerate(rows)
            ]
        self.predictions = sum(len(s.p) for s in self.sequences)

    def dense(
        self, space: str, fisher: str, samples: int = 1, seed: int = 0, temperature: float = 2.0
    ) -> dict[str, Tensor]:
        """Block of each weight, [d_out * d_in, d_out * d_in]."""
        blocks = {}
        for name in self.names[space]:
            size = self.shapes[name][0] * self.shapes[name][1]
            block = torch.zeros(size, size, dtype=torch.float64)
            for sequence in self.sequences:
                for weight, terms in _passes(sequence, fisher, samples, seed, temperature):
                    j = _total(sequence.in_weights[name], terms).reshape(-1)
                    block += weight * torch.outer(j, j)
            blocks[name] = block / self.predictions
        return blocks

    def traces(self, space: str) -> list[tuple[float, int]]:
        """Exact Fisher's (trace summed over its predictions, predictions) of each sequence."""
        found = []
        for sequence in self.sequences:
            total = 0.0
            for name in self.names[space]:
                squares = sequence.in_weights[name].square().sum((2, 3))
                total += float((sequence.p * squares).sum())
            found.append((total, len(sequence.p)))
        return found


def kfac(
    oracle: Oracle,
    space: str,
    fisher: str,
    samples: int = 1,
    seed: int = 0,
    temperature: float = 2.0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """K-FAC before calibration: layer -> (S [d_in, d_in], G [d_out, d_out]).

    ``S`` is the mean of ``x x^T`` over positions, and ``G`` the sum over positions of
    ``E[g g^T]``, over the number of predictions.
    """
    factors = {}
    for name in oracle.names[space]:
        d_out, d_in = oracle.shapes[name]
        s = torch.zeros(d_in, d_in, dtype=torch.float64)
        g = torch.zeros(d_out, d_out, dtype=torch.float64)
        positions = 0
        for sequence in oracle.sequences:
            for x in sequence.inputs[name]:
                s += torch.outer(x, x)
                positions += 1
            for weight, terms in _passes(sequence, fisher, samples, seed, temperature):
                for at_position in _total(sequence.at_outputs[name], terms):
                    g += weight * torch.outer(at_position, at_position)
        factors[name] = (s / positions, g / oracle.predictions)
    return factors


def shampoo(
    oracle: Oracle,
    space: str,
    fisher: str,
    samples: int = 1,
    seed: int = 0,
    temperature: float = 2.0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Shampoo's factors of the weights' own gradients J: layer -> (E[J^T J], E[J J^T])."""
    factors = {}
    for name in oracle.names[space]:
        d_out, d_in = oracle.shapes[name]
        s = torch.zeros(d_in, d_in, dtype=torch.float64)
        g = torch.zeros(d_out, d_out, dtype=torch.float64)
        for sequence in oracle.sequences:
            for weight, terms in _passes(sequence, fisher, samples, seed, temperature):
                j = _total(sequence.in_weights[name], terms)
                s += weight * j.T @ j
                g += weight * j @ j.T
        factors[name] = (s / oracle.predictions, g / oracle.predictions)
    return factors


FACTORS = {"kfac": kfac, "shampoo": shampoo}
"""Each Kronecker-factored structure, and how its factors are found."""


def calibrate(factors: tuple[Tensor, Tensor], dense: Tensor) -> Tensor:
    """``G (x) S`` on row-major vec, scaled so that its trace is that of the dense block."""
    s, g = factors
    trace = s.trace() * g.trace()
    block = torch.kron(g, s)
    return block * (dense.trace() / trace) if trace > 0 else block


def _passes(
    sequence: _Sequence, fisher: str, samples: int, seed: int, temperature: float
) -> Iterator[tuple[float, list[tuple[int, int, float]]]]:
    """The gradients that a Fisher squares: (weight, the (t, c, k) of ``sum k log p_t(c)``)."""
    predictions, classes = sequence.p.shape
    if fisher == "exact":
        for t in range(predictions):
            for y in range(classes):
                yield float(sequence.p[t, y]), [(t, y, 1.0)]
    elif fisher == "empirical":
        yield 1.0, [(t, y, 1.0) for t, y in enumerate(sequence.labels.tolist())]
    elif fisher == "mc":
        for sample in range(samples):
            drawn = _draw(sequence.p, f"{seed}:{sequence.row}:{sample}")
            yield 1.0 / samples, [(t, y, 1.0) for t, y in enumerate(drawn.tolist())]
    elif fisher == "tempered":  # log softmax(z / T)_y, and y drawn from there too
        p = (sequence.logits / temperature).softmax(-1)
        for sample in range(samples):
            drawn = _draw(p, f"{seed}:{sequence.row}:{sample}")
            yield 1.0 / samples, _against(p, drawn.tolist(), 1.0 / temperature)
    elif fisher == "reversed":  # log softmax(-z)_y, at the data's label
        yield 1.0, _against((-sequence.logits).softmax(-1), sequence.labels.tolist(), 1.0)
    else:
        raise ValueError(fisher)


def _against(q: Tensor, labels: list[int], scale: float) -> list[tuple[int, int, float]]:
    """The terms of the cotangent ``scale * (e_y - q)`` at each prediction."""
    terms = []
    for t, y in enumerate(labels):
        for c in range(q.shape[1]):
            terms.append((t, c, scale * ((1.0 if c == y else 0.0) - float(q[t, c]))))
    return terms


def _total(gradients: Tensor, terms: list[tuple[int, int, float]]) -> Tensor:
    """``sum k * gradients[t, c]``."""
    total = torch.zeros_like(gradients[0, 0])
    for t, c, k in terms:
        total += k * gradients[t, c]
    return total


def _differentiate(
    model: nn.Module,
    number: int,
    row: dict[str, Any],
    modules: dict[str, nn.Module],
    parameters: dict[str, nn.Parameter],
    causal: bool,
) -> _Sequence:
    tokens = torch.tensor(row["input_ids"])
    inputs, labels = (tokens[:-1], tokens[1:]) if causal else (tokens, torch.tensor([row["label"]]))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(key: str) -> Any:
        return lambda _module, args, output: seen.__setitem__(key, (args[0], output))

    handles = [m.register_forward_hook(remember(key)) for key, m in modules.items()]
    logits = model(input_ids=inputs[None], attention_mask=torch.ones_like(inputs[None])).logits
    for handle in handles:
        handle.remove()
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = (logits[0] if causal else logits).to(wide)
    log_p = z.log_softmax(-1)

    keys = list(modules)
    wanted = [parameters[k] for k in keys] + [seen[k][1] for k in keys]
    in_weights: dict[str, list[Tensor]] = {k: [] for k in keys}
    at_outputs: dict[str, list[Tensor]] = {k: [] for k in keys}
    for value in log_p.reshape(-1):
        found = torch.autograd.grad(value, wanted, retain_graph=True)
        for k, j, g in zip(keys, found[: len(keys)], found[len(keys) :], strict=True):
            in_weights[k].append(j.double())
            at_outputs[k].append(g.reshape(-1, g.shape[-1]).double())
    shape = tuple(log_p.shape)
    return _Sequence(
        number,
        z.detach().double(),
        log_p.detach().exp().double(),
        labels,
        {k: x.detach().reshape(-1, x.shape[-1]).double() for k, (x, _) in seen.items()},
        {k: torch.stack(j).unflatten(0, shape) for k, j in in_weights.items()},
        {k: torch.stack(g).unflatten(0, shape) for k, g in at_outputs.items()},
    )


@contextmanager
def _asking(parameters: Any) -> Iterator[None]:
    """These parameters ask for a gradient, for the while."""
    before = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in before:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
