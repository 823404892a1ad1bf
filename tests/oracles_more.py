"""Brute-force twins of the structures beyond one Kronecker product a layer; see `oracles`.

All of them are dense matrices on row-major vec, made from the single-token gradients of an
`Oracle` by plain loops.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from oracles import Oracle, _passes, _total, kfac

__all__ = [
    "activation",
    "diagonalises",
    "ekfac",
    "ekfac_given",
    "links",
    "places",
    "shares",
    "tridiagonal",
]


def ekfac(
    oracle: Oracle,
    space: str,
    fisher: str,
    samples: int = 1,
    seed: int = 0,
    temperature: float = 2.0,
) -> dict[str, Tensor]:
    """EK-FAC: the eigenvectors of K-FAC's factors, with the true second moments along them.

    A basis is free to turn within a repeated eigenvalue. Within the null space of S or G it does
    no harm: every J has its rows and columns in their ranges, so all moments are zero there.
    """
    dense = oracle.dense(space, fisher, samples, seed, temperature)
    blocks = {}
    for name, (s, g) in kfac(oracle, space, fisher, samples, seed, temperature).items():
        u_s, u_g = torch.linalg.eigh(s)[1], torch.linalg.eigh(g)[1]
        blocks[name] = ekfac_given(dense[name], u_g, u_s)
    return blocks


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
    size = len(matrix)
    if tuple(basis.shape) != (size, size):
        return False
    gram = basis.T @ basis - torch.eye(size, dtype=torch.float64)
    turned = basis.T @ matrix @ basis
    rest = turned - torch.diag(turned.diagonal())
    scale = float(matrix.abs().max())
    return float(gram.abs().max()) <= tolerance and float(rest.abs().max()) <= tolerance * scale


def activation(oracle: Oracle, model: nn.Module) -> dict[str, Tensor]:
    """``E ||D x||^2`` of each layer, up to one factor for the whole model; names of both spaces.

    Weight space: ``I (x) S``. In adapter space ``D = s (dB A + B dA)``, so A has
    ``s^2 B^T B (x) S`` and B has ``s^2 I (x) A S A^T``. S is a mean over the layer's own
    positions.
    """
    blocks = {}
    for path, module in model.named_modules():
        if not (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
            continue
        name = path.removeprefix("base_model.model.")
        a = module.lora_A["default"].weight.detach().double()
        b = module.lora_B["default"].weight.detach().double()
        scaling = float(module.scaling["default"])
        s = _mean_product(oracle, name, name)
        one = torch.eye(len(b), dtype=torch.float64)
        blocks[name] = torch.kron(one, s)
        blocks[f"{name}.lora_A"] = torch.kron(scaling**2 * b.T @ b, s)
        blocks[f"{name}.lora_B"] = scaling**2 * torch.kron(one, a @ s @ a.T)
    return blocks


def tridiagonal(
    oracle: Oracle,
    space: str,
    fisher: str,
    samples: int = 1,
    seed: int = 0,
    temperature: float = 2.0,
    *,
    shared: bool = True,
) -> tuple[list[str], Tensor]:
    """K-FAC with the cross blocks of neighbours in the chain of layers.

    ``F_ij = w sqrt(c_i c_j) G_ij (x) S_ij``; c calibrates the diagonal blocks, and w makes the
    chain a sum over its links of positive semidefinite pairs.

    Args:
        oracle: whose gradients.
        space: the chain is that of ``oracle.names[space]``.
        fisher: of both the moments G and the calibration.
        samples: draws of each label.
        seed: of the draws.
        temperature: of ``tempered``.
        shared: False leaves w out (w = 1), and the result need not be semidefinite.

    Returns:
        (names in chain order, the matrix of the whole chain)
    """
    names = oracle.names[space]
    place = places(oracle, names)
    dense = oracle.dense(space, fisher, samples, seed, temperature)
    linked = links(oracle, names)
    right, left = shares(linked)
    options = (fisher, samples, seed, temperature)

    scale = []
    for name in names:
        g, s = _gradient_product(oracle, name, name, *options), _mean_product(oracle, name, name)
        found = float(g.trace() * s.trace())
        scale.append(float(dense[name].trace()) / found if found > 0 else 0.0)

    last = place[names[-1]].stop
    chain = torch.zeros(last, last, dtype=torch.float64)
    for i, name in enumerate(names):
        g, s = _gradient_product(oracle, name, name, *options), _mean_product(oracle, name, name)
        chain[place[name], place[name]] = scale[i] * torch.kron(g, s)
    for i, joined in enumerate(linked):
        if not joined:
            continue
        one, two = names[i], names[i + 1]
        g, s = _gradient_product(oracle, one, two, *options), _mean_product(oracle, one, two)
        w = (right[i] * left[i + 1]) ** 0.5 if shared else 1.0
        cross = w * (scale[i] * scale[i + 1]) ** 0.5 * torch.kron(g, s)
        chain[place[one], place[two]] = cross
        chain[place[two], place[one]] = cross.T
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
    found = []
    for one, two in pairwise(names):
        found.append(all(len(s.inputs[one]) == len(s.inputs[two]) for s in oracle.sequences))
    return found


def shares(linked: list[bool]) -> tuple[list[float], list[float]]:
    """How much of each node's own block goes to (its right, its left) pair; the sum is 1.

    A node without a link on a side is the end of its chain: all of it goes to the other side.
    """
    count = len(linked) + 1
    right, left = [], []
    for i in range(count):
        has_left = i > 0 and linked[i - 1]
        has_right = i < count - 1 and linked[i]
        both = has_left and has_right
        right.append(0.5 if both else (1.0 if has_right else 0.0))
        left.append(0.5 if both else (1.0 if has_left else 0.0))
    return right, left


def _mean_product(oracle: Oracle, one: str, two: str) -> Tensor:
    """``S_ij``: mean of ``x_i x_j^T`` over positions."""
    total = torch.zeros(oracle.shapes[one][1], oracle.shapes[two][1], dtype=torch.float64)
    positions = 0
    for sequence in oracle.sequences:
        for x, y in zip(sequence.inputs[one], sequence.inputs[two], strict=True):
            total += torch.outer(x, y)
            positions += 1
    return total / positions


def _gradient_product(
    oracle: Oracle, one: str, two: str, fisher: str, samples: int, seed: int, temperature: float
) -> Tensor:
    """``G_ij``: sum of ``g_i g_j^T`` over passes and positions, over the number of predictions."""
    total = torch.zeros(oracle.shapes[one][0], oracle.shapes[two][0], dtype=torch.float64)
    for sequence in oracle.sequences:
        for weight, terms in _passes(sequence, fisher, samples, seed, temperature):
            g = _total(sequence.at_outputs[one], terms)
            h = _total(sequence.at_outputs[two], terms)
            for at_one, at_two in zip(g, h, strict=True):
                total += weight * torch.outer(at_one, at_two)
    return total / oracle.predictions
