"""What token elimination does to an adapter: every mode and policy against dense LoRA, evaluated densely.

Two settings on one small real model, LoRA r=8 on q, k, v, o, batches of 4 x 8192 tokens, AdamW 1e-3:
  A  context extension: position interpolation to --context, trained on mixed text (train*.bin)
  B  domain adaptation: the base is first extended to --context with all parameters, then adapted to --adapt tokens

A row's `cost` counts its steps in dense steps of a Llama-3-8B step at 64K tokens with full recomputation, by the
relative costs below, which leave out choosing the blocks (for policy `exact` about an attention). `train_s` is what the
run really took on this small model, next to the other jobs. `gap` is the mean over the dev domains of the perplexity
ratio to dense LoRA after --steps steps, minus one. Rows that are done are kept next to the result
(OUT.rows.jsonl): an interrupted run resumes from them.

  python benchmarks/quality.py --model MODEL --tokens TOKENS --setting A --jobs 3
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from common import write_results

# Cost of a step that keeps half of the blocks, in dense steps: "skip" as a plain PyTorch sketch of it measured on an
# H200 (5231 ms against 14370 ms), "backward" from the FLOPs of its parts.
COST = {"dense": 1.0, "skip": 0.36, "backward": 0.46}
BLOCK = 64


def runs_of(setting: str, steps: int) -> list[dict]:
    """The runs of a setting: name and phases (mode, keep, steps, policy, weighted)."""

    def phase(mode: str, n: int, policy: str | None = None, weighted: bool = False, **options) -> dict:
        keep = 1.0 if mode == "dense" else 0.5
        return {"mode": mode, "keep": keep, "steps": n, "policy": policy, "weighted": weighted, "options": options}

    policies = ["predictors", "update_norm", "random", "random_shared", "sampled", "sampled_shared", "exact"]
    # The same cost as `steps` dense steps: most of the skipped steps first, 30 % of the cost for the exact phase.
    exact = round(0.3 * steps)
    skipped = round((steps - exact) / COST["skip"])
    halves = round(steps / COST["backward"])
    runs = [{"name": "dense", "phases": [phase("dense", steps)]}]
    for p in policies:
        runs.append({"name": f"skip {p}", "phases": [phase("skip", steps, p)]})
        runs.append({"name": f"skip {p} + exact phase", "phases": [phase("skip", skipped, p), phase("dense", exact)]})
    for p in ("predictors", "update_norm", "random"):
        runs.append({"name": f"backward {p}", "phases": [phase("backward", steps, p)]})
    for p in ("random", "sampled"):
        runs.append(
            {"name": f"backward {p} weighted, equal cost", "phases": [phase("backward", halves, p, weighted=True)]}
        )
    runs.append(
        {
            "name": "skip predictors + backward random weighted",
            "phases": [
                phase("skip", skipped, "predictors"),
                phase("backward", round(exact / COST["backward"]), "random", weighted=True),
            ],
        }
    )
    return runs


def token_files(folder: Path, prefix: str, limit: int | None = None) -> dict[str, np.ndarray]:
    files = sorted(folder.glob(f"{prefix}*.bin"))
    if not files:
        raise SystemExit(f"no {prefix}*.bin in {folder}")
    return {f.stem: np.fromfile(f, dtype=np.uint16, count=-1 if limit is None else limit) for f in files}


def batches(data: dict[str, np.ndarray], batch: int, context: int, seed: int, device: torch.device):
    """Random windows of `context` + 1 tokens, files drawn by their length."""
    rng = np.random.default_rng(seed)
    arrays = list(data.values())
    weights = np.array([len(a) for a in arrays], float)
    while True:
        rows = []
        for _ in range(batch):
            a = arrays[rng.choice(len(arrays), p=weights / weights.sum())]
            start = rng.integers(0, len(a) - context - 1)
            rows.append(a[start : start + context].astype(np.int64))
        yield torch.from_numpy(np.stack(rows)).to(device)


@torch.no_grad()
def perplexity(model, tokens: np.ndarray, context: int) -> float:
    """Dense perplexity over non-overlapping windows."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(tokens) - context + 1, context):
        ids = torch.from_numpy(tokens[start : start + context].astype(np.int64))[None].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        count += context - 1
    return math.exp(total / count)


def dev_perplexity(args: argparse.Namespace, model) -> dict[str, float]:
    dev = token_files(Path(args.tokens), "dev_", args.eval_tokens)
    return {name.removeprefix("dev_"): round(perplexity(model, a, args.context), 4) for name, a in dev.items()}


def load_base(folder: str, context: int, device: torch.device, dtype: torch.dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.max_position_embeddings < context:
        rope = dict(config.rope_parameters)
        rope.update(rope_type="linear", factor=context / config.max_position_embeddings)
        config.rope_parameters = rope
        config.max_position_embeddings = context
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    ).to(device)


def extend_base(args: argparse.Namespace, out: Path, device: torch.device) -> None:
    """Setting B's base: all parameters trained densely at --context with position interpolation."""
    torch.manual_seed(3)
    model = load_base(args.model, args.context, device, torch.float32)
    data = batches(token_files(Path(args.tokens), "train"), args.batch, args.context, 3, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(args.extend_steps):
        scale = min(1.0, (step + 1) / 20, (args.extend_steps - step) / (0.5 * args.extend_steps))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * scale
        ids = next(data)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.to(torch.bfloat16).save_pretrained(out)


def calibrate_base(args: argparse.Namespace, base: str, out: Path, device: torch.device, dtype: torch.dtype) -> None:
    from lemo.predictors import calibrate

    model = load_base(base, args.context, device, dtype)
    data = batches(token_files(Path(args.tokens), "train"), 1, args.context, 11, device)
    calibrate(model, data, block_size=BLOCK, keep=0.5, steps=args.calibration_steps, progress=False).save(out)


def train_one(args: argparse.Namespace, run: dict) -> dict:
    """One run in this process: fine-tune, then evaluate densely."""
    import lemo
    from peft import LoraConfig, get_peft_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(args.seed)
    model = get_peft_model(
        load_base(args.base, args.context, device, dtype),
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"),
    )
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    total = sum(p["steps"] for p in run["phases"])
    config = lemo.LemoConfig(
        block_size=BLOCK,
        calibration=args.calibration,
        seed=args.seed,
        phases=[
            lemo.Phase(
                mode=p["mode"],
                keep=p["keep"],
                share=p["steps"] / total,
                policy=None if p["policy"] is None else p["policy"].removesuffix("_shared"),
                weighted=p["weighted"],
                policy_options={"shared": True} if (p["policy"] or "").endswith("_shared") else {},
            )
            for p in run["phases"]
        ],
    )
    controller = lemo.apply(model, config)
    controller.total_steps = total
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    prefix = "train" if args.setting == "A" else args.adapt
    data = batches(token_files(Path(args.tokens), prefix), args.batch, args.context, args.seed + 7, device)
    model.train()
    losses = []
    start = time.perf_counter()
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        ids = next(data)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        controller.step()
        losses.append(loss.detach())
    train_loss = torch.stack(losses[-20:]).mean().item()
    train_s = time.perf_counter() - start
    lemo.remove(model)
    return {
        "name": run["name"],
        "steps": total,
        "cost": round(sum(p["steps"] * COST[p["mode"]] for p in run["phases"]), 1),
        "train_s": round(train_s, 1),
        "train_loss": round(train_loss, 4),
        "perplexity": dev_perplexity(args, model),
    }


def publish(args: argparse.Namespace, rows: list[dict], missing: list[str]) -> None:
    """Writes the result file with the rows there are, and the names of those still to come."""
    dense = next((r for r in rows if r["name"] == "dense"), None)
    for row in rows:
        if dense and "perplexity" in row:
            ratios = [row["perplexity"][d] / dense["perplexity"][d] for d in dense["perplexity"]]
            row["gap_percent"] = round(100 * (sum(ratios) / len(ratios) - 1), 2)
    more = {"missing": missing} if missing else {}
    settings = {"setting": args.setting, "context": args.context, "batch": args.batch, "cost": COST}
    write_results(args.out or f"quality-{args.setting}", rows, **settings, **more)


def run_all(args: argparse.Namespace, runs: list[dict], finished: Path, device: torch.device) -> list[dict]:
    """Every run in a separate process, `args.jobs` at a time; rows in `finished` are not done again. The result
    file is written after every one, so that a run cut short leaves its header too."""
    lock = Lock()
    known = {r["name"]: r for r in map(json.loads, finished.read_text().splitlines())} if finished.exists() else {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        base, calibration = args.model, Path(scratch) / "calibration"
        if args.setting == "B":
            base = str(Path(scratch) / "base")
            extend_base(args, Path(base), device)
            name = "base, not adapted"
            if name not in known:
                model = load_base(base, args.context, device, dtype)
                known[name] = {"name": name, "steps": 0, "cost": 0, "perplexity": dev_perplexity(args, model)}
        if any(p["policy"] in ("predictors", "sampled") for r in runs if r["name"] not in known for p in r["phases"]):
            calibrate_base(args, base, calibration, device, dtype)

        def child(run: dict) -> dict:
            if run["name"] in known:
                return known[run["name"]]
            command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(run), "--base", base]
            if calibration.exists():
                command += ["--calibration", str(calibration)]
            done = subprocess.run(command, capture_output=True, text=True)
            for line in done.stdout.splitlines():
                if line.startswith("ROW "):
                    print(line, flush=True)
                    row = json.loads(line[4:])
                    with lock:
                        with finished.open("a") as log:
                            log.write(line[4:] + "\n")
                        known[row["name"]] = row
                        names = [r["name"] for r in runs]
                        there = [r for n, r in known.items() if n not in names]
                        there += [known[n] for n in names if n in known]
                        publish(args, there, [n for n in names if n not in known])
                    return row
            print(done.stderr[-3000:], file=sys.stderr, flush=True)
            return {"name": run["name"], "error": done.stderr.strip().splitlines()[-1][:300]}

        with ThreadPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(child, runs))
    return [r for r in known.values() if r["name"] == "base, not adapted"] + rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model")
    parser.add_argument("--tokens", required=True, help="folder with train*.bin, dev_*.bin and --adapt*.bin (uint16)")
    parser.add_argument("--setting", choices=["A", "B"], required=True)
    parser.add_argument("--adapt", default="adapt_code", help="setting B: prefix of the token files to adapt to")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100, help="dense steps every cost is compared with")
    parser.add_argument("--extend-steps", type=int, default=150)
    parser.add_argument("--calibration-steps", type=int, default=300)
    parser.add_argument("--eval-tokens", type=int, default=1 << 18, help="at most this many tokens of every dev domain")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (they share one GPU)")
    parser.add_argument("--only", default="", help="comma-separated substrings: runs to do (dense is always done)")
    parser.add_argument("--out", default=None, help="results file; default benchmarks/results/quality-SETTING.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--calibration", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("ROW " + json.dumps(train_one(args, json.loads(args.one))), flush=True)
        return

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    only = [s for s in args.only.split(",") if s]
    runs = [
        r
        for r in runs_of(args.setting, args.steps)
        if r["name"] == "dense" or not only or any(s in r["name"] for s in only)
    ]
    rows = run_all(args, runs, Path(f"{args.out or f'quality-{args.setting}'}.rows.jsonl"), device)
    publish(args, rows, [r["name"] for r in rows if "error" in r])
    for row in rows:
        print(f"{row['name']:48s} {row.get('steps')!s:>5} {row.get('cost')!s:>6} {row.get('gap_percent')!s:>7}")


if __name__ == "__main__":
    main()
