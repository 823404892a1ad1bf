"""Train an adapter: `transformers.Trainer`, with the head run where labels are."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from retain.config import TrainConfig
from retain.curvature.curvature import Curvature
from retain.data.batches import Batch, Example, collate
from retain.errors import SourceError, TrainingError
from retain.models.heads import forward_logits
from retain.training.callback import RetentionCallback

__all__ = ["TrainResult", "train"]

Measure = Callable[[nn.Module], float]


@dataclass
class TrainResult:
    """What training gave.

    Attributes:
        seconds: wall time.
        steps: optimiser steps.
        history: one entry a logged step: ``step``, ``loss`` (nats per predicted token),
            ``predicted`` and ``measured`` (nats per source token, or None) and ``strength``.
    """

    seconds: float
    steps: int
    history: list[dict[str, float | None]] = field(default_factory=list)


class _Rows(Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class _Trainer(Trainer):
    """Mean cross-entropy over a step's predictions, whatever its division into micro-batches."""

    loss_is_scaled_for_ga = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        batch: Batch = inputs["batch"].to(next(model.parameters()).device)
        logits = forward_logits(model, batch)
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = nn.functional.cross_entropy(logits.to(wide), batch.targets, reduction="sum")
        if not math.isfinite(float(total.detach())):
            raise TrainingError(
                "the loss is not finite",
                got=f"{float(total.detach())} at step {self.state.global_step + 1}",
                allowed="finite numbers",
                fix="lower the learning rate, or check the data; earlier checkpoints are untouched",
            )
        count = len(batch.targets) if num_items_in_batch is None else num_items_in_batch
        return total / count

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        return sum(len(b["batch"].targets) for b in batch_samples)

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


class _Watch(TrainerCallback):
    """Keeps the history, and measures the true KL now and then."""

    def __init__(self, measure: Measure | None, every: int) -> None:
        self.measure, self.every = measure, every
        self.history: list[dict[str, float | None]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        last = step >= state.max_steps
        due = self.measure is not None and (last or step % self.every == 0)
        self.history.append(
            {
                "step": step,
                "loss": float(logs["loss"]),
                "predicted": logs.get("predicted_nats"),
                "measured": self.measure(kwargs["model"]) if due and self.measure else None,
                "strength": logs.get("retention_strength"),
            }
        )


def train(
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    curvature: Curvature | None = None,
    strength: float = 0.0,
    out: Path | None = None,
    measure: Measure | None = None,
    measure_every: int = 20,
    progress: bool = True,
    resume: bool = False,
) -> TrainResult:
    """Trains a PEFT model's adapter in place.

    Args:
        model: with a trainable adapter.
        examples: tokenised rows.
        config: batch size, epochs, learning rate and so on.
        curvature: turns retention on.
        strength: of the retention.
        out: folder for checkpoints; none are written without it.
        measure: gives the true KL in nats; called every `measure_every` steps and at the end.
        measure_every: steps.
        progress: show a bar.
        resume: go on from the last checkpoint in `out`, if there is one.

    Raises:
        TrainingError: the loss is not finite.
        SourceError: fewer examples than one batch.
    """
    if len(examples) < config.batch_size:
        raise SourceError(
            "the training data are smaller than one batch",
            got=f"{len(examples)} examples, batch size {config.batch_size}",
            allowed=f"at least {config.batch_size} examples",
            fix="lower batch_size",
        )
    pad = getattr(model.config, "pad_token_id", None) or 0
    watch = _Watch(measure, measure_every)
    callbacks: list[TrainerCallback] = [watch]
    if curvature is not None:
        callbacks.append(RetentionCallback(curvature, strength, config.update))
    scratch = None if out else tempfile.TemporaryDirectory()  # the trainer wants a folder
    folder = scratch.name if scratch else str(out)
    try:
        trainer = _Trainer(
            model=model,
            args=_arguments(config, folder, out is not None, progress),
            train_dataset=_Rows(examples),
            data_collator=lambda rows: {"batch": collate(rows, pad, multiple=config.pad_multiple)},
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(_Bar())
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=_last_checkpoint(out) if resume and out else None)
        seconds = time.perf_counter() - start
    finally:
        if scratch:
            scratch.cleanup()
    return TrainResult(seconds, trainer.state.global_step, watch.history)


def _arguments(config: TrainConfig, folder: str, keep: bool, progress: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="steps" if keep and config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        seed=config.seed,
        data_seed=config.seed,
        report_to=config.report_to,
        remove_unused_columns=False,
        disable_tqdm=not progress,
        activation_checkpointing=config.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # the head's hook does not split over devices
    return arguments


class _Bar(ProgressCallback):
    """The trainer's bar without a printed line for each log record."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "predicted_nats" in logs:
                shown["nats"] = f"{logs['predicted_nats']:.4f}"
            self.training_bar.set_postfix(shown)


def _last_checkpoint(out: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(out)) if out.is_dir() else None
