"""Methods at the same score and size, and the best settings: records worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retain.errors import ConfigError
from retain.evaluation.matched import _at, choose, families, lines, named, read
from retain.records import RunRecord
from study_parts import SETTINGS, setting_run


def study(records: list[dict[str, Any]] = SETTINGS) -> list[RunRecord]:
    return [RunRecord.model_validate(record) for record in records]


def test_families_and_lines() -> None:
    other = setting_run(
        "none", "3e-4", 0, ".5 .6 .1 -2", kind="none", adapter={"name": "big", "rank": 9}
    )
    single = setting_run("none", "3e-4", 0, ".5 .6 .1 -2", kind="none", tasks=["a"])
    failed = setting_run("none", "3e-3", 0, ".5 .6 .1 -2", kind="none", status="failed")
    found = families(study([*SETTINGS, other, single, failed]))
    assert [(f.name, len(f.settings)) for f in found] == [
        ("lora none", 2), ("lora auto", 3), ("big none", 1),
    ]  # fmt: skip
    every = [line for family in found for line in lines(family)]
    assert [line.name for line in every] == [
        "lora none", "lora auto", "lora-1e-3 auto-100", "big none",
    ]  # fmt: skip
    assert named(every, "auto-100") is every[2] and named(every, "m big none o") is every[3]
    with pytest.raises(ConfigError, match=r"several methods.*m lora none o, m big none o"):
        named(every, "none")
    with pytest.raises(ConfigError, match="no method has this name; got: 'atuo'"):
        named(every, "atuo")
    strengths = [
        setting_run(f"l2-{s}", "1e-3", 0, ".5 .6 .1 -2", kind="l2") for s in ("0.5", "1e+2")
    ]
    (family,) = families(study(strengths))
    assert lines(family) == [family] and family.name == "lora-1e-3 l2"


def test_readings_by_hand() -> None:
    none, auto, hundred = (line for family in families(study()) for line in lines(family))
    one = read(auto, none, "learning", "forgetting")
    # seed 0 at .60 and .70: .02 - .10, .04 - .20; seed 1 at .64 alone: .03 + .04 / 5 - .12
    assert one.seeds == pytest.approx({0: -0.12, 1: -0.082})
    assert one.difference == pytest.approx(-0.101)
    assert (one.ours, one.theirs) == pytest.approx(((0.03 + 0.038) / 2, (0.15 + 0.12) / 2))
    assert (one.points, one.read, one.curve) == (4, 3, "method")
    assert (one.our_range, one.their_range) == ((0.6, 0.8), (0.6, 0.9))
    size = read(auto, none, "update_size", "forgetting")  # -1 is halfway, -2 below all
    assert size.seeds == pytest.approx({0: 0.04 - 0.2, 1: 0.05 - 0.3})
    assert (size.points, size.read) == (4, 2)
    kl = read(auto, none, "update_size", "kl")  # plain LoRA's records have none
    assert (kl.difference, kl.points, kl.their_range) == (None, 0, None)
    back = read(hundred, none, "learning", "forgetting")  # its own points, on the other's curve
    assert back.seeds == pytest.approx({0: 0.01 - 0.15, 1: 0.01 - (0.12 + 0.18 / 2)})
    assert back.curve == "reference" and back.ours == pytest.approx(0.01)
    far = read(hundred, none, "update_size", "forgetting")
    assert (far.difference, far.seeds, far.read, far.points) == (None, {}, 0, 2)
    assert (far.our_range, far.their_range) == ((-5.0, -5.0), (-2.0, -1.0))


def test_a_curve_is_that_of_loops() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(p) for p in random.integers(0, 6, (int(random.integers(1, 6)), 2)) / 6]
        x = float(random.integers(-2, 15) / 12)
        own: dict[float, list[float]] = {}
        for place, y in points:
            own.setdefault(place, []).append(y)
        means = {place: sum(ys) / len(ys) for place, ys in own.items()}
        below, above = [p for p in means if p <= x], [p for p in means if p >= x]
        want = None
        if below and above:
            a, b = max(below), min(above)
            share = (x - a) / (b - a) if b > a else 0.0
            want = means[a] + share * (means[b] - means[a])
        assert _at(points, x) == (None if want is None else pytest.approx(want))


def test_the_best_setting() -> None:
    none, auto = map(choose, families(study()))
    assert none is not None and auto is not None
    assert none.setting.name == "lora-1e-3 none" and none.ends == {"learning_rate": "highest"}
    assert auto.setting.name == "lora-1e-3 auto-100" and auto.tried == 3
    assert auto.numbers == {"learning_rate": 1e-3, "strength": 100}
    assert auto.means["average"] == pytest.approx(0.62) and auto.means["kl"] is None
    wider = [
        *SETTINGS,
        *(setting_run("auto", "3e-3", seed, ".1 .9 .8 0") for seed in (0, 1)),
        setting_run("auto-300", "1e-3", 0, ".99 .9 .1 0", strength=300),  # its seed 1 is missing
    ]
    again = choose(families(study(wider))[1])
    assert again is not None and again.ends == {"strength": "highest"} and again.tried == 4
    assert again.left_out == ["lora-1e-3 auto-300"]
    with pytest.raises(ConfigError, match=r"validation rows alone; got: runs of lora-1e-3 none .*"):
        choose(families(study([setting_run("none", "1e-3", 0, ".5 .6 .1 -2", split="test")]))[0])
