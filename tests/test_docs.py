"""Pages that are made from result files say what the files say."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import retain
from retain.records import StudyRecord
from retain.report.cells import groups

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["predicted_kl", "overhead"])
def test_a_page_is_made_from_its_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(name)
    result = json.loads(module.RESULT.read_text(encoding="utf-8"))
    assert module.PAGE.read_text(encoding="utf-8") == module.page(result)


@pytest.mark.real
@pytest.mark.parametrize("page", ["docs/curvature.md", "docs/soften.md"])
def test_the_example_of_a_page_runs(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(code, page, "exec"), {})


MEASURED = {
    "Four tasks in a row, SmolLM2-135M": ("four-task-rows", ("average", "forgetting", "kl")),
    "Fourteen tasks in a row, MiniLM-22M": ("fourteen-minilm-recipe", ("average", "forgetting")),
}
"""The rows of the README's table: the study's folder, and what is shown of it."""


def test_the_readme_s_table_is_what_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, (folder, metrics) in MEASURED.items():
        for metric in metrics:
            assert _line(name, folder, metric) in readme
    assert len(readme.splitlines()) <= 150


def _line(name: str, folder: str, metric: str) -> str:
    """One row: plain LoRA, the recipe, and the paired difference with its 95 % interval."""
    path = ROOT / "benchmarks" / "results" / folder / "study.json"
    found = groups([StudyRecord.model_validate_json(path.read_text(encoding="utf-8"))])
    cells = max(found, key=lambda group: group.length).cells
    plain = next(c for c in cells if c.plain)
    recipe = next(c for c in cells if c.label == "auto")
    assert plain.seeds == recipe.seeds == 3
    what = {"average": "final average, %", "forgetting": "forgetting, points",
            "kl": "KL to the base, nats per token"}[metric]  # fmt: skip
    scale, digits = (1, 3) if metric == "kl" else (100, 1)
    means = [cell.mean(metric) for cell in (plain, recipe)]
    gap = recipe.diffs[metric]
    assert gap is not None and gap.high is not None
    values = [f"{scale * value.mean:.{digits}f}" for value in means if value is not None]
    spread = f"{scale * gap.mean:+.{digits}f} ± {scale * (gap.high - gap.mean):.{digits}f}"
    return f"| {name}: {what} | {' | '.join(values)} | {spread.replace('-', '−')} |"


def test_the_site_is_built(tmp_path: Path) -> None:
    """Strictly: no link or name that leads nowhere; and it asks no other host for a file."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [*tmp_path.rglob("*.html")]
    assert {"index.html", "faq.html", "options.html", "five-minutes.html"} <= {
        p.name for p in pages
    }
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//", text), page
        assert not re.findall(r"<link[^>]+rel=\"?stylesheet[^>]+href=\"?(?:https?:)?//", text), page
    assert "retain.fit_curvature" in (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "--factor-rank" in (tmp_path / "options.html").read_text(encoding="utf-8")


def test_the_picture_of_the_architecture_is_of_its_diagram() -> None:
    """Where this fails: draw the block with mermaid again (htmlLabels off), and put it there."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", page, flags=re.DOTALL)
    picture = re.sub(r"<style>.*?</style>", "", picture, flags=re.DOTALL)
    drawn = set(re.sub(r"<[^>]+>", " ", picture).split())
    for label in re.findall(r"\[(.*?)\]", diagram):
        assert set(label.split()) <= drawn, label
    assert picture.count("flowchart-link") == diagram.count("-->")


def test_retention_enters_the_loop_of_peft_s_comparison(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that calls what PEFT's run.py calls, by the same names and in its order."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("peft_comparison")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    data = [{"input_ids": tokenizer(f"{i} + {i} is {2 * i}")["input_ids"]} for i in range(12)]

    def moved(strength: float) -> float:
        model = retain.attach_lora(retain.load_model(tiny_folder).model, rank=2)

        def train(*, model: Any, tokenizer: Any, max_steps: int, use_amp: bool) -> None:
            optimizer, _ = run.get_optimizer_and_scheduler(model)
            for _, row in zip(range(max_steps), run.BucketIterator(data), strict=False):
                optimizer.zero_grad()
                ids = torch.tensor([row["input_ids"]])
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()

        def optimizer_of(model: Any) -> Any:
            weights = [p for p in model.parameters() if p.requires_grad]
            return torch.optim.AdamW(weights, lr=0.01), None

        run = SimpleNamespace(
            train=train, BucketIterator=iter, get_optimizer_and_scheduler=optimizer_of
        )
        module.hold(run, strength, rows=8)
        run.train(model=model, tokenizer=tokenizer, max_steps=8, use_amp=False)
        return retain.measure_forgetting(model, [{"text": "A red house."}] * 8).kl

    assert 0 <= moved(1e8) < 0.5 * moved(0.0)


def test_the_notebook_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / "five-minutes.ipynb", as_version=4)
    for name, value in {
        "RETAIN_MODEL": tiny_folder, "RETAIN_STEPS": 2, "PYTHONPATH": ROOT / "src",
        "JUPYTER_PLATFORM_DIRS": 1,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    for cell in notebook.cells:  # what the model writes takes the time
        cell.source = cell.source.replace("rows=32", "rows=8, max_length=24")
    client = nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    printed = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    assert "adapter_model.safetensors" in printed
    values = re.findall(r"KL to the base (\S+)", printed)
    assert len(values) == 2 and all(float(value) >= 0 for value in values)
