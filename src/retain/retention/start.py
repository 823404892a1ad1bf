"""A discriminant start: LoRA's A reads where a new task's inputs are strong and the old are weak.

A layer's update ``s B A`` reads its input x through A alone. With S_new and S_old the second
moments of x (`retain.retention.moments`) on the new task's rows, and on the source text and all
tasks before, A's rows are the top generalised eigenvectors a of

    S_new a = mu (S_old + epsilon mean(diag S_old) I) a ,

the directions in which a unit of what the update reads of the old text buys most of the new
(Fisher's discriminant; Fukunaga, Introduction to Statistical Pattern Recognition, ch. 10). Each is
scaled to ``a^T S_new a = gain^2 tr S_new / (3 d)``, for a gain of 1 what a row of PEFT's own draw
reads. A then stays as it is. Under Adam the gain is a factor of B's learning rate.

Related: InfLoRA (arXiv 2404.00228) and CorDA's knowledge-preserved mode (arXiv 2406.05223) leave
the old directions alone instead of weighing new against old (``null``: the strongest new directions
outside the span of 99 % of the old energy).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retain.curvature.blocks.linalg import eigh
from retain.errors import check_number, unknown
from retain.models.forward import no_autocast
from retain.models.sites import LoraSite
from retain.retention.moments import Moments, check_reading, inputs_of

__all__ = ["STARTS", "check_start", "discriminants", "set_start"]

STARTS = ("discriminant", "principal", "null", "random")

ROUNDS, SPARE = 12, 8
"""Of the subspace iteration, and the directions that it carries beside those wanted."""

SPANNED = 0.99
"""Of the old inputs' energy, which ``null`` stays out of."""


def check_start(kind: str, gain: float, epsilon: float, answers: float, rows: int) -> None:
    """Checks what a start is told; see `set_start`, and `input_moments` for the last two.

    Raises:
        ConfigError: an unknown kind, or a value out of range.
    """
    if kind not in STARTS:
        raise unknown("start", kind, STARTS)
    check_reading(answers, rows)
    check_number("epsilon is out of range", epsilon, "epsilon=0.01", positive=True)
    check_number("gain is out of range", gain, "gain=1", positive=True)


@no_autocast()
def set_start(
    sites: Sequence[LoraSite],
    new: Moments | None,
    old: Moments | None,
    *,
    kind: str = "discriminant",
    gain: float = 1.0,
    epsilon: float = 0.01,
    seed: int = 0,
    span: slice = slice(None),
) -> None:
    """Writes a start into A; B is left alone.

    Args:
        sites: the layers.
        new: S_new, of the new task's rows; ``random`` wants none.
        old: S_old; None where there is no old text.
        kind: ``discriminant``; ``principal`` (S_new alone), ``null`` (see the module) or
            ``random`` (A stays as PEFT drew it, but for the gain).
        gain: see the module.
        epsilon: what the directions that `old` never uses count as, relative to its mean.
        seed: of the iteration's first guess.
        span: the rows of A that are set.
    """
    found: dict[tuple[str, str], Tensor] = {}  # layers that read one input have one start
    with torch.no_grad():
        for site in sites:
            if kind == "random":
                site.a[span] *= gain
                continue
            assert new is not None
            both = inputs_of(site.name, new, old)
            if both not in found:
                s_new = new.of(site.name)
                s_old = None if old is None or kind == "principal" else old.of(site.name)
                towards = s_new
                if kind == "null" and s_old is not None:
                    towards, s_old = _outside(s_new, s_old), None
                count = site.a[span].shape[0]
                rows = discriminants(towards, s_old, count, epsilon=epsilon, seed=seed)
                found[both] = _scaled(rows, s_new, gain)
            site.a[span] = found[both].to(site.a.dtype)


def discriminants(
    new: Tensor, old: Tensor | None, count: int, *, epsilon: float = 0.01, seed: int = 0
) -> Tensor:
    """The top generalised eigenvectors of (new, old + epsilon mean(diag old) I), as rows.

    By subspace iteration, which finds the span of the top ones long before each of them.

    Args:
        new: [size, size], positive semi-definite.
        old: likewise; None stands for the identity.
        count: of them.
        epsilon: what the weakest directions of `old` count as, relative to its mean.
        seed: of the first guess.

    Returns:
        [count, size], orthonormal in the second matrix, the largest ratio first.
    """
    size = new.shape[0]
    wide = new.to(torch.promote_types(new.dtype, torch.float32))
    root = eye = torch.eye(size).to(wide)
    if old is not None:
        held = old.to(wide)
        root = _root(held, epsilon * held.diagonal().mean() * eye)
    random = torch.Generator().manual_seed(seed)
    basis = torch.randn(size, min(size, count + SPARE), generator=random).to(wide)

    def through(x: Tensor) -> Tensor:
        x = wide @ torch.linalg.solve_triangular(root.T, x, upper=True)
        y: Tensor = torch.linalg.solve_triangular(root, x, upper=False)
        return y

    for _ in range(ROUNDS):
        basis = torch.linalg.qr(through(basis)).Q
    image = basis.T @ through(basis)
    turn = torch.linalg.eigh((image + image.T) / 2).eigenvectors.flip(1)
    rows: Tensor = torch.linalg.solve_triangular(root.T, basis @ turn[:, :count], upper=True).T
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows.mul_(largest.sign())  # an eigenvector has no sign of its own


def _outside(new: Tensor, old: Tensor) -> Tensor:
    """What is left of `new` outside the span of 99 % of the trace of `old`."""
    values, vectors = eigh(old)
    below = values.clamp(min=0).cumsum(0) < (1 - SPANNED) * values.clamp(min=0).sum()
    below[0] = True  # the weakest direction at least
    weak = vectors[:, below]
    left: Tensor = weak @ (weak.T @ new @ weak) @ weak.T
    return left


def _root(held: Tensor, floor: Tensor) -> Tensor:
    """The Cholesky factor, with as much more of the floor as rounding asks for."""
    for power in range(6):
        root, failed = torch.linalg.cholesky_ex(held + 10.0**power * floor)
        if not bool(failed):
            break
    found: Tensor = root
    return found


def _scaled(rows: Tensor, s: Tensor, gain: float) -> Tensor:
    """Rows a with ``a^T S a = gain^2 tr S / (3 d)``."""
    reads = ((rows @ s) * rows).sum(1, keepdim=True)
    floor = reads.max() * 1e-6  # a direction without inputs stays weak
    rows = gain * rows * (s.diagonal().mean() / 3 / reads.clamp(min=floor)).sqrt()
    return rows
