"""Templates and patterns that others wrote: what they may say, and that they come to an end."""

from __future__ import annotations

import re
import time
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from retain.data.patterns import PatternError, compile_pattern, first_match, replace_all
from retain.data.specs import TaskSpec
from retain.data.templates import expression, template
from retain.errors import ConfigError, SourceError
from retain.evaluation.score import _extract

ROW: dict[str, Any] = {
    "text": "Hello\tworld, aaaa", "n": 3, "f": 2.5, "l": ["a", "b", "c"],
    "d": {"a": 1, "b": [1, 2]}, "rows": [{"k": "x", "v": 1}, {"k": "y", "v": 2}],
    "ab": "a" * 40 + "b",
}  # fmt: skip


def grows(by: str, times: int = 60, start: str = "'a'") -> str:
    """A template that grows a value again and again."""
    return (
        f"{{% set ns = namespace(s={start}) %}}{{% for i in range({times}) %}}"
        f"{{% set ns.s = {by} %}}{{% endfor %}}{{{{ ns.s }}}}"
    )


LARGE = [
    "{{ 'a' * 10**10 }}", "{{ 10**10 * 'a' }}", "{{ [1] * 10**9 }}", "{{ (text,) * 10**9 }}",
    "{{ 'a' * 1000 * 1000 * 1000 }}", "{{ 10 ** (10 ** 10) }}", "{{ 2 ** 100000 }}",
    "{{ (10 ** 500) ** 500 }}", "{{ '%999999999d' % 1 }}", "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' % 1.0 }}", "{{ '%0999999999d' % 1 }}", "{{ '%9999999s'|format('a') }}",
    "{{ '{:>999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{0:.999999999f}'.format(1.0) }}", "{{ '{:>9999999}'.format_map({}) }}",
    "{{ text|center(10**9) }}", "{{ text|center(1000000000) }}", "{{ text.center(10**9) }}",
    "{{ text.ljust(999999999) }}", "{{ text.rjust(999999999) }}", "{{ text.zfill(999999999) }}",
    "{{ text.expandtabs(10**9) }}", "{{ text|indent(10**9) }}", "{{ ('\\n' * 9999)|indent(9999) }}",
    "{{ text|wordwrap(1, wrapstring='a' * 900000) }}", "{{ text|batch(10**9, 'x')|list }}",
    "{{ text|batch(9999, 'x' * 9999)|list }}", "{{ text|slice(10**9)|list }}",
    "{{ l|tojson(indent=10**9) }}", "{{ 1|round(10**9) }}", "{{ (5).to_bytes(10**9, 'big') }}",
    "{{ text.translate({97: 'x' * 10**6}) }}", "{{ text.encode() }}", "{{ lipsum(n=10**6) }}",
    "{{ range(10**9)|list }}", "{{ range(99999)|list|string }}",
    "{{ dict.fromkeys(range(99999)) }}", "{{ range(99999)|map('string')|join('x' * 20000) }}",
    "{{ ('x' * 99999).join(text * 99) }}", "{{ ([1] * 99999)|map('center', 9999)|join }}",
    "{{ ([[1] * 999] * 999)|sum(start=[]) }}", "{{ text|replace('', 'x' * 999999) }}",
    "{{ text.replace('', 'x' * 999999) }}",
    "{{ text|sub('', 'x' * 2000)|sub('', 'x' * 2000)|sub('', 'x' * 2000) }}",
    "{{ text|sub('(.*)', '\\\\1' * 600)|sub('(.*)', '\\\\1' * 600)|sub('(.*)', '\\\\1' * 600) }}",
    grows("ns.s ~ ns.s"), grows("ns.s + ns.s"), grows("ns.s * 2"), grows("[ns.s, ns.s]"),
    grows("(ns.s, ns.s)"), grows("dict(a=ns.s, b=ns.s)"), grows("{'a': ns.s, 'b': ns.s}"),
    grows("ns.s|replace('a', 'aaaaaaaa')"), grows("ns.s.replace('a', 'aaaaaaaa')"),
    grows("[ns.s, ns.s]|join(ns.s)"), grows("ns.s.join([ns.s, ns.s])"),
    grows("'%s%s' % (ns.s, ns.s)"), grows("'%s%s'|format(ns.s, ns.s)"),
    grows("'{0}{0}'.format(ns.s)"), grows("ns.s|sub('a', 'aaa')"),
    grows("ns.s|escape|string|urlencode|urlencode ~ '<'", 9999), grows("ns.s + [ns.s]", 60, "[1]"),
    grows("(ns.s|tojson|tojson)", 60, "'\"'"), grows("ns.s ** 2", 60, "3"),
    grows("ns.s * ns.s", 60, "9"),
]  # fmt: skip
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "{% for i in range(9999) %}{{ (text * 9999)|upper|length }}{% endfor %}",
    "{{ ab|sub('(a|aa)+$', 'x') }}", "{{ ('a ' * 20000)|sub('(.*)(.*)(.*)(.*)(.*)[^a ]', '') }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for x in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
]  # fmt: skip
REFUSED = [
    "{% include '/etc/passwd' %}", "{% import 'x' as y %}", "{% extends 'x' %}",
    "{% from 'x' import y %}", "{% block a %}{% endblock %}", "{% set x %}{{ text }}{% endset %}",
    "{% filter upper %}a{% endfilter %}", "{% call f() %}{% endcall %}", "{{ text.__class__ }}",
    "{{ text['__class__'] }}", "{{ text|attr('__class__') }}", "{{ range.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}", "{{ text.strip.__self__.__class__ }}",
    "{{ l.append(1) }}", "{{ d.update(a=2) }}", "{{ text|random }}", "{{ missing }}",
    "{{ text.x }}", "{{ 1 / 0 }}", "{{ text|int(base=99) + 'a' }}", "{{ 'a'|sub('(', '') }}",
    "{{ 'a'|sub('a', '\\\\9') }}", "{{ 'a'|sub('a{99999999999}', '') }}",
    "{{ 'a'|sub('((a{1000}){1000}){1000}', '') }}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ " + "-" * 5000 + "1 }}", "{{ " + "[" * 500 + "]" * 500 + " }}",
    "{{ a" + ".b" * 4000 + " }}", "{{ 1" + "+1" * 4000 + " }}",
    "{% if 1 %}" * 150 + "{% endif %}" * 150, "{% for i in l %}" * 40 + "{% endfor %}" * 40,
    "{{ 1 }}" * 6000, "{{ " + "9" * 5000 + " }}", "{{ a }}" + "x" * 100_001, "{{", "{% if %}",
]  # fmt: skip


def outcome(text: str) -> str:
    return template(text)(ROW)


@pytest.mark.parametrize("text", LARGE + ENDLESS + REFUSED)
def test_what_goes_beyond_bounds_is_refused_soon_and_small(text: str) -> None:
    tracemalloc.start()
    begin = time.monotonic()
    try:
        with pytest.raises(TemplateError):
            outcome(text)
        assert time.monotonic() - begin < 5
        assert tracemalloc.get_traced_memory()[1] < 1 << 28
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text", [t[2:-2] for t in LARGE + REFUSED if t.count("{{") == 1 and t[:2] + t[-2:] == "{{}}"]
)
def test_so_are_expressions(text: str) -> None:
    with pytest.raises(TemplateError):
        expression(text)(ROW)


SOUND = [
    "", "plain\n", "a\r\nb", "{{ text }}", "{{ n }} {{ f }} {{ l[0] }} {{ d|length }}",
    "{{ text|upper }}",
    "{{ text.lower().split(',')[0]|trim }}", "{{ l|join(', ') }}", "{{ ', '.join(l) }}",
    "{% for x in l %}{{ loop.index }}/{{ loop.length }}. {{ x }}{% if not loop.last %}\n{% endif %}"
    "{% else %}none{% endfor %}", "{% for k, v in d.items() %}{{ k }}={{ v|string }};{% endfor %}",
    "{% for r in rows if r.v > 1 %}{{ r['k'] }}{% endfor %}", "{{ rows|map(attribute='k')|join }}",
    "{{ rows|selectattr('v', 'gt', 1)|list|length }}", "{% set a = text ~ '!' ~ n %}{{ a }}",
    "{% with a = 1 %}{{ a + n }}{% endwith %}", "{{ 'yes' if n > 2 and not f else 'no' }}",
    "{{ 'x' * n }}{{ (l + [n])|join }}{{ n ** 2 }}{{ n % 2 }}{{ '%05.1f %s' % (f, text) }}",
    "{{ '{:>8.2f}|{}'.format(f, text) }}", "{{ text|replace('a', 'bb', 2)|truncate(9) }}",
    "{{ text|center(30) }}{{ text.ljust(30) }}{{ '7'.zfill(3) }}", "{{ text[1:-1][::-1] }}",
    "{{ d.get('a') }}{{ d.get('z', 0) }}{{ l.index('b') }}{{ 'b' in l }}", "{{ d|tojson }}",
    "{{ text|wordwrap(5) }}{{ text|indent(2, true) }}{{ text|capitalize }}{{ text|title }}",
    "{{ l|batch(2, '-')|map('join')|join('/') }}{{ l|slice(2)|map('join')|join('/') }}",
    "{{ [3, 1, 2]|sort|first }}",
    "{{ rows|groupby('v')|map(attribute='grouper')|join('-') }}{{ [1, 2.5]|sum }}",
    "{{ l|reverse|join }}",
    "{{ text is defined and missing is not defined }}{{ missing|default('none') }}",
    "{% set s = namespace(t=0) %}{% for r in rows %}{% set s.t = s.t + r.v %}{% endfor %}{{ s.t }}",
    "{{ dict(a=1)|dictsort|first|join }}{{ range(5)|join }}{{ ','.join(l|map('upper')) }}",
    "{% for x in l %}{{ loop.cycle('odd', 'even') }}{% endfor %}{{ (1, 2)|join }}",
    "{{ {'a': n}|length }}",
    "{{ text|sub('[aeiou]', '*')|sub('(l+)', '<\\\\1>') }}",
    "{{ '1e3'|float|int }}{{ 2.567|round(1) }}",
    "{% raw %}{{ x }}{% endraw %}{# a comment #}", "{{ text|striptags }}{{ '<'|e }}{{ l|last }}",
]  # fmt: skip


@pytest.mark.parametrize("text", SOUND)
def test_what_fills_a_text_from_a_row_is_jinjas(text: str) -> None:
    plain = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    plain.filters["sub"] = lambda value, pattern, by: re.sub(pattern, by, str(value))
    assert template(text)(ROW) == plain.from_string(text).render(ROW)


@pytest.mark.parametrize(
    "text",
    ["{{ v }}", "a {{ v or 1 }}", "{% for x in [v] %}{{ x }}{% endfor %}", "{{ [v]|first }}"],
)
@pytest.mark.parametrize("value", [["a", "b"], ("a",), {"a": 1}, [], {}], ids=str)
def test_a_list_or_an_object_is_not_written_as_python_shows_it(text: str, value: Any) -> None:
    if not value and " or " in text:
        assert template(text)({"v": value}) == "a 1"
        return
    with pytest.raises(TemplateError, match=rf"a {type(value).__name__} is written as text.*join"):
        template(text)({"v": value})


def test_a_generator_is_not_written_either() -> None:
    with pytest.raises(TemplateError, match="written as text"):
        template("{{ v|map('upper') }}")({"v": ["a"]})
    assert template("{{ v|map('upper')|join('+') }}")({"v": ["a", "b"]}) == "A+B"


def test_a_long_row_may_have_a_long_text() -> None:
    row = {"text": "word " * 400_000, "l": ["a b"] * 20_000}
    assert len(template("{{ text|replace('word', 'other') }}{{ l|join(', ') }}")(row)) == 2_499_998
    assert template("{% for x in l %}{{ x }}{% endfor %}")(row) == "a b" * 20_000
    assert len(template("{{ text|sub('w(o)', '\\\\1') }}")(row)) == 1_600_000


def test_an_expression_may_give_a_list() -> None:
    assert expression("rows|map(attribute='k')")(ROW) == ["x", "y"]
    assert expression("[l, l]")(ROW) == [["a", "b", "c"]] * 2
    with pytest.raises(TemplateError, match="too much"):
        expression("range(99999)|map('string')")(ROW)


PATTERNS = st.one_of(
    st.text("ab.*+?()|[]^$\\dw{}1,2 ", max_size=8),
    st.sampled_from(["", "a*", "x?", r"\b", "(a)|(b)", "^", "$", "(?i)A", r"(?P<n>a+)b", "[^a]+"]),
)


@settings(max_examples=500, deadline=None)
@given(PATTERNS, st.text("aAb1 .\n", max_size=12), st.sampled_from(["", "x", r"<\g<0>>", "\\\\"]))
def test_patterns_are_pythons(pattern: str, text: str, by: str) -> None:
    try:
        compile_pattern(pattern)
    except PatternError:
        return
    assert replace_all(pattern, by, text, 10**6) == re.sub(pattern, by, text)
    found, want = first_match(pattern, text), re.search(pattern, text)
    assert (found and (found.span(), found.groups())) == (want and (want.span(), want.groups()))


@pytest.mark.parametrize("pattern", [
    "(", "a{99999999999}", "((a{1000}){1000}){1000}", "(a{0,999}){0,999}", "[z-a]", "*",
    "(?P<a>x)(?P<a>y)", "(?<=a+)b", "(" * 400 + ")" * 400, "x" * 3000, r"\p{L}", "(?R)",
    "a{e<=1}", "[[:alpha:]]", "a{3,2}", r"\g", "(?V1)a",
])  # fmt: skip
def test_patterns_that_are_not_taken(pattern: str) -> None:
    with pytest.raises(PatternError) as error:
        compile_pattern(pattern)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    ["(a|aa)+$", "(a+)+b$", "(a+)+$", "(a*)*c", "(a|a)*c", "(.*a){30}c", "(a|a?)+c", "(a+a+)+c"],
)
def test_a_pattern_comes_to_an_end(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retain.data.patterns.SECONDS", 0.2)
    for text in (ROW["ab"], "a" * 40, "a" * 5000 + "!"):
        begin = time.monotonic()
        with suppress(ConfigError):
            assert _extract(text, pattern) in (None, text, "a" * 40, "a")
        assert time.monotonic() - begin < 5


def test_a_pattern_that_takes_too_long_is_named() -> None:
    with pytest.raises(ConfigError, match="takes too long"):
        _extract(ROW["ab"], "(a|aa)+$")


def test_a_row_of_a_hostile_task_is_refused() -> None:
    spec = TaskSpec(
        name="mine", description="d", kind="choice", prompt="{{ 'a' * 10**10 }}", options=("a", "b")
    )
    with pytest.raises(SourceError, match="row 4 does not fit task mine; got: the template makes"):
        spec.render({"label": 0}, 3)


# --- null fields are never written as a text

NULLS: dict[str, Any] = {
    "text": None,
    "deep": {"inner": {"text": None}, "list": ["a", None], "rows": [{"text": None}]},
    "sound": "so",
}


@pytest.mark.parametrize("text", [
    "{{text}}", "a {{ text }} b", "{{ text|trim }}", "{{ text|upper }}",
    "{{ text|replace('a', 'b') }}", "{{ text|sub('a', 'b') }}", "{{ text|string }}",
    "{{ sound ~ text }}", "{{ '%s' % text }}", "{{ text.strip() }}",
    "{{ text if text is none else sound }}", "{{ deep.inner.text }}",
    "{{ deep['inner']['text'] }}", "{{ deep.list[1] }}", "{{ deep.list|string }}",
    "{{ deep.list|join(', ') }}", "{% for word in deep.list %}{{ word }}{% endfor %}",
    "{% for row in deep.rows %}{{ row.text }}{% endfor %}", "{% set copy = text %}{{ copy }}",
    "{% for word in text %}{{ word }}{% endfor %}", "{{ text|length }}",
])  # fmt: skip
def test_null_is_an_error_where_it_is_written(text: str) -> None:
    with pytest.raises(TemplateError, match="is null"):
        template(text)(NULLS)


@pytest.mark.parametrize(("text", "want"), [
    ("{{ text or sound }}", "so"), ("{{ text|default('x') }}", "x"),
    ("{% if text is none %}nothing{% endif %}", "nothing"),
    ("{% if text == none %}nothing{% endif %}", "nothing"),
    ("{% if text is not none %}{{ text }}{% endif %}", ""),
    ("{% if text %}{{ text }}{% else %}-{% endif %}", "-"),
    ("{{ deep.list|select|join }}", "a"), ("{{ sound }}", "so"),
])  # fmt: skip
def test_null_can_be_asked_for(text: str, want: str) -> None:
    assert template(text)(NULLS) == want


def test_an_expression_is_no_null() -> None:
    with pytest.raises(TemplateError, match=r"'deep.inner.text' is null"):
        expression("deep.inner.text")(NULLS)
    assert expression("sound")(NULLS) == "so"
