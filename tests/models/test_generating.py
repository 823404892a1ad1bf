"""Text is written by the model as it is: no setting of its own files plays a part."""

from __future__ import annotations

import functools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import GenerationConfig

from retain.data.general_prompts import HALVES, general_prompts
from retain.errors import SourceError
from retain.evaluation.generation import generate
from retain.models.generating import OWN, plain_generation, sample_rows, write
from tiny import base, tiny

BOS, END, HEAD, TAIL = 11, 12, [6, 7], [8]


class Tokenizer(SimpleNamespace):
    """A token for each letter, behind a document's first token if it is one that writes it."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if text in ("head", "tail"):
            return {"input_ids": HEAD if text == "head" else TAIL}
        start = [BOS] * (self.writes and add_special_tokens)
        return {"input_ids": [*start, *(ord(c) % 13 for c in text)]}

    def __len__(self) -> int:
        return 20

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [str([t for t in row if t != self.eos_token_id]) for row in rows]

    def apply_chat_template(
        self, messages: Any, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return "head" + str(messages[0]["content"]) + ("tail" if add_generation_prompt else "")


SOURCE = general_prompts(half="source")


def tokenizer(*, writes: bool = False, chat: bool = False) -> Any:
    return Tokenizer(
        bos_token_id=BOS, eos_token_id=END, pad_token_id=0, bos_token=None, writes=writes,
        chat_template="a template" if chat else None,
    )  # fmt: skip


def sampled(model: Any = None, count: int = 6, words: Any = None, seed: int = 3, **how: Any) -> Any:
    words = words or tokenizer(**how)
    rows = sample_rows(model or base("llama"), words, count=count, max_length=9, seed=seed)
    return [row["input_ids"] for row in rows]


def answered(model: Any, words: Any = None) -> list[str]:
    return generate(model, words or tokenizer(), ["ab", "c"], max_new_tokens=6)


SETTINGS: dict[str, Any] = {
    "temperature": 0.05, "top_k": 1, "top_p": 0.01, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1,
    "epsilon_cutoff": 0.3, "eta_cutoff": 0.3, "repetition_penalty": 30.0,
    "encoder_repetition_penalty": 30.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[t] for t in range(6)],
    "suppress_tokens": list(range(6)), "begin_suppress_tokens": list(range(6)),
    "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "sequence_bias": [[[4], 50.0]], "exponential_decay_length_penalty": (1, 9.0),
    "guidance_scale": 5.0, "renormalize_logits": True, "penalty_alpha": 0.6, "dola_layers": "high",
    "num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 0.5, "length_penalty": 3.0,
    "early_stopping": True, "num_return_sequences": 2, "min_length": 8, "min_new_tokens": 8,
    "max_length": 3, "max_new_tokens": 2, "max_time": 1e-9, "stop_strings": ["a"],
    "cache_implementation": "static", "use_cache": False, "do_sample": False,
    "remove_invalid_values": True, "token_healing": True, "pad_token_id": 5, "bos_token_id": 7,
    "decoder_start_token_id": 9, "output_scores": True, "output_logits": True,
    "output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 3, "num_assistant_tokens": 3, "assistant_early_exit": 1,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0}, "low_memory": True,
    "constraints": [1], "force_words_ids": [[3]], "a_setting_of_tomorrow": 3,
}  # fmt: skip

LEFT_OUT = {
    "eos_token_id", "transformers_version", "compile_config", "disable_compile",
    "continuous_batching_config",
    # of assisted and chunked generation: nothing without the settings above
    "assistant_confidence_threshold", "assistant_lookbehind", "max_matching_ngram_size",
    "num_assistant_tokens_schedule", "prefill_chunk_size", "speculative_step_size",
    "target_lookbehind", "is_assistant", "cache_config", "use_mtp", "speculation_type",
    "assistant_ensemble_weight", "max_cache_len",
}  # fmt: skip


def hostile(model: Any, **settings: Any) -> Any:
    config = GenerationConfig(eos_token_id=END)
    for name, value in settings.items():
        setattr(config, name, value)
    model.generation_config = config
    return model


@pytest.fixture(scope="module")
def plain() -> tuple[Any, list[str]]:
    model = hostile(base("llama"))
    return sampled(model), answered(model)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_of_the_models_own_plays_a_part(name: str, plain: tuple[Any, Any]) -> None:
    model = hostile(base("llama"), **{name: SETTINGS[name]})
    before = model.generation_config
    assert (sampled(model), answered(model)) == plain
    assert model.generation_config is before
    assert getattr(before, name) == SETTINGS[name]


def test_the_table_of_settings_is_whole() -> None:
    """Whatever a GenerationConfig of the installed transformers has is in the table, or is kept."""
    known = {n for n in vars(GenerationConfig()) if not n.startswith("_")}
    assert known - LEFT_OUT - set(SETTINGS) == set()


def test_all_of_them_at_once_with_an_adapter(plain: tuple[Any, Any]) -> None:
    model = tiny("llama")
    hostile(model.get_base_model(), temperature=0.1, top_k=1, repetition_penalty=9.0, num_beams=2)
    assert (sampled(model), answered(model)) == plain


def test_no_logits_processor_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = hostile(base("llama"), top_p=0.1, suppress_tokens=[1]), []
    whole = type(model)._get_logits_processor

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(whole(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(type(model), "_get_logits_processor", spy)
    sampled(model)
    write(model, tokenizer(), [[BOS]], new_tokens=2)
    assert [len(found) for found in seen] == [0, 0]


def test_what_is_sampled_is_the_softmax_of_the_logits() -> None:
    model = hostile(base("llama"), temperature=0.3, top_k=2, top_p=0.5)
    with torch.no_grad():
        p = model(torch.tensor([[BOS]])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    first = [r[0] for r in write(model, tokenizer(), [[BOS]] * 4000, new_tokens=1, temperature=1.0)]
    counts = Counter(first)
    found = stats.chisquare([counts[t] for t in range(13)], [4000 * float(q) for q in p])
    assert found.pvalue > 1e-3
    assert len(counts) > 5


def test_a_generate_of_the_models_files_is_set_aside(plain: tuple[Any, Any]) -> None:
    def theirs(model: Any, **_: Any) -> Any:
        raise AssertionError("their generate ran")

    model = hostile(base("llama"))
    model.generate = functools.partial(theirs, model=model)
    assert sampled(model) == plain[0]
    with pytest.raises(AssertionError, match="their generate"):
        model.generate()


def test_settings_come_back_after_an_error() -> None:
    model = hostile(base("llama"), top_k=3)
    before = model.generation_config
    with plain_generation(model):
        assert model.generation_config.top_k is None
        assert model.generation_config.eos_token_id == END
    assert model.generation_config is before
    with pytest.raises(ZeroDivisionError), plain_generation(model):
        raise ZeroDivisionError
    assert model.generation_config is before


@pytest.mark.parametrize("pad", [None, 0, END, -1, 99])
def test_a_padding_that_the_model_has_no_row_for(pad: int | None) -> None:
    model, words = base("llama"), tokenizer()
    model.config.pad_token_id = words.pad_token_id = pad
    assert sampled(model, 12, words) == sampled(count=12)
    assert answered(model, words) == answered(base("llama"))


# what is sampled


def test_every_second_document_comes_bare_where_the_tokenizer_writes_no_mark() -> None:
    bare, marked = sampled(), sampled(writes=True)
    assert all(row[0] == BOS for row in marked)
    assert bare[0::2] == marked[0::2]
    for got, whole in zip(bare[1::2], marked[1::2], strict=True):
        assert got == (whole[1:] if len(whole) > 2 else whole)
    assert any(row[0] != BOS for row in bare)


def test_chats_reach_their_answer() -> None:
    rows = sampled(hostile(base("llama")), count=8, chat=True)
    assert [row[: len(HEAD)] == HEAD for row in rows] == [False] * 2 + [True] * 6
    assert rows[0][0] == BOS
    for row in rows[2:]:  # of 9 tokens, 3 for the head and the tail: 3 for a turn, 3 for an answer
        assert len(row) <= 9
        turn = row[len(HEAD) :].index(TAIL[0])
        assert turn <= 3 or row.count(TAIL[0]) > 1
        assert END not in row[: len(HEAD) + turn]
    assert any(len(row) == 9 for row in rows[2:])


def test_long_chats_stay_short() -> None:
    model, words = base("llama"), tokenizer(chat=True)
    model.generation_config.eos_token_id = words.eos_token_id = None
    rows = sample_rows(model, words, count=12, max_length=60, seed=1)
    assert [len(row["input_ids"]) for row in rows[:3:2]] == [60] * 2
    chats = [row["input_ids"] for row in rows[3:]]
    own = chats[OWN - 1 :: OWN]
    assert {len(ids) for ids in own} == {len(HEAD) + 28 + len(TAIL) + 24}
    given = [ids for i, ids in enumerate(chats) if i % OWN != OWN - 1]
    assert (len(own), len(given)) == (2, 7)
    starts = set()
    for ids in given:  # a general prompt, a token a letter here, and so much of it as fits
        said = ids[len(HEAD) : ids.index(TAIL[0], len(HEAD))]
        assert any(said == words(p.prompt)["input_ids"][: len(said)] for p in SOURCE)
        assert len(ids) <= 60
        starts.add(tuple(said))
    assert len(starts) == len(given)  # none twice


def test_text_to_measure_on_has_other_prompts() -> None:
    model, words, said = base("llama"), tokenizer(chat=True), {}
    model.generation_config.eos_token_id = words.eos_token_id = None
    for half in HALVES:
        rows = sample_rows(model, words, count=8, max_length=60, seed=1, half=half)
        chats = [row["input_ids"] for i, row in enumerate(rows[2:]) if i % OWN != OWN - 1]
        prompts = [words(p.prompt)["input_ids"] for p in general_prompts(half=half)]
        known = {tuple([*ids, *TAIL][:20]) for ids in prompts}
        begun = [[p for p in known if tuple(ids[len(HEAD) :][: len(p)]) == p] for ids in chats]
        assert all(begun)
        said[half] = {p for some in begun for p in some}
    assert not said["source"] & said["held-out"]


def test_a_chat_without_room_for_an_answer_is_cut() -> None:
    rows = sample_rows(base("llama"), tokenizer(chat=True), count=4, max_length=4, seed=1)
    assert [len(row["input_ids"]) <= 4 for row in rows] == [True] * 4
    assert rows[1]["input_ids"][:2] == HEAD


def test_a_row_is_no_longer_than_asked_and_the_adapter_is_off() -> None:
    rows = sampled(count=12, writes=True)
    assert all(2 <= len(row) <= 9 for row in rows)
    assert sampled(tiny("llama", moved=True), 12, writes=True) == rows
    assert sampled(count=12, writes=True, seed=4) != rows


def test_without_a_pad_token_rows_end_where_their_text_does() -> None:
    model, words = base("llama"), tokenizer(writes=True)
    words.pad_token_id = None
    assert model.generation_config is not None
    ends = sorted({row[-1] for row in sampled(count=12, writes=True)})[:2]
    model.generation_config.eos_token_id = ends
    short = [row for row in sampled(model, 12, words) if len(row) < 9]
    assert short
    for row in short:
        assert row[-1] in ends
        # Three tokens are kept at least, so a text that ends at once has its end twice.
        assert len(row) == 3 or not any(token in ends for token in row[1:-1])


def test_tokenizers_that_begin_no_text_are_refused() -> None:
    with pytest.raises(SourceError, match="sampling needs a tokenizer"):
        sample_rows(base("llama"), None, count=1, max_length=4)
    bare = tokenizer()
    bare.bos_token_id = bare.eos_token_id = None
    with pytest.raises(SourceError, match="neither bos_token nor eos_token"):
        sampled(words=bare)
    bare.bos_token_id = 13
    with pytest.raises(SourceError, match="no row in the model's embedding; got: token 13"):
        sampled(words=bare)
    bare.bos_token_id = BOS  # and nothing that ends one
    model = base("llama")
    model.generation_config.eos_token_id = None
    assert all(len(row) >= 8 for row in sampled(model, 3, bare))


# users' turns that are given


def spoken(prompts: list[str], count: int = 8, seed: int = 1, length: int = 40, **how: Any) -> Any:
    model = hostile(base("llama"))
    words = tokenizer(**{"chat": True, **how})
    rows = sample_rows(
        model, words, count=count, max_length=length, seed=seed, prompts=prompts, batch_size=4
    )
    return [row["input_ids"] for row in rows]


def test_prompts_are_the_users_turns() -> None:
    said = {text: [ord(c) % 13 for c in text] for text in ("bcd", "cab", "dddc", "abcb")}
    assert not any(END in turn for turn in said.values())

    def turns(rows: list[list[int]]) -> list[str]:
        found = []
        for row in rows:
            (text,) = [t for t, ids in said.items() if row[: len(ids) + 3] == [*HEAD, *ids, *TAIL]]
            found.append(text)
            assert 1 <= len(row) - len(said[text]) - 3 <= 24  # the model's answer
        return found

    rows = spoken(list(said))
    assert [row[: len(HEAD)] == HEAD for row in rows] == [False] * 2 + [True] * 6
    assert rows[:2] == spoken(["bcd"])[:2]  # documents are what they were
    order = turns(rows[2:])
    assert sorted(order[:4]) == sorted(said)
    assert order[4:] == order[:2]
    assert rows == spoken(list(said))
    others = [turns(spoken(list(said), seed=seed)[2:]) for seed in range(4)]
    assert len({tuple(found) for found in others}) > 1
    moved = sample_rows(
        hostile(tiny("llama", moved=True)), tokenizer(chat=True), count=8, max_length=40, seed=1,
        prompts=list(said), batch_size=4,
    )  # fmt: skip
    assert [row["input_ids"] for row in moved] == rows


def test_answers_to_prompts_are_sampled_from_the_model() -> None:
    model = hostile(base("llama"))
    with torch.no_grad():
        ids = torch.tensor([[*HEAD, *(ord(c) % 13 for c in "bc"), *TAIL]])
        p = model(ids).logits[0, -1].softmax(-1)
    rows = sample_rows(
        model, tokenizer(chat=True), count=4000, max_length=7, seed=2, prompts=["bc"],
        batch_size=1000,
    )  # fmt: skip
    assert {len(row["input_ids"]) for row in rows[1000:]} <= {5, 6, 7}
    turn = rows[1000]["input_ids"][: len(HEAD) + 1]
    assert turn == [*HEAD, ord("b") % 13]  # cut, so that there is room for an answer
    rows = sample_rows(
        model, tokenizer(chat=True), count=4000, max_length=29, seed=2, prompts=["bc"],
        batch_size=1000,
    )  # fmt: skip
    first = Counter(row["input_ids"][5] for row in rows[1000:])
    found = stats.chisquare([first[t] for t in range(13)], [3000 * float(q) for q in p])
    assert found.pvalue > 1e-3


def test_prompts_need_a_chat() -> None:
    with pytest.raises(SourceError, match="asked in a chat; got: a tokenizer without"):
        spoken(["bc"], chat=False)
    with pytest.raises(SourceError, match="asked in a chat; got: no prompts"):
        spoken([])
    long = spoken(["bcda" * 40], length=20)  # cut to make room for a token of an answer
    assert all(len(row) <= 20 for row in long)
