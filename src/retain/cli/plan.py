"""``retain plan``: what a curvature of a model will cost, before any weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import Field

from retain.cli.options import Screen, check_choices, command, name_list, quieten
from retain.config import Options
from retain.curvature.blocks.ranks import RANKS, USUAL_RANK, WHOLE, factor_rank_of
from retain.curvature.blocks.registry import names as structures
from retain.curvature.plan import SEQUENCE, Cost, cost
from retain.retention.cost import Held, held

if TYPE_CHECKING:
    from retain.models.skeleton import Outline

__all__ = ["EXAMPLE", "plan"]

EXAMPLE = "Example: retain plan meta-llama/Meta-Llama-3-8B"

FEW = 64
"""Directions of a sketch that is recommended where memory is short."""


class PlanConfig(Options):
    """Settings of ``retain plan``."""

    model: str = Field(
        description="A built-in name (smollm2-135m), a hub id, a folder, a config.json or a .gguf "
        "file. Only the configuration is read"
    )
    rank: int = Field(16, ge=1, description="Rank of the adapter")
    targets: str = Field(
        "all-linear", description="Layers that get an adapter: all-linear, or names with commas"
    )
    factor_rank: str = Field(
        "auto", description=f"Sketch wide factors by so many directions each; {RANKS}"
    )
    structure: str = Field("all", description=f"all, or one of {', '.join(structures())}")
    tokens: int = Field(512, ge=1, description="Tokens of a training step")
    num_labels: int | None = Field(None, ge=2, description="A classifier with so many classes")
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the model. For models you trust"
    )


@command(PlanConfig, "model")
def plan(config: PlanConfig, screen: Screen) -> None:
    """Say what a curvature will cost: memory, time to fit, work a training step."""
    check_choices(("structure", config.structure, ("all", *structures())))
    sketches = factor_rank_of(config.factor_rank)
    quieten(False)
    from retain.models.skeleton import load_skeleton, outline

    rank, tokens = config.rank, config.tokens
    skeleton = load_skeleton(
        config.model, num_labels=config.num_labels, trust_remote_code=config.trust_remote_code
    )
    found = outline(skeleton, rank=rank, targets=name_list(config.targets))
    costs = {
        name: cost(name, found, rank=rank, factor_rank=sketches, tokens=tokens)
        for name in (structures() if config.structure == "all" else (config.structure,))
    }
    recipe = held(found.layers, found.shared, rank=rank, factor_rank=sketches)
    notes = list(found.notes)
    if missing := [name for name, c in costs.items() if c is None]:
        notes.append(f"no sketches: {', '.join(missing)}")
    adapter = sum(rank * sum(shape) for shape in found.layers.values())
    inputs = len(set(found.shared.values()))
    screen.say(
        f"{config.model}: {found.kind}, {_count(found.parameters)} weights, none loaded\n"
        f"{len(found.layers)} LoRA layers of rank {rank} ({_count(adapter)} weights), "
        f"{inputs} distinct inputs{_sharing(found)}"
    )
    factors = "whole factors" if sketches is None else f"factor rank {sketches}"
    if sketches == "auto":
        factors = f"factors wider than {WHOLE} sketched, rank {USUAL_RANK}"
    screen.table(
        f"\nWhat a curvature costs, {factors}",
        ["structure", "stored", "fitting", "passes", "step work", "step reads"],
        [_row(name, c) for name, c in costs.items()],
    )
    screen.table(
        "\nWhat the recipe holds beside it, on the device",
        ["filter", "copies of A", "its gradients", "in a step", "start, most"],
        [[_size(n) for n in (*_parts(recipe), recipe.step, recipe.start)]],
    )
    screen.say(
        "\n".join(
            [
                *_advice(found, costs.get("kfac"), recipe, rank),
                "passes: work of the fit, in forward and backward passes over the source",
                f"step: what the force adds to a step of {tokens:,} tokens, and reads in it",
                "All by arithmetic on shapes, in float32; nothing was measured.",
                *(f"note: {note}" for note in notes),
            ]
        )
    )
    screen.emit(
        {
            "model": config.model,
            "kind": found.kind,
            "parameters": found.parameters,
            "linear_work": found.linear,
            "head_work": found.head,
            "targets": config.targets,
            "rank": rank,
            "factor_rank": sketches,
            "tokens": tokens,
            "sequence": SEQUENCE,
            "adapter_parameters": adapter,
            "distinct_inputs": inputs,
            "layers": {
                name: {"d_out": d_out, "d_in": d_in, "input": found.shared[name]}
                for name, (d_out, d_in) in found.layers.items()
            },
            "recipe": asdict(recipe) | {"step": recipe.step},
            "structures": {name: asdict(c) if c else None for name, c in costs.items()},
            "notes": notes,
        }
    )


def _parts(recipe: Held) -> tuple[int, int, int]:
    return recipe.filter, recipe.copies, recipe.gradients


def _advice(found: Outline, usual: Cost | None, recipe: Held, rank: int) -> list[str]:
    """What the default takes in all, and what sketches would leave of it if less than half."""
    if usual is None:
        return []
    whole = usual.stored_bytes + recipe.step
    lines = [
        f"kfac and the recipe, the default: {_size(whole)} beside plain LoRA",
        f"(the weights take {_size(2 * found.parameters)} in bfloat16)",
    ]
    few = cost("kfac", found, rank=rank, factor_rank=FEW)
    thin = held(found.layers, found.shared, rank=rank, factor_rank=FEW)
    if few is not None and (less := few.stored_bytes + thin.step) < whole / 2:
        lines.append(f"with --factor-rank {FEW}, rank={FEW} in the fit: {_size(less)}")
    return lines


def _row(name: str, c: Cost | None) -> list[str]:
    if c is None:
        return [name, *["-"] * 5]
    stored, fitting, reads = map(_size, (c.stored_bytes, c.fitting_bytes, c.step_reads))
    return [name, stored, fitting, f"{c.passes:.2f}", _percent(100 * c.step_overhead), reads]


def _sharing(found: Outline) -> str:
    """Which layers read one tensor, by the last parts of their names."""
    groups: dict[str, list[str]] = {}
    for name, first in found.shared.items():
        groups.setdefault(first, []).append(name.rsplit(".", 1)[-1])
    kinds = dict.fromkeys(" ".join(g) for g in groups.values() if len(g) > 1)
    return "\nshared inputs: " + "; ".join(kinds) if kinds else ""


def _percent(share: float) -> str:
    return f"{share:.{2 if share < 1 else 1 if share < 10 else 0}f} %"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _size(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.{2 if power == 30 else 1}f} {unit}"
    return f"{size} B"
