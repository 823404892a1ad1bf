"""`transformers.Trainer` for tokenised rows: its loss, and what is fed to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer

from retain.compat import warmup
from retain.data.batches import Batch, Example
from retain.errors import TrainingError
from retain.models.forward import forward_logits
from retain.models.names import unwrap
from retain.retention.method import Method
from retain.training.loss import task_loss

__all__ = ["RowTrainer", "Rows"]


class Rows(Dataset[tuple[int, Example]]):
    """Rows with their numbers."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return index, self.examples[index]


class RowTrainer(Trainer):
    """The mean loss over a step's predictions, whatever its division.

    That is into micro-batches, and among the processes of ``torchrun``, whose gradients are
    averaged. A method's term counts in each part as its predictions do among those of the step.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, method: Method | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.extra = method, 0.0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A run of a single step has no warm-up, whose first step is at a rate of 0."""
        if num_training_steps == 1:
            vars(self.args).update({"warmup_steps": 0} | warmup(0))
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        batch: Batch = inputs["batch"].to(next(model.parameters()).device)
        logits = forward_logits(model, batch)
        total = task_loss(logits, batch, inputs["heads"])
        if not math.isfinite(float(total.detach())):
            raise TrainingError(
                "the loss is not finite",
                got=f"{float(total.detach())} at step {self.state.global_step + 1}",
                allowed="finite numbers",
                fix="lower the learning rate, or check the data; earlier checkpoints are untouched",
            )
        count = len(batch.targets) if num_items_in_batch is None else num_items_in_batch
        term = None
        if self.method is not None:
            term = self.method.loss(unwrap(model), batch, logits)
        if term is None:
            return total / count
        term = term * (len(batch.targets) / count)
        self.extra += float(term.detach())
        return total / count + term

    def taken_extra(self) -> float:
        """What the method has added to the loss since the last call."""
        extra, self.extra = self.extra, 0.0
        return extra

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Nothing once all steps are done, as where a training goes on from its last checkpoint.

        The trainer looks whether they are only after a step.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        count = sum(len(b["batch"].targets) for b in batch_samples)
        if self.args.world_size == 1:
            return count
        every = self.accelerator.reduce(torch.tensor(float(count), device=device), "mean")
        return float(every)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Keeps the adapter's precision, which PEFT widens when it loads one."""
        assert self.model is not None
        kinds = {n: p.dtype for n, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if name in kinds:
                parameter.data = parameter.data.to(kinds[name])

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0
