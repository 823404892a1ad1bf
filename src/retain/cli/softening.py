"""What ``retain soften`` computes and records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.cli.common import Screen
from retain.cli.measure import check_finite, own_text

if TYPE_CHECKING:
    from retain.evaluation.forgetting import Reference

__all__ = ["Softening"]

SCHEMA = "retain.soften/1"
MEASURED = 5
"""Points of the curve whose KL is measured, beside the one that is written."""


class Softening:
    """One adapter's softening: its curve, the point that is chosen, and their record.

    Args:
        model: the base with the finished adapter.
        curvature: of the source.
        target: of the task; None for plain distance.
        depth: of the subspaces.
        epsilon: the target's damping.

    Raises:
        RetainError: whatever `retain.soften` refuses.
    """

    def __init__(
        self, model: Any, curvature: Any, target: Any, *, depth: int | None, epsilon: float
    ) -> None:
        from retain.retention.soften.adapter import soften

        self.model, self.curvature, self.target = model, curvature, target
        self.epsilon = epsilon
        self.base: Reference | None = None
        self.soft = soften(model, curvature, target=target, depth=depth, epsilon=epsilon)

    def record(self, budget: float, points: int) -> dict[str, Any]:
        """The curve and the point within the budget, as plain data.

        Args:
            budget: in measured nats after `measure_on`, else in predicted ones.
            points: of the curve.

        Raises:
            ConfigError: the budget is not above 0, or out of reach.
        """
        if self.base is None:
            self.chosen = self.soft.within(budget)
        else:
            self.chosen = self.soft.within_measured(budget, lambda: self._found()["kl"])
        unknown = {"measured": None, "scaled_measured": None}
        curve = [p.to_dict() | unknown for p in self.soft.curve(points)]
        chosen = self.chosen.point.to_dict() | unknown
        record = {
            "budget": budget, "budget_of": "predicted" if self.base is None else "measured",
            "inside": chosen["mu"] == 0, "depth": self.soft.depth,
            "epsilon": self.epsilon, "chosen": chosen, "curve": curve,
        }  # fmt: skip
        if self.base is not None:
            self._measure(record)
        return record

    def measure_on(
        self, tokenizer: Any, rows: Any, size: dict[str, int], seed: int, screen: Screen
    ) -> None:
        """Takes in held-out text, to measure the KL on from now on.

        Args:
            tokenizer: for the text.
            rows: the text; None lets the base write it.
            size: ``rows``, ``max_length`` and ``batch_size``.
            seed: of the run; text that the base writes depends on it.
            screen: where to say so.
        """
        from retain.data.draws import HELD_OUT, sample
        from retain.data.sources import encode
        from retain.evaluation.forgetting import Reference
        from retain.models.heads import is_causal, is_regression
        from retain.models.sizes import check_sizes

        count, length = size["rows"], size["max_length"]
        if rows is None:
            rows = own_text(self.model, tokenizer, size, seed, screen)
        causal = is_causal(self.model)
        regression = is_regression(self.model)
        every = encode(
            rows, tokenizer, max_length=length, causal=causal, loss="source", regression=regression
        )
        examples = sample(every, count, HELD_OUT + seed)
        check_sizes(self.model, examples, tokenizer, labels=not regression)
        batch = min(size["batch_size"], len(examples))
        self.base = Reference(self.model, examples, batch_size=batch, progress=screen.progress)

    def _found(self) -> dict[str, Any]:
        """What is measured now.

        Raises:
            ModelError: the KL is not finite.
        """
        assert self.base is not None
        found = self.base.measure(self.model)
        check_finite(found.kl)
        return found.to_dict()

    def _measure(self, record: dict[str, Any]) -> None:
        """Adds the measured KL to the chosen point and to some of the curve, in place.

        Beside each it is measured for the adapter times one number, at as many predicted nats.
        """
        curve, last = record["curve"], len(record["curve"]) - 1
        some = {round(i * last / (MEASURED - 1)) for i in range(MEASURED)}
        for point in [record["chosen"], *(curve[i] for i in sorted(some))]:
            mine = point is record["chosen"]
            for key, update in (
                ("measured", self.chosen if mine else self.soft.at(point["mu"])),
                ("scaled_measured", self.soft.scaled(point["nats"])),
            ):
                self.soft.apply(update)
                point[key] = self._found()

    def described(
        self, record: dict[str, Any], name: str, dtype: str, seed: int, files: dict[str, Any]
    ) -> dict[str, Any]:
        """The whole `soften.json`.

        Args:
            record: of `record`.
            name: the base model's.
            dtype: its precision.
            seed: of the run.
            files: where what was given lies.
        """
        from retain.models.fingerprint import fingerprint
        from retain.provenance import provenance

        target = self.target
        return {
            "schema": SCHEMA, **provenance(seed), **files,
            "model": {"name": name, "dtype": dtype, "fingerprint": fingerprint(self.model)},
            "unit": "half a squared distance" if target is None else "nats per token",
            "info": self.curvature.info.to_dict(),
            "target_info": target and target.info.to_dict(),
            "target_around": target and ("adapter" if target.anchor else "base"),
            **record,
        }  # fmt: skip

    def apply(self) -> None:
        """Puts the chosen point into the model."""
        self.soft.apply(self.chosen)

    def pictures(self, result: dict[str, Any]) -> dict[str, bytes]:
        """The curve as files, by their names."""
        from retain.report.figures import soften_png
        from retain.report.softening import SoftCurve
        from retain.report.svg import soften_svg

        curve = SoftCurve.of(result)
        return {
            "soften.svg": soften_svg(curve, 820, 430, 13.5).encode(),
            "soften.png": soften_png(curve),
        }

    def write_pictures(self, pictures: dict[str, bytes], folder: Path) -> list[Path]:
        """Writes them, each whole.

        Raises:
            OutputError: one cannot be written.
        """
        from retain.files import whole_file

        for name, content in pictures.items():
            with whole_file(folder / name, "the picture") as scratch:
                scratch.write_bytes(content)
        return [folder / name for name in pictures]
