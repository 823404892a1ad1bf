"""One hub row of each task, written by hand, with what a decoder must read and say.

The words are those of the data sets' own papers, not of the task files: label 0 of RTE is
entailment, of WNLI not entailment, of QNLI "holds the answer", of SuperGLUE's CB entailment,
contradiction, neutral, of MNLI entailment, neutral, contradiction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HUB: dict[str, tuple[dict[str, Any], str, str]] = {
    line["task"]: (line["row"], line["prompt"], line["completion"])
    for line in map(json.loads, Path(__file__).with_suffix(".jsonl").read_text().splitlines())
}
"""Task: the row as the hub has it, the whole prompt, the completion."""
