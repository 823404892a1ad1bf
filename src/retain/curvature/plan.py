"""What a curvature will cost, by arithmetic on the shapes of the layers. Nothing is measured.

All in weight space, from a fresh adapter, in multiply-adds and in numbers of float32. A LoRA
layer has a weight [d_out, d_in]. Layers that read the same tensor (q, k and v; gate and up) share
the factor of their input. A factor of size d has d^2 numbers or, with a factor rank k and
2k <= d, is a sketch of ``k d + d + 1``: k directions, a diagonal and a bound.

**Stored**

- identity: 1 number for all layers.
- diagonal: d_out d_in a layer.
- kfac: a factor of d_in for each distinct input, one of d_out a layer.
- shampoo: a factor of d_in and one of d_out a layer; nothing is shared.
- ekfac: as kfac (eigenvectors), and d_out d_in a layer (eigenvalues).
- activation: a factor of d_in for each distinct input, 1 number a layer.
- tridiagonal: as kfac and, for each layer i and its successor j, d_out_i d_out_j and, unless they
  share their input, d_in_i d_in_j. A pooled layer, which sees one position, has no such link.

ekfac and tridiagonal have no sketches; identity and diagonal have no factors.

**While fitting** the same sums are held, but a sketch is a buffer of 2k rows, with its diagonal
and bound in float64: ``2 k d + 2 d + 2``. ekfac holds kfac's sums first, then eigenvectors in
their place and the eigenvalues. Batches, counters, and what a last step copies come on top.

**Passes**: work of the fit, in forward and backward passes over the source. With L the
multiply-adds a token in all linear layers (the head among them), a pass is ``2 L``: the base is
frozen, so backward costs what forward does. Attention's products and LoRA's own are left out.
On top, a token and a label draw, with T tokens a sequence:

- a factor: d^2. A sketch: ``6 k d + 36 k^2``; each k tokens ask for the Gram matrix of 2k rows
  (``4 k^2 d``), its eigenvectors (``4.5 (2k)^3``) and k new rows (``2 k^2 d``);
- the diagonal: d_out d_in. A link's products: its entries;
- each layer's true trace, at each backward pass: d_out d_in or, where that is less,
  ``T (d_in + d_out)`` (Gram matrices over positions, that of an input once for all its readers);
- shampoo: those Gram matrices in any case, and ``T (d_in + d_out)`` for their products; a sketch
  needs their roots, ``5.5 T^2``;
- ekfac: between two passes an eigendecomposition of each factor, ``4.5 d^3`` (Golub and Van Loan
  2013, section 8.3), spread over the source's tokens; in the second pass each factor once more,
  which turns inputs and gradients, and the diagonal;
- activation: ``L - head``, for it needs neither a backward pass nor the head; two forward
  passes of an eighth of the rows (``L / 4``) for its scale; its factors.

**A training step** of n tokens is ``n (2 L + 3 r (d_in + d_out))``, summed over LoRA layers. The
force comes once a step, whatever n:

- a factor: ``r d^2``; a sketch: ``2 r k d + r d``; then ``2 r^2 (d_in + d_out)``;
- identity: ``2 r^2 (d_in + d_out)``;
- diagonal: ``(3 r + 1) d_out d_in``, for the update is built;
- ekfac: each factor twice, and what diagonal takes;
- a link: ``2 r (d_out_i d_out_j + d_in_i d_in_j)`` and ``2 r^2`` (the sum of the four sizes).

These products are thin (r columns), so memory is more likely to bound them: `Cost.step_reads` is
the bytes of the factors as often as the force reads them. A shared factor is read once for all
its layers (in ekfac, for each of them); a sketch's directions, ekfac's eigenvectors and links are
read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from retain.curvature.fit.settings import sketch_rank
from retain.errors import ConfigError, unknown
from retain.types import FactorRank

if TYPE_CHECKING:
    from retain.models.skeleton import Outline

__all__ = ["PLANNED", "SEQUENCE", "Cost", "cost", "factor_bytes", "fitting_bytes"]

SEQUENCE = 128
"""Tokens of a source sequence, T; ``retain fit`` cuts texts to so many by default."""

_SOURCE = 128 * SEQUENCE  # tokens that retain fit reads by default at most
_FLOAT = 4  # bytes

Layers = Mapping[str, tuple[int, int]]
Shared = Mapping[str, str]
Side = Callable[[int], int]  # what a factor of size d counts


class _Parts(NamedTuple):
    """What a structure keeps of a layer."""

    inputs: Literal["shared", "own", "none"] = "none"
    outputs: bool = False
    entries: bool = False
    links: bool = False
    sketch: bool = True


_PARTS = {
    "identity": _Parts(),
    "diagonal": _Parts(entries=True),
    "kfac": _Parts("shared", outputs=True),
    "shampoo": _Parts("own", outputs=True),
    "ekfac": _Parts("shared", outputs=True, entries=True, sketch=False),
    "activation": _Parts("shared"),
    "tridiagonal": _Parts("shared", outputs=True, links=True, sketch=False),
}

PLANNED: tuple[str, ...] = tuple(_PARTS)
"""The structures that a plan knows."""


@dataclass(frozen=True)
class Cost:
    """What one structure costs; the module's text has each formula.

    Attributes:
        stored_bytes: of the fitted curvature.
        fitting_bytes: held while fitting.
        fit_work: multiply-adds a source token of the whole fit.
        passes: the same, in forward and backward passes of the model.
        step_work: multiply-adds of the force, once an optimiser step.
        step_overhead: the same over the multiply-adds of a training step.
        step_reads: bytes that the force reads in a step.
    """

    stored_bytes: int
    fitting_bytes: int
    fit_work: int
    passes: float
    step_work: int
    step_overhead: float
    step_reads: int


def cost(
    structure: str,
    model: Outline,
    *,
    rank: int = 16,
    factor_rank: FactorRank = "auto",
    tokens: int = 512,
) -> Cost | None:
    """What a structure costs on a model; None for one that has no sketches where k is given.

    Args:
        structure: one of `PLANNED`.
        model: its layers and size.
        rank: of the adapter, r.
        factor_rank: of the sketches, k, as for `fit_curvature`.
        tokens: of a training step, n.

    Raises:
        ConfigError: an unknown structure, or a factor rank below 1.
    """
    if isinstance(factor_rank, int) and structure in _PARTS and not _PARTS[structure].sketch:
        return None
    known = (structure, model.layers, model.shared, factor_rank)
    stored, fitting = (f(*known, pooled=model.pooled) for f in (factor_bytes, fitting_bytes))
    fit = _fit_work(structure, model, factor_rank)
    force, reads = _force(structure, model, factor_rank, rank)
    own = sum(3 * rank * (d_out + d_in) for d_out, d_in in model.layers.values())
    step = tokens * (2 * model.linear + own)
    passes = fit / (2 * model.linear)
    return Cost(stored, fitting, fit, passes, force, force / step, _FLOAT * reads)


def factor_bytes(
    structure: str,
    layers: Layers,
    shared: Shared,
    factor_rank: FactorRank = "auto",
    *,
    pooled: Collection[str] = (),
) -> int:
    """Bytes of a fitted curvature in float32.

    Args:
        structure: one of `PLANNED`.
        layers: layer -> (d_out, d_in), in the order of the modules.
        shared: layer -> the first layer with the same input.
        factor_rank: k, as for `fit_curvature`.
        pooled: layers that see one position of a sequence.

    Raises:
        ConfigError: an unknown structure, one that has no sketches with a factor rank, or a
            factor rank below 1.
    """
    parts = _parts(structure, factor_rank)
    side = _by_size(structure, factor_rank, lambda d: d * d, lambda d, k: k * d + d + 1)
    return _FLOAT * (_sum(parts, layers, shared, pooled, side) + _scales(structure, layers))


def fitting_bytes(
    structure: str,
    layers: Layers,
    shared: Shared,
    factor_rank: FactorRank = "auto",
    *,
    pooled: Collection[str] = (),
) -> int:
    """Bytes of the sums that are held while fitting; see `factor_bytes`."""
    parts = _parts(structure, factor_rank)
    side = _by_size(structure, factor_rank, lambda d: d * d, lambda d, k: 2 * k * d + 2 * d + 2)
    return _FLOAT * (_sum(parts, layers, shared, pooled, side) + _scales(structure, layers))


def _fit_work(structure: str, model: Outline, factor_rank: FactorRank) -> int:
    """Multiply-adds a source token of the whole fit."""
    layers, shared, t = model.layers, model.shared, SEQUENCE
    side = _by_size(structure, factor_rank, lambda d: d * d, lambda d, k: 6 * k * d + 36 * k * k)
    work = _sum(_parts(structure, factor_rank), layers, shared, model.pooled, side)
    if structure == "activation":
        return model.linear - model.head + model.linear // 4 + work
    backward, grams = 2 * model.linear, set()
    for name, (d_out, d_in) in layers.items():
        by_gram = t * (d_out + d_in) <= d_out * d_in
        backward += 0 if by_gram else d_out * d_in
        if by_gram or structure == "shampoo":
            backward += t * d_out + (0 if shared[name] in grams else t * d_in)
            grams.add(shared[name])
    if structure == "shampoo":
        root = _by_size(
            structure, factor_rank, lambda d: t * d, lambda d, _: t * d + 11 * t * t // 2
        )
        work += sum(root(d_out) + root(d_in) for d_out, d_in in layers.values())
    if structure == "ekfac":
        kfac = _PARTS["kfac"]
        work += _sum(kfac, layers, shared, (), lambda d: d * d)
        work += _sum(kfac, layers, shared, (), lambda d: 9 * d**3) // (2 * _SOURCE)
        backward *= 2
    return backward + work


def _force(structure: str, model: Outline, factor_rank: FactorRank, r: int) -> tuple[int, int]:
    """Multiply-adds of the force and the numbers that it reads, once an optimiser step."""
    parts, layers = _parts(structure, factor_rank), model.layers
    size = _by_size(structure, factor_rank, lambda d: d * d, lambda d, k: 2 * k * d + d)
    work, reads = 0, _scales(structure, layers)
    for name, (d_out, d_in) in layers.items():
        inputs = size(d_in) * (parts.inputs != "none")
        outputs = size(d_out) * parts.outputs
        if parts.entries:
            work += 2 * r * (inputs + outputs) + (3 * r + 1) * d_out * d_in
            reads += 2 * (inputs + outputs) + d_out * d_in
        else:
            work += r * (inputs + outputs) + 2 * r * r * (d_out + d_in)
            again = parts.inputs == "shared" and model.shared[name] != name
            reads += outputs + (0 if again else inputs)
    for a, b in _links(parts, layers, model.pooled):
        (out_a, in_a), (out_b, in_b) = layers[a], layers[b]
        entries = out_a * out_b + in_a * in_b
        work += 2 * r * entries + 2 * r * r * (out_a + in_a + out_b + in_b)
        reads += 2 * entries
    return work, reads


def _parts(structure: str, factor_rank: FactorRank) -> _Parts:
    if structure not in _PARTS:
        raise unknown("structure", structure, _PARTS)
    parts = _PARTS[structure]
    if isinstance(factor_rank, int) and not parts.sketch:
        raise ConfigError(
            "the structure has no sketched factors",
            got=f"{structure} with factor rank {factor_rank}",
            allowed=", ".join(n for n, p in _PARTS.items() if p.sketch and p.inputs != "none"),
            fix="leave the factor rank out, or choose another structure",
        )
    if isinstance(factor_rank, int) and factor_rank < 1:
        raise ConfigError(
            "the factor rank is too small", got=factor_rank, allowed="1 or more", fix="raise it"
        )
    return parts


def _by_size(
    structure: str, factor_rank: FactorRank, whole: Side, sketch: Callable[[int, int], int]
) -> Side:
    """One of two functions of a factor's size, by whether it is sketched."""

    def size(d: int) -> int:
        rank = sketch_rank(d, factor_rank) if _PARTS[structure].sketch else None
        return whole(d) if rank is None else sketch(d, rank)

    return size


def _scales(structure: str, layers: Layers) -> int:
    """Single numbers that a structure keeps."""
    return {"identity": 1, "activation": len(layers)}.get(structure, 0)


def _sum(parts: _Parts, layers: Layers, shared: Shared, pooled: Collection[str], side: Side) -> int:
    """Sums what a structure keeps of all layers; its single numbers are left out."""
    total = 0
    for name, (d_out, d_in) in layers.items():
        if parts.inputs == "own" or (parts.inputs == "shared" and shared[name] == name):
            total += side(d_in)
        total += side(d_out) * parts.outputs + d_out * d_in * parts.entries
    for a, b in _links(parts, layers, pooled):
        (out_a, in_a), (out_b, in_b) = layers[a], layers[b]
        total += out_a * out_b + (in_a * in_b if shared[a] != shared[b] else 0)
    return total


def _links(parts: _Parts, layers: Layers, pooled: Collection[str]) -> Iterator[tuple[str, str]]:
    """Neighbours that see the same positions."""
    for a, b in pairwise(layers) if parts.links else ():
        if (a in pooled) == (b in pooled):
            yield a, b
