"""Peak memory is that of a run, not of the runs before it in the same process."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from retain.study.resources import peak_memory, reset_peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot begin anew")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the accelerator's memory is measured")
def test_it_begins_anew() -> None:
    small = [torch.ones(2_000, 25) for _ in range(3_000)]  # 0.56 GiB in pieces that malloc keeps
    keep = small[::1_000]
    high = peak_memory()
    assert high is not None
    del small
    gc.collect()
    reset_peak_memory()
    low = peak_memory()
    assert low is not None
    assert low < high - 0.4
    assert len(keep) == 3
