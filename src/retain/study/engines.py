"""Where runs are done: one after another here, in several processes, or on a Ray cluster.

Each engine takes the runs that are left and yields the outcome of each as it comes. All call
`retain.study.runner.execute`, so a run is the same whichever does it; its numbers are the same
to the last bit where the number of threads and the kind of machine are.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from retain.errors import ConfigError
from retain.records import RunSpec
from retain.study.runner import Outcome, Say, execute
from retain.study.work import Work
from retain.study.workers import begin, quiet_libraries

__all__ = ["ENGINES", "check_engine", "in_order", "in_processes", "on_ray"]

ENGINES = ("local", "ray")

_DIED = "the process of the run died, perhaps for want of memory; got: no result; fix: fewer --jobs"


def check_engine(engine: str) -> None:
    """Refuses an engine that is not installed.

    Raises:
        ConfigError: Ray is asked for and missing.
    """
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "Ray is not installed",
            got="--engine ray",
            allowed="local, or ray once it is installed",
            fix="pip install 'retain-lora[ray]', or leave --engine out",
        )


def in_order(runs: Sequence[RunSpec], work: Work, say: Say | None = None) -> Iterator[Outcome]:
    """One run after another, in this process."""
    for run in runs:
        if say is not None:
            say(run.title)
        yield execute(run, work, say)


def in_processes(runs: Sequence[RunSpec], work: Work, jobs: int) -> Iterator[Outcome]:
    """Up to `jobs` runs at a time, each in a worker process.

    When a worker dies, the runs that were under way are done again one at a time; the one whose
    worker dies again is unfinished, and tried again next time.
    """
    left = deque(runs)
    with quiet_libraries():
        while left:
            suspects: list[RunSpec] = []
            yield from _pool(left, work, jobs, suspects)
            alone = deque(suspects)
            while alone:
                died: list[RunSpec] = []
                yield from _pool(alone, work, 1, died)
                for run in died:
                    yield Outcome(run.key, "unfinished", _DIED)


def _pool(left: deque[RunSpec], work: Work, jobs: int, died: list[RunSpec]) -> Iterator[Outcome]:
    """Takes runs from `left` until there are none, or a worker dies: `died` gets its runs."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch badly
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=begin)
    running: dict[Future[Outcome], RunSpec] = {}
    try:
        while left or running:
            while left and len(running) < jobs:
                future = pool.submit(execute, left[0], work)
                running[future] = left.popleft()  # not before: the pool may be broken
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                del running[future]
                yield outcome
    except BrokenProcessPool:
        died += running.values()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()  # what they keep is whole at any moment
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def on_ray(runs: Sequence[RunSpec], work: Work, jobs: int | None = None) -> Iterator[Outcome]:
    """Each run a Ray task, on the cluster of ``RAY_ADDRESS`` or on one that is started here.

    All machines must see the output folder, the data and the package. A task asks for as many
    processors as the study has threads, and for one accelerator where the cluster has any. A
    cluster that is started here has processors for `jobs`, or all.

    Raises:
        ConfigError: Ray is missing.
    """
    check_engine("ray")
    import ray  # type: ignore[import-not-found,unused-ignore]

    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False}
        if not os.environ.get("RAY_ADDRESS"):
            options["num_cpus"] = jobs * (work.threads or 1) if jobs else None
        ray.init(**options)
    try:
        graphics = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=work.threads or 1, num_gpus=graphics, max_retries=0)(execute)
        running = {remote.remote(run, work): run for run in runs}
        try:
            while running:
                ready, _ = ray.wait(list(running), num_returns=1)
                run = running.pop(ready[0])
                try:
                    yield ray.get(ready[0])
                except ray.exceptions.WorkerCrashedError:
                    yield Outcome(run.key, "unfinished", _DIED)
        finally:
            for task in running:
                ray.cancel(task, force=True)
    finally:
        if mine:
            ray.shutdown()
