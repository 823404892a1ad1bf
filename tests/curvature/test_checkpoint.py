"""A fit that was stopped goes on from its file, to the same result bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import retain.curvature.fit.source as source_reading
from fits import dora, tensors, text
from retain import Curvature, attach_lora, fit_curvature, load_model
from retain.curvature.fit.accumulator import Accumulator
from retain.curvature.fit.checkpoint import forget
from retain.errors import ConfigError, OutputError, RetainWarning, SourceError
from retain.models.sites import lora_sites
from tiny import STRUCTURES, base, tiny

BATCHES = 3
CASES: list[dict[str, Any]] = [{"structure": s} for s in STRUCTURES]
CASES += [{"structure": s, "rank": 1} for s in ("kfac", "shampoo")]
CASES += [{"structure": s, "space": "adapter"} for s in ("identity", "kfac", "ekfac")]
CASES += [
    {"structure": "kfac", "share": 0.5},
    {"structure": "tridiagonal", "share": 0.5, "samples": 2},
    {"structure": "shampoo", "fisher": "exact", "kind": "bert"},
    {"structure": "ekfac", "fisher": "tempered", "kind": "bert"},
]


class Stop(Exception):
    """What stops a fit."""


class Batches:
    """Counts the batches that are run, and stops before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.stop, real = 0, 0, Accumulator.batch

        def batch(accumulator: Accumulator, *args: Any) -> None:
            if self.run + 1 == self.stop:
                raise Stop
            self.run += 1
            real(accumulator, *args)

        monkeypatch.setattr(Accumulator, "batch", batch)

    def until(self, stop: int, **options: Any) -> None:
        """A fit that is stopped before its batch number `stop`, from 1."""
        self.run, self.stop = 0, stop
        with pytest.raises(Stop):
            fit(**options)

    def count(self, **options: Any) -> tuple[Curvature, int]:
        """A whole fit, and how many batches it ran."""
        self.run, self.stop = 0, 0
        return fit(**options), self.run


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(monkeypatch)


def fit(*, kind: str = "llama", model: nn.Module | None = None, **options: Any) -> Curvature:
    model = tiny(kind, moved=True) if model is None else model
    rows = options.pop("source", None) or text(3, 2 * BATCHES)
    options = {"structure": "kfac", "batch_size": 2, "save_every": 0.0} | options
    return fit_curvature(model, rows, progress=False, **options)


def identical(got: Curvature, want: Curvature) -> None:
    assert got.info == want.info
    assert list(got.blocks) == list(want.blocks)
    mine, theirs = (
        tensors(c) + [t for kept in c.anchor.values() for t in kept] for c in (got, want)
    )
    for x, y in zip(mine, theirs, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert got.memory() == want.memory()


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_a_stopped_fit_goes_on_to_the_same_result(
    options: dict, batches: Batches, tmp_path: Path
) -> None:
    want, whole = batches.count(**options)
    assert whole == BATCHES * (2 if options["structure"] == "ekfac" else 1)
    for stop in range(1, whole + 1):
        path = tmp_path / str(stop)
        batches.until(stop, partial=path, **options)
        assert path.is_file() is (stop > 1)
        got, run = batches.count(partial=path, **options)
        assert run == whole - stop + 1
        identical(got, want)

    path = tmp_path / "again and again"
    for _ in range(whole - 1):
        batches.until(2, partial=path, **options)
    got, run = batches.count(partial=path, **options)
    assert run == 1
    identical(got, want)
    identical(fit(partial=path, **options), want)  # killed after the last batch: nothing is left


def test_a_fit_saves_no_more_often_than_it_is_told(batches: Batches, tmp_path: Path) -> None:
    path = tmp_path / "partial"
    batches.until(3, partial=path, save_every=1e9)
    assert list(tmp_path.iterdir()) == []
    batches.until(BATCHES + 1, partial=path, save_every=1e9, structure="ekfac")
    got, run = batches.count(partial=path, save_every=1e9, structure="ekfac")
    assert run == BATCHES  # the first pass is kept in any case
    identical(got, fit(structure="ekfac"))
    batches.until(3)
    assert list(tmp_path.iterdir()) == [path]


# --- a file of another fit ---


@pytest.mark.parametrize(
    "other",
    [
        {"structure": "shampoo"},
        {"structure": "ekfac"},
        {"space": "adapter"},
        {"fisher": "empirical"},
        {"samples": 2},
        {"seed": 1},
        {"rank": 2},
        {"share": 0.5},
        {"calibrate": False},
        {"batch_size": 3},
        {"max_length": 3},
        {"rows": 5},
        {"source": text(4, 2 * BATCHES)},
        {"fisher": "tempered", "temperature": 3.0},
        {"source": [row | {"label": 2} for row in text(3, 2 * BATCHES)], "kind": "bert"},
        {"kind": "bert"},
    ],
    ids=str,
)
def test_another_fits_file_counts_as_none(other: dict, batches: Batches, tmp_path: Path) -> None:
    path = tmp_path / "partial"
    mine: dict[str, Any] = {"kind": "bert"} if "source" in other and "kind" in other else {}
    if "temperature" in other:
        mine = {"fisher": "tempered"}
    batches.until(3, partial=path, **mine)
    want, whole = batches.count(**mine | other)
    got, run = batches.count(partial=path, **mine | other)
    assert run == whole
    identical(got, want)


def test_sums_of_another_kind_of_sketch_count_as_none(
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "partial"
    with monkeypatch.context() as before:
        before.setattr("retain.curvature.fit.fit.FORM", "frequent directions")
        batches.until(3, partial=path, rank=2)
    with pytest.warns(RetainWarning, match="begins anew"):
        got, run = batches.count(partial=path, rank=2)
    assert run == BATCHES
    identical(got, fit(rank=2))


def weight(part: str, model: Any) -> torch.Tensor:
    """Some weights that a fit depends on."""
    if part == "head":
        return next(p for n, p in model.named_parameters() if ".modules_to_save." in n)
    if part == "plain":
        return model.bert.encoder.layer[1].intermediate.dense.weight
    site = lora_sites(model)[3]
    if part == "magnitude":
        return site.layer.lora_magnitude_vector["default"].weight
    return {"A": site.a, "B": site.b, "base": site.layer.base_layer.weight}[part]


@pytest.mark.parametrize("part", ["A", "B", "base", "head", "magnitude", "plain"])
def test_another_models_file_counts_as_none(part: str, batches: Batches, tmp_path: Path) -> None:
    path, made = (
        tmp_path / "partial",
        {"plain": lambda: base("bert"), "magnitude": lambda: dora("llama")},
    )
    model = made.get(part, lambda: tiny("bert" if part == "head" else "llama", moved=True))()
    batches.until(3, model=model, partial=path)
    kept = path.read_bytes()
    assert batches.count(model=model, partial=path)[1] == BATCHES - 2
    path.write_bytes(kept)
    with torch.no_grad():
        # For a plain model a place that its fingerprint's 64 samples miss.
        weight(part, model).view(-1)[-1 if part == "plain" else 0] += 0.05
    want, _ = batches.count(model=model)
    got, run = batches.count(model=model, partial=path)
    assert run == BATCHES
    identical(got, want)


# --- a file that cannot be used ---


def test_a_damaged_file_counts_as_none(batches: Batches, tmp_path: Path) -> None:
    path, want = tmp_path / "partial", fit()
    batches.until(3, partial=path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    random = torch.Generator().manual_seed(0)
    damaged = [b"", b"none", whole[:7], whole[: header - 1], whole[:-1], bytes(len(whole))]
    for low, high in ((0, 8), (8, header), (header, len(whole))):
        for place in torch.randint(low, high, (8,), generator=random).tolist():
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        got, run = batches.count(partial=path)
        identical(got, want)
        assert run in (BATCHES, 1)  # a space in the header may have turned into another
    path.write_bytes(whole)
    assert batches.count(partial=path)[1] == 1


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "partial", tmp_path / "folder"):
        with pytest.raises(OutputError, match=r"cannot be written; got: .*; fix: "):
            fit(partial=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "not a folder"


# --- text that the model samples ---


def test_sampled_text_is_kept(
    batches: Batches, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(tiny_folder, dtype="float64")
    model, path, sampled = attach_lora(loaded.model, rank=2), tmp_path / "p", []
    real = source_reading.sample_rows
    monkeypatch.setattr(
        source_reading, "sample_rows", lambda *a, **k: sampled.append(k["seed"]) or real(*a, **k)
    )
    options = {"model": model, "source": "self", "tokenizer": loaded.tokenizer}
    options |= {"rows": 6, "max_length": 8}
    want = fit(**options)
    assert sampled == [0]
    batches.until(1, partial=path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["p.text"]
    batches.until(3, partial=path, **options)
    got, run = batches.count(partial=path, **options)
    assert (sampled, run) == ([0, 0], 1)
    identical(got, want)

    kept = Path(f"{path}.text")
    for other in ({"seed": 1}, {"rows": 8}, {"max_length": 9}):
        before = len(sampled)
        identical(fit(partial=path, **options | other), fit(**options | other))
        assert len(sampled) == before + 2
        assert len(json.loads(kept.read_text())["rows"]) == other.get("rows", 6)
    for damage in ("", "{}", "[]", "1", '{"of": 1}', '{"of": [], "rows": 3}'):
        kept.write_text(damage)
        identical(fit(partial=path, **options), want)
    forget(path)
    assert list(tmp_path.iterdir()) == []
    forget(path)  # nothing to delete is no error


def test_text_of_prompts_is_kept_apart(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_folder, dtype="float64")
    loaded.tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    model, path = attach_lora(loaded.model, rank=2), tmp_path / "p"
    options: dict[str, Any] = {"model": model, "source": "self", "tokenizer": loaded.tokenizer}
    options |= {"rows": 8, "max_length": 40}
    file = tmp_path / "prompts"
    file.write_text("one\ntwo\n")
    plain = fit(partial=path, **options)
    want = fit(**options, prompts=["one", "two"])
    for prompts in (["one", "two"], file, iter(["one", "two"])):
        identical(fit(partial=path, **options, prompts=prompts), want)
    kept = json.loads(Path(f"{path}.text").read_text())
    said = [loaded.tokenizer.decode(row["input_ids"]) for row in kept["rows"]]
    assert sum(text.startswith(("<one>", "<two>")) for text in said) == 6
    identical(fit(partial=path, **options), plain)
    assert fit(**options, prompts="general").info.sequences == 8
    with pytest.raises(ConfigError, match=r"in the model's own text; got: prompts for source="):
        fit(**options | {"source": [{"text": "a"}]}, prompts=["one"])
    with pytest.raises(SourceError, match="there are no prompts"):
        fit(**options, prompts=[])
