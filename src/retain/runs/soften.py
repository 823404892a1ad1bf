"""``retain soften``: a finished adapter pulled back to a budget of forgetting, and its record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from retain.config import Measured
from retain.files import file_digest, locked, whole_file
from retain.records import finite
from retain.retention.bounds import check_budget
from retain.runs.bases import Base, base_of
from retain.runs.folders import SOFTEN_PICTURES, check_made, recorded
from retain.runs.messages import Messages, interruption
from retain.runs.settings import placed_model
from retain.runs.tuned import (
    check_finite,
    load_tuned,
    name_of,
    place_for,
    source_rows,
    text_rows,
)

__all__ = ["SoftenConfig", "soften_run"]

SCHEMA = "retain.soften/1"
MEASURED = 5
"""Points of the curve whose KL is measured, beside the one that is written."""

Pictures = Callable[[dict[str, Any]], Mapping[str, bytes]]


class SoftenConfig(Measured):
    """Settings of ``retain soften``."""

    adapter: Path = Field(description="Folder of the finished PEFT adapter")
    curvature: Path = Field(
        description="Of what must not be forgotten: a file of retain fit, weight space"
    )
    budget: float = Field(
        description="Forgetting to end at, nats per token: measured with --measure"
    )
    out: Path = Field(description="Folder of the results")
    target_curvature: Path | None = Field(
        None,
        description="Of the task's rows, fitted with --adapter ADAPTER; plain distance without one",
    )
    model: Base = None
    depth: int | None = Field(
        None, ge=0,
        description="Of the subspaces: deeper is nearer to the optimum, and slower (2 or 1)",
    )  # fmt: skip
    epsilon: float = Field(
        1e-3, description="Damping of the target's curvature, relative to its mean"
    )
    points: int = Field(12, ge=2, description="Points of the curve")
    measure: bool = Field(
        False, description="The budget is of measured KL; some points of the curve are measured"
    )
    source: str | None = Field(
        None, description="Text for --measure; by default the base model writes it"
    )
    rows: int = Field(16, ge=1, description="Measure on at most so many texts")


def soften_run(config: SoftenConfig, pictures: Pictures, messages: Messages) -> dict[str, Any]:
    """Writes the softened adapter, ``soften.json`` and what `pictures` draws of it into a folder.

    Returns:
        The record.

    Raises:
        RetainError: whatever `retain.soften` refuses, or files that cannot be read or written.
        Interrupted: Ctrl-C.
    """
    c, adapter, target, seed = config, config.adapter, config.target_curvature, config.seed
    source, measure, budget = config.source, config.measure, config.budget
    out = place_for(c, adapter.expanduser())
    name = base_of(adapter, c.model)
    messages.libraries()
    from retain.curvature.curvature import load_curvature
    from retain.models.fingerprint import fingerprint
    from retain.models.saved import adapter_digest, save_adapter
    from retain.models.sites import lora_sites
    from retain.provenance import provenance
    from retain.retention.soften.adapter import soften

    with locked(out):
        check_made(out, "soften", "a softening", SOFTEN_PICTURES)
        check_budget(budget)
        text = source_rows(c, source)
        with interruption("nothing was written"):
            far = load_curvature(c.curvature)
            near = None if target is None else load_curvature(target)
            messages.say(f"loading {name}")
            tuned, tokenizer, _ = load_tuned(name, adapter, c, messages)
            start = time.perf_counter()
            soft = soften(tuned, far, target=near, depth=c.depth, epsilon=c.epsilon)
            kl = _held_out_kl(tuned, tokenizer, text, c, messages) if measure else None
            chosen, curve = _curve(soft, budget, c.points, kl)
            messages.note_width(max(site.rank for site in lora_sites(tuned)), out / "adapter")
            record: dict[str, Any] = finite({
                "schema": SCHEMA, **provenance(seed),
                "start": str(adapter), "curvature": str(c.curvature),
                "target_curvature": target and str(target),
                "source": (source or "self") if measure else None,
                "model": {"name": name, "dtype": c.dtype, "fingerprint": fingerprint(tuned)},
                "unit": "half a squared distance" if near is None else "nats per token",
                "info": far.info.to_dict(),
                "target_info": near and near.info.to_dict(),
                "target_around": near and ("adapter" if near.around_adapter else "base"),
                "budget": budget, "budget_of": "measured" if measure else "predicted",
                "inside": chosen["mu"] == 0, "depth": soft.depth, "epsilon": c.epsilon,
                "chosen": chosen, "curve": curve,
                "seconds": time.perf_counter() - start,
                "digests": {
                    "start": adapter_digest(adapter.expanduser()),
                    "curvature": file_digest(c.curvature.expanduser()),
                    "target_curvature": target and file_digest(target.expanduser()),
                },
                "notes": messages.notes,
            })  # fmt: skip
            drawn = pictures(record)
            with recorded(out / "soften.json", record):
                save_adapter(tuned, out / "adapter", placed_model(name), _facts(record))
        for picture, content in drawn.items():
            with whole_file(out / picture, "the picture") as scratch:
                scratch.write_bytes(content)
            messages.say(str(out / picture))
    return record


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """What the adapter's card says."""
    from retain.curvature.info import CurvatureInfo
    from retain.retention.facts import source_of

    chosen, start = record["chosen"], name_of(Path(record["start"]))
    found = {
        "Softened from": f"{start}, digest {record['digests']['start'][:12]}",
        "Source text": source_of(CurvatureInfo.from_dict(record["info"])),
        "Budget": f"{record['budget']:g} {record['budget_of']} nats per token",
        "Predicted forgetting": f"{chosen['nats']:.3g} nats per token",
    }
    if chosen["measured"]:
        found["Measured KL divergence"] = f"{chosen['measured']['kl']:.3g} nats per token"
    return found


def _held_out_kl(
    model: Any, tokenizer: Any, rows: Any, config: Measured, messages: Messages
) -> Callable[[], dict[str, Any]]:
    """Measures the model as it then is against the base; without rows on text of the base."""
    from retain.evaluation.forgetting import Reference

    examples = text_rows(model, tokenizer, rows, config, messages)
    base = Reference(model, examples, batch_size=config.batch_size, progress=messages.progress)

    def measured() -> dict[str, Any]:
        found = base.measure(model)
        check_finite(found.kl)
        return found.to_dict()

    return measured


def _curve(
    soft: Any, budget: float, points: int, kl: Callable[[], dict[str, Any]] | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The point within the budget, which the model has in the end, and the curve.

    Beside the chosen point and some of the curve the measured KL is kept, and that of the adapter
    times one number, at as many predicted nats.
    """
    update = soft.within_measured(budget, lambda: kl()["kl"]) if kl else soft.within(budget)
    unknown = {"measured": None, "scaled_measured": None}
    curve = [point.to_dict() | unknown for point in soft.curve(points)]
    chosen = update.point.to_dict() | unknown
    last = len(curve) - 1
    some = sorted({round(i * last / (MEASURED - 1)) for i in range(MEASURED)})
    for point in [chosen, *(curve[i] for i in some)] if kl else ():
        for key, at in (
            ("measured", update if point is chosen else soft.at(point["mu"])),
            ("scaled_measured", soft.scaled(point["nats"])),
        ):
            soft.apply(at)
            point[key] = kl and kl()
    soft.apply(update)
    return chosen, curve
