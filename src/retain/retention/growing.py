"""Methods whose adapter gets fresh rows for a task, so that a resumed run has to grow it first."""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor, nn

from retain.models.lora import grow_lora
from retain.models.sites import lora_sites
from retain.retention.method import Context, Method

__all__ = ["Growing"]


class Growing(Method):
    """Knows the rank that the adapter began with, and puts a grown model in its place."""

    rank: int = 0

    def begin(self, context: Context) -> None:
        super().begin(context)
        self.rank = lora_sites(context.adapter.model)[0].rank

    def fit_adapter(self, state: dict[str, Tensor]) -> None:
        """Grows the adapter to the rank of one that was kept."""
        model = self.context.adapter.model
        site = lora_sites(model)[0]
        self.rank = site.rank
        kept = next(t.shape[0] for name, t in state.items() if "lora_A" in name)
        if kept > site.rank:
            assert isinstance(model, PeftModel)
            self.attach(grow_lora(model, kept - site.rank))

    def attach(self, model: nn.Module) -> None:
        """Lets the adapter be that of another model."""
        adapter = self.context.adapter
        if adapter.model is not model:
            adapter.model = model
            model.retain_adapter = adapter  # type: ignore[assignment]
