"""The sampling part: parameters in rows on the device, and kernels that read them there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import DeviceState, Limits, Sampled, StepInputs
from isthmus.plan import StepPlan
from isthmus.reference.noise import token_keys
from isthmus_triton.ahead import CompileAhead, Launch, listing
from isthmus_triton.inputs import history_width
from isthmus_triton.kernels.adjust import adjust_kernel
from isthmus_triton.kernels.logprobs import MOST_LIKELIEST, log_probabilities
from isthmus_triton.kernels.overlap import overlapping
from isthmus_triton.kernels.rounds import round_kernel
from isthmus_triton.kernels.sample import choose_kernel, slices_kernel
from isthmus_triton.launch import FALLBACK, LaunchTable
from isthmus_triton.row_parameters import EXTRAS, WIDTH, bit_words, neutral_row, pack_row
from isthmus_triton.sizes import power_of_two, tiles_of

SLICE: Final = 8192
"""Logits that one program of the first passes reads."""
GROUP: Final = 128
"""Logits whose largest is kept, to bound the ``top_k``-th one from below."""
MOST_COLLECTED: Final = 2048
"""Tokens that are looked at together for ``top_k``; where more may be among the k, sweeps find them."""


@dataclass(slots=True)
class RowStates:
    """Per-row parameters; the last row is the padding row and stays neutral (greedy)."""

    parameters: Tensor  # int64 [max_rows + 1, WIDTH]
    seen_bits: Tensor  # int32 [max_rows, bit words], zero between steps
    token_keys: Tensor  # int32 [vocab], the tokens' half of the noise
    vocab_size: int
    extras: dict[int, Tensor] = field(default_factory=dict)
    """Lists of rows that have any; the rows' parameters hold their addresses."""


class TritonSampling:
    """:class:`isthmus.contract.Sampling`, with the semantics of ``isthmus.reference.sampling``.

    Everything a row needs is read on the device when the step runs, so one captured step serves any
    mixture of parameters.  Frequency penalties are subtracted once an occurrence, which may round
    otherwise than one product does.
    """

    def __init__(
        self,
        device: torch.device,
        table: LaunchTable = FALLBACK,
        ahead: CompileAhead | None = None,
    ) -> None:
        self._device = device
        self._choose_warps = table.choose_warps
        self._overlap = table.overlap
        self._await_stores = table.decode_for(0).await_stores
        self._launch = table.sampling
        self._ahead = ahead or CompileAhead(device)

    def allocate(self, limits: Limits) -> RowStates:
        rows = torch.from_numpy(np.tile(neutral_row(), (limits.max_rows + 1, 1))).to(self._device)
        bits = torch.zeros(limits.max_rows, bit_words(limits.vocab_size), dtype=torch.int32, device=self._device)
        keys = token_keys(torch.arange(limits.vocab_size, dtype=torch.int32, device=self._device))
        state = RowStates(rows, bits, keys, limits.vocab_size)
        self._compile(state, limits)
        return state

    def apply(self, state: RowStates, plan: StepPlan) -> None:
        if not plan.starts:
            return
        words = np.empty((len(plan.starts), WIDTH + 1), np.int64)
        # Requests of one call often share what they ask for.
        shared = {id(start.sampling): start.sampling for start in plan.starts}
        packs = {key: pack_row(sampling, state.vocab_size) for key, sampling in shared.items()}
        for index, start in enumerate(plan.starts):
            packed = packs[id(start.sampling)]
            words[index, :WIDTH] = packed.words
            words[index, WIDTH] = start.row
            # The one before may go: its memory is reused by work queued after the steps that read it.
            state.extras.pop(start.row, None)
            if len(packed.extras):
                state.extras[start.row] = self._upload(packed.extras)
                words[index, EXTRAS] = state.extras[start.row].data_ptr()
        uploaded = self._upload(words)
        state.parameters.index_copy_(0, uploaded[:, WIDTH], uploaded[:, :WIDTH])

    def _upload(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(array)
        if self._device.type == "cpu":
            return host.clone()
        return host.pin_memory().to(self._device, non_blocking=True)

    def sample(
        self, logits: Tensor, inputs: StepInputs, device: DeviceState, state: RowStates, num_logprobs: int
    ) -> Sampled:
        samples = logits.shape[0]
        raw = logits.clone() if num_logprobs >= 0 else logits
        tokens = logits.new_empty(samples, dtype=torch.int32)
        invalid = logits.new_empty(samples, dtype=torch.bool)
        if samples:
            self._ahead.wait()
            for launch in self._launches(logits, tokens, invalid, inputs, device, state):
                launch.run()
        if num_logprobs < 0:
            return Sampled(tokens=tokens, invalid=invalid)
        return _with_logprobs(raw, tokens, invalid, num_logprobs)

    def _launches(
        self,
        logits: Tensor,
        tokens: Tensor,
        invalid: Tensor,
        inputs: StepInputs,
        device: DeviceState,
        state: RowStates,
    ) -> list[Launch]:
        samples, vocab = logits.shape
        rows, last, positions, history = inputs.sample_rows, inputs.sample_tokens, inputs.positions, device.tokens
        empty, bits, how = logits.new_empty, state.seen_bits, self._launch
        num_slices = tiles_of(vocab, SLICE)
        num_groups = num_slices * (SLICE // GROUP)
        slices, ids = empty(samples, num_slices, 4), empty(samples, num_slices, 2, dtype=torch.int32)
        words, bounds = empty(samples, 4, dtype=torch.int32), empty(samples, 2)
        queues = how.rounds + 1
        queued, queue = empty(queues, dtype=torch.int32), empty(samples, queues, dtype=torch.int32)
        group_tops, some_x = empty(samples, num_groups), empty(samples, MOST_COLLECTED)
        some_ids = empty(samples, MOST_COLLECTED, dtype=torch.int32)
        invalid_before = empty(samples, dtype=torch.int32)
        keys = state.token_keys
        rows_at = (state.parameters, rows, last, positions)
        adjust = (
            logits, invalid_before, *rows_at, history, device.num_prompt_tokens, bits, queued, vocab,
            history.stride(0), bits.stride(0),
        )  # fmt: skip
        cut = (logits, slices, ids, words, queued, queue, group_tops, *rows_at, keys, vocab)
        rounds = (logits, slices, ids, words, bounds, queued, queue, *rows_at, keys, vocab, num_slices)
        choose = (
            logits, slices, ids, words, group_tops, some_x, some_ids, invalid_before, *rows_at, keys, history,
            tokens, invalid, vocab, history.stride(0), num_slices, num_groups,
        )  # fmt: skip
        overlap = {"OVERLAP": self._overlap, **overlapping(self._overlap)}
        padded = power_of_two(num_slices)
        sizes = {"SLICE": SLICE, "BLOCK": how.block, "QUEUES": queues, "num_warps": 4, **overlap}
        round_sizes = {"SLICES": padded, "AWAIT_STORES": self._await_stores, **sizes}
        choose_sizes = {
            "SLICES": padded,
            "GROUPS": power_of_two(num_groups),
            "MOST": MOST_COLLECTED,
            "BLOCK": min(8192, power_of_two(vocab)),
            "num_warps": self._choose_warps,
        }
        every = samples * num_slices
        return [
            Launch(adjust_kernel, (samples,), adjust, {"QUEUES": queues, "BLOCK": 1024, "num_warps": 4, **overlap}),
            Launch(slices_kernel, (samples, num_slices), cut, {"GROUP": GROUP, "WIDE": how.wide, **sizes}),
            *(
                Launch(
                    round_kernel,
                    (min(every, how.round_programs if number else how.first_programs),),
                    rounds,
                    {"ROUND": number, **round_sizes},
                )
                for number in range(queues)
            ),
            Launch(choose_kernel, (samples,), choose, {**choose_sizes, **overlap}),
        ]

    def _compile(self, state: RowStates, limits: Limits) -> None:
        """Begin to compile what :meth:`sample` launches, with arguments of the same kinds."""

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._device)

        one = integers(1)
        device = DeviceState(
            tokens=integers(1, history_width(limits)), block_tables=integers(1, 1), num_prompt_tokens=one
        )
        inputs = StepInputs(
            token_ids=one, positions=one, slots=one, span_rows=one, query_starts=one, context_lengths=one,
            block_tables=one, sample_tokens=one, sample_rows=one, num_tokens=1, num_spans=1, num_samples=1,
            max_query_length=1, max_context_length=1,
        )  # fmt: skip
        logits = torch.zeros(1, state.vocab_size, device=self._device)
        invalid = torch.zeros(1, dtype=torch.bool, device=self._device)
        self._ahead.begin(self._launches(logits, integers(1), invalid, inputs, device, state))
        with listing() as launches:
            log_probabilities(logits, integers(1), 1)
        self._ahead.begin(launches)

    def prompt_logprobs(self, logits: Tensor, next_tokens: Tensor, num_logprobs: int) -> Sampled:
        invalid = ~torch.isfinite(logits.amax(dim=-1))
        return _with_logprobs(logits, next_tokens, invalid, num_logprobs)


def _with_logprobs(raw: Tensor, tokens: Tensor, invalid: Tensor, num_logprobs: int) -> Sampled:
    """Log-softmax of ``raw`` [positions, vocab] at ``tokens``, their ranks, and the likeliest."""
    wanted = min(num_logprobs, raw.shape[1])
    few = wanted if wanted <= MOST_LIKELIEST else 0
    chosen, ranks, top_ids, top_logprobs = log_probabilities(raw, tokens, few)
    if wanted > few:
        top, ids = torch.topk(raw, wanted, dim=-1)
        top_ids, top_logprobs = ids.int(), top - torch.logsumexp(raw, dim=-1, keepdim=True)
    return Sampled(
        tokens=tokens,
        invalid=invalid,
        chosen_logprobs=chosen,
        ranks=ranks,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )
