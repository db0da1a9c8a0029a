"""Chats rendered here and by transformers are the same text."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from isthmus.text.template import render_chat

# In the style of templates in use: trimmed blocks, namespaces, loop controls, tools as JSON, and reasoning cut away.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- if '</think>' in content and loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set tool_call = tool_call.function %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role == "user" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
ALTERNATING = """\
{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] | trim %}
{% set rest = messages[1:] %}
{% else %}
{% set system = '' %}
{% set rest = messages %}
{% endif %}
{{ bos_token }}
{%- for message in rest -%}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user and assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + message['content'] | trim + ' [/INST]' }}
    {% else %}
        {% generation %}{{ ' ' ~ message['content'] | trim ~ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""
PARTS = """\
{{ bos_token }}{% for message in messages %}{{ '<start>' + message.role | upper + '\\n' -}}
{% if message.content is string %}{{ message.content | trim }}{% else %}
{% for item in message.content if item.type == 'text' %}{{ item['text'] | trim }}{% if not loop.last %} {% endif %}
{% endfor %}{% endif %}{{ '<end>\\n' }}{% endfor %}
{% macro ending(name='model', items=[]) %}<start>{{ name }}{{ items | join(',') }}{% endmacro %}
{% if add_generation_prompt %}{{ ending(items=['a', 1] + [2 * 3]) }}{% endif %}
"""
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's <weather> & more: é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "Hé 'you'"},
    {"role": "assistant", "content": "<think>hm</think>\n\nYes? "},
    {"role": "user", "content": " 日本 <b>{{ x }}</b>"},
]
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich <&>", "n": [1, None]}},
}
CALLING: list[dict[str, Any]] = [
    *TALK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "cold"},
]
PIECES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
    {"role": "model", "content": "three"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("template", "messages", "tools", "variables"),
    [
        (CHATML, TALK, None, {}),
        (CHATML, TALK, TOOLS, {"enable_thinking": False}),
        (CHATML, CALLING, TOOLS, {"enable_thinking": True}),
        (CHATML, TALK[1:], None, {"enable_thinking": False}),
        (ALTERNATING, TALK, None, {}),
        (ALTERNATING, TALK[1:], None, {}),
        (PARTS, PIECES, None, {}),
        (PARTS, TALK, None, {}),
    ],
)
@pytest.mark.parametrize("prompted", [True, False])
def test_same_text(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
    prompted: bool,
) -> None:
    theirs, _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        add_generation_prompt=prompted,
        **TOKENS,
        **variables,
    )
    ours = render_chat(
        messages,
        template,
        tools=tools,
        add_generation_prompt=prompted,
        special_tokens=TOKENS,
        template_kwargs=variables,
    )
    assert ours == theirs[0]
