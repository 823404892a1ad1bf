"""Jinja templates of files that others wrote: no code, and an end within bounds.

Jinja's own sandbox keeps a template from running code. This one also keeps it from taking the
machine's time or memory: it takes the parts of the language that fill a text from a row (no macros,
no imports, no recursion), and `retain.data.metering` bounds what a render may make.

A null field cannot be written, so that no text reads "None"; nor can a list or an object. Beyond
Jinja's filters there is ``sub(pattern, by)``, which is `re.sub`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, NoReturn, TypeGuard

from jinja2 import (
    StrictUndefined,
    TemplateAssertionError,
    TemplateError,
    TemplateRuntimeError,
    Undefined,
    nodes,
    pass_context,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from retain.data.metering import METER, Meter, check_call, check_number, check_widths
from retain.data.patterns import replace_all

__all__ = ["constants", "expression", "template"]

LENGTH, NODES = 100_000, 5_000
"""Characters, and parts in braces, of one template, at most."""


@lru_cache(maxsize=4096)
def template(text: str) -> Callable[[Mapping[str, Any]], str]:
    """A template as a function from a row to a text.

    Raises:
        jinja2.TemplateError: it does not compile, or is not taken; from the function, a field is
            missing or null, or it goes beyond its bounds.
    """
    if "{" not in text and "\r" not in text:
        return lambda fields: text
    with _plain_errors():
        _check_length(text)
        compiled = _JINJA.from_string(text)

    def render(fields: Mapping[str, Any]) -> str:
        parts = []
        with _metering(fields) as meter:
            for part in compiled.generate(_present(fields)):
                meter.charge(len(part))
                parts.append(part)
        return "".join(parts)

    return render


@lru_cache(maxsize=4096)
def expression(text: str) -> Callable[[Mapping[str, Any]], Any]:
    """A Jinja expression, such as ``choices.label.index(answerKey)``, as a function of a row.

    Raises:
        jinja2.TemplateError: as from `template`.
    """
    with _plain_errors():
        _check_length(text)
        compiled = _JINJA.compile_expression(text, undefined_to_none=False)

    def value(fields: Mapping[str, Any]) -> Any:
        with _metering(fields):
            found = compiled(_present(fields))
            if isinstance(found, Undefined):
                str(found)  # raises, and says which field is missing
            return list(found) if isinstance(found, Iterator) else found

    return value


@lru_cache(maxsize=4096)
def constants(text: str) -> frozenset[str]:
    """The numbers, with their sign, and the texts that stand in an expression, as texts."""
    tree = _JINJA.parse(f"{{{{ {text} }}}}")
    found = {f"{n.value:g}" if isinstance(n.value, int | float) else str(n.value)
             for n in tree.find_all(nodes.Const)}  # fmt: skip
    signed = (node.node for node in tree.find_all(nodes.Neg))
    return frozenset(found | {f"-{n.value:g}" for n in signed if _is_number(n)})


def _is_number(node: nodes.Node) -> TypeGuard[nodes.Const]:
    return isinstance(node, nodes.Const) and isinstance(node.value, int | float)


def _check_length(text: str) -> None:
    if len(text) > LENGTH:
        raise TemplateAssertionError(f"more than {LENGTH} characters", 1)


@contextmanager
def _metering(fields: Mapping[str, Any]) -> Iterator[Meter]:
    meter = Meter(fields)
    token = METER.set(meter)
    try:
        with _plain_errors():
            yield meter
    finally:
        METER.reset(token)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Whatever goes wrong in a template is a `jinja2.TemplateError`."""
    try:
        yield
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateRuntimeError(f"{type(error).__name__}: {error}"[:300]) from error


# --- null fields


class _Null(Undefined):
    """What stands for None in a template: false, equal to None, and an error where it is written.

    ``is none``, ``or`` and the filter ``default`` work as with None.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return _is_none(other)

    __hash__ = Undefined.__hash__

    def _fail(self, *_: Any) -> NoReturn:
        self._fail_with_undefined_error()

    # repr is what a list that is written asks of its parts
    __str__ = __repr__ = __iter__ = __len__ = _fail


def _is_none(value: object) -> bool:
    return value is None or isinstance(value, _Null)


def _present(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a row with a `_Null` for each None in them, however deep."""
    return {name: _filled(value, name) for name, value in fields.items()}


def _filled(value: Any, name: str) -> Any:
    if value is None:
        return _Null(hint=f"the field {name!r} is null")
    if isinstance(value, dict):
        return {key: _filled(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(inner, f"{name}[{i}]") for i, inner in enumerate(value))
    return value


# --- the language


class _Bounded(NodeTransformer):
    """Refuses what is not taken, and puts a meter where things are made."""

    taken: ClassVar[tuple[type[nodes.Node], ...]] = (
        nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.NSRef, nodes.Const,
        nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr,
        nodes.Filter, nodes.Test, nodes.Call, nodes.Getattr, nodes.Getitem, nodes.Slice,
        nodes.BinExpr, nodes.UnaryExpr, nodes.Concat, nodes.Compare, nodes.Operand, nodes.If,
        nodes.For, nodes.Assign, nodes.With, nodes.Scope,
    )  # fmt: skip

    def __init__(self) -> None:
        self.count = 0

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.count += 1
        if not isinstance(node, self.taken):
            raise TemplateAssertionError(f"{type(node).__name__} is not taken", node.lineno)
        if self.count > NODES:
            raise TemplateAssertionError(f"more than {NODES} parts", node.lineno)
        found: nodes.Node = super().generic_visit(node, *args, **kwargs)
        return found

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateAssertionError("a recursive loop is not taken", node.lineno)
        self.generic_visit(node)
        node.iter = _through("_each", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("_text", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("_made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _through("_made", node)

    visit_Tuple = visit_Dict = visit_List


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        bounded = _Bounded().visit(source)
        bounded.set_environment(self)
        return super()._generate(bounded, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = METER.get()
        if isinstance(left, int | float) and isinstance(right, int | float):
            check_number(operator, left, right)
        elif operator == "*":
            times, other = (left, right) if isinstance(left, int) else (right, left)
            meter.check(meter.size(other) * times if isinstance(times, int) else 0)
        else:
            if operator == "%":
                check_widths(left)
            meter.check_call("format" if operator == "%" else "add", left, [right])
        return meter.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        args = tuple(list(meter.each(a)) if isinstance(a, Iterator) else a for a in args)
        if not isinstance(__obj, Undefined):
            check_call(meter, __obj, args, kwargs)
        return meter.made(super().call(__context, __obj, *args, **kwargs))


_FILTERS = frozenset([
    "abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e",
    "escape", "first", "float", "forceescape", "format", "groupby", "indent", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string",
    "striptags", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "urlencode",
    "wordcount", "wordwrap",
])  # fmt: skip


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged for what it makes."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @pass_context
    def run(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        if name == "format":
            check_widths(value)
        elif name == "join":
            value = list(meter.each(value))
        elif name == "sum" and any(isinstance(v, list | tuple) for v in (*args, *kwargs.values())):
            raise TemplateRuntimeError("the template adds what are no numbers")
        meter.check_call(name, value, [*args, *kwargs.values()])
        given = {"environment": context.environment, "eval_context": context.eval_ctx}
        first = [given.get(wants, context)] if wants else []
        return meter.made(function(*first, value, *args, **kwargs))

    return run


@pass_context
def _each(context: Any, values: Any) -> Iterator[Any]:
    return METER.get().each(values)


@pass_context
def _made(context: Any, value: Any) -> Any:
    return METER.get().made(value)


@pass_context
def _text(context: Any, values: list[Any]) -> str:
    meter = METER.get()
    meter.check(meter.size(values))
    return str(meter.made("".join(map(str, values))))


def _sub(text: object, pattern: object, by: object) -> str:
    return replace_all(str(pattern), str(by), str(text), METER.get().left)


def _written(value: Any) -> Any:
    """What a template writes; raises for a list or an object: nobody reads Python's brackets."""
    if isinstance(value, list | tuple | dict | Set | Iterator):
        raise TemplateRuntimeError(
            f"a {type(value).__name__} is written as text: name a part of it, or join it "
            "({{ field | join(', ') }})"
        )
    return value


def _environment() -> _Environment:
    made = _Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, optimized=False, cache_size=0,
        finalize=_written,
    )  # fmt: skip
    made.filters = {n: _metered(n, f) for n, f in made.filters.items() if n in _FILTERS}
    made.filters |= {"sub": _metered("sub", _sub), "_each": _each, "_made": _made, "_text": _text}
    made.tests["none"] = _is_none
    made.globals = {"range": safe_range, "dict": dict, "namespace": Namespace}
    return made


_JINJA = _environment()
