"""A plugin whose backend is the reference but for one lie, which the option ``lie`` names."""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.contract import Capabilities, DeviceInfo, GraphScope
from isthmus.errors import BackendError
from isthmus.hookspecs import hookimpl
from isthmus.reference import (
    REFERENCE_CAPABILITIES,
    ReferenceAttention,
    ReferenceBackend,
    ReferenceInputs,
    ReferenceMemory,
    ReferenceOps,
    ReferenceSampling,
)
from isthmus.reference.memory import Done

CONTRACT_VERSION = (1, 0)
CPU = torch.device("cpu")
KEPT: list[Any] = []


class NoWindow(ReferenceAttention):
    def attend(self, query, cache, layer, plan, inputs):
        return super().attend(query, cache, dataclasses.replace(layer, window=0), plan, inputs)


class NoSoftcap(ReferenceAttention):
    def attend(self, query, cache, layer, plan, inputs):
        return super().attend(query, cache, dataclasses.replace(layer, softcap=0.0), plan, inputs)


class NeighbouringBlocks(ReferenceAttention):
    """Takes a row's blocks to lie one after another."""

    def plan(self, inputs):
        tables = inputs.block_tables
        straight = tables[:, :1] + torch.arange(tables.shape[1], dtype=tables.dtype)
        most = int(tables.max())
        return super().plan(dataclasses.replace(inputs, block_tables=straight.clamp(max=most)))


class KeepsCaches(ReferenceAttention):
    def allocate(self, layers, limits, kv_dtype):
        caches = super().allocate(layers, limits, kv_dtype)
        KEPT.append([torch.ones(2**21) for _ in caches])
        return caches


class Coarse(ReferenceOps):
    """float32 that is not."""

    def linear(self, x, weight):
        return super().linear(x.bfloat16().to(x.dtype), weight)


class NoBias(ReferenceOps):
    def prepare_linear(self, weight, bias=None):
        return super().prepare_linear(weight)


class WrongShape(ReferenceOps):
    def gated_activation(self, gate_up, activation):
        return super().gated_activation(gate_up, activation)[:, :-1]


class Skips(ReferenceSampling):
    def sample(self, logits, inputs, device, state, num_logprobs):
        pytest.skip("undeclared: sampling is left to the reader")


class Dies(ReferenceSampling):
    def sample(self, logits, inputs, device, state, num_logprobs):
        os._exit(9)


class NoSeed(ReferenceSampling):
    def apply(self, state, plan):
        super().apply(state, plan)
        state.seed[:] = np.random.default_rng().integers(0, 2**40, len(state.seed))


class NoTopP(ReferenceSampling):
    def apply(self, state, plan):
        super().apply(state, plan)
        state.top_p[:] = 1.0


class NoPenalties(ReferenceSampling):
    def apply(self, state, plan):
        super().apply(state, plan)
        state.repetition[:] = 1.0


class SpoiltBatch(ReferenceSampling):
    """One bad row marks all."""

    def sample(self, logits, inputs, device, state, num_logprobs):
        sampled = super().sample(logits, inputs, device, state, num_logprobs)
        sampled.invalid[:] = sampled.invalid.any()
        return sampled


class LateLogprobs(ReferenceSampling):
    """Of adjusted logits."""

    def sample(self, logits, inputs, device, state, num_logprobs):
        return super().sample(logits * 0.5, inputs, device, state, num_logprobs)


class EarlyTokens(ReferenceInputs):
    """Reads tokens when a plan is uploaded."""

    def upload(self, plan, device):
        super().upload(plan, device)
        self._early = device.tokens.clone()

    def build(self, device, shape):
        early = dataclasses.replace(device, tokens=self._early)
        return super().build(early, shape)


class Views(ReferenceMemory):
    def fetch(self, tensors):
        return Done([tensor.numpy() for tensor in tensors])


class LeavesThread(ReferenceMemory):
    def __init__(self, device, **more):
        super().__init__(device, **more)
        self.stay = threading.Event()
        threading.Thread(target=lambda: self.stay.wait(8), name="left-behind").start()


PARTS: dict[str, dict[str, Any]] = {
    "window": {"attention": NoWindow},
    "softcap": {"attention": NoSoftcap},
    "blocks": {"attention": NeighbouringBlocks},
    "leak": {"attention": KeepsCaches},
    "coarse": {"ops": Coarse},
    "bias": {"ops": NoBias},
    "shape": {"ops": WrongShape},
    "skips": {"sampling": Skips},
    "dies": {"sampling": Dies},
    "seed": {"sampling": NoSeed},
    "top_p": {"sampling": NoTopP},
    "penalties": {"sampling": NoPenalties},
    "batch": {"sampling": SpoiltBatch},
    "logprobs": {"sampling": LateLogprobs},
    "tokens": {"inputs": EarlyTokens},
    "fetch": {"memory": Views},
    "thread": {"memory": LeavesThread},
}
CLAIMS: dict[str, Capabilities] = {
    "graphs": dataclasses.replace(REFERENCE_CAPABILITIES, graph_scope=GraphScope.STEP),
    "buckets": dataclasses.replace(REFERENCE_CAPABILITIES, token_buckets=(64, 8)),
    "nothing": Capabilities(dtypes=(), kv_dtypes=()),
}


@hookimpl
def isthmus_probe() -> list[DeviceInfo]:
    return [DeviceInfo(backend="liar", index=0, name="cpu", auto=False)]


@hookimpl
def isthmus_open(device: DeviceInfo, options: dict[str, Any]) -> ReferenceBackend:
    lie = options.get("lie", "")
    if set(options) - {"lie"} and lie != "options":
        raise BackendError(f"backend 'liar' has no option {sorted(set(options) - {'lie'})[0]!r}")
    parts = {part: kind(CPU) for part, kind in PARTS.get(lie, {}).items()}
    return ReferenceBackend(name="liar", capabilities=CLAIMS.get(lie, REFERENCE_CAPABILITIES), **parts)
