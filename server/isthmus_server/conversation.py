"""From the messages of a request to a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.text.request import Prompt
from isthmus_server.api_error import bad_request
from isthmus_server.protocol import ChatRequest, Message, TokenizeRequest
from isthmus_server.service import INLINE_CHARACTERS, Service

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


async def chat_prompt(service: Service, body: ChatRequest | TokenizeRequest) -> Prompt:
    """Raises :class:`isthmus_server.api_error.ApiError` for parts that are not text."""
    assert body.messages is not None
    messages = [_plain(message, index) for index, message in enumerate(body.messages)]
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools] if body.tools else None
    template_kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if isinstance(body, ChatRequest):
        if body.tool_choice == "none":
            tools = None
        if body.reasoning_effort is not None:
            template_kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    add_prompt = body.add_generation_prompt
    builder = service.builder
    # What tools and variables make a template do is not told by their size.
    small = not tools and not template_kwargs
    return await service.off_loop(
        _size(messages) if small else INLINE_CHARACTERS + 1,
        lambda: builder.chat(
            messages,
            template=service.settings.chat_template,
            tools=tools,
            add_generation_prompt=not body.continue_final_message if add_prompt is None else add_prompt,
            continue_final_message=bool(body.continue_final_message),
            template_kwargs=template_kwargs,
        ),
    )


def _plain(message: Message, index: int) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        plain["content"] = [
            {"type": "text", "text": _part_text(part, f"messages.{index}.content.{place}")}
            for place, part in enumerate(message.content)
        ]
    elif message.content is None:
        plain["content"] = ""
    return plain


def _part_text(part: Mapping[str, Any], path: str) -> str:
    kind = part.get("type")
    field = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise bad_request(f"{path} is of type {str(kind)[:64]!r}; this model takes text alone", param=path)
    text = part.get(field)
    if not isinstance(text, str):
        raise bad_request(f"{path}.{field} must be a text", param=f"{path}.{field}")
    return text


def _size(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters, more or less: whether rendering is worth a thread."""
    size = 0
    for message in messages:
        content = message["content"]
        size += len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
    return size
