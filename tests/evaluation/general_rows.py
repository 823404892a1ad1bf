"""Made-up rows of general tasks, as they lie in local files."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any


def arc(i: int) -> dict[str, Any]:
    draw = random.Random(i)
    texts = ["".join(draw.choices("abcdef ", k=draw.randint(2, 9))).strip() + "." for _ in "abcd"]
    labels = list("ABCD") if i % 2 else list("1234")
    return {
        "id": str(i),
        "question": f"What is number {i}?",
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[i % 4],
    }


def hellaswag(i: int) -> dict[str, Any]:
    draw = random.Random(100 + i)
    endings = ["".join(draw.choices("abcdef ", k=draw.randint(5, 20))) + "." for _ in "abcd"]
    begun = "Two men meet. one of the Men" if i % 2 else "How to sit [title] Take a chair."
    return {"activity_label": "Sitting", "ctx": begun, "endings": endings, "label": str(i % 4)}


def winogrande(i: int) -> dict[str, Any]:
    return {
        "sentence": f"Ann called Eve because _ was {'ill' * (1 + i % 3)}.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": str(1 + i % 2),
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
