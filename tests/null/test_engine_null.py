"""The null executor itself: a plan that a device could only serve wrongly is refused, each for its own reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from isthmus.config import BackendOptions, EngineOptions, ModelOptions
from isthmus.contract import Limits
from isthmus.engine.local import LocalEngine
from isthmus.engine.messages import AddRequest, TokensOut, pack_tokens
from isthmus.plan import RowStart, StepPlan
from isthmus.sampling_params import RowSampling
from isthmus.testing.null import NullBehaviour, NullExecutor, PlanViolation
from isthmus.testing.null_executor import prefix_hashes
from isthmus.testing.toy_model import EOS_TOKEN, VOCAB_SIZE, write_toy_model

LIMITS = Limits(max_rows=4, max_tokens=32, max_model_len=64, block_size=4, num_blocks=16, vocab_size=VOCAB_SIZE)
PROMPT = np.arange(40, 46, dtype=np.int32)


def ints(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


def start(row: int = 0, tokens: np.ndarray[Any, Any] = PROMPT, **sampling: Any) -> RowStart:
    return RowStart(
        row=row, tokens=tokens, num_prompt_tokens=len(tokens), sampling=RowSampling(max_tokens=9, **sampling)
    )


def first_step(**changes: Any) -> StepPlan:
    """Row 0 computes its prompt of 6 tokens in blocks 5 and 7, and samples."""
    plan = StepPlan(
        step=0,
        starts=(start(),),
        block_rows=ints(0, 0),
        block_indices=ints(0, 1),
        block_ids=ints(5, 7),
        span_rows=ints(0),
        span_starts=ints(0),
        span_lengths=ints(6),
        span_samples=np.array([True]),
    )
    return replace(plan, **changes)


def next_step(**changes: Any) -> StepPlan:
    """Row 0 computes the token that the first step sampled."""
    plan = StepPlan(step=1, span_rows=ints(0), span_starts=ints(6), span_lengths=ints(1), span_samples=np.array([True]))
    return replace(plan, **changes)


def executor(**behaviour: Any) -> NullExecutor:
    return NullExecutor(LIMITS, NullBehaviour(thorough=True, **behaviour))


def test_good_plans_run() -> None:
    device = executor()
    device.submit(first_step())
    device.submit(next_step())
    first, second = device.collect(), device.collect()
    assert (first.step, second.step) == (0, 1)
    assert first.rows.tolist() == [0] and first.tokens.shape == (1, 1) and not first.invalid.any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"starts": ()}, "never started"),
        ({"starts": (start(4),)}, "row 4 started, of 4"),
        ({"starts": (start(tokens=np.zeros(65, np.int32)),)}, "started with 65 tokens"),
        ({"starts": (start(tokens=np.zeros(0, np.int32)),)}, "started with 0 tokens"),
        ({"block_ids": ints(5, 0)}, "out of range"),
        ({"block_ids": ints(5, 16)}, "out of range"),
        ({"block_ids": ints(5, 5)}, "holds a block twice"),
        ({"block_indices": ints(0, 2)}, "hole"),
        ({"block_indices": ints(0, 0)}, "set twice in a step"),
        ({"block_indices": ints(0, 16)}, "over its end"),
        ({"block_rows": ints(0, 1)}, "a row that was never started"),
        ({"block_rows": ints(0), "block_indices": ints(0), "block_ids": ints(5)}, "over its blocks"),
        ({"span_lengths": ints(0)}, "a span is empty"),
        ({"span_lengths": ints(7)}, "over the tokens known"),
        ({"span_lengths": ints(5)}, "sampled before the last token known"),
        ({"span_starts": ints(4), "span_lengths": ints(2)}, "does not hold their prefix"),
        ({"span_samples": np.array([True, True])}, "differ in length"),
        (
            {
                "span_rows": ints(0, 0),
                "span_starts": ints(0, 0),
                "span_lengths": ints(3, 3),
                "span_samples": np.array([False, False]),
            },
            "appears twice",
        ),
        (
            {
                "span_rows": ints(),
                "span_starts": ints(),
                "span_lengths": ints(),
                "span_samples": np.array([], np.bool_),
            },
            "no spans",
        ),
    ],
)
def test_bad_first_plans(changes: dict[str, Any], says: str) -> None:
    device = executor()
    with pytest.raises(PlanViolation, match=says):
        # The second step is there for what shows only when the context is read.
        device.submit(first_step(**changes))
        device.submit(next_step())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"span_starts": ints(5)}, "computed so far"),
        ({"span_starts": ints(7)}, "computed so far"),
        ({"span_lengths": ints(2)}, "over the tokens known"),
        ({"span_rows": ints(1)}, "never started"),
        ({"block_rows": ints(0), "block_indices": ints(1), "block_ids": ints(9)}, "does not hold"),
        ({"block_rows": ints(0), "block_indices": ints(0), "block_ids": ints(9)}, "does not hold"),
    ],
)
def test_bad_second_plans(changes: dict[str, Any], says: str) -> None:
    device = executor()
    device.submit(first_step())
    with pytest.raises(PlanViolation, match=says):
        device.submit(next_step(**changes))


def test_too_many_steps_in_flight() -> None:
    device = executor()
    device.submit(first_step())
    device.submit(next_step())
    with pytest.raises(PlanViolation, match="more steps are in flight"):
        device.submit(next_step(step=2, span_starts=ints(7)))


def test_a_block_given_to_another_row_too_early_is_seen() -> None:
    device = executor()
    device.submit(first_step())
    thief = first_step(
        step=1, starts=(start(1, PROMPT + 1),), block_rows=ints(1, 1), block_ids=ints(8, 5), span_rows=ints(1)
    )
    device.submit(thief)
    device.collect()
    with pytest.raises(PlanViolation, match="does not hold"):
        device.submit(next_step(step=2))


def test_a_shared_prefix_may_be_used_and_a_wrong_one_may_not() -> None:
    device = executor()
    device.submit(first_step())
    shared = first_step(
        step=1,
        starts=(start(1),),
        block_rows=ints(1, 1),
        block_ids=ints(5, 9),
        span_rows=ints(1),
        span_starts=ints(4),
        span_lengths=ints(2),
    )
    device.submit(shared)
    assert device.collect().tokens.tolist() == device.collect().tokens.tolist()
    with pytest.raises(PlanViolation, match="does not hold their prefix"):
        wrong = start(2, PROMPT[::-1].copy())
        device.submit(replace(shared, step=2, starts=(wrong,), block_rows=ints(2, 2), span_rows=ints(2)))


def test_hashes_are_of_prefixes() -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 300, dtype=np.int32)
    hashes = prefix_hashes(tokens)
    assert len(np.unique(hashes)) == 301
    for count in (0, 1, 2, 299, 300):
        assert prefix_hashes(tokens[:count])[-1] == hashes[count]


def generate(sampling: RowSampling, prompt: bytes = b"hello", **null: object) -> list[TokensOut]:
    options = EngineOptions(
        model=ModelOptions(model="toy"),
        backend=BackendOptions(device="null", options={name: str(value) for name, value in null.items()}),
    )
    engine = LocalEngine.start(options)
    brought = list(engine.generate([AddRequest(request_id=0, prompt=pack_tokens(list(prompt)), sampling=sampling)]))
    engine.close()
    return brought


def tokens(items: list[TokensOut]) -> list[int]:
    return [token for item in items for token in item.tokens]


def test_sampling_parameters_that_a_server_is_tested_with() -> None:
    greedy = tokens(generate(RowSampling(max_tokens=50)))
    assert greedy == tokens(generate(RowSampling(max_tokens=50)))
    assert all(32 <= token < 127 or token == EOS_TOKEN for token in greedy)
    seeded = [tokens(generate(RowSampling(max_tokens=50, temperature=1.0, seed=seed))) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] and len({tuple(t) for t in (greedy, *seeded)}) == 3
    assert set(tokens(generate(RowSampling(max_tokens=50, allowed_token_ids=(65, 66))))) == {65, 66}
    ends = generate(RowSampling(max_tokens=400, stop_token_ids=(EOS_TOKEN,)), eos_every=4)
    assert ends[-1].stop_token == EOS_TOKEN and len(tokens(ends)) < 40
    assert (
        len(tokens(generate(RowSampling(max_tokens=400, min_tokens=60, stop_token_ids=(EOS_TOKEN,)), eos_every=4)))
        >= 60
    )


def test_log_probabilities_come_in_number_and_order() -> None:
    items = generate(RowSampling(max_tokens=4, num_logprobs=2, num_prompt_logprobs=1), b"hello")
    logprobs = [entry for item in items for entry in item.logprobs]
    assert [entry.token for entry in logprobs] == tokens(items)
    assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in logprobs)
    prompt = [entry for item in items for entry in item.prompt_logprobs]
    assert prompt[0] is None and [entry.token for entry in prompt[1:] if entry] == list(b"ello")


def test_the_toy_model_is_a_byte_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_toy_model(tmp_path / "toy") / "tokenizer.json"))
    text = "naïve 日本語\n\t\x00<s>"
    assert tokenizer.encode(text).ids == [*text[:-3].encode(), 256]
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.decode(list("naïve 日本語".encode())) == "naïve 日本語"
