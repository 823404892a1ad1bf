"""A tiny random model on disk, and a way to run the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retain.cli import main

SHORT = ["--batch-size", "4", "--learning-rate", "0.02", "--dtype", "float32", "--rank", "4"]
SHORT += ["--strength", "10"]
TEXT = "the cat sat on a mat and dog ran to big red house while small bird sang old song"
WORDS = TEXT.split()


def save_model(folder: Path, seed: int = 0, spoil: bool = False) -> Path:
    """Writes a random Llama of two layers with a byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", "<unk>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    if spoil:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int) -> Path:
    """Writes rows of a prompt and its completion."""
    rows = [
        {"prompt": f"{WORDS[i % 19]} {i}:", "completion": f" {WORDS[(3 * i) % 19]}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.jsonl"
    rows = [{"text": " ".join(WORDS[(i * k) % 19] for k in range(1, 9))} for i in range(1, 17)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", 24)


@pytest.fixture
def retain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def make_model() -> Callable[..., Path]:
    return save_model


@pytest.fixture
def make_rows() -> Callable[[Path, int], Path]:
    return write_rows


def _fit(*argv: object) -> None:
    assert main([str(arg) for arg in ("fit", *argv, "--quiet")]) == 0


@pytest.fixture(scope="session")
def curvature(model: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A curvature in weight space."""
    path = tmp_path_factory.mktemp("fit") / "curvature.safetensors"
    _fit(model, source, "-o", path)
    return path


@pytest.fixture(scope="session")
def trained(
    model: Path, data: Path, curvature: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished run of 12 steps without a filter, with checkpoints at 9 and 12."""
    out = tmp_path_factory.mktemp("run") / "run"
    argv = ["train", *SHORT, "--model", model, "--data", data, "--curvature", curvature]
    argv += ["--out", out, "--epochs", 2, "--save-steps", 3, "--quiet", "--method", "laplace"]
    assert main([str(arg) for arg in argv]) == 0
    return out


@pytest.fixture
def short() -> list[str]:
    """Settings of short runs."""
    return SHORT
