"""Runs in the environment that scripts/xla_env.py makes; skipped in any other."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if importlib.util.find_spec("torch_xla") is not None:
    os.environ.setdefault("PJRT_DEVICE", "CPU")  # before torch_xla is imported

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 64, 4, 2, 16, 97
BLOCK, BLOCKS, ROWS, TABLE, LENGTH = 4, 33, 8, 4, 20
"""Block 0 is the spare one; a row has ``TABLE`` blocks."""


class PagedDecoder:
    """A decode step as the engine's: paged keys and values written in place, tokens read and left on the device."""

    def __init__(self, device: torch.device, vocab: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(3)

        def weight(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device)

        self.device = device
        self.embedding = weight(vocab, HIDDEN)
        self.qkv = [weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN) for _ in range(LAYERS)]
        self.output = [weight(HIDDEN, HEADS * HEAD_DIM) for _ in range(LAYERS)]
        shape = (BLOCKS * BLOCK, KV_HEADS, HEAD_DIM)
        self.caches = [torch.zeros(shape, device=device) for _ in range(2 * LAYERS)]
        first = torch.arange(ROWS, dtype=torch.int32)[:, None] * 11 + 5
        self.tokens = F.pad(first, (0, LENGTH - 1)).to(device)  # int32 [rows, length]

    @property
    def state(self) -> list[Tensor]:
        return [*self.caches, self.tokens]

    def inputs(self, position: int, rows: int) -> Tensor:
        """int32 [rows, 3 + TABLE]: position, index into tokens, slot, block table."""
        row = torch.arange(rows, dtype=torch.int32)
        table = 1 + row[:, None] * TABLE + torch.arange(TABLE, dtype=torch.int32)
        slot = table[:, position // BLOCK] * BLOCK + position % BLOCK
        head = torch.stack([torch.full_like(row, position), row * LENGTH + position, slot], dim=1)
        return torch.cat([head, table], dim=1).to(self.device)

    def step(self, packed: Tensor) -> Tensor:
        position, index, slot = packed[:, 0], packed[:, 1].long(), packed[:, 2].long()
        x = self.embedding.index_select(0, self.tokens.view(-1).index_select(0, index))
        seen = torch.arange(TABLE * BLOCK, device=packed.device) <= position[:, None]
        for layer in range(LAYERS):
            x = x + self._attend(layer, x, slot, packed[:, 3:], seen) @ self.output[layer].T
        new = lowest_best(x @ self.embedding.T).int()
        self.tokens.view(-1).index_copy_(0, index + 1, new)
        return new

    def _attend(self, layer: int, x: Tensor, slot: Tensor, table: Tensor, seen: Tensor) -> Tensor:
        heads = (x @ self.qkv[layer].T).view(len(x), -1, HEAD_DIM)
        query, key, value = torch.split(heads, [HEADS, KV_HEADS, KV_HEADS], dim=1)
        keys, values = self.caches[2 * layer], self.caches[2 * layer + 1]
        keys.index_copy_(0, slot, key)
        values.index_copy_(0, slot, value)
        shape = (len(x), TABLE * BLOCK, KV_HEADS, HEAD_DIM)
        keys, values = (
            store.view(BLOCKS, -1).index_select(0, table.flatten()).view(shape).transpose(1, 2)
            for store in (keys, values)
        )
        scores = query.view(len(x), KV_HEADS, -1, HEAD_DIM) @ keys.transpose(2, 3) * HEAD_DIM**-0.5
        scores = torch.where(seen[:, None, None], scores, -1e30)
        return (scores.softmax(-1) @ values).reshape(len(x), -1)


def lowest_best(scores: Tensor) -> Tensor:
    """The first of each row's largest, by reductions that any compiler has."""
    ids = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(scores == scores.amax(-1, keepdim=True), ids, scores.shape[1]).amin(-1)


def expected(rows: Sequence[int]) -> tuple[PagedDecoder, list[Tensor]]:
    """Steps of these many rows, one after another, in torch on the host."""
    decoder = PagedDecoder(torch.device("cpu"))
    return decoder, [decoder.step(decoder.inputs(position, count)) for position, count in enumerate(rows)]


@pytest.fixture(scope="session")
def xla() -> ModuleType:
    pytest.importorskip("torch_xla", reason="needs torch_xla: see scripts/xla_env.py")
    from isthmus_static import xla

    return xla


@pytest.fixture
def decoder_of(xla: ModuleType) -> Callable[[int], PagedDecoder]:
    """By vocabulary.  Programs are kept for the process: a test that counts them takes one of its own."""

    def make(vocab: int) -> PagedDecoder:
        decoder = PagedDecoder(xla.device(), vocab)
        xla.wait()
        return decoder

    return make


@pytest.fixture
def decoder(decoder_of: Callable[[int], PagedDecoder]) -> PagedDecoder:
    return decoder_of(VOCAB)


@pytest.fixture
def on_host() -> Callable[[Sequence[int]], tuple[PagedDecoder, list[Tensor]]]:
    return expected


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield
