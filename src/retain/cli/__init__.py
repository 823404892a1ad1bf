"""The command line, ``retain``."""

from __future__ import annotations

from retain.cli.app import main

__all__ = ["main"]
