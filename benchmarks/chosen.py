"""A comparison with the settings that its choosing study found, written before any test row is read.

    python benchmarks/chosen.py runs/protocol-minilm-choose benchmarks/studies/protocol-minilm-open.yaml --out chosen.yaml

Each method gets the learning rate that has the highest mean `average` on validation rows
(`retain.evaluation.matched.choose`), over the seeds in which all settings have ended. Of the
variants of the recipe that was best is the recipe of the comparison, and the one that its parts are
left out of; the default stays beside it. What was not searched has the rate of LoRA with a fitted head.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from retain.evaluation.matched import Choice, Family, Setting, choose, families, named
from retain.records import RunRecord, RunSpec
from retain.study.work import read_record

DEFAULT, BEST = "auto", "best"
"""The recipe as it ships, and the label of its best variant in the comparison."""

SEARCHED = {"mlp-fitted": "mlp fitted"}
"""Where a label of the comparison is not ``lora LABEL`` in the choosing study."""

LIKE_FITTED = ("wide-fitted", "replay", "joint")


def whole_seeds(records: list[RunRecord]) -> list[RunRecord]:
    """The runs of those seeds that have as many as any seed has.

    Raises:
        SystemExit: no run has ended.
    """
    count = Counter(r.seed for r in records if r.done)
    if not count:
        raise SystemExit("no run of the choosing study has ended")
    return [r for r in records if r.done and count[r.seed] == max(count.values())]


def settled(template: dict[str, Any], records: list[RunRecord]) -> tuple[dict[str, Any], list[str]]:
    """The study of the comparison, and a line on each choice."""
    found = families(records)
    variants = [f.method for f in found if _config(f.settings[0]).method.kind == "auto"]
    best = {name: _best(found, f"lora {name}") for name in variants}
    winner = max(best, key=lambda name: best[name].means["average"] or 0.0)
    gain = _config(best[winner].setting).method.options["gain"]
    said = [_line(choice) for choice in best.values()]
    template["name"] = template["name"].removesuffix("-open")
    if winner == DEFAULT:
        del template["methods"][BEST]
        for cell in template["runs"]:
            if BEST in cell.get("methods", ()):
                cell["methods"].remove(BEST)
    for label, method in template["methods"].items():
        kind = method.get("kind", label)
        if label == DEFAULT:
            choice = best[DEFAULT]
        elif kind == "auto":
            choice = best[winner]
            method["gain"] = gain
        else:
            name = "lora fitted" if label in LIKE_FITTED else SEARCHED.get(label, f"lora {label}")
            choice = _best(found, name)
            if label not in LIKE_FITTED:
                said.append(_line(choice))
        rate = choice.numbers["learning_rate"]
        method["training"] = method.get("training", {}) | {"learning_rate": rate}
    return template, said


def _config(setting: Setting) -> RunSpec:
    """Of its first run; those of other seeds have the same method and training."""
    return next(iter(setting.runs.values())).config


def _best(found: list[Family], name: str) -> Choice:
    choice = choose(named(found, name))
    if choice is None:
        raise SystemExit(f"{name} has no average in a seed that all settings have")
    return choice


def _line(choice: Choice) -> str:
    score, end = choice.means["average"] or 0.0, choice.ends.get("learning_rate")
    told = f"{100 * score:.1f}" + (f", the {end} learning_rate" if end else "")
    return f"{choice.family.name}: {choice.numbers['learning_rate']:g} of {choice.tried} ({told})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("choosing", type=Path, help="the folder of the choosing study")
    parser.add_argument("template", type=Path, help="the study of the comparison")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    files = sorted((given.choosing / "runs").glob("*.json"))
    records = whole_seeds([r for file in files if (r := read_record(file)) is not None])
    study, said = settled(yaml.safe_load(given.template.read_text()), records)
    seeds = sorted({r.seed or 0 for r in records})
    head = [f"Settings chosen on validation rows, seeds {', '.join(map(str, seeds))}:", *said]
    text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(
        study, sort_keys=False, width=100
    )
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
