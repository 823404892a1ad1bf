"""The report: one HTML page, two figures and a table, made from a `result.json` alone."""

from __future__ import annotations

from retain.report.page import write_report
from retain.report.schema import Result, read_result
from retain.report.tables import summary_table, sweep_table

__all__ = ["Result", "read_result", "summary_table", "sweep_table", "write_report"]
