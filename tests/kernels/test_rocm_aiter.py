"""AITER's attention: when it is taken, and what the adapter makes of a step.

By default over stand-ins for the package.  ``-m slow`` fetches the real wheel (40 MB, once) and runs its kernels
interpreted against the reference, and compiles them for the architectures that it serves.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import neighbours
import pytest
import torch

from isthmus.contract import AttentionSpec
from isthmus.errors import BackendUnavailable
from isthmus_rocm import aiter
from isthmus_rocm.aiter import MODULE, PACKAGE, PARAMETERS, VERSION, AiterAttention, find_aiter, why_not

GOOD = f"def unified_attention({', '.join(PARAMETERS)}, alibi_slopes=None, sinks=None): ...\n"
STEPS = {
    "a prompt": [(0, 70)],
    "a chunk": [(45, 90)],
    "prompts": [(0, 33), (100, 40), (7, 2)],
    "decodes before": [(130, 1), (3, 1), (16, 50), (0, 5)],
    "decodes after": [(16, 50), (130, 1)],
}
LAYERS = {
    "plain": AttentionSpec(heads=4, kv_heads=2, head_dim=64, scale=0.125),
    "window": AttentionSpec(heads=4, kv_heads=2, head_dim=64, scale=0.125, window=20),
    "softcap": AttentionSpec(heads=6, kv_heads=2, head_dim=64, scale=0.2, softcap=3.0),
    "wide": AttentionSpec(heads=2, kv_heads=1, head_dim=128, scale=0.09),
    "odd": AttentionSpec(heads=2, kv_heads=2, head_dim=96, scale=0.1),
}


attention_tests = neighbours.neighbour(__file__, "test_attention")


def attend(
    function: Callable[..., Any],
    spans: list[tuple[int, int]],
    layer: AttentionSpec,
    dtype: torch.dtype = torch.float16,
    block_size: int = 16,
) -> None:
    """What the adapter over ``function`` gives for a step, against the reference."""
    blocks = 1 + 8 * -(-320 // block_size)
    limits = replace(attention_tests.LIMITS, block_size=block_size, num_blocks=blocks)
    cpu = torch.device("cpu")
    step = attention_tests.Step(cpu, "", spans, layer, dtype, limits)
    step.triton = AiterAttention(cpu, attention_tests.launch_table(""), 3, function)
    step.triton.allocate([layer], limits, str(dtype).removeprefix("torch."))
    attention_tests.check(step)


class Standin:
    """AITER's function as its source has it, in plain torch; counts its calls."""

    def __init__(self, attend_paged: Callable[..., None]) -> None:
        self.attend_paged = attend_paged
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> None:
        assert set(given) == set(PARAMETERS)
        self.calls.append(given)
        starts = given["cu_seqlens_q"].tolist()
        assert starts[0] == 0 and starts[-1] == len(given["q"]) == len(given["out"])
        lengths = [after - before for before, after in pairwise(starts)]
        self.attend_paged(
            *(given[name] for name in ("q", "k", "v", "out")),
            list(zip(starts, lengths, given["seqused_k"].tolist(), strict=False)),
            given["block_table"],
            scale=given["softmax_scale"],
            softcap=given["softcap"],
            window=given["window_size"][0] + 1,
        )


@pytest.fixture
def function(attend_paged: Callable[..., None]) -> Standin:
    return Standin(attend_paged)


@pytest.mark.parametrize(
    ("step", "layer"), [*((step, "plain") for step in STEPS), ("prompts", "window"), ("prompts", "softcap")]
)
def test_a_step_is_handed_over(function: Standin, step: str, layer: str) -> None:
    attend(function, STEPS[step], LAYERS[layer])
    assert len(function.calls) == 2  # the check attends twice
    assert len(function.calls[0]["q"]) == sum(length for _, length in STEPS[step])
    assert function.calls[0]["block_table"].shape[1] * 16 % aiter.KEY_TILE == 0


@pytest.mark.parametrize("block_size", [32, 128])
def test_the_table_covers_whole_tiles(function: Standin, block_size: int) -> None:
    attend(function, [(60, 70)], LAYERS["plain"], block_size=block_size)
    width = function.calls[0]["block_table"].shape[1]
    assert width * block_size >= 130 and width * block_size % aiter.KEY_TILE == 0


@pytest.mark.parametrize(
    ("spans", "layer", "dtype", "block_size"),
    [
        ([(20, 1), (60, 1)], LAYERS["plain"], torch.float16, 16),
        ([(0, 40)], LAYERS["plain"], torch.float16, aiter.KEY_TILE),
        ([(0, 40)], AttentionSpec(heads=2, kv_heads=2, head_dim=80, scale=0.1), torch.float16, 16),
    ],
    ids=["decodes", "blocks of its tile", "width"],
)
def test_what_is_left_to_the_triton_kernels(
    function: Standin, spans: list[tuple[int, int]], layer: AttentionSpec, dtype: torch.dtype, block_size: int
) -> None:
    attend(function, spans, layer, dtype, block_size)
    assert not function.calls


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Installs a package of the name, whose root notes that it was imported."""
    forget()
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(function: str, root: str = "") -> Path:
        module = tmp_path / Path(*MODULE.split(".")).with_suffix(".py")
        module.parent.mkdir(parents=True)
        for folder in (tmp_path / "aiter", tmp_path / "aiter/ops", tmp_path / "aiter/ops/triton"):
            (folder / "__init__.py").touch()
        (tmp_path / "aiter/__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n{root}\n")
        if function:
            module.write_text(function)
        importlib.invalidate_caches()
        return tmp_path / "imported"

    yield install
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]


@pytest.mark.parametrize("arch", aiter.ARCHITECTURES)
def test_it_is_found_by_its_arguments(package: Callable[..., Path], arch: str) -> None:
    imported = package(GOOD)
    assert find_aiter(arch).__name__ == "unified_attention"
    assert imported.exists()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("", "it has no aiter/ops/triton/unified_attention.py that can be read"),
        ("def unified_attention(:", "that can be read"),
        ("def attention(q): ...", "its unified_attention.py has no unified_attention"),
        (GOOD.replace("softcap, ", ""), r"takes other arguments \(q, k, v, out,"),
        (GOOD.replace("k_descale, v_descale", "descales"), "takes other arguments"),
        (GOOD.replace("sinks=None", "sinks"). replace("alibi_slopes=None", "alibi_slopes"), "takes other arguments"),
        (GOOD.replace("sinks=None", "sinks=None, *, mask"), "takes other arguments"),
    ],
)  # fmt: skip
def test_another_version_is_refused_and_never_imported(package: Callable[..., Path], function: str, says: str) -> None:
    imported = package(function)
    with pytest.raises(BackendUnavailable, match=says) as raised:
        find_aiter("gfx942")
    assert f"pip install {PACKAGE}=={VERSION}" in str(raised.value) and "\n" not in str(raised.value)
    assert not imported.exists()


def test_another_architecture_is_refused_and_nothing_imported(package: Callable[..., Path]) -> None:
    imported = package(GOOD)
    with pytest.raises(BackendUnavailable, match="is for gfx942 and gfx950, not gfx90a, or leave out aiter=on"):
        find_aiter("gfx90a")
    assert not imported.exists()


def test_what_does_not_load_is_said_in_a_line(package: Callable[..., Path]) -> None:
    package(GOOD, root="raise RuntimeError('Get GPU arch from rocminfo failed:\\n no such file')")
    with pytest.raises(BackendUnavailable, match="does not load: Get GPU arch from rocminfo failed: no such file"):
        find_aiter("gfx942")


def test_it_is_not_installed() -> None:
    if importlib.util.find_spec("aiter") is not None:
        pytest.skip("it is")
    with pytest.raises(BackendUnavailable, match=f"not installed; pip install {PACKAGE}=="):
        find_aiter("gfx942")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real package's Triton part, unpacked."""
    folder = tmp_path_factory.mktemp("aiter")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"{PACKAGE}=={VERSION}"]
    subprocess.run(pip, check=True, timeout=110)
    [file] = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        wanted = [name for name in archive.namelist() if name.startswith("aiter/ops/triton/") and name.endswith(".py")]
        archive.extractall(folder, wanted)
    return folder


def stand_in_for_its_root(wheel: Path) -> None:
    """The package's root and what looks at the device; its attention and kernels stay the real ones."""
    forget()
    for name in ("aiter", "aiter.ops", "aiter.ops.triton"):
        module = ModuleType(name)
        module.__path__ = [str(wheel.joinpath(*name.split(".")))]
        sys.modules[name] = module
    types = ModuleType("aiter.ops.triton.utils.types")
    types.e4m3_dtype = torch.float8_e4m3fnuz  # type: ignore[attr-defined]
    sys.modules[types.__name__] = types
    device = ModuleType("aiter.ops.triton.utils.device_info")
    device.get_num_sms = lambda: 304  # type: ignore[attr-defined]
    sys.modules[device.__name__] = device


@pytest.mark.slow
def test_the_real_function_has_the_arguments(wheel: Path) -> None:
    assert why_not(wheel.joinpath(*MODULE.split(".")).with_suffix(".py")) == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # rows of a tile that it does not store
@pytest.mark.parametrize(("layer", "dtype"), [*((layer, torch.float16) for layer in LAYERS), ("plain", torch.bfloat16)])
def test_the_real_kernels_agree_with_the_reference(wheel: Path, layer: str, dtype: torch.dtype) -> None:
    stand_in_for_its_root(wheel)
    try:
        function = importlib.import_module(MODULE).unified_attention
        for spans in STEPS.values():
            attend(function, spans, LAYERS[layer], dtype)
        attend(function, [(60, 70)], LAYERS[layer], dtype, block_size=128)
        attend(function, [(0, 256)], LAYERS[layer], dtype, block_size=32)
    finally:
        forget()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_why_blocks_of_its_tile_are_left_out(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN that another sequence left in a block reaches this one."""
    stand_in_for_its_root(wheel)
    monkeypatch.setattr(aiter, "KEY_TILE", 16)
    try:
        function = importlib.import_module(MODULE).unified_attention
        with pytest.raises(AssertionError, match="difference: nan"):
            attend(function, [(0, 40)], LAYERS["plain"], block_size=64)
    finally:
        forget()


COMPILE = """
import sys
import pytest, torch
import rocm_compile, test_rocm_aiter
from pathlib import Path
from isthmus_rocm.aiter import AiterAttention
from isthmus_rocm.targets import TARGETS

name = sys.argv[1]
target = TARGETS[name]
ahead = rocm_compile.AheadOfTime(name, target)
ahead.install()
test_rocm_aiter.stand_in_for_its_root(Path(sys.argv[2]))
from aiter.ops.triton.unified_attention import unified_attention
rocm_compile.TritonAttention = lambda *given, **more: AiterAttention(*given, unified_attention, **more)
shapes = [shape for shape in rocm_compile.SHAPES if shape.block_size != 64 and shape.suits(target)]
shapes += [rocm_compile.Shape(head_dim=size, block_size=16, window=512, softcap=30.0) for size in (64, 96, 128)]
for shape in shapes:
    rocm_compile.attention(ahead, target, rocm_compile.UNITS[name], shape, ((4, 512), (1, 100)))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", aiter.ARCHITECTURES)
def test_the_real_kernels_compile(wheel: Path, tmp_path: Path, arch: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(neighbours.__file__).parent)))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-c", COMPILE, arch, str(wheel)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    of_aiter = [result for result in results if result["kernel"] == "kernel_unified_attention_2d"]
    assert len(of_aiter) == 16 and all(result["matrix"].startswith("v_mfma") for result in of_aiter)
    # Its tiles are its own: a few spilled registers make them slower and not wrong.
    assert max(result["spilled"] for result in of_aiter) <= 32
    wrong = [
        result
        for result in of_aiter
        if not result["ok"] and result["problem"] != f"{result['spilled']} registers spilled"
    ]
    assert not wrong, wrong
