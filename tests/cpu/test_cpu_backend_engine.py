"""Whole models on the CPU backend: against the reference, eagerly and captured, and in any company."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.cache import BlockManager
from isthmus.contract import AttentionSpec, Backend, DeviceInfo, Limits
from isthmus.engine.core import EngineCore
from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.errors import BackendUnavailable
from isthmus.executor import Executor
from isthmus.model.source import ModelSource
from isthmus.model.spec import ExpertSpec, LayerSpec, ModelSpec, RopeSpec
from isthmus.model.weights import load_decoder
from isthmus.reference import ReferenceBackend
from isthmus.sampling_params import RowSampling
from isthmus.scheduler import Scheduler, SchedulerLimits
from isthmus_cpu.machine import processor_name
from isthmus_cpu.options import CpuOptions, KernelUse

MAX_LEN, VOCAB = 160, 131

PLAIN_ATTENTION = AttentionSpec(heads=6, kv_heads=2, head_dim=16, scale=16**-0.5)
LLAMA = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB,
    hidden=48,
    inner=80,
    layers=(LayerSpec(attention=PLAIN_ATTENTION),) * 2,
    ropes=(RopeSpec(rotary_dim=16),),
    max_position=MAX_LEN,
    norm_epsilon=1e-5,
    qkv_bias=True,
)
GEMMA = dataclasses.replace(
    LLAMA,
    architecture="Gemma2ForCausalLM",
    layers=(
        LayerSpec(attention=dataclasses.replace(PLAIN_ATTENTION, softcap=20.0, window=24)),
        LayerSpec(attention=dataclasses.replace(PLAIN_ATTENTION, softcap=20.0)),
    ),
    inner=72,  # no multiple of a panel
    activation="gelu_tanh",
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=True,
    post_norms=True,
    embedding_scale=48**0.5,
    final_softcap=30.0,
)
EXPERTS = dataclasses.replace(
    LLAMA,
    architecture="MixtralForCausalLM",
    qkv_bias=False,
    layers=(
        LayerSpec(attention=PLAIN_ATTENTION, experts=ExpertSpec(num_experts=6, top_k=2, inner=24, renormalize=True)),
    )
    * 2,
)
SPECS = {"llama": LLAMA, "gemma": GEMMA, "experts": EXPERTS}


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def open_cpu(kernels: KernelUse) -> Backend:
    from isthmus_cpu.backend import open_backend

    try:
        return open_backend(
            DeviceInfo(backend="cpu", index=0, name=processor_name()), CpuOptions(kernels=kernels, threads=2)
        )
    except BackendUnavailable as error:
        pytest.skip(str(error))


def generate(
    backend: Backend,
    spec: ModelSpec,
    prompts: list[list[int]],
    *,
    dtype: str = "float32",
    rows: int = 8,
    max_tokens: int = 64,
    num_blocks: int = 200,
    graphs: bool = True,
    prefix_caching: bool = False,
    sampling: RowSampling | None = None,
    at_once: bool = True,
) -> list[list[int]]:
    """Each prompt's output tokens."""
    limits = Limits(
        max_rows=rows,
        max_tokens=max_tokens,
        max_model_len=MAX_LEN,
        block_size=16,
        num_blocks=num_blocks,
        vocab_size=VOCAB,
    )
    source = ModelSource(name="tiny", path=Path("tiny"), kind="safetensors")
    decoder = load_decoder(source, spec, backend, dtype, MAX_LEN, random_weights=True, progress=False)
    caches = backend.attention.allocate([layer.attention for layer in spec.layers], limits, dtype)
    flight = backend.capabilities.max_steps_in_flight
    executor = Executor(backend, decoder, limits, caches, max_steps_in_flight=flight)
    if graphs:
        assert not executor.capture()
    scheduler = Scheduler(
        SchedulerLimits(
            max_num_seqs=rows, max_num_batched_tokens=max_tokens, max_model_len=MAX_LEN, steps_in_flight=flight
        ),
        BlockManager(num_blocks, 16, prefix_caching=prefix_caching),
    )
    core = EngineCore(scheduler, executor)
    outputs: dict[int, list[int]] = {index: [] for index in range(len(prompts))}

    def drain() -> None:
        while core.has_work:
            for item in core.step():
                assert not item.error
                outputs[item.request_id] += item.tokens

    for index, prompt in enumerate(prompts):
        parameters = sampling or RowSampling(max_tokens=12)
        core.add(AddRequest(request_id=index, prompt=pack_tokens(prompt), sampling=parameters))
        if not at_once:
            drain()
    drain()
    executor.close()
    return list(outputs.values())


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    lengths = np.random.default_rng(3)
    return [lengths.integers(0, VOCAB, size=count).tolist() for count in (1, 2, 17, 50, 100, 33, 16, 5, 70)]


@pytest.fixture(scope="module")
def wanted(prompts: list[list[int]]) -> Callable[[str], list[list[int]]]:
    made: dict[str, list[list[int]]] = {}

    def by_name(name: str) -> list[list[int]]:
        if name not in made:
            made[name] = generate(ReferenceBackend(), SPECS[name], prompts)
        return made[name]

    return by_name


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("graphs", [True, False])
def test_compiled_kernels_bring_the_references_tokens(
    name: str, graphs: bool, prompts: list[list[int]], wanted: Callable[[str], list[list[int]]]
) -> None:
    backend = open_cpu(KernelUse.REQUIRE)
    try:
        assert generate(backend, SPECS[name], prompts, graphs=graphs) == wanted(name)
    finally:
        backend.close()


@pytest.mark.parametrize("name", SPECS)
def test_the_plain_path_brings_the_references_tokens(
    name: str, prompts: list[list[int]], wanted: Callable[[str], list[list[int]]]
) -> None:
    backend = open_cpu(KernelUse.OFF)
    try:
        assert generate(backend, SPECS[name], prompts) == wanted(name)
    finally:
        backend.close()


@pytest.mark.parametrize("name", SPECS)
def test_company_chunks_and_caching_change_nothing_in_bfloat16(name: str, prompts: list[list[int]]) -> None:
    backend = open_cpu(KernelUse.REQUIRE)
    spec = SPECS[name]
    try:
        together = generate(backend, spec, prompts, dtype="bfloat16")
        alone = generate(backend, spec, prompts, dtype="bfloat16", at_once=False)
        chunked = generate(backend, spec, prompts, dtype="bfloat16", max_tokens=9, rows=7)
        preempted = generate(backend, spec, prompts, dtype="bfloat16", num_blocks=14)
        cached = generate(backend, spec, prompts * 2, dtype="bfloat16", prefix_caching=True)
        eager = generate(backend, spec, prompts, dtype="bfloat16", graphs=False)
    finally:
        backend.close()
    assert together == alone == chunked == preempted == eager
    assert cached == together * 2


def test_seeded_draws_are_the_references(prompts: list[list[int]]) -> None:
    backend = open_cpu(KernelUse.REQUIRE)
    sampling = RowSampling(max_tokens=10, temperature=0.8, top_k=20, top_p=0.9, seed=7)
    try:
        drawn = generate(backend, LLAMA, prompts, sampling=sampling)
    finally:
        backend.close()
    assert drawn == generate(ReferenceBackend(), LLAMA, prompts, sampling=sampling)
