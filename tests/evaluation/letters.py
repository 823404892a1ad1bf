"""A tokenizer of single letters, and how likely a model finds what it reads."""

from __future__ import annotations

import torch


class Letters:
    """The letters a to k are the ids 1 to 11; anything else is left out."""

    pad_token_id, eos_token_id = 0, 12
    bos_token, bos_token_id = None, None
    is_fast = False

    def __call__(
        self, text: str, pair: str = "", add_special_tokens: bool = True, **options: object
    ) -> dict[str, list[int]]:
        ids = [ord(c) - ord("a") + 1 for c in text + pair if "a" <= c <= "k"]
        if options.get("truncation"):
            ids = ids[: int(str(options["max_length"]))]
        return {"input_ids": ids}

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(96 + t) for t in row if 0 < t < 12) for row in rows]


def logp(model: torch.nn.Module, prompt: str, option: str) -> float:
    """The log-probability of an option after its prompt, which is run alone."""
    head, ids = (Letters()(t)["input_ids"] for t in (prompt, option))
    with torch.no_grad():
        rows = model(torch.tensor([head + ids])).logits[0].log_softmax(-1)
    return sum(float(rows[len(head) - 1 + k, t]) for k, t in enumerate(ids))
