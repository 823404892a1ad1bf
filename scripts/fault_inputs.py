"""What `faults.py` works on: a tiny random model, its data, and the commands that read them.

All paths are relative to the folder of a trial, so that records of any two trials are comparable.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT = "the cat sat on a mat and dog ran to big red house while small bird sang old song"
WORDS = TEXT.split()
FORMATS = ("jsonl", "csv", "parquet", "txt")

TASK = """\
# Which of two letters comes.
description: which of two letters comes
local: {name}
kind: choice
prompt: "{{{{ text }}}}:"
options: ["{first}", "{second}"]
gold: label
"""

TRAIN: dict[str, Any] = {
    "model": "model",
    "dtype": "float32",
    "data": "rows.jsonl",
    "out": "run",
    "curvature": "curvature.safetensors",
    "strength": 10.0,
    "keep_state": True,
    "adapter": {"rank": 2},
    "training": {
        "batch_size": 4, "learning_rate": 0.02, "epochs": 2, "max_length": 24, "save_steps": 2,
    },
}  # fmt: skip

STUDY: dict[str, Any] = {
    "name": "tiny",
    "model": "model",
    "seeds": [0],
    "orders": {"two": ["tasks/one.yaml", "tasks/two.yaml"]},
    "adapters": {"lora": {"rank": 2}},
    "methods": {"none": {}, "kfac": {"strength": 100.0, "rows": 8}},
    "training": {"learning_rate": 0.02, "batch_size": 4, "pad_multiple": 1},
    "source": {
        "kind": "file", "path": "source.jsonl", "rows": 8, "heldout": 4, "max_length": 24,
    },
}  # fmt: skip


def _train(folder: Path, out: str, *argv: str) -> list[str]:
    again = ["--resume"] if (folder / out / "run.json").exists() else []
    return ["train", *argv, "--out", out, "--quiet", *again]


def _study(folder: Path) -> list[str]:
    argv = ["study", "study.yaml", "--out", "out", "--data-dir", "data", "--threads", "1"]
    return [*argv, "--quiet"]


@dataclass(frozen=True)
class Job:
    """A command on some inputs.

    Attributes:
        name: of the job.
        base: the folder of inputs that it starts from, a name in `BASES`.
        argv: its arguments, from the folder as it is: ``--resume`` where there is a run.
        outputs: what it leaves, by name in the folder.
        targets: (family, path) of the files that may be damaged before it.
        killed: whether it is also killed.
    """

    name: str
    base: str
    argv: Callable[[Path], list[str]]
    outputs: tuple[str, ...]
    targets: tuple[tuple[str, str], ...] = ()
    killed: bool = False


_RUN = (
    ("adapter", "run/adapter/adapter_model.safetensors"),
    ("adapter", "run/adapter/adapter_config.json"),
)
_STATE = (
    ("state", "run/state/state.json"),
    ("state", "run/state/past.safetensors"),
    ("state", "run/state/source.safetensors"),
    ("record", "run/run.json"),
)
_CHECKPOINT = tuple(
    ("checkpoint", f"run/checkpoints/*/{name}")
    for name in (
        "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt",
        "rng_state.pth", "trainer_state.json", "retention.json", "training_args.bin", "*.json",
    )
)  # fmt: skip

JOBS = {
    job.name: job
    for job in (
        Job(
            "fit", "begun",
            lambda folder: ["fit", "model", "source.jsonl", "-o", "curvature.safetensors", "--rows",
                            "24", "--batch-size", "2", "--max-length", "24", "--save-every", "0",
                            "--quiet"],
            ("curvature.safetensors",), (("rows", "source.jsonl"),), True,
        ),
        Job(
            "train", "fitted", lambda folder: _train(folder, "run", "--config", "train.yaml"),
            ("run",),
            (("config", "train.yaml"), ("rows", "rows.jsonl"),
             ("curvature", "curvature.safetensors")),
            True,
        ),
        Job(
            "resume", "stopped", lambda folder: _train(folder, "run", "--config", "train.yaml"),
            ("run",), (*_CHECKPOINT, ("record", "run/run.json"), ("config", "train.yaml")),
        ),
        Job(
            "study", "begun", _study, ("out",),
            (("config", "study.yaml"), ("config", "tasks/one.yaml"),
             ("rows", "data/one/train.jsonl"), ("rows", "data/two/validation.jsonl"),
             ("rows", "source.jsonl")),
            True,
        ),
        Job(
            "study again", "studied", _study, ("out",),
            (("record", "out/runs/*.json"), ("record", "out/study.json"),
             ("record", "out/untrained/*.json")),
        ),
        Job(
            "study on", "half", _study, ("out",),
            (("state", "out/state/*/state.json"), ("state", "out/state/*/*.safetensors"),
             ("record", "out/untrained/*.json")),
        ),
        Job(
            "soften", "trained",
            lambda folder: ["soften", "run/adapter", "--curvature", "curvature.safetensors",
                            "--budget", "0.01", "--out", "soft", "--quiet"],
            ("soft",), (*_RUN, ("curvature", "curvature.safetensors")), True,
        ),
        Job(
            "continue", "trained",
            lambda folder: _train(folder, "next", "--continue-from", "run", "--data", "more.jsonl",
                                  "--batch-size", "4", "--save-steps", "2", "--epochs", "2"),
            ("next",), (*_RUN, *_STATE, ("rows", "more.jsonl")), True,
        ),
        *(
            Job(
                f"rows {kind}", "begun",
                lambda folder, kind=kind: [  # type: ignore[misc]
                    "train", "--model", "model", "--data", f"rows.{kind}", "--method", "none",
                    "--dtype", "float32", "--rank", "2", "--max-steps", "2", "--batch-size", "4",
                    "--max-length", "24", "--out", "plain", "--quiet"],
                ("plain",), (("rows", f"rows.{kind}"),),
            )
            for kind in FORMATS
        ),
    )
}  # fmt: skip

BASES: dict[str, tuple[str, str | None]] = {
    "begun": ("", None),
    "fitted": ("begun", "fit"),
    "trained": ("fitted", "train"),
    "stopped": ("trained", None),
    "studied": ("begun", "study"),
    "half": ("begun", None),
}
"""Folder of inputs -> the one that it is a copy of, and the job that was done in it."""


def write_inputs(folder: Path, seed: int) -> None:
    """The model and all data."""
    import pyarrow
    import pyarrow.parquet
    import yaml

    folder.mkdir(parents=True)
    write_model(folder / "model", seed)
    draw = random.Random(seed)
    rows = [
        {"prompt": f"{draw.choice(WORDS)} {i}:", "completion": f" {draw.choice(WORDS)}"}
        for i in range(24)
    ]
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "more.jsonl", [{**row, "completion": " no"} for row in rows[:16]])
    cells = [f'"{row["prompt"]}","{row["completion"]}"' for row in rows]
    (folder / "rows.csv").write_text("\n".join(["prompt,completion", *cells]) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    texts = [" ".join(draw.choice(WORDS) for _ in range(8)) for _ in range(32)]
    (folder / "rows.txt").write_text("\n\n".join(texts) + "\n")
    write_lines(folder / "source.jsonl", [{"text": text} for text in texts])
    for place, (name, pair) in enumerate({"one": "ab", "two": "cd"}.items()):
        path = folder / "tasks" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(TASK.format(name=name, first=pair[0], second=pair[1]))
        for split, count in (("train", 12), ("validation", 8)):
            lines = [
                {"text": f"{'xyz'[(i + place) % 3]}{i % 4}", "label": (i + place) % 2}
                for i in range(count)
            ]
            write_lines(folder / "data" / name / f"{split}.jsonl", lines)
    for name, settings in (("train.yaml", TRAIN), ("study.yaml", STUDY)):
        (folder / name).write_text(yaml.safe_dump(settings, sort_keys=False))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, seed: int) -> None:
    """A random Llama of two layers with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def stop(folder: Path) -> None:
    """Makes of a finished run one that was stopped after its last checkpoint but one."""
    checkpoints = sorted(
        (folder / "run" / "checkpoints").glob("checkpoint-*"),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    shutil.rmtree(checkpoints[-1])
    for name in ("adapter", "state"):
        shutil.rmtree(folder / "run" / name)
    (folder / "run" / "train.json").unlink()
