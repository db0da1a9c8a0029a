"""A jinja environment that cannot reach outside, and whose renderings end.

A rendering runs on the caller's thread, which nothing can kill, so it must end by itself.  What can
repeat in jinja are loops, macros, and the native code behind operators, filters and methods.  The
first two count a step each time round, put there when the template is compiled; the others are
refused what would make too much, pay for what they make, or are left out.  So a single step takes
little, and a rendering ends soon after its deadline.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_round, do_trim, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from isthmus.text.render_budget import CONTAINERS, RenderBudget, RenderLimits

_METHODS: Final[dict[type, frozenset[str]]] = {
    str: frozenset(
        [
            "strip",
            "lstrip",
            "rstrip",
            "split",
            "rsplit",
            "splitlines",
            "partition",
            "rpartition",
            "startswith",
            "endswith",
            "upper",
            "lower",
            "title",
            "capitalize",
            "casefold",
            "swapcase",
            "removeprefix",
            "removesuffix",
            "find",
            "rfind",
            "index",
            "rindex",
            "count",
            "replace",
            "join",
            "format",
            "format_map",
            "isdigit",
            "isalpha",
            "isalnum",
            "isspace",
            "isupper",
            "islower",
            "isnumeric",
            "isdecimal",
            "istitle",
            "isascii",
            "isidentifier",
            "isprintable",
        ]
    ),
    dict: frozenset(["items", "keys", "values", "get", "copy"]),
    list: frozenset(["index", "count", "copy"]),
    tuple: frozenset(["index", "count"]),
    int: frozenset(),
    float: frozenset(("is_integer",)),
    bytes: frozenset(),
}
"""What templates may call on plain values: no method whose result can outgrow what it is given."""

_BACKWARD: Final = frozenset(["rsplit", "rpartition", "rfind", "rindex", "strip", "lstrip", "rstrip"])
"""Methods that may look at each character of both strings together, length times length."""

_FILTERS_LEFT_OUT: Final = frozenset(
    [
        "batch",
        "center",
        "filesizeformat",
        "pprint",
        "random",
        "slice",
        "striptags",
        "urlize",
        "wordcount",
        "wordwrap",
        "xmlattr",
    ]
)
_MAX_WIDTH: Final = 64
_MAX_BITS: Final = 4096
_WIDE_FORMAT: Final = re.compile(r"\d{4,}|\*|\{[^{}]*\{")


class _Generation(Extension):
    """``{% generation %}`` marks an assistant's text for training; here its body alone counts."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Meter(NodeTransformer):
    """Makes loops and macros count steps, and whatever builds text or lists pay for it."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._count_body(node)
        if node.test is not None:
            node.test = nodes.And(nodes.Not(_call("step")), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self._count_body(node)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        self._count_body(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("join_values", nodes.Tuple(node.nodes, "load"))

    def visit_List(self, node: nodes.List) -> nodes.Call:
        self.generic_visit(node)
        return _call("pay", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Call:
        self.generic_visit(node)
        return _call("pay", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx == "store" else _call("pay", node)

    def _count_body(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> None:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step"), lineno=node.lineno))


def _call(method: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template.  Threads may render at the same time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self._running = threading.local()
        self.concat = self._join  # type: ignore[method-assign]
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        bounded: dict[str, Callable[..., Any]] = {
            "tojson": _to_json,
            "replace": self._replace,
            "join": self._join_items,
            "format": _format,
            "indent": self._indent,
            "round": _round,
            "sum": self._sum,
            "trim": self._trim,
        }
        kept = {name: filter_ for name, filter_ in self.filters.items() if name not in _FILTERS_LEFT_OUT}
        self.filters = {name: self._metered(filter_) for name, filter_ in (kept | bounded).items()}
        self.tests = {name: self._metered(test) for name, test in self.tests.items()}

    @contextmanager
    def within(self, limits: RenderLimits) -> Iterator[None]:
        """Compile or render inside this; it opens the account that steps are counted on, for this thread."""
        self._running.budget = RenderBudget(limits)
        try:
            yield
        finally:
            del self._running.budget

    @property
    def budget(self) -> RenderBudget:
        budget: RenderBudget = self._running.budget
        return budget

    def step(self) -> None:
        self.budget.step()

    def pay(self, value: Any) -> Any:
        self.budget.pay(value)
        return value

    def join_values(self, values: Iterable[Any]) -> str:
        """The ``~`` operator."""
        return self._join(map(str, values))

    def _join(self, pieces: Iterable[str]) -> str:
        kept: list[str] = []
        size = 0
        budget = self.budget
        for piece in pieces:
            size += len(piece)
            budget.expect(size)
            kept.append(piece)
        text = "".join(kept)
        budget.pay(text)
        return text

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Meter().visit(source), name, filename, defer_init)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    # The parent's parameters have two underscores, so that no keyword argument of a template meets them.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if owner is __self:  # what the compiler put there
            return __obj(*args)
        if isinstance(owner, str):
            return __self._call_method(owner, __context, __obj, args, kwargs)
        return __self.pay(super().call(__context, __obj, *args, **kwargs))

    def _call_method(
        self, owner: str, context: Context, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = method.__name__
        if name == "join" and len(args) == 1:
            return self._join_items(args[0], owner)
        if name == "replace" and len(args) >= 2:
            self.budget.expect(_replaced_size(owner, *args[:2]))
        if name in _BACKWARD:
            for argument in (*args, *kwargs.values()):
                self._expect_product(owner, argument)
        return self.pay(super().call(context, method, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sized: tuple[type[Collection[Any]], ...] = (str, bytes, *CONTAINERS)
        if operator == "%" and isinstance(left, str | bytes):
            _check_format(left)
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, sized) and isinstance(other, int):
                    self.budget.expect(len(one) * other)
            _check_bits(_bits(left) + _bits(right))
        elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            self.budget.expect(len(left) + len(right))
        elif operator == "**":
            _check_bits(_bits(left) * abs(right) if isinstance(right, int) else 0)
        return self.pay(super().call_binop(context, operator, left, right))

    def _expect_product(self, text: str, argument: Any) -> None:
        if isinstance(argument, str) and len(argument) > 1:
            self.budget.expect(len(text) * len(argument) // 32)

    def _metered(self, function: Any) -> Callable[..., Any]:
        """A filter or test that pays for what it makes."""

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            return self.pay(function(*args, **kwargs))

        return metered

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        text = str(value)
        self.budget.expect(_replaced_size(text, old, new))
        return text.replace(old, new, count)

    def _join_items(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = map(make_attrgetter(self, attribute), value) if attribute is not None else value
        texts = [str(item) for item in items]
        self.budget.expect(sum(map(len, texts)) + len(d) * len(texts))
        return d.join(texts)

    def _indent(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        size = width if isinstance(width, int) else len(width)
        _check_width(size)
        self.budget.expect(len(s) + (s.count("\n") + 1) * size)
        return do_indent(s, width, first, blank)

    def _sum(self, iterable: Iterable[Any], attribute: str | int | None = None, start: float = 0) -> Any:
        items = map(make_attrgetter(self, attribute), iterable) if attribute is not None else iterable
        total = start
        for item in items:
            if not isinstance(item, int | float):
                raise jinja2.TemplateError("the sum filter adds numbers only")
            total += item
        return total

    def _trim(self, value: Any, chars: str | None = None) -> str:
        text = str(value)
        self._expect_product(text, chars)
        return do_trim(text, chars)


class _Namespace(Namespace):
    """Jinja's, written out without what it holds, which may be itself."""

    def __repr__(self) -> str:
        return "<namespace>"


def _replaced_size(text: str, old: Any, new: Any) -> int:
    if not isinstance(old, str) or not isinstance(new, str):
        return 0
    return len(text) + text.count(old) * max(len(new) - len(old), 0)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise SecurityError(f"it computes a number of about {bits} bits; at most {_MAX_BITS} are allowed")


def _check_width(width: int) -> None:
    if abs(width) > _MAX_WIDTH:
        raise SecurityError(f"it asks for a width of {width}; at most {_MAX_WIDTH} is allowed")


def _check_format(template: str | bytes) -> None:
    text = template if isinstance(template, str) else template.decode("latin-1")
    if _WIDE_FORMAT.search(text):
        raise SecurityError("it formats with a width of four digits or more, or with one that is computed")


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _check_format(value)
    return str(value) % (kwargs or args)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    _check_width(precision)
    return do_round(value, precision, method)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does it for chat templates: characters as they are, nothing escaped for HTML."""
    _check_width(indent or 0)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    if len(layout) > 128 or re.search(r"%[^a-zA-Z%]?\d", layout):
        raise SecurityError("strftime_now takes a format of at most 128 characters, without widths")
    return datetime.now().strftime(layout)
