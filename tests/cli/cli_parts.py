"""What the tests of the command line share: models and rows on disk, and what a command left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tiny import save_tiny

SHORT = ["--batch-size", "4", "--learning-rate", "0.02", "--dtype", "float32", "--rank", "4"]
SHORT += ["--strength", "10"]
TEXT = "the cat sat on a mat and dog ran to big red house while small bird sang old song"
WORDS = TEXT.split()


def save_model(folder: Path, seed: int = 0, spoil: bool = False) -> Path:
    """Writes a random Llama of two layers, with a weight that is NaN if `spoil`."""
    save_tiny(folder, seed, intermediate_size=32, max_position_embeddings=512)
    if spoil:
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Writes rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def told(path: Path) -> Any:
    """What a JSON file says."""
    return json.loads(path.read_text(encoding="utf-8"))


def adapter(run: Path) -> Any:
    """The tensors of a run's adapter, by name."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


@dataclass
class Outcome:
    """What a run of the command line left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        assert self.err == ""
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    def refused(self, *said: str) -> None:
        """Checks the one line of a refusal: what was got, what is allowed, how to mend it."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.err.startswith("retain: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        assert "Traceback" not in self.err
        for part in ("; got: ", "; allowed: ", "; fix: ", *said):
            assert part in self.err, (part, self.err)

    def done(self) -> Outcome:
        """Checks that it ended well."""
        assert self.code == 0, self.err
        return self


Run = Callable[..., Outcome]
