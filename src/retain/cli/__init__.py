"""The command line, ``retain``."""

from __future__ import annotations

import sys

from retain.extras import command_of, missing

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see `retain.cli.app.main`.

    Where what every command needs is not installed, one line says so, and the exit code is 2.
    """
    try:
        from retain.cli.app import main as run
    except ModuleNotFoundError as error:
        known = missing(error, command_of(argv))
        if known is None:
            raise
        print(f"retain: {known}", file=sys.stderr)
        return known.exit_code
    return run(argv)
