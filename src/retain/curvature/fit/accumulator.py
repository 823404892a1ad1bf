"""Runs batches through a model and hands what the hooks see to an estimator."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from retain.curvature.blocks.estimator import Estimator, products
from retain.curvature.blocks.observation import LayerInput, Observation
from retain.curvature.fit.labels import cotangents
from retain.curvature.fit.settings import FitSettings
from retain.data.batches import Batch
from retain.errors import CurvatureError
from retain.models.forward import forward_body, forward_logits, no_autocast, overwrites
from retain.models.heads import are_values

__all__ = ["Accumulator"]


class Accumulator:
    """Passes over a source.

    With a share of 1/n each sequence enters the products of every n-th input's layers, in turn, so
    that the layers' sampling errors are not those of the same few sequences. Traces, to which each
    block is scaled in the end, come from all sequences.

    Args:
        model: in evaluation mode.
        estimator: takes the observations of the layers of its layout.
        settings: of the fit.
        every: n of the share; 1 reads all.
        scales: layer -> [d_out], by which gradients are multiplied (DoRA's rows).
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: Estimator,
        settings: FitSettings,
        *,
        every: int = 1,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.estimator, self.settings = model, estimator, settings
        self.every, self.scales = every, scales or {}
        shared = estimator.layout.shared
        turns = {first: n for n, first in enumerate(dict.fromkeys(shared.values()))}
        self.offset = {n: 0 if estimator.together else turns[shared[n]] for n in shared}
        self.predictions, self.passes = 0, 0
        self.traces: dict[str, Tensor] = {}
        # Over sequences: their number, the sums of their squared traces by turn and as a whole,
        # and the sum of their traces by turn.
        self.share = torch.zeros(3 + every, dtype=torch.float64)
        self.moments: list[tuple[list[float], int]] = []  # a sequence's draws of the trace
        self._batch: Batch | None = None
        self._weight, self._first = 1.0, True
        self._fired: set[str] = set()
        self._readers = {first: [n for n in shared if shared[n] == first] for first in turns}
        self._inputs: dict[str, tuple[LayerInput, set[str]]] = {}
        self._total: Tensor | None = None
        self._turns: Tensor | None = None

    def batch(self, batch: Batch) -> None:
        """Forward once, and backward once for each cotangent.

        Liger's kernels write gradients over what their backward pass reads, without a word to
        autograd, so with them each cotangent has a forward pass of its own.
        """
        self._batch, self._first = batch, True
        if not self.estimator.backward:
            self._fired.clear()
            with torch.no_grad():
                forward_body(self.model, batch)
            self.predictions += sum(batch.lengths)
            return
        draws: list[list[float]] = []
        self._turns = None
        with torch.enable_grad():
            graph = logits = forward_logits(self.model, batch)
            once = overwrites(self.model)
            ways = cotangents(logits, batch, self.settings, are_values(self.model, logits))
            for cotangent, self._weight, last in ways:
                self._fired.clear()
                self._total = None
                graph.backward(cotangent.to(graph.dtype), retain_graph=not last and not once)
                if once and not last:
                    graph = forward_logits(self.model, batch)
                self._first = False
                if self._total is not None:
                    self._check(self._total)
                    draws.append(self._total.tolist())
        if self.passes:
            return
        if self._turns is not None:
            u = self._turns.cpu()
            size = torch.tensor(u.shape[1:], dtype=u.dtype)
            squares = torch.stack([u.square().sum(), u.sum(0).square().sum()])
            self.share += torch.cat([size, squares, u.sum(1)])
        if self.settings.fisher == "exact":  # all labels are one draw without noise
            draws = [[sum(d) for d in zip(*draws, strict=True)]]
        each = zip(*draws, strict=True)
        self.moments += [(list(d), n) for d, n in zip(each, batch.lengths, strict=True)]
        self.predictions += sum(batch.lengths)

    def end_pass(self) -> None:
        """Ends one pass over the source."""
        self.estimator.end_pass(self.passes)
        self.passes += 1

    @no_autocast()
    def receive(self, name: str, x: Tensor, g: Tensor) -> None:
        """Takes one layer's inputs and output gradients (or outputs) from the hooks."""
        batch = self._batch
        assert batch is not None
        if name in self._fired:
            raise CurvatureError(
                "a layer is used twice in one pass",
                got=name,
                allowed="once",
                fix="leave that layer out of the adapter's target_modules",
            )
        self._fired.add(name)
        if name in self.scales and self.estimator.backward:
            g = g * self.scales[name].to(g.dtype)
        source, g = self._input(name, x, batch), _rows(name, g, batch.mask)
        seen = Observation(name, source, g, self._weight, self._first)
        with products(self.settings.products):
            if self.estimator.backward and not self.passes:
                self._trace(seen)
            if self.every > 1:
                chosen = self._chosen(name, batch.rows)
                if not chosen:
                    return
                seen = seen.of(chosen)
            self.estimator.update(seen)

    def _input(self, name: str, x: Tensor, batch: Batch) -> LayerInput:
        """The layer's input, made once for all layers that share it."""
        first, mask = self.estimator.layout.shared[name], batch.mask
        if first not in self._inputs:
            found = _rows(name, x, mask)
            whole = found.shape[:2] == mask.shape
            counts = tuple(mask.sum(1).tolist()) if whole else (1,) * len(found)
            self._inputs[first] = (LayerInput(found, counts), set(self._readers[first]))
        source, waiting = self._inputs[first]
        waiting.discard(name)
        if not waiting:
            del self._inputs[first]
        return source

    def _chosen(self, name: str, rows: list[int]) -> tuple[int, ...]:
        """Places in the batch of the sequences that enter a layer's products."""
        offset = self.offset[name]
        return tuple(i for i, row in enumerate(rows) if (row + offset) % self.every == 0)

    def _trace(self, seen: Observation) -> None:
        traces, name = seen.traces.double(), seen.name
        known = self.traces.get(name)
        now = traces.sum() * seen.weight
        self.traces[name] = 0.0 + now if known is None else known.to(now.device) + now
        if self._total is not None:
            traces = traces.to(self._total.device)
        self._total = traces if self._total is None else self._total + traces
        if self.every > 1:
            if self._turns is None:
                self._turns = traces.new_zeros(self.every, len(traces))
            self._turns[self.offset[name] % self.every] += traces * seen.weight

    def _check(self, total: Tensor) -> None:
        if not bool(total.isfinite().all()):
            raise CurvatureError(
                "the model's gradients are not finite",
                got="NaN or infinity in a backward pass",
                allowed="finite numbers",
                fix="check the model's weights, or load it with dtype='float32'",
            )

    def error(self) -> float:
        """Relative standard error of the trace.

        Over sequences, each with the mean of its draws (the ratio estimator); with a single
        sequence, over its draws, and 0 where its labels are not drawn. NaN where one draw of one
        sequence is all there is, and where there are no gradients.
        """
        if not self.moments:
            return math.nan
        if len(self.moments) == 1:
            if self.settings.fisher == "exact":
                return 0.0
            draws = torch.tensor(self.moments[0][0], dtype=torch.float64)
            if len(draws) < 2:
                return math.nan
            return float(draws.std() / len(draws) ** 0.5 / draws.mean())
        t = torch.tensor([sum(d) / len(d) for d, _ in self.moments], dtype=torch.float64)
        n = torch.tensor([length for _, length in self.moments], dtype=torch.float64)
        spread = ((t - t.sum() / n.sum() * n) ** 2).sum() / (len(t) - 1) * len(t)
        return float(spread.sqrt() / t.sum())

    def share_error(self) -> float:
        """Relative standard error of the whole trace, were it taken from the chosen share alone.

        With n sequences and u_c(i) the trace that the layers of turn c have on sequence i, a share
        of 1/k sees one turn of each sequence. Turns that are dealt at random, equally many of each,
        give the variance ``k n / (n - 1) * sum (u_c(i) - mean over c - mean over i + mean)^2``.
        Layers are alike on one sequence, so this is far less where all turns have layers.
        """
        n, squares, rows = self.share[:3].tolist()
        if self.every == 1 or not n:
            return 0.0
        turns = self.share[3:]
        total, k = float(turns.sum()), self.every
        rest = squares - float(turns.square().sum()) / n - rows / k + total**2 / (n * k)
        return math.sqrt(max(k * rest * n / max(n - 1, 1), 0.0)) / total if total else 0.0

    def without_gradient(self) -> list[str]:
        """Layers that got no gradient at all."""
        return [n for n in self.offset if n not in self.traces or float(self.traces[n]) == 0.0]

    def state(self) -> dict[str, Tensor]:
        """All that has been gathered, for a file."""
        kept = {f"estimator/{k}": t for k, t in self.estimator.state.items()}
        kept |= {f"traces/{k}": t for k, t in self.traces.items()}
        kept["share"] = self.share
        kept["predictions"] = torch.tensor(self.predictions)
        kept["passes"] = torch.tensor(self.passes)
        kept["lengths"] = torch.tensor([n for _, n in self.moments])
        kept["draws"] = torch.tensor([d for d, _ in self.moments], dtype=torch.float64)
        return kept

    def load(self, kept: Mapping[str, Tensor], device: torch.device) -> None:
        """Goes on from a `state`."""
        for key, t in kept.items():
            kind, _, name = key.partition("/")
            if kind == "estimator":
                self.estimator.state[name] = t.to(device) if t.is_floating_point() else t
            elif kind == "traces":
                self.traces[name] = t.to(device)
        self.share = kept["share"]
        self.predictions, self.passes = int(kept["predictions"]), int(kept["passes"])
        draws, lengths = kept["draws"].tolist(), kept["lengths"].tolist()
        self.moments = [(d, n) for d, n in zip(draws, lengths, strict=True)]


def _rows(name: str, t: Tensor, mask: Tensor) -> Tensor:
    """[batch, seq, d], at least in float32, zero where padded.

    After pooling there is one position a sequence.
    """
    wide = torch.promote_types(t.dtype, torch.float32)
    rows = mask.shape[0]
    if t.dim() == 2 and t.shape[0] == rows and mask.shape[1] != 1:
        return t[:, None].to(wide)
    if tuple(t.shape[:-1]) not in (tuple(mask.shape), (mask.numel(),)):
        raise CurvatureError(
            "a layer does not read one row for each token",
            got=f"{name}: {list(t.shape)} for tokens of shape {list(mask.shape)}",
            allowed="[batch, tokens, features], or the same without a division into sequences",
            fix=f"leave {name.rpartition('.')[2]} out of target_modules; of DeBERTa "
            'target_modules=["value_proj", "dense"] are held',
        )
    t = t.reshape(*mask.shape, -1).to(wide)
    return t if bool(mask.all()) else t * mask[..., None].to(t.device)
