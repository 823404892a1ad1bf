"""What became of the rows: how many were left out, cut, or read in part."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

__all__ = ["RowCounts"]

_NAMED = 6  # so many columns are named in a line

_LINES = {
    "left_out_no_room": "have a prompt that fills {length}; they are left out",
    "left_out_empty": "hold fewer than two tokens; they are left out",
    "left_out_unlearned": "have nothing to learn (no assistant's turn within {length}, or every "
    "label -100); they are left out",
    "completions_cut": "are cut at {length} and lose the end of their answer",
    "completions_empty": "have an empty answer: its end token alone is learned",
    "texts_cut": "are cut at {length}",
    "rejected_unread": "are preference pairs: the chosen answer alone is read",
    "chats_unanswered": "are chats without an assistant's turn: read whole",
    "tools_unwritten": "have tools that the chat template does not write",
    "thoughts_unwritten": "have reasoning that the chat template does not write",
    "answers_unread": "have several answers: the first alone is read",
    "ends_unlearned": "are chats whose template leaves the end of a turn out of its generation "
    "marks: it is not learned",
}


@dataclass
class RowCounts:
    """Counts over the rows that were tokenised; calls with the same object add up."""

    rows: int = 0
    left_out_no_room: int = 0  # the prompt fills ``max_length``, so nothing is left to learn
    left_out_empty: int = 0  # no text, or fewer than two tokens
    left_out_unlearned: int = 0  # a chat without a turn of the assistant, labels all -100
    completions_cut: int = 0  # completions (or chats) that end before their end token
    completions_empty: int = 0  # of no text: their end token alone is learned
    texts_cut: int = 0  # texts of which the end is not read
    tokens_cut: int = 0  # tokens behind ``max_length``, estimated for very long texts
    rejected_unread: int = 0  # preference pairs, of which the chosen answer alone is read
    chats_unanswered: int = 0  # chats of a source without an assistant's turn, read whole
    tools_unwritten: int = 0  # chats whose tools the chat template does not write
    thoughts_unwritten: int = 0  # so with reasoning; many leave out that of earlier turns
    answers_unread: int = 0  # questions with several answers, of which the first is read
    ends_unlearned: int = 0  # chats whose template marks a turn without its end token
    columns_unread: int = 0  # columns that were passed over
    max_length: int = 0  # of the last call
    columns: dict[str, int] = field(default_factory=dict, repr=False)  # rows with each of those

    @property
    def left_out(self) -> int:
        """Rows that are not learned from."""
        return self.left_out_no_room + self.left_out_empty + self.left_out_unlearned

    def unread(self, column: str) -> None:
        """Counts a column of a row that was passed over."""
        self.columns[column] = self.columns.get(column, 0) + 1
        self.columns_unread = len(self.columns)

    def lines(self) -> list[str]:
        """One line for each kind of loss that happened; none where nothing was lost."""
        length = f"max_length={self.max_length}"
        lines = [
            f"{getattr(self, name)} of {self.rows} rows {what.format(length=length)}"
            for name, what in _LINES.items()
            if getattr(self, name)
        ]
        if self.tokens_cut:
            lines.append(f"about {self.tokens_cut} tokens behind {length} are not read")
        if self.columns:
            names = sorted(self.columns)
            named = ", ".join(f"{n} ({self.columns[n]} rows)" for n in names[:_NAMED])
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"columns that are not read: {named}{more}")
        return lines

    def to_dict(self) -> dict[str, int]:
        """The counts, for a record."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "columns"}
