"""One request on its way through the engine."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from isthmus.engine.messages import AddRequest
from isthmus.plan import Int32Array


@dataclass(slots=True, eq=False)
class Sequence:
    """What is kept of a request beside the arrays of :class:`isthmus.scheduler.rows.Rows`.

    It waits (``row`` is ``None``), runs in a row, may wait again after preemption, and is finished.
    """

    request: AddRequest
    arrival: int
    """Counts the requests added: the order among those of one priority."""
    queued_at_s: float
    tokens: Int32Array
    """All tokens known when it last began to wait: the prompt, then what was generated since."""
    num_prompt_tokens: int
    max_length: int
    """Tokens, prompt and output, at which it ends."""
    keys: list[bytes] = field(default_factory=list)
    """Prefix keys of its full blocks, as far as they were needed."""
    row: int | None = None
    finished: bool = False
    num_pending: int = 0
    """While it waits: tokens that steps in flight are still sampling for it."""
    void_step: int = -1
    """What steps up to this one bring for it is void."""
    overtaken: int = 0
    deferrals: int = 0
    announced: bool = False
    """Whether its first output is out."""
    num_cached_tokens: int = -1
    queued_s: float = 0.0
    num_prompt_logprobs_sent: int = 0

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def key(self) -> tuple[int, int]:
        """Sorts what runs, and starts, first."""
        return (self.request.priority, self.arrival)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.num_prompt_logprobs >= 0

    @property
    def max_cached_tokens(self) -> int:
        """How many leading tokens need not be computed even where their keys and values are cached.

        The last token always is: its logits choose the next one.  So is every prompt position whose
        logits are still owed for the prompt's log-probabilities.
        """
        limit = len(self.tokens) - 1
        if self.wants_prompt_logprobs and self.num_prompt_logprobs_sent < self.num_prompt_tokens:
            limit = min(limit, max(0, self.num_prompt_logprobs_sent - 1))
        return limit

    def is_stop(self, token: int, length: int) -> bool:
        """Whether ``token``, which made the sequence ``length`` long, is one that ends it."""
        sampling = self.request.sampling
        return token in sampling.stop_token_ids and length > self.num_prompt_tokens + sampling.min_tokens


class SequenceQueue:
    """Sequences in the order of their keys."""

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    @property
    def last(self) -> Sequence:
        return self._items[-1]

    def first(self, count: int) -> list[Sequence]:
        return self._items[:count]

    def add(self, sequence: Sequence) -> None:
        insort(self._items, sequence, key=lambda item: item.key)

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._items, sequence.key, key=lambda item: item.key)
        assert self._items[index] is sequence
        del self._items[index]
