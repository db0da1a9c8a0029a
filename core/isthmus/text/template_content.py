"""Messages as templates expect them: content as text or as parts, arguments as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final

from jinja2 import nodes

from isthmus.errors import InvalidRequest

MAX_MESSAGES: Final = 16384
_TEXT_PARTS: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class ContentForm(Enum):
    """What a template takes as a message's ``content``."""

    TEXT = "text"
    PARTS = "parts"
    EITHER = "either"


def find_content_form(template: nodes.Template) -> ContentForm:
    """Whether the template loops over a message's content, and whether it asks if that is a string."""
    names = {"content"}
    for assignment in template.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    if not any(_is_content(loop.iter, names) for loop in template.find_all(nodes.For)):
        return ContentForm.TEXT
    tests = template.find_all(nodes.Test)
    asks = any(test.name in ("string", "iterable") and _is_content(test.node, names) for test in tests)
    return ContentForm.EITHER if asks else ContentForm.PARTS


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


def prepare_messages(messages: Sequence[Mapping[str, Any]], form: ContentForm) -> list[dict[str, Any]]:
    """Checked copies in the form that the template takes; raises :class:`InvalidRequest`."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest("messages must be a list of objects with a role and a content", param="messages")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"there are {len(messages)} messages; send 1 to {MAX_MESSAGES}", param="messages")
    return [_prepare(message, f"messages[{index}]", form) for index, message in enumerate(messages)]


def _prepare(message: Mapping[str, Any], where: str, form: ContentForm) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} must be an object with a role", param=where)
    found = dict(message)
    calls = found.get("tool_calls")
    if calls:
        found["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    elif found.get("content") is None and "tool_calls" not in found:
        raise InvalidRequest(f"{where} has no content", param=f"{where}.content")
    found["content"] = _content(found.get("content"), f"{where}.content", form)
    return found


def _content(content: Any, where: str, form: ContentForm) -> str | list[dict[str, Any]]:
    if content is None:
        content = ""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if form is ContentForm.PARTS else content
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{where} must be text or a list of parts, not {type(content).__name__}", param=where)
    texts = [_part_text(part, f"{where}[{index}]") for index, part in enumerate(content)]
    if form is ContentForm.TEXT:
        return "\n".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    field = _TEXT_PARTS.get(kind) if isinstance(kind, str) and isinstance(part, Mapping) else None
    if field is None:
        raise InvalidRequest(f"{where} is a part of type {kind!r}; this engine takes text parts only", param=where)
    text = part.get(field)
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.{field} must be text", param=where)
    return text


def _tool_call(call: Any, where: str) -> Any:
    """A call with its arguments as an object: clients send them as JSON text, templates print them as JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{where} must be an object with a function", param=where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where}.function.arguments is not valid JSON: {error}", param=where) from error
    return {**call, "function": {**function, "arguments": arguments}}
