"""The engine loop: plan a step, submit it, and handle the results of an older one meanwhile."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from isthmus.contract import Capabilities, CountsCompiles, StepExecutor
from isthmus.engine.messages import AddRequest, EngineStats, TokensOut, unpack_tokens
from isthmus.errors import EngineDead, InvalidRequest
from isthmus.refusals import check_declared

if TYPE_CHECKING:
    from isthmus.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW: Final = 3


@dataclasses.dataclass(frozen=True, slots=True)
class _InFlight:
    step: int
    failure: str = ""
    """Why it could not be submitted; it fails when its turn comes, since results come in order."""


class EngineCore:
    """Drives a scheduler and an executor.  One thread calls it; nothing here waits but for the device.

    A step that the device fails ends the requests in it, with :attr:`FinishReason.ERROR`, and no
    others.  After three failures in a row :meth:`step` raises :class:`EngineDead`.  Requests for what
    ``capabilities`` does not declare are refused; without them, none for that.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: StepExecutor,
        *,
        capabilities: Capabilities | None = None,
        max_steps_in_flight: int | None = None,
        on_close: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        depth = executor.max_steps_in_flight
        self._depth = depth if max_steps_in_flight is None else min(depth, max_steps_in_flight)
        assert self._depth >= 1, "an executor must take at least one step"
        self._scheduler = scheduler
        self._executor = executor
        self._capabilities = capabilities or Capabilities()
        self._vocab_size = executor.limits.vocab_size
        self._on_close = on_close
        self._in_flight: deque[_InFlight] = deque()
        self._clock = clock
        self._last_progress_s = clock()
        self._failures = 0
        self._last_failure = ""
        self._submitted = -1
        self._tainted = -1
        """The last step that was in flight when one failed."""
        self.stalled = False
        """Whether the last :meth:`step` found nothing that can run, whatever is waiting."""

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` may bring something."""
        return bool(self._in_flight) or self._scheduler.has_work

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    def add(self, request: AddRequest) -> None:
        """Take a request.  Raises :class:`InvalidRequest` or :class:`QueueFull`."""
        self._check(request)
        if not self.has_work:
            self._last_progress_s = self._clock()
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[int]) -> list[int]:
        """Forget requests; unknown ids are ignored.  Returns those that were live."""
        return self._scheduler.abort(request_ids)

    def step(self) -> list[TokensOut]:
        """Submit as many steps as may be in flight, then wait for the oldest and return what it brought."""
        if self._failures >= MAX_FAILURES_IN_A_ROW:
            raise EngineDead(f"the device failed {self._failures} times in a row, last with: {self._last_failure}")
        self._fill()
        self.stalled = not self._in_flight
        if self.stalled:
            return []
        oldest = self._in_flight.popleft()
        if oldest.failure:
            return self._fail(oldest, oldest.failure)
        try:
            result = self._executor.collect()
        except Exception as error:
            logger.exception("step %d failed", oldest.step)
            return self._fail(oldest, describe(error))
        if result.step != oldest.step:
            raise EngineDead(f"the executor returned step {result.step} where step {oldest.step} was due")
        outputs = self._scheduler.update(result)
        self._failures = 0
        self._last_progress_s = self._clock()
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot; the scheduler reports the sizes of steps once."""
        now = self._clock()
        if not self.has_work:
            self._last_progress_s = now
        counters = dataclasses.asdict(self._scheduler.stats())
        late = self._executor.late_compiles if isinstance(self._executor, CountsCompiles) else 0
        return EngineStats(monotonic_s=now, last_progress_s=self._last_progress_s, late_compiles=late, **counters)

    def close(self) -> None:
        """Wait for the steps in flight, drop what they bring, and close the executor and its device."""
        while self._in_flight:
            if not self._in_flight.popleft().failure:
                try:
                    self._executor.collect()
                except Exception:
                    logger.exception("a step failed while the engine closed")
        self._executor.close()
        self._on_close()

    def _fill(self) -> None:
        while len(self._in_flight) < self._depth:
            if self._in_flight and self._in_flight[-1].failure:
                return  # nothing may run on top of a step that never ran
            plan = self._scheduler.plan()
            if plan is None:
                return
            failure = ""
            try:
                self._executor.submit(plan)
            except Exception as error:
                logger.exception("step %d could not be submitted", plan.step)
                failure = describe(error)
            self._submitted = plan.step
            self._in_flight.append(_InFlight(plan.step, failure))

    def _fail(self, step: _InFlight, reason: str) -> list[TokensOut]:
        # What was in flight with a failed step may well fail with it: that is one failure.
        if step.step > self._tainted:
            self._failures += 1
            self._tainted = self._submitted
        self._last_failure = reason
        return self._scheduler.fail_step(step.step, f"the device failed this request's step: {reason}")

    def _check(self, request: AddRequest) -> None:
        if not request.prompt or len(request.prompt) % 4:
            raise InvalidRequest(
                f"the prompt is {len(request.prompt)} bytes; it must be one or more token ids of 4 bytes each",
                param="prompt",
            )
        tokens = unpack_tokens(request.prompt)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise InvalidRequest(
                f"the prompt holds token id {low if low < 0 else high}; this model's ids are 0 to "
                f"{self._vocab_size - 1}",
                param="prompt",
            )
        check_declared(request.sampling, self._capabilities)


def describe(error: BaseException) -> str:
    """An error as one line for a person."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
