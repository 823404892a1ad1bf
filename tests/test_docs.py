"""Pages that are made from result files say what the files say."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from retain.records import StudyRecord
from retain.report.cells import groups

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_predicted_kl_is_made_from_its_result() -> None:
    path = ROOT / "benchmarks" / "predicted_kl.py"
    spec = importlib.util.spec_from_file_location("predicted_kl", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = json.loads(module.RESULT.read_text(encoding="utf-8"))
    assert module.PAGE.read_text(encoding="utf-8") == module.page(result)


def test_the_page_of_overhead_is_made_from_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("overhead")
    result = json.loads(module.RESULT.read_text(encoding="utf-8"))
    assert module.PAGE.read_text(encoding="utf-8") == module.page(result)


@pytest.mark.real
@pytest.mark.parametrize("page", ["docs/curvature.md", "docs/soften.md"])
def test_the_example_of_a_page_runs(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(code, page, "exec"), {})


def test_the_readme_shows_the_demo_s_result() -> None:
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {r["name"]: r for r in result["rows"]}
    shown = [rows["base"], rows["lora"], next(r for r in rows.values() if r["chosen"])]
    for text in (
        " | ".join(f"{100 * r['target']['exact_match']:.1f} %" for r in shown),
        " | ".join(f"{100 * r['probe']['accuracy']:.1f} %" for r in shown),
        f"{shown[1]['forgetting']['kl']:.3f} | **{shown[2]['forgetting']['kl']:.3f}**",
    ):
        assert text in readme, text


def _row(text: str, name: str, columns: int) -> list[str]:
    """The values of the one row with a name and so many of them."""
    found = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    values = [row.replace("*", "").split("|")[2:-1] for row in found]
    (row,) = (value for value in values if len(value) == columns)
    return row


def test_the_readme_shows_the_encoders_fourteen_tasks_as_measured() -> None:
    path = ROOT / "benchmarks" / "results" / "fourteen-minilm-heads" / "study.json"
    found = groups([StudyRecord.model_validate_json(path.read_text(encoding="utf-8"))])
    cells = next(group for group in found if group.length == 14).cells
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {"LoRA": "none", "LoRA with a fitted head": "fitted", "**recipe**": "auto"}
    for name, label in rows.items():
        (cell,) = (c for c in cells if c.label == label)
        assert cell.seeds == 3
        means = [cell.mean(m) for m in ("average", "learning", "forgetting")]
        said = [f"{100 * value.mean:.1f}" for value in means if value is not None]
        assert _row(readme, name, 3) == [f" {value} " for value in said]


def test_the_readme_shows_the_four_tasks_as_measured() -> None:
    """Every row of its table but the paired difference, which docs/results.md has."""
    path = ROOT / "benchmarks" / "results" / "four-task" / "study.json"
    cells = groups([StudyRecord.model_validate_json(path.read_text(encoding="utf-8"))])[0].cells
    rows = {
        "LoRA": ("lora", "none"),
        "**recipe**": ("lora-8", "auto"),
        "replay of the model's own samples": ("lora", "self_replay"),
        "K-FAC alone, with a budget": ("lora", "kfac"),
        "O-LoRA": ("lora-8", "olora"),
        "full fine-tuning": ("full", "none"),
        "prefix tuning": ("prefix", "none"),
        "bottleneck adapters": ("bottleneck", "none"),
        "replay, which stores data": ("lora", "replay"),
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, key in rows.items():
        (cell,) = (c for c in cells if (c.adapter, c.label) == key)
        assert cell.seeds == 3
        means = [cell.mean(m) for m in ("average", "learning", "forgetting", "kl")]
        known = [found.mean for found in means if found is not None]
        said = [*(f"{100 * value:.1f}" for value in known[:3]), f"{known[3]:.3f}"]
        assert _row(readme, name, 4) == [f" {value} " for value in said]
