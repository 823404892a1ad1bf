"""PEFT's method comparison on MetaMathQA, with retention in its loop. Not run here: it needs a GPU and a hub.

    python benchmarks/peft_comparison.py peft/method_comparison/MetaMathQA [--strength 10] [--rows 64]

The folder is that of a checkout of https://github.com/huggingface/peft, which is also what is installed (pip install -e).
Its run.py does all the work, with its LoRA of rank 32 and its default settings; three of the names that it calls are
replaced: `train` (fits a curvature on text of the model's own first), `BucketIterator` (made when the rows are there: the
recipe begins) and `get_optimizer_and_scheduler` (each step is `retention.step`). The result lies where PEFT's others do.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import retain

PLAIN = "experiments/lora/llama-3.2-3B-rank32"


class Held:
    """The loop's optimiser: its step is the recipe's. After the last one the model is let go."""

    def __init__(self, optimizer: Any, steps: int) -> None:
        self.optimizer, self.left = optimizer, steps
        self.retention: retain.Retention | None = None

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        assert self.retention is not None, "PEFT's loop has changed: it steps before it reads rows"
        self.retention.step(self.optimizer)
        self.left -= 1
        if not self.left:
            self.retention.finish()


def hold(run: Any, strength: float, rows: int) -> None:
    """Replaces the three names in PEFT's module `run`."""
    train, iterator, optimizer_of = run.train, run.BucketIterator, run.get_optimizer_and_scheduler

    def held_train(
        *, model: Any, tokenizer: Any, max_steps: int, use_amp: bool, **more: Any
    ) -> Any:
        if use_amp:
            raise SystemExit(
                "with use_amp the gradients are scaled when the force is added: leave it off"
            )
        curvature = retain.fit_curvature(model, "self", tokenizer=tokenizer, rows=rows)
        held: list[Held] = []

        def held_optimizer(*given: Any, **options: Any) -> tuple[Held, Any]:
            optimizer, schedule = optimizer_of(*given, **options)
            held.append(Held(optimizer, max_steps))
            return held[-1], schedule

        def held_iterator(data: Any, **options: Any) -> Any:
            loader = DataLoader(data, collate_fn=functools.partial(_row, tokenizer.eos_token_id))
            held[-1].retention = retain.Retention(model, curvature, strength, rows=loader)
            return iterator(data, **options)

        run.get_optimizer_and_scheduler, run.BucketIterator = held_optimizer, held_iterator
        return train(model=model, tokenizer=tokenizer, max_steps=max_steps, use_amp=use_amp, **more)

    run.train = held_train


def _row(end: int, items: list[Any]) -> dict[str, torch.Tensor]:
    """One row as the loop trains on it, with its end."""
    ids = torch.tensor([[*items[0]["input_ids"], end]])
    return {"input_ids": ids, "labels": ids}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "folder", type=Path, help="method_comparison/MetaMathQA of a checkout of PEFT"
    )
    parser.add_argument("--strength", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=64, help="of the model's own text")
    options = parser.parse_args()
    os.chdir(options.folder)
    path = f"{PLAIN}-retain" + (f"-{options.strength:g}" if options.strength != 10 else "")
    Path(path).mkdir(exist_ok=True)
    shutil.copy(f"{PLAIN}/adapter_config.json", path)
    sys.path.insert(0, str(Path.cwd()))
    run: Any = importlib.import_module("run")
    run.print_verbose = functools.partial(print, file=sys.stderr)  # what run.py sets as a script
    hold(run, options.strength, options.rows)
    name = run.validate_experiment_path(path)
    run.main(path_experiment=path, experiment_name=name, clean=False, bucket_name=None)


if __name__ == "__main__":
    main()
