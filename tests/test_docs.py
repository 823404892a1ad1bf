"""Pages that are made from result files say what the files say."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

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
