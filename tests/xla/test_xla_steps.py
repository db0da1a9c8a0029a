"""Compiled steps on torch_xla: state in place, one program a shape, one copy up and one down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.errors import Unsupported

BUCKETS = [2, 4, 2, 2, 4, 4, 2, 8, 8, 4]


class Steps:
    """Compiles a step the first time it meets a number of rows, then replays it with new inputs."""

    def __init__(self, xla: Any, decoder: Any) -> None:
        self.xla, self.decoder = xla, decoder
        self.programs: dict[int, tuple[Callable[..., list[Tensor]], list[Tensor]]] = {}

    def __call__(self, position: int, rows: int) -> Tensor:
        packed = self.decoder.inputs(position, rows)
        if rows not in self.programs:
            step = self.decoder.step
            run, arguments, _, tokens = self.xla.compile_step(lambda: step(packed), [packed], self.decoder.state)
            self.programs[rows] = run, arguments
            return tokens
        run, arguments = self.programs[rows]
        return run(packed, *arguments[1:])[0]


@pytest.fixture
def steps(xla: Any, decoder: Any) -> Steps:
    return Steps(xla, decoder)


def test_steps_equal_those_on_the_host(steps: Steps, on_host: Any) -> None:
    reference, tokens = on_host(BUCKETS)
    for position, (rows, wanted) in enumerate(zip(BUCKETS, tokens, strict=True)):
        assert steps(position, rows).cpu().tolist() == wanted.tolist(), position
    assert torch.equal(steps.decoder.tokens.cpu(), reference.tokens)
    for cache, wanted in zip(steps.decoder.caches, reference.caches, strict=True):
        torch.testing.assert_close(cache.cpu(), wanted)


def test_steps_run_in_inference_mode(steps: Steps, on_host: Any) -> None:
    """In which torch_xla by itself can neither view nor write a tensor that was made outside."""
    _, tokens = on_host(BUCKETS[:4])
    for position, (rows, wanted) in enumerate(zip(BUCKETS, tokens, strict=False)):
        with torch.inference_mode():
            assert steps(position, rows).cpu().tolist() == wanted.tolist()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference tensor"):
        steps.decoder.tokens.view(-1)


def test_state_never_moves(xla: Any, steps: Steps) -> None:
    before = [xla.buffer_address(tensor) for tensor in steps.decoder.state]
    assert len(set(before)) == len(before)
    for position, rows in enumerate(BUCKETS):
        steps(position, rows)
        assert [xla.buffer_address(tensor) for tensor in steps.decoder.state] == before, position


@pytest.mark.parametrize(("donated", "vocab"), [(True, 81), (False, 82)])
def test_openxla_writes_in_place_only_what_was_donated(xla: Any, decoder_of: Any, donated: bool, vocab: int) -> None:
    decoder = decoder_of(vocab)
    packed = decoder.inputs(0, 4)
    compiled = torch.compile(lambda: decoder.step(packed), backend="openxla", fullgraph=True, dynamic=False)
    if donated:
        xla.donate(decoder.state)
    compiled()
    before = [xla.buffer_address(tensor) for tensor in decoder.state]
    compiled()
    after = [xla.buffer_address(tensor) for tensor in decoder.state]
    assert all((old == new) is donated for old, new in zip(before, after, strict=True))


def test_one_compile_a_bucket_and_none_after(xla: Any, decoder_of: Any) -> None:
    steps = Steps(xla, decoder_of(83))
    before = xla.compiles()
    for position, rows in enumerate([2, 4, 8]):
        steps(position, rows).cpu()
    assert xla.compiles() == before + 3
    for position, rows in enumerate([8, 2, 4, 4, 2, 8, 2, 2], start=3):
        steps(position, rows).cpu()
    assert xla.compiles() == before + 3


def test_one_copy_up_and_one_down_a_step(xla: Any, steps: Steps) -> None:
    for position in range(2):
        steps(position, 4).cpu()
    up, down = xla.uploads(), xla.downloads()
    for position in range(2, 12):
        steps(position, 4).cpu()
    assert (xla.uploads() - up, xla.downloads() - down) == (10, 10)


def test_a_host_buffer_may_be_written_again_at_once(xla: Any) -> None:
    host = torch.zeros(4096, dtype=torch.int32)
    box = [host.to(xla.device())]
    run, _, _, _ = xla.compile_step(lambda: box[0] + 1, box, [])
    results = []
    for number in range(20):
        host.fill_(number)
        results.append(run(host.to(xla.device()))[0])
        host.fill_(-1)
    assert [sorted(set(result.cpu().tolist())) for result in results] == [[number + 1] for number in range(20)]


def test_results_come_back_as_the_step_arranged_them(xla: Any) -> None:
    x = torch.arange(4.0).to(xla.device())
    run, arguments, outputs, result = xla.compile_step(lambda: {"a": x + 1, "b": (x * 2, x.sum())}, [x], [])
    assert result["a"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert result["b"][0].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert [any(leaf is output for output in outputs) for leaf in (result["a"], *result["b"])] == [True] * 3
    again = run((x + 1).clone(), *arguments[1:])
    assert [tensor.tolist() for tensor in again] == [[2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0], 10.0]


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: x[x > 1], "aten::nonzero"),
        (lambda x: x.view(torch.int32), "aten::view_copy"),
        (lambda x: x * x.sum().item(), "aten::_local_scalar_dense"),
        (lambda x: x + x.cpu().to(x.device), "looks at a value"),
    ],
    ids=["nonzero", "mask", "bits", "item", "fetch"],
)
def test_host_work_inside_a_step_is_refused(xla: Any, step: Callable[[Tensor], Tensor], says: str) -> None:
    x = torch.arange(4.0).to(xla.device())
    with pytest.raises(Unsupported, match=says):
        xla.compile_step(lambda: step(x), [x], [])
    with pytest.raises(Unsupported, match=says):
        xla.lowered(lambda: step(x))
    assert (x + 1).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_lowering_runs_and_changes_nothing(xla: Any, decoder: Any) -> None:
    packed = decoder.inputs(0, 4)
    xla.wait()
    addresses, before = [xla.buffer_address(tensor) for tensor in decoder.state], xla.compiles()
    text = xla.lowered(lambda: decoder.step(packed), decoder.state)
    assert text.startswith("HloModule")
    assert "scatter" in text
    assert xla.compiles() == before
    assert [xla.buffer_address(tensor) for tensor in decoder.state] == addresses
    assert not any(cache.cpu().any() for cache in decoder.caches)


def test_shifts(xla: Any) -> None:
    """torch_xla 2.9 divides for ``>>``, which rounds negative numbers up; the named function is right."""
    numbers = torch.tensor([-1, -65537, 65536, 2**31 - 1, -(2**31)], dtype=torch.int32)
    right = numbers >> 16
    assert torch.bitwise_right_shift(numbers.to(xla.device()), 16).tolist() == right.tolist()
    assert (numbers.to(xla.device()) >> 16).tolist() != right.tolist()


def test_a_cpu_keeps_no_executables(xla: Any, tmp_path: Path) -> None:
    assert xla.platform() == "CPU"
    assert not xla.keep_executables(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cpu_does_not_tell_its_memory(xla: Any) -> None:
    assert xla.memory_bytes(xla.device()) is None


def test_state_that_a_step_only_reads_is_kept(xla: Any) -> None:
    """A result of its size would be put into its memory, if that were given away."""
    x, read, written = (torch.full((64, 64), value).to(xla.device()) for value in (1.0, 2.0, 0.0))
    first = torch.zeros(1, dtype=torch.int64).to(xla.device())

    def step() -> Tensor:
        written.index_copy_(0, first, x[:1])
        return read * 2 + x

    run, arguments, _, _ = xla.compile_step(step, [x], [read, written])
    addresses = [xla.buffer_address(tensor) for tensor in (read, written)]
    for _ in range(3):
        assert run(*arguments)[0].sum().item() == 5 * 64 * 64
        assert [xla.buffer_address(tensor) for tensor in (read, written)] == addresses
        assert (read.sum().item(), written.sum().item()) == (2 * 64 * 64, 64)
