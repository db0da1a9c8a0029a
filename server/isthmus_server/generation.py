"""A request's sequences in the engine, and what they bring, as one stream of deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from isthmus.engine.messages import AddRequest, EngineReady, EngineStats, FinishReason, TokensOut
from isthmus.sampling_params import SamplingParams
from isthmus.text.output import ChoiceStream, Delta
from isthmus.text.request import Prompt
from isthmus.text.tokenizer import Tokenizer
from isthmus_server.api_error import ApiError
from isthmus_server.telemetry import SequenceTimes, Telemetry


class EngineClient(Protocol):
    """What the server needs of :class:`isthmus.engine.client.AsyncEngineClient`."""

    @property
    def ready(self) -> EngineReady: ...
    @property
    def alive(self) -> bool: ...
    @property
    def stats(self) -> EngineStats | None: ...
    def generate(self, request: AddRequest) -> AsyncGenerator[TokensOut, None]:
        """Closing the generator early aborts the request."""
        ...

    def next_request_id(self) -> int: ...
    async def shutdown(self) -> None: ...
    async def wait_dead(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice:
    """One sequence: choice ``index`` of the answer, made from prompt ``prompt_index``."""

    __slots__ = ("cached_tokens", "finish_reason", "index", "prompt", "prompt_index", "request", "stream", "times")

    def __init__(
        self,
        index: int,
        prompt_index: int,
        prompt: Prompt,
        request: AddRequest,
        stream: ChoiceStream,
        times: SequenceTimes,
    ) -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.prompt = prompt
        self.request = request
        self.stream = stream
        self.times = times
        self.cached_tokens = 0
        self.finish_reason: str | None = None

    @property
    def usage(self) -> Usage:
        """Of this choice alone, so far."""
        return Usage(len(self.prompt.token_ids), self.stream.num_tokens, self.cached_tokens)

    def take(self, out: TokensOut, telemetry: Telemetry) -> Delta:
        """Raises :class:`ApiError` where the engine ended the sequence without an answer."""
        if out.num_cached_tokens >= 0:
            self.cached_tokens = out.num_cached_tokens
            telemetry.prompt_tokens += len(self.prompt.token_ids)
            telemetry.cached_tokens += out.num_cached_tokens
        if out.tokens:
            self.times.tokens(len(out.tokens), out.queued_s)
        if out.finish_reason is not None:
            self.finish_reason = str(out.finish_reason)
        if out.finish_reason is FinishReason.ERROR or out.finish_reason is FinishReason.ABORT:
            self.times.finished(out.finish_reason, len(self.prompt.token_ids))
            message = out.error or "the engine ended this request before it was complete"
            raise ApiError(500, message, code="engine_error")
        delta = self.stream.push(out)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.times.finished(FinishReason(delta.finish_reason), len(self.prompt.token_ids))
        return delta


class Generation:
    """All choices of one HTTP request: ``params.n`` for each prompt, in that order."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        telemetry: Telemetry,
        sequences: Sequence[tuple[Prompt, AddRequest]],
    ) -> None:
        self._engine = engine
        self._telemetry = telemetry
        self.params = params
        self.choices = [
            Choice(
                index,
                index // params.n,
                prompt,
                request,
                ChoiceStream(tokenizer, params),
                SequenceTimes(telemetry, request.arrival_s),
            )
            for index, (prompt, request) in enumerate(sequences)
        ]
        telemetry.params_n.observe(params.n)
        if params.max_tokens is not None:
            telemetry.params_max_tokens.observe(params.max_tokens)

    @property
    def usage(self) -> Usage:
        """So far; a prompt counts once, however many choices it has."""
        firsts = self.choices[:: self.params.n]
        return Usage(
            prompt_tokens=sum(len(choice.prompt.token_ids) for choice in firsts),
            completion_tokens=sum(choice.stream.num_tokens for choice in self.choices),
            cached_tokens=sum(choice.cached_tokens for choice in firsts),
        )

    def outcome(self) -> dict[str, object]:
        """For the access log."""
        usage, first = self.usage, self.choices[0]
        return {
            "choices": len(self.choices),
            "finish_reasons": sorted({choice.finish_reason or "none" for choice in self.choices}),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "queued_ms": round(first.times.queued_s * 1000, 1),
            "ttft_ms": None if first.times.ttft_s is None else round(first.times.ttft_s * 1000, 1),
        }

    def deltas(self) -> AsyncGenerator[tuple[Choice, Delta], None]:
        """Deltas as they come, until every choice is complete.  Closing it early aborts them all.

        Raises what the engine's client raises, and :class:`ApiError` for a choice that failed.
        """
        # The usual case has no further generator around it: each costs something on every token.
        return self._of(self.choices[0]) if len(self.choices) == 1 else self._merged()

    def finished(self) -> None:
        """Every choice is complete."""
        self._telemetry.max_generation_lengths.observe(max(choice.stream.num_tokens for choice in self.choices))

    async def _of(self, choice: Choice) -> AsyncGenerator[tuple[Choice, Delta], None]:
        telemetry = self._telemetry
        async with aclosing(self._engine.generate(choice.request)) as outputs:
            async for out in outputs:
                delta = choice.take(out, telemetry)
                yield choice, delta
                if delta.finish_reason is not None:
                    return

    async def _merged(self) -> AsyncGenerator[tuple[Choice, Delta], None]:
        queue: asyncio.Queue[tuple[Choice, Delta] | Exception | None] = asyncio.Queue()

        async def pump(choice: Choice) -> None:
            try:
                async with aclosing(self._of(choice)) as found:
                    async for pair in found:
                        queue.put_nowait(pair)
            except Exception as error:  # handed to the reader below
                queue.put_nowait(error)
            else:
                queue.put_nowait(None)

        tasks = [asyncio.create_task(pump(choice)) for choice in self.choices]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
