"""Bounds of what a caller may ask for, and the numbers that come of it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from isthmus.errors import InvalidRequest
from isthmus.sampling_params import MAX_SEED, RowSampling, SamplingParams

OUT_OF_BOUNDS: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 129),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 10**9 * 10),
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("temperature", 100.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", -2),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", math.nan),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", 21),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("stop", ("",)),
    ("stop", ("x" * 513,)),
    ("stop", ("x",) * 17),
    ("stop_token_ids", tuple(range(129))),
    ("bad_words", ("x",) * 257),
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ("logit_bias", {1: 100.5}),
    ("logit_bias", {1: math.nan}),
    ("allowed_token_ids", ()),
]
AT_THE_BOUND: list[tuple[str, Any]] = [
    ("n", 128),
    ("max_tokens", None),
    ("max_tokens", 2**31 - 1),
    ("temperature", 0.0),
    ("temperature", 100.0),
    ("top_k", -1),
    ("top_k", 0),
    ("top_p", 1.0),
    ("top_p", 1e-9),
    ("min_p", 1.0),
    ("repetition_penalty", 100.0),
    ("presence_penalty", -2.0),
    ("logprobs", 0),
    ("logprobs", 20),
    ("prompt_logprobs", 20),
    ("seed", MAX_SEED),
    ("seed", -(2**63)),
    ("stop", ("x" * 512,) * 16),
    ("stop_token_ids", tuple(range(128))),
    ("bad_words", ("x",) * 256),
    ("logit_bias", dict.fromkeys(range(1024), -100.0)),
    ("allowed_token_ids", (0,)),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_BOUNDS, ids=lambda value: str(value)[:20])
def test_out_of_bounds_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as raised:
        SamplingParams(**{name: value})
    assert raised.value.param == name


@pytest.mark.parametrize(("name", "value"), AT_THE_BOUND, ids=lambda value: str(value)[:20])
def test_bounds_belong_to_the_range(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == value
    assert isinstance(params.resolve(vocab_size=2000, max_tokens=10), RowSampling)


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidRequest) as raised:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert raised.value.param == "min_tokens"
    assert SamplingParams(min_tokens=5, max_tokens=None).min_tokens == 5


def test_bounds_hold_when_decoded_too() -> None:
    """msgspec calls the same check, so that no path from a socket avoids it."""
    with pytest.raises((InvalidRequest, msgspec.ValidationError)):
        msgspec.json.decode(b'{"top_p": 7}', type=SamplingParams)


def resolve(**fields: Any) -> RowSampling:
    return SamplingParams(**fields).resolve(vocab_size=100, max_tokens=50, eos_token_ids=(2, 7))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("stop_token_ids", {"stop_token_ids": (100,)}),
        ("stop_token_ids", {"stop_token_ids": (-1,)}),
        ("allowed_token_ids", {"allowed_token_ids": (3, 100)}),
        ("logit_bias", {"logit_bias": {-5: 1.0}}),
    ],
)
def test_ids_outside_the_vocabulary(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="0 to 99") as raised:
        resolve(**fields)
    assert raised.value.param == name


def test_max_tokens_is_bounded_by_the_room_left() -> None:
    assert resolve(max_tokens=None).max_tokens == 50
    assert resolve(max_tokens=60).max_tokens == 50
    assert resolve(max_tokens=20).max_tokens == 20
    assert resolve(max_tokens=None, min_tokens=70).min_tokens == 50


def test_stop_tokens() -> None:
    assert resolve().stop_token_ids == (2, 7)
    assert resolve(stop_token_ids=(7, 9)).stop_token_ids == (7, 9, 2)
    assert resolve(stop_token_ids=(9,), ignore_eos=True).stop_token_ids == (9,)


def test_greedy_has_neutral_cuts() -> None:
    row = resolve(temperature=1e-6, top_k=3, top_p=0.4, min_p=0.2)
    assert (row.temperature, row.top_k, row.top_p, row.min_p) == (0.0, 0, 1.0, 0.0)


@pytest.mark.parametrize(("asked", "given"), [(-1, 0), (0, 0), (5, 5), (99, 99), (100, 0), (10**6, 0)])
def test_a_top_k_that_keeps_everything_is_0(asked: int, given: int) -> None:
    assert resolve(top_k=asked).top_k == given


def test_seeds() -> None:
    params = SamplingParams(seed=MAX_SEED, n=3)
    seeds = [params.resolve(vocab_size=9, max_tokens=9, index=i).seed for i in range(3)]
    assert seeds == [MAX_SEED, 0, 1]
    assert resolve(seed=-3).seed == 2**63 - 3
    drawn = {resolve().seed for _ in range(20)}
    assert len(drawn) == 20 and all(0 <= seed < 2**63 for seed in drawn)


def test_log_probabilities() -> None:
    assert (resolve().num_logprobs, resolve().num_prompt_logprobs) == (-1, -1)
    assert (resolve(logprobs=0).num_logprobs, resolve(prompt_logprobs=4).num_prompt_logprobs) == (0, 4)


def test_history_is_needed_for_penalties_and_bad_words_alone() -> None:
    assert not resolve(temperature=0.5, logit_bias={1: 2.0}, allowed_token_ids=(1, 2), min_tokens=3).needs_history
    for fields in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}):
        assert resolve(**fields).needs_history
    words = SamplingParams().resolve(vocab_size=9, max_tokens=9, bad_word_ids=[[1] * 70, [2]])
    assert words.needs_history
    assert [len(word) for word in words.bad_word_ids] == [64, 1]


def test_a_row_travels_as_msgpack() -> None:
    row = resolve(temperature=0.5, logit_bias={3: 1.5}, stop_token_ids=(4,), seed=5, logprobs=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=RowSampling) == row
