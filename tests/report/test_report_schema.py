"""Reading a `result.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retain.errors import SourceError
from retain.report.schema import Claim, Result, read_result


def test_round_trip(result_path: Path, result: dict[str, Any]) -> None:
    read = read_result(result_path)
    assert read.model_dump(mode="json", by_alias=True) == result
    assert [row.name for row in read.main_rows] == ["base", "lora", "retain-100"]


def test_newer_fields_are_ignored(result: dict[str, Any]) -> None:
    result["later"] = 1
    result["rows"][0]["target"]["later"] = {"a": 1}
    assert Result.model_validate(result).rows[0].name == "base"


def test_no_chosen_strength(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        row["chosen"] = False
    assert Result.model_validate(result).chosen is None


def _without_schema(data: dict[str, Any]) -> None:
    del data["schema"]


def _other_schema(data: dict[str, Any]) -> None:
    data["schema"] = "retain.result/9"


def _percent(data: dict[str, Any]) -> None:
    data["rows"][1]["target"]["exact_match"] = 31.5


def _no_rows(data: dict[str, Any]) -> None:
    data["rows"] = []


def _not_a_number(data: dict[str, Any]) -> None:
    data["rows"][1]["forgetting"]["kl"] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without_schema, "schema None"),
        (_other_schema, "retain.result/9"),
        (_percent, "rows.1.target.exact_match"),
        (_no_rows, "rows"),
        (_not_a_number, "rows.1.forgetting.kl"),
    ],
)
def test_bad_results(
    result: dict[str, Any], tmp_path: Path, spoil: Callable[[dict[str, Any]], None], said: str
) -> None:
    spoil(result)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(SourceError) as caught:
        read_result(path)
    message = str(caught.value)
    assert "\n" not in message
    assert said in message
    for part in ("got:", "allowed:", "fix:"):
        assert part in message


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe"])
def test_bad_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read_result(path)
    assert "\n" not in str(caught.value)
    assert "fix:" in str(caught.value)


def test_verdicts() -> None:
    def verdict(**fields: Any) -> str:
        return Claim(claim="c", **fields).verdict

    assert verdict(value=1.0, bound=2.0, relation="<=") == "holds"
    assert verdict(value=3.0, bound=2.0, relation="<=") == "does not hold"
    assert verdict(value=3.0, bound=2.0, relation="<=", holds=True) == "does not hold"
    assert verdict(value=1.0, bound=2.0, relation="<=", holds=False) == "does not hold"
    assert verdict(bound=2.0, relation="<=") == "not measured"
