"""Activations of one LoRA step in which nothing is recomputed, and its time, against what a user would run instead.

Llama-3-8B shape with random weights, LoRA r=8 on q, k, v, o, batch 1, bf16. The peer is transformers + PEFT + Liger
with cuDNN attention; ours is the same model under `lemo.apply`, mode "skip". `activation_mib` is the peak of a step
minus what is allocated before it (weights, adapters, optimizer state); `step_ms` is the median step. Ratios are ours
over the peer's. `benchmarks/step.py --recompute none` measures the same and the other modes.

  python benchmarks/activation.py
  python benchmarks/activation.py --shape tiny --context 512     # a smoke run, also without a GPU (no memory figures)
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from common import add_output, table, write_results
from llama import LIGER, PLAIN, SHAPES, make_base, missing_liger, ours, peer, release
from step import measure


def main() -> int:
    import lemo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b", help="default: llama3-8b")
    parser.add_argument("--context", type=int, default=16384, help="tokens of the document (default: 16384)")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="shares of the tokens kept (default: 0.5)")
    parser.add_argument("--policy", default="update_norm", help="how blocks are chosen (default: update_norm)")
    parser.add_argument(
        "--recompute", choices=["none", "attention", "full"], default="none", help="of lemo only (default: none)"
    )
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one to warm up (default: 4)")
    add_output(parser, "activation")
    args = parser.parse_args()
    base = make_base(args.shape)
    if base.cuda and (reason := missing_liger()):
        raise SystemExit(f"the peer {LIGER} cannot run: {reason}")
    rows: list[dict[str, Any]] = []

    def add(identity: dict[str, Any], contestant: Any) -> None:
        common = {"shape": args.shape, "context": args.context, "steps": args.steps}
        found = measure(base, contestant, args.context, args.steps)
        row = identity | common | {key: found[key] for key in ("step_ms", "loss", "error") if key in found}
        if "peak_mib" in found:
            row["weights_mib"] = found["before_mib"]
            row["activation_mib"] = found["peak_mib"] - found["before_mib"]
        rows.append(row)
        for name, ratio in (("step_ms", "time_ratio"), ("activation_mib", "activation_ratio")):
            if row.get(name) and rows[0].get(name):
                row[ratio] = round(row[name] / rows[0][name], 3)
        release(base)

    name = LIGER if base.cuda else PLAIN  # Liger's kernels need a GPU
    add({"method": name}, peer(base, name, "none"))
    for keep in args.keep:
        phase = lemo.Phase("skip", keep=keep, policy=args.policy)
        config = lemo.LemoConfig(phases=[phase], recompute=args.recompute)
        identity = {"method": "lemo", "mode": "skip", "keep": keep, "policy": args.policy, "recompute": args.recompute}
        add(identity, ours(base, config))
    print(table(rows, ["method", "keep", "step_ms", "time_ratio", "activation_mib", "activation_ratio", "loss"]))
    print(write_results(args.out, rows))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
