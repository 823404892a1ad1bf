"""What is asked of a model again and again, found out once and handed down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retain.data.batches import Batch, Example, batches
from retain.data.draws import sample
from retain.data.sources import Row, encode, read_rows
from retain.models.fingerprint import fingerprint
from retain.models.forward import evaluating, forward_body, forward_logits
from retain.models.heads import Head, check_labels, head_kind, row_label
from retain.models.names import inner_model, unwrap
from retain.models.off import adapter_off
from retain.models.sites import LinearSite, LoraSite, find_sites, lora_sites
from retain.models.sizes import check_sizes, pad_id, positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ModelView"]


class ModelView:
    """A model, and what the rest of the package asks of it.

    Everything is found when it is first asked for, and then kept: make a new view of a model that
    got another adapter, head or vocabulary. Device and precision are looked up each time.

    Args:
        model: a causal model or classifier of transformers, with or without an adapter.
        tokenizer: its own; by default the one that `retain.load_model` attached to it, if any.

    Attributes:
        model: the model, without the wrappers of distributed training and compilation.
        inner: the model of transformers, under PEFT's.
        config: its configuration.
        tokenizer: None where none is known.
        device: where inputs have to be.
        dtype: the precision of the first weights.
        head: ``causal``, ``classes`` (one label a text) or ``regression``; see `head_kind`, which
            refuses any other, several labels a text among them.
        causal: whether it is a causal language model.
        regression: whether its outputs are values, and no logits.
        pad: the token that pads its batches; see `pad_id`.
        positions: how many tokens a row may have; None for any number.
        lora: its LoRA layers; see `lora_sites`.
        sites: what a curvature can be about; see `find_sites`.
        fingerprint: tells its base from other models.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model: Any = unwrap(model)
        self.tokenizer: PreTrainedTokenizerBase | None = tokenizer or getattr(
            self.model, "retain_tokenizer", None
        )

    @classmethod
    def of(
        cls, model: nn.Module | ModelView, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> ModelView:
        """The view of a model; of a view, the view itself unless another tokenizer is given."""
        if not isinstance(model, ModelView):
            return cls(model, tokenizer)
        return model if tokenizer in (None, model.tokenizer) else cls(model.model, tokenizer)

    @cached_property
    def inner(self) -> Any:
        return inner_model(self.model)

    @property
    def config(self) -> Any:
        return self.inner.config

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @cached_property
    def head(self) -> Head:
        return head_kind(self.model)

    @property
    def causal(self) -> bool:
        return self.head == "causal"

    @property
    def regression(self) -> bool:
        return self.head == "regression"

    @cached_property
    def pad(self) -> int:
        return pad_id(self.inner)

    @cached_property
    def positions(self) -> int | None:
        return positions(self.model)

    @cached_property
    def lora(self) -> list[LoraSite]:
        return lora_sites(self.model)

    @cached_property
    def sites(self) -> list[LoraSite] | list[LinearSite]:
        return find_sites(self.model)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def evaluating(self, *, checkpoint: bool = False) -> AbstractContextManager[None]:
        """Inside it the model is in evaluation mode, without autocast; see `evaluating`."""
        return evaluating(self.model, checkpoint=checkpoint)

    def off(self) -> AbstractContextManager[nn.Module]:
        """Inside it the adapter is off, so that the model is its base; see `adapter_off`."""
        return adapter_off(self.model)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of a batch's predictions, [predictions, classes]; see `forward_logits`."""
        return forward_logits(self.model, batch)

    def run(self, batch: Batch) -> None:
        """Runs the model for its hooks' sake; see `forward_body`."""
        forward_body(self.model, batch)

    def batches(self, examples: Sequence[Example], size: int, *, multiple: int = 1) -> list[Batch]:
        """All examples in batches of at most `size`, those of like length together, on the device.

        Their width is a multiple of `multiple`.

        Raises:
            SourceError: no examples.
        """
        size = min(size, len(examples))
        found = batches(examples, size, self.pad, multiple=multiple)
        return [batch.to(self.device) for batch in found]

    def check(self, examples: Sequence[Example], *, labels: bool = True) -> None:
        """Refuses rows that its tables or its head have no place for; see `check_sizes`."""
        check_sizes(self.model, examples, self.tokenizer, labels=labels)

    def read(
        self,
        source: str | Path | Iterable[Row] | Sequence[Example],
        rows: int,
        *,
        max_length: int,
        seed: int = 0,
        values: bool | None = None,
        labels: bool = True,
    ) -> list[Example]:
        """Reads a source's text or rows, and tokenises, draws and checks at most `rows` of them.

        Args:
            source: what `retain.data.sources.read_rows` reads, or tokenised rows.
            rows: at most; one text may give many.
            max_length: tokens a row.
            seed: of the draw.
            values: labels are values, not classes; by default where the head says so.
            labels: they must be those of the whole head.

        Raises:
            SourceError: text that is missing, damaged or empty, or rows that the model's tables
                have no place for.
            ModelError: see `head`; several labels a text.
        """
        every: Any = source
        if not (isinstance(source, list | tuple) and source and isinstance(source[0], Example)):
            found = read_rows(every, rows, seed=seed, max_length=max_length)
            check_labels(self.model, () if self.causal else (row_label(row) for row in found))
            every = encode(
                found, self.tokenizer, max_length=max_length, causal=self.causal, loss="source",
                regression=self.regression if values is None else values,
            )  # fmt: skip
        examples = sample(every, rows, seed)
        self.check(examples, labels=labels)
        return examples
