"""Compile the CUDA kernels (no GPU needed), report registers and spills, and fail where a kernel spills.

  python .ci/cuda_compile.py --build build/cuda [--full] [--jobs N]

The commands are CMake's own, from compile_commands.json, so that what is checked is what is built. Without --full only
the tuned kernels are compiled: files for head_dim 80 and 96 and for float16 repeat the same code with other constants.
An object whose inputs have not changed since it passed is not compiled again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_TUNED = re.compile(r"_hd(80|96)|_f16|_fp16")


@dataclass(frozen=True)
class Result:
    """One object: seconds, the most registers of a kernel, and (kernel, bytes) for every kernel that spills."""

    label: str
    seconds: float
    registers: int
    spills: tuple[tuple[str, int], ...]
    error: str


def configure(build: Path) -> list[dict[str, str]]:
    command = [
        *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DLEMO_CUDA=ON", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DLEMO_CUDA_ARCHITECTURES=90a;80", f"-DPython_EXECUTABLE={sys.executable}"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout)
    entries = json.loads((build / "compile_commands.json").read_text())
    return [e for e in entries if e["file"].endswith(".cu")]


def demangle(names: list[str]) -> list[str]:
    try:
        return subprocess.run(["cu++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return names


def read_ptxas(text: str) -> tuple[int, tuple[tuple[str, int], ...]]:
    """The most registers, and kernels with their spilled bytes, from the output of ptxas -v."""
    registers, spills, kernel = 0, [], "?"
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'|Function properties for (\S+)", line):
            kernel = found.group(1) or found.group(2)
        if found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stored, loaded = map(int, found.groups())
            if stored or loaded:
                spills.append((kernel, stored + loaded))
        if found := re.search(r"Used (\d+) registers", line):
            registers = max(registers, int(found.group(1)))
    names = demangle([name for name, _ in spills]) if spills else []
    return registers, tuple((name, size) for name, (_, size) in zip(names, spills, strict=True))


def newest_input(dependencies: Path) -> float:
    """The latest change among the files a dependency file names; infinite where it or one of them is missing."""
    try:
        words = dependencies.read_text().replace("\\\n", " ").partition(":")[2].split()
        return max(Path(word).stat().st_mtime for word in words)
    except (OSError, ValueError):
        return float("inf")


def compile_one(entry: dict[str, str], build: Path) -> Result:
    arguments = shlex.split(entry["command"])
    target = Path(entry["directory"]) / arguments[arguments.index("-o") + 1]
    architectures = sorted(set(re.findall(r"sm_\d+a?(?=[\s\],])", entry["command"])))
    label = f"{Path(entry['file']).resolve().relative_to(ROOT)} {'+'.join(architectures)}"
    dependencies, passed = Path(f"{target}.deps"), Path(f"{target}.json")
    if passed.exists() and passed.stat().st_mtime > newest_input(dependencies):
        known = json.loads(passed.read_text())
        if known["command"] == entry["command"]:
            return Result(label, 0.0, known["registers"], (), "")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*arguments, "-Xptxas", "-v", "-MD", "-MF", str(dependencies)]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=entry["directory"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.monotonic() - begin
    if done.returncode:
        return Result(label, seconds, 0, (), done.stdout)
    registers, spills = read_ptxas(done.stdout)
    if not spills:
        passed.write_text(json.dumps({"command": entry["command"], "registers": registers}))
    return Result(label, seconds, registers, spills, "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, help="folder for objects, kept between calls")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="every kernel, not only the tuned ones")
    args = parser.parse_args()
    entries = configure(args.build.resolve())
    if not args.full:
        entries = [e for e in entries if not NOT_TUNED.search(Path(e["file"]).name)]
    if not entries:
        raise SystemExit("no CUDA file to compile: does cuda/CMakeLists.txt add any?")
    failed = 0
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda e: compile_one(e, args.build), entries):
            state = "failed" if result.error else "SPILLS" if result.spills else "ok"
            print(f"{state:6} {result.label:58} {result.registers:3} registers {result.seconds:6.1f} s", flush=True)
            for name, size in result.spills:
                print(f"       {size} bytes: {name[:180]}")
            if result.error:
                print(result.error)
            failed += bool(result.error or result.spills)
    print(f"{len(entries)} objects, {failed} failed, {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
