"""The model cards of a trainer's folders: what held the model, and how long it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from retain.errors import ConfigError, warn
from retain.models.cards import extend_card, plain_name, section
from retain.retention.facts import facts, trained
from retain.retention.recipe import Recipe

__all__ = ["Card"]


class Card:
    """What the card of a model that trains says.

    Args:
        recipe: that holds the model.
        alone: no card of a trainer's folders is to be written, as their driver writes its own.

    Attributes:
        base: what the model calls its base, and the library that loads what is trained on it; None
            until training has begun.
    """

    def __init__(self, recipe: Recipe, *, alone: bool = False) -> None:
        self.recipe, self._writes = recipe, not alone
        self.base: tuple[str, str] | None = None
        self._trained: dict[str, str] = {}

    def begin(self, model: Any) -> None:
        """Training begins, of this model."""
        configs = getattr(model, "peft_config", None) or {}
        names = [config.base_model_name_or_path for config in configs.values()]
        own = getattr(getattr(model, "config", None), "_name_or_path", None)
        name = next((str(name) for name in (*names, own) if name), "")
        self.base = name, "peft" if configs else "transformers"

    def write(self, folder: str | Path) -> None:
        """See `RetentionCallback.write_card`."""
        if self.base is None:
            raise ConfigError(
                "nothing has held a model yet", got="a callback that has not trained",
                allowed="one whose training has begun", fix="trainer.train() first",
            )  # fmt: skip
        name, library = self.base
        text = section({"Base model": plain_name(name), **self._trained, **facts(self.recipe)})
        extend_card(Path(folder).expanduser(), name, text, library)

    def written(
        self, folder: Path, args: TrainingArguments, state: TrainerState, *, ended: bool = False
    ) -> None:
        """A trainer has written a folder; a card that cannot be is no reason to fail for it.

        Args:
            folder: its checkpoint, or the folder of all of them when training has ended.
            args: of the trainer.
            state: of the trainer, at this step.
            ended: whether training has.
        """
        told = trained(state.global_step, args.learning_rate, args.seed)
        best = state.best_model_checkpoint if ended and args.load_best_model_at_end else None
        if best is not None:
            told += f"; then the best checkpoint, {Path(best).name}, was loaded"
        self._trained["Trained"] = told
        if not (self._writes and folder.is_dir()):
            return
        try:
            self.write(folder)
        except Exception as error:
            self._writes = False
            warn(f"the model card is not written: {error}")
