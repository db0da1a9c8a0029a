"""Tiny models made by transformers, and a way to run ours on the reference backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.contract import Limits, StepShape
from isthmus.model.decoder import Decoder
from isthmus.model.source import read_spec, resolve_model
from isthmus.model.weights import load_decoder
from isthmus.plan import RowStart, StepPlan
from isthmus.reference import ReferenceBackend
from isthmus.sampling_params import RowSampling

PROMPT = 40
GENERATED = 24
ABSOLUTE, RELATIVE = 3e-5, 1e-4
"""How far float32 logits may be from transformers', which adds up in another order."""

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        transformers.LlamaForCausalLM  # noqa: B018 imported on first use, with warnings
    return transformers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_model(transformers: Any) -> Callable[..., Any]:
    def make(architecture: str, **options: Any) -> Any:
        """A model whose every parameter, norms and biases too, is random; float32, ready to evaluate."""
        config_class = getattr(
            transformers, "Gemma3TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
        )
        config = config_class(**{**SMALL, **options}, attn_implementation="eager")
        generator = torch.Generator().manual_seed(17)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval().float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                base = 1.0 if "norm" in name and not architecture.startswith("Gemma") else 0.0
                parameter.copy_(base + noise * (0.2 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5))
        return model

    return make


class Runner:
    """Runs a decoder on one row of the reference backend."""

    def __init__(self, decoder: Decoder, backend: ReferenceBackend, max_model_len: int = 128) -> None:
        self.decoder = decoder
        self.backend = backend
        self.limits = Limits(
            max_rows=2,
            max_tokens=max_model_len,
            max_model_len=max_model_len,
            block_size=4,
            num_blocks=1 + -(-max_model_len // 4),
            vocab_size=decoder.spec.vocab_size,
        )
        layers = [layer.attention for layer in decoder.spec.layers]
        self.caches = backend.attention.allocate(layers, self.limits, "float32")
        self.device = backend.inputs.allocate(self.limits)

    def logits(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """All positions' logits, computed in spans of these lengths."""
        blocks = np.arange(1, self.limits.num_blocks, dtype=np.int32)
        start = RowStart(
            row=1,
            tokens=np.asarray(tokens, np.int32),
            num_prompt_tokens=len(tokens),
            sampling=RowSampling(max_tokens=1),
        )
        first = StepPlan(
            step=0,
            starts=(start,),
            block_rows=np.ones_like(blocks),
            block_indices=np.arange(len(blocks), dtype=np.int32),
            block_ids=blocks[::-1].copy(),
            **self._span(0, lengths[0]),
        )
        found, at = [self._step(first)], lengths[0]
        for step, length in enumerate(lengths[1:], 1):
            found.append(self._step(StepPlan(step=step, **self._span(at, length))))
            at += length
        return torch.cat(found)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens = [int(self.logits(prompt, [len(prompt)])[-1].argmax())]
        while len(tokens) < count:
            at = len(prompt) + len(tokens) - 1
            self.device.tokens[1, at] = tokens[-1]
            tokens.append(int(self._step(StepPlan(step=at, **self._span(at, 1)))[-1].argmax()))
        return tokens

    def _span(self, start: int, length: int) -> dict[str, Any]:
        return {
            "span_rows": np.array([1], np.int32),
            "span_starts": np.array([start], np.int32),
            "span_lengths": np.array([length], np.int32),
            "span_samples": np.array([True]),
        }

    def _step(self, plan: StepPlan) -> torch.Tensor:
        self.backend.inputs.upload(plan, self.device)
        inputs = self.backend.inputs.build(self.device, StepShape(plan.num_tokens, 1, 1))
        with torch.inference_mode():
            hidden = self.decoder.forward(inputs, self.caches)
            every = self.decoder.logits(hidden, None)
            sampled = self.decoder.logits(hidden, inputs.sample_tokens)
        torch.testing.assert_close(sampled[0], every[-1], atol=ABSOLUTE, rtol=RELATIVE)
        return every


def greedy_by_transformers(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Without a cache, so that only the model is compared."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def open_runner() -> Callable[..., Runner]:
    def load(path: Path, max_positions: int = 128, dtype: str = "float32") -> Runner:
        source = resolve_model(str(path))
        backend = ReferenceBackend()
        decoder = load_decoder(source, read_spec(source), backend, dtype, max_positions, progress=False)
        return Runner(decoder, backend, max_positions)

    return load


@pytest.fixture(scope="session")
def assert_same_model(open_runner: Callable[..., Runner]) -> Callable[..., Runner]:
    """``assert_same_model(model, path)``: logits in one span and in several, then greedy tokens."""

    def check(model: Any, path: Path, max_positions: int = 128) -> Runner:
        runner = open_runner(path, max_positions)
        prompt = np.random.default_rng(3).integers(3, runner.decoder.spec.vocab_size, PROMPT).tolist()
        with torch.inference_mode():
            expected = model(torch.tensor([prompt]), use_cache=False).logits[0]
        assert expected.std() > 0.1, "logits this flat would hide a fault"
        for lengths in ([PROMPT], [1, 7, 13, PROMPT - 21]):
            torch.testing.assert_close(runner.logits(prompt, lengths), expected, atol=ABSOLUTE, rtol=RELATIVE)
        assert runner.greedy(prompt, GENERATED) == greedy_by_transformers(model, prompt, GENERATED)
        return runner

    return check
