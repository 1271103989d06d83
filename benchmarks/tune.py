"""Tiles of the sm_90a attention kernels: compiles every feasible row of their tables, times all in turn and ranks them.

  python benchmarks/tune.py forward --head-dim 128                 # on the GPU's machine, with nvcc and CUTLASS
  python benchmarks/tune.py backward --head-dim 64 --compile-only --build tuned    # here first, then there:
  python benchmarks/tune.py backward --head-dim 64 --no-compile --build tuned

CUTLASS's headers are those of the pip package nvidia-cutlass, or of the folder $LEMO_CUTLASS_DIR.

Rates are TFLOP/s by number of tokens; share is a row's rate over the best rate of that size, where it is lowest. The
row marked * is the library's: the results of all others have to agree with its results, which the tests check. A
candidate that spills, cannot be launched or disagrees is left out, and the reason printed. The line printed last goes
into cuda/attention/sm90/forward_config.h or backward_config.h; nothing is tuned at run time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, compete, short_device_name, table, write_results

CUDA = ROOT / "cuda"
SM90 = CUDA / "attention" / "sm90"
TABLES = {"forward": SM90 / "forward_config.h", "backward": SM90 / "backward_config.h"}
SHARED_MEMORY = 227 * 1024
BARRIERS = 256  # bytes of shared memory, at most
REGISTERS = 65536
HEADS, KV_HEADS = 32, 8
SIZES = ((4096, False), (16384, False), (16384, True))  # tokens, and whether half of the blocks of 64 is kept
FIELDS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse", "cu_seqlens", "rows", "workspace", "stream")


class Arguments(ctypes.Structure):
    """TuneArguments of tune_entry.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in FIELDS),
        ("storage_rows", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("documents", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("key_heads", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


def padded(head_dim: int) -> int:
    """The head_dim whose kernel and table row serve this one."""
    return 96 if head_dim == 80 else head_dim


@dataclass(frozen=True)
class Candidate:
    """One row of a table."""

    kind: str
    head_dim: int
    values: tuple[int | bool, ...]

    @property
    def row(self) -> str:
        """As C++ writes it."""
        return ", ".join(str(value).lower() for value in self.values)

    @property
    def name(self) -> str:
        return "_".join([self.kind, str(self.head_dim), *self.row.split(", ")])

    @property
    def definition(self) -> str:
        tile = f"{self.kind.capitalize()}Tile"
        return f"template <>\nconstexpr {tile} k{tile}<{padded(self.head_dim)}> = {{{self.row}}};"


def library_row(kind: str, head_dim: int) -> Candidate:
    """The row that the table has now."""
    variable = f"k{kind.capitalize()}Tile<{padded(head_dim)}>"
    found = re.search(rf"{variable} = {{(\d[^}}]*)}}", TABLES[kind].read_text())
    if found is None:
        raise SystemExit(f"{TABLES[kind]}: no row of numbers for {variable}")
    words = found.group(1).replace(" ", "").split(",")
    return Candidate(kind, head_dim, tuple(w == "true" if w in ("true", "false") else int(w) for w in words))


def forward_candidates(head_dim: int) -> Iterator[Candidate]:
    """Queries, keys, stages, registers of the producer and of a consumer.

    A consumer thread holds S (keys / 2 registers), P (keys / 4) and O (head_dim / 2), and at least 32 more. A single
    consumer warpgroup would leave the tensor cores idle during its softmax. Queries have two stages. As many key tiles
    as the queries begin in have to be loaded at once.
    """
    width = padded(head_dim)
    for queries, keys, stages in itertools.product((128, 192), (64, 128, 192), (2, 3, 4)):
        warpgroups = queries // 64
        operands = 2 * width * 2 * (queries + stages * keys)
        staged = warpgroups * 4 * 16 * (width + 8) * 2
        if operands + staged + BARRIERS > SHARED_MEMORY or stages <= (queries - 64) // keys:
            continue
        # Warpgroups pass on what the block starts with: the same multiple of 8 for every thread.
        registers = REGISTERS // ((warpgroups + 1) * 128) // 8 * 8 * (warpgroups + 1)
        producer = 56 if width == 96 else 40 if warpgroups < 3 else 32
        consumer = min(240, (registers - producer) // warpgroups // 8 * 8)
        if keys * 3 // 4 + width // 2 + 32 <= consumer:
            yield Candidate("forward", head_dim, (queries, keys, stages, producer, consumer))


def backward_candidates(head_dim: int) -> Iterator[Candidate]:
    """Queries, stages of Q and of dO, whether dK runs a step late, and whether V stays in registers.

    128 keys stay. The order in which dQ leaves registers asks for 128 queries at head_dim 64 and for 64 above, late dK
    for a third stage of Q, and the gradients on their way out for the space that Q had. Mode `backward` adds weights.
    Above head_dim 64 there are no registers for V.
    """
    width = padded(head_dim)
    queries = 128 if width == 64 else 64
    weights = 128 * 8 + 32
    held_values = (False, True) if width == 64 else (False,)
    for q_stages, dout_stages, late, held in itertools.product((2, 3, 4), (1, 2, 3), (False, True), held_values):
        operands = 2 * width * (2 * 128 + (q_stages + dout_stages) * queries)
        scores, dq, stats = 2 * 2 * 128 * queries, 4 * queries * width, q_stages * queries * 8
        fits = operands + scores + dq + stats + weights + BARRIERS <= SHARED_MEMORY
        if fits and q_stages > (2 if late else 1) and 128 * (width + 8) <= q_stages * queries * width:
            yield Candidate("backward", head_dim, (queries, q_stages, dout_stages, late, held))


def find_candidates(kind: str, head_dim: int, only: list[str] | None) -> list[Candidate]:
    """The library's row, then the others that are feasible."""
    ours = library_row(kind, head_dim)
    others = (forward_candidates if kind == "forward" else backward_candidates)(head_dim)
    return [ours, *(c for c in others if c != ours and (not only or c.row.replace(" ", "") in only))]


def cutlass_headers() -> str:
    if folder := os.environ.get("LEMO_CUTLASS_DIR"):
        return folder
    package = importlib.util.find_spec("cutlass_library")  # not imported: only its folder is wanted
    if package is None or not package.submodule_search_locations:
        raise SystemExit("no CUTLASS headers: pip install nvidia-cutlass, or set LEMO_CUTLASS_DIR")
    return f"{package.submodule_search_locations[0]}/source/include"


def nvcc(*arguments: str) -> tuple[int, str]:
    """With the flags of cuda/CMakeLists.txt, in a release build; the exit status and what it printed."""
    program = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    flags = ["-O3", "-DNDEBUG", "-std=c++17", "--expt-relaxed-constexpr", "-gencode", "arch=compute_90a,code=sm_90a"]
    flags += ["-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += [f"-I{CUDA}", f"-I{ROOT}/cpp", f"-I{ROOT}/cpp/include", "-isystem", cutlass_headers()]
    done = subprocess.run([program, *flags, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def build(candidate: Candidate, folder: Path, objects: list[str]) -> str:
    """Makes the candidate's library; returns its fault, or ""."""
    source = SM90 / "instantiations" / f"{candidate.kind}_hd{padded(candidate.head_dim)}.cu"
    override = folder / f"{candidate.name}.h"  # nvcc would split a -D at its commas
    override.write_text(f"#define LEMO_TUNE_{candidate.kind.upper()} {candidate.row}\n")
    target = folder / f"{candidate.name}.so"
    target.unlink(missing_ok=True)
    status, text = nvcc("-include", str(override), "-shared", str(source), *objects, "-o", str(target))
    if status:
        return "does not compile: " + next((line for line in text.splitlines() if "error" in line), text)[:200]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", text))
    frame = max((int(n) for n in re.findall(r"(\d+) bytes stack frame", text)), default=0)
    fault = ""
    if spilled or frame:
        fault = f"{spilled} bytes spilled, {frame} of stack"
    elif re.search(r"\(C75\d\d\)|setmaxnreg ignored", text):
        fault = "wgmma serialized or no setmaxnreg"
    if fault:
        target.unlink()
    return fault


def build_all(candidates: list[Candidate], folder: Path, jobs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kind, head_dim = candidates[0].kind, candidates[0].head_dim
    entry = [f"-DLEMO_TUNE_HEAD_DIM={head_dim}", f"-DLEMO_TUNE_PASS={1 if kind == 'forward' else 2}"]
    sources = {ROOT / "benchmarks" / "tune_entry.cu": entry, CUDA / "common" / "device.cu": []}
    sources |= {path: [] for folder in (SM90, CUDA / "common" / "sm90") for path in sorted(folder.glob("*.cu"))}
    commands = [
        (*flags, "-c", str(source), "-o", str(folder / f"{kind}_{head_dim}_{source.stem}.o"))
        for source, flags in sources.items()
    ]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for status, text in pool.map(lambda command: nvcc(*command), commands):
            if status:
                raise SystemExit(text)
        objects = [command[-1] for command in commands]
        for candidate, fault in zip(candidates, pool.map(lambda c: build(c, folder, objects), candidates), strict=True):
            print(f"# {candidate.name}: {fault or 'compiled'}", flush=True)


class Problem:
    """Inputs of one size, the buffers of every candidate, and what its results have to be."""

    def __init__(self, kind: str, head_dim: int, tokens: int, half: bool) -> None:
        heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "dout": HEADS}
        drawn = {n: torch.randn(tokens, h, head_dim, device="cuda").bfloat16() for n, h in heads.items()}
        kept = torch.randperm(tokens // 64, device="cuda")[: tokens // 128 if half else None].sort().values
        rows = (kept[:, None] * 64 + torch.arange(64, device="cuda")).flatten().int()
        m = rows.numel()
        self.label = f"{tokens}{' half kept' if half else ''}"
        self.work = 2 * HEADS * head_dim * m**2 * (2.5 if kind == "backward" else 1)
        self.tensors = drawn | {f"d{n}": torch.zeros_like(drawn[n]) for n in "qkv"}
        self.tensors |= {"out": torch.zeros_like(drawn["q"]), "lse": torch.zeros(HEADS, m, device="cuda")}
        self.tensors["cu_seqlens"] = torch.tensor([0, m], dtype=torch.int32, device="cuda")
        self.tensors["workspace"] = torch.empty(0, dtype=torch.uint8, device="cuda")
        if half:
            self.tensors["rows"] = rows
        self.results = ("out", "lse") if kind == "forward" else ("dq", "dk", "dv")
        self.expected: dict[str, torch.Tensor] = {}
        self.arguments = Arguments(storage_rows=tokens, capacity=m, documents=1, heads=HEADS, key_heads=KV_HEADS)
        self.arguments.scale = head_dim**-0.5
        self.arguments.stream = torch.cuda.current_stream().cuda_stream
        for name, tensor in self.tensors.items():
            setattr(self.arguments, name, tensor.data_ptr())
        if kind == "backward":
            self.attend(rows.long())

    def attend(self, rows: torch.Tensor) -> None:
        """out and lse, which the backward pass is given."""
        q, k, v = (self.tensors[n][rows].transpose(0, 1)[None] for n in "qkv")
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[:2]
        self.tensors["out"][rows] = out[0].transpose(0, 1)
        self.tensors["lse"].copy_(lse[0])

    def agrees(self, library: ctypes.CDLL) -> bool:
        """Whether the candidate runs, with the results of the first one that did."""
        library.tune_workspace.restype = ctypes.c_int64
        size = library.tune_workspace(ctypes.byref(self.arguments))
        if size > self.tensors["workspace"].numel():  # one for all candidates: each writes what it reads of it
            self.tensors["workspace"] = torch.empty(size, dtype=torch.uint8, device="cuda")
            self.arguments.workspace = self.tensors["workspace"].data_ptr()
        for name in self.results:
            self.tensors[name].zero_()
        if library.tune_run(ctypes.byref(self.arguments)):
            return False
        torch.cuda.synchronize()
        found = {name: self.tensors[name].float() for name in self.results}
        self.expected = self.expected or found
        return all((found[n] - t).abs().max() <= 0.02 * t.abs().max() for n, t in self.expected.items())


def load(candidates: list[Candidate], folder: Path, problems: list[Problem]) -> dict[Candidate, ctypes.CDLL]:
    """Those that were built, run, and agree with the first one."""
    libraries = {}
    for candidate in candidates:
        path = folder / f"{candidate.name}.so"
        if path.exists():
            library = ctypes.CDLL(str(path.resolve()))
            try:
                agrees = all(problem.agrees(library) for problem in problems)
            except RuntimeError as error:  # a fault on the device ends the process's use of it
                raise SystemExit(f"{candidate.name}: {error}\nremove {path} and resume with --no-compile") from error
            print(f"# {candidate.name}: {'agrees' if agrees else 'does not run, or disagrees'}", flush=True)
            if agrees:
                libraries[candidate] = library
        if candidates[0] not in libraries:
            raise SystemExit(f"{path}: the library's row has to be there and run: others are compared with it")
    return libraries


def measure(candidates: list[Candidate], folder: Path) -> list[dict[str, Any]]:
    """A row per candidate, the best one first."""
    kind, head_dim = candidates[0].kind, candidates[0].head_dim
    problems = [Problem(kind, head_dim, *size) for size in SIZES]
    libraries = load(candidates, folder, problems)
    rows: list[dict[str, Any]] = [{"row": c.row, "library": c == candidates[0]} for c in libraries]
    shares: list[list[float]] = []
    for problem in problems:
        run = ctypes.byref(problem.arguments)
        times = compete({c.row: [partial(lib.tune_run, run)] for c, lib in libraries.items()}, 150.0 * len(libraries))
        for row in rows:
            row[problem.label] = round(problem.work / times[row["row"]] / 1e9, 1)
        shares.append([min(times.values()) / times[row["row"]] for row in rows])
    for row, of_sizes in zip(rows, zip(*shares, strict=True), strict=True):
        row["share"] = round(min(of_sizes), 3)
    return sorted(rows, key=lambda row: -row["share"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(TABLES))
    parser.add_argument("--head-dim", type=int, choices=[64, 80, 96, 128], default=128)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "tune", help="folder of the libraries")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (default: one a core)")
    parser.add_argument("--only", nargs="*", metavar="ROW", help='rows besides the library\'s, as "128,128,2,40,232"')
    parser.add_argument("--list", action="store_true", help="only list the candidates")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="time the libraries that --build holds")
    parser.add_argument("--out", help="result file, or a name in results/ (default: tune-KIND-hdN-GPU)")
    args = parser.parse_args()
    candidates = find_candidates(args.kind, args.head_dim, args.only)
    if args.list:
        return print("\n".join(("* " if c == candidates[0] else "  ") + c.row for c in candidates))
    if not args.compile_only and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none (--compile-only needs none)")
    if not args.no_compile:
        build_all(candidates, args.build, args.jobs)
    if args.compile_only:
        return None
    torch.manual_seed(0)
    rows = measure(candidates, args.build)
    name = args.out or f"tune-{args.kind}-hd{args.head_dim}-{short_device_name()}"
    print(f"written: {write_results(name, rows, kind=args.kind, head_dim=args.head_dim, rates='TFLOP/s by tokens')}")
    marked = [{"": "*" if row["library"] else "", **row} for row in rows]
    print(table(marked, [column for column in marked[0] if column != "library"]))
    print(next(c for c in candidates if c.row == rows[0]["row"]).definition)


if __name__ == "__main__":
    main()
