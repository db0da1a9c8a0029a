"""Chat templates: what they render, what they may not reach, and that they end."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from isthmus.errors import InvalidRequest
from isthmus.text.template import RESERVED, RenderLimits, render_chat

USER = {"role": "user", "content": "hi"}
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
PARTS = "{% for m in messages %}{% for p in m.content %}({{ p.type }}:{{ p.text }}){% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}({{ p.text }}){% endfor %}{% endif %}{% endfor %}"
)


def render(template: str, *messages: Mapping[str, Any], **values: Any) -> str:
    return render_chat(messages or [USER], template, **values)


def test_plain() -> None:
    assert render(PLAIN, {"role": "system", "content": "é <b>"}, USER) == "[system]é <b>[user]hi[a]"
    assert render(PLAIN, add_generation_prompt=False) == "[user]hi"


def test_blocks_are_trimmed_as_models_expect() -> None:
    template = "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\nend"
    assert render(template) == "hi\nend"


def test_loop_controls_and_generation_marks() -> None:
    template = (
        "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}"
        "{% generation %}{{ i }}{% endgeneration %}{% endfor %}"
    )
    assert render(template) == "012"


def test_special_tokens_and_variables() -> None:
    template = "{{ bos_token }}{{ enable_thinking }}{{ documents is none }}"
    rendered = render(template, special_tokens={"bos_token": "<s>"}, template_kwargs={"enable_thinking": False})
    assert rendered == "<s>FalseTrue"


def test_tojson_is_not_escaped_for_html() -> None:
    tool = {"type": "function", "function": {"name": "é<&>'", "parameters": {"b": 1, "a": [True, None]}}}
    assert render("{{ tools[0].function | tojson }}", tools=[tool]) == (
        '{"name": "é<&>\'", "parameters": {"b": 1, "a": [true, null]}}'
    )
    assert render("{{ {'b': 1} | tojson(indent=2) }}") == '{\n  "b": 1\n}'


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


@pytest.mark.parametrize(
    ("template", "rendered"),
    [(PLAIN, "[user]one\ntwo[a]"), (PARTS, "(text:one)(text:two)"), (EITHER, "(one)(two)")],
    ids=["plain", "parts", "either"],
)
def test_content_in_parts(template: str, rendered: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render(template, {"role": "user", "content": parts}) == rendered


@pytest.mark.parametrize(
    ("template", "rendered"),
    [(PLAIN, "[user]hi[a]"), (PARTS, "(text:hi)"), (EITHER, "hi")],
    ids=["plain", "parts", "either"],
)
def test_content_as_text(template: str, rendered: str) -> None:
    assert render(template) == rendered


def test_a_question_about_something_else_is_not_about_content() -> None:
    template = (
        "{% if messages[0].role is string %}{% endif %}{% for p in messages[0].content %}({{ p.text }}){% endfor %}"
    )
    assert render(template) == "(hi)"


def test_content_handed_to_a_macro() -> None:
    template = (
        "{% macro show(content) %}{% for p in content %}({{ p.text }}){% endfor %}{% endmacro %}"
        "{{ show(messages[0].content) }}"
    )
    assert render(template) == "(hi)"


def test_tool_calls_have_objects_as_arguments() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    template = "{{ messages[0].tool_calls[0].function.arguments.x }}{{ messages[0].content }}"
    assert render(template, message) == "1"
    assert call["function"]["arguments"] == '{"x": 1}'  # the caller's own message is left alone


def test_continue_final_message() -> None:
    answer = {"role": "assistant", "content": "I am  "}
    assert (
        render(PLAIN, USER, answer, add_generation_prompt=False, continue_final_message=True)
        == "[user]hi[assistant]I am  "
    )
    assert render(PARTS, answer, add_generation_prompt=False, continue_final_message=True) == "(text:I am  "
    with pytest.raises(InvalidRequest, match="add_generation_prompt must be false"):
        render(PLAIN, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="leaves out or changes"):
        render("{{ messages[0].content | length }}", add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "0 messages"),
        ("hi", "list of objects"),
        (USER, "list of objects"),
        ([USER] * 16385, "16385 messages"),
        (["hi"], r"messages\[0\] must be an object"),
        ([USER, {"content": "x"}], r"messages\[1\] must be an object with a role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user", "content": 5}], "text or a list of parts, not int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be text"),
        ([{"role": "user", "content": [7]}], "type 'int'"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "object with a function"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "not valid JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "[" * 10**5}}]}], "not valid JSON"),
    ],
)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        render_chat(messages, PLAIN)


def test_the_templates_own_message() -> None:
    with pytest.raises(InvalidRequest, match="conversation roles must alternate"):
        render("{{ raise_exception('conversation roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ x",
        "{% endfor %}",
        "{{ 'a' | nofilter }}",
        "(" * 10**6 + "{{",
        "{{ " + "(" * 5000,
        "x" * (1 << 20) + "y",
    ],
)
def test_templates_that_are_not_valid(template: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        render(template)


@pytest.mark.parametrize(
    "name", ["tokenize", "messages", "chat_template", "add_generation_prompt", "_x", "a b", "", "bos_token"]
)
def test_reserved_variables(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(PLAIN, template_kwargs={name: True})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("value", [object(), {1: 2}, [b"x"], print], ids=repr)
def test_variables_are_plain(value: object) -> None:
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        render(PLAIN, template_kwargs={"x": value})


def test_reserved_names_cover_the_renderers_own() -> None:
    assert {"messages", "tools", "tokenize", "add_generation_prompt", "range", "raise_exception"} <= RESERVED


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages[0].__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__['sys'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ range.__call__.__self__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ '{0.__class__.__mro__}'.format('x') or missing.x }}",
    "{{ '{x.__init__.__globals__}'.format_map({'x': cycler}) or missing.x }}",
    "{% macro m() %}{% endmacro %}{{ m.__func__ or missing.x }}{{ m._func.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.clear() }}",
    "{% set messages[0].role = 'x' %}",
    "{{ environment.from_string('x') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ dict.__init__.__objclass__ }}",
    "{{ (5).to_bytes(10, 'big') }}",
    "{{ loop.__init__ }}{{ missing.x }}",
    "{% for x in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% for x in messages %}{{ loop._LoopContext__x.y }}{{ loop._iterator.gi_frame.f_back }}{% endfor %}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_nothing_outside_is_reached(template: str) -> None:
    messages = [dict(USER)]
    try:
        rendered = render_chat(messages, template)
    except InvalidRequest:
        rendered = ""
    assert rendered in ("", "[Undefined]")
    assert messages == [USER]


BOMBS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "times list": "{{ [1] * 10**10 }}",
    "power": "{{ 9 ** (10 ** 9) }}",
    "power of power": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling text": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "adding text": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested list": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
    ),
    "nested dict": (
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}"
        "{{ ns.x | tojson }}"
    ),
    "nested by call": (
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}"
        "{{ ns.x }}"
    ),
    "nested namespace": (
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}"
        "{{ ns.x }}{{ 1 / 0 }}"
    ),
    "nested items": (
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set d = {'a': ns.x}.items() %}{% set ns.x = [d, d] %}"
        "{% endfor %}{{ ns.x }}"
    ),
    "compared": (
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": (
        "{% for x in [[1, 2]] recursive %}{% if x is iterable %}{{ loop([x, x]) }}{% endif %}{% endfor %}"
    ),
    "join": "{{ (['a' * 100000] * 100000) | join }}",
    "join method": "{{ ('a' * 100000).join(['b'] * 100000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replace method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ '1'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 10**9) }}",
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "round": "{{ 1 | round(-(10**9)) }}{{ 1.5 | round(10**9, 'ceil') }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "map list": "{{ ([range(99999)] * 99999) | map('list') | list | length }}",
    "map sum": "{{ ([range(99999)] * 99999) | map('sum') | list | length }}",
    "select": "{{ ([range(99999)] * 99999) | map('select', 'odd') | map('list') | list | length }}",
    "sum of lists": "{{ ([[1] * 99999] * 99999) | sum(start=[]) | length }}",
    "rsplit": "{{ ('a' * 4000000).rsplit('b' + 'a' * 2000000) | length }}",
    "strip": "{{ ('a' * 4000000).strip('b' * 2000000 + 'a') | length }}",
    "trim": "{{ ('a' * 4000000) | trim('b' * 2000000 + 'a') | length }}",
    "set block": "{% set x %}{% for i in range(99999) %}{{ 'a' * 8000000 }}{% endfor %}{% endset %}{{ x | length }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "fold at compile": "{{ 'aaaaaaaaaaaaaaaaaaaa' | replace('a', 'bbbbbbbbbbbbbbbbbbbb') | indent(999999999) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end(name: str) -> None:
    begun_s = time.thread_time()
    with pytest.raises(InvalidRequest, match="chat template"):
        render(BOMBS[name], limits=RenderLimits(deadline_s=0.3))
    assert time.thread_time() - begun_s < 3  # without a bound it is hours


def test_limits_are_a_rendering_s_own() -> None:
    template = "{% for i in range(n) %}x{% endfor %}"
    limits = RenderLimits(steps=1000)
    for _ in range(3):
        assert render(template, template_kwargs={"n": 900}, limits=limits) == "x" * 900
    with pytest.raises(InvalidRequest, match="1000 steps"):
        render(template, template_kwargs={"n": 1100}, limits=limits)


def test_threads_render_the_same_template_at_once() -> None:
    template = "{% for i in range(300) %}{{ messages[0].content }}{% endfor %}"
    found: dict[int, str] = {}

    def work(number: int) -> None:
        message = {"role": "user", "content": str(number)}
        found[number] = render(template, message, limits=RenderLimits(steps=1000))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) * 300 for number in range(8)}


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 400  # four million characters
    assert len(render_chat(messages, PLAIN)) == 400 * (6 + 10_000) + 3
