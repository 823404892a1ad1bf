"""What a curvature will cost, by arithmetic on the shapes of the layers. Nothing is measured.

All in weight space, from a fresh adapter, in multiply-adds and in numbers of float32. A LoRA
layer has a weight [d_out, d_in]. What a structure keeps of it is said by its `Structure`: factors
of d_in (one for all layers that read the same tensor, as q, k and v do, or one each) and of d_out,
d_out d_in entries, single numbers. A factor of size d has d^2 numbers or, with a factor rank k and
2k <= d, is a sketch of ``k d + d + 1``: k directions, a diagonal and a bound. Linked neighbours i
and j keep d_out_i d_out_j and, unless they share their input, d_in_i d_in_j. A pooled layer, which
sees one position, has no such link.

**While fitting** the same sums are held, but a sketch is l columns, with its diagonal in float64:
``l d + 2 d``, where l is 2k or, below k = 16, k + 16 (see `ranks.sketch_columns`). ekfac holds
kfac's sums first, then eigenvectors in their place and the eigenvalues. Batches, counters, and what
a last step copies come on top.

**Passes**: work of the fit, in forward and backward passes over the source. With L the
multiply-adds a token in all linear layers (the head among them), a pass is ``2 L``: the base is
frozen, so backward costs what forward does. A structure without a backward pass takes ``L - head``.
Attention's products and LoRA's own are left out. On top, a token and a label draw, with T tokens a
sequence: d^2 a factor, or ``2 l d`` a sketch (two products with its columns; what it decomposes
comes once a fit and is left out); entries and links as many; each layer's true trace, d_out d_in
or, where that is less or the Gram matrices over positions are needed in any case,
``T (d_in + d_out)`` (that of an input once); and `Structure.extra_work`.

**A training step** of n tokens is ``n (2 L + 3 r (d_in + d_out))``, summed over LoRA layers. The
force comes once a step, whatever n: ``r d^2`` a factor, ``2 r k d + r d`` a sketch, then
``2 r^2 (d_in + d_out)``; with entries ``(3 r + 1) d_out d_in``, for the update is built, and each
factor twice; a link ``2 r (d_out_i d_out_j + d_in_i d_in_j)`` and ``2 r^2`` the sum of its sizes.

These products are thin (r columns), so memory is more likely to bound them: `Cost.step_reads` is
the bytes of the factors as often as the force reads them. A shared factor is read once for all
its layers (beside entries, for each of them); a sketch's directions, factors beside entries and
links are read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from retain.curvature.blocks.ranks import SEQUENCE, sketch_columns, sketch_rank
from retain.curvature.blocks.registry import names, structure_of
from retain.errors import ConfigError
from retain.types import FactorRank

if TYPE_CHECKING:
    from retain.curvature.blocks.structure import Structure
    from retain.models.skeleton import Outline

__all__ = ["SEQUENCE", "Cost", "cost", "kept_bytes"]

_FLOAT = 4  # bytes

Layers = Mapping[str, tuple[int, int]]
Shared = Mapping[str, str]
Side = Callable[[int], int]  # what a factor of size d counts


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
        structure: its name.
        model: its layers and size.
        rank: of the adapter, r.
        factor_rank: of the sketches, k, as for `fit_curvature`.
        tokens: of a training step, n.

    Raises:
        ConfigError: an unknown structure, or a factor rank below 1.
    """
    if isinstance(factor_rank, int) and not structure_of(structure).sketches:
        return None
    stored, fitting = (
        kept_bytes(
            structure, model.layers, model.shared, factor_rank, pooled=model.pooled, fitting=each
        )
        for each in (False, True)
    )
    kept = _known(structure, factor_rank)
    fit = _fit_work(kept, model, factor_rank)
    force, reads = _force(kept, model, factor_rank, rank)
    own = sum(3 * rank * (d_out + d_in) for d_out, d_in in model.layers.values())
    step = tokens * (2 * model.linear + own)
    passes = fit / (2 * model.linear)
    return Cost(stored, fitting, fit, passes, force, force / step, _FLOAT * reads)


def kept_bytes(
    structure: str,
    layers: Layers,
    shared: Shared,
    factor_rank: FactorRank = "auto",
    *,
    pooled: Collection[str] = (),
    fitting: bool = False,
) -> int:
    """Bytes of a fitted curvature in float32, or of the sums that are held while fitting.

    Args:
        structure: its name.
        layers: layer -> (d_out, d_in), in the order of the modules.
        shared: layer -> the first layer with the same input.
        factor_rank: k, as for `fit_curvature`.
        pooled: layers that see one position of a sequence.
        fitting: which of the two.

    Raises:
        ConfigError: an unknown structure, one that has no sketches with a factor rank, or a
            factor rank below 1.
    """
    kept = _known(structure, factor_rank)

    def sketch(d: int, k: int) -> int:
        return (sketch_columns(d, k) + 2) * d if fitting else k * d + d + 1

    side = _by_size(kept, factor_rank, lambda d: d * d, sketch)
    return _FLOAT * (_sum(kept, layers, shared, pooled, side) + _scalars(kept, layers))


def _fit_work(kept: Structure, model: Outline, factor_rank: FactorRank) -> int:
    """Multiply-adds a source token of the whole fit."""
    side = _by_size(kept, factor_rank, lambda d: d * d, lambda d, k: 2 * sketch_columns(d, k) * d)
    work = _sum(kept, model.layers, model.shared, model.pooled, side)
    work += kept.extra_work(model, lambda d: sketch_rank(d, factor_rank))
    if kept.estimator.backward:
        return kept.estimator.passes * _backward(kept, model) + work
    return kept.estimator.passes * (model.linear - model.head) + work


def _backward(kept: Structure, model: Outline) -> int:
    """A forward and a backward pass with each layer's trace."""
    found, grams = 2 * model.linear, set()
    for name, (d_out, d_in) in model.layers.items():
        by_gram = SEQUENCE * (d_out + d_in) <= d_out * d_in
        found += 0 if by_gram else d_out * d_in
        if by_gram or kept.grams:
            first = model.shared[name]
            found += SEQUENCE * (d_out + (0 if first in grams else d_in))
            grams.add(first)
    return found


def _force(kept: Structure, model: Outline, factor_rank: FactorRank, r: int) -> tuple[int, int]:
    """Multiply-adds of the force and the numbers that it reads, once an optimiser step."""
    size = _by_size(kept, factor_rank, lambda d: d * d, lambda d, k: 2 * k * d + d)
    work, reads = 0, _scalars(kept, model.layers)
    for name, (d_out, d_in) in model.layers.items():
        inputs = size(d_in) * (kept.inputs != "none")
        outputs = size(d_out) * kept.outputs
        if kept.entries:
            work += 2 * r * (inputs + outputs) + (3 * r + 1) * d_out * d_in
            reads += 2 * (inputs + outputs) + d_out * d_in
        else:
            work += r * (inputs + outputs) + 2 * r * r * (d_out + d_in)
            again = kept.inputs == "shared" and model.shared[name] != name
            reads += outputs + (0 if again else inputs)
    for (out_a, in_a), (out_b, in_b), _ in _links(kept, model.layers, model.shared, model.pooled):
        entries = out_a * out_b + in_a * in_b
        work += 2 * r * entries + 2 * r * r * (out_a + in_a + out_b + in_b)
        reads += 2 * entries
    return work, reads


def _known(structure: str, factor_rank: FactorRank) -> Structure:
    kept = structure_of(structure)
    if isinstance(factor_rank, int) and not kept.sketches:
        able = [n for n in names() if structure_of(n).sketches and structure_of(n).factors]
        raise ConfigError(
            "the structure has no sketched factors",
            got=f"{structure} with factor rank {factor_rank}",
            allowed=", ".join(able),
            fix="leave the factor rank out, or choose another structure",
        )
    if isinstance(factor_rank, int) and factor_rank < 1:
        raise ConfigError(
            "the factor rank is too small", got=factor_rank, allowed="1 or more", fix="raise it"
        )
    return kept


def _by_size(
    kept: Structure, factor_rank: FactorRank, whole: Side, sketch: Callable[[int, int], int]
) -> Side:
    """One of two functions of a factor's size, by whether it is sketched."""

    def size(d: int) -> int:
        rank = sketch_rank(d, factor_rank) if kept.sketches else None
        return whole(d) if rank is None else sketch(d, rank)

    return size


def _scalars(kept: Structure, layers: Layers) -> int:
    """Single numbers that a structure keeps."""
    return {"none": 0, "one": 1, "each": len(layers)}[kept.scalars]


def _sum(
    kept: Structure, layers: Layers, shared: Shared, pooled: Collection[str], side: Side
) -> int:
    """Sums what a structure keeps of all layers; its single numbers are left out."""
    total = 0
    for name, (d_out, d_in) in layers.items():
        if kept.inputs == "own" or (kept.inputs == "shared" and shared[name] == name):
            total += side(d_in)
        total += side(d_out) * kept.outputs + d_out * d_in * kept.entries
    for (out_a, in_a), (out_b, in_b), same in _links(kept, layers, shared, pooled):
        total += out_a * out_b + (0 if same else in_a * in_b)
    return total


def _links(
    kept: Structure, layers: Layers, shared: Shared, pooled: Collection[str]
) -> Iterator[tuple[tuple[int, int], tuple[int, int], bool]]:
    """Shapes of neighbours that see the same positions, and whether they share their input."""
    for a, b in pairwise(layers) if kept.links else ():
        if (a in pooled) == (b in pooled):
            yield layers[a], layers[b], shared[a] == shared[b]
