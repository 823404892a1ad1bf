"""The discriminant start of a training run: A from the trainer's own rows, then held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retain.curvature.curvature import Curvature
from retain.data.batches import Example
from retain.errors import ModelError, SourceError
from retain.models.adapter import lora_sites
from retain.models.heads import is_causal
from retain.retention.moments import input_moments, moments_of
from retain.retention.start import check_start, set_start

__all__ = ["Start"]


@dataclass(frozen=True)
class Start:
    """How LoRA's A begins; see `retain.retention.start`.

    Args:
        kind: ``discriminant``, ``principal`` or ``null``; with ``random`` PEFT's A is held.
        gain: of A's size over PEFT's. B alone trains, so a rate that is right for A and B
            together is short for it: under Adam the gain is a factor of its learning rate.
        epsilon: what directions that the source text never uses count as, relative to its mean.
        answers: the share of predicting positions in the rows' second moments.
        rows: of the training data that are read.

    Raises:
        ConfigError: a value out of range.
    """

    kind: str = "discriminant"
    gain: float = 5.0
    epsilon: float = 0.01
    answers: float = 0.5
    rows: int = 64

    def __post_init__(self) -> None:
        check_start(self.kind, self.gain, self.epsilon, self.answers, self.rows)

    def begin(
        self, model: nn.Module, curvature: Curvature, loader: Any, *, seed: int, resuming: bool
    ) -> None:
        """Sets A, unless the run goes on, and keeps it from training.

        Args:
            model: with a fresh LoRA.
            curvature: its input sides are those of the source text.
            loader: the trainer's `DataLoader`, whose data set and collator are used.
            seed: of the choice of rows.
            resuming: A has been set before the checkpoint.

        Raises:
            ModelError: no LoRA, or one whose B is not 0 any more.
            MismatchError: a curvature without input sides.
            SourceError: data that hold no tokens.
        """
        sites = lora_sites(model)
        if not resuming and self.kind != "random":
            if any(bool(site.b.any()) for site in sites):
                raise ModelError(
                    "a start needs a fresh adapter",
                    got="a LoRA whose B is not 0",
                    allowed="B = 0, as PEFT attaches it",
                    fix="leave start out to go on with this adapter",
                )
            examples = _examples(loader, self.rows, seed, is_causal(model))
            new = input_moments(model, sites, examples, answers=self.answers)
            set_start(
                sites, new, moments_of(curvature),
                kind=self.kind, gain=self.gain, epsilon=self.epsilon, seed=seed,
            )  # fmt: skip
        for site in sites:
            site.a.requires_grad_(False)

    def end(self, model: nn.Module) -> None:
        """Lets A train again."""
        for site in lora_sites(model):
            site.a.requires_grad_(True)


def _examples(loader: Any, count: int, seed: int, causal: bool) -> list[Example]:
    """Rows of the training data, as the collator gives them, drawn without its sampler."""
    data, found = loader.dataset, []
    with torch.random.fork_rng():
        items: Iterator[Any] = iter(data)
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            random = torch.Generator().manual_seed(seed)
            items = (data[i] for i in torch.randperm(len(data), generator=random).tolist())
        for item in items:
            batch = loader.collate_fn([item])
            example = _example(batch, causal)
            found += [example] if example.tokens else []
            if len(found) == count:
                break
    if not found:
        raise SourceError(
            "the training data hold no tokens to start from",
            got=f"{type(data).__name__} without rows of two tokens or more",
            allowed="rows whose collator gives input_ids",
            fix="check the data, or leave start out",
        )
    return found


def _example(batch: Any, causal: bool) -> Example:
    """One collated row, unpadded."""
    ours = batch.get("batch")  # of this package's own trainer
    inputs = batch if ours is None else ours.inputs
    ids = inputs["input_ids"].reshape(-1)
    mask = inputs.get("attention_mask")
    fits = mask is not None and mask.numel() == ids.numel()
    keep = mask.reshape(-1).bool() if fits else torch.ones_like(ids, dtype=torch.bool)
    tokens = ids[keep].tolist()
    if not causal:
        return Example(tuple(tokens), (0,))
    if ours is not None:
        predict = ours.predict.reshape(-1)[keep].tolist()
        return Example(tuple(tokens), (0,) * len(tokens), tuple(predict))
    labels = inputs.get("labels")
    counts = ids if labels is None else labels.reshape(-1)
    predict = (counts[keep] != -100).tolist()
    return Example(tuple(tokens[:-1]), tuple(tokens[1:]), tuple(predict[1:]))
