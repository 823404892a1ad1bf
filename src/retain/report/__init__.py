"""The report: one HTML page, tables and pictures, made from result files alone."""

from __future__ import annotations

from retain.report.certificate import certificate_page
from retain.report.page import write_report
from retain.report.read import read_studies, schema_of
from retain.report.soften import soften_pictures

__all__ = ["certificate_page", "read_studies", "schema_of", "soften_pictures", "write_report"]
