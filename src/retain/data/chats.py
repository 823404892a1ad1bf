"""Chats to tokens, through the tokenizer's chat template, and which of them are the assistant's.

Tokens are those of TRL's SFTTrainer, with ``assistant_only_loss=True`` where the assistant's turns
alone are learned: the template's own ``{% generation %}`` marks tell them, or those of the training
template that TRL has for it. For other templates the chat is written turn by turn and compared.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from retain.data.counts import RowCounts
from retain.data.messages import Message
from retain.data.tokens import plain
from retain.data.turns import assistant_spans, shared, untold
from retain.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chats"]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HEARD = ("user", "system", "developer")  # the assistant's thoughts are often left out
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_CHARACTERS = 4096
_PER_TOKEN = 16


class Chats:
    """Writes chats with one tokenizer.

    Args:
        tokenizer: with a chat template.
        max_length: so many tokens of a chat are wanted at most.
        counts: where tools and reasoning that the template passes over are counted.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, counts: RowCounts
    ) -> None:
        self.tokenizer, self.max_length, self.counts = tokenizer, max_length, counts
        self._training: str | None = None
        self._how: str | None = None
        self._using: str | None = None  # in place of the tokenizer's own template
        self._parts = False

    @property
    def template(self) -> str | None:
        """The tokenizer's template, or None."""
        found: Any = getattr(self.tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("default") or next(iter(found.values()), None)
        return found or None

    def whole(
        self, messages: list[Message], tools: Any, options: dict[str, Any]
    ) -> tuple[list[int], int]:
        """A chat's tokens, and how many more there are about."""
        ids, _, more = self._read(messages, tools, options, assistant=False)
        return ids, more

    def turns(
        self, messages: list[Message], tools: Any, options: dict[str, Any]
    ) -> tuple[list[int], list[bool], int]:
        """A chat's tokens, which of them are the assistant's, and how many more there are."""
        return self._read(messages, tools, options, assistant=True)

    def answer(
        self,
        prompt: list[Message],
        completion: list[Message],
        tools: Any,
        options: dict[str, Any],
    ) -> tuple[list[int], int, int]:
        """A chat's tokens, where its completion begins, and how many more tokens there are."""
        ids, more = self.whole(prompt + completion, tools, options)
        head = self._ids(_short(prompt, self._room)[0], tools, options, add_generation_prompt=True)
        return ids, shared(head, ids), more

    @property
    def _room(self) -> int:
        return max(_CHARACTERS, _PER_TOKEN * self.max_length)

    def _read(
        self, messages: list[Message], tools: Any, options: dict[str, Any], assistant: bool
    ) -> tuple[list[int], list[bool], int]:
        room = self._room
        trained = assistant and self._marks() == "trained"
        self._using = self._training if trained else None
        while True:
            some, left = _short(messages, room)
            self._check(some, tools, options)
            if assistant:
                ids, mask = self._marked(some, tools, options)
            else:
                ids, mask = self._ids(some, tools, options), []
            if not left or len(ids) >= 2 * self.max_length:
                break
            room *= 8
        if tools or any(m.get(k) for m in some for k in _THOUGHTS):
            self._tell(some, tools, options)
        length = sum(len(m.get("content", "")) for m in some)
        return ids, mask, round(left * len(ids) / max(length, 1))

    def _marked(
        self, messages: list[Message], tools: Any, options: dict[str, Any]
    ) -> tuple[list[int], list[bool]]:
        if self._marks() == "compared":
            return self._compared(messages, tools, options)
        try:
            out = self._call(
                messages, tools, options, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
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

    def _marks(self) -> str:
        """How the assistant's tokens are told: by the template, by TRL's, or by comparing."""
        if self._how is None:
            self._how = "compared"
            if _MARKS.search(self._need()):
                self._how = "own"
            else:
                self._training = self._trained()
                self._how = "trained" if self._training else "compared"
        return self._how

    def _trained(self) -> str | None:
        """TRL's training template for this one, if it has one and is installed."""
        try:
            from trl.chat_template_utils import get_training_chat_template
        except ImportError:
            return None
        try:
            found: str | None = get_training_chat_template(self.tokenizer)
        except (ValueError, TypeError, TemplateError):
            return None
        return found

    def _compared(
        self, messages: list[Message], tools: Any, options: dict[str, Any]
    ) -> tuple[list[int], list[bool]]:
        if not self.tokenizer.is_fast:
            raise untold("a tokenizer without offsets")

        def write(some: list[Message], asked: bool) -> str:
            return self._text(some, tools, options, add_generation_prompt=asked)

        text = write(messages, False)
        spans = assistant_spans(messages, text, write, self.tokenizer.all_special_tokens)
        out = self.tokenizer(text, add_special_tokens=False, verbose=False)
        mask = [False] * len(out["input_ids"])
        for start, stop in spans:
            tokens = [t for c in range(start, stop) if (t := out.char_to_token(c)) is not None]
            if tokens:
                mask[tokens[0] : tokens[-1] + 1] = [True] * (tokens[-1] + 1 - tokens[0])
        return list(out["input_ids"]), mask

    def _check(self, messages: list[Message], tools: Any, options: dict[str, Any]) -> None:
        """Refuses a template that leaves out what a message says.

        Templates of models that see images may want contents as parts: so they get them then.
        """
        try:
            text = self._text(messages, tools, options)
            missing = _missing(messages, text)
        except SourceError:
            if (
                self._parts
                or self.template is None
                or not self._takes_parts(messages, tools, options)
            ):
                raise
            missing = "everything"
        if missing and not self._parts and self._takes_parts(messages, tools, options):
            self._parts, missing = True, ""
            text = self._text(messages, tools, options)
        if missing:
            raise SourceError(
                "the chat template leaves out what a message says",
                got=f"{missing!r:.60}",
                allowed="a template that writes what user and system say, and the calls of tools",
                fix="set tokenizer.chat_template to one that does",
            )

    def _tell(self, messages: list[Message], tools: Any, options: dict[str, Any]) -> None:
        """Counts a chat of which the template leaves out tools or reasoning."""
        text = self._text(messages, tools, options)
        if tools and self._text(messages, None, options) == text:
            self.counts.tools_unwritten += 1
        squeezed = "".join(text.split())
        thoughts = ("".join(str(m[k]).split()) for m in messages for k in _THOUGHTS if m.get(k))
        self.counts.thoughts_unwritten += not all(said in squeezed for said in thoughts)

    def _takes_parts(self, messages: list[Message], tools: Any, options: dict[str, Any]) -> bool:
        """Whether the template writes everything once contents are parts."""
        self._parts = True
        try:
            return not _missing(messages, self._text(messages, tools, options))
        except SourceError:
            return False
        finally:
            self._parts = False

    def _text(
        self, messages: list[Message], tools: Any, options: dict[str, Any], **more: Any
    ) -> str:
        return str(self._call(messages, tools, options, tokenize=False, **more))

    def _ids(
        self, messages: list[Message], tools: Any, options: dict[str, Any], **more: Any
    ) -> list[int]:
        return plain(self.tokenizer, self._text(messages, tools, options, **more))

    def _call(
        self, messages: list[Message], tools: Any, options: dict[str, Any], **more: Any
    ) -> Any:
        self._need()
        if self._parts:
            messages = [_in_parts(m) for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self._using, **options, **more
            )
        except (TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise SourceError(
                "the chat template cannot write a chat",
                got=f"{str(error)[:120]}; roles {', '.join(m['role'] for m in messages)[:80]}",
                allowed="what the tokenizer's chat template takes",
                fix="change the chat, or set tokenizer.chat_template",
            ) from error

    def _need(self) -> str:
        template = self.template
        if template is None:
            raise SourceError(
                "a chat needs a chat template",
                got="a tokenizer without one",
                allowed="a tokenizer of a chat model, or rows of text or prompt + completion",
                fix="set tokenizer.chat_template, or take the tokenizer of the instructed model",
            )
        return template


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


def _short(messages: list[Message], room: int) -> tuple[list[Message], int]:
    """Messages with contents of at most so many characters, and how many were cut."""
    left = sum(max(0, len(m.get("content", "")) - room) for m in messages)
    if not left:
        return messages, 0
    return [{**m, "content": m["content"][:room]} if "content" in m else m for m in messages], left
