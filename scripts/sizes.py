"""Hold the project to its size: lines a file, lines of a function's body, lines in all.

Files of kernels (a ``kernels`` folder, or ``*_kernel.py``) may hold longer functions.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 50
MAX_TOTAL_LINES = 40_000
PRODUCT = ("core", "server", "backends")
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    problems: list[str] = []
    totals: dict[str, int] = {}
    for folder in (*PRODUCT, "tests", "benchmarks", "scripts", "examples"):
        for path in sorted([*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.[ch]pp")]):
            lines = path.read_text().splitlines()
            totals[folder] = totals.get(folder, 0) + len(lines)
            name = path.relative_to(ROOT)
            if len(lines) > MAX_FILE_LINES:
                problems.append(f"{name}: {len(lines)} lines, at most {MAX_FILE_LINES}")
            if folder in PRODUCT and path.suffix == ".py" and not is_kernel_file(path):
                problems += [f"{name}:{problem}" for problem in long_functions("\n".join(lines))]
    product = sum(totals.get(folder, 0) for folder in PRODUCT)
    if product > MAX_TOTAL_LINES:
        problems.append(f"{product} lines in {', '.join(PRODUCT)}; the budget is {MAX_TOTAL_LINES}")
    print("lines:", ", ".join(f"{folder} {count:,}" for folder, count in totals.items()), f"(product {product:,})")
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


def is_kernel_file(path: Path) -> bool:
    return "kernels" in path.parts or path.stem.endswith(("_kernel", "_kernels"))


def long_functions(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = body_lines(node)
            if length > MAX_FUNCTION_LINES:
                found.append(f"{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return found


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines after the signature and the docstring."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1 if body else 0


if __name__ == "__main__":
    sys.exit(main())
