"""A decoder's rows as tokens, and what is learned of them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from retain.data.batches import Example
from retain.data.chats import Chats
from retain.data.contents import Answer, Chat, Pair, Ready, Row, Text, check_text
from retain.data.counts import RowCounts
from retain.data.formats import content_of
from retain.data.messages import absent
from retain.data.placed import Passage
from retain.data.ready import ready_causal
from retain.data.tokens import Ends, beginning, ends_of, need
from retain.data.turns import shared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CausalRows"]


class CausalRows:
    """Tokenises one row after another.

    Args:
        tokenizer: None will do for rows that are tokenised already.
        max_length: tokens of a row at most.
        loss: "assistant", "source" or "all"; see `retain.data.encoding.encode`.
        counts: of what was left out or cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
        loss: str,
        counts: RowCounts,
    ) -> None:
        self.given, self.max_length, self.loss, self.counts = tokenizer, max_length, loss, counts

    @cached_property
    def ends(self) -> Ends:
        return ends_of(need(self.given))

    @cached_property
    def chats(self) -> Chats:
        return Chats(need(self.given), self.max_length, self.counts)

    def read(self, row: Row) -> list[Example]:
        """A row's examples: one, none, or several of a packed row or a document.

        Raises:
            SourceError: a row of no known format, or a damaged one.
        """
        template = None if self.given is None else self.chats.template
        content = content_of(row, causal=True, counts=self.counts, template=template)
        if isinstance(content, Ready):
            return self._ready(content)
        check_text(content)
        if isinstance(row, Passage) and isinstance(content, Text):
            return self._passage(content.text, row.begins)
        if isinstance(content, Answer):
            self.counts.rejected_unread += not absent(row.get("rejected"))
            self.counts.answers_unread += content.others
            return self._answer(content)
        if isinstance(content, Chat):
            return self._chat(content)
        if isinstance(content, Pair):
            return self._text(Text(f"{content.first}\n{content.second}"))
        return self._text(content)

    def _text(self, content: Text) -> list[Example]:
        if not content.text.strip():
            self.counts.left_out_empty += 1
            return []
        count = None if content.pack else self.max_length
        ids, more = beginning(need(self.given), content.text, count)
        ids = self.ends.begun(ids)
        ids = ids if more else self.ends.ended(ids)
        if not content.pack:
            return self._cut(ids, [True] * len(ids), more)
        starts = range(0, len(ids), self.max_length)
        pieces = [ids[start : start + self.max_length] for start in starts]
        found = [_example(p, [True] * len(p)) for p in pieces if len(p) > 1]
        self.counts.left_out_empty += not found
        return found

    def _passage(self, text: str, begins: bool) -> list[Example]:
        """The first piece of a passage; nothing is lost, as the text goes on by itself."""
        ids, _ = beginning(need(self.given), text, self.max_length)
        ids = (self.ends.begun(ids) if begins else ids)[: self.max_length]
        self.counts.left_out_empty += len(ids) < 2
        return [_example(ids, [True] * len(ids))] if len(ids) > 1 else []

    def _answer(self, content: Answer) -> list[Example]:
        if isinstance(content.prompt, str) and isinstance(content.completion, str):
            head, _ = beginning(need(self.given), content.prompt, self.max_length)
            whole = content.prompt + content.completion
            ids, more = beginning(need(self.given), whole, self.max_length)
            ids = self.ends.begun(ids)
            ids = ids if more else self.ends.ended(ids)
            start = shared(self.ends.begun(head), ids)
            empty = not content.completion
        else:
            assert not isinstance(content.prompt, str)
            assert not isinstance(content.completion, str)
            ids, start, more = self.chats.answer(
                content.prompt, content.completion, content.tools, content.options
            )
            empty = False
        if start >= self.max_length and self.loss != "all":
            self.counts.left_out_no_room += 1
            return []
        self.counts.completions_empty += empty
        every = self.loss == "all"
        return self._cut(ids, [every or i >= start for i in range(len(ids))], more, answer=True)

    def _chat(self, content: Chat) -> list[Example]:
        unanswered = self.loss == "source" and not any(
            message.get("role") == "assistant" for message in content.messages
        )
        self.counts.chats_unanswered += unanswered
        if self.loss == "all" or unanswered:
            ids, more = self.chats.whole(content.messages, content.tools, content.options)
            mask = [True] * len(ids)
        else:
            ids, mask, more = self.chats.turns(content.messages, content.tools, content.options)
        return self._cut(ids, mask, more, answer=True)

    def _ready(self, content: Ready) -> list[Example]:
        found: list[Example] = []
        for ids, learned in ready_causal(content.cells, self.loss):
            found += self._cut(ids, learned, 0)
        return found

    def _cut(
        self, ids: list[int], learned: list[bool], more: int, answer: bool = False
    ) -> list[Example]:
        """An example of the first tokens; none where nothing is to be learned."""
        size = self.max_length
        if len(ids) < 2:
            self.counts.left_out_empty += 1
            return []
        if not any(learned[1:size]):
            self.counts.left_out_unlearned += 1
            return []
        if more or len(ids) > size:
            self.counts.completions_cut += answer
            self.counts.texts_cut += not answer
            self.counts.tokens_cut += more + len(ids) - size
        return [_example(ids[:size], learned[:size])]


def _example(ids: list[int], learned: list[bool]) -> Example:
    return Example(tuple(ids[:-1]), tuple(ids[1:]), tuple(learned[1:]))
