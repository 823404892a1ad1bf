"""Which training rows push a model to where forgetting is predicted.

LoRA's B begins at 0, and the predicted nats q are quadratic in it: ``q = 1/2 <B, dq/dB>``. Had B
come of plain gradient steps, ``B = -sum over i of c_i g_i`` with g_i the gradient of row i's loss,
each row would have its part in them,

    q  =  sum over i of  c_i / 2  <-g_i, dq/dB> ,

which is TracIn (Pruthi et al., arXiv 2002.08484) with q in place of a test row's loss. All c are
taken to be one, the g_i are those half-way, at B / 2 (at the end what has been learned pushes no
more, and where q is quadratic half-way stands for the whole way), and what the rows say is brought
to the q that there is. So it tells rows from each other; the true way went through an optimiser.
A stays as training has left it, so what a filter stopped it stops here too.

It takes one forward and backward pass a row, and one closed-form pull.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from retain.curvature.curvature import Curvature
from retain.data.batches import Example, collate
from retain.data.encoding import encode
from retain.data.sources import read_rows
from retain.errors import ConfigError, MismatchError, ModelError, SourceError
from retain.models.sites import LoraSite
from retain.models.view import ModelView
from retain.retention.given import check_curvature
from retain.training.loss import task_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EXCERPT", "Explanation", "RowCost", "explain"]

PLACES, EXCERPT = 3, 80
"""Layers that are named of each row, and characters of its text."""


@dataclass(frozen=True)
class RowCost:
    """A row's part in the predicted nats.

    Attributes:
        row: its number among the rows that were given, from 0, counting those left out.
        nats: its part, per source token; below 0 it pulls back.
        share: of all predicted nats.
        loss: half-way, nats per predicted token.
        tokens: that it predicts.
        places: the layers with the largest parts, and these.
        text: how its predicted tokens begin.
    """

    row: int
    nats: float
    share: float
    loss: float
    tokens: int
    places: tuple[tuple[str, float], ...]
    text: str


@dataclass(frozen=True)
class Explanation:
    """What the rows cost.

    Attributes:
        predicted: nats per source token, of all rows.
        rows: the dearest first.
        layers: each layer's part in the predicted nats, the largest first.
    """

    predicted: float
    rows: tuple[RowCost, ...]
    layers: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def explain(
    model: nn.Module,
    curvature: Curvature,
    rows: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 256,
    of: int | None = None,
    progress: bool = False,
) -> Explanation:
    """Ranks rows by their part in what a trained LoRA is predicted to have forgotten; see above.

    Args:
        model: a causal model with the adapter that learned the rows; it is left as it was.
        curvature: of the source text, in weight space around the base model.
        rows: what was learned: rows, a file, or tokenised rows.
        tokenizer: for text; by default the model's own.
        max_length: tokens of a row that are read at most.
        of: how many rows it has learned, where `rows` are drawn from them: their parts are then
            estimates, and together about ``len(rows) / of`` of the whole.
        progress: show a bar.

    Raises:
        ConfigError: `of` is less than there are rows, or what is no curvature.
        ModelError: no causal model, no LoRA, or one that has learned nothing, or not these rows.
        MismatchError: the curvature is of another model, or around another point.
        SourceError: rows that cannot be read, or predict nothing.
    """
    check_curvature(curvature)
    view = ModelView.of(model, tokenizer)
    if not view.causal:
        raise ModelError(
            "only rows of a language model are explained", got="a classifier",
            allowed="a causal model", fix="leave rows out, and compare what is forgotten",
        )  # fmt: skip
    sites = [site for site in curvature.bind(model) if isinstance(site, LoraSite)]
    if not sites or curvature.info.space != "weight" or curvature.around_adapter:
        raise MismatchError(
            "the nats are divided among rows from a fresh LoRA on",
            got=f"{curvature.info.space} space, {len(sites)} LoRA layers, an anchor at "
            f"{'another' if curvature.around_adapter else 'the same'} point",
            allowed="a curvature of weight space around the base model, and LoRA",
            fix="the curvature that the run was held by",
        )
    examples, origins = _read(view, rows, max_length)
    if of is not None and of < len(examples):
        raise ConfigError(
            "rows cannot be drawn from fewer", got=f"of={of} and {len(examples)} rows",
            allowed="as many as were learned", fix="leave of out where all rows are given",
        )  # fmt: skip
    nats, pulls = curvature.pulls(sites)
    if not nats > 0:
        raise ModelError(
            "the adapter has learned nothing that could be explained", got=f"{nats:g} nats",
            allowed="a trained adapter", fix="give the model after training",
        )  # fmt: skip
    found = {id(p): g for p, g in pulls}
    pull = [found[id(site.b)] for site in sites]
    parts, losses = [], []
    with _half_way(sites) as weights, view.evaluating(), torch.enable_grad():
        for example in tqdm(examples, desc="rows", unit="row", disable=not progress):
            batch = collate([example], view.pad, [0]).to(view.device)
            loss = task_loss(view.logits(batch), batch, [None])
            grads = torch.autograd.grad(loss, weights)
            inner = [-(g.to(f) * f).sum().to(loss.device) for g, f in zip(grads, pull, strict=True)]
            parts.append(torch.stack([part.double() for part in inner]).cpu())
            losses.append(float(loss.detach()))
    drawn = len(examples) / (of or len(examples))
    return _divided(view, sites, examples, origins, torch.stack(parts), losses, nats, drawn)


def _read(view: ModelView, rows: Any, max_length: int) -> tuple[list[Example], list[int]]:
    """What is learned of the rows, and the number of the row that each is of."""
    if isinstance(rows, list | tuple) and rows and isinstance(rows[0], Example):
        found, origins = list(rows), list(range(len(rows)))
    else:
        origins = []
        found = encode(
            read_rows(rows), view.tokenizer, max_length=max_length, causal=True, origins=origins
        )
    if not all(any(e.predict) for e in found):
        raise SourceError(
            "a row predicts nothing", got="no token to learn", allowed="one at least",
            fix="leave it out",
        )  # fmt: skip
    view.check(found)
    return found, origins


@contextmanager
def _half_way(sites: Sequence[LoraSite]) -> Iterator[list[nn.Parameter]]:
    """Inside it B is half of what it is, and has gradients."""
    weights = [site.b for site in sites]
    kept = [(w.detach().clone(), w.requires_grad) for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True).data.mul_(0.5)
        yield weights
    finally:
        for w, (value, trains) in zip(weights, kept, strict=True):
            w.requires_grad_(trains).data.copy_(value)


def _divided(
    view: ModelView, sites: Sequence[LoraSite], examples: Sequence[Example],
    origins: Sequence[int], parts: torch.Tensor, losses: Sequence[float], nats: float, drawn: float,
) -> Explanation:  # fmt: skip
    """What rows push in each layer, [rows, layers], as parts of the predicted nats.

    They are a share `drawn` of all rows, and so account for that share of the nats.
    """
    total = float(parts.sum())
    if not total > 0:
        raise ModelError(
            "these rows do not push the adapter to where it is",
            got=f"{total:g} along the force",
            allowed="the rows that it has learned",
            fix="give those; or train less long, so that they still push half-way",
        )
    parts = parts * (drawn * nats / total)
    names = [site.name.partition("model.layers.")[2] or site.name for site in sites]
    costs = []
    for row in parts.sum(1).argsort(descending=True, stable=True).tolist():
        example, own = examples[row], parts[row]
        places = own.argsort(descending=True)[:PLACES].tolist()
        count = sum(example.predict)
        costs.append(RowCost(
            origins[row], float(own.sum()), float(own.sum()) / nats, losses[row] / count, count,
            tuple((names[i], float(own[i])) for i in places), _excerpt(view, example),
        ))  # fmt: skip
    layers = parts.sum(0) / drawn
    order = layers.argsort(descending=True).tolist()
    return Explanation(nats, tuple(costs), {names[i]: float(layers[i]) for i in order})


def _excerpt(view: ModelView, example: Example) -> str:
    learned = [int(t) for t, told in zip(example.targets, example.predict, strict=True) if told]
    if view.tokenizer is None:
        return " ".join(map(str, learned))[:EXCERPT]
    return " ".join(str(view.tokenizer.decode(learned)).split())[:EXCERPT]
