"""Sampling: supports, distributions, seeds, neighbours, masks, penalties and log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.contract import Limits
from isthmus.plan import StepPlan
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.golden import random
from isthmus.testing.suite.steps import Span, Starting, Stepper, fitting, plan_of

pytestmark = [pytest.mark.requires_parts]

MAX_LEN = 64
Rows = list[tuple[list[int], int, dict[str, Any]]]
"""Each row's tokens so far, how many of them are the prompt, and its parameters."""


class Bench:
    """Samples steps in which every row computes its last position."""

    def __init__(self, device: DeviceUnderTest, vocab: int, rows: int = 48) -> None:
        self.device, self.vocab = device, vocab
        self.rows, tokens = fitting(device.capabilities, rows=rows, tokens=rows)
        limits = Limits(
            max_rows=self.rows,
            max_tokens=tokens,
            max_model_len=MAX_LEN,
            block_size=device.capabilities.block_sizes[0],
            num_blocks=4,
            vocab_size=vocab,
        )
        self.stepper = Stepper(device, limits)
        self.steps = 0

    def sample(self, logits: Tensor, rows: Rows, num_logprobs: int = -1, at: list[int] | None = None) -> dict[str, Any]:
        """``at`` names the device's rows, ascending from 0 unless given."""
        names = at or list(range(len(rows)))
        result = self.stepper.sample(self.plan(rows, names), logits, num_logprobs)
        history = self.stepper.rows.tokens.cpu()
        for name, (tokens, _, _), token in zip(names, rows, result["tokens"], strict=True):
            assert int(history[name, len(tokens)]) == int(token), "the token is not in the row's history"
        return result

    def plan(self, rows: Rows, names: list[int]) -> StepPlan:
        self.steps += 1
        return plan_of(
            self.steps,
            [Span(name, len(tokens) - 1, 1) for name, (tokens, _, _) in zip(names, rows, strict=True)],
            {
                name: Starting(
                    tokens, [1], prompt, RowSampling(max_tokens=100, **{"seed": 11 * self.steps, **parameters})
                )
                for name, (tokens, prompt, parameters) in zip(names, rows, strict=True)
            },
        )

    def draws(self, logits: Tensor, parameters: dict[str, Any], count: int) -> np.ndarray[Any, Any]:
        """Tokens of independent rows, each with a seed of its own, all with these logits."""
        drawn: list[np.ndarray[Any, Any]] = []
        seed = 1
        while sum(map(len, drawn)) < count:
            rows: Rows = []
            for _ in range(self.rows):
                rows.append(([1, 2, 3][: 1 + seed % 3], 1, {"temperature": 1.0, **parameters, "seed": seed}))
                seed += 1
            result = self.sample(logits.expand(self.rows, -1), rows)
            assert not result["invalid"].any()
            drawn.append(result["tokens"])
        return np.concatenate(drawn)


def plain(parameters: dict[str, Any] | None = None) -> tuple[list[int], int, dict[str, Any]]:
    return [1], 1, parameters or {}


@pytest.mark.mandatory
@pytest.mark.parametrize("vocab", [7, 131, 1000, 32003])
def test_greedy_takes_the_likeliest_and_the_lowest_of_equals(isthmus_device: DeviceUnderTest, vocab: int) -> None:
    bench = Bench(isthmus_device, vocab, rows=8)
    for count in sorted({1, 3, bench.rows}):
        logits = random(count, vocab, seed=vocab)
        best = (torch.arange(count) * 7919 + vocab - 1) % vocab
        logits[torch.arange(count), best] = 50.0
        logits[0, -1] = logits[0, vocab // 2] = 60.0
        result = bench.sample(logits, [plain() for _ in range(count)])
        assert result["tokens"].tolist() == logits.argmax(-1).tolist()
        assert result["tokens"].dtype == np.int32 and not result["invalid"].any()


CUTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "top_k and top_p": {"top_k": 7, "top_p": 0.8},
    "all": {"top_k": 9, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5},
}


def probabilities(logits: Tensor, parameters: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What each token should come up with: cuts on logits over temperature, then softmax of what is left."""
    x = (logits.double() / parameters.get("temperature", 1.0)).numpy()
    kept = x >= x.max() + (math.log(parameters["min_p"]) if parameters.get("min_p") else -math.inf)
    if parameters.get("top_k"):
        kept &= np.array([(x[kept] > value).sum() < parameters["top_k"] for value in x])
    mass = np.where(kept, np.exp(x - x.max()), 0.0)
    above = np.array([mass[x > value].sum() for value in x])
    kept &= above < parameters.get("top_p", 1.0) * mass.sum()
    mass = np.where(kept, mass, 0.0)
    return np.asarray(mass / mass.sum())


@pytest.mark.mandatory
@pytest.mark.parametrize("name", CUTS)
def test_draws_have_the_distribution_asked_for(isthmus_device: DeviceUnderTest, name: str) -> None:
    """Chi-square over the tokens that should come up, and no other token ever does."""
    logits = random(1, 24, seed=42)[0] * 1.5
    wanted = probabilities(logits, CUTS[name])
    drawn = Bench(isthmus_device, 24).draws(logits, CUTS[name], 1500)
    counts = np.bincount(drawn, minlength=24)
    strays = np.flatnonzero((counts > 0) & (wanted == 0))
    assert not len(strays), f"tokens {strays.tolist()} were drawn; {name} keeps {np.flatnonzero(wanted).tolist()}"
    require_distribution(counts, wanted)


@pytest.mark.mandatory
def test_a_wide_vocabulary_is_drawn_from_evenly(isthmus_device: DeviceUnderTest) -> None:
    """Over all of it, not over its likeliest part."""
    vocab = 5000
    logits = torch.zeros(vocab)
    drawn = Bench(isthmus_device, vocab).draws(logits, {}, 1500)
    counts = np.bincount(drawn * 20 // vocab, minlength=20)
    require_distribution(counts, np.full(20, 0.05))
    assert len(set(drawn.tolist())) > 1100, "1500 draws among 5000 equal tokens should rarely meet"


def require_distribution(counts: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    """Pearson's chi-square, rare tokens together; the bound is a chance of about one in a million.

    Wilson and Hilferty (1931): the cube root of chi-square over its degrees is nearly normal.
    """
    total = counts.sum()
    common = wanted * total >= 5
    groups = [(counts[i], wanted[i]) for i in np.flatnonzero(common)]
    groups.append((counts[~common].sum(), wanted[~common].sum()))
    groups = [(seen, share) for seen, share in groups if share > 0]
    degrees = len(groups) - 1
    if degrees == 0:
        return
    square = sum((seen - share * total) ** 2 / (share * total) for seen, share in groups)
    normal = ((square / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    assert normal < 4.75, (
        f"{total} draws do not have the distribution: chi-square {square:.1f} with {degrees} degrees of freedom; "
        f"seen and wanted {[(int(seen), round(share * total)) for seen, share in groups]}"
    )


@pytest.mark.mandatory
def test_a_draw_depends_on_its_seed_and_position_alone(isthmus_device: DeviceUnderTest) -> None:
    """Not on the row, the neighbours, the step, or what the row held before."""
    vocab = 1000
    bench = Bench(isthmus_device, vocab, rows=6)
    logits = random(6, vocab, seed=8)
    own = [([5] * length, 1, {"temperature": 1.0, "seed": 900 + length, "top_p": 0.95}) for length in range(2, 8)]
    own = own[: bench.rows]
    together = bench.sample(logits[: len(own)], own)["tokens"].tolist()
    alone = [bench.sample(logits[i : i + 1], [own[i]], at=[0])["tokens"][0] for i in range(len(own))]
    backwards = bench.sample(logits[: len(own)].flip(0), own[::-1])["tokens"].tolist()[::-1]
    assert together == alone == backwards
    assert together == bench.sample(logits[: len(own)], own)["tokens"].tolist()


@pytest.mark.mandatory
def test_seeds_and_positions_tell_draws_apart(isthmus_device: DeviceUnderTest) -> None:
    vocab = 5000
    bench = Bench(isthmus_device, vocab, rows=32)
    flat = torch.zeros(bench.rows, vocab)
    drawn = {"temperature": 1.0}
    by_seed = bench.sample(flat, [([1, 2], 1, drawn | {"seed": seed}) for seed in range(bench.rows)])["tokens"]
    high = bench.sample(flat, [([1, 2], 1, drawn | {"seed": (seed + 1) << 32}) for seed in range(bench.rows)])["tokens"]
    by_place = bench.sample(flat, [([1] * (n + 1), 1, drawn | {"seed": 5}) for n in range(bench.rows)])["tokens"]
    for tokens, what in ((by_seed, "seeds"), (high, "upper halves of seeds"), (by_place, "positions")):
        assert len(set(tokens.tolist())) >= 0.9 * bench.rows, f"different {what} draw the same tokens"


@pytest.mark.mandatory
@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "drawn"])
def test_a_bad_row_is_marked_and_spoils_no_other(isthmus_device: DeviceUnderTest, parameters: dict[str, Any]) -> None:
    bench = Bench(isthmus_device, 131, rows=4)
    if bench.rows < 4:
        pytest.skip("undeclared: more than three rows")
    logits = random(4, 131, seed=12)
    rows = [plain(parameters) for _ in range(4)]
    good = bench.sample(logits, rows)["tokens"].tolist()
    spoilt = logits.clone()
    spoilt[1, 77] = math.nan
    spoilt[2] = -math.inf
    result = bench.sample(spoilt, rows)
    assert result["invalid"].tolist() == [False, True, True, False]
    assert [result["tokens"].tolist()[i] for i in (0, 3)] == [good[0], good[3]]
    assert all(0 <= token < 131 for token in result["tokens"])


@pytest.mark.mandatory
def test_odd_neighbours_change_nothing(isthmus_device: DeviceUnderTest) -> None:
    vocab = 131
    bench = Bench(isthmus_device, vocab, rows=8)
    logits = random(8, vocab, seed=21)
    rows = [([3, 4, 3], 2, parameters) for parameters in list(ODD.values())[: bench.rows]]
    logits = logits[: len(rows)]
    together = bench.sample(logits, rows)["tokens"].tolist()
    alone = [bench.sample(logits[i : i + 1], [row])["tokens"][0] for i, row in enumerate(rows)]
    assert together == alone


ODD: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": ((9, 100.0),)},
    "allowed": {"allowed_token_ids": (5, 17)},
    "early stop": {"min_tokens": 5, "stop_token_ids": (8,)},
    "drawn": {"temperature": 1.3, "seed": 44},
    "narrow": {"temperature": 1.0, "top_k": 3, "seed": 45},
    "penalised": {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "bad words": {"bad_word_ids": ((3,), (3, 4))},
    "greedy": {},
}

TOKENS, PROMPT = [3, 4, 3, 5, 6, 5, 5, 9], 3
"""A history of eight tokens, of which three are the prompt."""

ADJUSTED: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": ((9, 5.0), (0, -100.0), (130, 2.5))},
    "allowed_token_ids": {"allowed_token_ids": (2, 17, 99)},
    "allowed with a bias": {"allowed_token_ids": (2, 17, 99), "logit_bias": ((17, 50.0), (50, 100.0))},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (7, 11, 12)},
    "min_tokens reached": {"min_tokens": 5, "stop_token_ids": (7, 11, 12)},
    "bad word of one token": {"bad_word_ids": ((7,), (11,))},
    "bad word after the output": {"bad_word_ids": ((5, 9, 7), (9, 11), (6, 12))},
    "bad word that began in the prompt": {"bad_word_ids": ((3, 5, 6, 5, 5, 9, 7),)},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "repetition_penalty below one": {"repetition_penalty": 0.6},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "negative penalties": {"presence_penalty": -1.0, "frequency_penalty": -0.5},
    "all together": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "logit_bias": ((9, 1.0), (20, 3.0)),
        "bad_word_ids": ((9, 20),),
        "min_tokens": 9,
        "stop_token_ids": (7,),
    },
}


def adjusted(logits: Tensor, parameters: dict[str, Any]) -> Tensor:
    """A row's logits after masks, bias, bad words and penalties, in float64, for :data:`TOKENS`."""
    x, output = logits.double().clone(), TOKENS[PROMPT:]
    if allowed := parameters.get("allowed_token_ids"):
        mask = torch.full_like(x, -math.inf)
        mask[list(allowed)] = 0
        x += mask
    for token, bias in parameters.get("logit_bias", ()):
        x[token] += bias
    if len(output) < parameters.get("min_tokens", 0):
        x[list(parameters["stop_token_ids"])] = -math.inf
    for word in parameters.get("bad_word_ids", ()):
        before = list(word[:-1])
        if not before or (len(before) <= len(output) and output[-len(before) :] == before):
            x[word[-1]] = -math.inf
    for token in set(TOKENS):
        repetition = parameters.get("repetition_penalty", 1.0)
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        x[token] -= parameters.get("frequency_penalty", 0.0) * output.count(token)
        x[token] -= parameters.get("presence_penalty", 0.0) * (token in output)
    return x


@pytest.mark.mandatory
@pytest.mark.parametrize("name", ADJUSTED)
def test_masks_biases_and_penalties(isthmus_device: DeviceUnderTest, name: str) -> None:
    """The likeliest token after adjusting, where every token that matters is near the top in some row."""
    parameters = ADJUSTED[name]
    bench = Bench(isthmus_device, 131, rows=40)
    logits = random(bench.rows, 131, seed=33)
    interesting = [3, 4, 5, 6, 7, 9, 11, 12, 17, 20, 50, 130, 0, 2, 99]
    for row in range(bench.rows):
        logits[row, interesting] += 2.0 * random(1, len(interesting), seed=row)[0] + 2.0
    rows: Rows = [(TOKENS, PROMPT, parameters)] * bench.rows
    result = bench.sample(logits, rows)
    for row in range(bench.rows):
        x = adjusted(logits[row], parameters)
        token = int(result["tokens"][row])
        best = int(x.argmax())
        assert x[token] >= x[best] - 1e-4, f"row {row}: token {token} has {x[token]:.4f}, {best} has {x[best]:.4f}"
    assert not result["invalid"].any()


@pytest.mark.mandatory
def test_draws_obey_masks_too(isthmus_device: DeviceUnderTest) -> None:
    bench = Bench(isthmus_device, 24)
    logits = random(1, 24, seed=2)[0]
    assert set(bench.draws(logits, {"allowed_token_ids": (3, 20)}, 200).tolist()) == {3, 20}
    banned = {"bad_word_ids": ((int(logits.argmax()),),), "logit_bias": ((5, -100.0),)}
    drawn = bench.draws(logits, banned, 600)
    assert not {int(logits.argmax()), 5} & set(drawn.tolist())


@pytest.mark.requires_capability("logprobs")
@pytest.mark.parametrize("num_logprobs", [0, 1, 20])
@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.6, "top_k": 4, "logit_bias": ((9, 3.0),)}], ids=str)
def test_logprobs_are_of_the_models_own_logits(
    isthmus_device: DeviceUnderTest, num_logprobs: int, parameters: dict[str, Any]
) -> None:
    """Before bias, temperature and cuts; ranks from 1; the likeliest first."""
    vocab = 1000
    bench = Bench(isthmus_device, vocab, rows=6)
    logits = random(bench.rows, vocab, seed=77) * 3
    rows = [plain(parameters | {"num_logprobs": num_logprobs, "seed": 60 + row}) for row in range(bench.rows)]
    result = bench.sample(logits, rows, num_logprobs)
    require_logprobs(result, logits, result["tokens"], num_logprobs)


@pytest.mark.requires_capability("prompt_logprobs")
def test_prompt_logprobs(isthmus_device: DeviceUnderTest) -> None:
    device, vocab = isthmus_device, 1000
    logits, following = random(9, vocab, seed=78) * 3, (torch.arange(9) * 313 % vocab).int()
    parts = device.parts
    Bench(device, vocab, rows=2)

    def step() -> Any:
        sampled = parts.sampling.prompt_logprobs(device.put(logits), device.put(following), 5)
        assert sampled.chosen_logprobs is not None and sampled.ranks is not None
        assert sampled.top_ids is not None and sampled.top_logprobs is not None
        return parts.memory.fetch([sampled.chosen_logprobs, sampled.ranks, sampled.top_ids, sampled.top_logprobs])

    arrays = device.run(step).result()
    result = dict(zip(("chosen_logprobs", "ranks", "top_ids", "top_logprobs"), arrays, strict=True))
    require_logprobs(result, logits, following.numpy(), 5)


def require_logprobs(result: dict[str, Any], logits: Tensor, tokens: Any, num_logprobs: int) -> None:
    expected = torch.log_softmax(logits.double(), -1).numpy()
    for row, token in enumerate(tokens.tolist()):
        own = expected[row, token]
        assert abs(result["chosen_logprobs"][row] - own) < 1e-3, f"row {row}: {result['chosen_logprobs'][row]}, {own}"
        assert result["ranks"][row] == 1 + (expected[row] > own).sum(), f"the rank of row {row}"
        best = np.argsort(-expected[row], kind="stable")[:num_logprobs]
        assert result["top_ids"][row, :num_logprobs].tolist() == best.tolist(), f"the likeliest of row {row}"
        assert np.allclose(result["top_logprobs"][row, :num_logprobs], expected[row][best], atol=1e-3)
