"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from isthmus_server.answer import GeneratedResponse
from isthmus_server.body import describe_body, read_model
from isthmus_server.conversation import chat_prompt
from isthmus_server.gate import KEY_DIGEST
from isthmus_server.logprobs import ChatLogprobs
from isthmus_server.protocol import ChatRequest
from isthmus_server.protocol.responses import ChatCompletion, ChatCompletionChunk
from isthmus_server.routes.documented import API_ERRORS, answers
from isthmus_server.service import Service, answer_id
from isthmus_server.writers import ChatWriter


def add_routes(router: APIRouter, service: Service) -> None:
    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        responses=answers("The next message.", ChatCompletion, API_ERRORS, event=ChatCompletionChunk),
        openapi_extra=describe_body(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        arrival_s = time.monotonic()
        service.require_room()
        body = await read_model(request, ChatRequest)
        service.check_model(body.model)
        body.require_supported()
        params = body.sampling_params()
        prompt = await chat_prompt(service, body)
        generation = service.generation(
            [prompt],
            params,
            key_digest=request.scope[KEY_DIGEST],
            salt=body.cache_salt,
            priority=body.priority or 0,
            arrival_s=arrival_s,
        )
        logprobs = None
        if body.logprobs:
            logprobs = ChatLogprobs(body.top_logprobs or 0, as_ids=bool(body.return_tokens_as_token_ids))
        writer = ChatWriter(
            answer_id("chatcmpl"),
            body.model or service.model_name,
            logprobs=logprobs,
            usage=body.usage_wish,
            return_token_ids=bool(body.return_token_ids),
        )
        return GeneratedResponse(generation, writer, service.lifecycle, service.telemetry, stream=bool(body.stream))
