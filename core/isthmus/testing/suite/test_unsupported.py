"""What the device does not declare is refused in one line, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import InvalidRequest, Unsupported
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.engines import Arrangement, Engine
from isthmus.testing.tiny_model import write_tiny_model

pytestmark = [pytest.mark.requires_parts]


def refused(device: DeviceUnderTest, folder: Path, how: dict[str, Any], model: str = "llama", **config: Any) -> None:
    settings = {"dtype": device.capabilities.dtypes[0], **how}
    with pytest.raises(Unsupported) as raised:
        Engine(device.backend, str(write_tiny_model(folder, model, **config)), Arrangement(**settings)).close()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float7_e3m3"])
def test_dtypes(isthmus_device: DeviceUnderTest, tmp_path: Path, dtype: str) -> None:
    if dtype not in isthmus_device.capabilities.dtypes:
        refused(isthmus_device, tmp_path, {"dtype": dtype})


def test_block_sizes(isthmus_device: DeviceUnderTest, tmp_path: Path) -> None:
    odd = next(size for size in (3, 5, 7, 11, 13) if size not in isthmus_device.capabilities.block_sizes)
    refused(isthmus_device, tmp_path, {"block_size": odd})


def test_heads_that_are_too_wide(isthmus_device: DeviceUnderTest, tmp_path: Path) -> None:
    refused(isthmus_device, tmp_path, {}, head_dim=2 * (isthmus_device.capabilities.max_head_dim // 2 + 8))


@pytest.mark.parametrize(
    ("capability", "asked"), [("logprobs", {"num_logprobs": 1}), ("prompt_logprobs", {"num_prompt_logprobs": 1})]
)
def test_log_probabilities(
    isthmus_device: DeviceUnderTest, tmp_path: Path, capability: str, asked: dict[str, Any]
) -> None:
    if isthmus_device.declares(capability):
        return
    how = Arrangement(dtype=isthmus_device.capabilities.dtypes[0], rows=1, tokens=16)
    engine = Engine(isthmus_device.backend, isthmus_device.model or str(write_tiny_model(tmp_path)), how)
    with pytest.raises(InvalidRequest) as raised:
        engine.run([[1, 2, 3]], RowSampling(max_tokens=1, **asked))
    engine.close()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("capability", "model"), [("experts", "mixtral"), ("sliding_window", "gemma2"), ("logit_softcap", "gemma2")]
)
def test_models_that_need_more(isthmus_device: DeviceUnderTest, tmp_path: Path, capability: str, model: str) -> None:
    if not isthmus_device.declares(capability):
        refused(isthmus_device, tmp_path, {}, model)
