"""Kills and damages what retain works on, again and again, and says what came of it.

    python scripts/faults.py --out runs/faults --kills 200 --mutations 2000

Commands run on a tiny random model: fit, train, resume, study, soften, continue.

- A **kill**: SIGKILL at a random moment, up to three times; then the same command (with --resume
  where a run has begun) is left alone. Its results must be the bytes of a run that was never
  stopped, and nothing else may lie there.
- A **mutation**: one file is damaged: settings, rows, curvature, adapter, state, checkpoint or
  record. The command must refuse it in one line and within --patience seconds; or end in the
  results of the undamaged file; or, where the file says something else that is sound (other rows,
  another setting), in a record that names these other inputs.

Each trial depends on the seed and its number alone. Trials that ``trials.jsonl`` in --out already
holds are not done again. The last output is a table, which docs/faults.md explains.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip

from fault_inputs import BASES, JOBS, Job, stop, write_inputs
from fault_mutations import damage
from fault_runs import (
    Ended,
    alone,
    copy,
    fork,
    lines_of,
    listing,
    load_libraries,
    named_inputs,
    record_of,
    results,
    run,
)  # fmt: skip

VERDICTS = (
    "same bytes", "refused in one line", "other inputs, named", "raw", "hang", "silent",
    "leftovers", "other bytes", "ended first",
)  # fmt: skip
BAD = frozenset({"raw", "hang", "silent", "leftovers", "other bytes"})

SOUND = frozenset(["config", "rows", ("adapter", "soften")])
"""Families of files that may say something else and be sound: of these no record has a digest."""


class Reference(NamedTuple):
    """What a job leaves when nothing happens."""

    results: dict[str, str]
    files: set[str]
    inputs: str
    seconds: float


def main() -> int:
    """Runs the trials that are asked for, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/faults"), help="folder of the trials"
    )
    parser.add_argument("--kills", type=int, default=20, help="kills that strike")
    parser.add_argument("--mutations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds until a refusal")
    parser.add_argument("--only", default="", help="jobs whose name begins so")
    parser.add_argument("--trial", default="", help="one trial, such as mutation-17; it is kept")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    load_libraries()
    references = prepare(out, options.seed)
    if options.trial:
        kind, _, number = options.trial.rpartition("-")
        found = trial(out, options, references, kind, int(number), keep=True)
        print(json.dumps(found, indent=1))
        return found["verdict"] in BAD
    done = read_trials(out)
    workers = [fork(partial(work, out, options, references, done, n)) for n in range(options.jobs)]
    ended = [os.waitpid(worker, 0)[1] for worker in workers]
    trials = list(read_trials(out).values())
    print(table(trials))
    return any(ended) or any(t["verdict"] in BAD for t in trials)


def prepare(out: Path, seed: int) -> dict[str, Reference]:
    """The folders of inputs, and what each job leaves of them when nothing happens."""
    bases, times = out / "bases", out / "seconds.json"
    if not times.exists():
        shutil.rmtree(bases, ignore_errors=True)
        for name, (before, job) in BASES.items():
            made = bases / name / "trial"
            if not before:
                os.waitpid(fork(partial(write_inputs, made, seed)), 0)
            else:
                copy(bases / before / "trial", made)
            if name == "stopped":
                stop(made)
            if name == "half":
                study = JOBS["study"]
                run(study.argv(made), made, 300, 0.0, "out/state/*/state.json")
            if job:
                alone(JOBS[job], made)
        seconds = {}
        for job_name, each in JOBS.items():
            copy(bases / each.base / "trial", out / "reference" / job_name / "trial")
            seconds[job_name] = alone(each, out / "reference" / job_name / "trial")
        times.write_text(json.dumps(seconds))
    found = {}
    for job_name, took in json.loads(times.read_text()).items():
        folder, outputs = out / "reference" / job_name / "trial", JOBS[job_name].outputs
        left, files = results(folder, outputs), listing(folder, ["."])
        found[job_name] = Reference(left, files, named_inputs(folder, outputs), took)
    return found


def read_trials(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    path = out / "trials.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(t["kind"], t["number"]): t for t in map(json.loads, lines)}


def work(out: Path, options: Any, references: Any, done: Any, worker: int) -> None:
    """One worker's share of the trials."""
    for kind, count in (("kill", options.kills), ("mutation", options.mutations)):
        struck, number = 0, worker
        share = len(range(worker, count, options.jobs))
        while struck < share:
            found = done.get((kind, number))
            if found is None:
                found = trial(out, options, references, kind, number)
                line = json.dumps(found) + "\n"
                with (out / "trials.jsonl").open("ab", buffering=0) as file:
                    file.write(line.encode())
                if found["verdict"] in BAD:
                    print(line, end="", flush=True)
            struck += found.get("kills", 1)
            number += options.jobs


def trial(
    out: Path, options: Any, references: dict[str, Reference], kind: str, number: int, *,
    keep: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One trial, from the seed and its number."""
    draw = random.Random(f"{options.seed}:{kind}:{number}")
    jobs = [
        job
        for job in JOBS.values()
        if (job.killed if kind == "kill" else job.targets) and job.name.startswith(options.only)
    ]
    job = draw.choice(jobs)
    folder = out / f"work-{number % options.jobs}" / "trial"
    copy(out / "bases" / job.base / "trial", folder)
    act = killed if kind == "kill" else mutated
    found = act(job, folder, references[job.name], draw, options.patience)
    if not keep:
        shutil.rmtree(folder.parent)
    return {"kind": kind, "number": number, "job": job.name, **found}


def killed(
    job: Job, folder: Path, alone: Reference, draw: random.Random, patience: float
) -> dict[str, Any]:
    """Kills a command up to three times, then lets it end."""
    moments, kills = [], 0
    for _ in range(draw.randint(1, 3)):
        moments.append(draw.uniform(0, alone.seconds))
        ended = run(job.argv(folder), folder, 300, moments[-1])
        kills += ended.code is None
        if ended.code is not None:
            break
    if ended.code is None:
        ended = run(job.argv(folder), folder, 30 + 5 * alone.seconds)
    found = {"kills": kills, "moments": moments, "of": alone.seconds}
    if ended.code != 0 or "Traceback" in ended.said:
        verdict = "hang" if ended.code is None else "raw"
        return found | {"verdict": verdict, "said": ended.said[-2000:], "code": ended.code}
    odd = differing(results(folder, job.outputs), alone.results)
    left = sorted(listing(folder, ["."]) - alone.files)
    if odd or left:
        return found | {"verdict": "other bytes" if odd else "leftovers", "files": odd or left}
    return found | {"verdict": "same bytes" if kills else "ended first"}


def differing(found: dict[str, str], want: dict[str, str]) -> list[str]:
    return sorted(n for n in found.keys() | want.keys() if found.get(n) != want.get(n))


def mutated(
    job: Job, folder: Path, alone: Reference, draw: random.Random, patience: float
) -> dict[str, Any]:
    """Damages one file, and runs the command."""
    family, pattern = draw.choice(job.targets)
    every = (pattern, *(other for _, other in job.targets))
    path = draw.choice(next(f for p in every if (f := sorted(folder.glob(p)))))
    before = lines_of(path) if job.name == "fit" else None
    how = damage(path, draw)
    found: dict[str, Any] = {
        "family": family, "file": str(path.relative_to(folder)), "damage": how
    }  # fmt: skip
    ended = run(job.argv(folder), folder, 30 + 5 * alone.seconds)
    found |= {"code": ended.code, "seconds": round(ended.seconds, 2)}
    verdict = judged(job, folder, alone, ended, patience, found["file"])
    if verdict == "other":
        named = named_inputs(folder, job.outputs) != alone.inputs
        if job.name == "fit":  # whose result is no record
            named = lines_of(path) != before
        may_be = family in SOUND or (family, job.name) in SOUND
        verdict = "other inputs, named" if may_be and named else "silent"
        found["differs"] = differing(results(folder, job.outputs), alone.results)[:9]
    if verdict != "same bytes":
        found["said"] = ended.said[-1500:]
    return found | {"verdict": verdict}


def judged(
    job: Job, folder: Path, alone: Reference, ended: Ended, patience: float, damaged: str
) -> str:
    """A verdict, or "other" for results that are not those of the undamaged file."""
    if ended.code is None:
        return "hang"
    failed = failures(folder, job.outputs) if "study" in job.name else []
    if "Traceback" in ended.said or ended.code not in ((0, 1, 2) if failed else (0, 2)):
        return "raw"
    if ended.code == 2 or failed:
        lines = failed or ended.said.splitlines()
        one = all(sound(line) for line in failed) if failed else len(lines) == 1 and sound(lines[0])
        if not one or "memory is full" in ended.said:
            return "raw"
        return "refused in one line" if ended.seconds <= patience or failed else "hang"
    found = differing(results(folder, job.outputs), alone.results)
    if "/untrained/" in damaged:  # a cache, which a finished study does not read
        found = [name for name in found if name != damaged]
    return "other" if found else "same bytes"


def sound(line: str) -> bool:
    """Whether a line says what was got and what to do, in words of ours."""
    return "; fix: " in line and not re.match(
        r"(?:retain: )?[A-Za-z_.]*(?:Error|Exception)\b", line
    )


def failures(folder: Path, names: tuple[str, ...]) -> list[str]:
    """What the records of failed runs say."""
    every = (name for name in listing(folder, names) if "/runs/" in name and name.endswith(".json"))
    records = (record_of(folder / name) for name in every)
    return [
        str(record.get("error"))
        for record in records
        if isinstance(record, dict) and record.get("status") == "failed"
    ]


def table(trials: list[dict[str, Any]]) -> str:
    """Markdown: what was tried, and what came of it."""
    counts: dict[str, Counter[str]] = {}
    for t in trials:
        what = f"{t['job']}, killed" if t["kind"] == "kill" else f"{t['job']}: {t['family']}"
        counts.setdefault(what, Counter())[t["verdict"]] += t.get("kills", 1) or 1
    shown = [v for v in VERDICTS if v in BAD or any(c[v] for c in counts.values())]
    lines = [f"| what | tried | {' | '.join(shown)} |", "|" + "---|" * (len(shown) + 2)]
    total: Counter[str] = Counter()
    for what in sorted(counts):
        total += counts[what]
        lines.append(_line(what, counts[what], shown))
    return "\n".join([*lines, _line("all", total, shown)])


def _line(what: str, count: Counter[str], shown: list[str]) -> str:
    return f"| {what} | {sum(count.values())} | {' | '.join(str(count[v]) for v in shown)} |"


if __name__ == "__main__":
    sys.exit(main())
