"""``/v1/models``, ``/version``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from isthmus.version import __version__
from isthmus_server.api_error import bad_request
from isthmus_server.body import describe_body, read_model
from isthmus_server.conversation import chat_prompt
from isthmus_server.protocol import DetokenizeRequest, TokenizeRequest
from isthmus_server.protocol.responses import Detokenized, ModelCard, ModelList, Tokenized, Version
from isthmus_server.routes.documented import API_ERRORS, READ_ERRORS, answers
from isthmus_server.service import Service


def add_routes(router: APIRouter, service: Service) -> None:
    @router.get(
        "/v1/models", summary="The models served here", responses=answers("A card each.", ModelList, READ_ERRORS)
    )
    async def models() -> Response:
        # Some load balancers take this path for their readiness probe.
        service.lifecycle.require_accepting()
        return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.settings.names]})

    @router.get("/v1/models/{name:path}", summary="One model", responses=answers("Its card.", ModelCard, READ_ERRORS))
    async def model(name: str) -> Response:
        service.lifecycle.require_accepting()
        service.check_model(name)
        return JSONResponse(_card(service, name))

    @router.get("/version", summary="The version of Isthmus", responses=answers("It.", Version, READ_ERRORS))
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @router.post(
        "/tokenize",
        summary="Text or messages to token ids",
        responses=answers("The ids, and how many.", Tokenized, API_ERRORS),
        openapi_extra=describe_body(TokenizeRequest),
    )
    async def tokenize(request: Request) -> Response:
        service.lifecycle.require_accepting()
        body = await read_model(request, TokenizeRequest)
        service.check_model(body.model)
        tokens = await _tokens(service, body)
        tokenizer = service.tokenizer
        strings = [tokenizer.id_to_token(token) for token in tokens] if body.return_token_strs else None
        limit = service.engine.ready.max_model_len
        return JSONResponse({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": strings})

    @router.post(
        "/detokenize",
        summary="Token ids to text",
        responses=answers("The text.", Detokenized, API_ERRORS),
        openapi_extra=describe_body(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        service.lifecycle.require_accepting()
        body = await read_model(request, DetokenizeRequest)
        service.check_model(body.model)
        vocab_size = service.engine.ready.vocab_size
        if any(token >= vocab_size for token in body.tokens):
            raise bad_request(f"tokens holds ids beyond the vocabulary; ids are 0 to {vocab_size - 1}", param="tokens")
        tokenizer = service.tokenizer
        text = await service.off_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens, False))
        return JSONResponse({"prompt": text})


async def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", param="prompt")
    if body.prompt is None:
        return list((await chat_prompt(service, body)).token_ids)
    text, special = body.prompt, body.add_special_tokens is not False
    return await service.off_loop(len(text), lambda: service.tokenizer.encode(text, special))


def _card(service: Service, name: str) -> dict[str, Any]:
    ready = service.collector.ready
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "isthmus",
        "root": service.settings.engine.model.model,
        "parent": None,
        "max_model_len": ready.max_model_len if ready else None,
        "vocab_size": ready.vocab_size if ready else None,
    }
