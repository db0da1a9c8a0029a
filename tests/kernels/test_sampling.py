"""Sampling against the reference: the same tokens, for every parameter, and fair draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from isthmus.contract import Limits, StepShape
from isthmus.plan import RowStart, StepPlan
from isthmus.reference import ReferenceInputs, ReferenceSampling
from isthmus.reference.noise import gumbel_noise, row_keys, token_keys
from isthmus.sampling_params import RowSampling
from isthmus_triton.kernels.logprobs import log_probabilities
from isthmus_triton.kernels.noise import gumbel, row_key
from isthmus_triton.kernels.sample import BEST_OF_SLICES, FOUND, REFUSED, STATUS
from isthmus_triton.launch import FALLBACK, SamplingLaunch
from isthmus_triton.sampling import TritonSampling

VOCAB = 300
LIMITS = Limits(max_rows=12, max_tokens=64, max_model_len=64, block_size=16, num_blocks=40, vocab_size=VOCAB)


class Both:
    """The reference and ours over one plan whose rows have ``history`` tokens, ``prompt`` of them prompt."""

    def __init__(
        self,
        device: torch.device,
        rows: list[dict[str, Any]],
        history: int = 20,
        prompt: int = 12,
        limits: Limits = LIMITS,
        launch: SamplingLaunch = FALLBACK.sampling,
    ) -> None:
        rng = np.random.default_rng(0)
        self.device = device
        inputs = ReferenceInputs(device)
        self.states = [inputs.allocate(limits) for _ in range(2)]
        starts = tuple(
            RowStart(
                row=row,
                tokens=rng.integers(0, 30, history).astype(np.int32),
                num_prompt_tokens=prompt,
                sampling=RowSampling(max_tokens=99, **parameters),
            )
            for row, parameters in enumerate(rows)
        )
        count = len(rows)
        self.plan = StepPlan(
            step=0,
            starts=starts,
            span_rows=np.arange(count, dtype=np.int32),
            span_starts=np.full(count, history - 1, np.int32),
            span_lengths=np.ones(count, np.int32),
            span_samples=np.ones(count, np.bool_),
        )
        for state in self.states:
            inputs.upload(self.plan, state)
        self.samplers = [ReferenceSampling(device), TritonSampling(device, replace(FALLBACK, sampling=launch))]
        self.parameters = [sampler.allocate(limits) for sampler in self.samplers]
        for sampler, parameters in zip(self.samplers, self.parameters, strict=True):
            sampler.apply(parameters, self.plan)
        self.inputs = inputs.build(self.states[0], StepShape(count + 2, count + 1, count + 1))
        self.history = history

    def sample(self, logits: torch.Tensor, num_logprobs: int = -1) -> tuple[Any, Any]:
        """(expected, ours), the padding row left out; both have written the tokens to their histories."""
        padded = torch.cat((logits, torch.zeros(1, logits.shape[1]))).to(self.device)
        found = []
        for sampler, state, parameters in zip(self.samplers, self.states, self.parameters, strict=True):
            found.append(sampler.sample(padded.clone(), self.inputs, state, parameters, num_logprobs))
            written = state.tokens[: len(logits), self.history]
            assert torch.equal(written, found[-1].tokens[: len(logits)])
        return found[0], found[1]

    def check(self, logits: torch.Tensor) -> None:
        expected, ours = self.sample(logits)
        assert ours.tokens.tolist() == expected.tokens.tolist()
        assert ours.invalid.tolist() == expected.invalid.tolist()
        # Scratch is left as it was found.
        assert not self.parameters[1].seen_bits.any()


def logits_for(rows: int, seed: int = 0, scale: float = 2.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


CUTS = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.02, 2.0, 12.0])
def test_cuts_draw_the_references_tokens(device: torch.device, seed: int, scale: float) -> None:
    rows = [{**cut, "seed": seed * 1000 + index * 77 + 2**40} for index, cut in enumerate(CUTS)]
    Both(device, rows).check(logits_for(len(rows), seed, scale))


FLAT = [{"temperature": 1.0, "top_p": top_p} for top_p in (0.9, 0.5, 0.2, 0.05, 0.01, 0.003)]
CHAIN_ROWS = [{**row, "seed": seed} for row, seed in zip(FLAT * 2, range(12), strict=True)]
SMALL_SLICES = {"SLICE": 128, "GROUP": 16}


def refused_candidates(x: torch.Tensor, row: dict[str, Any], position: int) -> int:
    """How many of a row's largest perturbed tokens, each above the one before it, ``min_p`` and ``top_p`` refuse."""
    keys = torch.from_numpy(row_keys(np.array([row["seed"]], np.int64), np.array([position], np.int32)))
    x = x / row["temperature"]
    score = x + gumbel_noise(keys, token_keys(torch.arange(len(x), dtype=torch.int32)))
    floor = x.max() + np.log(row["min_p"]) if "min_p" in row else x.min()
    mass = torch.where(x >= floor, (x - x.max()).exp(), 0.0)
    count = 0
    while True:
        candidate = x[score.argmax()]
        above = x > candidate
        if candidate >= floor and mass[above].sum() < row["top_p"] * mass.sum():
            return count
        count += 1
        score = score.masked_fill(~(above & (x >= floor)), float("-inf"))


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_candidates_are_refused_many_times_over(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    """By rounds over slices as far as there are rounds, by sweeps beyond them: the same tokens."""
    for name, value in SMALL_SLICES.items():
        monkeypatch.setattr(f"isthmus_triton.sampling.{name}", value)
    # Fewer programs than a round has slices to go through.
    launch = SamplingLaunch(rounds=rounds, round_programs=3, first_programs=5, block=64)
    lengths: set[int] = set()
    for seed in range(2):
        rows = [{**row, "seed": seed * 100 + row["seed"]} for row in CHAIN_ROWS[:11]]
        logits = logits_for(len(rows), seed, 0.5)
        both = Both(device, rows, launch=launch)
        both.check(logits)
        lengths |= {refused_candidates(x, row, both.history) for x, row in zip(logits, rows, strict=True)}
    assert lengths >= set(range(6)), f"too easy: {sorted(lengths)}"


def test_rounds_settle_the_rows_that_they_are_enough_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round finds a candidate and the next one checks it, so ``n`` rounds are enough for less than ``n`` refused."""
    for name, value in SMALL_SLICES.items():
        monkeypatch.setattr(f"isthmus_triton.sampling.{name}", value)
    seen: set[int] = set()
    for seed in range(2):
        rows: list[dict[str, Any]] = [{**row, "seed": seed * 100 + row["seed"]} for row in CHAIN_ROWS[:10]]
        rows.append({"temperature": 1.0, "min_p": 0.9, "top_p": 0.999, "seed": seed})
        logits = logits_for(len(rows), seed, 0.5)
        both = Both(device, rows, launch=SamplingLaunch(rounds=3, block=64))
        state, padded = both.states[1], torch.cat((logits, torch.zeros(1, VOCAB))).to(device)
        scratch = torch.empty(len(padded), dtype=torch.int32, device=device)
        launches = both.samplers[1]._launches(padded, scratch, scratch.bool(), both.inputs, state, both.parameters[1])
        for launch in launches[:-1]:
            launch.run()
        words = launches[1].arguments[3]
        statuses = words[: len(rows), STATUS.value].tolist()
        for status, x, row in zip(statuses, logits, rows, strict=True):
            refused = refused_candidates(x, row, both.history)
            seen.add(refused)
            expected = BEST_OF_SLICES if refused == 0 else FOUND if refused < 3 else REFUSED
            assert status == expected.value, f"{row}: {refused} candidates refused"
    assert seen >= set(range(5))


@pytest.mark.parametrize("seed", range(2))
def test_vocabularies_of_several_slices(device: torch.device, seed: int) -> None:
    """The last one partly filled; every way to cut, and rows that cannot be sampled among them."""
    vocab = 2 * 8192 + 3000
    limits = replace(LIMITS, vocab_size=vocab)
    rows = [{**cut, "seed": seed + index} for index, cut in enumerate([*CUTS, *FLAT[1:4]])]
    rows.append({"temperature": 0.6, "top_p": 0.4, "min_p": 0.3, "seed": seed})
    logits = logits_for(len(rows), seed, 1.0, vocab)
    logits[8, 17000] = float("nan")
    Both(device, rows, limits=limits).check(logits)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_what_noise_cannot_lift_is_ruled_out_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """Many small blocks, most of them skipped, for logits of every size; also below all that are not masked."""
    for name, value in SMALL_SLICES.items():
        monkeypatch.setattr(f"isthmus_triton.sampling.{name}", value)
    rows = [{"temperature": (0.7, 1.0, 1.9)[seed % 3], "seed": seed} for seed in range(11)]
    for seed in range(2):
        logits = logits_for(len(rows), seed, scale)
        logits[seed, 20:] = float("-inf")
        logits[seed + 1, :280] = -1e30
        Both(device, rows, launch=SamplingLaunch(block=32)).check(logits)


def test_more_tokens_than_are_collected(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there are more ties than room, or a larger k than groups, sweeps find the same threshold."""
    monkeypatch.setattr("isthmus_triton.sampling.MOST_COLLECTED", 16)
    rows = [{**cut, "seed": index} for index, cut in enumerate(CUTS)]
    Both(device, rows).check(logits_for(len(rows), 6).round())
    Both(device, rows).check(torch.ones(len(rows), VOCAB))


def test_ties_at_a_cut_stay(device: torch.device) -> None:
    """Logits of a few distinct values: a cut falls between equal ones everywhere."""
    rows = [{**cut, "seed": index} for index, cut in enumerate(CUTS)]
    Both(device, rows).check(logits_for(len(rows), 5).round())


ADJUSTMENTS: list[dict[str, Any]] = [
    {"logit_bias": ((3, 50.0), (7, -50.0))},
    {"allowed_token_ids": (4, 250, 31, 32)},
    {"min_tokens": 20, "stop_token_ids": (1, 2, 299)},
    {"min_tokens": 3, "stop_token_ids": (1, 2, 299)},
    {"repetition_penalty": 1.8},
    {"frequency_penalty": 0.7, "presence_penalty": 0.4},
    {"repetition_penalty": 0.6, "presence_penalty": -1.0, "logit_bias": ((5, 1.0),), "allowed_token_ids": (5, 6, 9)},
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_adjustments(device: torch.device, temperature: float, seed: int) -> None:
    rows = [{**row, "temperature": temperature, "seed": seed} for row in ADJUSTMENTS]
    logits = logits_for(len(rows), seed)
    logits[2:4, 299] = 30.0  # would be sampled if it were not banned
    Both(device, rows).check(logits)


def test_bad_words_end_where_they_would_be_completed(device: torch.device) -> None:
    both = Both(device, [{"bad_word_ids": ((9,), (11, 12, 5), (13, 6))}, {"bad_word_ids": ((11, 12, 5),)}])
    for state in both.states:
        state.tokens[0, 18:20] = torch.tensor([11, 12], dtype=torch.int32)
        state.tokens[1, 18:20] = torch.tensor([12, 12], dtype=torch.int32)
    logits = logits_for(2)
    logits[:, 9], logits[:, 5], logits[:, 6], logits[:, 8] = 40.0, 39.0, 38.0, 37.0
    both.check(logits)
    assert both.states[1].tokens[:2, both.history].tolist() == [6, 9]


def test_what_cannot_be_sampled_is_invalid(device: torch.device) -> None:
    """Not its neighbours, and also where a mask hides the NaN."""
    rows: list[dict[str, Any]] = [
        {},
        {},
        {"temperature": 1.0},
        {"allowed_token_ids": (1,)},
        {},
        {"top_k": 3, "temperature": 1.0},
    ]
    logits = logits_for(len(rows))
    logits[1, 200] = float("nan")
    logits[2, :] = float("-inf")
    logits[3, 50] = float("nan")
    logits[4, 3] = float("inf")
    both = Both(device, rows)
    both.check(logits)
    _, ours = both.sample(logits)
    assert ours.invalid.tolist() == [False, True, True, True, True, False, False]


@pytest.mark.parametrize("num_logprobs", [0, 5])
def test_logprobs_are_of_the_models_own_logits(device: torch.device, num_logprobs: int) -> None:
    rows = [{"temperature": 1.0, "logit_bias": ((3, 9.0),), "num_logprobs": num_logprobs}, {"temperature": 0.0}]
    expected, ours = Both(device, rows).sample(logits_for(2), num_logprobs)
    for name in ("chosen_logprobs", "ranks", "top_ids", "top_logprobs"):
        torch.testing.assert_close(getattr(ours, name)[:2], getattr(expected, name)[:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("vocab", "count"), [(300, 20), (9000, 5), (9000, 32), (4096, 0), (20, 20), (4097, 3)])
def test_log_probabilities(device: torch.device, vocab: int, count: int) -> None:
    logits = logits_for(3, vocab=vocab, scale=5.0).to(device)
    logits[0, : vocab // 2] = float("-inf")
    tokens = torch.tensor([vocab - 1, int(logits[1].argmax()), 7], dtype=torch.int32, device=device)
    chosen, ranks, ids, logprobs = log_probabilities(logits, tokens, count)
    expected = torch.log_softmax(logits, -1)
    own = expected.gather(1, tokens.long()[:, None])
    torch.testing.assert_close(chosen, own[:, 0], atol=2e-5, rtol=1e-5)
    assert ranks.tolist() == ((expected > own).sum(-1) + 1).tolist() and ranks[1] == 1
    top, places = torch.topk(expected, count)
    if vocab > 20:
        assert ids.tolist() == places.tolist()
    torch.testing.assert_close(logprobs, top, atol=2e-5, rtol=1e-5)
    assert all(len(set(row)) == count for row in ids.tolist())


def test_the_likeliest_of_equals_are_the_lowest(device: torch.device) -> None:
    logits = torch.zeros(1, 5000, device=device)
    logits[0, [17, 4999, 4095, 4096]] = 1.0
    _, ranks, ids, _ = log_probabilities(logits, torch.tensor([4999], dtype=torch.int32, device=device), 6)
    assert ids.tolist() == [[17, 4095, 4096, 4999, 0, 1]] and ranks.tolist() == [1]


def test_more_log_probabilities_than_are_found_without_a_sort(device: torch.device) -> None:
    rows = [{"temperature": 0.0, "num_logprobs": 40}]
    expected, ours = Both(device, rows).sample(logits_for(1), 40)
    assert ours.top_ids[0].tolist() == expected.top_ids[0].tolist()
    torch.testing.assert_close(ours.top_logprobs[:1], expected.top_logprobs[:1], atol=1e-5, rtol=1e-5)


def test_draws_are_fair(device: torch.device, interpreted: bool) -> None:
    """Chi-square of many draws from a cut row, one a position."""
    probabilities = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    logits = torch.full((8, VOCAB), -20.0)
    logits[:, 100:106] = probabilities.log()
    counts = torch.zeros(VOCAB)
    rounds = 15 if interpreted else 500
    for draw in range(rounds):
        rows = [{"temperature": 1.0, "top_p": 0.93, "seed": draw * 8 + row} for row in range(8)]
        _, ours = Both(device, rows).sample(logits)
        counts += torch.bincount(ours.tokens[:8].long().cpu(), minlength=VOCAB)
    kept = probabilities[:5] / probabilities[:5].sum()
    expected = kept * rounds * 8
    assert counts.sum() == counts[100:105].sum(), "a token outside the nucleus was drawn"
    statistic = ((counts[100:105] - expected) ** 2 / expected).sum()
    assert statistic < 18.5, f"chi-square {statistic:.1f} of 4 degrees of freedom; 18.5 is one in a thousand"


@triton.jit
def noise_kernel(out, seed, position, N: tl.constexpr):
    token = tl.arange(0, N)
    tl.store(out + token, gumbel(row_key(seed, position), token))


def test_noise_is_the_references(device: torch.device) -> None:
    seed, position = 2**62 + 12345678901, 777
    out = torch.empty(1024, device=device)
    noise_kernel[(1,)](out, seed, position, N=1024)
    keys = torch.from_numpy(row_keys(np.array([seed], np.int64), np.array([position], np.int32)))
    expected = gumbel_noise(keys, token_keys(torch.arange(1024, dtype=torch.int32)))
    torch.testing.assert_close(out.cpu(), expected, atol=2e-6, rtol=2e-6)
