"""Request bodies of the OpenAI API, with vLLM's additional fields.  Unknown fields are ignored.

A known field whose meaning is not implemented is refused unless its value asks for nothing:
an option that changes the answer is never dropped in silence.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from isthmus.sampling_params import SamplingParams
from isthmus_server.api_error import ApiError, bad_request
from isthmus_server.protocol.fields import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TEMPLATE_KWARGS,
    MAX_TOOLS,
    AllowedTokenIds,
    BadWords,
    Count,
    LogitBiasField,
    Name,
    NotYet,
    NumLogprobs,
    Penalty,
    PositiveShare,
    Priority,
    PromptField,
    Repetition,
    Salt,
    Seed,
    Share,
    StopField,
    StopTokenIds,
    Temperature,
    TokenCount,
    TopK,
)


class _Body(BaseModel):
    model_config = ConfigDict(
        extra="ignore",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )


class UsageWish(Enum):
    """What a stream is to tell of token counts."""

    NONE = 0
    AT_END = 1
    ALWAYS = 2
    """With every chunk, those of its choice so far; and at the end those of all."""


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Sampled(_Body):
    """What both endpoints take.  ``None`` everywhere means: as if not given."""

    model: Name | None = None
    n: Count | None = None
    temperature: Temperature | None = None
    top_p: PositiveShare | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBiasField = {}
    allowed_token_ids: AllowedTokenIds | None = None
    bad_words: BadWords | None = None
    seed: Seed | None = None
    stop: StopField = ()
    stop_token_ids: StopTokenIds | None = None
    min_tokens: TokenCount | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: NumLogprobs | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Salt | None = None
    priority: Priority | None = None
    user: Name | None = None
    add_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None
    use_beam_search: bool | None = None
    structured_outputs: NotYet = None
    guided_json: NotYet = None
    guided_regex: NotYet = None
    guided_choice: NotYet = None
    guided_grammar: NotYet = None
    structural_tag: NotYet = None
    prompt_embeds: NotYet = None
    kv_transfer_params: NotYet = None
    truncate_prompt_tokens: NotYet = None
    thinking_token_budget: NotYet = None

    def require_supported(self) -> None:
        """Raises :class:`ApiError` with 400 for what this version does not do."""
        if self.use_beam_search:
            raise _not_supported("use_beam_search")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise _not_supported("response_format", 'only {"type": "text"} is')
        if self.spaces_between_special_tokens is False:
            raise _not_supported("spaces_between_special_tokens", "only true is")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed when stream is true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise _not_supported("prompt_logprobs", "leave it out when stream is true")

    @property
    def usage_wish(self) -> UsageWish:
        options = self.stream_options
        if options is None or not options.include_usage:
            return UsageWish.NONE
        return UsageWish.ALWAYS if options.continuous_usage_stats else UsageWish.AT_END

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """Raises :class:`isthmus.errors.InvalidRequest` where two values contradict each other."""
        given: dict[str, Any] = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **given)


_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)


class CompletionRequest(_Sampled):
    """``POST /v1/completions``."""

    prompt: PromptField
    max_tokens: TokenCount | None = 16
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: str | None = None

    def require_supported(self) -> None:
        super().require_supported()
        if self.suffix:
            raise _not_supported("suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _not_supported("best_of", "only a value equal to n is")
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens is 0; it must be at least 1 unless echo is true", param="max_tokens")
        if self.stream and self.echo and self.logprobs is not None:
            raise _not_supported("echo with logprobs", "leave one of them out when stream is true")

    def sampling_params(self) -> SamplingParams:
        echoed = self.logprobs if self.echo else None
        wanted = self.prompt_logprobs if self.prompt_logprobs is not None else echoed
        if echoed is not None and wanted is not None:
            wanted = max(wanted, echoed)
        # Nothing is to be generated when only the prompt is echoed; the engine makes at least one token.
        limit = 1 if self.max_tokens == 0 else self.max_tokens
        return self.sampling(max_tokens=limit, logprobs=self.logprobs, prompt_logprobs=wanted)


class TextPart(_Body):
    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class FunctionCall(_Body):
    name: Name
    arguments: str | dict[str, Any] | None = None


class ToolCall(_Body):
    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Body):
    """One turn of a conversation.  Text only: any other kind of part is refused."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None


class FunctionSpec(_Body):
    model_config = ConfigDict(extra="allow")

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Body):
    type: Literal["function"]
    function: FunctionSpec


class ChatRequest(_Sampled):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    echo: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: NotYet = None
    function_call: NotYet = None
    audio: NotYet = None
    modalities: Annotated[list[str], Field(max_length=8)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_KWARGS)] | None = None
    documents: NotYet = None

    def require_supported(self) -> None:
        super().require_supported()
        if self.tool_choice not in (None, "none", "auto"):
            raise _not_supported("tool_choice", 'only "none" and "auto" are')
        if self.modalities is not None and self.modalities != ["text"]:
            raise _not_supported("modalities", 'only ["text"] is')
        if self.chat_template is not None:
            raise bad_request(
                "a chat_template in a request is not taken; the server's --chat-template sets it", param="chat_template"
            )
        if self.echo:
            raise _not_supported("echo")
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
            )
        if 0 in (self.max_tokens, self.max_completion_tokens):
            raise bad_request("the token limit is 0; it must be at least 1", param="max_completion_tokens")

    def sampling_params(self) -> SamplingParams:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        wanted = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens=limit, logprobs=wanted, prompt_logprobs=self.prompt_logprobs)


class TokenizeRequest(_Body):
    """``POST /tokenize``: ``prompt``, or ``messages`` as for a chat."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_KWARGS)] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    """``POST /detokenize``."""

    model: Name | None = None
    tokens: AllowedTokenIds


def _not_supported(name: str, what_is: str = "leave it out") -> ApiError:
    return bad_request(f"{name} is not supported yet; {what_is}", param=name.split()[0], code="unsupported_parameter")
