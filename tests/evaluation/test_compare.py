"""Differences of two models, item by item."""

from __future__ import annotations

import pytest

from retain.evaluation.compare import compared, difference
from retain.intervals import paired_shares

NATS = [5.5, 6.1, 7.2, 5.0]


def test_differences_in_nats_are_no_shares() -> None:
    """Though one model's, given twice, are 0 item by item."""
    assert difference(NATS, NATS) == {"value": 0.0, "interval": None, "n": 4}
    assert difference(NATS, NATS) == difference(NATS, NATS, [1] * 4)
    told = compared(NATS, [NATS, NATS], label="loss", unit="nats per row", better=-1)
    assert [told["changes"][0]["interval"], told["between"][0]["interval"]] == [None, None]
    other = [*NATS[:2], NATS[2] - 1, NATS[3]]
    assert difference(NATS, other) == difference(NATS, other, [1] * 4)


def test_a_difference_of_shares_has_newcombes_interval() -> None:
    ours, theirs = [1, 1, 0, 1], [1, 0, 0, 1]
    want = list(paired_shares([True, True, False, True], [True, False, False, True]))
    assert difference(ours, theirs)["interval"] == pytest.approx(want)
    assert difference(ours, ours)["interval"] is not None
