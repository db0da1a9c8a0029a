"""Sampling against implementations written the slow, plain way, a row at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.contract import DeviceState, Limits, Sampled, StepInputs, StepShape
from isthmus.plan import RowStart, StepPlan
from isthmus.reference import ReferenceInputs, ReferenceSampling
from isthmus.reference.cut import CANDIDATES, CutRows, draw
from isthmus.reference.noise import gumbel_noise, row_keys, token_keys
from isthmus.sampling_params import RowSampling

CPU = torch.device("cpu")
MAX_LEN = 64


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Row:
    """A row about to sample: its parameters, its prompt and what it has generated."""

    prompt: list[int]
    output: list[int] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def sampling(self) -> RowSampling:
        return RowSampling(max_tokens=100, **self.parameters)


def sample(logits: torch.Tensor, rows: list[Row], num_logprobs: int = -1, padding: int = 0) -> Sampled:
    """Sample a step in which every row computes its last position; checks the token history."""
    limits = Limits(
        max_rows=len(rows) + padding,
        max_tokens=len(rows) + padding,
        max_model_len=MAX_LEN,
        block_size=16,
        num_blocks=2,
        vocab_size=logits.shape[1],
    )
    inputs_part, sampling = ReferenceInputs(CPU), ReferenceSampling(CPU)
    device, state = inputs_part.allocate(limits), sampling.allocate(limits)
    lengths = [len(row.prompt) + len(row.output) for row in rows]
    plan = StepPlan(
        step=0,
        starts=tuple(
            RowStart(
                row=index,
                tokens=np.array(row.prompt + row.output, np.int32),
                num_prompt_tokens=len(row.prompt),
                sampling=row.sampling,
            )
            for index, row in enumerate(rows)
        ),
        span_rows=np.arange(len(rows), dtype=np.int32),
        span_starts=np.array(lengths, np.int32) - 1,
        span_lengths=np.ones(len(rows), np.int32),
        span_samples=np.ones(len(rows), np.bool_),
    )
    inputs_part.upload(plan, device)
    sampling.apply(state, plan)
    count = len(rows) + padding
    inputs: StepInputs = inputs_part.build(device, StepShape(count, count, count))
    full = torch.cat((logits, torch.zeros(padding, logits.shape[1]))).clone()
    sampled = sampling.sample(full, inputs, device, state, num_logprobs)
    _check_history(device, sampled, lengths)
    return sampled


def _check_history(device: DeviceState, sampled: Sampled, lengths: list[int]) -> None:
    for row, length in enumerate(lengths):
        assert int(device.tokens[row, length]) == int(sampled.tokens[row])


def logits_of(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def support(logits: torch.Tensor, parameters: dict[str, Any], draws: int = 3000) -> set[int]:
    """Tokens that turn up at positions 0, 1, ... of one row."""
    one = {"temperature": 1.0, **parameters}
    cut = CutRows(
        top_k=torch.full((draws,), one.get("top_k", 0)),
        top_p=torch.full((draws,), one.get("top_p", 1.0)),
        min_p=torch.full((draws,), one.get("min_p", 0.0)),
        keys=torch.from_numpy(row_keys(np.full(draws, 7), np.arange(draws, dtype=np.int32))),
    )
    return set(draw(logits.expand(draws, -1) / one["temperature"], cut).tolist())


def naive_support(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> set[int]:
    """By sorting, in float64, without thought for speed."""
    x = (logits.double() / temperature).tolist()
    kept = [i for i in range(len(x)) if math.exp(x[i] - max(x)) >= min_p]
    if top_k:
        kept = [i for i in kept if sum(x[j] > x[i] for j in kept) < top_k]
    total = sum(math.exp(x[i]) for i in kept)
    return {i for i in kept if sum(math.exp(x[j]) for j in kept if x[j] > x[i]) < top_p * total}


CUTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "top_k 1": {"top_k": 1},
    "top_p tiny": {"top_p": 1e-6},
    "both": {"top_k": 7, "top_p": 0.8},
    "all": {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
}


@pytest.mark.parametrize("parameters", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_support_equals_sorting(parameters: dict[str, Any], seed: int) -> None:
    logits = logits_of(1, 13, seed, scale=1.0)[0]
    assert support(logits, parameters) == naive_support(logits, **parameters)


def test_ties_stay_together() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    assert support(logits, {"top_k": 2}) == {1, 2, 3}
    assert support(logits, {"top_p": 0.3}) == {1, 2, 3}
    assert support(logits, {"top_k": 4}) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_p": 0.999},
        {"top_k": CANDIDATES + 40},
        {"top_k": CANDIDATES},
        {"top_k": 700, "top_p": 0.97},
        {"top_p": 0.2},
    ],
    ids=str,
)
def test_wide_supports_fall_back_to_a_sort(parameters: dict[str, Any]) -> None:
    """Cuts beyond the first candidates keep to the support, and reach into its far half."""
    logits = logits_of(1, 1000, 3, scale=0.3)[0]
    expected = naive_support(logits, **parameters)
    drawn = support(logits, parameters, draws=6000)
    assert drawn <= expected
    assert len(drawn) > 0.95 * len(expected)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Normal deviate of Pearson's statistic (Wilson and Hilferty)."""
    expected = probabilities * counts.sum()
    big = expected >= 5
    statistic = float(((counts[big] - expected[big]) ** 2 / expected[big]).sum())
    rest = expected[~big].sum()
    if rest > 0:
        statistic += float((counts[~big].sum() - rest) ** 2 / rest)
    free = int(big.sum()) - (0 if rest > 0 else 1)
    deviate: float = ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
    return deviate


@pytest.mark.parametrize(
    "parameters", [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"temperature": 2.0}], ids=str
)
@pytest.mark.parametrize("by", ["position", "seed"])
def test_frequencies(parameters: dict[str, Any], by: str) -> None:
    draws, vocab = 40000, 100
    logits = logits_of(1, vocab, 5, scale=1.5)[0]
    x = (logits / parameters.get("temperature", 1.0)).double()
    kept = torch.zeros(vocab, dtype=torch.bool)
    kept[list(naive_support(logits, **parameters))] = True
    probabilities = torch.softmax(x.masked_fill(~kept, float("-inf")), 0)
    counter, fixed = np.arange(draws), np.full(draws, 11)
    seeds, positions = (fixed, counter) if by == "position" else (counter, fixed)
    cut = CutRows(
        top_k=torch.full((draws,), parameters.get("top_k", 0)),
        top_p=torch.full((draws,), parameters.get("top_p", 1.0)),
        min_p=torch.full((draws,), parameters.get("min_p", 0.0)),
        keys=torch.from_numpy(row_keys(seeds, positions.astype(np.int32))),
    )
    tokens = draw(x.float().expand(draws, -1), cut)
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert counts[~kept].sum() == 0
    assert abs(chi_square(counts[kept], probabilities[kept])) < 3.5


def test_noise_is_what_its_docstring_says() -> None:
    """The hash once more, in Python's own integers and float64 logarithms."""

    def fmix32(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B & 0xFFFFFFFF
        h ^= h >> 13
        h = h * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**63 - 1, 20)
    positions = rng.integers(0, 2**31 - 1, 20).astype(np.int32)
    tokens = rng.integers(0, 2**18, 50).astype(np.int32)
    noise = gumbel_noise(torch.from_numpy(row_keys(seeds, positions))[:, None], token_keys(torch.from_numpy(tokens)))
    for i, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        row = fmix32(fmix32(fmix32((seed & 0xFFFFFFFF) ^ 0x9E3779B9) ^ (seed >> 32)) ^ position)
        for j, token in enumerate(tokens.tolist()):
            h = fmix32(row ^ fmix32(token + 0x7F4A7C15 & 0xFFFFFFFF))
            v = min(np.float32(np.float32(h) * np.float32(2**-32) + np.float32(2**-33)), np.float32(1 - 2**-24))
            assert float(noise[i, j]) == pytest.approx(-math.log(-math.log1p(-float(v))), rel=1e-5, abs=1e-5)


def test_noise_is_finite_at_its_ends() -> None:
    """Hash values of 0 and of all ones, made by undoing the last mix."""
    inverse_keys = torch.arange(-(2**31), 2**31, 2**15 + 1, dtype=torch.int64).int()
    noise = gumbel_noise(inverse_keys, torch.zeros((), dtype=torch.int32))
    assert torch.isfinite(noise).all()
    zero = gumbel_noise(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))  # fmix32(0) is 0
    assert float(zero) == pytest.approx(33 * math.log(2), rel=1e-6)
    assert noise.min() > -3


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.3, "seed": 2**40 + 5, "top_p": 0.9},
    {"temperature": 1.0, "seed": 3, "top_k": 40, "repetition_penalty": 1.3},
    {"temperature": 0.7, "seed": 4, "min_p": 0.1, "frequency_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"temperature": 1.0, "seed": 5, "allowed_token_ids": (3, 8, 500)},
    {"logit_bias": ((7, 100.0),)},
    {"temperature": 1.0, "seed": 6, "top_p": 0.999},
]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    vocab = 1000
    rng = np.random.default_rng(0)
    rows = [
        Row(rng.integers(0, vocab, 1 + i).tolist(), rng.integers(0, vocab, i % 7).tolist(), MIXED[i % len(MIXED)])
        for i in range(33)
    ]
    logits = logits_of(33, vocab, 8)
    together = sample(logits, rows, num_logprobs=2)
    shuffled = rng.permutation(33)
    again = sample(logits[shuffled], [rows[i] for i in shuffled], padding=4)
    for index in range(33):
        alone = sample(logits[index : index + 1], [rows[index]], num_logprobs=2)
        assert int(alone.tokens[0]) == int(together.tokens[index])
        assert int(again.tokens[list(shuffled).index(index)]) == int(together.tokens[index])
        assert alone.chosen_logprobs is not None and together.chosen_logprobs is not None
        assert float(alone.chosen_logprobs[0]) == float(together.chosen_logprobs[index])


def test_seeds() -> None:
    logits = logits_of(1, 500, 9, scale=1.0).expand(60, -1)
    same = sample(logits, [Row([1, 2], [], {"temperature": 1.0, "seed": 5}) for _ in range(60)]).tokens
    assert len(set(same.tolist())) == 1
    different = sample(logits, [Row([1, 2], [], {"temperature": 1.0, "seed": s}) for s in range(60)]).tokens
    assert len(set(different.tolist())) > 40
    high = sample(logits, [Row([1, 2], [], {"temperature": 1.0, "seed": s << 33}) for s in range(60)]).tokens
    assert len(set(high.tolist())) > 40
    places = sample(logits, [Row([1] * (n + 1), [], {"temperature": 1.0, "seed": 5}) for n in range(60)]).tokens
    assert len(set(places.tolist())) > 40


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert sample(logits, [Row([1]), Row([1])]).tokens.tolist() == [1, 0]
    # The same through the path that is not all greedy.
    rows = [Row([1]), Row([1]), Row([1], [], {"temperature": 1.0})]
    assert sample(torch.cat((logits, logits[:1])), rows).tokens.tolist()[:2] == [1, 0]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("parameters", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}], ids=str)
def test_bad_rows_are_invalid_and_harm_nobody(parameters: dict[str, Any]) -> None:
    logits = logits_of(5, 50, 2)
    good = sample(logits, [Row([1], [], parameters)] * 5)
    logits[1, 3] = NAN
    logits[2] = -INF
    logits[3, 4:] = -INF
    sampled = sample(logits, [Row([1], [], parameters)] * 5, num_logprobs=1)
    assert sampled.invalid.tolist() == [False, True, True, False, False]
    assert sampled.tokens[[1, 2]].tolist() == [0, 0]
    assert sampled.tokens[[0, 4]].tolist() == good.tokens[[0, 4]].tolist()
    assert int(sampled.tokens[3]) < 4


def test_a_mask_that_leaves_nothing_or_hides_a_nan_is_invalid() -> None:
    logits = logits_of(2, 20, 2)
    logits[1, 5] = NAN
    rows = [
        Row([1], [], {"allowed_token_ids": (4,), "bad_word_ids": ((4,),)}),
        Row([1], [], {"allowed_token_ids": (4,)}),
    ]
    assert sample(logits, rows).invalid.tolist() == [True, True]


def greedy(logits: torch.Tensor, row: Row) -> int:
    return int(sample(logits[None], [row]).tokens[0])


def ranking(row: Row, logits: torch.Tensor) -> list[int]:
    """Tokens in the order that repeated greedy sampling, each time without the last, gives them."""
    found: list[int] = []
    left = logits.clone()
    for _ in range(len(logits)):
        token = greedy(left, row)
        found.append(token)
        left[token] = -INF
    return found


@pytest.mark.parametrize(
    "parameters",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"frequency_penalty": 0.7},
        {"presence_penalty": 1.1},
        {"presence_penalty": -1.5},
        {"repetition_penalty": 1.4, "frequency_penalty": -0.5, "presence_penalty": 0.9},
    ],
    ids=str,
)
def test_penalties_equal_a_naive_implementation(parameters: dict[str, Any]) -> None:
    vocab, rng = 12, np.random.default_rng(4)
    for case in range(4):
        row = Row(rng.integers(0, vocab, 5).tolist(), rng.integers(0, vocab, 9).tolist(), parameters)
        logits = logits_of(1, vocab, case, scale=1.0)[0]
        expected = logits.clone()
        for token in range(vocab):
            if token in row.prompt + row.output:
                factor = parameters.get("repetition_penalty", 1.0)
                expected[token] = expected[token] / factor if expected[token] > 0 else expected[token] * factor
            expected[token] -= parameters.get("frequency_penalty", 0.0) * row.output.count(token)
            expected[token] -= parameters.get("presence_penalty", 0.0) * (token in row.output)
        assert ranking(row, logits) == expected.argsort(descending=True).tolist()


def test_penalties_read_tokens_that_only_the_device_knows() -> None:
    """A token sampled by an earlier step, never sent by the host, is counted."""
    limits = Limits(max_rows=1, max_tokens=4, max_model_len=8, block_size=16, num_blocks=2, vocab_size=3)
    inputs_part, sampling = ReferenceInputs(CPU), ReferenceSampling(CPU)
    device, state = inputs_part.allocate(limits), sampling.allocate(limits)
    tokens: list[int] = []
    for step in range(3):
        start = RowStart(
            row=0,
            tokens=np.array([0, 0], np.int32),
            num_prompt_tokens=2,
            sampling=RowSampling(max_tokens=9, presence_penalty=2.0),
        )
        plan = StepPlan(
            step=step,
            starts=(start,) if step == 0 else (),
            span_rows=np.array([0], np.int32),
            span_starts=np.array([0 if step == 0 else 1 + step], np.int32),
            span_lengths=np.array([2 if step == 0 else 1], np.int32),
            span_samples=np.array([True]),
        )
        inputs_part.upload(plan, device)
        sampling.apply(state, plan)
        inputs = inputs_part.build(device, StepShape(plan.num_tokens, 1, 1))
        if step:
            assert inputs.token_ids.tolist() == tokens[-1:]
        logits = torch.tensor([[2.9, 2.8, 1.5]])
        tokens.append(int(sampling.sample(logits, inputs, device, state, -1).tokens[0]))
    assert tokens == [0, 1, 2]


def test_logit_bias_and_allowed_tokens() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    assert greedy(logits, Row([0], [], {"logit_bias": ((2, 2.5),)})) == 2
    assert greedy(logits, Row([0], [], {"logit_bias": ((0, -100.0), (1, -100.0))})) == 2
    assert greedy(logits, Row([0], [], {"allowed_token_ids": (3, 2)})) == 2
    both = {"allowed_token_ids": (3, 2), "logit_bias": ((3, 1.5), (0, 100.0))}
    assert greedy(logits, Row([0], [], both)) == 3


def test_min_tokens() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0])
    parameters = {"min_tokens": 2, "stop_token_ids": (0, 1)}
    assert greedy(logits, Row([0, 0, 0], [], parameters)) == 2
    assert greedy(logits, Row([0], [2], parameters)) == 2
    assert greedy(logits, Row([0], [2, 2], parameters)) == 0
    assert greedy(logits, Row([0], [], {"min_tokens": 0, "stop_token_ids": (0, 1)})) == 0


@pytest.mark.parametrize(
    ("prompt", "output", "words", "expected"),
    [
        ([0], [], ((0,),), 1),  # single tokens always
        ([1, 2], [], ((1, 2, 0),), 0),  # the prompt does not count
        ([9], [1, 2], ((1, 2, 0),), 1),
        ([1], [2], ((1, 2, 0),), 0),  # half of it stands in the prompt
        ([9], [2, 1], ((1, 2, 0),), 0),
        ([9], [3, 1, 2], ((1, 2, 0), (5, 0)), 1),  # one of two with the same last token
        ([9], [3, 1, 2], ((5, 0), (1, 2, 0), (2, 1)), 2),
        ([9], [1, 2, 3], ((1, 2, 0),), 0),  # not the last ones
        ([9], [1] * 20, ((*([1] * 20), 0),), 1),
    ],
)
def test_bad_words(prompt: list[int], output: list[int], words: tuple[tuple[int, ...], ...], expected: int) -> None:
    logits = torch.linspace(5, 1, 10)
    assert greedy(logits, Row(prompt, output, {"bad_word_ids": words})) == expected
    # The same beside a row with longer words.
    other = Row([3], [], {"bad_word_ids": ((4, 4, 4, 4, 4),)})
    assert sample(logits.expand(2, -1), [other, Row(prompt, output, {"bad_word_ids": words})]).tokens[1] == expected


def test_a_row_that_starts_again_forgets_its_parameters() -> None:
    limits = Limits(max_rows=1, max_tokens=4, max_model_len=8, block_size=16, num_blocks=2, vocab_size=3)
    sampling = ReferenceSampling(CPU)
    state = sampling.allocate(limits)
    everything = RowSampling(
        max_tokens=9,
        min_tokens=3,
        temperature=1.0,
        logit_bias=((1, 1.0),),
        allowed_token_ids=(1,),
        bad_word_ids=((1,),),
        stop_token_ids=(2,),
        repetition_penalty=1.2,
    )
    for parameters, plain in ((everything, False), (RowSampling(max_tokens=9), True)):
        start = RowStart(row=0, tokens=np.array([0], np.int32), num_prompt_tokens=1, sampling=parameters)
        spans = {
            "span_rows": np.array([0], np.int32),
            "span_starts": np.array([0], np.int32),
            "span_lengths": np.array([1], np.int32),
            "span_samples": np.array([True]),
        }
        sampling.apply(state, StepPlan(step=0, starts=(start,), **spans))
        assert state.step(1).all_plain_greedy is plain


def test_logprobs_are_of_the_model_alone() -> None:
    vocab = 40
    logits = logits_of(3, vocab, 6)
    rows = [
        Row([1], [2], {"temperature": 0.5, "seed": 1, "top_p": 0.5}),
        Row([1], [], {"allowed_token_ids": (17,)}),
        Row([1], [], {}),
    ]
    sampled = sample(logits, rows, num_logprobs=5)
    expected = torch.log_softmax(logits.double(), -1)
    assert sampled.chosen_logprobs is not None and sampled.ranks is not None
    assert sampled.top_ids is not None and sampled.top_logprobs is not None
    assert sampled.tokens[1] == 17
    for row in range(3):
        token = int(sampled.tokens[row])
        assert float(sampled.chosen_logprobs[row]) == pytest.approx(float(expected[row, token]), abs=1e-5)
        assert int(sampled.ranks[row]) == 1 + int((logits[row] > logits[row, token]).sum())
        assert sampled.top_ids[row].tolist() == logits[row].argsort(descending=True)[:5].tolist()
        torch.testing.assert_close(
            sampled.top_logprobs[row].double(), expected[row].sort(descending=True)[0][:5], rtol=1e-5, atol=1e-5
        )
    only = sample(logits, rows, num_logprobs=0)
    assert only.top_ids is not None and only.top_ids.shape == (3, 0)
    assert sample(logits, rows).chosen_logprobs is None


def test_prompt_logprobs() -> None:
    logits = logits_of(6, 30, 7)
    following = torch.tensor([3, 0, 29, 14, 14, 2], dtype=torch.int32)
    found = ReferenceSampling(CPU).prompt_logprobs(logits, following, 2)
    expected = torch.log_softmax(logits.double(), -1)
    assert found.chosen_logprobs is not None and found.ranks is not None and found.top_ids is not None
    torch.testing.assert_close(
        found.chosen_logprobs.double(), expected.gather(1, following.long()[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    assert found.ranks.tolist() == [1 + int((logits[i] > logits[i, t]).sum()) for i, t in enumerate(following.tolist())]
    assert found.top_ids.tolist() == logits.topk(2).indices.tolist()
