"""What starts an engine process, and what its code may not do."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import msgspec
import pytest

from isthmus.config import BackendOptions, CacheOptions, EngineOptions, ModelOptions, SchedulerOptions
from isthmus.engine.client import AsyncEngineClient
from isthmus.engine.messages import EngineStart


def test_start_options_survive_the_way() -> None:
    start = EngineStart(
        options=EngineOptions(
            model=ModelOptions(model="a/b", revision="r", max_model_len=7),
            cache=CacheOptions(block_size=32, memory_fraction=0.5, prefix_caching=False),
            scheduler=SchedulerOptions(max_num_seqs=3, overlap=False),
            backend=BackendOptions(device="x:1", options={"a": "b"}, graphs=False),
        ),
        to_engine="ipc://a",
        from_engine="ipc://b",
        parent_pid=5,
        progress=False,
        log_level="DEBUG",
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(start), type=EngineStart) == start


def test_a_temporary_folder_that_is_too_deep_for_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(Exception, match="set TMPDIR to a shorter one"):
        asyncio.run(
            AsyncEngineClient.start(
                EngineOptions(model=ModelOptions(model="toy"), backend=BackendOptions(device="null"))
            )
        )
    assert not list(deep.iterdir())


def test_nothing_here_unpickles_or_listens_on_a_network() -> None:
    import isthmus.engine

    forbidden = {"pickle", "dill", "cloudpickle", "marshal", "recv_pyobj", "send_pyobj", "eval", "exec", "loads"}
    for file in Path(isthmus.engine.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = {
                ast.Name: lambda n: [n.id],
                ast.Attribute: lambda n: [n.attr],
                ast.Import: lambda n: [alias.name for alias in n.names],
                ast.ImportFrom: lambda n: [n.module, *(alias.name for alias in n.names)],
            }.get(type(node), lambda n: [])(node)
            assert not forbidden & set(names), f"{file.name} uses {names}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "tcp:" not in node.value
