"""The compiled sampling against the reference's, row for row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.contract import Limits, Sampled, StepShape
from isthmus.errors import BackendUnavailable
from isthmus.plan import RowStart, StepPlan
from isthmus.reference import ReferenceInputs, ReferenceSampling
from isthmus.sampling_params import RowSampling
from isthmus_cpu.build import kernels_library
from isthmus_cpu.inputs import PanelInputs
from isthmus_cpu.library import Library, Pool
from isthmus_cpu.runner import Runner
from isthmus_cpu.sampling import PanelSampling

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def compiled() -> Iterator[PanelSampling]:
    try:
        library = Library(kernels_library())
    except BackendUnavailable as error:
        pytest.skip(str(error))
    pool = Pool(library, 2)
    yield PanelSampling(Runner(pool), PanelInputs(library))
    pool.close()


def sample(
    part: PanelSampling | ReferenceSampling, logits: Tensor, parameters: list[dict[str, Any]], num_logprobs: int = -1
) -> tuple[Sampled, Tensor]:
    """And the history of each row, with the new token in it."""
    rows, vocab = logits.shape
    limits = Limits(max_rows=rows, max_tokens=rows * 8, max_model_len=40, block_size=16, num_blocks=2, vocab_size=vocab)
    inputs_part = part._inputs if isinstance(part, PanelSampling) else ReferenceInputs(CPU)
    device, state = inputs_part.allocate(limits), part.allocate(limits)
    history = np.random.default_rng(0).integers(0, min(vocab, 30), size=(rows, 12)).astype(np.int32)
    lengths = np.array([3 + row % 9 for row in range(rows)], np.int32)
    plan = StepPlan(
        step=0,
        starts=tuple(
            RowStart(
                row=row,
                tokens=history[row, : lengths[row]],
                num_prompt_tokens=min(5, int(lengths[row])),
                sampling=RowSampling(max_tokens=100, **parameters[row]),
            )
            for row in range(rows)
        ),
        span_rows=np.arange(rows, dtype=np.int32),
        span_starts=lengths - 1,
        span_lengths=np.ones(rows, np.int32),
        span_samples=np.ones(rows, np.bool_),
    )
    inputs_part.upload(plan, device)
    part.apply(state, plan)
    inputs = inputs_part.build(device, StepShape(rows, rows, rows))
    sampled = part.sample(logits.clone(), inputs, device, state, num_logprobs)
    copies = {name: getattr(sampled, name) for name in Sampled.__slots__}
    kept = {name: None if value is None else value.clone() for name, value in copies.items()}
    return Sampled(**kept), device.tokens[:rows].clone()


def compare(
    compiled: PanelSampling, logits: Tensor, parameters: list[dict[str, Any]], num_logprobs: int = -1
) -> Sampled:
    ours, our_history = sample(compiled, logits, parameters, num_logprobs)
    theirs, history = sample(ReferenceSampling(CPU), logits, parameters, num_logprobs)
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.invalid.tolist() == theirs.invalid.tolist()
    assert torch.equal(our_history, history)
    for name in ("chosen_logprobs", "ranks", "top_ids", "top_logprobs"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if other is None:
            assert mine is None
        else:
            good = ~theirs.invalid
            torch.testing.assert_close(mine[good], other[good], rtol=1e-5, atol=1e-5)
    return ours


def random_logits(rows: int, vocab: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 2.0, "top_k": 700},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 500, "top_p": 0.97, "min_p": 0.01},
    {"temperature": 1.0, "top_p": 0.95, "min_p": 0.3},
]


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("vocab", [5, 1003, 20000])
def test_cuts(compiled: PanelSampling, scale: float, vocab: int) -> None:
    cuts = [cut for cut in CUTS if cut.get("top_k", 0) < vocab]
    parameters = [{**cut, "seed": 3 + 1000 * n} for n in range(4) for cut in cuts]
    compare(compiled, random_logits(len(parameters), vocab, scale), parameters)


def test_adjusted_rows_among_others(compiled: PanelSampling) -> None:
    parameters: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "seed": 5},
        {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2},
        {"logit_bias": ((7, 50.0),)},
        {"temperature": 1.0, "allowed_token_ids": (3, 8, 90), "seed": 9},
        {"bad_word_ids": ((4,),)},
        {"min_tokens": 50, "stop_token_ids": (1, 2)},
    ]
    for num_logprobs in (-1, 0, 3):
        compare(compiled, random_logits(8, 100, 2.0), parameters, num_logprobs)


def test_equal_logits(compiled: PanelSampling) -> None:
    logits = torch.zeros(4, 60)
    logits[2, 30:] = -2.0
    parameters = [{}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "top_p": 0.1}, {"temperature": 1.0}]
    compare(compiled, logits, [{**p, "seed": 1} for p in parameters])


def test_bad_rows_are_invalid_and_harm_nobody(compiled: PanelSampling) -> None:
    logits = random_logits(6, 70, 2.0)
    logits[1, 3] = NAN
    logits[2] = -INF
    logits[3, 4:] = -INF
    logits[4, 69] = INF
    for parameters in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"repetition_penalty": 2.0}):
        sampled = compare(compiled, logits, [parameters] * 6, num_logprobs=2)
        assert sampled.invalid.tolist() == [False, True, True, False, True, False]
    allowed = {"allowed_token_ids": (5,)}
    assert compare(compiled, logits, [allowed] * 6).invalid.tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("num_logprobs", [0, 1, 5, 20])
def test_logprobs(compiled: PanelSampling, num_logprobs: int) -> None:
    parameters = [{}, {"temperature": 1.0, "seed": 4}] * 5
    compare(compiled, random_logits(10, 333, 3.0), parameters, num_logprobs)


def test_prompt_logprobs(compiled: PanelSampling) -> None:
    logits = random_logits(7, 500, 3.0)
    following = torch.tensor([0, 499, 3, 44, 5, 66, 77], dtype=torch.int32)
    ours = compiled.prompt_logprobs(logits, following, 4)
    theirs = ReferenceSampling(CPU).prompt_logprobs(logits, following, 4)
    for name in ("tokens", "invalid", "chosen_logprobs", "ranks", "top_ids", "top_logprobs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)
