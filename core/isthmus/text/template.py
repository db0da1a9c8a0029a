"""A chat as the text its model was trained on: the model's own jinja template, rendered within bounds."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2

from isthmus.errors import InvalidRequest
from isthmus.text.render_budget import RenderLimits
from isthmus.text.template_content import ContentForm, find_content_form, prepare_messages
from isthmus.text.template_sandbox import Sandbox

__all__ = ["RESERVED", "RenderLimits", "render_chat"]

RESERVED: Final = frozenset(
    [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "conversation",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "tokenizer_kwargs",
        "return_assistant_tokens_mask",
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
        "raise_exception",
        "strftime_now",
        "range",
        "namespace",
        "dict",
        "cycler",
        "joiner",
        "self",
        "loop",
        "caller",
    ]
)
"""Names that ``template_kwargs`` may not set: they are the renderer's own."""
MAX_TEMPLATE_CHARACTERS: Final = 1 << 20
MAX_KWARGS: Final = 64


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    limits: RenderLimits | None = None,
) -> str:
    """The prompt for a conversation.

    ``messages`` have a ``role`` and a ``content``, which is text or a list of text parts; other
    fields go to the template as they are, except that a tool call's ``arguments`` are parsed from
    JSON.  ``continue_final_message`` ends the prompt where the last message's text ends, so that the
    model goes on writing it.  ``template_kwargs`` are further variables, plain JSON values.

    Rendering is sandboxed and ends within ``limits`` (:mod:`isthmus.text.template_sandbox`).  It may
    take that long, so a server calls this on a worker thread.  Raises :class:`InvalidRequest` for
    anything that goes wrong, with the template's own message.
    """
    if add_generation_prompt and continue_final_message:
        raise InvalidRequest(
            "continue_final_message goes on with the last message, so add_generation_prompt must be false",
            param="continue_final_message",
        )
    variables = _plain_variables(template_kwargs or {})
    compiled = _compile(template)
    chat = prepare_messages(messages, compiled.form)
    marker = _mark_end(chat[-1]) if continue_final_message else None
    text = compiled.render(
        {
            **variables,
            **(special_tokens or {}),
            "messages": chat,
            "tools": [dict(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        },
        limits or RenderLimits(),
    )
    return text if marker is None else _cut_at(marker, text)


class _CompiledTemplate:
    def __init__(self, source: str) -> None:
        self._sandbox = Sandbox()
        self.form: ContentForm = find_content_form(self._sandbox.parse(source))
        with self._sandbox.within(RenderLimits()):
            self._template = self._sandbox.from_string(source)

    def render(self, variables: Mapping[str, Any], limits: RenderLimits) -> str:
        with self._sandbox.within(limits):
            try:
                return self._template.render(variables)
            except RecursionError as error:
                raise InvalidRequest("the chat template calls itself without end", param="messages") from error
            # A template is a stranger's program: whatever it raises is an answer to this request alone.
            except Exception as error:
                reason = error.message if isinstance(error, jinja2.TemplateError) else None
                raise InvalidRequest(
                    f"the chat template refused this conversation: {reason or f'{type(error).__name__}: {error}'}",
                    param="messages",
                ) from error


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> _CompiledTemplate:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise InvalidRequest(
            f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARACTERS} are taken",
            param="chat_template",
        )
    try:
        return _CompiledTemplate(source)
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
        line = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InvalidRequest(
            f"the chat template is not valid{line}: {error or type(error).__name__}", param="chat_template"
        ) from error


def _plain_variables(given: Mapping[str, Any]) -> dict[str, Any]:
    if len(given) > MAX_KWARGS:
        raise InvalidRequest(
            f"chat_template_kwargs has {len(given)} entries; at most {MAX_KWARGS} are taken",
            param="chat_template_kwargs",
        )
    for name, value in given.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_") or name in RESERVED:
            raise InvalidRequest(
                f"chat_template_kwargs may not set {name!r}, which is reserved or no name",
                param="chat_template_kwargs",
            )
        if not _is_plain(value):
            raise InvalidRequest(
                f"chat_template_kwargs[{name!r}] must be made of texts, numbers, booleans, lists and objects",
                param="chat_template_kwargs",
            )
    return dict(given)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, str | int | float | bool)


def _mark_end(message: dict[str, Any]) -> str:
    """Put a mark that nobody can guess after the message's text, and return it."""
    marker = f"<continue-{secrets.token_hex(8)}>"
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + marker
    elif content:
        content[-1]["text"] += marker
    else:
        raise InvalidRequest("continue_final_message: the last message has no text", param="messages")
    return marker


def _cut_at(marker: str, text: str) -> str:
    before, found, _ = text.rpartition(marker)
    if not found:
        raise InvalidRequest(
            "continue_final_message: this model's template leaves out or changes the last message's text",
            param="continue_final_message",
        )
    return before
