"""The demo: one model learns one task with and without retention, and what each forgot.

Every stage leaves a file, so an interrupted demo goes on where it stopped. A stage is done
again when the settings that it depends on have changed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from retain.config import validate
from retain.curvature.curvature import Curvature, load_curvature
from retain.curvature.fit.fit import fit_curvature
from retain.data.batches import Example
from retain.data.problems import Problem, problem_examples, word_problems
from retain.data.sources import encode
from retain.documents import read_json
from retain.errors import CurvatureError
from retain.evaluation.forgetting import Reference
from retain.files import check_folder, write_json
from retain.models.generating import sample_rows
from retain.models.load import load_model
from retain.models.lora import attach_lora, share_trainable
from retain.models.saved import save_adapter
from retain.models.sites import lora_sites
from retain.provenance import provenance
from retain.study.claims import summary
from retain.study.demo_config import QUICK, DemoConfig
from retain.study.demo_measures import Measures
from retain.training.loop import TrainResult, train
from retain.training.start import AUTO

__all__ = ["run_demo"]


def run_demo(
    out: Path,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
    verbose: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Runs the demo and writes ``result.json`` and an adapter for each run under `out`.

    Args:
        out: folder of everything that is written.
        seed: of data order, label draws and adapter start.
        quick: the small settings of `QUICK`.
        progress: show bars.
        verbose: say which stage has begun, on standard error.
        **changes: settings of `DemoConfig` to change.

    Returns:
        What ``result.json`` holds.

    Raises:
        OutputError: `out` cannot be written.
    """
    out = check_folder(out)
    config = validate((QUICK if quick else {}) | {"seed": seed} | changes, DemoConfig)
    result = _Demo(out, config, progress, verbose).run()
    write_json(out / "result.json", result)
    return result


class _Demo:
    def __init__(self, out: Path, config: DemoConfig, progress: bool, verbose: bool) -> None:
        self.out, self.config, self.progress = out, config, progress
        self.console = Console(stderr=True, quiet=not verbose)
        self.commit = provenance(config.seed)["commit"]
        self.tests: list[Problem] = word_problems(
            "test", config.problems, config.seed, config.largest
        )

    def run(self) -> dict[str, Any]:
        c = self.config
        start = time.perf_counter()
        self._say(f"loading {c.model}")
        base, self.tokenizer, _ = load_model(c.model, dtype=c.dtype)
        self.model = attach_lora(
            base, rank=c.adapter.rank, alpha=c.adapter.alpha, targets=c.adapter.targets, seed=c.seed
        )
        self.start = [(s.a.detach().clone(), s.b.detach().clone()) for s in lora_sites(self.model)]
        fit_rows = self._sample("source", c.source_rows, 2 * c.seed + 1)
        held_rows = self._sample("heldout", c.heldout_rows, 2 * c.seed + 2)
        curvature, seconds = self._curvature(fit_rows)
        size = {"max_length": c.source_length, "causal": True}
        held = encode(held_rows, self.tokenizer, **size)  # type: ignore[arg-type]
        self._held = held
        self._measures = Measures(
            self.model, self.tokenizer, c, self.tests, held, progress=self.progress
        )
        data = problem_examples(
            self.tokenizer, word_problems("train", c.examples, c.seed, c.largest), c.max_length
        )
        rows = [self._row("base", None, None, None)]
        for strength in (0.0, *c.strengths):
            rows.append(self._row(_name(strength), strength, curvature, data))
        trainable, total = share_trainable(self.model)
        for row in rows:
            row["probe"]["lost"] = rows[0]["probe"]["accuracy"] - row["probe"]["accuracy"]
        self._say(f"done in {time.perf_counter() - start:.0f} s")
        return {
            "schema": "retain.result/1",
            "kind": "demo",
            **provenance(c.seed),
            "config": c.model_dump(mode="json"),
            "model": {
                "name": c.model,
                "parameters": total - trainable,
                "trainable": trainable,
                "dtype": c.dtype,
            },
            "task": {
                "name": "word-problems",
                "train": len(data),
                "test": len(self.tests),
                "metric": "exact_match",
            },
            "source": {
                "name": "self",
                "fit_tokens": curvature.info.tokens,
                "heldout_tokens": sum(e.predictions for e in held),
            },
            "curvature": {
                "structure": curvature.info.structure,
                "space": curvature.info.space,
                "fisher": curvature.info.fisher,
                "tokens": curvature.info.tokens,
                "seconds": seconds,
                "bytes": curvature.memory(),
                "error": curvature.info.error,
            },
            "rows": rows,
            "summary": summary(rows, c.chosen),
        }

    def _say(self, text: str) -> None:
        self.console.print(f"[bold]retain demo[/bold] {text}")

    def _key(self, *parts: object) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _sample(self, name: str, count: int, seed: int) -> list[dict[str, Any]]:
        """Text that the base model samples, kept in a file."""
        c, path = self.config, self.out / "source" / f"{name}.json"
        key = self._key(c.model, c.dtype, count, c.source_length, seed)
        kept = _read(path)
        if kept and kept["key"] == key:
            return list(kept["rows"])
        self._say(f"the model writes {count} texts of its own ({name})")
        rows = sample_rows(
            self.model,
            self.tokenizer,
            count=count,
            max_length=c.source_length,
            seed=seed,
            progress=self.progress,
        )
        text = [self.tokenizer.decode(r["input_ids"]) for r in rows]
        write_json(path, {"key": key, "rows": rows, "text": text})
        return rows

    def _curvature(self, rows: Sequence[dict[str, Any]]) -> tuple[Curvature, float]:
        c, path = self.config, self.out / "curvature.safetensors"
        note = self._key(rows, c.seed, c.structure)
        kept = _read(self.out / "source" / "curvature.json")
        if kept and kept["key"] == note and path.exists():
            try:
                curvature = load_curvature(path)
                curvature.bind(self.model)
                return curvature, float(kept["seconds"])
            except CurvatureError as error:
                self._say(f"the kept curvature is not used ({error.what})")
        self._say("measuring the curvature on them")
        start = time.perf_counter()
        curvature = fit_curvature(
            self.model,
            rows,
            c.structure,
            tokenizer=self.tokenizer,
            rows=c.source_rows,
            max_length=c.source_length,
            seed=c.seed,
            progress=self.progress,
        )
        seconds = time.perf_counter() - start
        curvature.save(path)
        write_json(self.out / "source" / "curvature.json", {"key": note, "seconds": seconds})
        return curvature, seconds

    def _row(
        self,
        name: str,
        strength: float | None,
        curvature: Curvature | None,
        data: Sequence[Example] | None,
    ) -> dict[str, Any]:
        """One row of the table: trained (unless it is the base) and measured, or read back."""
        c, path = self.config, self.out / "rows" / f"{name}.json"
        settings = c.model_dump(exclude={"strengths", "chosen"})
        key = self._key(settings, strength, self.commit)
        kept = _read(path)
        label = _label(strength)
        if kept and kept["key"] == key:
            row: dict[str, Any] = kept["row"]
        else:
            self._say(f"{name}: " + ("measuring" if data is None else "training and measuring"))
            self._restart()
            result = None if data is None else self._train(strength or 0.0, curvature, data)
            row = self._measures.row(result)
            if result is not None:
                save_adapter(self.model, self.out / "adapters" / name, c.model)
            write_json(path, {"key": key, "row": row})
        method = None if strength is None else ("laplace" if strength else "none")
        chosen = strength == c.chosen
        head = {
            "name": name,
            "label": label,
            "method": method,
            "strength": strength,
            "chosen": chosen,
        }
        return head | row

    def _restart(self) -> None:
        """Puts the adapter back to its first state."""
        with torch.no_grad():
            for site, (a, b) in zip(lora_sites(self.model), self.start, strict=True):
                site.a.copy_(a)
                site.b.copy_(b)

    def _train(
        self, strength: float, curvature: Curvature | None, data: Sequence[Example]
    ) -> TrainResult:
        c = self.config
        few = Reference(self.model, self._held[:8], batch_size=8)

        def kl(model: nn.Module) -> float:
            return few.measure(model).kl

        return train(
            self.model,
            data,
            c,
            curvature=curvature,
            strength=strength,
            start=AUTO,
            measure=kl,
            measure_every=c.measure_every,
            progress=self.progress,
        )


def _name(strength: float) -> str:
    return f"retain-{strength:g}" if strength else "lora"


def _label(strength: float | None) -> str:
    if strength is None:
        return "base model"
    return "LoRA + retention" if strength else "LoRA"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
