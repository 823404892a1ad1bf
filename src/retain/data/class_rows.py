"""A classifier's rows as tokens, each with its label."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retain.data.batches import Example
from retain.data.contents import Pair, Ready, Row, Text, check_text
from retain.data.counts import RowCounts
from retain.data.formats import content_of
from retain.data.labels import target_of
from retain.data.messages import native
from retain.data.ready import ready_classified
from retain.data.tokens import need, plain
from retain.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ClassRows"]


class ClassRows:
    """Tokenises one row after another.

    Args:
        tokenizer: None will do for rows that are tokenised already.
        max_length: tokens of a row at most.
        regression: whether labels are values; see `retain.data.labels.target_of`.
        counts: of what was left out or cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
        regression: bool | None,
        counts: RowCounts,
    ) -> None:
        self.given, self.max_length, self.counts = tokenizer, max_length, counts
        self.regression = regression

    def read(self, row: Row) -> list[Example]:
        """A row's example, or none.

        Raises:
            SourceError: a row of no known format, a damaged one, or a label that is no number.
        """
        content = content_of(row, causal=False, counts=self.counts)
        target = target_of(_label(row), self.regression)
        more, size = 0, self.max_length
        if isinstance(content, Ready):
            ids, segments = ready_classified(content.cells)
        else:
            check_text(content)
            assert isinstance(content, Text | Pair)
            if isinstance(content, Pair):
                ids, segments, more = self._tokens(content.first, content.second)
            else:
                ids, segments, more = self._tokens(content.text)
        if not ids:
            self.counts.left_out_empty += 1
            return []
        if more or len(ids) > size:
            self.counts.texts_cut += 1
            self.counts.tokens_cut += more + max(0, len(ids) - size)
        return [Example(tuple(ids[:size]), (target,), (), tuple(segments[:size]))]

    def _tokens(self, *texts: str) -> tuple[list[int], list[int], int]:
        """One or two texts as the tokenizer joins and cuts them: tokens, types, tokens behind."""
        tok, size = need(self.given), self.max_length
        more = 0
        short = []
        for text in texts:
            room = max(4096, 16 * size)
            while len(text) > room and len(plain(tok, text[:room])) < 2 * size:
                room *= 8
            short.append(text[:room])
            more += round(max(0, len(text) - room) / 4)
        out = tok(*short, verbose=False)
        if len(out["input_ids"]) > size:
            more += len(out["input_ids"]) - size
            out = tok(*short, truncation=True, max_length=size)
        return list(out["input_ids"]), list(out.get("token_type_ids", ())), more


def _label(row: Row) -> object:
    """A classifier's label: of the column ``label``, or ``labels``.

    Raises:
        SourceError: both, and they differ.
    """
    found = [v for name in ("label", "labels") if (v := native(row.get(name))) is not None]
    if len(found) > 1 and found[0] != found[1]:
        raise SourceError(
            "a row has two labels",
            got=f"label {found[0]!r:.40} and labels {found[1]!r:.40}",
            allowed="one of the two columns",
            fix="take one of them out",
        )
    return found[0] if found else None
