"""Tiny byte-level tokenizers that put tokens around a text, or do not, as real ones do."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NAMES = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]"]

CHATML = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if note is defined %}<|im_start|>system\n{{ note }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}CALL {{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.tool_calls %}CALL {{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>{% endgeneration %}\n{% else %}",
).replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}")


def made(
    *,
    bos: bool = False,
    eos: bool = False,
    cls: bool = False,
    merges: list[tuple[str, str]] | None = None,
    template: str | None = CHATML,
    **names: Any,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose post-processor writes a begin token, an end token, or [CLS] and [SEP]."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [a + b for a, b in merges or []]
    vocabulary = {token: i for i, token in enumerate([*NAMES, *letters, *joined])}
    raw = Tokenizer(models.BPE(vocabulary, merges or []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(NAMES)
    if cls:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(n, vocabulary[n]) for n in ("[CLS]", "[SEP]")],
        )
    elif bos or eos:
        raw.post_processor = processors.TemplateProcessing(
            single=" ".join([*(["<s>"] if bos else []), "$A", *(["</s>"] if eos else [])]),
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    given = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | names
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, **{k: v for k, v in given.items() if v is not None}
    )
    if cls:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS: dict[str, dict[str, Any]] = {
    "neither": {},
    "begin": {"bos": True},
    "end": {"eos": True},
    "both": {"bos": True, "eos": True},
    "end is pad": {"bos": True, "eos": True, "pad_token": "</s>"},
    "no begin token": {"bos_token": None},
    "chat's end": {"bos": True, "eos_token": "<|im_end|>"},
    "merges": {"bos": True, "merges": [("=", "4"), ("h", "i"), ("Ġ", "y"), ("Ċ", "4")]},
}
