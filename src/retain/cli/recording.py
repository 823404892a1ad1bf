"""What a training run leaves on the screen and in ``train.json``."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from retain.cli.common import Screen
from retain.cli.holding import Held
from retain.config import RunConfig

__all__ = ["record_of", "tell"]


def record_of(
    config: RunConfig, model: Any, held: Held | None, last: Path | None
) -> dict[str, Any]:
    """The record's part that a finished model tells.

    Args:
        config: of the run.
        model: trained.
        held: its curvature, or None.
        last: the checkpoint that it went on from.
    """
    from retain.models.fingerprint import fingerprint
    from retain.models.lora import share_trainable
    from retain.provenance import provenance

    trainable, total = share_trainable(model)
    return {
        "schema": "retain.train/1",
        **provenance(config.training.seed),
        "config": config.model_dump(mode="json"),
        "model": {
            "name": config.model, "parameters": total - trainable,
            "trainable": trainable, "fingerprint": fingerprint(model),
        },
        "curvature": held and {
            "path": str(held.path), "seconds": held.seconds,
            "info": held.curvature.info.to_dict(),
        },
        "resumed_from": last and last.name,
        "predicted_nats": held and held.curvature.quadratic(model),
    }  # fmt: skip


def tell(record: dict[str, Any], adapter: Path, out: Path, screen: Screen) -> None:
    """Prints how the run ended, and what to do next."""
    losses = [entry["loss"] for entry in record["history"]]
    lines = [["steps", str(record["steps"])], ["seconds", f"{record['seconds']:.1f}"]]
    if losses:
        lines.append(["loss, first to last step", f"{losses[0]:.3f} to {losses[-1]:.3f}"])
    if record["predicted_nats"] is not None:
        lines.append(["predicted forgetting", f"{record['predicted_nats']:.3g} nats per token"])
    screen.table("trained", ["", ""], [*lines, ["adapter", str(adapter)]])
    model, place = quote(record["config"]["model"]), quote(str(adapter))
    if record.get("labels"):
        screen.say("next: load it as docs/classifiers.md says")
    else:
        screen.say(f"next: retain eval --model {model} --adapter {place} --probe")
    screen.emit({"adapter": adapter, "record": out / "train.json", **record})
