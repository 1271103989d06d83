"""Compile the CUDA kernels (no GPU needed), report registers, and fail if a kernel spills.

The sm_90a kernels of attention and scores have to satisfy more: no local memory at all, and no warning of the assembler
that it gave up overlapping matrix products (C7510) or ignored their register budgets.

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
SM90 = re.compile(r"(9attention|7scoring)4sm90")  # the namespaces, in mangled names
WARNING = re.compile(rf"\(C75\d\d\).*{SM90.pattern}|setmaxnreg ignored")
RULES = 3  # raise it with every new rule: what passed under the old ones is then compiled again


@dataclass(frozen=True)
class Result:
    """One object: seconds, the most registers of a kernel, and what is wrong with its kernels, a line each."""

    label: str
    seconds: float
    registers: int
    faults: tuple[str, ...]
    error: str


def configure(build: Path, full: bool) -> list[dict[str, str]]:
    command = [
        *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DLEMO_CUDA=ON", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DLEMO_CUDA_ARCHITECTURES=90a;80", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-DLEMO_CUDA_FULL={'ON' if full else 'OFF'}",
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


def read_ptxas(text: str) -> tuple[int, tuple[str, ...]]:
    """The most registers of a kernel, and the faults, from the output of ptxas -v."""
    registers, kernel = 0, "?"
    found: list[tuple[str, str]] = []
    warnings = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'|Function properties for (\S+)", line):
            kernel = match.group(1) or match.group(2)
        if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frame, stored, loaded = map(int, match.groups())
            if stored or loaded:
                found.append((kernel, f"spills {stored + loaded} bytes"))
            elif frame and SM90.search(kernel):
                found.append((kernel, f"{frame} bytes of local memory"))
        if match := re.search(r"Used (\d+) registers", line):
            registers = max(registers, int(match.group(1)))
        if WARNING.search(line):
            warnings.append(line.strip()[:300])
    names = demangle([name for name, _ in found]) if found else []
    faults = [f"{fault}: {name[:180]}" for name, (_, fault) in zip(names, found, strict=True)]
    return registers, (*faults, *warnings)


def newest_input(dependencies: Path) -> float:
    """The latest change among the files a dependency file names; infinite if it or one of them is missing."""
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
        if (known["command"], known.get("rules")) == (entry["command"], RULES):
            return Result(label, 0.0, known["registers"], (), "")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*arguments, "-Xptxas", "-v", "-MD", "-MF", str(dependencies)]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=entry["directory"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.monotonic() - begin
    if done.returncode:
        return Result(label, seconds, 0, (), done.stdout)
    registers, faults = read_ptxas(done.stdout)
    if not faults:
        passed.write_text(json.dumps({"command": entry["command"], "registers": registers, "rules": RULES}))
    return Result(label, seconds, registers, faults, "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, help="folder for objects, kept between calls")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="every kernel, not only the tuned ones")
    args = parser.parse_args()
    entries = configure(args.build.resolve(), args.full)
    if not args.full:
        entries = [e for e in entries if not NOT_TUNED.search(Path(e["file"]).name)]
    if not entries:
        raise SystemExit("no CUDA file to compile: does cuda/CMakeLists.txt add any?")
    failed = 0
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda e: compile_one(e, args.build), entries):
            state = "failed" if result.error else "FAULTS" if result.faults else "ok"
            print(f"{state:6} {result.label:58} {result.registers:3} registers {result.seconds:6.1f} s", flush=True)
            for fault in result.faults:
                print(f"       {fault}")
            if result.error:
                print(result.error)
            failed += bool(result.error or result.faults)
    print(f"{len(entries)} objects, {failed} failed, {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
