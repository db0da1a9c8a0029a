"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from isthmus.text.request import Prompt
from isthmus_server.answer import GeneratedResponse
from isthmus_server.body import describe_body, read_model
from isthmus_server.gate import KEY_DIGEST
from isthmus_server.logprobs import CompletionLogprobs
from isthmus_server.protocol import CompletionRequest
from isthmus_server.protocol.responses import Completion
from isthmus_server.routes.documented import API_ERRORS, answers
from isthmus_server.service import Service, answer_id
from isthmus_server.writers import CompletionWriter


def add_routes(router: APIRouter, service: Service) -> None:
    @router.post(
        "/v1/completions",
        summary="Continue a text",
        responses=answers("The completion.", Completion, API_ERRORS, event=Completion),
        openapi_extra=describe_body(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        arrival_s = time.monotonic()
        service.require_room()
        body = await read_model(request, CompletionRequest)
        service.check_model(body.model)
        body.require_supported()
        params = body.sampling_params()
        prompts = await _prompts(service, body)
        generation = service.generation(
            prompts,
            params,
            key_digest=request.scope[KEY_DIGEST],
            salt=body.cache_salt,
            priority=body.priority or 0,
            arrival_s=arrival_s,
        )
        logprobs = None
        if body.logprobs is not None:
            logprobs = CompletionLogprobs(
                service.tokenizer, body.logprobs, as_ids=bool(body.return_tokens_as_token_ids)
            )
        writer = CompletionWriter(
            answer_id("cmpl"),
            body.model or service.model_name,
            logprobs=logprobs,
            usage=body.usage_wish,
            return_token_ids=bool(body.return_token_ids),
            prompt_logprobs=body.prompt_logprobs is not None,
            echoes=[service.builder.echo(prompt, params) for prompt in prompts] if body.echo else [],
            only_echo=body.max_tokens == 0,
        )
        return GeneratedResponse(generation, writer, service.lifecycle, service.telemetry, stream=bool(body.stream))


async def _prompts(service: Service, body: CompletionRequest) -> Sequence[Prompt]:
    special = body.add_special_tokens is not False
    builder = service.builder
    given = body.prompt
    # One prompt is a text or a list of numbers, many are a list of such.
    prompts: list[str | list[int]] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    return await service.off_loop(sum(map(len, prompts)), lambda: builder.prompts(prompts, add_special_tokens=special))
