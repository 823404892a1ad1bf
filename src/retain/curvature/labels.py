"""Where the labels of a Fisher come from.

At a prediction with probabilities p the gradient of ``log p_y`` in the logits is ``e_y - p``.

- ``mc``: y is drawn from p. Unbiased for the true Fisher; more samples, less noise.
- ``empirical``: y is the label in the data. Cheap and common, but no Fisher: it keeps the
  gradient's mean, and on data that the model does not fit it can point elsewhere
  (Kunstner et al. 2019, arXiv 1905.12558; van de Ven 2025, arXiv 2502.11756).
- ``exact``: every y, weighted by p_y. One backward pass for each position and class.

A model that is sure of its answers has almost no Fisher: sampled labels are those it predicts, and
their gradients vanish. Two ways out:

- ``tempered``: the Fisher of ``p_T = softmax(z / T)``: y is drawn from p_T, and the gradient is
  that of ``log p_T(y)``, ``(e_y - p_T) / T``. In nats of the tempered model; T = 1 is ``mc``.
- ``reversed``: y is the label in the data and the gradient in the logits is
  ``e_y - softmax(-z)``, the logits' signs being reversed in the probabilities alone (arXiv
  2603.18596). It is large exactly where the model is sure and right. Not in nats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from retain.errors import CurvatureError
from retain.types import Fisher

__all__ = ["EXACT_LIMIT", "cotangents"]

EXACT_LIMIT = 4096
"""Most backward passes that one batch may ask of the exact Fisher."""


def cotangents(
    logits: Tensor,
    lengths: list[int],
    targets: Tensor,
    rows: list[int],
    fisher: Fisher,
    samples: int,
    seed: int,
    temperature: float = 1.0,
) -> Iterator[tuple[Tensor, float]]:
    """Gradients to send back from the logits, each with its weight in the expectation.

    Args:
        logits: [predictions, classes], one sequence's predictions after the other's.
        lengths: predictions of each sequence, in order; they sum to ``predictions``.
        targets: [predictions], the data's labels (for ``empirical`` and ``reversed``).
        rows: number of each sequence in the source; with `seed` it fixes the sequence's draws,
            whatever batch the sequence is in.
        fisher: whose labels.
        samples: draws for each prediction (``mc``, ``tempered``).
        seed: of the draws.
        temperature: T of ``tempered``.

    Yields:
        (cotangent [predictions, classes], weight)

    Raises:
        CurvatureError: ``exact`` would need more than `EXACT_LIMIT` passes.
    """
    logits = logits.detach()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    heat = temperature if fisher == "tempered" else 1.0
    p = (wide / heat if heat != 1 else wide).softmax(-1)
    if fisher == "empirical":
        yield _at(p, targets), 1.0
    elif fisher == "reversed":
        yield _at((-wide).softmax(-1), targets), 1.0
    elif fisher in ("mc", "tempered"):
        for sample in range(samples):
            parts = [
                _draw(part, f"{seed}:{row}:{sample}")
                for part, row in zip(p.split(lengths), rows, strict=True)
            ]
            yield _at(p, torch.cat(parts)) / heat, 1.0 / samples
    else:
        classes, longest = p.shape[-1], max(lengths)
        if classes * longest > EXACT_LIMIT:
            raise CurvatureError(
                "the exact Fisher needs too many backward passes",
                got=f"{classes} classes x {longest} predictions a sequence",
                allowed=f"{EXACT_LIMIT} passes a batch",
                fix="fisher='mc', or a classification head",
            )
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        for t in range(longest):
            here = [int(s) + t for s, n in zip(starts, lengths, strict=True) if t < n]
            for y in range(classes):
                # E_y[(e_y - p)(e_y - p)^T]: the pass of class y carries the root of p_y.
                part = -p[here] * p[here, y : y + 1].sqrt()
                part[:, y] += p[here, y].sqrt()
                cotangent = torch.zeros_like(p)
                cotangent[here] = part
                yield cotangent, 1.0


def _at(p: Tensor, labels: Tensor) -> Tensor:
    """``e_y - p`` for each prediction."""
    out = -p
    out[torch.arange(len(out), device=out.device), labels.to(out.device)] += 1.0
    return out


def _draw(p: Tensor, key: str) -> Tensor:
    """One label for each row of p, by the inverse of the distribution function."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    u = torch.rand(len(p), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    steps = p.cumsum(-1)
    u = u.to(p.device, p.dtype) * steps[:, -1:]
    return torch.searchsorted(steps, u).clamp(max=p.shape[-1] - 1)[:, 0]
