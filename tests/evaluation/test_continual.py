"""The metrics of a sequence, worked by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from retain.errors import ConfigError
from retain.evaluation.continual import continual_metrics

MATRIX = [[0.8, 0.3, 0.5], [0.9, 0.7, 0.4], [0.6, 0.75, 0.9]]
BEFORE = [0.2, 0.25, 0.35]


def test_a_hand_worked_example() -> None:
    got = continual_metrics(MATRIX, BEFORE, references=[0.85, 0.9, 0.8])
    assert got.average == pytest.approx((0.6 + 0.75 + 0.9) / 3)
    assert got.learning == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    # task 1: best earlier 0.9, at the end 0.6; task 2: best earlier 0.7, at the end 0.75
    assert got.forgetting == pytest.approx((0.3 - 0.05) / 2)
    assert got.backward_transfer == pytest.approx((-0.2 + 0.05) / 2)
    # task 2 before it was learned: 0.3 against 0.25; task 3: 0.4 against 0.35
    assert got.forward_transfer == pytest.approx((0.05 + 0.05) / 2)
    assert got.intransigence == pytest.approx((0.05 + 0.2 - 0.1) / 3)
    assert list(got.to_dict()) == [
        "average",
        "learning",
        "forgetting",
        "backward_transfer",
        "forward_transfer",
        "intransigence",
    ]


def test_the_best_may_be_from_before_the_task_was_learned() -> None:
    got = continual_metrics([[0.9, 0.8, 0.1], [0.9, 0.5, 0.1], [0.9, 0.4, 0.9]])
    assert got.forgetting == pytest.approx((0.0 + 0.4) / 2)
    assert got.backward_transfer == pytest.approx((0.0 - 0.1) / 2)
    assert got.forward_transfer is None
    assert got.intransigence is None


def test_scores_that_were_not_measured_are_no_best() -> None:
    nan = float("nan")
    matrix = [[0.5, 0.4, nan], [0.4, 0.6, 0.3], [0.2, 0.5, 0.7]]
    found = continual_metrics(matrix, [0.1, 0.1, 0.1])
    assert found.forgetting == pytest.approx(((0.5 - 0.2) + (0.6 - 0.5)) / 2)
    assert found.forward_transfer == pytest.approx((0.3 + 0.2) / 2)
    assert math.isnan(continual_metrics([[nan, 0.1], [0.2, 0.3]]).learning)


def test_one_task_has_neither_forgetting_nor_transfer() -> None:
    got = continual_metrics([[0.7]], [0.5], [0.8])
    assert (got.average, got.learning) == (0.7, 0.7)
    assert got.forgetting is got.backward_transfer is got.forward_transfer is None
    assert got.intransigence == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("matrix", "before"), [([], None), ([[1.0, 0.5]], None), ([[1.0]], [0.1, 0.2])]
)
def test_a_matrix_that_is_not_square_is_refused(
    matrix: list[list[float]], before: list[float] | None
) -> None:
    with pytest.raises(ConfigError, match="not square"):
        continual_metrics(matrix, before)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from retain.evaluation.continual import *; "
        "continual_metrics([[1.0]]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
