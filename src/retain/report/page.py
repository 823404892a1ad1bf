"""Writes the report: one self-contained HTML page and two PNG figures beside it."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from retain.files import whole_file
from retain.report import svg
from retain.report.figures import tradeoff_png, training_png
from retain.report.finding import claims_line, finding
from retain.report.scales import number, short
from retain.report.schema import Result, read_result
from retain.report.series import strength_text, tradeoff, tradeoff_csv, training, training_csv
from retain.report.tables import summary_table, sweep_table

__all__ = ["render_html", "write_report"]

_WIDE, _NARROW = (820, 430, 13.5), (356, 340, 12.0)
_HALF, _HALF_NARROW = (480, 330, 13.0), (356, 290, 12.0)


def write_report(result_path: Path, html_path: Path) -> list[Path]:
    """Write the page, `tradeoff.png` and `training.png`, and return their paths.

    Everything is made before anything is written, and each file appears whole or not at all.

    Raises:
        SourceError: the result cannot be read.
        OutputError: a file cannot be written.
    """
    result = read_result(result_path)
    digest = hashlib.sha256(result_path.read_bytes()).hexdigest()
    folder = html_path.parent
    files = {
        html_path: render_html(result, digest).encode(),
        folder / "tradeoff.png": tradeoff_png(result),
        folder / "training.png": training_png(result),
    }
    for path, content in files.items():
        _write(path, content)
    return list(files)


def _write(path: Path, content: bytes) -> None:
    with whole_file(path, "the report") as scratch:
        scratch.write_bytes(content)


def _download(text: str) -> str:
    return "data:text/csv;base64," + b64encode(text.encode()).decode()


def _figure(draw: Any, data: Any, wide: Any, narrow: Any) -> Markup | None:
    """A figure in two shapes; CSS shows the one that suits the screen."""
    big, small = draw(data, *wide), draw(data, *narrow)
    if big is None:
        return None
    return Markup(f'<div class="wide">{big}</div><div class="narrow">{small}</div>')


def _generations(result: Result) -> list[dict[str, Any]]:
    """For each prompt that a model answered, the answers side by side."""
    rows = result.main_rows
    prompts = list(dict.fromkeys(g.prompt for row in rows for g in row.generations))
    out = []
    for prompt in prompts:
        cards = []
        for row in rows:
            text = next((g.text for g in row.generations if g.prompt == prompt), None)
            held = f", strength {strength_text(row)}" if row.role == "retain" else ""
            cards.append({"role": row.role, "label": row.label + held, "text": text})
        out.append({"prompt": prompt, "cards": cards})
    return out


def _join(*parts: str | None) -> str | None:
    known = [part for part in parts if part]
    return ", ".join(known) or None


def _count(value: int | None, unit: str) -> str | None:
    return None if value is None else f"{value:,} {unit}".replace(",", "\u202f")


def _made(result: Result, digest: str) -> list[tuple[str, str]]:
    """How it was made, as name and value; what is not known is left out."""
    model, task, source = result.model, result.task, result.source
    facts: list[tuple[str, str | None]] = [
        (
            "Model",
            _join(
                model.name,
                _count(model.parameters, "parameters"),
                _count(model.trainable, "trained"),
                model.dtype,
            ),
        ),
        (
            "Task",
            _join(
                task.name,
                _count(task.train, "to train on"),
                _count(task.test, "to test on"),
                task.metric and task.metric.replace("_", " "),
            ),
        ),
    ]
    if source:
        fit = _count(source.fit_tokens, "tokens for the curvature")
        heldout = _count(source.heldout_tokens, "held-out tokens for KL, perplexity and flips")
        facts.append(("Source text", _join(source.name, fit, heldout)))
    if curve := result.curvature:
        facts.append(
            (
                "Curvature",
                _join(
                    curve.structure,
                    curve.space and f"{curve.space} space",
                    curve.fisher and f"{curve.fisher} Fisher",
                    _count(curve.tokens, "tokens"),
                    None if curve.seconds is None else f"{number(curve.seconds)} s",
                    None if curve.size is None else f"{number(curve.size / 2**20)} MiB",
                ),
            )
        )
    if train := (result.chosen.train if result.chosen else None):
        peak = train.peak_memory_mib
        facts.append(
            (
                "Training",
                _join(
                    _count(train.steps, "steps"),
                    _count(train.examples, "examples"),
                    None if peak is None else f"{peak:.0f} MiB peak memory",
                ),
            )
        )
    if box := result.hardware:
        memory = None if box.memory_gib is None else f"{box.memory_gib:g} GiB memory"
        facts.append(
            (
                "Hardware",
                _join(box.cpu, _count(box.cores, "cores"), memory, box.accelerator or "no GPU"),
            )
        )
    facts += [
        ("Seed", None if result.seed is None else str(result.seed)),
        ("Versions", _join(*(f"{k} {v}" for k, v in result.versions.items() if v))),
        ("Commit", result.commit),
        ("Created", result.created),
        ("result.json", f"sha256 {digest}"),
    ]
    return [(name, value) for name, value in facts if value]


def render_html(result: Result, digest: str) -> str:
    """The page as text; `digest` is the SHA-256 of the result file."""
    files = resources.files("retain.report")
    names = ("template.html.j2", "style.css")
    sources = {name: files.joinpath(name).read_text(encoding="utf-8") for name in names}
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    runs = training(result)
    return environment.get_template("template.html.j2").render(
        result=result,
        style=Markup(sources["style.css"]),
        finding=finding(result),
        claims_line=claims_line(result),
        summary=summary_table(result),
        sweep=sweep_table(result),
        tradeoff=_figure(svg.tradeoff_svg, tradeoff(result), _WIDE, _NARROW),
        loss=_figure(svg.loss_svg, runs, _HALF, _HALF_NARROW),
        kl=_figure(svg.kl_svg, runs, _HALF, _HALF_NARROW),
        generations=_generations(result),
        made=_made(result, digest),
        tradeoff_csv=_download(tradeoff_csv(result)),
        training_csv=_download(training_csv(result)),
    )
