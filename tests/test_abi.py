"""What the binaries offer and need: the C interface and nothing else, and no torch anywhere."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lemo.__main__ import folder

HEADERS = Path(__file__).resolve().parents[1] / "cpp" / "include" / "lemo"
TORCH = re.compile(r"\b(at|c10|torch|caffe2)::|torch")


def tool(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def module_path() -> Path:
    spec = importlib.util.find_spec("lemo._C")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def library_path() -> Path:
    return folder("library-dir") / "liblemo.so"


def declared() -> set[str]:
    """Functions marked LEMO_API in the C headers."""
    text = "\n".join(path.read_text() for path in HEADERS.glob("*.h"))
    return set(re.findall(r"LEMO_API [^;(]*?\b(lemo_\w+)\s*\(", text))


def test_library_exports_exactly_the_headers() -> None:
    lines = tool("nm", "-D", "--defined-only", library_path()).splitlines()
    exported = {line.split()[-1].split("@")[0] for line in lines if line.strip()}
    assert len(declared()) > 15
    assert exported == declared()


@pytest.mark.parametrize("binary", [library_path, module_path])
def test_no_torch_symbol_and_no_torch_library(binary: Callable[[], str]) -> None:
    undefined = tool("nm", "-D", "--undefined-only", "--demangle", binary())
    assert [line for line in undefined.splitlines() if TORCH.search(line)] == []
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "--dynamic", binary()))
    allowed = r"lib(lemo|c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so(\.\d+)?|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


def test_module_imports_without_torch(version: str) -> None:
    """The module and the library load in an interpreter that has never seen torch."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('lemo._C', {str(module_path())!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.version(), module.has_backend(0))"
    )
    assert tool(sys.executable, "-c", code).split() == [version, "True"]
