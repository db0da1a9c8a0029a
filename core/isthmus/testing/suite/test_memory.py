"""Order of steps, failures, copies to the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.testing.device import DeviceUnderTest

pytestmark = [pytest.mark.requires_parts, pytest.mark.mandatory]


def test_steps_run_in_the_order_in_which_they_were_launched(isthmus_device: DeviceUnderTest) -> None:
    memory = isthmus_device.parts.memory
    seen: list[int] = []

    def step(number: int) -> int:
        seen.append(number)
        return number

    pending = [memory.launch(lambda n=n: step(n)) for n in range(20)]  # type: ignore[misc]
    assert [item.result() for item in pending] == list(range(20)) == seen


def test_a_step_that_raises_does_so_from_its_own_result(isthmus_device: DeviceUnderTest) -> None:
    memory = isthmus_device.parts.memory

    def fails() -> None:
        raise ZeroDivisionError("a failure that was asked for")

    first, second, third = memory.launch(lambda: 1), memory.launch(fails), memory.launch(lambda: 3)
    assert first.result() == 1
    with pytest.raises(ZeroDivisionError, match="asked for"):
        second.result()
    assert third.result() == 3, "steps after one that failed must run"


def test_what_was_fetched_is_a_copy(isthmus_device: DeviceUnderTest) -> None:
    memory = isthmus_device.parts.memory
    numbers = isthmus_device.put(torch.arange(7, dtype=torch.int32))
    flags = isthmus_device.put(torch.tensor([True, False]))

    def step() -> object:
        pending = memory.fetch([numbers, flags, numbers[:0]])
        numbers.add_(100)
        return pending

    ids, invalid, nothing = memory.launch(step).result().result()  # type: ignore[attr-defined]
    assert all(isinstance(array, np.ndarray) for array in (ids, invalid, nothing))
    assert ids.tolist() == list(range(7)), "fetch brought what was written after it was called"
    assert ids.dtype == np.int32 and invalid.dtype == np.bool_ and invalid.tolist() == [True, False]
    assert len(nothing) == 0


def test_synchronize_waits_for_everything(isthmus_device: DeviceUnderTest) -> None:
    memory = isthmus_device.parts.memory
    tensor = isthmus_device.put(torch.zeros(1000))
    for _ in range(5):
        memory.launch(lambda: tensor.add_(1))
    memory.synchronize()
    assert tensor.cpu().tolist() == [5.0] * 1000
    memory.synchronize()
