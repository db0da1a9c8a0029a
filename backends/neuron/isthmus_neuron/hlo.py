"""A lint of HLO text: would AWS's compiler take it, as far as its documentation says?

The compiler's package is not public, so its own ``neuronx-cc list-operators --framework XLA`` cannot
be asked here.  What is accepted is what the documentation names:

- the table "Supported Operators", with its notes, on the page of the compiler's release notes,
  https://awsdocs-neuron.readthedocs-hosted.com/en/latest/release-notes/compiler/neuronx-cc/index.html
  (as it stood with 2.16, January 2025);
- the operations whose limits the compiler's error codes describe, with those limits,
  https://awsdocs-neuron.readthedocs-hosted.com/en/latest/compiler/error-codes/index.html
  (as of July 2026).

The table is old and known to be short; an operation that is not in it may well compile.  That a text
passes proves neither that it compiles nor that it fits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

_TABLE: Final = """
    abs add all-gather all-reduce and atan2 batch-norm-grad batch-norm-inference batch-norm-training
    bitcast-convert broadcast ceil clamp compare concatenate constant convert cosine custom-call divide dot
    dynamic-update-slice exponential floor gather get-tuple-element iota log maximum minimum multiply negate not
    pad parameter power reduce reshape reverse rng rng-bit-generator rsqrt scatter select select-and-scatter
    shift-right-logical sign sine slice sqrt subtract tanh transpose tuple
"""
OPERATORS: Final = frozenset(_TABLE.split())
"""The table's names, as HLO writes them: Exp is ``exponential``, Eq and Lt are ``compare``, and so on."""

LIMITED_OPERATORS: Final = frozenset({"convolution", "reduce-scatter", "reduce-window", "shift-right-arithmetic"})
"""Those that only the error codes speak of."""

REDUCTIONS: Final = frozenset({"add", "multiply", "maximum", "minimum"})

_TARGETS: Final = """
    AwsNeuronErf AwsNeuronGelu AwsNeuronGeluApprxTanh AwsNeuronGeluBackward AwsNeuronSilu AwsNeuronSiluBackward
    AwsNeuronRmsNorm AwsNeuronSoftmax AwsNeuronSoftmaxBackward AwsNeuronCollectiveMatmul AwsNeuronIntMatmult
    AwsNeuronArgMax AwsNeuronArgMin AwsNeuronTopK AwsNeuronDropoutMaskV1 AwsNeuronCustomNativeKernel
    AwsNeuronCustomOp AwsNeuronDevicePrint ResizeNearest ResizeBilinear ResizeNearestGrad
    AwsNeuronLNCShardingConstraint AwsNeuronTransferWithStaticRing AwsNeuronModuleMarkerStart-Forward
    AwsNeuronModuleMarkerStart-Backward AwsNeuronModuleMarkerEnd-Forward AwsNeuronModuleMarkerEnd-Backward
    NeuronBoundaryMarker-Start NeuronBoundaryMarker-End
"""
CUSTOM_CALLS: Final = frozenset(_TARGETS.split())
"""NCC_EVRF015."""

_INSTRUCTION: Final = re.compile(r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_OPERATION: Final = re.compile(r"\s*(?P<op>[a-z][\w-]*)\(")
_COMPUTATION: Final = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{\s*$")
_NAME: Final = re.compile(r"%([\w.-]+)")
_DYNAMIC: Final = re.compile(r"\[[^\]]*(?:<=|\?)")
_COMPLEX: Final = re.compile(r"\bc(?:64|128)\[")
_FOREIGN_FLOAT8: Final = re.compile(r"\bf8e\w+fnuz\[")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the documentation does not cover, or says is refused."""

    line: int
    """In the text, from 1."""
    op: str
    reason: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.op}: {self.reason}: {self.text}"


@dataclass(frozen=True, slots=True)
class _Instruction:
    line: int
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    text: str

    @property
    def dtype(self) -> str:
        return self.shape.lstrip("(").split("[", 1)[0]

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\"[^\"]*\"|\{{[^}}]*\}}|[^,\s]+)", self.text)
        return found[1].strip('"%') if found else ""


@dataclass(slots=True)
class _Module:
    instructions: list[_Instruction] = field(default_factory=list)
    by_name: dict[str, _Instruction] = field(default_factory=dict)
    roots: dict[str, _Instruction] = field(default_factory=dict)  # by computation


def lint(text: str, also: Collection[str] = ()) -> list[Finding]:
    """What in the HLO text the documentation does not cover; empty is good.

    ``also`` names operations to accept on other evidence than the documentation's.
    """
    module = _parse(text)
    return [
        Finding(instruction.line, instruction.op, reason, instruction.text)
        for instruction in module.instructions
        for reason in _reasons(instruction, module, also)
    ]


def operators(text: str) -> dict[str, int]:
    """How often each operation occurs."""
    counts: dict[str, int] = {}
    for instruction in _parse(text).instructions:
        counts[instruction.op] = counts.get(instruction.op, 0) + 1
    return counts


def _parse(text: str) -> _Module:
    module = _Module()
    computation = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _COMPUTATION.match(line):
            computation = header["name"]
            continue
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        shape, rest = _split_shape(found["rest"])
        operation = _OPERATION.match(rest)
        if operation is None:
            continue
        operands = tuple(_NAME.findall(_balanced(rest[operation.end() - 1 :])))
        instruction = _Instruction(number, found["name"], shape, operation["op"], operands, line.strip())
        module.instructions.append(instruction)
        module.by_name[instruction.name] = instruction
        if found["root"]:
            module.roots[computation] = instruction
    return module


def _split_shape(text: str) -> tuple[str, str]:
    """The shape, which for a tuple has parentheses and spaces, and what follows."""
    if text.startswith("("):
        shape = _balanced(text)
        return shape, text[len(shape) :]
    shape, _, rest = text.partition(" ")
    return shape, rest


def _balanced(text: str) -> str:
    """From an opening parenthesis to the one that closes it."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: index + 1]
    return text


def _reasons(instruction: _Instruction, module: _Module, also: Collection[str]) -> Iterator[str]:
    op = instruction.op
    if op not in OPERATORS and op not in LIMITED_OPERATORS and op not in also:
        yield "not among the operators that the documentation names"
    if _DYNAMIC.search(instruction.shape):
        yield "a dynamic dimension (NCC_EMOD025)"
    if _COMPLEX.search(instruction.shape):
        yield "a complex dtype (NCC_EVRF004)"
    if _FOREIGN_FLOAT8.search(instruction.shape):
        yield "an 8-bit float of another vendor (NCC_EVRF005)"
    if op in {"reduce", "reduce-window", "scatter", "all-reduce", "reduce-scatter"}:
        yield from _reduction(instruction, module)
    elif op in {"power", "dynamic-update-slice"}:
        constants = instruction.operands[1:] if op == "power" else instruction.operands[2:]
        if not all(_is_constant(name, module) for name in constants):
            yield "its exponent is not a constant" if op == "power" else "its index is not a constant"
    else:
        yield from _limits(instruction, module)


def _reduction(instruction: _Instruction, module: _Module) -> Iterator[str]:
    """Operations that apply a computation of two values."""
    op = instruction.op
    root = module.roots.get(instruction.attribute("to_apply"))
    overwrites = root is not None and root.op == "parameter"
    if op == "scatter" and overwrites:
        return
    if root is None or root.op not in REDUCTIONS:
        yield f"applies {root.op if root else 'an unknown computation'}; only add, multiply, maximum and minimum are"
    if op in {"reduce", "reduce-window"}:
        half = len(instruction.operands) // 2
        if not all(_is_constant(name, module) for name in instruction.operands[half:]):
            yield "its initial value is not a constant"
    elif instruction.dtype in {"s32", "u32", "s64", "u64", "pred"}:
        yield "computes with integers (NCC_EVRF016, NCC_EVRF060, NCC_EVRF061, NCC_EVRF063)"
    if op == "reduce-window":
        if len(instruction.operands) != 2:
            yield "has other than two operands (NCC_EVRF019)"
        if "_dilate=" in instruction.attribute("window"):
            yield "is dilated (NCC_EVRF017, NCC_EVRF018)"


def _limits(instruction: _Instruction, module: _Module) -> Iterator[str]:
    op = instruction.op
    if op == "custom-call" and instruction.attribute("custom_call_target") not in CUSTOM_CALLS:
        yield f"an unknown target {instruction.attribute('custom_call_target')} (NCC_EVRF015)"
    elif op == "rng" and instruction.attribute("distribution") != "rng_uniform":
        yield "a distribution other than uniform"
    elif op == "rng-bit-generator" and instruction.attribute("algorithm") != "rng_default":
        yield "an algorithm other than the default (NCC_EVRF006)"
    elif op == "shift-right-arithmetic" and instruction.dtype not in {"s32", "u32"}:
        yield "shifts other than 32 bits (NCC_EVRF022)"
    elif op == "dot" and any(
        name in module.by_name and module.by_name[name].dtype in {"s64", "u64"} for name in instruction.operands
    ):
        yield "multiplies matrices of 64-bit integers (NCC_EVRF035)"


def _is_constant(name: str, module: _Module) -> bool:
    """Whether a value is known when compiling."""
    instruction = module.by_name.get(name)
    if instruction is None:
        return False
    if instruction.op in {"broadcast", "convert", "reshape"}:
        return _is_constant(instruction.operands[0], module)
    return instruction.op == "constant"
