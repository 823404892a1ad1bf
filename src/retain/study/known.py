"""The tasks, adapters and methods that a study may name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from retain.errors import ConfigError, unknown
from retain.study.grid import MethodFacts

__all__ = ["Known", "task_path"]

_PUBLISHED = "published/"


def task_path(task: str, base: Path) -> str | Path:
    """A task's name, or the path of its file, which starts at the study's folder."""
    return base / task if task.endswith((".yaml", ".yml")) else task


class Known:
    """The catalogue of the package; see `retain.study.grid.Catalogue`."""

    def order(self, reference: str) -> list[str]:
        """The tasks of ``published/NAME``, such as ``published/order4-14``."""
        from retain.data.specs import load_orders

        orders = load_orders()
        name = reference.removeprefix(_PUBLISHED)
        if not reference.startswith(_PUBLISHED) or name not in orders:
            raise unknown("order", reference, [f"{_PUBLISHED}{n}" for n in orders])
        return list(orders[name])

    def definition(self, task: str, base: Path) -> str:
        """Name and version of a task of the package; a digest of one in a file."""
        from retain.data.specs import load_task

        path = task_path(task, base)
        spec = load_task(path)
        if isinstance(path, str):
            return f"{spec.name}@{spec.version}"
        return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:16]

    def decoder(self, model: str) -> bool | None:
        """By its configuration; see `retain.models.load.is_decoder`."""
        from retain.models.load import is_decoder

        return is_decoder(model)

    def adapter(self, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        """Checks a kind of adapter and its options, and adds its defaults."""
        from retain.models.adapters.registry import adapter_kind

        whole: dict[str, Any] = adapter_kind(kind).check(options).model_dump(mode="json")
        return whole

    def method(self, kind: str, strength: float | None, options: dict[str, Any]) -> MethodFacts:
        """Checks a method and its options."""
        from retain.retention.registry import make_method, method_options

        made = make_method(kind, strength, **options)

        def refusal(adapter: str, decoder: bool | None) -> str | None:
            try:
                made.check(adapter, decoder is not False)
            except ConfigError as error:
                return error.what
            return None

        whole = method_options(kind) | options
        return MethodFacts(float(made.strength), made.stores_data, whole, made.head, refusal)
