"""A list of small attention cases under compute-sanitizer; run by hand on a GPU, since it takes minutes.

  PYTHONPATH=tests python tests/ops/sanitize.py memcheck
  PYTHONPATH=tests python tests/ops/sanitize.py racecheck --only 0 3

For racecheck, build with -DLEMO_CUDA_RACECHECK=ON (cuda/common/sm90/pipeline.cuh gives the reason): in a usual build it
reports accesses that are ordered. Exit status 0: the tool reported nothing. Only kernels of lemo's attention are
instrumented. Every tensor is allocated separately (no caching), so that memcheck sees a read beyond a tensor even if
another tensor follows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def listed() -> list:
    """What the tools run: every head_dim, packed and at original offsets, ragged tiles, weights, lists, an empty row
    list, one block, and options of scores. Two tiles of keys are enough for a pipeline to go round."""
    from support.attention_cases import DIMS, Attention

    return [
        *(Attention("ragged_64", 4, 1, dim, "rows") for dim in DIMS),
        *(Attention("gap_64", 4, 2, dim, "rows", given=True) for dim in (64, 128)),
        *(Attention("ragged_128", 2, 2, dim) for dim in (64, 128)),
        *(Attention("gap_128", 2, 1, dim, lists=True) for dim in DIMS),
        Attention("gap_128", 2, 2, 64, lists=True),
        Attention("gap_128", 2, 1, 128, "rows", given=True, lists=True),
        Attention("keep_none", given=True),
        Attention("block_64", 4, 1, 128, "strided"),
        *(Attention("chunks", 4, 2, dim) for dim in DIMS),
        *(Attention("more_queries", 2, 2, dim, "rows") for dim in (64, 128)),
        Attention("empty_sides", 2, 1, 128),
        Attention("kept_of_both", 4, 1, 96, "rows"),
        Attention("chunks", 2, 1, 64, "rows", given=True),
        *(Attention("ragged_128", 2, 1, dim, "rows", window=97) for dim in (*DIMS, 256)),
        Attention("gap_128", 2, 1, 64, "strided", window=2, softcap=3.0),
        *(Attention("gap_64", 2, 1, dim, "rows", given=True, softcap=3.0, sinks=True) for dim in (128, 256)),
        *(Attention("kept_of_both", 2, 1, dim, "rows", window=100) for dim in (128, 256)),
        *(Attention("gap_128", 2, 1, dim, softcap=2.0, lists=True) for dim in (64, 256)),
        Attention("more_queries", 2, 1, 96, window=60, sinks=True),
        Attention("gap_128", 8, 1, 64, "rows", window=128, sinks=True),
        Attention("gap_128", 2, 1, 128, "rows", given=True, window=150),
        Attention("ragged_128", 2, 1, 128, "rows", softcap=3.0),
        Attention("ragged_128", 2, 1, 256, softcap=3.0, window=97),
    ]


def has_options(case) -> bool:
    return bool(case.window or case.softcap or case.sinks or case.dim == 256)


def run(only: list[int] | None) -> None:
    import torch
    from support.cases import name_of
    from support.compare import check_half

    for i, case in enumerate(listed()):
        if only is None or i in only:
            check_half(case, torch.bfloat16)
            t = case.inputs("cuda", torch.bfloat16)
            for deterministic in (False, True):
                case.run(t, deterministic)
            torch.cuda.synchronize()
            print(f"{i}: {name_of(case)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=[*TOOLS, "none"], help="none: the cases alone, without a tool")
    parser.add_argument("--only", type=int, nargs="*", metavar="N", help="numbers of cases")
    args = parser.parse_args()
    if args.tool == "none":
        run(args.only)
        return 0
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, "--tool", args.tool, "--error-exitcode", "9", "--kernel-name", "kns=attention"]
    command += ["--leak-check", "no"] if args.tool == "memcheck" else []
    # A warp reads, __syncwarp orders its lanes, one of them arrives on the mbarrier: ordered through two barriers.
    command += ["--racecheck-indirect-barrier-dependency"] if args.tool == "racecheck" else []
    command += [sys.executable, __file__, "none"]
    if args.only is not None:
        command += ["--only", *map(str, args.only)]
    return subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
