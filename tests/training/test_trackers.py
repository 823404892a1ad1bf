"""What a tracker of ``report_to`` has written down: read back from its own files, offline."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_callback import fit, trainer

from retain import RetentionCallback
from tiny import tiny

NAMES = ("task_loss", "predicted_nats", "retention_strength")

Curves = dict[str, list[float]]
"""Name -> its value at each of three steps."""


def of_tensorboard(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [e.value for e in found.Scalars(f"train/{name}")] for name in NAMES}


def of_mlflow(folder: Path) -> Curves:
    def values(name: str) -> list[float]:
        (file,) = folder.glob(f"mlruns/*/*/metrics/{name}")
        return [float(line.split()[1]) for line in file.read_text().splitlines()]

    return {name: values(name) for name in NAMES}


def of_wandb(folder: Path) -> Curves:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # which ends the process that writes; `finish` may come back before it has
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = [Record.FromString(data).history.item for data in _logged(file.read_bytes())]
    found = [{"/".join(i.nested_key) or i.key: i.value_json for i in row} for row in rows]
    found = [row for row in found if "train/loss" in row]
    return {name: [float(row[f"train/{name}"]) for row in found] for name in NAMES}


def _logged(data: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB lays them out, behind a header of 7 bytes."""
    place, block, record = 7, 32768, b""
    while place + 7 <= len(data):
        if (left := block - place % block) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        place += 7 + size
        record += data[place - size : place]
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def of_trackio(folder: Path) -> Curves:
    (file,) = folder.glob("*.db")
    with sqlite3.connect(file) as base:
        rows = [json.loads(m) for (m,) in base.execute("SELECT metrics FROM metrics ORDER BY step")]
    rows = [row for row in rows if "train/loss" in row]
    return {name: [row[f"train/{name}"] for row in rows] for name in NAMES}


READERS = {
    "tensorboard": of_tensorboard, "mlflow": of_mlflow, "wandb": of_wandb, "trackio": of_trackio
}  # fmt: skip

SETTINGS = {
    "TENSORBOARD_LOGGING_DIR": "{}", "TRACKIO_DIR": "{}", "MLFLOW_TRACKING_URI": "file://{}/mlruns",
    "MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_DIR": "{}", "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}  # fmt: skip


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_has_what_the_log_has(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tracked"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    for name, value in SETTINGS.items():  # before the import, at which trackio reads its own
        monkeypatch.setenv(name, value.format(folder))
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    model = tiny("llama")
    callback = RetentionCallback(fit(model), strength=7.0)
    run = trainer(model, tmp_path / "out", [callback], report_to=tracker)
    run.train()
    log = [entry for entry in run.state.log_history if "loss" in entry]
    found = READERS[tracker](folder)
    assert found["retention_strength"] == [7.0] * 3 and found["predicted_nats"][-1] > 0
    for name, values in found.items():
        assert values == pytest.approx([entry[name] for entry in log], rel=1e-6), name
