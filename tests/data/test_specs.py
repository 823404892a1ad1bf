"""Tasks as data: every file, its words, what is laid over what, and mistakes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from task_rows import HUB

from retain.data.specs import TaskSpec, list_tasks, load_orders, load_task, template_text
from retain.errors import ConfigError, SourceError

MINE = {
    "description": "mine",
    "kind": "choice",
    "prompt": "{{text}}\nAnswer:",
    "options": ["good", "bad"],
}


def write(folder: Path, name: str = "mine.yaml", /, **fields: Any) -> Path:
    import yaml

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def local(spec: TaskSpec, row: dict[str, Any]) -> dict[str, Any]:
    """A hub's row in the task's fields."""
    from retain.data.templates import template

    return {**row, **{field: template(text)(row) for field, text in spec.hub.fields.items()}}


def test_every_task_has_a_row_here() -> None:
    assert list_tasks() == sorted(HUB)


@pytest.mark.parametrize("name", sorted(HUB))
def test_the_text_of_a_row(name: str) -> None:
    row, prompt, completion = HUB[name]
    spec = load_task(name)
    item = spec.render(local(spec, row), 3)
    assert item is not None
    assert (item.prompt, item.completion, item.row) == (prompt, completion, 3)
    assert item.prompt == item.prompt.rstrip()
    assert all(o.startswith(" ") and o[1:] == o.strip() for o in item.options)
    assert spec.name == name and spec.description and spec.citation and spec.hub.path
    assert len(item.texts) == len(spec.texts) and all(item.texts)


def test_the_label_words_of_each_class() -> None:
    words = {name: load_task(name).labels for name in list_tasks()}
    assert words["glue/mnli"] == ("True", "Neither", "False")
    assert words["super_glue/cb"] == ("True", "False", "Neither")
    assert words["glue/rte"] == words["super_glue/rte"] == ("True", "False")
    assert words["glue/wnli"] == ("False", "True")
    assert words["glue/qnli"] == ("yes", "no")
    for name in ("glue/cola", "glue/mrpc", "glue/qqp", "super_glue/boolq", "super_glue/wic"):
        assert words[name] == ("no", "yes")
    own = {n for n in words if load_task(n).kind == "choice" and not words[n]}
    assert own == {
        "super_glue/copa", "super_glue/record", "arc_easy", "arc_challenge", "hellaswag",
        "winogrande",
    }  # fmt: skip
    assert load_task("cl15/dbpedia").classes == 14
    assert load_task("glue/stsb").classes is None


def test_the_official_metrics() -> None:
    metrics = {name: load_task(name).metric for name in list_tasks()}
    assert metrics["glue/cola"] == "matthews"
    assert metrics["glue/mrpc"] == metrics["glue/qqp"] == "f1"
    assert metrics["glue/stsb"] == "pearson_spearman"
    assert metrics["super_glue/cb"] == "f1_macro"
    assert metrics["super_glue/multirc"] == "f1a_em"
    assert {m for n, m in metrics.items() if n.startswith("cl15/")} == {"accuracy"}


def test_groups_and_references() -> None:
    item = load_task("super_glue/multirc").render(HUB["super_glue/multirc"][0])
    assert item is not None and item.group == "4-7"
    row = HUB["super_glue/record"][0]
    item = load_task("super_glue/record").render({**row, "answers": ["Ann", "Bo"]})
    assert item is not None and item.references == ("Ann", "Bo") and item.group == "3-5"


def test_one_text_is_one_reference(tmp_path: Path) -> None:
    fields = {"description": "mine", "kind": "generate", "prompt": "{{text}}", "gold": "text"}
    spec = load_task(write(tmp_path, **fields, metric="exact_match", references="right"))
    for right, references in (("Paris", ("Paris",)), (7, ("7",)), (["a", "b"], ("a", "b"))):
        item = spec.render({"text": "x", "right": right})
        assert item is not None and item.references == references
    with pytest.raises(SourceError, match="references: right is an object") as error:
        spec.render({"text": "x", "right": {"text": ["Paris"], "answer_start": [3]}})
    assert str(error.value).endswith("such as references: (right).text")


@pytest.mark.parametrize(("gold", "said", "answer", "references"), [
    (["Paris", "Lutetia"], "is a list", "gold[0]", "right"),
    ({"text": ["Paris", "Lutetia"], "start": [3]}, "is an object", "gold.text[0]", "right.text"),
    ({"a b": "Paris"}, "is an object", "gold['a b']", ""),
])  # fmt: skip
def test_a_generated_answer_is_no_list_and_no_object(
    tmp_path: Path, gold: Any, said: str, answer: str, references: str
) -> None:
    fields = {"description": "mine", "kind": "generate", "prompt": "{{text}}", "gold": "right"}
    row = {"text": "x", "right": gold}
    fields |= {"metric": "exact_match"}
    with pytest.raises(SourceError, match=f"answer: gold {said}") as error:
        load_task(write(tmp_path, **fields)).render(row)
    assert f"answer: {answer}" in str(error.value)
    assert str(error.value).endswith(f"references: {references}") or not references
    # what it says to write does
    item = load_task(write(tmp_path, **fields, answer=answer, references=references)).render(row)
    assert item is not None and item.answer == "Paris"
    assert item.references == (("Paris", "Lutetia") if references else ())
    with pytest.raises(SourceError, match="references: "):
        load_task(write(tmp_path, **fields, answer=answer, references="[right]")).render(row)


def test_hellaswag_without_the_parts_of_its_context() -> None:
    row = dict(HUB["hellaswag"][0])
    del row["ctx_a"], row["ctx_b"]
    item = load_task("hellaswag").render(row)
    assert item is not None and item.prompt == HUB["hellaswag"][1]
    whole = load_task("hellaswag").render({**row, "ctx": "How to sit. Take a Chair."})
    assert whole is not None and whole.prompt == "Baking: How to sit. Take a Chair."


@pytest.mark.parametrize("gold", [-1, "-", "", None])
def test_rows_without_a_gold_label_are_none(gold: Any) -> None:
    assert load_task("glue/sst2").render({"sentence": "a", "label": gold}) is None


def test_hidden_labels_of_the_published_tasks_are_none() -> None:
    for name in list_tasks():
        spec, row = load_task(name), HUB[name][0]
        if spec.gold in row and spec.kind != "generate":
            assert spec.solution(spec.from_hub({**row, spec.gold: -1})) is None, name


@pytest.mark.parametrize("answer", ["gold", "gold | float"])
def test_a_number_that_is_none(tmp_path: Path, answer: str) -> None:
    fields = {"description": "", "kind": "regression", "prompt": "{{text}}", "metric": "pearson"}
    spec = load_task(write(tmp_path, **fields, answer=answer))
    for gold in (float("nan"), "nan"):  # as computed, and as a table of text has it
        assert spec.solution({"text": "a", "label": gold}) is None
    with pytest.raises(SourceError, match="the answer is inf, and no finite number"):
        spec.solution({"text": "a", "label": float("inf")})


@pytest.mark.parametrize(("fields", "golds", "answers"), [
    ({"kind": "generate", "metric": "exact_match"}, ["-1", -1, "-", ""], ["-1", "-1", "-", None]),
    ({"kind": "regression", "metric": "pearson"}, [-1.0, 0, "-1", None], [-1.0, 0.0, -1.0, None]),
    ({"options": ["+", "-"], "answer": "options.index(gold)"}, ["+", "-", -1], [0, 1, None]),
    ({"options": ["-1", "1"], "answer": "options.index(gold | string)"}, [1, -1, "-"],
     [1, 0, None]),
    ({"options": "signs", "answer": "signs.index(gold)"}, ["+", "-", ""], [0, 1, None]),
    ({"options": ["no", "yes"], "answer": "{-1: 0, 1: 1}[gold]"}, [1, -1, "-"], [1, 0, None]),
    ({"options": ["no", "yes"], "answer": "(gold + 1) // 2"}, [1, -1], [1, None]),
    ({"options": ["no", "yes"], "answer": "none if gold == 9 else gold"}, [1, 9, -1],
     [1, None, None]),
])  # fmt: skip
def test_a_label_of_minus_one(
    tmp_path: Path, fields: dict[str, Any], golds: list[Any], answers: list[Any]
) -> None:
    spec = load_task(
        write(tmp_path, **{"kind": "choice", "description": "", "prompt": "{{text}}"} | fields)
    )
    rows = [{"text": "a", "signs": ["+", "-"], "label": gold} for gold in golds]
    assert [spec.solution(row) for row in rows] == answers


def test_the_published_orders() -> None:
    orders = load_orders()
    assert orders["order1"] == ("cl15/dbpedia", "cl15/amazon", "cl15/yahoo", "cl15/agnews")
    assert orders["order3"] == ("cl15/yahoo", "cl15/amazon", "cl15/agnews", "cl15/dbpedia")
    # Progressive Prompts numbers its fifteen-task orders 8 to 10; O-LoRA's names are 4 to 6.
    first = "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo"
    assert orders["order4"] == tuple(f"cl15/{t}" for t in first.split())
    fifteen = {name for name in list_tasks() if name.startswith("cl15/")}
    assert len(fifteen) == 15
    for number in (4, 5, 6):
        order = orders[f"order{number}"]
        assert len(order) == 15 and set(order) == fifteen
        assert orders[f"order{number}-14"] == tuple(t for t in order if t != "cl15/yahoo")
    for number in (1, 2, 3):
        swapped = tuple(t.replace("yahoo", "yelp") for t in orders[f"order{number}"])
        assert orders[f"order{number}-yelp"] == swapped


def test_the_template_for_own_data_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "moods.yaml"
    path.write_text(template_text(), encoding="utf-8")
    spec = load_task(path)
    assert spec.model_dump() == load_task("custom").model_dump()
    item = spec.render({"text": "Hooray!", "label": "glad"})
    assert item is not None and item.completion == " glad"
    assert "custom" not in list_tasks()


class TestIncludes:
    def test_laid_over_a_task_of_the_package(self, tmp_path: Path) -> None:
        spec = load_task(
            write(tmp_path, include="glue/sst2.yaml", options=["bad", "good"], hub={"name": "x"})
        )
        base = load_task("glue/sst2")
        assert spec.labels == ("bad", "good")
        assert (spec.hub.path, spec.hub.name) == ("nyu-mll/glue", "x")
        assert (spec.prompt, spec.local) == (base.prompt, base.local)
        assert spec.name == "mine"

    def test_a_file_beside_it_comes_first(self, tmp_path: Path) -> None:
        write(tmp_path, "base.yaml", name="base", **MINE)
        write(tmp_path, "deep/middle.yaml", include="../base.yaml", max_length=99)
        spec = load_task(write(tmp_path, "top.yaml", include="deep/middle.yaml", prompt="{{a}}"))
        assert (spec.name, spec.max_length, spec.prompt) == ("top", 99, "{{a}}")

    @pytest.mark.parametrize("kind", ["above", "absolute", "link", "folder link", "NUL", "list"])
    def test_outside_the_folder(self, kind: str, tmp_path: Path) -> None:
        outside = write(tmp_path, "outside/base.yaml", **MINE)
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "link.yaml").symlink_to(outside)
        (folder / "links").symlink_to(outside.parent, target_is_directory=True)
        base: Any = {
            "above": "../outside/base.yaml", "absolute": str(outside), "link": "link.yaml",
            "folder link": "links/base.yaml", "NUL": "a\0b", "list": ["base.yaml"],
        }[kind]  # fmt: skip
        with pytest.raises(ConfigError, match="an include is not read") as error:
            load_task(write(folder, include=base))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", ["zero", "pipe", "folder"])
    def test_no_regular_file(self, name: str, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        (tmp_path / "zero").symlink_to("/dev/zero")
        with pytest.raises(ConfigError, match=r"no regular file|is outside"):
            load_task(write(tmp_path, include=name))

    def test_a_circle(self, tmp_path: Path) -> None:
        write(tmp_path, "a.yaml", include="b.yaml")
        path = write(tmp_path, "b.yaml", include="a.yaml")
        with pytest.raises(ConfigError, match=r"includes itself.*b.yaml -> a.yaml -> b.yaml"):
            load_task(path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"nothing.yaml: No such file"):
            load_task(write(tmp_path, include="nothing.yaml"))


class TestMistakes:
    def test_names(self) -> None:
        with pytest.raises(ConfigError, match=r"'glue/sst3'.*did you mean 'glue/sst2'\?"):
            load_task("glue/sst3")
        for name in ("_arc", "orders", "../tasks/gsm8k", "glue/_base", ""):
            with pytest.raises(ConfigError, match="unknown task"):
                load_task(name)
        with pytest.raises(ConfigError, match=r"no.yaml: No such file"):
            load_task("no.yaml")

    @pytest.mark.parametrize(("change", "said"), [
        ({"promt": "x"}, "did you mean 'prompt'"),
        ({"hub": {"splits": {"evl": "x"}}}, "did you mean 'eval'"),
        ({"kind": "chioce"}, "did you mean 'choice'"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"metric": "pearson"}, "'pearson' is not"),
        ({"options": [False, True]}, "quotation marks"),
        ({"options": []}, "options for kind 'choice'"),
        ({"options": ["one"]}, "two or more different"),
        ({"options": ["a", "a"]}, "two or more different"),
        ({"options": [" a", "b"]}, "without spaces"),
        ({"options": "choices.["}, "a template that compiles"),
        ({"prompt": "{{text"}, "a template that compiles"),
        ({"answer": "gold |"}, "a template that compiles"),
        ({"pattern": "("}, "a template that compiles"),
        ({"pattern": "a{99999999999}"}, "larger counts"),
        ({"prompt": "{% include 'x' %}"}, "Include is not taken"),
        ({"options": [str(n) for n in range(1001)]}, "at most 1000 options"),
        ({"kind": "generate", "metric": "exact_match"}, "options for kind 'choice'"),
        ({"texts": ["a", "b", "c"]}, "at most two texts"), ({"max_length": 3}, "max_length"),
    ])  # fmt: skip
    def test_values(self, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match="task mine: ") as error:
            load_task(write(tmp_path, **(MINE | change)))
        assert said in str(error.value) and "\n" not in str(error.value)

    def test_missing_keys(self, tmp_path: Path) -> None:
        fields = {k: v for k, v in MINE.items() if k != "prompt"}
        with pytest.raises(ConfigError, match=r"prompt is missing.*mine.yaml"):
            load_task(write(tmp_path, **fields))

    @pytest.mark.parametrize("text", ["[1]", "a: b: c", "", "\x00"])
    def test_no_mapping(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="a task file"):
            load_task(path)

    @pytest.mark.parametrize(("row", "said"), [
        ({"label": 0}, "'text' is undefined"), ({"text": "a"}, "no field 'label'"),
        ({"text": "a", "label": 2}, "the answer is 2, of 2 options"),
        ({"text": "a", "label": -2}, "the answer is -2"),
        ({"text": "a", "label": 0.7}, "the answer is 0.7, of 2 options"),
        ({"text": "a", "label": "good"}, "'good'"),
    ])  # fmt: skip
    def test_rows_that_do_not_fit(self, tmp_path: Path, row: dict[str, Any], said: str) -> None:
        with pytest.raises(SourceError, match="row 8 does not fit task mine") as error:
            load_task(write(tmp_path, **MINE)).render(row, 7)
        assert said in str(error.value)
        assert ("write the label as one of the options" in str(error.value)) == ("answer" in said)

    def test_a_whole_number_with_a_point_is_one(self, tmp_path: Path) -> None:
        assert load_task(write(tmp_path, **MINE)).solution({"text": "a", "label": 1.0}) == 1

    def test_templates_run_no_code(self, tmp_path: Path) -> None:
        prompt = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        with pytest.raises(SourceError, match="unsafe"):
            load_task(write(tmp_path, **(MINE | {"prompt": prompt}))).render(
                {"text": "a", "label": 0}
            )
