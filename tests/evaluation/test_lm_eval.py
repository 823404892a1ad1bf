"""The bridge gives lm-eval's own numbers; so does our ranking."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from general_rows import arc, hellaswag, winogrande, write

import retain
import tiny
from retain.errors import ConfigError, SourceError
from retain.evaluation import lm_eval as bridge
from retain.evaluation.general import general_scores
from retain.evaluation.ranking import score_options

DATA = Path(
    os.environ.get("RETAIN_DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data")
)
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: eval)"
)
needs_data = pytest.mark.skipif(
    not (DATA / "reasoning" / "hellaswag").is_dir(), reason=f"no local data in {DATA}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, row, split in (
        ("arc_easy", arc, "test"),
        ("hellaswag", hellaswag, "validation"),
        ("winogrande", winogrande, "validation"),
    ):
        write(folder / "reasoning" / name / f"{split}.jsonl.gz", [row(i) for i in range(12)])
    return folder


@pytest.fixture(scope="module")
def tuned(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model with room for long rows, and a moved adapter: in memory and as folders."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.save_pretrained(base)
    raw = AutoModelForCausalLM.from_pretrained(tiny_folder, max_position_embeddings=4096)
    with torch.no_grad():
        for p in raw.parameters():
            p.mul_(5 if p.dim() > 1 else 1)  # far from uniform
    raw.save_pretrained(base)
    model = retain.attach_lora(AutoModelForCausalLM.from_pretrained(base), rank=2)
    tiny.move(model, 5)
    model.save_pretrained(adapter)
    return {"model": model.eval(), "tokenizer": tokenizer, "base": base, "adapter": adapter}


YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_target: "{target}"
doc_to_choice: "{choice}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ARC = ("Question: {{question}}\\nAnswer:", "{{choices.label.index(answerKey)}}", "{{choices.text}}")
HELLASWAG = ("{{query}}", "{{gold}}", "{{options}}")


def plain_hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    """As lm-eval's own task puts it, written anew."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        while "[" in text and "]" in text[text.index("[") :]:
            start = text.index("[")
            text = text[:start] + text[text.index("]", start) + 1 :]
        return text.replace("  ", " ")

    ctx = row["ctx"]
    tail = ctx[max(ctx.rfind(mark) for mark in ".!?") + 1 :].lstrip("'\")] ")
    if tail[:1].islower():
        ctx = ctx[: len(ctx) - len(tail)] + tail[0].upper() + tail[1:].lower()
    return {
        "query": clean(f"{row['activity_label']}: {ctx}"),
        "options": [clean(e) for e in row["endings"]],
        "gold": int(row["label"]),
    }


def plain(name: str, rows: list[dict[str, Any]], tuned: dict[str, Any], folder: Path) -> Any:
    """What lm-eval itself says of a task written by hand, of a model it loads itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    asked = ARC if name.startswith("arc") else HELLASWAG
    rows = rows if name.startswith("arc") else [plain_hellaswag(row) for row in rows]
    file, config = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = YAML.format(
        name=f"by_hand_{name}",
        file=file,
        cache=folder / "cache",
        text=asked[0],
        target=asked[1],
        choice=asked[2],
    )
    config.write_text(text, encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(tuned["base"]),
            "peft": str(tuned["adapter"]),
            "dtype": "float32",
        },
        tasks=[str(config)],
        num_fewshot=0,
        batch_size=4,
        device="cpu",
        task_manager=TaskManager(include_defaults=False),
    )
    assert found is not None
    return found["results"][f"by_hand_{name}"]


def own(name: str, rows: list[dict[str, Any]], tuned: dict[str, Any]) -> dict[str, float]:
    """What our ranking says of the same rows."""
    if name.startswith("arc"):
        prompts = [f"Question: {r['question']}\nAnswer:" for r in rows]
        choices = [r["choices"]["text"] for r in rows]
        gold = [r["choices"]["label"].index(r["answerKey"]) for r in rows]
    else:
        docs = [plain_hellaswag(row) for row in rows]
        prompts = [d["query"] for d in docs]
        choices = [d["options"] for d in docs]
        gold = [d["gold"] for d in docs]
    options = [[f" {c}" for c in row] for row in choices]
    scores = score_options(tuned["model"], tuned["tokenizer"], prompts, options, batch_size=16)
    norm = [
        max(range(len(row)), key=lambda k, r=row, c=texts: r[k] / len(c[k]))
        for row, texts in zip(scores.logp, choices, strict=True)
    ]
    return {
        "acc": sum(b == g for b, g in zip(scores.best(), gold, strict=True)) / len(gold),
        "acc_norm": sum(b == g for b, g in zip(norm, gold, strict=True)) / len(gold),
    }


def check(name: str, data: Path, count: int, tuned: dict[str, Any], folder: Path) -> None:
    model = tuned["model"]
    got = bridge.evaluate_general(
        model, tuned["tokenizer"], [name], data_dir=data, limit=count, batch_size=4
    )[name]
    split = bridge.LOCAL[name][1]
    with gzip.open(data / "reasoning" / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:count]
    want, ours = plain(name, rows, tuned, folder), own(name, rows, tuned)
    assert want["sample_len"] == len(rows) == count
    for metric in ("acc", "acc_norm"):
        assert got[f"{metric},none"] == want[f"{metric},none"]
        assert ours[metric] == pytest.approx(got[f"{metric},none"], abs=1e-12)
    assert 0 < got["acc,none"] < 1


@needs_lm_eval
@pytest.mark.parametrize("name", ["arc_easy", "hellaswag"])
def test_the_bridge_equals_lm_eval(
    name: str, made: Path, tuned: dict[str, Any], tmp_path: Path
) -> None:
    check(name, made, 12, tuned, tmp_path)


@needs_lm_eval
@needs_data
@pytest.mark.real
@pytest.mark.parametrize("name", ["arc_easy", "hellaswag"])
def test_the_bridge_equals_lm_eval_on_200_rows(
    name: str, tuned: dict[str, Any], tmp_path: Path
) -> None:
    check(name, DATA, 200, tuned, tmp_path)


@needs_lm_eval
def test_nothing_else_changes(
    made: Path, tuned: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    model = tuned["model"].train()
    torch.manual_seed(3), random.seed(4), numpy.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]
    got = bridge.evaluate_general(
        model, tuned["tokenizer"], ["winogrande", "arc_easy"], data_dir=made
    )
    assert model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy.array_equal(numpy.random.get_state()[1], states[2])
    assert capfd.readouterr().err == ""
    assert set(got) == {"winogrande", "arc_easy"}
    model.eval()
    with model.disable_adapter():
        base = bridge.evaluate_general(model, tuned["tokenizer"], ["arc_easy"], data_dir=made)
    again = bridge.evaluate_general(model, tuned["tokenizer"], ["arc_easy"], data_dir=made)
    assert base != again  # the adapter counts


def test_one_number_a_task() -> None:
    results = {
        "a": {"alias": "a", "sample_len": 9, "acc,none": 0.5, "acc_norm,none": 0.6},
        "b": {"acc_stderr,none": 0.1, "acc,none": 0.25},
        "c": {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2},
        "d": {"alias": "d", "acc,none": "N/A"},
    }
    assert bridge.headline(results) == {"a": 0.6, "b": 0.25, "c": 0.1}


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        (["whole", "solo"], {"whole", "solo"}),
        (["whole", "solo", "b"], {"whole", "solo", "b"}),
        (["loose", "solo"], {"x", "y", "solo"}),  # without a number of its own
        (["outer"], {"outer"}),
        (["tag"], {"a", "b"}),
    ],
)
def test_a_group_counts_once(
    tasks: list[str], names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = {"whole": ["a", "b"], "loose": ["x", "y"], "outer": ["loose", "whole"]}

    def told(model: Any, tokenizer: Any, asked: list[str], *rest: Any) -> dict[str, Any]:
        run, groups = list(asked), {}
        for name in run:
            if name in inside:
                groups[name] = inside[name]
            run += inside.get(name, ["a", "b"] if name == "tag" else [])
        scored = set(run) - {"loose", "tag"}
        results = {n: {"alias": n} | ({"acc,none": 0.5} if n in scored else {}) for n in run}
        return {"results": results, "group_subtasks": groups}

    monkeypatch.setattr(bridge, "_evaluated", told)
    model: Any = object()
    assert general_scores(model, model, tasks) == dict.fromkeys(names, 0.5)


def test_the_begun_sentence_is_split_off(tmp_path: Path) -> None:
    rows = [
        {"ctx": "Rockets fly. (All of them.) two men"},
        {"ctx": "How to sit. Take a chair."},
        {"ctx": "No sentence yet"},
        {"ctx": "x", "ctx_a": "given", "ctx_b": "too"},
    ]
    write(tmp_path / "reasoning" / "hellaswag" / "validation.jsonl.gz", rows)
    got = bridge.local_rows("hellaswag", "validation", tmp_path)
    assert [(r["ctx_a"], r["ctx_b"]) for r in got] == [
        ("Rockets fly. (All of them.)", "two men"),
        ("How to sit. Take a chair.", ""),
        ("No sentence yet", ""),
        ("given", "too"),
    ]


def test_mistakes_are_named(
    made: Path, tuned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tuned["model"], tuned["tokenizer"]
    if importlib.util.find_spec("lm_eval") is not None:
        with pytest.raises(ConfigError, match="causal"):
            bridge.evaluate_general(tiny.base("bert"), tokenizer, ["arc_easy"])
        with pytest.raises(SourceError, match=r"no rows in .*test\.jsonl\.gz"):
            bridge.evaluate_general(model, tokenizer, ["arc_easy"], data_dir=tmp_path)
        path = tmp_path / "reasoning" / "arc_easy" / "test.jsonl.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"no gzip")
        with pytest.raises(SourceError, match="cannot be read"):
            bridge.evaluate_general(model, tokenizer, ["arc_easy"], data_dir=tmp_path)
        # an index of one folder stands for that of all tasks, which takes many seconds
        small = bridge._manager("hellaswag")
        monkeypatch.setattr(bridge, "_manager", lambda folder=None: small)
        with pytest.raises(ConfigError, match="did you mean 'hellaswag'"):
            bridge.evaluate_general(model, tokenizer, ["helaswag"])
        with pytest.raises(SourceError, match="go online"):
            bridge.evaluate_general(model, tokenizer, ["hellaswag"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"retain-lora\[eval\]"):
        bridge.evaluate_general(model, tokenizer, ["arc_easy"])
