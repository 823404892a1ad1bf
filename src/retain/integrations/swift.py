"""ms-swift: a file for ``--external_plugins``. In ``plugin.py``::

    from retain.integrations.swift import register

    register(source="self", budget=0.05)

and ``swift sft ... --external_plugins plugin.py --callbacks retention``.
"""

from __future__ import annotations

from typing import Any

from swift.callbacks import callbacks_map

from retain.integrations.fitting import FittingCallback

__all__ = ["register"]


def register(name: str = "retention", **options: Any) -> None:
    """Adds a callback to those that ``--callbacks`` can name.

    Args:
        name: what ``--callbacks`` calls it.
        **options: of `retain.integrations.FittingCallback`.
    """

    def made(args: Any, trainer: Any) -> FittingCallback:
        return FittingCallback(**options)

    made(None, None)  # a wrong option is said now, and not when a model has been loaded
    callbacks_map[name] = made
