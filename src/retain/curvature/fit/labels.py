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

The outputs of a regression are means of normal distributions of variance 1 (see
`retain.models.heads`): the gradient of ``log N(y; z, 1)`` is ``y - z``, whose second moment over y
is the identity. One backward pass for each output adds up to it (``exact``); ``mc`` draws y - z as
random signs, which have the same second moment and less noise than a normal number's (over T when
``tempered``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from retain.curvature.fit.settings import FitSettings
from retain.data.batches import Batch
from retain.errors import CurvatureError, SourceError

__all__ = ["EXACT_LIMIT", "cotangents"]

EXACT_LIMIT = 4096
"""Most backward passes that one batch may ask of the exact Fisher."""

Cotangents = Iterator[tuple[Tensor, float, bool]]


def cotangents(
    logits: Tensor, batch: Batch, settings: FitSettings, regression: bool = False
) -> Cotangents:
    """Gradients to send back from the logits, each with its weight in the expectation.

    Args:
        logits: [predictions, classes], one sequence's predictions after the other's; or the outputs
            of a regression.
        batch: its rows' numbers in the source, with the seed, fix a sequence's draws, whatever
            batch the sequence is in; its targets are the labels of ``empirical`` and ``reversed``.
        settings: whose labels, how many draws, the seed and the temperature.
        regression: see the module.

    Yields:
        (cotangent [predictions, classes], weight, whether it is the last). The last one may lie in
        the memory of the logits, which a model's backward pass does not read, and in their
        precision.

    Raises:
        CurvatureError: ``exact`` would need more than `EXACT_LIMIT` passes, or labels of a
            regression are asked for.
        SourceError: ``empirical`` or ``reversed`` where a row has no label, or one of no class.
    """
    fisher = settings.fisher
    heat = settings.temperature if fisher == "tempered" else 1.0
    if regression:
        yield from _of_values(logits.detach(), batch, settings, heat)
        return
    if fisher in ("mc", "tempered"):
        yield from _of_draws(logits.detach(), batch, settings, heat)
        return
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    p = _softmax_(wide.neg_() if fisher == "reversed" else wide)
    if fisher == "exact":
        yield from _every_label(p, batch.lengths)
    else:
        _check_labels(batch.targets, p.shape[-1], fisher)
        yield _minus_(p, batch.targets), 1.0, True


def _of_draws(logits: Tensor, batch: Batch, settings: FitSettings, heat: float) -> Cotangents:
    """``(e_y - p) / T`` of drawn labels, a few predictions at a time.

    Of a decoder the logits are the largest tensor there is, and no second one of their size is made
    but for the draws before the last.
    """
    for sample in range(settings.samples):
        last = sample == settings.samples - 1
        way = logits if last else torch.empty_like(logits)
        pieces = zip(logits.split(batch.lengths), way.split(batch.lengths), batch.rows, strict=True)
        for own, into, row in pieces:
            levels, step = _levels(len(own), f"{settings.seed}:{row}:{sample}"), _step(own)
            for i in range(0, len(own), step):
                p = _probabilities(own[i : i + step], heat)
                found = _minus_(p, _draw(p, levels[i : i + step]))
                into[i : i + step] = found if heat == 1.0 else found.div_(heat)
        yield way, 1.0 / settings.samples, last


def _every_label(p: Tensor, lengths: list[int]) -> Cotangents:
    """``E_y[(e_y - p)(e_y - p)^T]``: the pass of class y carries the root of p_y."""
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
            part = -p[here] * p[here, y : y + 1].sqrt()
            part[:, y] += p[here, y].sqrt()
            cotangent = torch.zeros_like(p)
            cotangent[here] = part
            yield cotangent, 1.0, t == longest - 1 and y == classes - 1


def _of_values(outputs: Tensor, batch: Batch, settings: FitSettings, heat: float) -> Cotangents:
    """The same for a regression."""
    fisher, samples, width = settings.fisher, settings.samples, outputs.shape[-1]
    if fisher not in ("mc", "tempered", "exact"):
        raise CurvatureError(
            "a regression has no labels of this kind",
            got=f"fisher={fisher!r}",
            allowed="mc, exact, tempered",
            fix="fisher='mc'",
        )
    for k in range(width if fisher == "exact" else 0):
        way = torch.zeros_like(outputs)
        way[:, k] = 1.0
        yield way, 1.0, k == width - 1
    for sample in range(0 if fisher == "exact" else samples):
        drawn = [
            torch.randint(2, (n, width), generator=_random(f"{settings.seed}:{row}:{sample}"))
            for n, row in zip(batch.lengths, batch.rows, strict=True)
        ]
        way = (2 * torch.cat(drawn) - 1).to(outputs) / heat
        yield way, 1.0 / samples, sample == samples - 1


def _check_labels(targets: Tensor, classes: int, fisher: str) -> None:
    odd = (targets < 0) | (targets >= classes)
    if bool(odd.any()):
        first = int(targets[odd][0])
        raise SourceError(
            f"fisher={fisher!r} reads the labels of the source",
            got="a row without a label" if first < 0 else f"label {first}",
            allowed=f"0 to {classes - 1}",
            fix="give labelled rows, or fisher='mc'",
        )


_ROWS = 1 << 20
"""Probabilities that are worked on at a time, so that they stay in the processor's cache."""


def _step(p: Tensor) -> int:
    return max(1, _ROWS // p.shape[-1])


def _softmax_(logits: Tensor) -> Tensor:
    """The softmax of each row, in its own memory."""
    for part in logits.split(_step(logits)):
        part.copy_(part.softmax(-1))
    return logits


def _probabilities(logits: Tensor, heat: float) -> Tensor:
    """The softmax of each row over T, in float32 at least, in memory of its own."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if heat == 1.0 else wide / heat).softmax(-1)


def _minus_(p: Tensor, labels: Tensor) -> Tensor:
    """``e_y - p`` for each prediction, in the memory of p."""
    p.neg_()
    p[torch.arange(len(p), device=p.device), labels.to(p.device)] += 1.0
    return p


def _random(key: str) -> torch.Generator:
    """The draws of a name."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(number)


def _levels(count: int, key: str) -> Tensor:
    """Where each of the draws of a name falls, from 0 to 1, [count, 1]."""
    return torch.rand(count, 1, dtype=torch.float64, generator=_random(key))


def _draw(p: Tensor, levels: Tensor) -> Tensor:
    """One label for each row of p, by the inverse of the distribution function at its level."""
    steps = p.cumsum(-1)
    level = levels.to(p.device, p.dtype) * steps[:, -1:]
    return torch.searchsorted(steps, level).clamp(max=p.shape[-1] - 1)[:, 0]
