"""Rows that lie outside of a model's tables are refused in one line, before any pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from doors import trainer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
)

import retain
from families import DEBERTA, ENCODERS, OLDER, built
from families import FAMILIES as DECODERS
from retain import attach_lora, fit_curvature, fit_head, measure_forgetting
from retain.config import TrainConfig
from retain.data.batches import Example
from retain.errors import ModelError, RetainError, SourceError
from retain.evaluation.generation import generate
from retain.evaluation.ranking import score_options
from retain.models.generating import sample_rows
from retain.models.heads import is_causal
from retain.models.sizes import check_sizes, pad_id, pad_multiple, positions, rows_of_embedding
from retain.training.loop import train

WIDTH = 24
"""Positions that a configuration gives."""

SMALL: dict[str, Any] = {"max_position_embeddings": WIDTH, "n_positions": WIDTH}

TABLES: dict[str, tuple[dict[str, Any], int | None]] = {
    "GPT2": (OLDER, WIDTH), "OpenAIGPT": (OLDER, WIDTH), "GPTBigCode": (OLDER, WIDTH),
    "GPTNeo": ({"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]}, WIDTH),
    "GPTJ": (OLDER | {"rotary_dim": 4}, WIDTH),
    "CTRL": (OLDER | {"dff": 24}, WIDTH),
    "OPT": ({"ffn_dim": 24, "word_embed_proj_dim": 16}, WIDTH),
    "BioGpt": ({}, WIDTH),
    "Mpt": ({"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": WIDTH}, WIDTH),
    "Bloom": (DECODERS["Bloom"], None),
    **{n: (DECODERS[n], None) for n in ("Llama", "Qwen3", "Gemma3Text", "Phi3", "GPTNeoX", "Lfm2")},
    "Mistral": ({"sliding_window": 8}, None),
    "Falcon": (DECODERS["Falcon"], None),
}  # fmt: skip
"""Decoders, and how many tokens each can read."""

CLASSIFIERS: dict[str, tuple[dict[str, Any], int | None]] = {
    "Bert": ({}, WIDTH), "Electra": (ENCODERS["Electra"], WIDTH), "Albert": ({}, WIDTH),
    "DistilBert": (ENCODERS["DistilBert"], WIDTH),
    "Roberta": ({}, WIDTH - 2), "XLMRoberta": ({}, WIDTH - 2), "Camembert": ({}, WIDTH - 2),
    "MPNet": ({}, WIDTH - 2), "Esm": ({}, WIDTH - 2), "IBert": ({}, WIDTH - 2),
    "RoFormer": ({}, WIDTH), "Nystromformer": ({}, WIDTH), "FNet": ({}, WIDTH),
    "ModernBert": (ENCODERS["ModernBert"], None), "NomicBert": ({}, None),
    "DebertaV2": (DEBERTA | {"position_biased_input": False}, None),
    "Deberta": (DEBERTA, WIDTH),
    "GPT2": (OLDER, WIDTH), "Llama": ({}, None),
}  # fmt: skip


def made(auto: Any, family: str, changes: dict[str, Any]) -> Any:
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    more = {"attention_window": 4} if family == "Longformer" else {}
    return built(auto, family, **SMALL | changes | more).eval()


def decoder(**changes: Any) -> Any:
    return built(AutoModelForCausalLM, "GPT2", **OLDER | SMALL | changes).eval()


def classifier(family: str = "Bert", **changes: Any) -> Any:
    more = {**ENCODERS, "GPT2": OLDER, "Llama": {}}[family]
    return built(AutoModelForSequenceClassification, family, **SMALL | more | changes).eval()


def runs(model: Any, length: int) -> bool:
    ids = 2 + torch.arange(length)[None] % 30
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(
    ("auto", "family"),
    [(AutoModelForCausalLM, f) for f in TABLES]
    + [(AutoModelForSequenceClassification, f) for f in CLASSIFIERS],
    ids=lambda x: x if isinstance(x, str) else x.__name__[12:],
)
def test_the_positions_are_those_that_a_forward_pass_has(auto: Any, family: str) -> None:
    changes, want = (TABLES if auto is AutoModelForCausalLM else CLASSIFIERS)[family]
    model = made(auto, family, changes)
    assert positions(model) == want
    assert runs(model, want or 3 * WIDTH)
    assert want is None or not runs(model, want + 1)
    if auto is AutoModelForCausalLM and family != "CTRL":
        assert positions(attach_lora(model, rank=2)) == want


def long_rows(length: int, count: int = 8) -> list[dict[str, Any]]:
    return [
        {"input_ids": [2 + (i + k) % 30 for k in range(length)], "label": i % 2}
        for i in range(count)
    ]


def with_id(token: int) -> list[dict[str, Any]]:
    rows = long_rows(6)
    rows[4]["input_ids"][3] = token
    return rows


class Words:
    """A tokenizer whose token for each letter is its code from ``a``."""

    bos_token_id, eos_token_id, pad_token_id, bos_token, chat_template = 0, 1, 1, None, None
    is_fast = False

    def __call__(self, text: str, *_: Any, **__: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 97 for c in text]}

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [str(row) for row in rows]

    def __len__(self) -> int:
        return 100


def collated(model: Any, rows: list[dict[str, Any]], **changes: Any) -> None:
    """Trains with the callback, as any script does."""

    def gathered(items: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([r["input_ids"] for r in items])
        labels = ids if is_causal(model) else [r["label"] for r in items]
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "labels": torch.as_tensor(labels), **changes,
        }  # fmt: skip

    trained_with(model, rows, gathered)


def trained_with(model: Any, rows: list[dict[str, Any]], gather: Any) -> None:
    curvature = fit_curvature(model, long_rows(6), structure="identity", progress=False)
    held = retain.RetentionCallback(curvature, start=None)
    trainer(model, rows, gather, held, max_steps=1, per_device_train_batch_size=8).train()


def trained(model: Any, rows: list[dict[str, Any]]) -> None:
    from retain.data.sources import encode

    causal = is_causal(model)
    examples = encode(rows, None, max_length=999, causal=causal)
    train(model, examples, TrainConfig(batch_size=8), progress=False)


DOORS: dict[str, Any] = {
    "fit_curvature": lambda m, rows: fit_curvature(m, rows, max_length=999, progress=False),
    "measure_forgetting": lambda m, rows: measure_forgetting(m, rows, max_length=999),
    "train": trained,
    "callback": collated,
}
CLASSIFYING = DOORS | {
    "fit_head": lambda m, rows: fit_head(m, rows, max_length=999, progress=False)
}
BOTH = [("decoder", d) for d in DOORS] + [("classifier", d) for d in CLASSIFYING]


def at(kind: str, door: str) -> tuple[Any, Any]:
    model = decoder() if kind == "decoder" else classifier()
    targets = ["c_attn"] if kind == "decoder" else ["query", "value"]
    return attach_lora(model, rank=2, targets=targets), CLASSIFYING[door]


@pytest.mark.parametrize(("kind", "door"), BOTH)
def test_a_row_longer_than_the_positions(kind: str, door: str) -> None:
    model, call = at(kind, door)
    with pytest.raises(SourceError, match=rf"longer than the model can read.*allowed: {WIDTH},"):
        call(model, long_rows(3 * WIDTH))
    call(model, long_rows(WIDTH))


@pytest.mark.parametrize("token", [40, 41, 10**9, -1, -100])
@pytest.mark.parametrize(("kind", "door"), BOTH)
def test_a_token_without_a_row(kind: str, door: str, token: int) -> None:
    model, call = at(kind, door)
    rows = with_id(token)
    said = "no row in the model's embedding; got: token" if token >= 0 or door == "callback" else ""
    with pytest.raises(SourceError, match=f"{said}.* {token} "):
        call(model, rows)


def test_the_fixes_work() -> None:
    base = decoder()
    with pytest.raises(SourceError, match=r"fix: model.resize_token_embeddings"):
        check_sizes(base, [Example((2, 40), (40, 3), (True, True))], Words())  # type: ignore[arg-type]
    base.resize_token_embeddings(len(Words()))
    model = attach_lora(base, rank=2, targets=["c_attn"])
    fit_curvature(model, with_id(99), progress=False)
    with pytest.raises(SourceError, match="with the model's own tokenizer"):
        check_sizes(model, [Example((2, 100), (100, 3), (True, True))], Words())  # type: ignore[arg-type]
    fit_curvature(model, long_rows(3 * WIDTH), max_length=WIDTH, progress=False)


@pytest.mark.parametrize("wrap", ["modules_to_save", "target"])
def test_the_table_under_an_adapter(wrap: str) -> None:
    from peft import LoraConfig, get_peft_model

    more = {"modules_to_save": ["embed_tokens"]} if wrap == "modules_to_save" else {}
    targets = ["q_proj", "embed_tokens"] if wrap == "target" else ["q_proj"]
    base = built(AutoModelForCausalLM, "Llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, **more))
    assert rows_of_embedding(model) == 40


@pytest.mark.parametrize("pad", [None, -1, 40, 99])
def test_a_padding_without_a_row(pad: int | None) -> None:
    """Where the mask hides it any will do; where the end of a row is found by it, none will."""
    rows = [{**r, "input_ids": r["input_ids"][: 3 + i % 3]} for i, r in enumerate(long_rows(6))]
    model = attach_lora(decoder(), rank=2, targets=["c_attn"])
    want = measure_forgetting(model, rows).ppl
    model.config.pad_token_id = pad
    assert pad_id(model) == 0
    assert measure_forgetting(model, rows).ppl == pytest.approx(want, rel=1e-6)
    encoder = classifier()
    encoder.config.pad_token_id = pad
    assert fit_head(encoder, rows, progress=False).rows == 8
    for family in ("GPT2", "Llama"):
        reader = classifier(family)
        reader.config.pad_token_id = pad
        with pytest.raises(ModelError, match="finds the end of a row by its padding"):
            fit_head(reader, rows, progress=False)
        reader.config.pad_token_id = 1
        assert fit_head(reader, rows, progress=False).rows == 8


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_texts_that_end_with_the_token_that_pads(family: str) -> None:
    rows = [
        {**r, "input_ids": [*r["input_ids"][: 3 + i % 3], 1]} for i, r in enumerate(long_rows(6))
    ]
    model = classifier(family, initializer_range=0.4)
    assert fit_head(model, rows, progress=False).rows == 8


@pytest.mark.parametrize("segment", [1, 2])
def test_a_token_type_without_a_row(segment: int) -> None:
    rows = [Example((2, 3, 4), (i % 2,), (), (0, 0, segment)) for i in range(4)]
    one = classifier("Roberta", type_vocab_size=1)
    with pytest.raises(SourceError, match=f"token type {segment} in tokenised row 1"):
        fit_head(one, rows, progress=False)
    two = classifier()
    if segment < 2:
        fit_head(two, rows, progress=False)
    else:
        with pytest.raises(SourceError, match="token type 2 in tokenised row 1; allowed: 0 to 1"):
            fit_head(two, rows, progress=False)


def test_a_row_without_the_end_that_an_encoder_decoder_reads() -> None:
    small = {
        "encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    }  # fmt: skip
    model = built(AutoModelForSequenceClassification, "Bart", **small).eval()
    with pytest.raises(SourceError, match="no token 1 in tokenised row 1"):
        fit_head(model, long_rows(6), progress=False)
    ended = [{**r, "input_ids": [*r["input_ids"], 1]} for r in long_rows(6)]
    tuned = attach_lora(model, rank=2, targets=["q_proj", "v_proj"])
    assert fit_curvature(tuned, ended, progress=False).quadratic(tuned) == 0


def test_text_that_the_model_writes_is_cut_to_its_positions_and_says_so() -> None:
    words: Any = Words()
    with pytest.warns(UserWarning, match=f"{WIDTH} positions: its own text is cut to {WIDTH}"):
        rows = sample_rows(decoder(), words, count=3, max_length=4 * WIDTH)
    assert max(len(r["input_ids"]) for r in rows) == WIDTH
    assert len(sample_rows(decoder(), words, count=3, max_length=WIDTH)) == 3
    model = attach_lora(decoder(), rank=2, targets=["c_attn"])
    with pytest.warns(UserWarning, match="is cut to"):
        found = fit_curvature(model, "self", tokenizer=words, rows=8, progress=False)
    assert found.info.tokens <= 8 * WIDTH


def test_prompts_and_answers_beyond_the_positions() -> None:
    words: Any = Words()
    with pytest.raises(SourceError, match="longest prompt with its answer; allowed: 24"):
        generate(decoder(), words, ["cd" * 10], max_new_tokens=6)
    assert generate(decoder(), words, ["cd" * 10], max_new_tokens=5)
    with pytest.raises(SourceError, match="longest prompt with its option; allowed: 24"):
        score_options(decoder(), words, ["c" * 23], [["dd", "eee"]])
    assert score_options(decoder(), words, ["c" * 22], [["dd", "eee"]]).logp


@pytest.mark.parametrize(("length", "want"), [(16, 16), (17, 1), (WIDTH, 1), (9, 16)])
def test_rows_are_not_padded_out_of_the_table(length: int, want: int) -> None:
    rows = [Example((2,) * length, (0,))]
    assert pad_multiple(classifier(), rows, 16) == want
    assert pad_multiple(classifier("ModernBert"), rows, 16) == 16
    trained(attach_lora(classifier(), rank=2, targets=["query"]), long_rows(length))


def test_the_callback_sees_what_the_collator_pads_with() -> None:
    model = attach_lora(classifier(), rank=2, targets=["query"])
    model.config.pad_token_id = 1

    class Padded(Words):
        padding_side = "right"

        def pad(self, items: Any, **_: Any) -> dict[str, torch.Tensor]:
            width = max(len(i["input_ids"]) for i in items)
            rows = [i["input_ids"] + [40] * (width - len(i["input_ids"])) for i in items]
            mask = [[1] * len(i["input_ids"]) + [0] * (width - len(i["input_ids"])) for i in items]
            labels = torch.tensor([i["label"] for i in items])
            ids = torch.tensor(rows)
            return {"input_ids": ids, "attention_mask": torch.tensor(mask), "label": labels}

    rows = [{**r, "input_ids": r["input_ids"][: 3 + i % 3]} for i, r in enumerate(long_rows(6))]
    with pytest.raises(SourceError, match="got: token 40"):
        trained_with(model, rows, DataCollatorWithPadding(Padded()))  # type: ignore[arg-type]


def test_rows_laid_end_to_end_count_from_0_each() -> None:
    model = attach_lora(decoder(), rank=2, targets=["c_attn"])
    rows = long_rows(2 * WIDTH)
    places = torch.arange(2 * WIDTH)[None].repeat(8, 1) % WIDTH
    collated(model, rows, position_ids=places)
    with pytest.raises(RetainError, match="longer than the model can read"):
        collated(model, rows, position_ids=places + 1)


def test_a_model_without_such_a_table_has_no_end() -> None:
    class Bare(nn.Module):
        pass

    assert rows_of_embedding(Bare()) is None
    assert positions(Bare()) is None
