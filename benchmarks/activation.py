"""Shadowy activation: one LoRA step without recomputation, beside what a user would run instead.

Llama-3-8B shape with random weights, LoRA r=8 on q, k, v, o, batch 1, bf16. The peer is transformers + PEFT + Liger
with cuDNN attention allowed; ours is the same model under `lemo.apply`, mode "skip". Every row runs in a process of its
own. `activation_mib` is the peak of a step minus what is allocated before it (weights, adapters, optimizer state);
`step_ms` the median step, forward and backward. Ratios are to the peer of the same call.

  python benchmarks/activation.py
  python benchmarks/activation.py --shape tiny --context 512     # a smoke run, also without a GPU (no memory figures)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
from common import ROOT, add_output, table, write_results

SHAPES = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1000,
    },
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def build(shape: str, device: torch.device, liger: bool) -> torch.nn.Module:
    """A PEFT model with random bf16 weights (fp32 on the CPU), made on the device itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=1 << 20, attn_implementation="sdpa", tie_word_embeddings=False
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    # Rotary frequencies must not be rounded to bf16, as loading a real model would not round them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, adapters)
    wrapped.config.use_cache = False
    return wrapped.train()


def attention_kernels(device: torch.device):
    """The fastest attention PyTorch has: cuDNN first, then FlashAttention."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


def measure(row: dict) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    ours = row["method"] == "lemo"
    model = build(row["shape"], device, liger=not ours and cuda)
    if ours:
        import lemo

        phase = lemo.Phase(row["mode"], keep=row["keep"], policy=row["policy"])
        lemo.apply(model, lemo.LemoConfig(phases=[phase], recompute=row["recompute"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, SHAPES[row["shape"]]["vocab_size"], (1, row["context"]), device=device)
    times, peaks, weights = [], [], 0
    with attention_kernels(device):
        for _ in range(row["steps"] + 1):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                weights = torch.cuda.memory_allocated()
            start = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            if cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
            peaks.append(torch.cuda.max_memory_allocated() - weights if cuda else 0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = loss.item()
            del loss
    result = row | {"step_ms": round(statistics.median(times[1:]), 1), "loss": round(value, 4)}
    if cuda:
        result |= {"weights_mib": weights >> 20, "activation_mib": max(peaks[1:]) >> 20}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5])
    parser.add_argument("--policy", default="update_norm")
    parser.add_argument("--recompute", choices=["none", "attention", "full"], default="none")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one to warm up")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_output(parser, "activation")
    args = parser.parse_args()
    if args.one:
        print("ROW " + json.dumps(measure(json.loads(args.one))), flush=True)
        return 0
    common = {"shape": args.shape, "context": args.context, "steps": args.steps}
    runs = [{"method": "transformers + PEFT + Liger", **common}]
    for keep in args.keep:
        runs.append(
            {
                "method": "lemo",
                "mode": "skip",
                "keep": keep,
                "policy": args.policy,
                "recompute": args.recompute,
                **common,
            }
        )
    if not torch.cuda.is_available():
        runs[0]["method"] = "transformers + PEFT"  # Liger's kernels need a GPU
    rows, failed = [], False
    for run in runs:
        command = [sys.executable, __file__, "--one", json.dumps(run)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        lines = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if not lines:
            failed = True
            print(done.stderr[-4000:], file=sys.stderr, flush=True)
            rows.append(run | {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]})
            continue
        rows.append(json.loads(lines[-1][4:]))
    peer = rows[0]
    for row in rows:
        for name, ratio in (("step_ms", "time_ratio"), ("activation_mib", "activation_ratio")):
            if row.get(name) and peer.get(name):
                row[ratio] = round(row[name] / peer[name], 3)
    print(table(rows, ["method", "keep", "step_ms", "time_ratio", "activation_mib", "activation_ratio", "loss"]))
    print(write_results(args.out, rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
