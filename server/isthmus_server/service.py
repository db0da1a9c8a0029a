"""What every route needs, in one place: settings, keys, phase, engine, tokenizer, measurements."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from isthmus.engine.messages import AddRequest
from isthmus.errors import QueueFull
from isthmus.sampling_params import SamplingParams
from isthmus.text.request import Prompt, RequestBuilder
from isthmus.text.tokenizer import Tokenizer
from isthmus_server.access import Keys, cache_salt
from isthmus_server.api_error import ApiError, bad_request
from isthmus_server.exposition import EngineCollector, Exposition
from isthmus_server.generation import EngineClient, Generation
from isthmus_server.lifecycle import Lifecycle, Phase
from isthmus_server.settings import ServerSettings
from isthmus_server.telemetry import Telemetry

MAX_SEQUENCES: Final = 1024
"""Choices of one request, over all its prompts."""
INLINE_CHARACTERS: Final = 2048
"""Up to this much text is tokenised on the event loop: handing it to a thread would cost more."""

T = TypeVar("T")


class Service:
    """Belongs to the event loop.  Exists, and answers probes, before the engine does."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.keys = Keys(settings.api_keys)
        self.lifecycle = Lifecycle()
        self.telemetry = Telemetry()
        self.collector = EngineCollector(settings.names[0], self.telemetry, self.lifecycle)
        self.exposition = Exposition(self.collector)
        self.created = int(time.time())
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="isthmus-text")
        self._engine: EngineClient | None = None
        self._builder: RequestBuilder | None = None
        self._tokenizer: Tokenizer | None = None

    @property
    def model_name(self) -> str:
        return self.settings.names[0]

    @property
    def engine(self) -> EngineClient:
        """Raises :class:`ApiError` with 503 before there is one."""
        if self._engine is None:
            self.lifecycle.require_accepting()
        assert self._engine is not None, "accepting requests without an engine"
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self.lifecycle.require_accepting()
        assert self._tokenizer is not None, "accepting requests without a tokenizer"
        return self._tokenizer

    @property
    def builder(self) -> RequestBuilder:
        if self._builder is None:
            self.lifecycle.require_accepting()
        assert self._builder is not None, "accepting requests without a builder"
        return self._builder

    def open(self, engine: EngineClient, tokenizer: Tokenizer) -> None:
        """From here on requests are answered."""
        ready = engine.ready
        self._engine = engine
        self._tokenizer = tokenizer
        self._builder = RequestBuilder(
            tokenizer,
            vocab_size=ready.vocab_size,
            max_model_len=ready.max_model_len,
            eos_token_ids=ready.eos_token_ids,
        )
        self.telemetry.set_max_length(ready.max_model_len)
        self.collector.ready = ready
        self.lifecycle.phase = Phase.READY

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def require_room(self) -> None:
        """Before a body is even read: whether a new request may start, as far as the last heartbeat tells.

        Raises :class:`ApiError` with 503, and :class:`isthmus.errors.QueueFull`: refusing has to be
        cheap when there is too much to do.
        """
        self.lifecycle.require_accepting()
        stats, most = self.engine.stats, self.engine.ready.max_waiting
        if stats is not None and stats.num_waiting >= most:
            raise QueueFull(f"{stats.num_waiting} requests wait already, and {most} may; try again later")

    def check_model(self, name: str | None) -> None:
        """Raises :class:`ApiError` with 404 for a model that is not served here."""
        if name is not None and name not in self.settings.names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {', '.join(map(repr, self.settings.names))}",
                param="model",
                code="model_not_found",
            )

    async def off_loop(self, size: int, work: Callable[[], T]) -> T:
        """``work()``, on a thread if ``size`` characters are worth it."""
        if size <= INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def generation(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        key_digest: bytes,
        salt: str | None,
        priority: int,
        arrival_s: float,
    ) -> Generation:
        """Raises :class:`isthmus.errors.InvalidRequest` for values that this model cannot take."""
        if len(prompts) * params.n > MAX_SEQUENCES:
            raise bad_request(
                f"{len(prompts)} prompts with n={params.n} are {len(prompts) * params.n} sequences; "
                f"at most {MAX_SEQUENCES} are taken in one request",
                param="n",
            )
        engine, builder = self.engine, self.builder
        sequences: list[tuple[Prompt, AddRequest]] = []
        for prompt in prompts:
            requests = builder.requests(
                prompt,
                params,
                engine.next_request_id,
                priority=priority,
                cache_salt=cache_salt(key_digest, salt),
                arrival_s=arrival_s,
            )
            sequences += [(prompt, request) for request in requests]
        return Generation(engine, self.tokenizer, params, self.telemetry, sequences)

    def liveness(self) -> str | None:
        """``None`` while the server lives, else why it does not.  Load and draining are no reason."""
        if self.lifecycle.phase is Phase.DEAD:
            return "the engine has ended"
        engine = self._engine
        if engine is None or engine.stats is None:
            return None
        if not engine.alive and not self.lifecycle.draining:
            return "the engine has ended"
        stats = engine.stats
        has_work = bool(self.lifecycle.running) or stats.num_running > 0 or stats.num_waiting > 0
        idle_s = time.monotonic() - stats.last_progress_s
        if has_work and idle_s > self.settings.stuck_after_s:
            return f"the engine has work and has made no progress for {idle_s:.0f} s"
        return None


def answer_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(16)}"
