"""Brute-force twins of the library's curvatures.

Nothing here is streamed or shared with the library but the draws of labels. Each sequence is run
alone, without padding, and for each of its predictions t and each class y one call of
`torch.autograd.grad` gives the gradient of ``log p_t(y)`` in the weights themselves: W (the frozen
weight, which asks for a gradient for the while), A and B. From these single-token gradients all
the Fishers are made as dense matrices, ``F = (1/N) sum weight * vec(J) vec(J)^T`` with vec
row-major and N predictions.

Some Fishers square the gradient of another function of the logits z. Its cotangent k in z sums
to zero, so its gradient is ``sum_c k_c dz_t(c) = sum_c k_c dlog p_t(c)``: the same single-token
gradients do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retain.curvature.fit.labels import _draw, _levels


class How(NamedTuple):
    """Whose labels a Fisher has."""

    fisher: str = "mc"
    samples: int = 1
    seed: int = 0
    temperature: float = 2.0


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
        for name, module in _lora_layers(model):
            a, b = module.lora_A["default"], module.lora_B["default"]
            for space, key, inner, weight in (
                ("weight", name, module, module.base_layer.weight),
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

    def gradients(self, name: str, how: How) -> Iterator[tuple[float, Tensor]]:
        """(weight, J) of each pass over each sequence, J [d_out, d_in]."""
        for sequence in self.sequences:
            for weight, k in passes(sequence, how):
                yield weight, total(sequence.in_weights[name], k)

    def dense(self, space: str, how: How) -> dict[str, Tensor]:
        """Block of each weight, [d_out * d_in, d_out * d_in]."""
        blocks = {}
        for name in self.names[space]:
            js = [w**0.5 * j.reshape(-1) for w, j in self.gradients(name, how)]
            blocks[name] = torch.stack(js).T @ torch.stack(js) / self.predictions
        return blocks

    def traces(self, space: str) -> list[tuple[float, int]]:
        """Exact Fisher's (trace summed over its predictions, predictions) of each sequence."""
        found = []
        for s in self.sequences:
            each = [(s.p * s.in_weights[n].square().sum((2, 3))).sum() for n in self.names[space]]
            found.append((float(sum(each)), len(s.p)))
        return found

    def input_product(self, one: str, two: str) -> Tensor:
        """``S_ij``: mean of ``x_i x_j^T`` over positions."""
        products = [s.inputs[one].T @ s.inputs[two] for s in self.sequences]
        return sum(products) / sum(len(s.inputs[one]) for s in self.sequences)

    def gradient_product(self, one: str, two: str, how: How) -> Tensor:
        """``G_ij``: sum of ``g_i g_j^T`` over passes and positions, over the predictions."""
        found = torch.zeros(self.shapes[one][0], self.shapes[two][0], dtype=torch.float64)
        for s in self.sequences:
            for weight, k in passes(s, how):
                found += weight * total(s.at_outputs[one], k).T @ total(s.at_outputs[two], k)
        return found / self.predictions


def kfac(oracle: Oracle, space: str, how: How) -> dict[str, tuple[Tensor, Tensor]]:
    """K-FAC before calibration: layer -> (S [d_in, d_in], G [d_out, d_out])."""
    return {
        name: (oracle.input_product(name, name), oracle.gradient_product(name, name, how))
        for name in oracle.names[space]
    }


def shampoo(oracle: Oracle, space: str, how: How) -> dict[str, tuple[Tensor, Tensor]]:
    """Shampoo's factors of the weights' own gradients J: layer -> (E[J^T J], E[J J^T])."""
    factors = {}
    for name in oracle.names[space]:
        js = [w**0.5 * j for w, j in oracle.gradients(name, how)]
        s, g = sum(j.T @ j for j in js), sum(j @ j.T for j in js)
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


def ekfac(oracle: Oracle, space: str, how: How) -> dict[str, Tensor]:
    """EK-FAC: the eigenvectors of K-FAC's factors, with the true second moments along them.

    A basis is free to turn within a repeated eigenvalue. Within the null space of S or G it does
    no harm: every J has its rows and columns in their ranges, so all moments are zero there.
    """
    dense = oracle.dense(space, how)
    return {
        name: ekfac_given(dense[name], torch.linalg.eigh(g)[1], torch.linalg.eigh(s)[1])
        for name, (s, g) in kfac(oracle, space, how).items()
    }


def ekfac_given(dense: Tensor, u_g: Tensor, u_s: Tensor) -> Tensor:
    """``U diag(U^T F U) U^T`` with ``U = U_G (x) U_S``, in a basis that somebody gives."""
    block = torch.zeros_like(dense)
    for left in u_g.T:
        for right in u_s.T:
            u = torch.outer(left, right).reshape(-1)  # column of kron(U_G, U_S)
            block += (u @ dense @ u) * torch.outer(u, u)
    return block


def diagonalises(basis: Tensor, matrix: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether a basis is orthonormal, complete, and holds eigenvectors of a matrix only."""
    basis, matrix = basis.double(), matrix.double()
    if basis.shape != matrix.shape:
        return False
    gram = basis.T @ basis - torch.eye(len(matrix), dtype=torch.float64)
    turned = basis.T @ matrix @ basis
    rest = (turned - torch.diag(turned.diagonal())).abs().max() / matrix.abs().max()
    return float(gram.abs().max()) <= tolerance and float(rest) <= tolerance


def activation(oracle: Oracle, model: nn.Module) -> dict[str, Tensor]:
    """``E ||D x||^2`` of each layer, up to one factor for the whole model; names of both spaces.

    Weight space: ``I (x) S``. In adapter space ``D = s (dB A + B dA)``, so A has
    ``s^2 B^T B (x) S`` and B has ``s^2 I (x) A S A^T``. S is a mean over the layer's own
    positions.
    """
    blocks = {}
    for name, module in _lora_layers(model):
        a = module.lora_A["default"].weight.detach().double()
        b = module.lora_B["default"].weight.detach().double()
        scaling, s = float(module.scaling["default"]), oracle.input_product(name, name)
        one = torch.eye(len(b), dtype=torch.float64)
        blocks[name] = torch.kron(one, s)
        blocks[f"{name}.lora_A"] = torch.kron(scaling**2 * b.T @ b, s)
        blocks[f"{name}.lora_B"] = scaling**2 * torch.kron(one, a @ s @ a.T)
    return blocks


def tridiagonal(
    oracle: Oracle, space: str, how: How, *, shared: bool = True
) -> tuple[list[str], Tensor]:
    """K-FAC with the cross blocks of neighbours in the chain of layers.

    ``F_ij = w sqrt(c_i c_j) G_ij (x) S_ij``; c calibrates the diagonal blocks, and w makes the
    chain a sum over its links of positive semidefinite pairs. Without `shared`, w = 1, and the
    result need not be semidefinite.

    Returns:
        (names in chain order, the matrix of the whole chain)
    """
    names, dense = oracle.names[space], oracle.dense(space, how)
    place, linked = places(oracle, names), links(oracle, names)
    right, left = shares(linked)
    chain = torch.zeros(place[names[-1]].stop, place[names[-1]].stop, dtype=torch.float64)
    scale = []
    for name, (s, g) in kfac(oracle, space, how).items():
        found = float(g.trace() * s.trace())
        scale.append(float(dense[name].trace()) / found if found > 0 else 0.0)
        chain[place[name], place[name]] = scale[-1] * torch.kron(g, s)
    for i, (one, two) in enumerate(pairwise(names)):
        if linked[i]:
            g, s = oracle.gradient_product(one, two, how), oracle.input_product(one, two)
            w = (right[i] * left[i + 1]) ** 0.5 if shared else 1.0
            cross = w * (scale[i] * scale[i + 1]) ** 0.5 * torch.kron(g, s)
            chain[place[one], place[two]], chain[place[two], place[one]] = cross, cross.T
    return names, chain


def places(oracle: Oracle, names: list[str]) -> dict[str, slice]:
    """Where each weight's row-major vec lies in the chain's."""
    found, start = {}, 0
    for name in names:
        size = oracle.shapes[name][0] * oracle.shapes[name][1]
        found[name] = slice(start, start + size)
        start += size
    return found


def links(oracle: Oracle, names: list[str]) -> list[bool]:
    """For each pair of neighbours, whether both see the same positions in every sequence."""
    return [
        all(len(s.inputs[one]) == len(s.inputs[two]) for s in oracle.sequences)
        for one, two in pairwise(names)
    ]


def shares(linked: list[bool]) -> tuple[list[float], list[float]]:
    """How much of each node's own block goes to (its right, its left) pair; the sum is 1.

    A node without a link on a side is the end of its chain: all of it goes to the other side.
    """
    right, left = [], []
    for has_left, has_right in zip([False, *linked], [*linked, False], strict=True):
        share = 0.5 if has_left and has_right else 1.0
        right.append(share * has_right)
        left.append(share * has_left)
    return right, left


def passes(sequence: _Sequence, how: How) -> Iterator[tuple[float, Tensor]]:
    """The gradients that a Fisher squares: (weight, the k [T, C] of ``sum k log p_t(c)``)."""
    p, one = sequence.p, torch.eye(sequence.p.shape[1], dtype=torch.float64)
    if how.fisher == "exact":
        for t in range(len(p)):
            for y in range(p.shape[1]):
                k = torch.zeros_like(p)
                k[t, y] = 1.0
                yield float(p[t, y]), k
    elif how.fisher == "empirical":
        yield 1.0, one[sequence.labels]
    elif how.fisher == "reversed":  # log softmax(-z)_y, at the data's label
        yield 1.0, one[sequence.labels] - (-sequence.logits).softmax(-1)
    elif how.fisher in ("mc", "tempered"):  # tempered: log softmax(z / T)_y, y drawn from there too
        heat = how.temperature if how.fisher == "tempered" else 1.0
        q = (sequence.logits / heat).softmax(-1) if how.fisher == "tempered" else p
        for sample in range(how.samples):
            levels = _levels(len(q), f"{how.seed}:{sequence.row}:{sample}")
            drawn = one[_draw(q, levels)]
            yield 1.0 / how.samples, (drawn - q) / heat if how.fisher == "tempered" else drawn
    else:
        raise ValueError(how.fisher)


def total(gradients: Tensor, k: Tensor) -> Tensor:
    """``sum k[t, c] * gradients[t, c]``."""
    return torch.tensordot(k, gradients, 2)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield path.removeprefix("base_model.model."), module


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
