"""The fault script, in short: kills that strike, and damaged files, with nothing bad among them.

``RETAIN_FAULTS=200,2000,1`` does so many kills and mutations, from that seed.
"""

from __future__ import annotations

import json
import os
import random
import sys
from functools import partial
from pathlib import Path

import pytest

import forked

SCRIPTS = Path(__file__).parents[1] / "scripts"
KILLS, MUTATIONS, SEED = os.environ.get("RETAIN_FAULTS", "10,60,0").split(",")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork")


def test_kills_and_damaged_files(tmp_path: Path) -> None:
    script = partial(forked.script, SCRIPTS / "faults.py", seconds=3600)
    asked = ("--out", tmp_path / "faults", "--kills", KILLS, "--mutations", MUTATIONS)
    asked += ("--seed", SEED)
    done = script(*asked)
    print(f"seed {SEED}\n{done.stdout}{done.stderr}")
    assert done.returncode == 0
    trials = [
        json.loads(t) for t in (tmp_path / "faults" / "trials.jsonl").read_text().splitlines()
    ]
    assert sum(t["kind"] == "mutation" for t in trials) == int(MUTATIONS)
    assert sum(t.get("kills", 0) for t in trials) >= int(KILLS)
    counted = {t["verdict"] for t in trials}
    assert counted >= {"same bytes", "refused in one line"}
    again = forked.script(
        SCRIPTS / "faults.py", *asked, "--seed", SEED
    )  # all trials are there: only the table is made
    assert (again.returncode, again.stdout) == (0, done.stdout)
    last = max(t["number"] for t in trials if t["kind"] == "mutation")
    one = forked.script(
        SCRIPTS / "faults.py", *asked, "--seed", SEED, "--trial", f"mutation-{last}"
    )
    known = next(t for t in trials if t["kind"] == "mutation" and t["number"] == last)
    found = json.loads(one.stdout)
    same = ("job", "file", "damage", "verdict")
    assert [found[k] for k in same] == [known[k] for k in same]


def test_what_is_bad_is_seen(tmp_path: Path) -> None:
    """A command that does damage itself: each verdict can be reached."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import faults
        from fault_inputs import Job
    finally:
        sys.path.remove(str(SCRIPTS))
    folder = tmp_path / "trial"
    (folder / "out").mkdir(parents=True)
    (folder / "out" / "a").write_text("as it should be")
    job = Job("job", "", "", ("out",))
    alone = faults.Reference(
        faults.results(folder, ["out"]), faults.listing(folder, ["."]), "", 1.0
    )

    def verdict(code: int | None, said: str = "", seconds: float = 1.0) -> str:
        ended = faults.Ended(code, said, seconds)
        return str(faults.judged(job, folder, alone, ended, 5.0, "out/a"))

    line = "retain: it cannot be read; got: x; allowed: y; fix: z\n"
    assert verdict(0) == "same bytes"
    assert verdict(2, line) == "refused in one line"
    assert verdict(2, line, 6.0) == "hang"
    assert verdict(None) == "hang"
    assert verdict(2, line + line) == "raw"
    assert verdict(2, "retain: ValueError: bad; fix: z\n") == "raw"
    assert verdict(2, "retain: it is bad\n") == "raw"
    assert verdict(2, "retain: the memory is full; got: x; fix: z\n") == "raw"
    assert verdict(1, "Traceback (most recent call last):\n") == "raw"
    assert verdict(130) == "raw"
    (folder / "out" / "a").write_text("something else")
    assert verdict(0) == "other"


@pytest.mark.parametrize("suffix", ["yaml", "json", "jsonl", "csv", "txt", "safetensors"])
def test_damage_changes_the_file_and_depends_on_the_draw_alone(suffix: str, tmp_path: Path) -> None:
    sys.path.insert(0, str(SCRIPTS))
    try:
        from fault_mutations import damage
    finally:
        sys.path.remove(str(SCRIPTS))
    import torch
    from safetensors.torch import save_file

    kinds = set()
    for number in range(120):
        left = []
        for _ in range(2):
            folder = tmp_path / "trial"
            path = folder / f"file.{suffix}"
            folder.mkdir(exist_ok=True)
            (folder / "other").write_text("other")
            if suffix == "safetensors":
                save_file({"a": torch.ones(2), "b": torch.ones(2)}, path, {"format": "pt"})
            else:
                path.write_text(
                    '{"a": [1, 2.5], "b": {"c": "text"}}\n' * (2 if suffix == "jsonl" else 1)
                )
            before = path.read_bytes()
            how = damage(path, random.Random(number))
            kinds.add(how)
            regular = path.is_file() and not path.is_symlink()
            left.append((how, path.read_bytes() if regular else None))
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        assert left[0] == left[1]
        assert left[0][1] != before or how in ("a line twice", "two lines swapped", "zeros")
    assert len(kinds) > 10
