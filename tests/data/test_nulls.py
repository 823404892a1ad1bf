"""A null field is never written as a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from retain.data.loading import load_items
from retain.data.specs import TaskSpec
from retain.data.templates import expression, template
from retain.errors import SourceError

ROW: dict[str, Any] = {
    "text": None,
    "deep": {"inner": {"text": None}, "list": ["a", None], "rows": [{"text": None}]},
    "sound": "so",
}


@pytest.mark.parametrize(
    "text",
    [
        "{{text}}",
        "a {{ text }} b",
        "{{ text|trim }}",
        "{{ text|upper }}",
        "{{ text|replace('a', 'b') }}",
        "{{ text|sub('a', 'b') }}",
        "{{ text|string }}",
        "{{ sound ~ text }}",
        "{{ '%s' % text }}",
        "{{ text.strip() }}",
        "{{ text if text is none else sound }}",
        "{{ deep.inner.text }}",
        "{{ deep['inner']['text'] }}",
        "{{ deep.list[1] }}",
        "{{ deep.list|string }}",
        "{{ deep.list|join(', ') }}",
        "{% for word in deep.list %}{{ word }}{% endfor %}",
        "{% for row in deep.rows %}{{ row.text }}{% endfor %}",
        "{% set copy = text %}{{ copy }}",
    ],
)
def test_it_is_an_error_where_it_is_written(text: str) -> None:
    with pytest.raises(TemplateError, match="is null"):
        template(text)(ROW)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("{{ text or sound }}", "so"),
        ("{{ text|default('x') }}", "x"),
        ("{% if text is none %}nothing{% endif %}", "nothing"),
        ("{% if text == none %}nothing{% endif %}", "nothing"),
        ("{% if text is not none %}{{ text }}{% endif %}", ""),
        ("{% if text %}{{ text }}{% else %}-{% endif %}", "-"),
        ("{{ deep.list|select|join }}", "a"),
        ("{{ sound }}", "so"),
    ],
)
def test_it_can_be_asked_for(text: str, want: str) -> None:
    assert template(text)(ROW) == want


def test_an_expression_is_no_null() -> None:
    with pytest.raises(TemplateError, match=r"'deep.inner.text' is null"):
        expression("deep.inner.text")(ROW)
    assert expression("sound")(ROW) == "so"


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "{{text}}\nTeam:"},
        {"prompt": "{{more.text}}\nTeam:"},
        {"prompt": "Team:", "texts": ["{{text}}"]},
        {"prompt": "Team:", "options": ["{{text}}", "b"]},
        {"prompt": "Team:", "options": "words"},
        {"prompt": "Team:", "group": "text"},
    ],
)
def test_a_task_names_the_line(tmp_path: Path, change: dict[str, Any]) -> None:
    spec = TaskSpec(
        **{
            "name": "mine", "description": "d", "local": "mine", "kind": "choice",
            "options": ["a", "b"], **change,
        }
    )  # fmt: skip
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


@pytest.mark.parametrize(
    "text", ["{% for word in text %}{{ word }}{% endfor %}", "{{ text|length }}"]
)
def test_it_is_no_empty_list(text: str) -> None:
    with pytest.raises(TemplateError, match="is null"):
        template(text)(ROW)
