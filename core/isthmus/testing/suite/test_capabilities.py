"""What the device says of itself: complete, in order, the same everywhere, and kept."""

from __future__ import annotations

import dataclasses

import pytest

from isthmus.contract import (
    Backend,
    Capabilities,
    DeviceInfo,
    ExecutorBackend,
    GraphScope,
    ShapePolicy,
)
from isthmus.errors import BackendError
from isthmus.testing.device import DeviceUnderTest

pytestmark = [pytest.mark.mandatory]


def test_the_device_is_one_that_the_probe_returned(isthmus_device: DeviceUnderTest) -> None:
    found = isthmus_device.plugin.probe()
    assert all(isinstance(info, DeviceInfo) for info in found)
    assert isthmus_device.backend.device.name in {info.name for info in found}
    assert isthmus_device.backend.name == isthmus_device.plugin.installed.name
    indices = [info.index for info in found]
    assert len(set(indices)) == len(indices), f"two devices have one index: {indices}"


def test_the_backend_has_every_part(isthmus_device: DeviceUnderTest) -> None:
    assert isinstance(isthmus_device.backend, Backend | ExecutorBackend)


def test_capabilities_are_equal_before_and_after_opening(isthmus_device: DeviceUnderTest) -> None:
    opened = isthmus_device.capabilities
    assert isinstance(opened, Capabilities)
    if isthmus_device.plugin.states_capabilities and not isthmus_device.settings:
        before = isthmus_device.plugin.capabilities(isthmus_device.backend.device)
        differing = [f.name for f in dataclasses.fields(opened) if getattr(opened, f.name) != getattr(before, f.name)]
        assert not differing, f"isthmus_capabilities and the open backend differ in {', '.join(differing)}"


def test_capabilities_make_sense(isthmus_device: DeviceUnderTest) -> None:
    c = isthmus_device.capabilities
    assert c.dtypes and c.kv_dtypes and c.block_sizes, "dtypes, kv_dtypes and block_sizes may not be empty"
    assert min(c.block_sizes) >= 1 and len(set(c.block_sizes)) == len(c.block_sizes)
    assert c.max_steps_in_flight >= 1 and c.default_max_rows >= 1 and c.default_max_tokens >= 1
    assert c.max_head_dim >= 64, "real models have heads of at least 64 numbers"
    for name in ("token_buckets", "span_buckets", "block_buckets", "mixed_graph_tokens"):
        buckets = getattr(c, name)
        assert list(buckets) == sorted(set(buckets)) and min(buckets, default=1) >= 1, f"{name} must ascend: {buckets}"
        if c.shapes is ShapePolicy.BUCKETED and name in ("token_buckets", "span_buckets"):
            assert buckets, f"shapes are bucketed, and {name} is empty"
    assert c.max_long_spans >= 0
    if c.graph_any_size:
        assert c.graph_scope is not GraphScope.NONE, "graph_any_size without a graph_scope"
    if c.mixed_graph_tokens:
        by_size = c.shapes is ShapePolicy.EXACT and not c.graph_any_size
        assert by_size and c.graph_scope is not GraphScope.NONE, "mixed_graph_tokens without a graph for each size"


def test_parts_say_who_serves_them(isthmus_device: DeviceUnderTest) -> None:
    providers = isthmus_device.backend.providers()
    assert providers, "providers() is empty: nobody can tell what runs"
    assert all(isinstance(text, str) and text for pair in providers.items() for text in pair)


def test_an_unknown_option_is_an_error_of_one_line(isthmus_device: DeviceUnderTest) -> None:
    options = {**isthmus_device.settings, "isthmus-certification-no-such-option": "1"}
    with pytest.raises(BackendError) as raised:
        isthmus_device.plugin.open(isthmus_device.backend.device, options).close()
    assert "\n" not in str(raised.value)
    assert "isthmus-certification-no-such-option" in str(raised.value), "the message does not name the option"


@pytest.mark.requires_parts
def test_memory_figures_are_of_this_device(isthmus_device: DeviceUnderTest) -> None:
    memory = isthmus_device.parts.memory
    available, total = memory.available_bytes(), memory.total_bytes()
    assert 0 < available <= total, f"{available} of {total} bytes available"


@pytest.mark.requires_parts
def test_a_device_alone_is_its_own_world(isthmus_device: DeviceUnderTest) -> None:
    assert isthmus_device.parts.collectives.world_size >= 1
