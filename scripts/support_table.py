"""Writes docs/support.md: what was tried in which trainer, from the outcomes of the tests.

    PYTHONPATH=src python scripts/support_table.py
    PYTHONPATH=src python scripts/support_table.py --keep axolotl -k axolotl \\
        tests/integrations/test_in_trainers.py

The second runs where that package is installed (axolotl, llamafactory, ms-swift, unsloth): what
passed is kept in docs/support/, where the first reads it.

A test says with ``@pytest.mark.shows(trainer, *features)`` which cells it shows; ``refused=True``
says that the feature is refused there, and the error that the test met is what the cell says. What
no test shows is declared below with a reason.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"
KEPT = ROOT / "docs" / "support"

TRAINERS = (
    "transformers.Trainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer", "plain loop",
    "retain train", "studies", "axolotl", "LLaMA-Factory", "ms-swift", "sentence-transformers",
    "Unsloth",
)  # fmt: skip
FEATURES = (
    "force", "filter", "fresh rows", "head", "budget", "KL on answers", "resume",
    "gradient accumulation", "bf16 autocast", "fp16 autocast", "gradient checkpointing",
    "packing", "padding-free rows", "assistant-only loss", "torch.compile",
    "layer-wise optimiser", "Liger kernels", "DDP", "FSDP2", "DeepSpeed", "4-bit base", "DoRA",
    "full fine-tuning",
)  # fmt: skip

NO_CELL = "not applicable"
NOT_TRIED = "not tried"

OWN_ROWS = "it takes rows and labels as its user made them"
CAUSAL = "it trains language models, which have no new head"
FP16 = "accelerate runs it in single precision on a CPU: it needs a GPU"
SHARDED = (
    "accelerate allows it on accelerators alone; its trainer is TRL's or a `transformers.Trainer`, "
    "of which two processes run so (`tests/training/test_sharded.py`)"
)
ZERO = (
    "not run inside it; its trainer is TRL's or a `transformers.Trainer`, of which two processes "
    "run so (`tests/training/test_zero.py`)"
)
NO_SETTING = "it has no such setting"
LIGER = (
    "its kernels need a GPU; a model that is patched as they patch one is in "
    "`transformers.Trainer`'s cell"
)
ITS_OWN = "its own setting; its trainer is TRL's or a `transformers.Trainer`, of which it was tried"
NEW = ("padding-free rows", "torch.compile", "layer-wise optimiser", "Liger kernels")
DECLARED: dict[tuple[str, str], tuple[str, str]] = {
    **{(t, f): (NOT_TRIED, ITS_OWN)
       for t in ("axolotl", "LLaMA-Factory", "ms-swift", "Unsloth") for f in NEW[:3]},
    **{(t, "Liger kernels"): (NO_CELL, LIGER)
       for t in ("SFTTrainer", "DPOTrainer", "GRPOTrainer", "plain loop", "axolotl",
                 "LLaMA-Factory", "ms-swift", "Unsloth")},
    ("DPOTrainer", "padding-free rows"): (
        NO_CELL, "TRL 1.16 turns it off there"),
    ("GRPOTrainer", "padding-free rows"): (NO_CELL, NO_SETTING),
    ("axolotl", "padding-free rows"): (
        NO_CELL, "its `batch_flattening` wants flash, flex, xformers or sage attention, which "
        "train on a GPU alone"),
    ("ms-swift", "padding-free rows"): (
        NO_CELL, "it lays rows end to end with flash attention alone, which needs a GPU"),
    ("Unsloth", "padding-free rows"): (NO_CELL, "its CPU backend turns it off"),
    **{(t, f): (NO_CELL, NO_SETTING) for t in ("retain train", "studies") for f in NEW},
    ("transformers.Trainer", "packing"): (NO_CELL, OWN_ROWS),
    ("transformers.Trainer", "assistant-only loss"): (NO_CELL, OWN_ROWS),
    ("plain loop", "packing"): (NO_CELL, OWN_ROWS),
    ("plain loop", "assistant-only loss"): (NO_CELL, OWN_ROWS),
    **{(t, "head"): (NO_CELL, CAUSAL) for t in ("SFTTrainer", "DPOTrainer", "GRPOTrainer")},
    **{(t, f): (NO_CELL, NO_SETTING) for t in ("DPOTrainer", "GRPOTrainer")
       for f in ("packing", "assistant-only loss")},
    **{("retain train", f): (NO_CELL, "its model is loaded in `--dtype`, without autocast")
       for f in ("bf16 autocast", "fp16 autocast")},
    **{("studies", f): (NO_CELL, "a study's model is loaded in its dtype, without autocast")
       for f in ("bf16 autocast", "fp16 autocast")},
    **{(t, f): (NO_CELL, NO_SETTING) for t in ("retain train", "studies")
       for f in ("packing", "FSDP2", "DeepSpeed", "DoRA")},
    ("retain train", "full fine-tuning"): (NO_CELL, NO_SETTING),
    ("studies", "assistant-only loss"): (NO_CELL, "its rows are those of tasks, not chats"),
    **dict.fromkeys((("axolotl", "head"), ("LLaMA-Factory", "head")), (NO_CELL, CAUSAL)),
    **{(t, "fp16 autocast"): (NO_CELL, FP16) for t in ("axolotl", "LLaMA-Factory", "ms-swift")},
    ("ms-swift", "head"): (NO_CELL, "its plug-in fits no head"),
    ("axolotl", "DDP"): (NO_CELL, "its two processes ask for an accelerator: it needs a GPU"),
    ("axolotl", "bf16 autocast"): (
        NO_CELL, "transformers refuses it on a CPU unless told so, for which it has no setting"),
    **{(t, "FSDP2"): (NO_CELL, SHARDED)
       for t in ("axolotl", "LLaMA-Factory", "ms-swift", "Unsloth")},
    **{(t, "DeepSpeed"): (NOT_TRIED, ZERO)
       for t in ("axolotl", "LLaMA-Factory", "ms-swift", "Unsloth")},
    ("ms-swift", "packing"): (NO_CELL, "it packs with flash attention alone, which needs a GPU"),
    ("Unsloth", "head"): (NO_CELL, "its CPU backend loads language models alone"),
    ("Unsloth", "fp16 autocast"): (NO_CELL, "its CPU backend turns it into bfloat16"),
    ("Unsloth", "packing"): (NO_CELL, "its CPU backend turns it off"),
    **{("sentence-transformers", f): (
        NO_CELL, "an embedding has no probabilities that a curvature could be of")
       for f in FEATURES},
}  # fmt: skip


class Shown(NamedTuple):
    """A cell that a test shows."""

    trainer: str
    feature: str
    test: str
    refused: bool


class Collector:
    """A plug-in of pytest: the marked tests, their outcomes, and what each was refused with."""

    def __init__(self) -> None:
        self.shown: list[Shown] = []
        self.passed: set[str] = set()
        self.said: dict[str, str] = {}
        self._last = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        kept: list[Any] = []
        left: list[Any] = []
        for item in items:
            found = list(_cells(item))
            self.shown += found
            (kept if found else left).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=left)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        from retain.errors import RetainError

        plain, texts = RetainError.__init__, list[str]()

        def heard(error: RetainError, what: str, **more: Any) -> None:
            texts.append(what)
            plain(error, what, **more)

        RetainError.__init__ = heard  # type: ignore[method-assign, assignment]
        try:
            result = yield
        finally:
            RetainError.__init__ = plain  # type: ignore[method-assign]
        self.passed.add(item.nodeid)
        self.said[item.nodeid] = texts[-1] if texts else ""
        return result


def _cells(item: Any) -> Any:
    inside = item.nodeid.partition("[")[2].removesuffix("]")
    for mark in item.iter_markers("shows"):
        if mark.kwargs.get("only") in (None, inside):
            trainer, *features = mark.args
            for feature in features:
                yield Shown(trainer, feature, item.nodeid, mark.kwargs.get("refused", False))


def collected(*argv: str) -> Collector:
    """What pytest finds with these arguments, run from the project's folder."""
    collector = Collector()
    pytest.main(["-q", "-p", "no:cacheprovider", *argv], plugins=[collector])
    return collector


def keep(name: str, *argv: str) -> None:
    """Adds what passes here to what was kept of this environment."""
    found, path = collected(*argv), KEPT / f"{name}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["passed"] if path.exists() else {}
    passed = {**old, **{test: found.said[test] for test in found.passed}}
    told = {"versions": _versions(name), "passed": dict(sorted(passed.items()))}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path)


def elsewhere(found: Collector) -> list[str]:
    """Adds what passed in other environments; what these have."""
    lines = []
    for path in sorted(KEPT.glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        found.passed |= set(told["passed"])
        found.said = {**told["passed"], **found.said}
        lines.append(f"- {told['versions']}")
    return lines


def page(found: Collector) -> str:
    """The page; raises `SystemExit` where a cell would be blank, or is said in two ways."""
    others = elsewhere(found)
    cells: dict[tuple[str, str], tuple[str, str, str]] = {}
    for shown in found.shown:
        key = shown.trainer, shown.feature
        if shown.test in found.passed:
            test, said = f"`{shown.test}`", found.said[shown.test]
            how = ("refused", f"{said}: {test}") if shown.refused else ("✓", test)
            cells.setdefault(key, ("–" if shown.refused else "✓", *how))
    signs = {NO_CELL: "n/a", NOT_TRIED: "?"}
    for key, (what, why) in DECLARED.items():
        if key not in cells:
            cells[key] = (signs[what], what, why)
    every = [(t, f) for t in TRAINERS for f in FEATURES]
    blank = [key for key in every if key not in cells]
    unknown = [key for key in cells if key not in every]
    if blank or unknown:
        raise SystemExit(f"cells that nothing fills: {blank}; of no trainer or feature: {unknown}")
    lines = [
        "# What works in which trainer", "",
        "Written by `scripts/support_table.py` from the outcomes of the tests that carry its mark; "
        "not to be edited by hand.", "", _versions(), "",
        "axolotl, LLaMA-Factory, ms-swift and Unsloth are the real packages on a CPU, in "
        "environments of their own:", "", *others, "",
        "✓ a test shows it; – it is refused, with one clear error; "
        "? it was not tried; n/a there is nothing to try, or not on a CPU.", "",
        "In the trainers and the plain loop, 4-bit bases, DoRA and full fine-tuning are shown with "
        "the force alone, and fp16 autocast on a CPU, with a gradient scaler that accelerate has "
        "on a GPU alone and is given here; the plain loop gives it to `Retention.step`. FSDP2 runs "
        "in two processes on CPUs (gloo), which accelerate allows on accelerators alone and is "
        "told to here; DeepSpeed is ZeRO-1 or 2 in two processes likewise, and its engine "
        "is refused in a plain loop. "
        "Liger's kernels are a stand-in, a model that is patched as Liger patches one; graphs are "
        "compiled for the backend `eager`. "
        "Unsloth's cells are of its CPU backend, which trains PEFT's own layers; on a GPU its "
        "fused kernels do not call them, and the force alone holds, with its budget and the KL, by "
        "a curvature that was fitted before (`tests/integrations/test_fused.py`, a stand-in for "
        "such kernels).", "",
        "| | " + " | ".join(TRAINERS) + " |", "|---|" + ":-:|" * len(TRAINERS),
        *(f"| {f} | " + " | ".join(cells[t, f][0] for t in TRAINERS) + " |" for f in FEATURES),
    ]  # fmt: skip
    for trainer in TRAINERS:
        lines += ["", f"## {trainer}", "", "| | | |", "|---|---|---|"]
        rows = {feature: " | ".join(cells[trainer, feature][1:]) for feature in FEATURES}
        for told, same in groupby(FEATURES, rows.__getitem__):
            lines.append(f"| {', '.join(same)} | {told} |")
    return "\n".join(lines) + "\n"


def _versions(*package: str) -> str:
    names = (*package, "torch", "transformers", "peft", "trl", "accelerate", "datasets")
    told = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Python {sys.version_info.major}.{sys.version_info.minor}, {told}, on a CPU."


def main() -> None:
    """Runs the marked tests, and writes the page."""
    if sys.argv[1:2] == ["--keep"]:
        return keep(*sys.argv[2:])
    files = [
        p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.shows(" in p.read_text()
    ]
    found = collected(*map(str, files), *sys.argv[1:])
    failed = sorted({s.test for s in found.shown} - found.passed)
    for test in failed:
        print("not passed:", test)
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
