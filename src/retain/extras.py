"""Packages that only a part of retain needs: what to install where one of them is missing.

The core (the two lines, `Retention` in a plain loop, curvatures and their files) needs torch,
transformers, peft, accelerate, safetensors, numpy and tqdm, and what these bring. All else comes
with an extra of the package (``pip install 'retain-lora[cli]'``).
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from retain.errors import RetainError

__all__ = ["PACKAGES", "MissingExtra", "classes_of", "command_of", "load", "missing"]

PACKAGES: dict[str, tuple[str, str]] = {
    "datasets": ("datasets", "data"),
    "pyarrow": ("pyarrow", "data"),
    "filelock": ("filelock", "cli"),
    "gguf": ("gguf", "cli"),
    "jinja2": ("Jinja2", "cli"),
    "markupsafe": ("MarkupSafe", "cli"),
    "pydantic": ("pydantic", "cli"),
    "regex": ("regex", "cli"),
    "rich": ("rich", "cli"),
    "typer": ("typer", "cli"),
    "yaml": ("PyYAML", "cli"),
    "attr": ("attrs", "study"),
    "scipy": ("SciPy", "study"),
    "sklearn": ("scikit-learn", "study"),
    "altair": ("altair", "report"),
    "vl_convert": ("vl-convert-python", "report"),
    "trl": ("trl", "trl"),
    "lm_eval": ("lm-eval", "eval"),
    "ray": ("ray", "ray"),
}
"""Module -> the package that holds it, and the extra of retain that brings it."""

_COMMANDS = {"study": "study", "report": "report", "demo": "study,report"}
"""Commands that need more than ``cli``, and the extra that holds all of it."""


class MissingExtra(RetainError, ImportError):
    """A package that only a part of retain needs is not installed; the line names the extra.

    Args:
        user: what needs it, such as "retain study".
        package: what it needs.
        extra: of retain, that brings it.
    """

    def __init__(self, user: str, package: str, extra: str) -> None:
        super().__init__(f"{user} needs {package}: pip install 'retain-lora[{extra}]'")


def missing(error: ImportError, user: str) -> MissingExtra | None:
    """An import that failed for its `user`, as one line; None where no extra has the package."""
    top = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or top not in PACKAGES:
        return None
    package, extra = PACKAGES[top]
    if extra in {"data", "cli", "study"}:  # all of which the larger extras hold
        extra = _COMMANDS.get(user.removeprefix("retain "), extra)
    return MissingExtra(user, package, extra)


def command_of(argv: list[str] | None) -> str:
    """What a command line asks for, such as "retain study"."""
    words = sys.argv[1:] if argv is None else argv
    name = next((word for word in words if not word.startswith("-")), "")
    return f"retain {name[:40]}".strip()


def load(module: str, user: str) -> Any:
    """A module of an extra, by its full name; raises `MissingExtra` for its `user` otherwise."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        known = missing(error, user)
        if known is None:
            raise
        raise known from error


def classes_of(module: str, name: str) -> Any:
    """A class in a tuple, for ``except`` and ``isinstance``, without importing its package.

    None of a package that is not imported yet: it has raised nothing, and nothing is of it.
    """
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)
