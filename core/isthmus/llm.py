"""The offline engine: many prompts in, all answers out, in the caller's own process."""

from __future__ import annotations

import itertools
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from isthmus.config import BackendOptions, CacheOptions, EngineOptions, ModelOptions, SchedulerOptions
from isthmus.engine.build import build_engine
from isthmus.engine.messages import AddRequest, EngineStats, FinishReason, TokensOut
from isthmus.errors import EngineDead, InvalidRequest, IsthmusError
from isthmus.sampling_params import SamplingParams
from isthmus.text.output import ChoiceStream, Delta, TokenLogprob
from isthmus.text.request import Prompt, RequestBuilder, naming

if TYPE_CHECKING:
    from isthmus.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PromptInput: TypeAlias = str | Sequence[int]
"""A prompt as text or as token ids."""
Message: TypeAlias = Mapping[str, Any]
"""A chat message: a role, a content, and whatever else the model's template reads."""


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum over ``token_ids``, if logprobs were asked for."""
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    """``stop``, ``length``, ``abort`` or ``error``."""
    stop_reason: int | str | None = None
    """The stop string met, or the id in ``stop_token_ids``; ``None`` for an end-of-sequence token."""
    error: str = ""


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A prompt and what came of it."""

    prompt: str | None
    """``None`` if it was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One a prompt token, if asked for; the first is ``None``."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""


class LLM:
    """A model ready to answer batches of prompts.

    ``LLM(model).generate(prompts, SamplingParams(...))``.  The same engine as the server's, without
    processes or sockets.  Used by one thread at a time; :meth:`close` (or ``with``) gives back the
    device.

    Raises an :class:`isthmus.errors.IsthmusError` of one line that says what to do when the model or
    the device cannot be used.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        device_options: Mapping[str, str] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        overlap: bool = True,
        random_weights: bool = False,
        skip_tokenizer_init: bool = False,
        progress: bool = True,
    ) -> None:
        """Load ``model``: a folder, a ``.gguf`` file or a hub name.  ``None`` takes the engine's own choice.

        ``gpu_memory_utilization`` is the share of the device's memory to take in all, whatever the
        device; ``kv_cache_memory``, in bytes, or ``num_blocks`` sizes the KV cache instead.
        ``enforce_eager`` captures no graphs.  With ``skip_tokenizer_init`` prompts are token ids and
        answers have no text.
        """
        model_options = ModelOptions(
            model=model, revision=revision, dtype=dtype, max_model_len=max_model_len, random_weights=random_weights
        )
        options = EngineOptions(
            model=model_options,
            cache=CacheOptions(
                block_size=block_size,
                num_blocks=num_blocks,
                memory_bytes=kv_cache_memory,
                memory_fraction=gpu_memory_utilization,
                kv_dtype=kv_cache_dtype,
                prefix_caching=enable_prefix_caching,
            ),
            scheduler=SchedulerOptions(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, overlap=overlap
            ),
            backend=BackendOptions(device=device, options=dict(device_options or {}), graphs=not enforce_eager),
        )
        # The tokenizer first: it is quick, and what is wrong with a model mostly shows there.
        self.tokenizer = None if skip_tokenizer_init else _load_tokenizer(model_options)
        self._core, self.ready = build_engine(options, progress=progress)
        self._closed = False
        self._ids = itertools.count()
        self._builder = RequestBuilder(
            self.tokenizer,
            vocab_size=self.ready.vocab_size,
            max_model_len=self.ready.max_model_len,
            eos_token_ids=self.ready.eos_token_ids,
        )

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or many, in the order given.

        A prompt is text or token ids; ``sampling_params`` is one for all or one each.  Nothing runs
        if any prompt is refused: :class:`isthmus.errors.InvalidRequest` says which.  A choice that
        fails while running has the ``finish_reason`` ``error`` and harms no other.
        """
        return self._run(self._builder.prompts(_as_list(prompts)), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each a list of messages, by the model's chat template."""
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = []
        for index, conversation in enumerate(conversations):
            with naming("conversation", index, len(conversations)):
                prompt = self._builder.chat(
                    conversation,
                    template=chat_template,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    template_kwargs=chat_template_kwargs,
                )
            prompts.append(prompt)
        return self._run(prompts, sampling_params, use_tqdm)

    def stats(self) -> EngineStats:
        """The engine's counters, from its start."""
        return self._core.stats()

    def close(self) -> None:
        """Give back the device.  Nothing else may be called afterwards, but this again."""
        if not self._closed:
            self._closed = True
            self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if self._closed:
            raise IsthmusError("this LLM was closed; make a new one")
        batch = _Batch(self.tokenizer)
        for index, (prompt, params) in enumerate(zip(prompts, _one_each(sampling_params, len(prompts)), strict=True)):
            with naming("prompt", index, len(prompts)):
                batch.add(prompt, params, self._builder.requests(prompt, params, self._next_id))
        with _Interrupts() as interrupts, _progress(len(prompts), use_tqdm) as advance:
            try:
                for finished in self._drive(batch, interrupts):
                    if finished:
                        advance(finished, batch.num_tokens)
            finally:
                self._abort(batch)
        return batch.outputs

    def _next_id(self) -> int:
        return next(self._ids)

    def _drive(self, batch: _Batch, interrupts: _Interrupts) -> Iterator[int]:
        """Run a batch to its end; yields how many prompts each step finished."""
        incoming = iter(batch.requests)
        while True:
            for request in itertools.islice(incoming, self.ready.max_waiting - len(batch.running)):
                self._core.add(request)
                batch.running.add(request.request_id)
            if not batch.running:
                return
            outputs = self._core.step()
            if self._core.stalled:
                raise EngineDead(f"nothing can run, though {len(batch.running)} requests wait; please report this")
            to_abort, finished = batch.take(outputs)
            if to_abort:
                self._core.abort(to_abort)
            yield finished
            interrupts.check()

    def _abort(self, batch: _Batch) -> None:
        """Leave nothing of a batch behind, so that the next one finds the engine idle."""
        if batch.running:
            self._core.abort(batch.running)
        try:
            while self._core.has_work and not self._core.stalled:
                self._core.step()
        except EngineDead:
            logger.warning("the engine ended while a batch was aborted")


@dataclass(slots=True)
class _Choice:
    request: int
    """Place of its prompt in the batch."""
    output: CompletionOutput
    stream: ChoiceStream
    pieces: list[str] = field(default_factory=list)

    def extend(self, delta: Delta) -> None:
        output = self.output
        self.pieces.append(delta.text)
        output.token_ids += delta.token_ids
        if output.logprobs is not None:
            output.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            output.text = "".join(self.pieces)
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
            output.error = delta.error
            if output.logprobs is not None:
                output.cumulative_logprob = self.stream.cumulative_logprob


class _Batch:
    """The requests of one call, and their answers as they grow."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._choices: dict[int, _Choice] = {}
        self._unfinished: list[int] = []  # choices, by prompt
        self.requests: list[AddRequest] = []
        self.outputs: list[RequestOutput] = []
        self.running: set[int] = set()
        """Ids that the engine has and has not finished."""
        self.num_tokens = 0
        """Generated so far."""

    def add(self, prompt: Prompt, params: SamplingParams, requests: Sequence[AddRequest]) -> None:
        choices = [
            CompletionOutput(index=index, logprobs=None if params.logprobs is None else [])
            for index in range(len(requests))
        ]
        for request, output in zip(requests, choices, strict=True):
            stream = ChoiceStream(self._tokenizer, params)
            self._choices[request.request_id] = _Choice(len(self.outputs), output, stream)
        self.requests += requests
        self._unfinished.append(len(requests))
        self.outputs.append(
            RequestOutput(
                prompt=prompt.text,
                prompt_token_ids=list(prompt.token_ids),
                outputs=choices,
                prompt_logprobs=None if params.prompt_logprobs is None else [],
            )
        )

    def take(self, items: Sequence[TokensOut]) -> tuple[list[int], int]:
        """Take over what a step brought.  Returns the requests to abort, since their text is complete,
        and how many prompts are finished now that were not before."""
        to_abort, finished = [], 0
        for item in items:
            if item.request_id not in self.running:
                continue  # a step that was under way when the request ended
            choice = self._choices[item.request_id]
            delta = choice.stream.push(item)
            choice.extend(delta)
            self.num_tokens += len(delta.token_ids)
            output = self.outputs[choice.request]
            if choice.output.index == 0:
                self._take_prompt(output, item, delta)
            if delta.finish_reason is None:
                continue
            self.running.discard(item.request_id)
            self._unfinished[choice.request] -= 1
            finished += not self._unfinished[choice.request]
            if delta.stopped_by_text:
                to_abort.append(item.request_id)
            if delta.finish_reason == FinishReason.ERROR:
                logger.warning("prompt %d: %s", choice.request, delta.error)
        return to_abort, finished

    def _take_prompt(self, output: RequestOutput, item: TokensOut, delta: Delta) -> None:
        output.num_cached_tokens = max(output.num_cached_tokens, item.num_cached_tokens)
        if output.prompt_logprobs is not None:
            output.prompt_logprobs += delta.prompt_logprobs


class _Interrupts:
    """Ctrl-C between steps, never inside one: a step that is cut short would leave the engine half done.

    A second Ctrl-C is not waited with.  Where signals are somebody else's (another thread, a handler
    of the application's own) nothing is changed.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None

    def __enter__(self) -> _Interrupts:
        mine = threading.current_thread() is threading.main_thread()
        if mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raise :class:`KeyboardInterrupt` if it was asked for."""
        if self._asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of prompts, advanced by (prompts finished now, tokens generated so far)."""
    if not shown:
        yield lambda finished, tokens: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc="prompts", unit="prompt", dynamic_ncols=True) as bar:

        def advance(finished: int, tokens: int) -> None:
            rate = tokens / max(bar.format_dict["elapsed"], 1e-3)
            bar.set_postfix_str(f"{rate:.0f} output tok/s", refresh=False)
            bar.update(finished)

        yield advance


def _as_list(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    """Several prompts from one or several; token ids are told from prompts by what they hold."""
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if len(given) != count:
        raise InvalidRequest(
            f"there are {count} prompts and {len(given)} sampling_params; give one for all, or one each",
            param="sampling_params",
        )
    return list(given)


def _load_tokenizer(options: ModelOptions) -> Tokenizer:
    from isthmus.model.source import resolve_model
    from isthmus.text.tokenizer import Tokenizer

    return Tokenizer.load(resolve_model(options.model, options.revision, weights=False))
