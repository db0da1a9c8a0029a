"""The lint of HLO text for AWS's compiler, on what torch_xla emits and on texts that must not pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.reference.noise import gumbel_noise, row_keys, token_keys
from isthmus_neuron.hlo import Finding, lint, operators
from isthmus_static import noise as documented

MODULE = """HloModule test

%Add.1 (x.2: f32[], y.3: f32[]) -> f32[] {{
  %x.2 = f32[] parameter(0)
  %y.3 = f32[] parameter(1)
  ROOT %add.4 = f32[] add(f32[] %x.2, f32[] %y.3)
}}

%Replace.5 (x.6: s32[], y.7: s32[]) -> s32[] {{
  %x.6 = s32[] parameter(0)
  ROOT %y.7 = s32[] parameter(1)
}}

%AddInts.8 (x.9: s32[], y.10: s32[]) -> s32[] {{
  %x.9 = s32[] parameter(0)
  %y.10 = s32[] parameter(1)
  ROOT %add.11 = s32[] add(s32[] %x.9, s32[] %y.10)
}}

%Subtract.12 (x.13: f32[], y.14: f32[]) -> f32[] {{
  %x.13 = f32[] parameter(0)
  %y.14 = f32[] parameter(1)
  ROOT %subtract.15 = f32[] subtract(f32[] %x.13, f32[] %y.14)
}}

ENTRY %main.99 (a.20: f32[4,8], i.21: s32[4], n.22: s64[4,4], s.23: f32[]) -> (f32[4,8]) {{
  %a.20 = f32[4,8]{{1,0}} parameter(0)
  %i.21 = s32[4]{{0}} parameter(1)
  %n.22 = s64[4,4]{{1,0}} parameter(2)
  %s.23 = f32[] parameter(3)
  %zero.24 = f32[] constant(0)
  %two.25 = f32[4,8]{{1,0}} broadcast(f32[] %zero.24), dimensions={{}}
  {line}
  ROOT %tuple.98 = (f32[4,8]{{1,0}}) tuple(f32[4,8]{{1,0}} %a.20)
}}
"""
LINE = 1 + MODULE[: MODULE.index("{line}")].count("\n")

REDUCE = "%r.50 = f32[4]{0} reduce(f32[4,8]{1,0} %a.20, f32[] %INIT), dimensions={1}, to_apply=%COMPUTATION"
SCATTER = "%s.50 = s32[4]{0} scatter(s32[4]{0} %i.21, s32[4]{0} %i.21, s32[4]{0} %i.21), to_apply=%COMPUTATION"
WINDOW = "%w.50 = f32[4,8]{1,0} reduce-window(f32[4,8]{1,0} %a.20, f32[] %zero.24), window={WINDOW}, to_apply=%Add.1"
UPDATE = (
    "%d.50 = f32[4,8]{1,0} dynamic-update-slice(f32[4,8]{1,0} %a.20, f32[4,8]{1,0} %a.20, f32[] %INDEX, f32[] %zero.24)"
)
CALL = '%c.50 = f32[4,8]{1,0} custom-call(f32[4,8]{1,0} %a.20), custom_call_target="TARGET"'


def test_a_module_of_documented_operators_passes() -> None:
    assert lint(MODULE.format(line="")) == []
    assert operators(MODULE.format(line=""))["parameter"] == 12


@pytest.mark.parametrize(
    "line",
    [
        REDUCE.replace("INIT", "zero.24").replace("COMPUTATION", "Add.1"),
        SCATTER.replace("COMPUTATION", "Replace.5"),
        WINDOW.replace("WINDOW", "{size=1x8 pad=0_0x7_0}"),
        UPDATE.replace("INDEX", "zero.24"),
        CALL.replace("TARGET", "AwsNeuronTopK"),
        "%p.50 = f32[4,8]{1,0} power(f32[4,8]{1,0} %a.20, f32[4,8]{1,0} %two.25)",
        "%h.50 = s32[4]{0} shift-right-arithmetic(s32[4]{0} %i.21, s32[4]{0} %i.21)",
        "%g.50 = (f32[4]{0}, s32[4]{0}) rng-bit-generator(s32[4]{0} %i.21), algorithm=rng_default",
    ],
)
def test_documented_limits_are_kept(line: str) -> None:
    assert lint(MODULE.format(line=line)) == []


@pytest.mark.parametrize(
    ("op", "line", "reason"),
    [
        ("sort", "%s.50 = f32[4,8]{1,0} sort(f32[4,8]{1,0} %a.20), dimensions={1}, to_apply=%Add.1", "not among"),
        ("while", "%w.50 = (f32[4,8]{1,0}, s32[]) while((f32[4,8]{1,0}, s32[]) %t.49), condition=%c", "not among"),
        ("dynamic-slice", "%d.50 = f32[1,8]{1,0} dynamic-slice(f32[4,8]{1,0} %a.20, s32[] %i.21)", "not among"),
        ("set-dimension-size", "%d.50 = f32[<=4,8]{1,0} set-dimension-size(f32[4,8]{1,0} %a.20)", "not among"),
        ("add", "%d.50 = f32[<=4,8]{1,0} add(f32[4,8]{1,0} %a.20, f32[4,8]{1,0} %a.20)", "dynamic dimension"),
        ("add", "%d.50 = f32[?,8]{1,0} add(f32[4,8]{1,0} %a.20, f32[4,8]{1,0} %a.20)", "dynamic dimension"),
        ("convert", "%d.50 = c64[4,8]{1,0} convert(f32[4,8]{1,0} %a.20)", "complex"),
        ("convert", "%d.50 = f8e4m3fnuz[4,8]{1,0} convert(f32[4,8]{1,0} %a.20)", "another vendor"),
        ("reduce", REDUCE.replace("INIT", "zero.24").replace("COMPUTATION", "Subtract.12"), "applies subtract"),
        ("reduce", REDUCE.replace("INIT", "s.23").replace("COMPUTATION", "Add.1"), "initial value"),
        ("scatter", SCATTER.replace("COMPUTATION", "AddInts.8"), "integers"),
        ("reduce-window", WINDOW.replace("WINDOW", "{size=1x8 rhs_dilate=1x2}"), "dilated"),
        ("dynamic-update-slice", UPDATE.replace("INDEX", "s.23"), "index"),
        ("power", "%p.50 = f32[4,8]{1,0} power(f32[4,8]{1,0} %two.25, f32[4,8]{1,0} %a.20)", "exponent"),
        ("custom-call", CALL.replace("TARGET", "Sharding"), "unknown target Sharding"),
        ("rng", "%r.50 = f32[4]{0} rng(f32[] %s.23, f32[] %s.23), distribution=rng_normal", "distribution"),
        ("rng-bit-generator", "%r.50 = u32[4]{0} rng-bit-generator(s32[4] %i.21), algorithm=rng_philox", "algorithm"),
        ("shift-right-arithmetic", "%h.50 = s64[4,4] shift-right-arithmetic(s64[4,4] %n.22, s64[4,4] %n.22)", "32"),
        ("dot", "%d.50 = s64[4,4]{1,0} dot(s64[4,4]{1,0} %n.22, s64[4,4]{1,0} %n.22)", "64-bit"),
    ],
)  # fmt: skip
def test_what_is_not_documented_is_found_with_its_line(op: str, line: str, reason: str) -> None:
    findings = lint(MODULE.format(line=line))
    assert {(finding.op, finding.line) for finding in findings} == {(op, LINE)}
    assert any(reason in finding.reason for finding in findings)
    assert line in str(findings[0])


def test_an_operation_may_be_accepted_on_other_evidence() -> None:
    text = MODULE.format(line="%x.50 = s32[4]{0} xor(s32[4]{0} %i.21, s32[4]{0} %i.21)")
    assert [finding.op for finding in lint(text)] == ["xor"]
    assert lint(text, also={"xor"}) == []


def test_a_paged_decode_step_passes(xla: Any, decoder: Any) -> None:
    packed = decoder.inputs(0, 4)
    text = xla.lowered(lambda: decoder.step(packed), decoder.state)
    assert lint(text) == []
    ops = operators(text)
    assert (ops["scatter"], ops["gather"]) == (2 * 2 + 1, 2 * 2 + 2), ops


def test_the_reference_noise_needs_two_more_operators(xla: Any) -> None:
    rows, tokens = noise_keys(xla.device())
    findings = lint(xla.lowered(lambda: gumbel_noise(rows, token_keys(tokens))))
    assert {finding.op for finding in findings} == {"xor", "log-plus-one"}


def test_a_sampler_of_documented_operators_passes(xla: Any) -> None:
    rows, tokens = noise_keys(xla.device())
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)).to(xla.device())
    assert lint(xla.lowered(lambda: sample(logits, rows, tokens))) == []


def test_its_noise_is_the_references(xla: Any) -> None:
    rows, tokens = noise_keys(torch.device("cpu"))
    there, tokens_there = noise_keys(xla.device())
    noise = documented.gumbel_noise(there, tokens_there).cpu()
    torch.testing.assert_close(noise, gumbel_noise(rows, token_keys(tokens)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("op", "step"),
    [
        ("sort", lambda x: x.topk(5)),
        ("sort", lambda x: x.sort(-1)),
        ("sort", lambda x: x.argsort(-1)),
        ("reduce", lambda x: x.argmax(-1)),
        ("logistic", torch.nn.functional.silu),
    ],
    ids=["topk", "sort", "argsort", "argmax", "silu"],
)
def test_emitted_operators_that_must_not_pass(xla: Any, op: str, step: Callable[[Tensor], Any]) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(xla.device())
    findings: list[Finding] = lint(xla.lowered(lambda: step(x)))
    assert {finding.op for finding in findings} == {op}


def test_silu_in_documented_operators(xla: Any) -> None:
    x = torch.tensor([-200.0, -90.0, -1.0, 0.0, 1.0, 90.0])
    there = x.to(xla.device())
    assert lint(xla.lowered(lambda: there / (1.0 + torch.exp(-there)))) == []
    torch.testing.assert_close((there / (1.0 + torch.exp(-there))).cpu(), torch.nn.functional.silu(x))


def noise_keys(device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(row_keys(np.arange(8, dtype=np.int64) * 7919 - 5, np.arange(8, dtype=np.int32)))
    return rows[:, None].to(device), torch.arange(1000, dtype=torch.int32)[None].to(device)


def sample(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """A draw without a sort: the first of the largest of logits and noise."""
    scores = logits + documented.gumbel_noise(rows, tokens)
    best = scores.amax(-1, keepdim=True)
    return torch.where(scores == best, tokens, scores.shape[1]).amin(-1)
