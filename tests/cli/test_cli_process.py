"""The command as a process of its own: speed, pipes and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_parts import SHORT
from safetensors.torch import load_file

import forked
from retain.cli import main

COMMAND = [sys.executable, "-c", "import sys; from retain.cli import main; sys.exit(main())"]
QUIET = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    probe = (
        "import sys; from retain.cli import main; code = main(['fit', '--help'])\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'pydantic_core') if m in sys.modules]"
        ", file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=QUIET)
    assert time.perf_counter() - start < 5
    assert done.returncode == 0
    loaded = done.stderr.strip()
    assert "torch" not in loaded
    assert "transformers" not in loaded
    assert "peft" not in loaded


def test_a_pipe_that_nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "--help"], stdout=write, stderr=subprocess.PIPE, env=QUIET)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("as_json", [False, True])
def test_what_stdout_cannot_write_ends_no_command(encoding: str, as_json: bool) -> None:
    """Text has a ? in its place, JSON an escape."""
    probe = (
        "import sys; from retain.cli import app; from retain.cli.options import Screen\n"
        "def arrow():\n"
        f"    screen = Screen({as_json}, False)\n"
        "    screen.table('kept', ['', 'right'], [['caf\\xe9', '0\\u21920']])\n"
        "    screen.emit({'caf\\xe9': '0\\u21920'})\n"
        "app.app.command('arrow')(arrow)\n"
        "sys.exit(app.main(['arrow']))"
    )
    env = QUIET | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, env=env)
    out = done.stdout.decode(encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    if as_json:
        assert json.loads(out) == {"caf\xe9": "0\u21920"}
        assert out.isascii() == (encoding == "ascii")
    else:
        words = ("caf?", "0?0") if encoding == "ascii" else ("caf\xe9", "0\u21920")
        assert all(word in out for word in words)


def test_an_error_is_one_line(tmp_path: Path) -> None:
    argv = ["fit", "nobody/nothing", "-o", str(tmp_path / "c.safetensors"), "--json"]
    done = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, env=QUIET)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("retain: unknown model; got: 'nobody/nothing'")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_a_checkpoint_and_resume_finishes(
    retain: Any, model: Path, data: Path, curvature: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    argv = ["--model", model, "--data", data, "--curvature", curvature, *SHORT, "--out", out]
    argv += ["--max-steps", 150, "--save-steps", 10]
    process = forked.begin(main, ["train", *map(str, argv)], told=tmp_path / "told")
    last = out / "checkpoints" / "checkpoint-10" / "digests.json"  # its last file
    limit = time.monotonic() + 60
    while not last.exists():
        assert process.is_alive()
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    err = (tmp_path / "told" / "err").read_text()
    assert process.exitcode == 130, err
    assert err.startswith("retain: stopped; ")
    assert err.count("\n") == 1
    assert f"retain train --resume --out {out}" in err
    assert not (out / "adapter").exists()
    assert not (out / "train.json").exists()
    for checkpoint in (out / "checkpoints").iterdir():
        assert load_file(checkpoint / "adapter_model.safetensors")
    found = retain("train", "--resume", "--out", out, "--json").json
    assert found["steps"] == 150
    assert found["resumed_from"].startswith("checkpoint-")
    assert [entry["step"] for entry in found["history"]] == list(range(1, 151))
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("command", ["fit", "eval", "demo", "train"])
def test_ctrl_c_elsewhere(
    retain: Any, monkeypatch: pytest.MonkeyPatch, trained: Path, data: Path, tmp_path: Path,
    command: str,
) -> None:  # fmt: skip
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retain.models.load.load_model", stop)
    monkeypatch.setattr("retain.study.demo.run_demo", stop)
    out = tmp_path / "out"
    argv: dict[str, list[object]] = {
        "fit": ["m", "-o", out / "c.safetensors"],
        "eval": ["--adapter", trained / "adapter", "--out", out / "e.json"],
        "demo": ["--out", out],
        "train": ["--model", "m", "--data", data, "--out", out],
    }
    outcome = retain(command, *argv[command], "--quiet")
    assert outcome.code == 130
    assert outcome.err.startswith("retain: stopped; ")
    assert outcome.err.count("\n") == 1
    assert not out.exists()
