"""Rows of a task as items, subsets of them, and items as tokens."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from task_rows import HUB
from tokenizers_made import made

from retain.data.batches import collate
from retain.data.loading import encode_items, inside, load_items
from retain.data.specs import Item, TaskSpec, list_tasks, load_task
from retain.data.tokens import fit_prompt, tokenize
from retain.errors import ConfigError, RetainWarning, SourceError

SST2 = load_task("glue/sst2")
DATA = Path(os.environ.get("RETAIN_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))


@pytest.fixture(scope="module")
def plain() -> Any:
    """One token a byte, none in front."""
    return made()


@pytest.fixture(scope="module")
def headed() -> Any:
    """The same with a first token, as Llama's tokenizers add."""
    return made(bos=True)


@pytest.fixture(scope="module")
def bert() -> Any:
    """For pairs with segments."""
    return made(cls=True)


def put(folder: Path, spec: TaskSpec, rows: list[dict[str, Any]], file: str) -> Path:
    path = folder / spec.local / file
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return folder


def answers(folder: Path, file: str) -> TaskSpec:
    """MultiRC of 40 answers, four to a question."""
    spec, base = load_task("super_glue/multirc"), HUB["super_glue/multirc"][0]
    places = [{"paragraph": i // 8, "question": i // 4, "answer": i} for i in range(40)]
    put(folder, spec, [base | {"idx": p, "label": i % 2} for i, p in enumerate(places)], file)
    return spec


def sentences(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"sentence": f"number {i}", "label": label} for i, label in enumerate(labels)]


class TestRows:
    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
    def test_local_files(self, tmp_path: Path, suffix: str) -> None:
        put(tmp_path, SST2, sentences([1, 0, -1, 1]), f"train{suffix}")
        put(tmp_path, SST2, sentences([0]), f"validation{suffix}")
        items = load_items(SST2, "train", data_dir=tmp_path)
        assert [i.row for i in items] == [0, 1, 3]  # the one without a gold label is left out
        assert [i.completion for i in items] == [" positive", " negative", " positive"]
        assert len(load_items(SST2, "eval", data_dir=str(tmp_path))) == 1

    @pytest.mark.filterwarnings("error")
    def test_rows_without_a_label_are_counted(self, tmp_path: Path) -> None:
        put(tmp_path, SST2, sentences([1, 0, -1, None]), "train.jsonl")
        put(tmp_path, SST2, sentences([0, 1]), "validation.jsonl")
        said = r"task glue/sst2: 2 of 4 train rows have no gold label in 'label'; they are left out"
        for split in ("train", "validation"):
            with pytest.warns(RetainWarning, match=said):
                load_items(SST2, split, data_dir=tmp_path)  # type: ignore[arg-type]
        assert len(load_items(SST2, "eval", data_dir=tmp_path)) == 2

    def test_balanced_classes_in_training(self, tmp_path: Path) -> None:
        spec = load_task("super_glue/cb")
        rows = [
            {"premise": f"p{i}", "hypothesis": "h", "label": label}
            for i, label in enumerate([0] * 50 + [1] * 40 + [2] * 3)
        ]
        put(tmp_path, spec, rows, "train.jsonl")
        put(tmp_path, spec, rows, "validation.jsonl")

        def classes(limit: int, split: Any = "train") -> Counter[Any]:
            return Counter(
                i.answer for i in load_items(spec, split, data_dir=tmp_path, limit=limit)
            )

        assert classes(9) == {0: 3, 1: 3, 2: 3}
        assert classes(23) == {0: 10, 1: 10, 2: 3}  # the small class is all there
        assert set(classes(10).values()) <= {3, 4}
        assert classes(90).total() == 90
        assert classes(1000).total() == 93
        plain = [classes(n, "eval") for n in (9, 21)]
        assert plain != [{0: 3, 1: 3, 2: 3}, {0: 9, 1: 9, 2: 3}]

    @pytest.mark.parametrize("split", ["train", "eval"])
    def test_one_seed_one_subset(self, tmp_path: Path, split: Any) -> None:
        labels = [i % 2 for i in range(200)]
        for file in ("train.jsonl", "validation.jsonl"):
            put(tmp_path, SST2, sentences(labels), file)

        def rows(limit: int, seed: int) -> list[int]:
            items = load_items(SST2, split, data_dir=tmp_path, limit=limit, seed=seed)
            return [i.row for i in items]

        assert rows(40, 0) == rows(40, 0) == sorted(rows(40, 0))
        assert len(set(rows(40, 0))) == 40
        assert set(rows(20, 0)) < set(rows(40, 0))
        assert rows(40, 0) != rows(40, 1)

    def test_the_subset_is_the_same_for_ever(self, tmp_path: Path) -> None:
        put(tmp_path, SST2, sentences([0, 1] * 10), "train.jsonl")
        items = load_items(SST2, "train", data_dir=tmp_path, limit=4, seed=0)
        assert [i.row for i in items] == [3, 12, 16, 17]

    def test_groups_stay_whole_in_evaluation(self, tmp_path: Path) -> None:
        spec = answers(tmp_path, "validation.jsonl")
        for limit, want in ((14, 12), (4, 4), (1, 4), (100, 40)):
            items = load_items(spec, "eval", data_dir=tmp_path, limit=limit)
            assert len(items) == want
            assert set(Counter(i.group for i in items).values()) == {4}

    def test_validation_rows_are_no_training_rows(self, tmp_path: Path) -> None:
        rows = sentences([i % 2 for i in range(40)])
        rows += [rows[i] | {"label": 1} for i in range(0, 40, 3)]  # texts that come twice
        put(tmp_path, SST2, rows, "train.jsonl")

        def read(split: Any, **asked: Any) -> list[Item]:
            return load_items(SST2, split, data_dir=tmp_path, **asked)

        held = read("validation", limit=8, seed=1)
        assert held == read("validation", limit=8, seed=2) and len(held) == 8
        texts = {item.prompt for item in held}
        for seed in range(5):
            taken = read("train", limit=30, seed=seed, held=8)
            assert len(taken) == 30 and not texts & {item.prompt for item in taken}
        said = {rows[item.row]["sentence"] for item in held}
        left = [item.row for item in read("train", held=8)]
        assert left == [i for i, row in enumerate(rows) if row["sentence"] not in said]
        assert len(read("validation")) == 54 // 4  # a quarter at most
        assert len(read("train")) == 54

    def test_validation_keeps_groups_whole(self, tmp_path: Path) -> None:
        spec = answers(tmp_path, "train.jsonl")
        held = load_items(spec, "validation", data_dir=tmp_path, limit=9)
        assert len(held) == 8 and set(Counter(i.group for i in held).values()) == {4}

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"no .*glue/sst2/train.jsonl.gz.*--data-dir"):
            load_items(SST2, "train", data_dir=tmp_path)
        with pytest.raises(SourceError, match=r"not on the hub.*--data-dir"):
            load_items(load_task("custom"), "train")
        put(tmp_path, SST2, sentences([-1, "-"]), "train.jsonl")
        with pytest.raises(SourceError, match="no row with a gold label"):
            load_items(SST2, "train", data_dir=tmp_path)
        put(tmp_path, SST2, [{"text": "a", "label": 0}], "validation.jsonl")
        with pytest.raises(SourceError, match=r"line 1 of validation.jsonl .*fields: text, label"):
            load_items(SST2, "eval", data_dir=tmp_path)
        with pytest.raises(ConfigError, match="did you mean 'train'"):
            load_items(SST2, "trian", data_dir=tmp_path)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="limit"):
            load_items(SST2, "train", data_dir=tmp_path, limit=0)
        (tmp_path / "glue/sst2/train.jsonl.gz").write_bytes(b"no")
        with pytest.raises(SourceError, match="cannot be read"):
            load_items(SST2, "train", data_dir=tmp_path)


class TestHub:
    @pytest.mark.parametrize("name", ["cl15/mnli", "cl15/yahoo", "glue/mnli", "arc_easy"])
    def test_rows_and_fields(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        row, prompt, completion = HUB[name]
        asked: list[Any] = []

        def fake(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
            asked.append((path, name, split))
            rows = [row, row]
            return [{**rows[0], "label": -1}, row] if "label" in row else rows[:1]

        monkeypatch.setattr("datasets.load_dataset", fake)
        spec = load_task(name)
        items = load_items(spec, "eval")
        assert asked == [(spec.hub.path, spec.hub.name, spec.hub.splits.eval)]
        assert [(i.prompt, i.completion) for i in items] == [(prompt, completion)]

    def test_no_hub(self) -> None:
        with pytest.raises(SourceError, match=r"cannot be read from the hub.*--data-dir"):
            load_items(SST2, "train")

    def test_rows_of_another_kind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"a": 1}])
        with pytest.raises(SourceError, match="'text' is undefined; fields: a"):
            load_items(load_task("cl15/yelp"), "train")


def item(prompt: str, completion: str = " bad", **more: Any) -> Item:
    return Item(prompt=prompt, options=(" good", completion), answer=1, **more)


class TestDecoder:
    @pytest.mark.parametrize("which", ["plain", "headed"])
    @pytest.mark.parametrize("length", [20, 27, 40, 200])
    @pytest.mark.parametrize("truncate", ["left", "middle"])
    def test_a_completion_is_never_cut(
        self, which: str, length: int, truncate: str, request: pytest.FixtureRequest
    ) -> None:
        tokenizer = request.getfixturevalue(which)
        spec = SST2.model_copy(update={"truncate": truncate})
        rows = [item("q" * n + " Answer:", " bäd ending") for n in range(0, 60, 7)]
        for row, example in zip(
            rows,
            encode_items(rows, tokenizer, max_length=length, causal=True, spec=spec),
            strict=True,
        ):
            told = [t for t, p in zip(example.targets, example.predict, strict=True) if p]
            assert tokenizer.decode(told) == " bäd ending"
            assert told == tokenizer(" bäd ending", add_special_tokens=False)["input_ids"]
            whole = [*example.tokens, example.targets[-1]]
            assert len(whole) <= length
            assert example.tokens[1:] == example.targets[:-1]
            assert example.predict == (False,) * (len(whole) - len(told) - 1) + (True,) * len(told)
            if which == "headed":
                assert whole.count(0) == 1 and whole[0] == 0
            if len(tokenize(tokenizer, row.prompt)) + len(told) <= length:
                assert whole == tokenize(tokenizer, row.prompt) + told  # as ranking has it
            else:
                assert tokenizer.decode(whole).endswith("r: bäd ending")

    def test_where_a_prompt_is_cut(self, plain: Any, headed: Any) -> None:
        text = "instruction " + "x" * 50 + " question:"
        assert fit_prompt(text, plain, 99) == text
        assert fit_prompt(text, plain, 10) == "question:"  # a space in front goes too
        assert fit_prompt(text, plain, 34, "middle") == "instruction xx ... xxxxx question:"
        assert fit_prompt(text, plain, 10, "middle") == "question:"
        assert len(tokenize(headed, fit_prompt(text, headed, 34, "middle"))) <= 34
        assert fit_prompt(text, headed, 1) == fit_prompt(text, plain, 0) == ""

    def test_training_and_scoring_read_one_text(self, plain: Any, tmp_path: Path) -> None:
        rows = [{"sentence": "long " * 99, "label": i % 2} for i in range(4)]
        put(tmp_path, SST2, rows, "train.jsonl")
        items = load_items(SST2, "train", data_dir=tmp_path, tokenizer=plain, max_length=80)
        longest = len(" negative")
        for i in items:
            assert len(tokenize(plain, i.prompt)) <= 80 - longest
            assert i.prompt.endswith("or negative?\nAnswer:")
        again = encode_items(items, plain, max_length=80, causal=True, spec=SST2)
        for i, example in zip(items, again, strict=True):
            assert plain.decode([*example.tokens, example.targets[-1]]) == i.prompt + i.completion

    def test_what_is_generated_ends(self, plain: Any) -> None:
        spec = load_task("gsm8k")
        row = spec.render(HUB["gsm8k"][0])
        assert row is not None
        (example,) = encode_items([row], plain, max_length=200, causal=True, spec=spec)
        told = [t for t, p in zip(example.targets, example.predict, strict=True) if p]
        assert told[-1] == plain.eos_token_id
        assert plain.decode(told[:-1]) == row.completion
        (choice,) = encode_items([item("q")], plain, max_length=200, causal=True, spec=SST2)
        assert plain.eos_token_id not in choice.targets

    def test_a_number_is_written(self, plain: Any) -> None:
        spec = load_task("glue/stsb")
        row = spec.render(HUB["glue/stsb"][0])
        assert row is not None and row.answer == 2.8
        (example,) = encode_items([row], plain, max_length=200, causal=True, spec=spec)
        told = [t for t, p in zip(example.targets, example.predict, strict=True) if p]
        assert plain.decode(told) == " 2.8</s>"

    def test_an_answer_without_room(self, plain: Any) -> None:
        with pytest.raises(SourceError, match=r"row 6 .* no room.*max_length of 100 or more"):
            encode_items(
                [item("q", " " + "x" * 35, row=5)], plain, max_length=36, causal=True, spec=SST2
            )


class TestEncoder:
    def test_one_text(self, bert: Any) -> None:
        row = item("q", texts=("a dog",))
        (example,) = encode_items([row], bert, max_length=9, causal=False, spec=SST2)
        assert bert.decode(example.tokens) == "[CLS]a dog[SEP]"
        assert (example.targets, example.predict) == ((1,), ())

    def test_two_texts_and_a_number(self, bert: Any) -> None:
        spec = load_task("glue/stsb")
        rows = [spec.render(HUB["glue/stsb"][0]), spec.render(HUB["glue/stsb"][0] | {"label": 5.0})]
        examples = encode_items(
            [r for r in rows if r], bert, max_length=32, causal=False, spec=spec
        )
        assert examples[0].segments == (0,) * 13 + (1,) * 12
        batch = collate(examples, pad=0)
        assert batch.targets.dtype == torch.float32
        assert batch.targets.tolist() == pytest.approx([2.8, 5.0])
        assert batch.predict is None

    def test_long_texts_are_cut(self, bert: Any) -> None:
        row = item("q", texts=("a dog " * 20, "a cat " * 20))
        (example,) = encode_items([row], bert, max_length=16, causal=False, spec=SST2)
        assert len(example.tokens) == 16

    @pytest.mark.parametrize("name", ["super_glue/copa", "gsm8k", "arc_easy"])
    def test_tasks_that_make_no_sense(self, name: str, bert: Any) -> None:
        with pytest.raises(ConfigError, match=f"task {name} cannot be asked of an encoder"):
            encode_items([], bert, max_length=16, causal=False, spec=load_task(name))


@pytest.mark.parametrize("name", list_tasks())
def test_local_copies_fit_their_task(name: str) -> None:
    spec = load_task(name)
    for split in ("train", "eval"):
        if not (DATA / spec.local / f"{getattr(spec.files, split)}.jsonl.gz").is_file():
            pytest.skip(f"no {spec.local} under {DATA}")
        items = load_items(spec, split, data_dir=DATA, limit=64)  # every row's answer is checked
        assert 0 < len(items) <= 64
        for i in items:
            assert i.prompt == i.prompt.strip() or name == "glue/cola"
            assert "{" not in i.prompt[:3] and "\n\n\n" not in i.prompt[-200:]
            assert not i.options or i.answer in range(len(i.options))
            assert len(i.texts) == len(spec.texts) and all(t.strip() for t in i.texts)
        if spec.labels and split == "train":
            assert {i.answer for i in items} == set(range(len(spec.labels)))


# --- null fields, and places outside the data folder


def mine(**change: Any) -> TaskSpec:
    told = {"name": "mine", "description": "d", "local": "mine", "kind": "choice"}
    return TaskSpec(**told | {"prompt": "{{text}}", "options": ["a", "b"]} | change)


@pytest.mark.parametrize("change", [
    {"prompt": "{{text}}\nTeam:"}, {"prompt": "{{more.text}}\nTeam:"},
    {"prompt": "Team:", "texts": ["{{text}}"]},
    {"prompt": "Team:", "options": ["{{text}}", "b"]}, {"prompt": "Team:", "options": "words"},
    {"prompt": "Team:", "group": "text"},
])  # fmt: skip
def test_a_task_names_the_line(tmp_path: Path, change: dict[str, Any]) -> None:
    spec = mine(**change)
    sound = {"text": "so", "more": {"text": "so"}, "words": ["a", "b"], "label": 0}
    empty = {"text": None, "more": {"text": None}, "words": ["a", None], "label": 0}
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (sound, sound, empty, sound)))
    with pytest.raises(SourceError, match=r"line 3 of train.jsonl .*is null") as error:
        load_items(spec, "train", data_dir=tmp_path)
    assert "or ''" in str(error.value.fix)
    path.write_text("".join(json.dumps(row) + "\n" for row in (sound, sound)))
    assert len(load_items(spec, "train", data_dir=tmp_path)) == 2


ROW = '{"text": "so", "label": 0}\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data folder with one task, and another folder beside it."""
    for folder in ("home/mine", "home/deep/er", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train.jsonl").write_text(ROW)
    (tmp_path / "home-too").mkdir()
    (tmp_path / "home-too" / "train.jsonl").write_text(ROW)
    return tmp_path / "home"


@pytest.mark.parametrize("local", ["mine", "deep/er", "./mine", "deep/../mine", "."])
def test_inside(home: Path, local: str) -> None:
    if local == ".":
        shutil.copy(home / "mine" / "train.jsonl", home)
    assert len(load_items(mine(local=local), "train", data_dir=home)) == 1


@pytest.mark.parametrize(
    "local",
    ["../outside", "mine/../../outside", "..", "../home-too", "{tmp}/outside", "{home}/mine"],
)
def test_outside(home: Path, local: str) -> None:
    local = local.replace("{tmp}", str(home.parent)).replace("{home}", str(home))
    with pytest.raises(SourceError, match=r"leads out of the data folder.*--data-dir"):
        load_items(mine(local=local), "train", data_dir=home)


def test_files_too(home: Path) -> None:
    for train in ("../../outside/train", str(home.parent / "outside" / "train")):
        with pytest.raises(SourceError, match="leads out"):
            load_items(mine(files={"train": train, "eval": "x"}), "train", data_dir=home)


@pytest.mark.parametrize("link", ["folder", "file", "both"])
def test_links(home: Path, link: str) -> None:
    shutil.rmtree(home / "mine")
    if link == "folder":
        os.symlink(home.parent / "outside", home / "mine")
    else:
        (home / "mine").mkdir()
        os.symlink(home.parent / "outside" / "train.jsonl", home / "mine" / "train.jsonl")
    with pytest.raises(SourceError, match="leads out"):
        load_items(mine(), "train", data_dir=home)
    if link == "both":  # a link that stays inside is as good as a file
        os.remove(home / "mine" / "train.jsonl")
        os.symlink(home / "deep" / "er" / "train.jsonl", home / "mine" / "train.jsonl")
        os.symlink(home, home.parent / "linked")
        assert len(load_items(mine(), "train", data_dir=home.parent / "linked")) == 1


def test_the_fix_works(home: Path) -> None:
    with pytest.raises(SourceError, match="name the folder that holds both with --data-dir"):
        load_items(mine(local="../outside"), "train", data_dir=home)
    assert len(load_items(mine(local="outside"), "train", data_dir=home.parent)) == 1


def test_no_path(home: Path) -> None:
    os.symlink("loop", home / "loop")
    for below in ("a\0b", "x" * 5000 + "/y"):
        with pytest.raises(SourceError):
            load_items(mine(local=below), "train", data_dir=home)
    with pytest.raises(SourceError):
        load_items(mine(local="loop"), "train", data_dir=home)
    assert inside(home, "mine", "it") == home / "mine"


@pytest.mark.parametrize("name", ["../outside", "{tmp}/outside", "mine/../.."])
def test_a_study_too(home: Path, name: str) -> None:
    from retain.study.material import _data_file

    def source(name: str) -> Any:
        return SimpleNamespace(name=name)

    work: Any = SimpleNamespace(data_dir=home)
    assert _data_file(source("mine"), "train", work) == home / "mine" / "train.jsonl"
    with pytest.raises(SourceError, match="leads out of the data folder"):
        _data_file(source(name.replace("{tmp}", str(home.parent))), "train", work)
