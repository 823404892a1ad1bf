"""The TRL example: two added lines, and an adapter that needs nothing of ours."""

import difflib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forked

pytest.importorskip("trl", reason="the example needs trl")

ROOT = Path(__file__).resolve().parents[2]
PLAIN, HELD = ROOT / "examples" / "sft_plain.py", ROOT / "examples" / "sft_two_lines.py"

WITHOUT_RETAIN = """
import sys
sys.modules["retain"] = None  # importing it now fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(20)[None] % 90 + 5).logits, sys.argv[3])
"""


def body(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]


def test_the_scripts_differ_by_two_added_lines() -> None:
    changed = [
        line for line in difflib.ndiff(body(PLAIN), body(HELD)) if line.startswith(("+ ", "- "))
    ]
    assert len(changed) == 2, changed
    assert all(line.startswith("+ ") and "retain" in line.lower() for line in changed) or (
        changed[0].startswith("+ from retain import") and "RetentionCallback" in changed[1]
    )


def run(script: Path, *arguments: str | Path) -> str:
    done = forked.script(script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_both_scripts_run_and_the_adapter_is_plain(tiny_folder: Path, tmp_path: Path) -> None:
    run(PLAIN, tiny_folder, "3", tmp_path / "plain")
    log = run(HELD, tiny_folder, "3", tmp_path / "held")
    assert "predicted_nats" in log
    assert "retention_strength" in log
    written = {path.suffix for path in (tmp_path / "held").iterdir()}
    assert not written & {".pt", ".pkl"}
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_RETAIN)
    there = tmp_path / "logits.pt"  # in a process that has never loaded it
    subprocess.run([sys.executable, script, tiny_folder, tmp_path / "held", there], check=True)

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "held")).eval()
    with torch.no_grad():
        here = model(torch.arange(20)[None] % 90 + 5).logits
        with model.disable_adapter():
            untouched = model(torch.arange(20)[None] % 90 + 5).logits
    assert torch.equal(here, torch.load(there, weights_only=True))
    assert not torch.equal(here, untouched)
