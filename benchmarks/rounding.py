"""How many facts a model's own rounding loses: it answers in bfloat16, and again in float32.

What tuning may lose cannot be told from this, however well a model is held. Greedy answers of 32
tokens, as ``retain certify`` asks for them; nothing is trained.

    python benchmarks/rounding.py benchmarks/facts.jsonl --out benchmarks/results/facts/rounding.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import retain
from retain.evaluation.certify import answers_of
from retain.evaluation.skills import read_skills
from retain.files import write_json
from retain.models.view import ModelView
from retain.provenance import provenance

MODEL, NEW_TOKENS, BATCH = "smollm2-135m", 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("items", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    items = read_skills(given.items)
    said = {}
    for dtype in ("bfloat16", "float32"):
        base, words, _ = retain.load_model(MODEL, dtype=dtype)
        said[dtype] = answers_of(ModelView(base, words), words, items, NEW_TOKENS, BATCH)
    rows = [
        {"prompt": item.prompt, "bfloat16": one, "float32": other,
         "right_bfloat16": right, "right_float32": still}
        for item, (one, right), (other, still) in zip(items, *said.values(), strict=True)
    ]  # fmt: skip
    kept = [row["right_float32"] for row in rows if row["right_bfloat16"]]
    result = provenance(0) | {
        "model": MODEL, "new_tokens": NEW_TOKENS, "batch_size": BATCH,
        "right": len(kept), "kept": sum(kept), "rows": rows,
    }  # fmt: skip
    write_json(given.out, result)
    print(f"{sum(kept)} of {len(kept)} that are right in bfloat16 are right in float32")


if __name__ == "__main__":
    main()
