"""From YAML to runs: what is refused, what is expanded, and what a key depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from retain.errors import ConfigError, RetainError
from retain.models.load import is_decoder
from retain.records import digest_of
from retain.retention import registry
from retain.retention.registry import METHODS
from retain.study.grid import Grid, expand
from retain.study.spec import parse_study, read_study
from study_parts import PRETENDED, TASK, A, B

CLAIM = {"claim": "it forgets less", "metric": "kl", "method": "held 10", "bound": 0.5}


def grid(**changes: Any) -> Grid:
    return expand(parse_study(PRETENDED | changes), Path())


def test_all_with_all_but_what_a_method_refuses() -> None:
    found = grid()
    titles = [run.title for run in found.runs]
    assert len(titles) == len(set(titles)) == 2 * 2 * (3 + 1)
    assert titles[:4] == [
        "smollm2-135m lora none ab seed 0",
        "smollm2-135m lora held 1 ab seed 0",
        "smollm2-135m lora held 10 ab seed 0",
        "smollm2-135m prefix none ab seed 0",
    ]
    assert [t[-1] for t in titles] == ["0"] * 8 + ["1"] * 8  # one seed of all first
    (skipped,) = found.skipped
    assert (skipped["adapter"], skipped["method"]) == ("prefix", "held")
    assert "the method l2 does not compose with this adapter: " in skipped["reason"]


def several(methods: dict[str, Any]) -> Grid:
    """A decoder, an encoder and a model that is not here."""
    study = {k: v for k, v in PRETENDED.items() if k not in ("model", "training")}
    study |= {"models": ["smollm2-135m", "minilm-22m", "nobody/has-this"], "adapters": {"lora": {}}}
    return expand(parse_study(study | {"orders": {"a": [A]}, "methods": methods}), Path())


def test_a_default_that_no_record_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(METHODS["none"]):  # type: ignore[misc]
        name = "own"

        def __init__(self, *, dtype: Any = torch.float32) -> None:
            super().__init__()

    monkeypatch.setattr(registry, "METHODS", METHODS | {"own": Own})
    with pytest.raises(ConfigError, match=r"a record; got: dtype=torch\.float32 of .* own"):
        grid(methods={"own": {}})
    assert grid(methods={"own": {"dtype": "float32"}}).runs  # as a name it can be written


def test_what_wants_a_decoder_is_left_out_on_an_encoder() -> None:
    """It would fail once it has begun, after the model was loaded and scored."""
    found = several({"none": None, "self_replay": None})
    held = {r.model for r in found.runs if r.method.kind == "self_replay"}
    plain = {r.model for r in found.runs if r.method.kind == "none"}
    assert held == {"smollm2-135m", "nobody/has-this"}
    assert plain == {"smollm2-135m", "minilm-22m", "nobody/has-this"}
    (skipped,) = found.skipped
    assert (skipped["adapter"], skipped["method"]) == ("lora", "self_replay")
    assert "cannot write text; minilm-22m is an encoder" in skipped["reason"]


def test_a_decoder_is_known_by_its_configuration(tmp_path: Path) -> None:
    for name, wanted in {"bert": ["BertModel"], "gpt": ["GPT2LMHeadModel"], "none": None}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": wanted}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    names = ["bert", "gpt", "none", "empty", "broken"]
    assert [is_decoder(str(tmp_path / name)) for name in names] == [False, True, *[None] * 3]
    assert is_decoder("smollm2-135m") is is_decoder("some/where.gguf") is True
    assert is_decoder("nobody/has-this") is is_decoder("no:such name/of a/model") is None


def test_how_a_classifiers_outputs_begin() -> None:
    """Fitted where the study or the method says so, and nothing of it is said of a decoder."""
    found = several({"none": None, "fitted": {"kind": "none", "head": "fitted"}, "auto": {}}).runs
    fitted = {(r.model, r.method.name) for r in found if "head" in r.plain()}
    models = ("minilm-22m", "nobody/has-this")
    assert fitted == {(model, method) for model in models for method in ("fitted", "auto")}
    assert {r.head for r in found if "head" in r.plain()} == {"fitted"}
    assert len({r.key for r in found}) == len(found)


@pytest.mark.parametrize(("head", "fitted"), [(None, True), ("fitted", True), ("drawn", False)])
def test_the_recipe_begins_with_a_fitted_head_unless_told(head: str | None, fitted: bool) -> None:
    study = PRETENDED | {"model": "minilm-22m", "orders": {"one": ["glue/sst2"]}, "seeds": [0]}
    study |= {"adapters": {"lora": {"rank": 4}}, "methods": {"auto": {"head": head}}}
    study["training"] = {}
    (run,) = expand(parse_study(study), Path()).runs
    assert ("head" in run.plain()) is fitted


@pytest.mark.parametrize(
    "method", [{"kind": "joint"}, {"kind": "auto", "parts": ["rows", "force"]}, {"kind": "wiener"}]
)
def test_a_head_that_a_method_does_not_fit_is_refused(method: dict[str, Any]) -> None:
    found = several({"none": None, "mine": method}).runs  # as it is drawn
    assert {r.method.name for r in found} == {"none", "mine"}
    with pytest.raises(ConfigError, match=r"the method mine fits no head; got: head: fitted"):
        several({"none": None, "mine": method | {"head": "fitted"}})


def test_the_run_is_whole() -> None:
    run = next(r for r in grid().runs if r.adapter.name == "prefix").plain()
    assert run["adapter"] == {
        "name": "prefix", "kind": "prefix", "num_virtual_tokens": 20, "projection": False,
        "projection_size": None, "init": "tokens", "std": 1.0,
    }  # fmt: skip
    assert run["method"] == {
        "name": "none", "label": "none", "kind": "none", "strength": 0.0, "stores_data": False,
    }  # fmt: skip
    assert run["order"] == {"name": "ab", "tasks": [A, B]}
    assert run["definitions"] == [f"{A}@1", f"{B}@1"]
    assert run["training"]["learning_rate"] == 0.02
    assert run["training"]["tasks"] == {B: {"epochs": 3}}
    assert run["training"]["batch_size"] == 16
    assert "seed" not in run["training"]


def test_cells_name_parts_of_the_grid() -> None:
    found = grid(
        runs=[
            {"adapter": "lora", "method": "held", "order": "ab", "seeds": [0]},
            {"adapter": "lora", "methods": ["held"], "orders": ["ab"], "seeds": [0]},
            {"adapters": ["lora"], "method": "none", "independent": True, "seeds": [1],
             "training": {"learning_rate": 0.5}},
        ]
    )  # fmt: skip
    assert [run.title for run in found.runs] == [
        "smollm2-135m lora held 1 ab seed 0",
        "smollm2-135m lora held 10 ab seed 0",
        f"smollm2-135m lora none {A} seed 1",
        f"smollm2-135m lora none {B} seed 1",
    ]
    alone = found.runs[-1]
    assert (alone.order.name, alone.order.tasks) == (B, [B])
    assert alone.settings(0).learning_rate == 0.5


def test_the_later_setting_wins() -> None:
    found = grid(
        adapters={"lora": {"training": {"epochs": 5}}},
        methods={"none": {"training": {"tasks": {A: {"epochs": 7}}}}},
        training={"epochs": 2, "tasks": {A: {"epochs": 3, "batch_size": 4}}},
    )
    training = found.runs[0].training
    assert training.options["epochs"] == 5
    assert training.tasks == {A: {"epochs": 7, "batch_size": 4}}


def test_keys_are_stable_and_depend_on_everything() -> None:
    assert digest_of({"b": 1, "a": [1.5, "ä"]}) == digest_of({"a": [1.5, "ä"], "b": 1})
    assert digest_of({"a": 1}) == "015abd7f5cc57a2d"  # of {"a":1}: must never change
    first = grid().runs[0]
    assert first.key == grid().runs[0].key == digest_of(first.plain())
    changes: list[dict[str, Any]] = [
        {"dtype": "float64"},
        {"attention": "eager"},
        {"data": {"train": 5}},
        {"training": {"learning_rate": 0.011, "tasks": {B: {"epochs": 3}}}},
        {"training": {"learning_rate": 0.01, "tasks": {B: {"epochs": 4}}}},
        {"adapters": {"lora": {"rank": 5}}},
        {"source": {"kind": "self"}},
    ]
    keys = [grid(**change).runs[0].key for change in changes]
    assert len({first.key, *keys}) == len(changes) + 1


def test_a_source_that_has_no_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.txt").symlink_to("/dev/zero")
    spec = parse_study(PRETENDED | {"source": {"kind": "file", "path": "s.txt"}})
    with pytest.raises(ConfigError, match="no regular file"):
        expand(spec, tmp_path)


def test_a_source_file_counts_by_its_content(tmp_path: Path) -> None:
    spec = parse_study(PRETENDED | {"source": {"kind": "file", "path": "s.txt"}})
    keys = []
    for text in ("one", "two"):
        (tmp_path / "s.txt").write_text(text)
        keys.append(expand(spec, tmp_path).runs[0].key)
    assert keys[0] != keys[1]
    (tmp_path / "s.txt").unlink()
    with pytest.raises(ConfigError, match=r"cannot be read; got: .*s\.txt"):
        expand(spec, tmp_path)


def test_published_orders_and_patterns() -> None:
    found = grid(orders={"ab": [A, B], "long": "published/order3"}, training={})
    long = [f"cl15/{name}" for name in ("yahoo", "amazon", "agnews", "dbpedia")]
    assert [r.order.tasks for r in found.matching("none long*seed 1")] == [long] * 2
    with pytest.raises(ConfigError, match=r"no run matches; got: 'nome'"):
        found.matching("nome")


def test_a_pattern_takes_brackets_as_they_are() -> None:
    found = grid(adapters={"lora [r=2]": {"kind": "lora", "rank": 2}})
    assert len(found.matching("lora [r=2] none*seed 0")) == 2
    with pytest.raises(ConfigError, match="no run matches"):
        found.matching("lora [rx]r=2")


def test_a_seed_draws_an_order() -> None:
    tasks = [f"cl15/{name}" for name in ("yahoo", "amazon", "agnews", "dbpedia", "imdb", "yelp")]
    runs = grid(orders={"six": {"drawn": tasks}}, training={}, seeds=[0, 1]).matching("none six")
    drawn = {run.seed: run.order.tasks for run in runs}
    assert sorted(drawn[0]) == sorted(drawn[1]) == sorted(tasks) and drawn[0] != drawn[1]
    assert all(run.order.tasks == drawn[run.seed] for run in runs)


def test_the_split_that_is_scored_is_in_the_key() -> None:
    keys = [grid(evaluation={"split": s}).runs[0].key for s in ("test", "validation")]
    assert keys[0] == grid().runs[0].key != keys[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"orders": {"x": {"drawn": [A, A]}}}, "order x must have tasks, each once"),
        ({"adaptors": {}}, "unknown key; got: 'adaptors'.*did you mean 'adapters'"),
        ({"runs": [{"adapter": "lroa"}]}, "unknown adapter; got: 'lroa'.*did you mean 'lora'"),
        ({"runs": [{"sead": [1]}]}, "unknown key; got: 'sead'.*did you mean 'seeds'"),
        ({"source": {"kind": "slef"}}, "unknown kind; got: 'slef'.*did you mean 'self'"),
        ({"source": {"kind": "file"}}, "a source of kind file with its path"),
        ({"training": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"training": {"seed": 1}}, "seed is no setting.*seeds:"),
        ({"training": {"update": "proximal"}}, "update is no setting.*methods:"),
        ({"training": {"tasks": [1]}}, "training.tasks is no mapping"),
        ({"training": {"tasks": {"z": {}}}}, "unknown task; got: 'z'"),
        ({"training": {"batch_size": 3, "accumulation": 2}}, "do not go together"),
        ({"orders": {"x": [A, A]}}, "order x must have tasks, each once"),
        ({"orders": {"x": ["glue/sst3"]}}, "unknown task; got: 'glue/sst3'"),
        ({"orders": {"x": "published/y"}}, "unknown order"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"methods": {"held": {"strength": -1}}}, "from 0 to 1e"),
        ({"methods": {"held": {"strength": 1e308}}}, "from 0 to 1e"),
        (
            {"methods": {"auto": {"budget": 0.05, "parts": ["rows"]}}},
            "nothing would keep the budget without the force",
        ),
        ({"methods": {}}, "methods"),
        ({"data": {"train": 0}}, "data.train"),
        ({"claims": [CLAIM | {"metric": "kll"}]}, "unknown metric; got: 'kll'.*mean 'kl'"),
        ({"claims": [CLAIM | {"method": "held"}]}, "unknown method of a claim; got: 'held'"),
        ({"claims": [CLAIM | {"reference": "nome"}]}, "of a claim; got: 'nome'.*mean 'none'"),
        ({"name": "a/b"}, "name"),
        ({"name": None}, "name"),
        ({"general": {}}, r"general.tasks is missing.*write general: \{tasks: \.\.\. \}"),
        (
            {"runs": [{"method": "none"}, {"method": "none", "training": {"epochs": 2}}]},
            "two unlike runs of the study have one name; got: smollm2-135m lora none ab seed 0",
        ),
        (  # no two have one seed, and all would be averaged
            {"runs": [{"seeds": [0, 1]}, {"seeds": [2, 3], "training": {"learning_rate": 1.0}}]},
            "lora none ab seed 2, and with other settings seed 0; allowed: the same settings",
        ),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RetainError, match=said) as caught:
        grid(**changes)
    assert "\n" not in str(caught.value)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    """Tables and reports go by the name: one had the scores of the other."""
    task = "name: {}\n" + TASK.format(name="t", first="a", second="b")
    for file in ("x.yaml", "y.yaml"):
        (tmp_path / file).write_text(task.replace("{}", "mine"), encoding="utf-8")
    spec = parse_study(PRETENDED | {"orders": {"xy": ["x.yaml", "y.yaml"]}, "training": {}})
    with pytest.raises(ConfigError, match=r"one name; got: mine, the name of x\.yaml and of y"):
        expand(spec, tmp_path)
    (tmp_path / "y.yaml").write_text(task.replace("{}", "yours"), encoding="utf-8")
    assert expand(spec, tmp_path).runs[0].order.tasks == ["x.yaml", "y.yaml"]


def test_limit_and_seeds_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(PRETENDED | {"data": {"train": 5}, "runs": [{"seeds": [7]}]}))
    spec = read_study(path, limit=9, seeds=[3])
    assert (spec.data.train, spec.data.test, spec.seeds) == (5, 9, [3])
    assert {run.seed for run in expand(spec, tmp_path).runs} == {3}
    assert read_study(path).data.test is None
    path.write_text(path.read_text() + "description: on\n")
    assert read_study(path).description == "on"
    for data in (5, {"train": "all"}):
        path.write_text(yaml.safe_dump(PRETENDED | {"data": data}))
        with pytest.raises(ConfigError, match="the value of data"):
            read_study(path, limit=3)
    path.write_text("- no mapping")
    with pytest.raises(ConfigError, match="the study is no mapping"):
        read_study(path)
    with pytest.raises(ConfigError, match="the study cannot be read"):
        read_study(tmp_path / "nothing.yaml")
