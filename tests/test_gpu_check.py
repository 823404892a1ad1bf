"""The checks for a GPU run on a CPU, where both sides of each comparison are the same."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

import forked

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check.py"


def check(out: Path, *argv: str) -> CompletedProcess[str]:
    asked = ("--device", "cpu", "--tiny", "--out", out, *argv)
    return forked.script(SCRIPT, *asked, CUDA_VISIBLE_DEVICES="")


def test_all_parts_on_a_cpu(tmp_path: Path) -> None:
    ended = check(tmp_path)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"versions", "agreement", "large", "small"}
    assert found["agreement"]["largest"] <= 1e-9
    assert len(found["agreement"]["apart"]) == 15
    assert found["agreement"]["resumed"]["bit_for_bit"]
    for part in ("large", "small"):
        (steps,) = found[part]["steps"]
        assert list(steps["over_plain"]) == ["plain", "force", "recipe", "recipe with a budget"]
        assert all(seconds > 0 for seconds in steps["seconds"].values())
        assert found[part]["fit"]["kfac"]["seconds"] > 0
        assert found[part]["tiny"]
    assert all(part["versions"]["torch"] and "hardware" in part for part in found.values())


def test_a_part_that_fails_is_written_and_ends_in_1(tmp_path: Path) -> None:
    ended = check(tmp_path, "--parts", "versions,agreement", "--tolerance", "-1")
    assert ended.returncode == 1
    assert json.loads((tmp_path / "versions.json").read_text())["copy_gb_a_second"] > 0
    said = json.loads((tmp_path / "agreement.json").read_text())
    assert "above the tolerance" in said["error"]
    assert said["apart"]["fit kfac"] == 0.0
