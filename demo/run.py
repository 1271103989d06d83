"""The main job, small: calibrate, fine-tune at 4096 tokens densely and with elimination at equal cost, evaluate.

  python demo/run.py --out runs/demo [--seconds 45]        (`make demo` does this after its set-up)

The model is demo/model (5.2 M parameters, pretrained on Python's standard library only); the text is the source code
of torch, transformers and peft. EQUAL COST means: both runs take the same wall-clock time of training steps on this
machine. The seconds of a step of each kind are measured first; dense training gets as many steps as fit --seconds, and
elimination spends the same seconds on skipping (70 %) and then on exact steps (30 %). A 5 M-parameter model saves less
per step than a large one, so the table also shows what the same runs would cost at the scale of the design's cost
model. Skipping is shown with three ways of choosing blocks: the calibrated predictors, anew in every layer; one
draw per step for all layers, with odds from the first layer's predictor; and the update norm of the layer before,
which needs no calibration. The adapters, and the model without one, are evaluated densely on unseen files.

ON A GPU layers run as CUDA graphs, and windows are cut from all source files in a row. Still, this model can be too
small for seconds to say anything: launching kernels takes the time, not what they compute. Where a skipped step takes
more than 0.8 x a dense one there, equal cost means EQUAL OPERATIONS: those of a step of each kind are counted from the
model's shapes, both runs get the same number, and the longest takes --seconds. The text printed and results.json
("unit") say which of the two it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from text import source_files, write_jsonl

# PEFT reads a property that transformers has renamed.
warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)

MODEL = Path(__file__).resolve().parent / "model"
CONTEXT, BLOCK, KEEP = 4096, 64, 0.5
RATE, WARMUP, SEED = 2e-3, 5, 1
CALIBRATION_FILES = 24
TRAINING_CHARACTERS = 1_600_000
CHARACTERS_PER_TOKEN = 3  # a little more than there are
BEGINNING = 10_000  # characters that fit one context
POLICIES = {
    "predictors": "predictors",
    "sampled_shared": "sampled:shared",
    "update_norm": "update_norm",
}  # in a schedule
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 8
SKIP_SHARE_OF_COST = 0.7
# On a GPU: a skipped step of more than this share of a dense one's seconds is bound by launches, not by arithmetic.
LAUNCH_BOUND = 0.8


@dataclass(frozen=True)
class StepCost:
    """What a dense and a skipped step cost, in `unit`."""

    unit: str
    dense: float
    skip: float

    @property
    def ratio(self) -> float:
        return self.skip / self.dense


# Llama-3-8B at 64K tokens with recomputation (docs: cost of a step).
LARGE_MODEL = StepCost("dense steps", 1.0, 0.36)


@dataclass(frozen=True)
class Plan:
    """Steps of the two runs, and the cost of a step ("seconds" or "operations") that makes the runs equal."""

    dense_steps: int
    skip_steps: int
    exact_steps: int
    step: StepCost

    @property
    def steps(self) -> int:
        return self.skip_steps + self.exact_steps

    def dense_cost(self, step: StepCost) -> float:
        """Of the dense run, where steps cost what `step` says."""
        return self.dense_steps * step.dense

    def eliminated_cost(self, step: StepCost) -> float:
        """Of the run with elimination."""
        return self.skip_steps * step.skip + self.exact_steps * step.dense

    def schedule(self, policy: str) -> str:
        return f"skip:{KEEP:g}:{POLICIES[policy]}@{self.skip_steps},dense@{self.exact_steps}"


def equal_cost(budget: float, step: StepCost) -> Plan:
    """Steps that spend `budget` densely, and the same on skipped steps followed by exact ones.

    The rounding is such that elimination never gets more than the dense run. At least two steps of every kind.
    """
    if not (step.dense > 0 and step.skip > 0):
        raise ValueError(f"step costs must be positive, got {step}")
    dense = max(6, round(budget / step.dense))
    total = dense * step.dense
    exact = max(2, round((1 - SKIP_SHARE_OF_COST) * dense))
    skip = max(2, int((total - exact * step.dense) / step.skip + 1e-9))
    return Plan(dense, skip, exact, step)


def plan_runs(seconds: float, measured: StepCost, counted: StepCost, device: str) -> Plan:
    """Equal seconds; equal operations on a GPU that is bound by launches.

    measured, counted: a step in seconds and in operations. With equal operations elimination has more steps than fit
    the seconds of the dense run; the budget is such that it is this longer run that takes `seconds`.
    """
    if device != "cuda" or measured.ratio <= LAUNCH_BOUND:
        return equal_cost(seconds, measured)
    skips = SKIP_SHARE_OF_COST / counted.ratio  # skipped and exact steps for the operations of one dense step
    exact = 1 - SKIP_SHARE_OF_COST
    longest = max(measured.dense, skips * measured.skip + exact * measured.dense)
    return equal_cost(seconds / longest * counted.dense, counted)


def step_operations(config: Any, keep: float, predictor_weights: int = 0, tokens: int = CONTEXT) -> dict[str, float]:
    """Floating-point operations of a LoRA step of a Llama, forward and backward; a multiplication and addition are two.

    projections  of kept rows. Frozen weights: the product, and backward the gradient of its input. Adapters: the same,
                 and their own gradient
    attention    kept rows see the kept rows before them, half of the square: 2 products forward, 5 backward
    head         all tokens, kept or not: the logits, and the gradient of the last layer's output
    predictors   forward, every weight on every token; nothing where all blocks are kept, since none is chosen

    Not counted: what is not a matrix product (norms, rotary positions, SwiGLU, softmax, loss, gather and scatter, the
    optimizer). Nothing is recomputed: the runs have recompute "none".
    """
    from lemo.engine.memory import layer_shape

    shape = layer_shape(config, lora_rank=RANK, lora_targets=TARGETS)
    rows, layers = round(keep * tokens), config.num_hidden_layers
    d, q, kv, f = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.ffn
    sides = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
    frozen = sum(a * b for a, b in sides.values())
    adapters = sum(rank * sum(sides[name]) for name, rank in shape.lora.items())
    return {
        "projections": layers * rows * (4.0 * frozen + 6.0 * adapters),
        "attention": layers * 7.0 * rows**2 * q,
        "head": 4.0 * tokens * d * config.vocab_size,
        "predictors": 2.0 * tokens * predictor_weights if keep < 1 else 0.0,
    }


def count_operations(calibration: Path) -> dict[str, dict[str, float]]:
    """Operations of a step of the demo's model by part: `dense`, and `skip` with blocks chosen by the predictors."""
    from lemo.predictors import PredictorSet
    from transformers import AutoConfig

    config, predictors = AutoConfig.from_pretrained(MODEL, trust_remote_code=False), PredictorSet.load(calibration)
    return {"dense": step_operations(config, 1.0), "skip": step_operations(config, KEEP, predictors.num_parameters)}


def lemo(*arguments: object) -> str:
    """Run the command line as a user would, in this process: loading torch takes longer than some commands."""
    from lemo.cli import main

    words = [str(a) for a in arguments]
    print("\n$ lemo " + " ".join(os.path.relpath(w) if os.path.isabs(w) else w for w in words), flush=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(words)
    if code:
        raise SystemExit(code)
    return output.getvalue()


def load(device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, trust_remote_code=False).to(device)


def shortest_seconds(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Wall-clock seconds of the fastest call of `step`: what else the machine does only adds. The first is left out."""
    times = []
    for i in range(repeats + 1):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - begin)
    return min(times)


def step_times(device: torch.device, calibration: Path, repeats: int = 4) -> dict[str, float]:
    """Seconds of a LoRA step at CONTEXT tokens: `dense`, `skip`, and `plain` (transformers and PEFT without lemo)."""
    import lemo as library
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(load(device), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(2, model.config.vocab_size, (1, CONTEXT), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = {"plain": shortest_seconds(step, device, repeats)}
    phases = {"dense": library.Phase("dense"), "skip": library.Phase("skip", keep=KEEP)}
    for name, phase in phases.items():
        settings = library.LemoConfig(
            block_size=BLOCK,
            phases=[phase],
            recompute="none",
            calibration=calibration,
            cuda_graphs=device.type == "cuda",
        )
        library.apply(model, settings)
        seconds[name] = shortest_seconds(step, device, repeats)
        library.remove(model)
    return seconds


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    times[name] = time.perf_counter() - begin


def two_ratios(plan: Plan, measured: StepCost) -> str:
    """Why operations are made equal and not seconds."""
    return (
        f"a skipped step has {plan.step.ratio:.2f} x the operations of a dense one "
        f"but takes {measured.ratio:.2f} x its time"
    )


def explain_cost(plan: Plan, measured: StepCost) -> list[str]:
    """What the two columns of cost mean."""
    large = f"dense steps of Llama-3-8B at 64K tokens, a skipped one being {LARGE_MODEL.skip} of it (cost model)."
    if plan.step.unit == "seconds":
        return [
            "Cost here: measured seconds of a step x steps, equal by construction. Cost at 64K, 8B: the same steps in",
            large,
        ]
    dense, eliminated = plan.dense_cost(measured), plan.eliminated_cost(measured)
    rate = plan.step.dense / measured.dense / 1e12
    return [
        "TFLOP here: operations of a step x steps, equal by construction: matrix products, forward and backward.",
        f"Operations and not seconds: {two_ratios(plan, measured)}:",
        "launching kernels, not arithmetic, bounds steps of this size on this GPU "
        f"({rate:.1f} TFLOP/s in a dense one).",
        f"In seconds of steps the runs are not equal: dense {dense:.1f} s, with elimination {eliminated:.1f} s.",
        "Elimination saves time where arithmetic bounds a step. Cost at 64K, 8B: the same steps in",
        large,
    ]


def report(plan: Plan, seconds: dict[str, float], rows: list[dict[str, Any]], times: dict[str, float]) -> str:
    """The result as text."""
    by_model = {row["model"]: row for row in rows}
    measured = StepCost("seconds", seconds["dense"], seconds["skip"])
    operations = plan.step.unit == "operations"
    heading = "TFLOP here" if operations else "cost here"
    lines = [
        f"step of {CONTEXT} tokens: transformers + PEFT {seconds['plain']:.3f} s, lemo with everything kept "
        f"{seconds['dense']:.3f} s, keeping {KEEP:g} of the blocks {seconds['skip']:.3f} s "
        f"({measured.ratio:.2f} x)",
        "",
        f"{'':31}{'steps':>14}{heading:>11}{'cost at 64K, 8B':>17}{'perplexity':>12}  "
        f"{'95 % interval':18}{'change':>9}",
    ]

    def costs(cost: Callable[[StepCost], float]) -> tuple[str, str]:
        here = cost(plan.step)
        return f"{here / 1e12:.1f}" if operations else f"{here:.1f} s", f"{cost(LARGE_MODEL):.0f} steps"

    table = [("base", "no fine-tuning", "-", "-", "-")]
    table.append(("dense", "dense", f"{plan.dense_steps}", *costs(plan.dense_cost)))
    steps = f"{plan.skip_steps} + {plan.exact_steps}"
    for policy in POLICIES:
        table.append((policy, f"skip by {policy}, exact", steps, *costs(plan.eliminated_cost)))
    for name, label, steps, cost, large in table:
        row = by_model[name]
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        change = f"{100 * (row['ratio'] - 1):+.2f} %" if "ratio" in row else ""
        lines.append(f"{label:31}{steps:>14}{cost:>11}{large:>17}{row['perplexity']:12.3f}  {interval:18}{change:>9}")
    row = by_model["base"]
    lines += [
        "",
        f"Dense perplexity on {row['tokens']} tokens of {row['units']} files that no run has read; change:",
        "against dense training, over the same files. 95 % intervals of the change: "
        + ", ".join(
            f"{r['model']} [{100 * (r['ratio_low'] - 1):+.2f}, {100 * (r['ratio_high'] - 1):+.2f}] %"
            for r in rows
            if "ratio" in r
        ),
        *explain_cost(plan, measured),
        "One seed. Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in times.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results; replaced")
    parser.add_argument("--seconds", type=float, default=40.0, help="seconds of training steps per run")
    parser.add_argument("--held-out-files", type=int, default=32)
    parser.add_argument("--calibration-steps", type=int, default=40)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = args.out.resolve()
    if out.exists() and not (out / "train.jsonl").exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty and is not an earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    begin = time.perf_counter()
    times: dict[str, float] = {}
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")

    files = source_files()
    train, held = ([f for f in files if f.held_out == side] for side in (False, True))
    count = write_jsonl(train, out / "train.jsonl", characters=TRAINING_CHARACTERS)
    write_jsonl(train[-CALIBRATION_FILES:], out / "calibration.jsonl", characters=10**9, characters_each=BEGINNING)
    held_count = write_jsonl(
        held[: args.held_out_files], out / "held.jsonl", characters=10**9, characters_each=BEGINNING
    )
    print(f"text: {count} source files to train on, the beginnings of {held_count} others held out")

    common = ("--model", MODEL, "--context", CONTEXT, "--quiet")
    calibration = out / "calibration"
    with timed(times, "calibration"):
        data = ("--data", out / "calibration.jsonl", "--block-size", BLOCK, "--keep", KEEP)
        lemo("calibrate", *common, *data, "--steps", args.calibration_steps, "--out", calibration)
        (out / "calibration.txt").write_text(lemo("info", calibration))
    with timed(times, "step times"):
        seconds = step_times(device, calibration)
    operations = count_operations(calibration)
    measured = StepCost("seconds", seconds["dense"], seconds["skip"])
    counted = StepCost("operations", sum(operations["dense"].values()), sum(operations["skip"].values()))
    plan = plan_runs(args.seconds, measured, counted, device.type)
    if plan.step.unit == "operations":
        print(f"\n{two_ratios(plan, measured)}: equal cost means equal operations here")
        # Many more steps than on a CPU. There no run reads a text twice; more text, so that none does here.
        characters = max(TRAINING_CHARACTERS, plan.steps * CONTEXT * CHARACTERS_PER_TOKEN)
        count = write_jsonl(train, out / "train.jsonl", characters=characters)
        print(f"text: {count} source files to train on, for the {plan.steps} steps of a run with elimination")

    training: tuple[Any, ...] = (
        "--data",
        out / "train.jsonl",
        "--lr",
        RATE,
        "--warmup",
        WARMUP,
        "--seed",
        SEED,
        "--recompute",
        "none",
    )
    training += ("--save-every", 0, "--block-size", BLOCK, "--lora-targets", *TARGETS)
    if device.type == "cuda":  # graphs serve windows of one document
        training += ("--joined", "--cuda-graphs")
    with timed(times, "dense"):
        lemo("finetune", *common, *training, "--steps", plan.dense_steps, "--dense", "--out", out / "dense")
    for policy in POLICIES:
        with timed(times, policy):
            elimination = ("--steps", plan.steps, "--schedule", plan.schedule(policy), "--calibration", calibration)
            lemo("finetune", *common, *training, *elimination, "--out", out / policy)
    with timed(times, "evaluation"):
        adapters = [f"{run}={out / run / 'adapter'}" for run in ("dense", *POLICIES)]
        held_out = ("--data", f"held-out={out / 'held.jsonl'}", "--adapter", *adapters, "--reference", "dense")
        lemo("evaluate", *common, *held_out, "--json", out / "evaluation.json")
    rows = json.loads((out / "evaluation.json").read_text())["rows"]
    for run in ("dense", *POLICIES):
        (out / f"{run}.txt").write_text(lemo("report", out / run))

    times["all"] = time.perf_counter() - begin
    text = report(plan, seconds, rows, times)
    (out / "report.txt").write_text(text + "\n")
    result = {
        "device": device.type,
        "torch": torch.__version__,
        "step_seconds": seconds,
        "step_operations": operations,
        "plan": {
            "dense_steps": plan.dense_steps,
            "skip_steps": plan.skip_steps,
            "exact_steps": plan.exact_steps,
            "unit": plan.step.unit,
            "dense_step_cost": plan.step.dense,
            "skip_step_cost": plan.step.skip,
            "dense_cost": plan.dense_cost(plan.step),
            "eliminated_cost": plan.eliminated_cost(plan.step),
        },
        "rows": rows,
        "seconds": times,
    }
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{text}\n\nresults, logs and pictures: {os.path.relpath(out)}")


if __name__ == "__main__":
    main()
