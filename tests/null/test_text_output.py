"""The engine's tokens to text deltas, and requests from prompts."""

import functools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from isthmus.engine.messages import FinishReason, Logprobs, TokensOut, unpack_tokens
from isthmus.errors import InvalidRequest
from isthmus.sampling_params import SamplingParams
from isthmus.text.output import ChoiceStream, Delta
from isthmus.text.request import MAX_CACHE_SALT_BYTES, RequestBuilder
from isthmus.text.tokenizer import Tokenizer
from isthmus.text.tokenizer_parts import TokenizerParts

EOS = 256
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@functools.cache
def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """One token a byte, and an end of sequence."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    codec = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    codec.decoder = decoders.ByteLevel()
    codec.add_special_tokens(["<end>"])
    templates = {} if template is None else {"default": template}
    return Tokenizer(TokenizerParts(codec=codec, eos_token_ids=(EOS,), chat_templates=templates))


def out(ids: list[int], **values: object) -> TokensOut:
    return TokensOut(request_id=7, tokens=tuple(ids), **values)  # type: ignore[arg-type]


def drain(stream: ChoiceStream, messages: list[TokensOut]) -> list[Delta]:
    deltas = []
    for message in messages:
        deltas.append(stream.push(message))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def joined(deltas: list[Delta]) -> tuple[str, list[int], str | None, int | str | None]:
    ids = [token for delta in deltas for token in delta.token_ids]
    return "".join(delta.text for delta in deltas), ids, deltas[-1].finish_reason, deltas[-1].stop_reason


@given(
    text=st.text("abé🎉 \n", max_size=20),
    cut=st.integers(0, 3),
    stop=st.lists(st.text("abé🎉 \n", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    min_tokens=st.integers(0, 8),
    include=st.booleans(),
    with_eos=st.booleans(),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_stream_does_not_depend_on_messages(
    text: str, cut: int, stop: list[str], sizes: list[int], min_tokens: int, include: bool, with_eos: bool
) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    ids = ids[: max(len(ids) - cut, 0)] + [EOS] * with_eos
    params = SamplingParams(max_tokens=100, stop=tuple(stop), min_tokens=min_tokens, include_stop_str_in_output=include)
    last = (
        {"finish_reason": FinishReason.STOP, "stop_token": EOS} if with_eos else {"finish_reason": FinishReason.LENGTH}
    )
    whole = drain(ChoiceStream(tokenizer, params), [out(ids, **last)])
    pieces, at = [], 0
    while at < len(ids) or not pieces:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(out(ids[at : at + size], **(last if at + size >= len(ids) else {})))
        at += size
    assert joined(drain(ChoiceStream(tokenizer, params), pieces)) == joined(whole)
    if not stop:
        assert joined(whole)[0] == tokenizer.decode(ids)


def test_stop_string_asks_for_an_abort() -> None:
    tokenizer = byte_tokenizer()
    stream = ChoiceStream(tokenizer, SamplingParams(stop=("END",), max_tokens=50))
    ids = tokenizer.encode("one END two")
    assert stream.push(out(ids[:5])).text == "one "
    delta = stream.push(out(ids[5:]))
    assert (delta.text, delta.finish_reason, delta.stop_reason, delta.stopped_by_text) == ("", "stop", "END", True)
    assert list(delta.token_ids) == ids[5:7]  # none of those after the match
    assert stream.push(out([1, 2])) == Delta()
    assert stream.finished


def test_stop_string_in_the_engines_last_message_needs_no_abort() -> None:
    tokenizer = byte_tokenizer()
    stream = ChoiceStream(tokenizer, SamplingParams(stop=("b",)))
    delta = stream.push(out(tokenizer.encode("abc"), finish_reason=FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, delta.stop_reason, delta.stopped_by_text) == ("a", "stop", "b", False)


def test_stop_strings_wait_for_min_tokens() -> None:
    tokenizer = byte_tokenizer()
    stream = ChoiceStream(tokenizer, SamplingParams(stop=("b",), min_tokens=3))
    deltas = drain(stream, [out([token]) for token in tokenizer.encode("bbbab")])
    assert joined(deltas)[0] == "bbba"


def test_stop_token_is_not_text() -> None:
    tokenizer = byte_tokenizer()
    newline = tokenizer.encode("\n")[0]
    ids = [*tokenizer.encode("hi"), newline]
    ending = {"finish_reason": FinishReason.STOP, "stop_token": newline}
    params = SamplingParams(stop_token_ids=(newline,))
    delta = ChoiceStream(tokenizer, params).push(out(ids, **ending))
    assert (delta.text, list(delta.token_ids), delta.stop_reason) == ("hi", ids, newline)
    params = SamplingParams(stop_token_ids=(newline,), include_stop_str_in_output=True)
    assert ChoiceStream(tokenizer, params).push(out(ids, **ending)).text == "hi\n"


def test_end_of_sequence_has_no_stop_reason() -> None:
    stream = ChoiceStream(byte_tokenizer(), SamplingParams(skip_special_tokens=False))
    delta = stream.push(out([EOS], finish_reason=FinishReason.STOP, stop_token=EOS))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("", "stop", None)


def test_special_tokens_shown_on_request() -> None:
    for skip, text in ((True, ""), (False, "<end>")):
        stream = ChoiceStream(byte_tokenizer(), SamplingParams(skip_special_tokens=skip, ignore_eos=True))
        assert stream.push(out([EOS])).text == text


def test_logprobs_are_spelt() -> None:
    tokenizer = byte_tokenizer()
    first, second = tokenizer.encode("é")
    stream = ChoiceStream(tokenizer, SamplingParams(logprobs=2, prompt_logprobs=0))
    entry = Logprobs(first, -0.5, 2, ((second, -0.25), (first, -0.5)))
    delta = stream.push(out([first], logprobs=(entry,), prompt_logprobs=(None, Logprobs(second, -3.0, 9))))
    assert delta.text == ""
    assert delta.logprobs[0].bytes == b"\xc3" and delta.logprobs[0].text == "�" and delta.logprobs[0].rank == 2
    assert [top.token_id for top in delta.logprobs[0].top] == [second, first]
    assert delta.prompt_logprobs[0] is None and delta.prompt_logprobs[1] is not None
    assert delta.prompt_logprobs[1].logprob == -3.0
    stream.push(out([second], logprobs=(Logprobs(second, -0.25, 1),)))
    assert stream.cumulative_logprob == -0.75


def test_error_ends_a_choice_with_its_text() -> None:
    tokenizer = byte_tokenizer()
    stream = ChoiceStream(tokenizer, SamplingParams(stop=("xyz",)))
    assert stream.push(out(tokenizer.encode("ax"))).text == "a"
    delta = stream.push(out([], finish_reason=FinishReason.ERROR, error="the device failed"))
    assert (delta.text, delta.finish_reason, delta.error) == ("x", "error", "the device failed")


def test_a_choice_given_up_shows_what_was_held() -> None:
    tokenizer = byte_tokenizer()
    stream = ChoiceStream(tokenizer, SamplingParams(stop=("xyz",)))
    stream.push(out(tokenizer.encode("ax")))
    assert stream.finish() == Delta(text="x", finish_reason="abort")
    assert stream.finish() == Delta()


def test_without_a_tokenizer_there_are_ids() -> None:
    stream = ChoiceStream(None, SamplingParams(logprobs=0))
    delta = stream.push(out([5], logprobs=(Logprobs(5, -1.0, 1),), finish_reason=FinishReason.LENGTH))
    assert (delta.text, delta.token_ids, delta.logprobs[0].logprob) == ("", (5,), -1.0)


def builder(max_model_len: int = 32, **values: object) -> RequestBuilder:
    settings = {"tokenizer": byte_tokenizer(), "vocab_size": 300} | values
    return RequestBuilder(max_model_len=max_model_len, **settings)  # type: ignore[arg-type]


def test_requests_of_one_prompt() -> None:
    build = builder()
    ids = iter(range(40, 50))
    params = SamplingParams(n=3, seed=5, max_tokens=None, temperature=0.7)
    prompt = build.prompt("abc")
    requests = build.requests(prompt, params, lambda: next(ids), priority=-1, cache_salt=b"salt", arrival_s=3.0)
    assert [request.request_id for request in requests] == [40, 41, 42]
    assert [request.sampling.seed for request in requests] == [5, 6, 7]
    for request in requests:
        assert unpack_tokens(request.prompt).tolist() == byte_tokenizer().encode("abc")
        assert request.sampling.max_tokens == 29
        assert request.sampling.stop_token_ids == (EOS,)
        assert (request.priority, request.cache_salt, request.arrival_s) == (-1, b"salt", 3.0)


def test_max_tokens_is_held_to_the_room_left() -> None:
    build = builder()
    (request,) = build.requests(build.prompt("a" * 30), SamplingParams(max_tokens=1000, min_tokens=1000), lambda: 0)
    assert (request.sampling.max_tokens, request.sampling.min_tokens) == (2, 2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ("a" * 32, "has 32 tokens; this model takes 32.*shorten the prompt to 31"),
        ([1] * 50, "has 50 tokens"),
        ("a" * 10**6, "at least"),
        ([1, 300], "token id 300; this model's ids are 0 to 299"),
        ([1, -1], "token id -1"),
        ([1, 2**63], "token id 9223372036854775808"),
        ([1, True], "True, which is not a token id"),
        ([1, 2.0], "2.0, which is not a token id"),
        ([1, "2"], "not a token id"),
        ("\ud800", "surrogate"),
    ],
)
def test_bad_prompts(prompt: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        builder().prompt(prompt)  # type: ignore[arg-type]


def test_which_prompt_is_bad() -> None:
    with pytest.raises(InvalidRequest, match="prompt 2: the prompt is empty"):
        builder().prompts(["a", [1], ""])


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"stop_token_ids": (300,)}, "stop_token_ids"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"logit_bias": {300: 1.0}}, "logit_bias"),
        ({"bad_words": ("",)}, "bad_words"),
        ({"bad_words": ("a" * 65,)}, "bad_words"),
        ({"bad_words": ("a" * 10**6,)}, "bad_words"),
    ],
)
def test_bad_parameters(values: dict[str, object], param: str) -> None:
    build = builder()
    with pytest.raises(InvalidRequest) as caught:
        build.requests(build.prompt("a"), SamplingParams(**values), lambda: 0)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_cache_salt_is_bounded() -> None:
    build = builder()
    with pytest.raises(InvalidRequest, match="cache_salt"):
        build.requests(build.prompt("a"), SamplingParams(), lambda: 0, cache_salt=b"x" * (MAX_CACHE_SALT_BYTES + 1))


def test_bad_words_with_and_without_a_space() -> None:
    build = builder()
    encode = byte_tokenizer().encode
    (request,) = build.requests(build.prompt("a"), SamplingParams(bad_words=("no", " yes")), lambda: 0)
    assert [list(ids) for ids in request.sampling.bad_word_ids] == [encode("no"), encode(" no"), encode(" yes")]


def test_ends_of_sequence_outside_the_vocabulary_are_left_out() -> None:
    build = builder(vocab_size=256, eos_token_ids=(3, 999))
    (request,) = build.requests(build.prompt([1]), SamplingParams(), lambda: 0)
    assert request.sampling.stop_token_ids == (3,)


def test_chat_prompt() -> None:
    prompt = builder().chat([{"role": "u", "content": "hi"}])
    assert prompt.text == "<u>hi<a>"
    assert byte_tokenizer().decode(prompt.token_ids) == "<u>hi<a>"


def test_chat_without_a_template() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        builder(tokenizer=byte_tokenizer(None)).chat([{"role": "u", "content": "hi"}])


def test_echo() -> None:
    build = builder()
    assert build.echo(build.prompt("hello"), SamplingParams()) == "hello"
    assert build.echo(build.prompt(byte_tokenizer().encode("héllo")), SamplingParams()) == "héllo"


@pytest.mark.parametrize("values", [{"stop": ("x",)}, {"bad_words": ("x",)}])
def test_text_without_a_tokenizer(values: dict[str, object]) -> None:
    build = builder(tokenizer=None)
    assert build.prompt([1, 2]).token_ids == [1, 2]
    with pytest.raises(InvalidRequest, match="tokenizer"):
        build.prompt("text")
    with pytest.raises(InvalidRequest, match="tokenizer"):
        build.requests(build.prompt([1]), SamplingParams(**values), lambda: 0)  # type: ignore[arg-type]
