"""``retain train`` of classifiers: labels, heads, and what they are held by."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_parts import Run, adapter, told, write_lines
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from retain.cli import main
from retain.config import RunConfig
from retain.curvature.curvature import load_curvature
from retain.errors import ConfigError
from retain.retention.recipe import Recipe
from retain.runs.classify import labels_of
from retain.runs.records import Labels

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
    if head is not None:
        config.num_labels = head
    kind = BertModel if head is None else BertForSequenceClassification
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "bert", model)


def write(path: Path, labels: list[Any], pairs: bool = False) -> Path:
    """Rows whose text tells their label."""
    rows: list[dict[str, Any]] = []
    for i, label in enumerate(labels):
        text = " ".join([KINDS[i % 3]] * 3 + [WORDS[i % 19]])
        rows.append({"text": text, "text_pair": WORDS[i % 19]} if pairs else {"text": text})
        if label is not None:
            rows[-1]["label"] = label
    return write_lines(path, rows)


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


@pytest.fixture
def train(retain: Run, encoder: Path, tmp_path: Path) -> Run:
    """Trains the encoder on rows; later options come before these."""
    given = ("train", "--model", encoder, "--out", tmp_path / "run", *SHORT)
    return lambda rows, *argv: retain(*given, "--data", rows, *argv)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("encoder", name) for name in LABELS]
    + [("decoder", name) for name in ("whole", "names", "more classes", "values")],
)
def test_labels_are_learned(
    train: Run, encoder: Path, model: Path, tmp_path: Path, name: str, kind: str
) -> None:
    labels, options, names, count = LABELS[name]
    base = encoder if kind == "encoder" else model
    more = options or ([] if kind == "encoder" else ["--num-labels", "auto"])
    rows, out = write(tmp_path / "rows.jsonl", labels), tmp_path / "run"
    found = train(rows, "--model", base, "--epochs", 6, *more, "--json").json
    assert found["labels"]["count"] == count
    assert found["labels"]["names"] == (names or [])
    assert found["labels"]["head"]["rows"] == 24
    assert any("the base model is not held" in note for note in found["notes"])
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
    train: Run, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retain.models import saved

    kept, whole = [], saved.save_adapter
    monkeypatch.setattr(saved, "save_adapter", lambda m, *a: (kept.append(m), whole(m, *a))[1])
    rows, out = write(tmp_path / "r.jsonl", LABELS["names"][0], pairs=True), tmp_path / "run"
    train(rows).done()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    want = []
    for row in map(json.loads, rows.read_text().splitlines()):
        with torch.no_grad():
            batch = tokenizer(row["text"], row["text_pair"], return_tensors="pt")
            want.append(kept[0].eval()(**batch).logits[0])
    assert torch.allclose(answers(out, encoder, rows), torch.stack(want), atol=1e-6)
    files = {p.name for p in (out / "adapter").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.json"}


def test_what_no_checkpoint_has_is_trained_and_saved_with_the_head(
    train: Run, retain: Run, encoder: Path, source: Path, tmp_path: Path
) -> None:
    """An encoder that was saved without its pooler, which each loading draws anew."""
    base, out, june = tmp_path / "base", tmp_path / "run", tmp_path / "june"
    shutil.copytree(encoder, base)
    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(base)
    rows = write(tmp_path / "r.jsonl", LABELS["names"][0])
    train(rows, "--model", base, "--source", source, "--keep-state", "-q").done()
    weights = adapter(out)
    pooler = {n for n in weights if ".pooler." in n}
    assert pooler == {f"base_model.model.bert.pooler.dense.{n}" for n in ("weight", "bias")}
    more = ("--continue-from", out, "--data", rows, "--out", june, "--seed", 1, *SHORT[:4], "-q")
    retain("train", *more).done()
    for run in (out, june):
        said = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            said.append(answers(run, base, rows))
        assert torch.equal(*said)
    first, last = (load_file(run / "state" / "head.safetensors") for run in (out, june))
    assert first.keys() == last.keys() and all(torch.equal(first[n], last[n]) for n in first)
    assert any(".pooler." in name for name in first)


@pytest.mark.parametrize("method", ["auto", "laplace"])
def test_it_is_held_on_the_source_that_is_given(
    train: Run, source: Path, tmp_path: Path, method: str
) -> None:
    rows, nats = write(tmp_path / "r.jsonl", LABELS["whole"][0]), []
    for strength in (0, 1000):
        argv = ("--out", tmp_path / f"run{strength}", "--source", source, "--method", method)
        found = train(rows, *argv, "--strength", strength, "--epochs", 3, "--json").json
        assert found["curvature"]["info"]["sequences"] == 16
        assert found["curvature"]["info"]["note"] == str(source)
        nats.append(found["predicted_nats"])
    assert nats[1] < 0.5 * nats[0]


def test_a_budget_is_of_predicted_nats(
    train: Run, retain: Run, source: Path, tmp_path: Path
) -> None:
    """In the first month, with its new head, and in the next."""
    rows, june = write(tmp_path / "r.jsonl", LABELS["names"][0]), tmp_path / "june"
    argv = ("--source", source, "--budget", 0.002, "--keep-state", "--epochs", 3, "--json")
    first = train(rows, *argv).json
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "- Budget: 0.002 nats per row of predicted KL divergence to the base\n" in card
    assert re.search(r"- Predicted forgetting: \S+ nats per row\n", card)
    more = ("--continue-from", tmp_path / "run", "--data", rows, "--out", june, *SHORT[:4])
    done = retain("train", *more).done()
    assert re.search(r"predicted forgetting\W+\S+ nats per row", done.out)
    for found in (first, told(june / "train.json")):
        assert 0 < found["predicted_nats"] <= 0.002 * (1 + 1e-6)
        assert found["measured_nats"] is None
        assert [n for n in found["notes"] if n.startswith("the budget is of predicted nats")]
    retain("explain", june).refused("got: a classifier", "the run of a decoder")


def test_a_cut_classifier_is_not_for_eval(train: Run, retain: Run, tmp_path: Path) -> None:
    train(write(tmp_path / "r.jsonl", LABELS["whole"][0]), "-q").done()
    said = retain("compact", tmp_path / "run", "--rank", 2, "--out", tmp_path / "cut").done().out
    assert said.endswith("next: load it as docs/classifiers.md says\n")


def test_a_classifier_is_cut_without_its_state_and_that_is_said(
    train: Run, retain: Run, source: Path, tmp_path: Path
) -> None:
    rows, run = write(tmp_path / "r.jsonl", LABELS["whole"][0]), tmp_path / "run"
    train(rows, "--source", source, "--keep-state", "--max-steps", 2, "-q").done()
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    argv = ("--rank", 1, "--json", "--out")
    notes = retain("compact", run / "adapter", *argv, plain).json["notes"]
    found = retain("compact", run, *argv, kept).json
    said = "a classifier's state is not used: each layer's shortest part is cut"
    assert (found["notes"], found["curvature"]) == ([said, *notes], [])
    assert said not in notes and told(kept / "compact.json")["notes"] == found["notes"]
    files = [p / "adapter" / "adapter_model.safetensors" for p in (plain, kept)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resuming_ends_at_the_same_bytes(train: Run, retain: Run, tmp_path: Path) -> None:
    rows, one, two = write(tmp_path / "r.jsonl", LABELS["names"][0]), tmp_path / "a", tmp_path / "b"
    for out in (one, two):
        train(rows, "--save-steps", 2, "-q", "--out", out).done()
    shutil.rmtree(two / "checkpoints" / "checkpoint-6")
    retain("train", "--resume", "--out", two, "-q").done()
    files = [p / "adapter" / "adapter_model.safetensors" for p in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("labels", ["whole", "names"])
def test_a_head_of_the_base_goes_on(train: Run, model: Path, tmp_path: Path, labels: str) -> None:
    names = {"id2label": dict(enumerate(KINDS)), "label2id": {n: i for i, n in enumerate(KINDS)}}
    base = save_encoder(tmp_path / "b", model, 3, **(names if labels == "names" else {}))
    rows = write(tmp_path / "r.jsonl", LABELS[labels][0])
    argv = ("--model", base, "--max-steps", 1, "--json")
    found = train(rows, *argv).json
    assert found["labels"]["head"] is None
    assert any("own head of 3 outputs goes on" in note for note in found["notes"])
    if labels == "names":
        assert found["labels"]["names"] == KINDS  # in the order of the head, not the alphabet's
    other = train(rows, *argv, "--num-labels", 4, "--out", tmp_path / "o")
    if labels == "whole":
        assert other.json["labels"]["head"]["rows"] == 24
    else:
        other.refused("not as many as asked for")


REFUSED: dict[str, tuple[list[Any], list[str], list[str]]] = {
    "no label": ([0, 1, None, 1] * 6, [], ["row 3 of the data has no label"]),
    "no labels": ([None] * 24, [], ["the rows have no labels", "the columns text"]),
    "an empty one": ([0, 1, "", 1] * 6, [], ["row 3 of the data has no label"]),
    "GLUE's for none": ([0, 1, -1, 1] * 6, [], ["row 3 of the data has no label"]),
    "of moods": ([0.0, 1.0, -1.0] * 8, [], ["row 3 of the data has no label", "from 0"]),
    "of moods, asked for": (["1.0", "-1.0"] * 12, ["--num-labels", "3"], ["row 2", "from 0"]),
    "from 1": ([1, 2, 3] * 8, [], ["not counted from 0", "--num-labels 4"]),
    "one class": ([0] * 24, [], ["the labels are no classes"]),
    "a blank name": (["x", "  ", "y"] * 8, [], ["row 2 of the data has no label"]),
    "one name": (["x"] * 24, [], ["the labels are no classes"]),
    "identities": ([0, *[7000] * 23], [], ["the labels are no classes"]),
    "beyond": (
        [0, 1, 2] * 8,
        ["--num-labels", "2"],
        ["label 2 in row 3", "0 to 1", "--num-labels 3"],
    ),
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
def test_what_is_refused(train: Run, tmp_path: Path, name: str) -> None:
    labels, options, said = REFUSED[name]
    train(write(tmp_path / "r.jsonl", labels), *options).refused(*said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        ([0, 2, 5] * 8, [], "3 of 6 classes have no row to learn from: 1, 3, 4"),
        ([0, 1] * 12, ["--num-labels", 3], "1 of 3 classes have no row to learn from: 2"),
        (
            [-1.0, 1, 0.7] * 8,
            [],
            "a regression is learned, since the labels are values, such as 0.7",
        ),
        ([0, 1, 0.7] * 8, [], "a regression is learned, since the labels are values, such as 0.7"),
    ],
)
def test_what_the_labels_leave_open_is_said(
    train: Run, tmp_path: Path, labels: list[Any], options: list[Any], said: str
) -> None:
    found = train(write(tmp_path / "r.jsonl", labels), *options, "--json").json
    assert any(said in note for note in found["notes"])


def test_a_head_can_be_left_out(train: Run, tmp_path: Path, source: Path) -> None:
    argv = ("--source", source, "--max-steps", 1, "--json", "--parts", "rows,force")
    found = train(write(tmp_path / "r.jsonl", KINDS * 8), *argv).json
    assert found["labels"]["head"] is None
    assert any("stays as it was drawn: --parts leaves head out" in note for note in found["notes"])


def test_what_does_not_go_together(
    train: Run, retain: Run, encoder: Path, model: Path, source: Path, tmp_path: Path
) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    rows, file = write(tmp_path / "r.jsonl", [0, 1] * 12), tmp_path / "c.safetensors"
    argv = ("fit", encoder, source, "-o", file, "--num-labels", 2, "--rank", 2, "-q")
    retain(*argv).done()
    train(rows, "--curvature", file).refused("before the head was fitted", "--source")
    train("word-problems:8").refused("learns rows with a label")
    sure = ("--source", source, "--budget", 0.1, "--confidence", 0.9)
    train(rows, *sure).refused("a classifier, whose budget is predicted", "--confidence out")
    long = tmp_path / "long.jsonl"
    long.write_text(rows.read_text().replace("red red", "red " * 200))
    said = ("longer than the model can read", "--max-length 300")
    train(long, "--max-length", 600).refused(*said)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=300, **size)).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "t5")
    train(rows, "--model", tmp_path / "t5").refused("is an encoder-decoder")


def test_there_is_no_base_to_compare_a_new_head_with(
    train: Run, retain: Run, source: Path, tmp_path: Path
) -> None:
    train(write(tmp_path / "r.jsonl", [0, 1] * 12), "--source", source, "-q").done()
    out = tmp_path / "run"
    retain("eval", "--adapter", out / "adapter").refused("brings its own head")
    more = ["--curvature", out / "curvature.safetensors", "--budget", 0.1, "--out", tmp_path / "s"]
    retain("soften", out / "adapter", *more).refused("brings its own head")


def test_a_decoder_is_one_only_where_it_is_asked_to_be(
    train: Run, model: Path, source: Path, encoder: Path
) -> None:
    argv = ("--model", model, "--method", "none", "--max-steps", 1, "--json")
    assert train(source, *argv).json["labels"] is None
    assert type(AutoModel.from_pretrained(encoder)) is BertModel


class TestMonths:
    """``--continue-from``: the head goes on, the classes stay, other classes are refused."""

    @pytest.fixture(scope="module", params=["encoder", "decoder"])
    def months(
        self, request: pytest.FixtureRequest, encoder: Path, model: Path, source: Path,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> tuple[Path, list[Path]]:  # fmt: skip
        """The base, and three runs, the second of which sees two of the three classes."""
        folder = tmp_path_factory.mktemp("months")
        base, runs = encoder if request.param == "encoder" else model, []
        for month, labels in enumerate(([*KINDS] * 8, ["red", "green"] * 12, [*KINDS] * 8)):
            rows, out = write(folder / f"{month}.jsonl", labels), folder / f"run{month}"
            argv = ["train", "--data", rows, "--out", out, "--epochs", 3, "-q", *SHORT]
            if runs:
                argv = [a for a in argv if a not in SHORT] + ["--continue-from", runs[-1]]
                argv += SHORT[:4]
            else:
                argv += ["--model", base, "--source", source, "--keep-state"]
                argv += ["--num-labels", "auto"]
            assert main([str(a) for a in argv]) == 0
            runs.append(out)
        return base, runs

    def test_the_head_goes_on(self, months: tuple[Path, list[Path]]) -> None:
        base, runs = months
        heads, records = [], []
        for run in runs:
            weights = adapter(run)
            (name,) = [n for n in weights if n.endswith(("classifier.weight", "score.weight"))]
            heads.append(weights[name])
            records.append(told(run / "train.json"))
        assert [r["labels"]["names"] for r in records] == [sorted(KINDS)] * 3
        assert records[0]["labels"]["head"]["rows"] == 24
        assert records[1]["labels"]["head"] is records[2]["labels"]["head"] is None
        assert any("1 of 3 classes" in note for note in records[1]["notes"])
        assert len({r["model"]["fingerprint"] for r in records}) == 1
        first = load_file(runs[0] / "state" / "head.safetensors")
        last = load_file(runs[2] / "state" / "head.safetensors")
        assert first.keys() == last.keys() and all(torch.equal(first[n], last[n]) for n in first)
        assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
        assert load_curvature(runs[2] / "state" / "past.safetensors").info.merged == 3
        if "classifier" in name:  # the tiny decoder's features foretell little
            said = answers(runs[2], base, runs[2].parent / "2.jsonl")
            wanted = torch.tensor([sorted(KINDS).index(KINDS[i % 3]) for i in range(24)])
            assert float((said.argmax(1) == wanted).float().mean()) > 0.6

    def test_it_begins_where_the_run_before_ended(
        self, months: tuple[Path, list[Path]], retain: Any, tmp_path: Path
    ) -> None:
        rows, out = write(tmp_path / "r.jsonl", [*KINDS] * 8), tmp_path / "out"
        argv = ["--continue-from", months[1][0], "--data", rows, "--out", out, "-q"]
        more = ["--max-steps", 1, "--learning-rate", 1e-12, "--batch-size", 4]
        assert retain("train", *argv, *more).code == 0
        then, now = (answers(run, months[0], rows) for run in (months[1][0], out))
        torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)

    def test_a_number_beyond_its_classes_is_refused_with_its_row(self, encoder: Path) -> None:
        config = RunConfig(model=str(encoder), data="rows.jsonl", out="out")
        rows = [{"text": "a", "label": i} for i in (0, 1, 2, 1, 3)]
        before: Any = SimpleNamespace(labels=Labels(count=3))
        with pytest.raises(ConfigError, match=r"label 3 in row 5 .*whole numbers from 0 to 2"):
            labels_of(rows, config, before)
        assert labels_of(rows[:4], config, before)[1].count == 3

    @pytest.mark.parametrize(
        ("labels", "more", "said"),
        [
            ([*KINDS, "black"] * 6, [], ["other labels", "'black'", "blue, green, red"]),
            ([0, 1, 2] * 8, [], ["other labels", "got: labels such as 0"]),
            ([*KINDS] * 8, ["--num-labels", 4], ["other labels", "--num-labels 4"]),
        ],
        ids=["new name", "numbers", "count"],
    )
    def test_other_labels_are_refused(
        self,
        months: Any,
        retain: Any,
        tmp_path: Path,
        labels: list[Any],
        more: list[Any],
        said: list[str],
    ) -> None:
        rows, out = write(tmp_path / "r.jsonl", labels), tmp_path / "out"
        argv = ["--continue-from", months[1][0], "--data", rows, "--out", out, *SHORT[:4], *more]
        retain("train", *argv).refused(*said)
        assert not out.exists()

    def test_a_language_model_does_not_go_on_as_a_classifier(
        self, retain: Any, model: Path, data: Path, curvature: Path, tmp_path: Path
    ) -> None:
        out, rows = tmp_path / "may", write(tmp_path / "r.jsonl", [0, 1, 2] * 8)
        argv = ["--model", model, "--data", data, "--curvature", curvature, "--rank", 4, "-o", out]
        assert retain("train", *argv, "--keep-state", "--max-steps", 1, "-q").code == 0
        more = ["--continue-from", out, "--data", rows, "--num-labels", 3, "-o", tmp_path / "june"]
        retain("train", *more).refused("other labels", "no classifier")

    def test_resuming_a_later_month_ends_at_the_same_bytes(
        self, months: Any, retain: Any, tmp_path: Path
    ) -> None:
        rows = write(tmp_path / "r.jsonl", [*KINDS] * 8)
        argv = ["--continue-from", months[1][0], "--data", rows, "--save-steps", 2, "-q"]
        argv += SHORT[:4]
        one, two = tmp_path / "one", tmp_path / "two"
        for out in (one, two):
            assert retain("train", *argv, "--out", out).code == 0
        shutil.rmtree(two / "checkpoints" / "checkpoint-6")
        assert retain("train", "--resume", "--out", two, "-q").code == 0
        for name in ("adapter/adapter_model.safetensors", "state/past.safetensors"):
            assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_model_that_is_certain_in_the_end_keeps_no_state_and_says_so(
    train: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consolidate = Recipe.consolidate

    def surely(self: Recipe, model: Any, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "classifier.modules_to_save" in name:
                    weight.mul_(1e8)
        return consolidate(self, model, *args, **options)

    monkeypatch.setattr(Recipe, "consolidate", surely)
    rows, out = write(tmp_path / "rows.jsonl", [i % 3 for i in range(24)]), tmp_path / "run"
    argv = ("--source", source, "--keep-state", "--max-steps", 1, "--json")
    found = train(rows, *argv).json
    assert found["notes"][-1].startswith("no state is kept for later runs: the model is certain")
    assert told(out / "train.json")["notes"] == found["notes"]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert not (out / "state").exists()
