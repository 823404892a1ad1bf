"""``retain train`` of classifiers: labels, heads, and what they are held by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

KINDS = ["red", "blue", "green"]
WORDS = [a + b for a in ("ca", "do", "mi", "lo", "su") for b in ("t", "g", "n", "p")]


def save_encoder(folder: Path, tokens: Path, head: int | None = None, **changes: Any) -> Path:
    """Writes a random BERT, bare or with a head, and the tokenizer of another model."""
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 300, "pad_token_id": 1,
            "initializer_range": 0.4, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0}  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), **size | changes)
    if head is None:
        BertModel(config).save_pretrained(folder)
    else:
        config.num_labels = head
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "bert", model)


def write(path: Path, labels: list[Any], pairs: bool = False, key: str = "label") -> Path:
    """Rows whose text tells their label."""
    rows = []
    for i, label in enumerate(labels):
        text = " ".join([KINDS[i % 3]] * 3 + [WORDS[i % 19]])
        row: dict[str, Any] = (
            {"text": text, "text_pair": WORDS[i % 19]} if pairs else {"text": text}
        )
        rows.append(row if label is None else row | {key: label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SHORT = ["--batch-size", "4", "--learning-rate", "0.01", "--dtype", "float32", "--rank", "2"]

LABELS: dict[str, tuple[list[Any], list[str], list[str] | None, int]] = {
    "whole": ([i % 3 for i in range(24)], [], None, 3),
    "text numbers": ([str(i % 3) for i in range(24)], [], None, 3),
    "floats that are whole": ([float(i % 3) for i in range(24)], [], None, 3),
    "names": ([KINDS[i % 3] for i in range(24)], [], sorted(KINDS), 3),
    "more classes": ([i % 3 for i in range(24)], ["--num-labels", "5"], None, 5),
    "values": ([0.5 + i % 3 for i in range(24)], [], None, 1),
    "whole values": ([i % 3 for i in range(24)], ["--num-labels", "1"], None, 1),
    "values below 0": ([-1 + i % 3 for i in range(24)], ["--num-labels", "1"], None, 1),
}


def answers(out: Path, base: Path, rows: Path) -> torch.Tensor:
    """Logits of the adapter as PEFT loads it."""
    config = AutoConfig.from_pretrained(out / "adapter")
    inner = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    tuned = PeftModel.from_pretrained(inner, str(out / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        texts = [row[k] for k in ("text", "text_pair") if k in row]
        with torch.no_grad():
            found.append(tuned(**tokenizer(*texts, return_tensors="pt")).logits[0])
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("name", LABELS)
def test_labels_are_learned(
    retain: Any, encoder: Path, model: Path, tmp_path: Path, name: str, kind: str
) -> None:
    labels, options, names, count = LABELS[name]
    base = encoder if kind == "encoder" else model
    more = options or ([] if kind == "encoder" else ["--num-labels", "auto"])
    rows, out = write(tmp_path / "rows.jsonl", labels), tmp_path / "run"
    argv = ["--model", base, "--data", rows, "--out", out, "--epochs", 6, *more, *SHORT, "--json"]
    found = retain("train", *argv).json
    assert found["labels"]["count"] == count
    assert found["labels"]["names"] == (names or [])
    assert found["labels"]["head"]["rows"] == 24
    assert any("nothing is held" in note for note in found["notes"])
    config = AutoConfig.from_pretrained(out / "adapter")
    assert config.num_labels == count
    if names:
        assert config.id2label == dict(enumerate(names))
        assert config.label2id == {n: i for i, n in enumerate(names)}
    said = answers(out, base, rows)
    assert said.shape == (24, count)
    if kind == "encoder":
        if count == 1:
            error = (said[:, 0] - torch.tensor([float(v) for v in labels])).square().mean()
            assert float(error) < 0.5
        else:
            wanted = [names.index(v) if names else int(float(v)) for v in labels]
            assert float((said.argmax(1) == torch.tensor(wanted)).float().mean()) > 0.7


def test_the_reloaded_adapter_answers_as_the_trained_one(
    retain: Any, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retain.models import saved

    kept = []
    whole = saved.save_adapter
    monkeypatch.setattr(saved, "save_adapter", lambda m, *a: (kept.append(m), whole(m, *a))[1])
    rows, out = write(tmp_path / "r.jsonl", LABELS["names"][0], pairs=True), tmp_path / "run"
    retain("train", "--model", encoder, "--data", rows, "--out", out, *SHORT)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    want = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            batch = tokenizer(row["text"], row["text_pair"], return_tensors="pt")
            want.append(kept[0].eval()(**batch).logits[0])
    assert torch.allclose(answers(out, encoder, rows), torch.stack(want), atol=1e-6)
    files = {p.name for p in (out / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "config.json"}


@pytest.mark.parametrize("method", ["auto", "laplace"])
def test_it_is_held_on_the_source_that_is_given(
    retain: Any, encoder: Path, source: Path, tmp_path: Path, method: str
) -> None:
    rows, nats = write(tmp_path / "r.jsonl", LABELS["whole"][0]), []
    for strength in (0, 1000):
        out = tmp_path / f"run{strength}"
        argv = ["--model", encoder, "--data", rows, "--out", out, "--source", source, *SHORT]
        argv += ["--method", method, "--strength", strength, "--epochs", 3, "--json"]
        found = retain("train", *argv).json
        assert found["curvature"]["info"]["sequences"] == 16
        assert found["curvature"]["info"]["note"] == str(source)
        nats.append(found["predicted_nats"])
    assert nats[1] < 0.5 * nats[0]
    assert (found["why_no_filter"] is None) == (method == "auto" or found["why_no_filter"] is None)


def test_a_source_for_a_language_model_too(
    retain: Any, model: Path, data: Path, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    argv = ["--model", model, "--data", data, "--out", out, *SHORT, "--max-steps", 1, "--json"]
    found = retain("train", *argv, "--source", source).json
    assert found["curvature"]["info"]["note"] == str(source)
    again = retain("train", *argv, "--overwrite").json  # and its own text without one
    assert again["curvature"]["info"]["note"] == "self"


def test_resuming_ends_at_the_same_bytes(retain: Any, encoder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "r.jsonl", LABELS["names"][0])
    argv = ["--model", encoder, "--data", rows, *SHORT, "--save-steps", 2, "--quiet"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert retain("train", *argv, "--out", one).code == 0
    assert retain("train", *argv, "--out", two).code == 0
    (last,) = [p for p in (two / "checkpoints").iterdir() if p.name == "checkpoint-6"]
    import shutil

    shutil.rmtree(last)
    outcome = retain("train", "--resume", "--out", two, "--quiet")
    assert outcome.code == 0, outcome.err
    files = [p / "adapter" / "adapter_model.safetensors" for p in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("labels", ["whole", "names"])
def test_a_head_of_the_base_goes_on(retain: Any, model: Path, tmp_path: Path, labels: str) -> None:
    names = {"id2label": dict(enumerate(KINDS)), "label2id": {n: i for i, n in enumerate(KINDS)}}
    base = save_encoder(tmp_path / "b", model, 3, **(names if labels == "names" else {}))
    rows = write(tmp_path / "r.jsonl", LABELS[labels][0])
    argv = ["--model", base, "--data", rows, *SHORT, "--max-steps", 1, "--json"]
    found = retain("train", *argv, "--out", tmp_path / "run").json
    assert found["labels"]["head"] is None
    assert any("own head of 3 outputs goes on" in note for note in found["notes"])
    if labels == "names":
        assert found["labels"]["names"] == KINDS  # in the order of the head, not the alphabet's
    other = retain("train", *argv, "--num-labels", 4, "--out", tmp_path / "o")
    if labels == "whole":
        assert other.json["labels"]["head"]["rows"] == 24
    else:
        other.refused("not as many as asked for")


REFUSED: dict[str, tuple[list[Any], list[str], list[str]]] = {
    "no label": ([0, 1, None, 1] * 6, [], ["row 3 of the data has no label"]),
    "no labels": ([None] * 24, [], ["the rows have no labels", "the columns text"]),
    "an empty one": ([0, 1, "", 1] * 6, [], ["row 3 of the data has no label"]),
    "GLUE's for none": ([0, 1, -1, 1] * 6, [], ["row 3 of the data has no label"]),
    "from 1": ([1, 2, 3] * 8, [], ["not counted from 0", "--num-labels 4"]),
    "one class": ([0] * 24, [], ["the labels are no classes"]),
    "a blank name": (["x", "  ", "y"] * 8, [], ["row 2 of the data has no label"]),
    "one name": (["x"] * 24, [], ["the labels are no classes"]),
    "identities": (
        [7000 + 0 * i if i else 0 for i in range(24)],
        [],
        ["the labels are no classes"],
    ),
    "beyond": ([0, 1, 2] * 8, ["--num-labels", "2"], ["label 2", "0 to 1"]),
    "parts": ([0, 1, 1.5] * 8, ["--num-labels", "2"], ["1.5"]),
    "names and numbers": ([0, "x", 1] * 8, [], ["row 1 of the data has a label of another kind"]),
    "too many names": ([*KINDS] * 8, ["--num-labels", "2"], ["--num-labels 3"]),
    "several": ([[0, 1], [1, 0]] * 12, [], ["row 1", "one label a row"]),
    "truth": ([True, False] * 12, [], ["row 1", "write false as 0"]),
    "nan": (["nan", 1] * 12, ["--num-labels", "1"], ["row 1", "finite"]),
    "no number": (KINDS * 8, ["--num-labels", "none"], ["num_labels"]),
    "none at all": ([0, 1] * 12, ["--num-labels", "0"], ["num_labels"]),
    "laplace": ([0, 1] * 12, ["--method", "laplace"], ["writes no text", "--source"]),
    "budget": ([0, 1] * 12, ["--budget", "0.1"], ["writes no text", "--source"]),
    "state": ([0, 1] * 12, ["--keep-state"], ["writes no text", "--source"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(retain: Any, encoder: Path, tmp_path: Path, name: str) -> None:
    labels, options, said = REFUSED[name]
    rows, out = write(tmp_path / "r.jsonl", labels), tmp_path / "run"
    argv = ["--model", encoder, "--data", rows, "--out", out, *SHORT, *options]
    retain("train", *argv).refused(*said)
    assert not (out / "adapter").exists()


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        ([0, 2, 5] * 8, [], "3 of 6 classes have no row to learn from: 1, 3, 4"),
        ([0, 1] * 12, ["--num-labels", 3], "1 of 3 classes have no row to learn from: 2"),
        ([0, 1, 0.7] * 8, [], "a regression is learned, since the labels are values, such as 0.7"),
    ],
)
def test_what_the_labels_leave_open_is_said(
    retain: Any, encoder: Path, tmp_path: Path, labels: list[Any], options: list[Any], said: str
) -> None:
    rows = write(tmp_path / "r.jsonl", labels)
    argv = ["--model", encoder, "--data", rows, "--out", tmp_path / "run", *SHORT]
    found = retain("train", *argv, *options, "--json").json
    assert any(said in note for note in found["notes"])


def test_rows_that_the_head_may_not_be_held_by(
    retain: Any, encoder: Path, source: Path, tmp_path: Path
) -> None:
    rows, file = write(tmp_path / "r.jsonl", [0, 1] * 12), tmp_path / "c.safetensors"
    size = ["--rank", 2]
    assert retain("fit", encoder, source, "-o", file, "--num-labels", 2, *size, "-q").code == 0
    argv = ["--model", encoder, "--data", rows, "--out", tmp_path / "run", *SHORT]
    retain("train", *argv, "--curvature", file).refused("before the head was fitted", "--source")
    retain("train", *argv, "--data", "word-problems:8").refused("learns rows with a label")
    long = write(tmp_path / "long.jsonl", [0, 1] * 12)
    long.write_text(long.read_text().replace("red red", "red " * 200))
    retain("train", *argv[:2], "--data", long, *argv[4:], "--max-length", 600).refused(
        "longer than the model can read", "--max-length 300"
    )


@pytest.mark.parametrize("command", ["eval", "soften"])
def test_there_is_no_base_to_compare_a_new_head_with(
    retain: Any, encoder: Path, source: Path, tmp_path: Path, command: str
) -> None:
    rows, out = write(tmp_path / "r.jsonl", [0, 1] * 12), tmp_path / "run"
    argv = ["--model", encoder, "--data", rows, "--out", out, "--source", source, *SHORT, "-q"]
    assert retain("train", *argv).code == 0
    more = ["--curvature", out / "curvature.safetensors", "--budget", 0.1, "--out", tmp_path / "s"]
    given = ["--adapter", out / "adapter"] if command == "eval" else [out / "adapter", *more]
    retain(command, *given).refused("brings its own head")


def test_a_decoder_is_one_only_where_it_is_asked_to_be(
    retain: Any, make_model: Any, source: Path, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "m")
    argv = [
        "--model",
        base,
        "--data",
        source,
        "--out",
        tmp_path / "run",
        *SHORT,
        "--method",
        "none",
    ]
    assert retain("train", *argv, "--max-steps", 1, "--json").json["labels"] is None


def test_other_models_are_refused_as_before(retain: Any, model: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path / "t5"
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=300, **size)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    rows = write(tmp_path / "r.jsonl", [0, 1] * 12)
    retain("train", "--model", folder, "--data", rows, "--out", tmp_path / "o").refused(
        "is an encoder-decoder"
    )


def test_the_encoder_is_bare(encoder: Path) -> None:
    assert type(AutoModel.from_pretrained(encoder)) is BertModel
