"""What tokenising left out of a set of rows, or cut."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["RowCounts"]


@dataclass
class RowCounts:
    """Counted by `retain.data.sources.encode`.

    Attributes:
        rows: that were given.
        left_out_no_room: rows whose prompt fills max_length, so that nothing is left to learn.
        left_out_empty: rows without anything to predict.
        completions_cut: completions whose end is behind max_length.
        texts_cut: texts whose end is behind max_length.
        tokens_cut: tokens behind max_length, of both.
    """

    rows: int = 0
    left_out_no_room: int = 0
    left_out_empty: int = 0
    completions_cut: int = 0
    texts_cut: int = 0
    tokens_cut: int = 0

    def lines(self) -> list[str]:
        """One line for each kind of loss that there was."""
        of = f"of {self.rows} rows"
        said = (
            (self.left_out_no_room, "are left out: the prompt fills max_length"),
            (self.left_out_empty, "are left out: nothing to predict"),
            (self.completions_cut, "have their completion cut at max_length, without its end"),
            (self.texts_cut, f"are cut at max_length ({self.tokens_cut:,} tokens in all)"),
        )
        return [f"{count} {of} {what}" for count, what in said if count]

    def to_dict(self) -> dict[str, int]:
        """As plain data."""
        return asdict(self)
