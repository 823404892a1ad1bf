"""The lm-eval bridge against lm-eval itself, and our own ranking against both, on local rows.

    python benchmarks/lm_eval_bridge.py [--data-dir ../shared/data] [--rows 200]

Writes benchmarks/results/lm_eval_bridge.json, and fails where two numbers differ. lm-eval itself
loads the model and the adapter from their folders and reads the rows through a task written by
hand below; the bridge is handed the model in memory. The adapter is a random displacement, so that
it counts. All in float32.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import retain
from retain.evaluation.lm_eval import LOCAL, evaluate_general, local_rows
from retain.evaluation.ranking import score_options
from retain.files import write_json
from retain.models.load import load_model
from retain.models.sites import lora_sites
from retain.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "lm_eval_bridge.json"
METRICS = ("acc", "acc_norm")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "hellaswag"])
    args = parser.parse_args()
    base, tokenizer, name = load_model(args.model, device="cpu")
    model = retain.attach_lora(base, rank=8)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in lora_sites(model):
            site.b.copy_(0.01 * torch.randn(site.b.shape, generator=random))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base_folder = str(base.config._name_or_path)
        model.save_pretrained(str(folder / "adapter"))
        for task in args.tasks:
            docs = [doc(task, r) for r in rows(task, args.data_dir, args.rows)]
            start = time.perf_counter()
            general = evaluate_general(
                model,
                tokenizer,
                [task],
                data_dir=args.data_dir,
                limit=args.rows,
                batch_size=args.batch_size,
            )[task]
            bridge_seconds = time.perf_counter() - start
            plain, plain_seconds = by_hand(task, docs, base_folder, folder, args.batch_size)
            start = time.perf_counter()
            own = ranked(model, tokenizer, docs, args.batch_size)
            results[task] = {
                "rows": len(docs),
                "bridge": general,
                "lm_eval": plain,
                "ranking": own,
                "equal": general == plain,
                "ranking_equal": all(abs(own[m] - general[m]) < 1e-12 for m in METRICS),
                "seconds": {
                    "bridge": bridge_seconds,
                    "lm_eval": plain_seconds,
                    "ranking": time.perf_counter() - start,
                },
            }
            print(task, json.dumps(results[task]))
    import lm_eval

    record = {
        "schema": "retain.benchmark/1",
        "what": "lm-eval through the bridge, lm-eval itself, and our ranking, on the same rows",
        "model": name,
        "dtype": "float32",
        "adapter": "LoRA, rank 8, B of standard deviation 0.01",
        "lm_eval": lm_eval.__version__,
        "results": results,
        **provenance(0),
    }
    write_json(RESULT, record)
    if not all(r["equal"] and r["ranking_equal"] for r in results.values()):
        raise SystemExit("the numbers differ")


def rows(task: str, data_dir: Path, count: int) -> list[dict[str, Any]]:
    """The first rows as they lie in the file (of HellaSwag, with the split of its context)."""
    split = LOCAL[task][1]
    if task == "hellaswag":
        return local_rows(task, split, data_dir)[:count]
    path = data_dir / "reasoning" / task / f"{split}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][:count]


def doc(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row as a question, written anew from the description of the task."""
    if task.startswith("arc"):
        labels = row["choices"]["label"]
        return {
            "query": f"Question: {row['question']}\nAnswer:",
            "choices": row["choices"]["text"],
            "gold": labels.index(row["answerKey"]),
        }

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        while "[" in text and "]" in text[text.index("[") :]:
            start = text.index("[")
            text = text[:start] + text[text.index("]", start) + 1 :]
        return text.replace("  ", " ")

    begun = row["ctx_b"].capitalize()
    return {
        "query": clean(f"{row['activity_label']}: {row['ctx_a']} {begun}"),
        "choices": [clean(e) for e in row["endings"]],
        "gold": int(row["label"]),
    }


def by_hand(
    task: str, docs: list[dict[str, Any]], base: str, folder: Path, batch_size: int
) -> tuple[dict[str, Any], float]:
    """lm-eval's own answer, in the form of the bridge's, and its seconds."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    file, config = folder / f"{task}.jsonl", folder / f"{task}.yaml"
    file.write_text("".join(json.dumps(d) + "\n" for d in docs), encoding="utf-8")
    config.write_text(
        TASK.format(name=f"by_hand_{task}", file=file, cache=folder / "cache"), encoding="utf-8"
    )
    start = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": base, "peft": str(folder / "adapter"), "dtype": "float32"},
        tasks=[str(config)],
        num_fewshot=0,
        batch_size=batch_size,
        device="cpu",
        task_manager=TaskManager(include_defaults=False),
    )
    result = (found or {})["results"][f"by_hand_{task}"]
    plain: dict[str, Any] = {m: result[f"{m},none"] for m in METRICS}
    plain["stderr"] = {m: result[f"{m}_stderr,none"] for m in METRICS}
    return plain, time.perf_counter() - start


def ranked(
    model: nn.Module, tokenizer: Any, docs: list[dict[str, Any]], batch_size: int
) -> dict[str, float]:
    """Our own ranking of the same questions; acc_norm divides by characters, as lm-eval does."""
    options = [[f" {c}" for c in d["choices"]] for d in docs]
    scores = score_options(
        model, tokenizer, [d["query"] for d in docs], options, batch_size=4 * batch_size
    )
    gold = [d["gold"] for d in docs]
    norm = [
        [p / len(c) for p, c in zip(row, d["choices"], strict=True)]
        for row, d in zip(scores.logp, docs, strict=True)
    ]
    picked = [max(range(len(row)), key=row.__getitem__) for row in norm]
    return {
        "acc": sum(b == g for b, g in zip(scores.best(), gold, strict=True)) / len(gold),
        "acc_norm": sum(b == g for b, g in zip(picked, gold, strict=True)) / len(gold),
    }


if __name__ == "__main__":
    main()
