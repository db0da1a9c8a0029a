"""``docs/contract.md`` and ``docs/writing-a-backend.md`` say what the code says."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus import hookspecs
from isthmus.contract import capabilities, execution, inputs, parts

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = (ROOT / "docs" / "contract.md").read_text()
GUIDE = ROOT / "docs" / "writing-a-backend.md"
EXAMPLE = ROOT / "examples" / "plugin"
SHAPE = re.compile(
    r"\[[a-z_ ,+*()/0-9]+\]|bytes|seconds|number|integer|Once|Called|text|A list|list of|name|True", re.I
)


def signature(function: Callable[..., Any]) -> str:
    names: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(name)
    return f"{function.__name__}({', '.join(name for name in names if name != 'self')})"


def sections(text: str, marks: str) -> dict[str, str]:
    """Bodies by heading, of headings with exactly these marks."""
    found = re.split(rf"^{marks} (?!#)(.+)$", text, flags=re.M)
    return dict(zip(found[1::2], found[2::2], strict=True))


def protocols() -> dict[str, type]:
    return {
        name: kind
        for module in (parts, execution)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and getattr(kind, "_is_protocol", False) and kind.__module__ == module.__name__
    }


def records() -> dict[str, type]:
    return {
        name: kind
        for module in (parts, inputs, capabilities, execution)
        for name, kind in vars(module).items()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__module__ == module.__name__
    }


def members(protocol: type) -> Iterator[str]:
    for name, member in vars(protocol).items():
        if isinstance(member, property):
            yield name
        elif inspect.isfunction(member) and not name.startswith("_"):
            yield signature(member)


CHAPTERS = sections(CONTRACT, "##")
SHARED = {"name", "device", "capabilities", "providers()", "close()"}
"""What an ``ExecutorBackend`` has in common with a ``Backend``, described there."""


@pytest.mark.parametrize("hook", [name for name in vars(hookspecs) if name.startswith("isthmus_")])
def test_every_hook_is_documented_with_its_arguments(hook: str) -> None:
    assert len(sections(CHAPTERS["Hooks"], "###")[signature(getattr(hookspecs, hook))].split()) > 15


@pytest.mark.parametrize("name", protocols())
def test_every_method_is_documented_with_its_arguments(name: str) -> None:
    documented = sections(CHAPTERS[name], "###")
    wanted = set(members(protocols()[name])) - (SHARED if name == "ExecutorBackend" else set())
    if name == "StepExecutor":
        wanted.discard("close()")
    assert wanted == set(documented)
    assert all(body.strip() for body in documented.values())


@pytest.mark.parametrize(
    "name", [name for name, kind in protocols().items() if name in {"Attention", "Ops", "Sampling"}]
)
def test_shapes_are_given_where_tensors_are_passed(name: str) -> None:
    for heading, body in sections(CHAPTERS[name], "###").items():
        method = getattr(protocols()[name], heading.partition("(")[0])
        annotations = " ".join(map(str, method.__annotations__.values()))
        if "Tensor" in annotations:
            assert re.search(r"\[[a-z_ ,+*()0-9]+\]", body), f"{name}.{heading} gives no shape"


@pytest.mark.parametrize("method", ["allocate(layers, limits, kv_dtype)", "prepare_linear(weight, bias)"])
def test_errors_are_named(method: str) -> None:
    body = next(sections(CHAPTERS[part], "###").get(method, "") for part in ("Attention", "Ops")
                if method in sections(CHAPTERS[part], "###"))  # fmt: skip
    assert "Unsupported" in body and "OutOfMemory" in body


@pytest.mark.parametrize("name", records())
def test_every_field_is_documented(name: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", CHAPTERS[name], flags=re.M)
    assert [field for field, _ in rows] == [field.name for field in dataclasses.fields(records()[name])]
    assert all(len(text.split()) >= 2 for _, text in rows)


@pytest.mark.parametrize("name", ["DeviceState", "StepInputs", "Sampled"])
def test_tensors_have_the_dtypes_and_shapes_of_the_source(name: str) -> None:
    source = inspect.getsource(records()[name])
    for field, shape in re.findall(r"^    (\w+): Tensor(?: \| None = None)?  # (\w+ \[[^\]]+\])", source, flags=re.M):
        assert f"| `{field}` | {shape} |" in CHAPTERS[name], f"{name}.{field} is {shape}"


def blocks(text: str) -> dict[str, list[str]]:
    """Code of each fence that follows a line with a file's name in bold."""
    found: dict[str, list[str]] = {}
    for name, code in re.findall(r"^\*\*`([\w./-]+)`\*\*\n\n```\w+\n(.*?)^```$", text, flags=re.M | re.S):
        found.setdefault(name, []).append(code)
    return found


def example_files() -> list[str]:
    found = [path for path in EXAMPLE.rglob("*") if path.suffix in {".py", ".toml"} and "__pycache__" not in path.parts]
    return sorted(str(path.relative_to(EXAMPLE)) for path in found)


@pytest.mark.parametrize("name", example_files())
def test_the_guides_code_is_the_examples(name: str) -> None:
    written = "\n".join(blocks(GUIDE.read_text())[name])
    assert written == (EXAMPLE / name).read_text(), f"docs/writing-a-backend.md and examples/plugin/{name} differ"


def test_the_guide_shows_no_file_that_there_is_not() -> None:
    assert sorted(blocks(GUIDE.read_text())) == example_files()
