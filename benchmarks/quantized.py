"""Training on a 4-bit base within a given memory: Llama-3.1-8B's shape, nf4 by bitsandbytes, LoRA r=32 on every linear
layer, one document, as in the table of longest contexts that Unsloth publishes.

At every size of that table, a process that may use no more of the GPU than its share trains at the context that Unsloth
lists: what a step takes in time and memory, with everything kept (`dense`, `sparse`) and with tokens left out (`skip`).
Saved rows wait in host memory if they have to (`memory_budget`, `offload="auto"`). Then the longest context that
lemo.longest names for `skip` is trained too, for one step. Random weights: values play no part in time and memory.

  pip install bitsandbytes
  python benchmarks/quantized.py                                # 24 and 40 GB: about 4 minutes on an H100
  python benchmarks/quantized.py --memory 80 --only skip        # the largest row, 342,733 tokens
  python benchmarks/quantized.py --model tiny --context 512     # a smoke run, also without a GPU (no memory figures)

Unsloth's figures are cited, not measured: docs.unsloth.ai, "Unsloth Benchmarks", Llama 3.1 (8B) max. context length,
QLoRA, rank 32 on all linear layers, batch size 1, padded to the longest; their table does not name the GPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from common import add_output, header, table, write_results
from memory import Trainer
from models import SHAPES, Base, make_base, make_model
from step import timed
from torch import nn

# Gigabytes of GPU memory: the longest context of Unsloth, and of Hugging Face with FlashAttention-2.
PUBLISHED = {12: (21848, 932), 16: (40724, 2551), 24: (78475, 5789), 40: (153977, 12264), 48: (191728, 15502)} | {
    80: (342733, 28454)
}
RANK = 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHASES: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "sparse": {"mode": "sparse", "keys": 8192},
    "skip": {"mode": "skip", "keep": 0.5, "policy": "update_norm"},
}
# What a process takes besides tensors: the context of CUDA, cuBLAS's workspaces, fragmentation.
RESERVE = 1 << 30


def quantize(base: Base) -> Any:
    """A model whose linear layers are in 4 bits; `base` keeps what stays in bf16."""
    import bitsandbytes as bnb

    model = make_model(base)
    for owner, module in list(model.named_modules()):
        for name, child in list(module._modules.items()):
            if name not in LINEARS:
                continue
            made = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=False, quant_type="nf4", compute_dtype=child.weight.dtype
            )
            made.weight = bnb.nn.Params4bit(child.weight.detach(), requires_grad=False, quant_type="nf4")
            module._modules[name] = made.to(base.device)
            del base.weights[f"{owner}.{name}.weight"]
    model.is_loaded_in_4bit = True  # as from_pretrained does; PEFT looks for it
    return model


@contextmanager
def adapted(model: Any, config: Any) -> Iterator[tuple[Any, Any]]:
    """PEFT's LoRA on every linear layer, under lemo. Yields (model, controller)."""
    import lemo
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, settings)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:  # zero at initialization: the gradient of A would vanish
            nn.init.normal_(p, std=0.02)
    controller = lemo.apply(wrapped.train(), config)
    try:
        yield wrapped, controller
    finally:
        lemo.remove(wrapped)
        wrapped.unload()


def measure(
    base: Base, model: Any, phase: dict[str, Any], tokens: int, budget: int | None, steps: int
) -> dict[str, Any]:
    """Time and peak of a step within `budget` bytes, after one of a short document."""
    import lemo

    memory = {"recompute": "full"} if budget is None else {"memory_budget": budget, "offload": "auto"}
    config = lemo.LemoConfig(phases=[lemo.Phase(**phase)], **memory)
    try:
        with adapted(model, config) as (wrapped, controller):
            trainer = Trainer(base, wrapped)
            trainer.step(min(4096, tokens))
            if base.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            times = [timed(lambda: trainer.step(tokens), base.cuda) for _ in range(steps)]
            found: dict[str, Any] = {"step_ms": round(statistics.median(times), 1)}
            if base.cuda:
                found["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
                found["reserved_mib"] = torch.cuda.max_memory_reserved() >> 20
            if plan := controller.report().get("memory"):
                found["memory"] = plan
            return found
    except (torch.OutOfMemoryError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def longest(model: Any, phase: dict[str, Any], gpu: int) -> int:
    """Tokens of the longest context that fits `gpu` bytes, by lemo's estimate, with offload."""
    import lemo

    config = lemo.LemoConfig(phases=[lemo.Phase(**phase)])
    found = lemo.longest(model, gpu, config, lora_rank=RANK, lora_targets=LINEARS)
    return int(found["phases"][0]["context_offload"])


def free(base: Base) -> None:
    """What nothing holds any longer. Not models.release, which would count the weights of 4 bits as left over."""
    gc.collect()
    if base.cuda:
        torch.cuda.empty_cache()


def contests(model: Any, args: argparse.Namespace) -> Iterator[tuple[str, int | None, int | None, int]]:
    """Name of a phase, gigabytes of GPU memory, Unsloth's context there, and the context to train at."""
    if args.context:
        yield from ((name, None, None, args.context) for name in args.only)
        return
    for gigabytes in args.memory:
        theirs = PUBLISHED[gigabytes][0]
        yield from ((name, gigabytes, theirs, theirs) for name in args.only)
        if "skip" in args.only and not args.no_longest:
            yield "skip", gigabytes, theirs, longest(model, PHASES["skip"], gigabytes * 10**9)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--memory", type=int, nargs="+", choices=sorted(PUBLISHED), default=[24, 40], metavar="GB", help="of the GPU"
    )
    parser.add_argument("--only", nargs="+", choices=list(PHASES), default=list(PHASES), help="phases to train")
    parser.add_argument("--context", type=int, help="this length in place of Unsloth's, without a limit of memory")
    parser.add_argument("--no-longest", action="store_true", help="leave out lemo's own longest contexts")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of each")
    parser.add_argument("--model", choices=[n for n in SHAPES if SHAPES[n]["family"] == "llama"], default="llama3-8b")
    add_output(parser, "quantized")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("bitsandbytes") is None:
        parser.error("bitsandbytes, which quantizes the base, is not installed: pip install bitsandbytes")
    warnings.filterwarnings("ignore", category=FutureWarning)
    base = make_base(args.model)
    model = quantize(base)
    free(base)
    made, rows, path = header(), [], None
    for name, gigabytes, theirs, tokens in contests(model, args):
        row: dict[str, Any] = {"phase": name, "gpu_gb": gigabytes, "context": tokens, "unsloth_context": theirs}
        row |= {"hf_context": PUBLISHED[gigabytes][1] if gigabytes else None, "model": base.name, "rank": RANK}
        budget = gigabytes * 10**9 - RESERVE if gigabytes else None
        if base.cuda:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total) if budget else 1.0)
        rows.append(row | measure(base, model, PHASES[name], tokens, budget, args.steps))
        free(base)
        shown = ("phase", "gpu_gb", "context", "unsloth_context", "step_ms", "peak_mib", "reserved_mib", "error")
        print(table(rows[-1:], shown).splitlines()[1], flush=True)
        path = write_results(args.out, rows, **made)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
