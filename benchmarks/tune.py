"""Tiles of the Hopper attention kernels: compiles every feasible row of their tables, times it and prints the best.

  python benchmarks/tune.py forward --head-dim 128                 # on the GPU's machine, with nvcc
  python benchmarks/tune.py backward --head-dim 64 --compile-only --build tuned    # here first, then there:
  python benchmarks/tune.py backward --head-dim 64 --no-compile --build tuned

The line it prints goes into cuda/attention/hopper/config.h or backward_config.h; nothing is tuned at run time. A
candidate that spills, cannot be launched or disagrees with the others is left out, and the reason printed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, compete, table

SHARED_MEMORY = 227 * 1024
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


@dataclass(frozen=True)
class Candidate:
    """One row of a table, as C++ writes it."""

    kind: str
    head_dim: int
    values: tuple[int, ...]

    @property
    def row(self) -> str:
        values = [str(v) for v in self.values]
        if self.kind == "backward":
            values[-1] = "true" if self.values[-1] else "false"
        return ", ".join(values)

    @property
    def name(self) -> str:
        return "_".join([self.kind, str(self.head_dim), *map(str, self.values)])


def forward_candidates(head_dim: int) -> Iterator[Candidate]:
    """Queries, keys, stages, registers of the producer and of a consumer.

    A consumer thread holds S (keys / 2 registers), P (keys / 4) and O (head_dim / 2), and at least 32 more. A single
    consumer warpgroup would leave the tensor cores idle during its softmax.
    """
    width = 96 if head_dim == 80 else head_dim
    for queries, keys, stages in itertools.product((128, 192), (64, 128, 192), (2, 3, 4)):
        warpgroups = queries // 64
        staged = warpgroups * 4 * 16 * (width + 8) * 2
        if 2 * width * (queries + 2 * stages * keys) + staged + 1024 > SHARED_MEMORY:
            continue
        producer = 56 if width == 96 else 40 if warpgroups < 3 else 32
        consumer = min(240, (REGISTERS // 128 - producer) // warpgroups // 8 * 8)
        if keys * 3 // 4 + width // 2 + 32 <= consumer:
            yield Candidate("forward", head_dim, (queries, keys, stages, producer, consumer))


def backward_candidates(head_dim: int) -> Iterator[Candidate]:
    """Queries, stages of Q and of dO, and whether dK runs a step late.

    128 keys stay; a consumer thread holds dK and dV (head_dim registers), S and dP (queries), and about 40 more.
    """
    width = 96 if head_dim == 80 else head_dim
    for queries, q_stages, dout_stages, late in itertools.product((64, 128), (2, 3, 4), (1, 2, 3), (0, 1)):
        operands = 2 * width * (2 * 128 + (q_stages + dout_stages) * queries)
        scratch = 2 * 2 * 128 * queries + 8 * 4096 + q_stages * queries * 8
        if operands + scratch + 1024 <= SHARED_MEMORY and width + queries + 40 <= 240:
            yield Candidate("backward", head_dim, (queries, q_stages, dout_stages, late))


def nvcc(*arguments: str) -> tuple[int, str]:
    program = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    import cutlass_library

    headers = Path(cutlass_library.__file__).parent / "source" / "include"
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-gencode", "arch=compute_90a,code=sm_90a"]
    flags += ["-Xptxas", "-v", "-Xcompiler", "-fPIC", f"-I{ROOT}", f"-I{ROOT}/cpp", f"-I{ROOT}/cpp/include"]
    command = [program, *flags, "-isystem", str(headers), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def build(candidate: Candidate, folder: Path, shared: list[str]) -> str:
    """Makes the candidate's library; returns what is wrong with it, or ""."""
    width = 96 if candidate.head_dim == 80 else candidate.head_dim
    source = ROOT / "cuda" / "attention" / "hopper" / f"{candidate.kind}_hd{width}.cu"
    override = folder / f"{candidate.name}.h"  # nvcc would split a -D at its commas
    override.write_text(f"#define LEMO_TUNE_{candidate.kind.upper()} {candidate.row}\n")
    target = folder / f"{candidate.name}.so"
    status, text = nvcc("-include", str(override), "-shared", str(source), *shared, "-o", str(target))
    if status:
        return "does not compile: " + next((line for line in text.splitlines() if "error" in line), text)[:120]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", text))
    frame = max((int(n) for n in re.findall(r"(\d+) bytes stack frame", text)), default=0)
    if spilled or frame or "C7510" in text or "setmaxnreg ignored" in text:
        target.unlink()
        return f"{spilled} bytes spilled, {frame} of stack" if spilled or frame else "wgmma serialised or no setmaxnreg"
    return ""


def build_all(candidates: list[Candidate], folder: Path, jobs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kind, head_dim = candidates[0].kind, candidates[0].head_dim
    passes = {"forward": 1, "backward": 2}
    shared = []
    for source, *flags in (
        ("benchmarks/tune_entry.cu", f"-DLEMO_TUNE_HEAD_DIM={head_dim}", f"-DLEMO_TUNE_PASS={passes[kind]}"),
        ("cuda/attention/hopper/row_tensor.cu",),
        ("cuda/common/device.cu",),
    ):
        shared.append(str(folder / f"{Path(source).stem}.o"))
        status, text = nvcc(*flags, "-c", str(ROOT / source), "-o", shared[-1])
        if status:
            raise SystemExit(text)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for candidate, fault in zip(candidates, pool.map(lambda c: build(c, folder, shared), candidates), strict=True):
            print(f"# {candidate.name}: {fault or 'compiled'}", flush=True)


class Problem:
    """Inputs of one size, and the results of the first candidate that ran."""

    def __init__(self, kind: str, head_dim: int, tokens: int, half: bool) -> None:
        heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "dout": HEADS}
        draw = {n: torch.randn(tokens, h, head_dim, device="cuda").bfloat16() for n, h in heads.items()}
        kept = torch.randperm(tokens // 64, device="cuda")[: tokens // 128 if half else None].sort().values
        rows = (kept[:, None] * 64 + torch.arange(64, device="cuda")).flatten().int()
        self.m = rows.numel()
        self.tensors = draw | {f"d{n}": torch.zeros_like(draw[n]) for n in "qkv"}
        self.tensors |= {"out": torch.zeros_like(draw["q"]), "lse": torch.zeros(HEADS, self.m, device="cuda")}
        self.tensors["cu_seqlens"] = torch.tensor([0, self.m], dtype=torch.int32, device="cuda")
        if half:
            self.tensors["rows"] = rows
        self.results = ("out",) if kind == "forward" else ("dq", "dk", "dv")
        self.expected: dict[str, torch.Tensor] = {}
        self.label = f"{tokens}{' half' if half else ''}"
        self.arguments = Arguments(storage_rows=tokens, capacity=self.m, documents=1, heads=HEADS, key_heads=KV_HEADS)
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

    def run(self, library: ctypes.CDLL) -> bool:
        """Whether the candidate runs and agrees with the others."""
        library.tune_workspace.restype = ctypes.c_int64
        size = library.tune_workspace(ctypes.byref(self.arguments))
        self.workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.arguments.workspace = self.workspace.data_ptr()
        for name in self.results:
            self.tensors[name].zero_()
        if library.tune_run(ctypes.byref(self.arguments)):
            return False
        torch.cuda.synchronize()
        found = {name: self.tensors[name].float() for name in self.results}
        if not self.expected:
            self.expected = found
        limits = {name: 0.02 * t.abs().max() for name, t in self.expected.items()}
        return all((found[name] - t).abs().max() <= limits[name] for name, t in self.expected.items())


def measure(candidates: list[Candidate], folder: Path) -> list[dict[str, Any]]:
    kind, head_dim = candidates[0].kind, candidates[0].head_dim
    problems = [Problem(kind, head_dim, *size) for size in SIZES]
    rows = []
    for candidate in candidates:
        path = folder / f"{candidate.name}.so"
        if not path.exists():
            continue
        library = ctypes.CDLL(str(path.resolve()))
        if not all(problem.run(library) for problem in problems):
            print(f"# {candidate.name}: does not run, or disagrees with {candidates[0].name}", flush=True)
            continue
        row: dict[str, Any] = {"row": candidate.row}
        for problem in problems:
            problem.run(library)  # its workspace is now this candidate's
            ms = compete({"ours": [partial(library.tune_run, ctypes.byref(problem.arguments))]}, 150.0)["ours"]
            work = 2 * HEADS * head_dim * problem.m**2 * (2.5 if kind == "backward" else 1)
            row[problem.label] = round(work / ms / 1e9, 1)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["forward", "backward"])
    parser.add_argument("--head-dim", type=int, choices=[64, 80, 96, 128], default=128)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "tune", help="folder of the libraries")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--only", nargs="*", metavar="ROW", help='candidates by their row, as "128,128,2,40,232"')
    parser.add_argument("--list", action="store_true", help="only list the candidates")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="time the libraries that --build holds")
    args = parser.parse_args()
    find = forward_candidates if args.kind == "forward" else backward_candidates
    candidates = [c for c in find(args.head_dim) if not args.only or c.row.replace(" ", "") in args.only]
    if not candidates:
        parser.error("no candidate is feasible")
    if args.list:
        return print("\n".join(c.row for c in candidates))
    if not args.no_compile:
        build_all(candidates, args.build, args.jobs)
    if args.compile_only:
        return None
    rows = measure(candidates, args.build)
    labels = list(rows[0])[1:] if rows else []
    best = max(rows, key=lambda row: min(row[label] / max(r[label] for r in rows) for label in labels), default=None)
    print(table(rows, ["row", *labels]))
    print(json.dumps(rows))
    if best is not None:
        struct = args.kind.capitalize() + "Tile"
        width = 96 if args.head_dim == 80 else args.head_dim
        print(f"template <>\nconstexpr {struct} k{struct}<{width}> = {{{best['row']}}};")


if __name__ == "__main__":
    main()
