"""Chats to tokens, through the tokenizer's chat template, and which of them are the assistant's.

Tokens are those of TRL's SFTTrainer, with ``assistant_only_loss=True`` where the assistant's turns
alone are learned: the template's own ``{% generation %}`` marks tell them, or those of the training
template that TRL has for it. For other templates the chat is written turn by turn and compared.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from retain.data.counts import RowCounts
from retain.data.rows import Chat, Message
from retain.data.tokens import plain, room_for
from retain.data.turns import assistant_spans, shared, untold
from retain.errors import SourceError
from retain.extras import classes_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chats"]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HEARD = ("user", "system", "developer")  # the assistant's thoughts are often left out
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class Chats:
    """Writes chats with one tokenizer; at most `max_length` tokens of each are wanted."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, counts: RowCounts
    ) -> None:
        self.tokenizer, self.max_length, self.counts = tokenizer, max_length, counts
        self._template: str | None = None  # in place of the tokenizer's own
        self._parts = False  # whether contents are given as lists of parts

    @property
    def template(self) -> str | None:
        """The tokenizer's template, or None."""
        found: Any = getattr(self.tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("default") or next(iter(found.values()), None)
        return found or None

    def answer(self, chat: Chat, completion: list[Message]) -> tuple[list[int], int, int]:
        """A chat's tokens, where its completion begins, and how many more tokens there are."""
        whole = replace(chat, messages=chat.messages + completion)
        ids, _, more = self.read(whole, assistant=False)
        head = self._ids(_short(chat, room_for(self.max_length))[0], add_generation_prompt=True)
        return ids, shared(head, ids), more

    def read(self, chat: Chat, *, assistant: bool) -> tuple[list[int], list[bool], int]:
        """A chat's tokens, which are learned, and how many more tokens there are about.

        Of `assistant`, its turns alone are learned, else all.
        """
        room = room_for(self.max_length)
        while True:
            some, left = _short(chat, room)
            self._template = self._training if assistant else None
            self._check(some)
            if assistant:
                ids, mask = self._marked(some)
            else:
                ids = self._ids(some)
                mask = [True] * len(ids)
            if not left or len(ids) >= 2 * self.max_length:
                break
            room *= 8
        if some.tools or any(m.get(k) for m in some.messages for k in _THOUGHTS):
            self._count_unwritten(some)
        length = sum(len(m.get("content", "")) for m in some.messages)
        return ids, mask, round(left * len(ids) / max(length, 1))

    @cached_property
    def _training(self) -> str | None:
        """TRL's training template for a template without marks, if it has one and is installed."""
        if _MARKS.search(self._need()):
            return None
        try:
            from trl.chat_template_utils import get_training_chat_template

            found: str | None = get_training_chat_template(self.tokenizer)
        except (ImportError, ValueError, TypeError, *classes_of("jinja2", "TemplateError")):
            return None
        return found

    def _marked(self, chat: Chat) -> tuple[list[int], list[bool]]:
        """Tokens, and which are the assistant's."""
        if not self._training and not _MARKS.search(self._need()):
            return self._compared(chat)
        try:
            out = self._call(
                chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except ValueError as error:
            if "char_to_token" not in str(error) and "fast" not in str(error).lower():
                raise
            raise untold("a tokenizer without offsets") from error
        ids, mask = list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]
        self.counts.ends_unlearned += self._endless(ids, mask)
        return ids, mask

    def _endless(self, ids: list[int], mask: list[bool]) -> bool:
        """Whether a special token ends the assistant's turn and its marks leave that out."""
        special = set(self.tokenizer.get_added_vocab().values())
        for stop in range(1, len(ids)):
            if mask[stop - 1] and not mask[stop] and ids[stop] in special:
                last = stop - 1
                while mask[last - 1] and not str(self.tokenizer.decode([ids[last]])).strip():
                    last -= 1  # a line break behind the end token
                if ids[last] not in special:
                    return True
        return False

    def _compared(self, chat: Chat) -> tuple[list[int], list[bool]]:
        if not self.tokenizer.is_fast:
            raise untold("a tokenizer without offsets")
        text = self._text(chat)
        spans = assistant_spans(
            chat.messages,
            text,
            lambda some, asked: self._text(
                replace(chat, messages=some), add_generation_prompt=asked
            ),
            self.tokenizer.all_special_tokens,
        )
        out = self.tokenizer(text, add_special_tokens=False, verbose=False)
        mask = [False] * len(out["input_ids"])
        for start, stop in spans:
            tokens = [t for c in range(start, stop) if (t := out.char_to_token(c)) is not None]
            for token in range(tokens[0], tokens[-1] + 1) if tokens else ():
                mask[token] = True
        return list(out["input_ids"]), mask

    def _check(self, chat: Chat) -> None:
        """Refuses a template that leaves out what a message says.

        Templates of models that see images may want contents as parts: so they get them then.
        """
        refused, missing = self._left_out(chat)
        if missing and not self._parts and self.template is not None:
            self._parts = True
            self._parts = not self._left_out(chat)[1]
            missing = "" if self._parts else missing
        if missing:
            raise refused or SourceError(
                "the chat template leaves out what a message says",
                got=f"{missing!r:.60}",
                allowed="a template that writes what user and system say, and the calls of tools",
                fix="set tokenizer.chat_template to one that does",
            )

    def _left_out(self, chat: Chat) -> tuple[SourceError | None, str]:
        """The template's refusal, and what it leaves out."""
        try:
            return None, _missing(chat.messages, self._text(chat))
        except SourceError as error:
            return error, "everything"

    def _count_unwritten(self, chat: Chat) -> None:
        """Counts a chat of which the template leaves out tools or reasoning."""
        text = self._text(chat)
        if chat.tools and self._text(replace(chat, tools=None)) == text:
            self.counts.tools_unwritten += 1
        squeezed = "".join(text.split())
        thoughts = [str(m[k]) for m in chat.messages for k in _THOUGHTS if m.get(k)]
        self.counts.thoughts_unwritten += any(
            "".join(said.split()) not in squeezed for said in thoughts
        )

    def _text(self, chat: Chat, **more: Any) -> str:
        return str(self._call(chat, tokenize=False, **more))

    def _ids(self, chat: Chat, **more: Any) -> list[int]:
        return plain(self.tokenizer, self._text(chat, **more))

    def _call(self, chat: Chat, **more: Any) -> Any:
        self._need()
        messages = [_in_parts(m) for m in chat.messages] if self._parts else chat.messages
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=chat.tools, chat_template=self._template, **chat.options, **more
            )
        except (
            TypeError, KeyError, IndexError, AttributeError, *classes_of("jinja2", "TemplateError")
        ) as error:  # fmt: skip
            raise SourceError(
                "the chat template cannot write a chat",
                got=f"{str(error)[:120]}; roles {', '.join(m['role'] for m in messages)[:80]}",
                allowed="what the tokenizer's chat template takes",
                fix="change the chat, or set tokenizer.chat_template",
            ) from error

    def _need(self) -> str:
        if self.template is None:
            raise SourceError(
                "a chat needs a chat template",
                got="a tokenizer without one",
                allowed="a tokenizer of a chat model, or rows of text or prompt + completion",
                fix="set tokenizer.chat_template, or take the tokenizer of the instructed model",
            )
        return self.template


def _missing(messages: list[Message], text: str) -> str:
    """What a user or the system says, or the name of a called tool, that is not in the text."""
    squeezed = "".join(text.split())
    for message in messages:
        said = message.get("content", "") if message["role"] in _HEARD else ""
        if "".join(said.split()) not in squeezed:
            return str(said)
        for call in message.get("tool_calls") or [message.get("function_call")]:
            function = call.get("function", call) if isinstance(call, dict) else {}
            name = str(function.get("name", "")) if isinstance(function, dict) else ""
            if name not in text:
                return name
    return ""


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _short(chat: Chat, room: int) -> tuple[Chat, int]:
    """A chat with contents of at most so many characters, and how many were cut."""
    left = sum(max(0, len(m.get("content", "")) - room) for m in chat.messages)
    if not left:
        return chat, 0
    cut = [{**m, "content": m["content"][:room]} if "content" in m else m for m in chat.messages]
    return replace(chat, messages=cut), left
