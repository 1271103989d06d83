"""One LoRA step (forward, backward, AdamW) of a Llama-3-8B shape: lemo against what a user would run instead.

Random bf16 weights, LoRA r=8 alpha=16 on q, k, v, o, one document of N tokens whose labels are its ids, everything
recomputed in the backward pass (gradient checkpointing). The peer is transformers + PEFT + Liger with cuDNN attention.
All rows run in one process over the same weights, peers first; before that, a short document checks that lemo with
nothing eliminated has the first peer's loss and gradients.

Peers (--peer):
{peers}

  python benchmarks/step.py                                     # 64K and 16K tokens: minutes on an H100 or H200
  python benchmarks/step.py --context 8192 --recompute none     # nothing recomputed
  python benchmarks/step.py --context 65536 --only backward-0.5 --recompute none --offload all  # nor kept in GPU memory
  python benchmarks/step.py --recompute full attention --offload 0 all     # every row in four ways
  python benchmarks/step.py --peer liger liger-offload trl      # more peers; ratios are to the first one
  python benchmarks/step.py --only dense skip-0.5               # some of the rows; the peer always runs
  python benchmarks/step.py --context 262144 --peer none --steps 1     # lemo alone: its dense step takes minutes here
  python benchmarks/step.py --context 1048576 --peer none --steps 1 --only sparse-8k-keys --memory-budget 131GiB
  python benchmarks/step.py --model tiny --context 512          # a smoke run, also without a GPU (no memory figures)

Rows:
{rows}

step_ms is the median of the timed steps, by CUDA events, step_ms_min and step_ms_max their spread; peak_mib the largest
amount of memory that PyTorch had allocated during one of them, weights included, and before_mib what it had before.
host_mib is what saved rows take of pinned host memory, memory what layers save and how many run again.
time_ratio is the peer's time over ours (above 1: lemo is faster), memory_ratio our peak over the peer's (below 1: lemo
needs less), dense_ratio the time of lemo's own dense step over ours. kept is the share of blocks that a layer kept, on
average, computed that of the pairs of tiles in its attention. The loss is the last step's; in mode "skip" it
is over the tokens that took part. From 128K tokens on, the step that warms up is of a short document. Results:
benchmarks/results/step-GPU.json, written after every row.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import add_output, header, table, write_results
from lemo.cli.common import offload, recompute_layers, size
from models import SHAPES, Base, make_base, make_model, ours, release
from rivals import LIGER, OFFLOAD, PEERS, PLAIN, Contestant, missing, peer

COLUMNS = (
    "row", "context", "recompute", "offload", "kept", "computed", "step_ms", "time_ratio", "dense_ratio", "peak_mib",
    "memory_ratio", "host_mib", "loss", "error",
)  # fmt: skip
WARM_WHOLE, WARM_TOKENS = 131072, 8192  # documents from the first on warm up with the second


@dataclass(frozen=True)
class Row:
    """A way of training with lemo.

    policy: None is the default without a calibration. calibrated: with predictors, as `lemo calibrate` makes them (they
    are not trained here: what they choose changes, what they cost does not), and the default policy that goes with
    them. keys, density: limits of mode "sparse". shared: one draw for all layers.
    """

    mode: str
    keep: float = 1.0
    policy: str | None = None
    weighted: bool = False
    calibrated: bool = False
    density: float | None = None
    keys: int | None = None
    shared: bool = False

    def describe(self) -> str:
        if self.mode == "dense":
            return "lemo, nothing eliminated"
        if self.mode == "sparse":
            limit = f"{self.keys} keys a query" if self.keys else f"{self.density:g} of the pairs of tiles"
            return f"mode sparse, {limit}" + (f", {self.keep:g} of the tokens kept" if self.keep < 1 else "")
        chosen = "the default policy with a calibration" if self.calibrated else f"policy {self.policy or 'default'}"
        return f"mode {self.mode}, {self.keep:g} of the tokens kept, {'weighted, ' * self.weighted}{chosen}"


ROWS = {
    "dense": Row("dense"),
    "skip-0.5": Row("skip", 0.5, "update_norm"),
    "skip-0.3": Row("skip", 0.3, "update_norm"),
    "skip-0.5-calibrated": Row("skip", 0.5, calibrated=True),
    "skip-0.3-calibrated": Row("skip", 0.3, calibrated=True),
    "backward-0.5": Row("backward", 0.5, "random", weighted=True),
    "sparse-8k-keys": Row("sparse", keys=8192),
    "sparse-0.25": Row("sparse", density=0.25),
    "sparse-0.125": Row("sparse", density=0.125),
    "skip-0.3-sparse-8k-keys": Row("sparse", 0.3, "random", keys=8192, shared=True),
}
# Measured if they are asked for: the study of quality needs their costs.
MORE = ("sparse-0.25", "sparse-0.125")


def settings(row: Row, saving: Saving, calibration: Path) -> Any:
    import lemo

    keep = None if row.mode == "dense" else row.keep
    options = {"shared": True} if row.shared else {}
    phase = lemo.Phase(
        row.mode,
        keep=keep,
        policy=row.policy,
        policy_options=options,
        weighted=row.weighted,
        density=row.density,
        keys=row.keys,
    )
    return lemo.LemoConfig(phases=[phase], calibration=calibration if row.calibrated else None, **saving.options)


def untrained_calibration(base: Base, folder: Path) -> Path:
    """Predictors of the size that `lemo calibrate` begins with."""
    from lemo.predictors import PredictorNetwork, PredictorSet, model_fingerprint

    n = base.config.num_hidden_layers
    generator = torch.Generator().manual_seed(0)
    networks = [PredictorNetwork(base.config.hidden_size, 64, 32, generator=generator) for _ in range(n)]
    PredictorSet(
        [network.export() for network in networks],
        norm="rms",
        pool="max",
        eps=1e-5,
        normalize=False,
        thresholds=(0.0,) * n,
        keep=(0.5,) * n,
        block_size=64,
        context=4096,
        fingerprint=model_fingerprint(make_model(base)),
    ).save(folder)
    return folder


# --- measuring --------------------------------------------------------------------------------------------------------


def document(base: Base, tokens: int) -> torch.Tensor:
    generator = torch.Generator(base.device).manual_seed(2)
    return torch.randint(0, base.config.vocab_size, (1, tokens), device=base.device, generator=generator)


def timed(step: Any, cuda: bool) -> float:
    """Milliseconds of one call, by events on the GPU."""
    if not cuda:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(base: Base, contestant: AbstractContextManager[Any], tokens: int, steps: int) -> dict[str, Any]:
    """One step to warm up, then the timed ones. Without enough memory, what is known then and the reason."""
    figures: dict[str, Any] = {}
    try:
        with contestant as (model, controller):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            loss = torch.zeros(())

            def step(ids: torch.Tensor) -> None:
                nonlocal loss
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss = loss.detach()

            ids = document(base, tokens)
            # TRL's offloading pins memory in its first step, and cannot do without the backward pass.
            whole = tokens < WARM_WHOLE or isinstance(model, Contestant)
            step(ids if whole else document(base, WARM_TOKENS))
            if controller is not None:  # or the first step of this length would do it
                controller.savings.pin(controller.phase, (tokens,), base.weights["lm_head.weight"].element_size())
            if base.cuda:
                torch.cuda.synchronize()
                figures["before_mib"] = torch.cuda.memory_allocated() >> 20
                torch.cuda.reset_peak_memory_stats()
            times = [timed(lambda: step(ids), base.cuda) for _ in range(steps)]
            figures |= {
                "step_ms": round(statistics.median(times), 1),
                "step_ms_min": round(min(times), 1),
                "step_ms_max": round(max(times), 1),
                "steps": steps,
                "loss": round(loss.item(), 4),
            }
            if controller is not None:
                figures["kept"] = round(statistics.mean(controller.kept_ratios), 4)
                computed = controller.report()["density"]
                figures["computed"] = round(statistics.mean(computed), 4) if computed else None
                memory = controller.report()["memory"]
                figures |= {"host_mib": memory["host_bytes"] / 2**20, "memory": memory} if memory else {}
            if base.cuda:
                figures["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    except torch.OutOfMemoryError:
        figures = {"error": "out of memory"}
    except ValueError as error:
        if not str(error).startswith("offload: the host gave no more"):
            raise
        figures = {"error": "out of host memory"}
    return figures


def gradients(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = [p.grad.float().flatten() for p in model.parameters() if p.requires_grad]
    return loss.item(), torch.cat(grads)


def check(base: Base, peer_name: str, saving: Saving, tokens: int) -> dict[str, Any]:
    """Loss and LoRA gradients of lemo, nothing eliminated, against the peer's. Raises SystemExit if they differ.

    The limits allow for bf16: two correct implementations of 32 layers differ by a few percent of the gradient's norm.
    """
    ids = document(base, tokens)
    with peer(base, peer_name, peers_recompute(saving.recompute)) as (model, _):
        expected, theirs = gradients(model, ids)
    del model
    with ours(base, settings(ROWS["dense"], saving, Path())) as (model, _):
        loss, mine = gradients(model, ids)
    del model
    found = {
        "context": tokens,
        "peer_loss": expected,
        "loss": loss,
        "loss_error": abs(loss - expected) / abs(expected),
        "loss_limit": 1e-3 if base.cuda else 1e-5,
        "gradient_error": ((mine - theirs).norm() / theirs.norm()).item(),
        "gradient_limit": 0.2 if base.cuda else 1e-4,
    }
    for kind in ("loss", "gradient"):
        if not found[f"{kind}_error"] <= found[f"{kind}_limit"]:  # nor if it is not a number
            raise SystemExit(f"lemo with nothing eliminated does not compute the peer's {kind}: {found}")
    return found


def identity_of(name: str, row: Row, config: Any) -> dict[str, Any]:
    phase = config.phases[0]
    policy, options = config.policy(phase)
    return {
        "row": name,
        "method": "lemo",
        "mode": row.mode,
        "keep": row.keep,
        "density": row.density,
        "keys": row.keys,
        "policy": policy + " shared" * bool(options.get("shared")) if phase.chooses_blocks else None,
        "weighted": row.weighted,
    }


def compare(row: dict[str, Any], other: dict[str, Any] | None, dense: dict[str, Any] | None) -> dict[str, Any]:
    """A row with the peer's figures and the ratios to them and to lemo's dense step, as far as they were measured."""
    if dense is not None and "step_ms" in dense and "step_ms" in row:
        row = row | {"dense_ratio": round(dense["step_ms"] / row["step_ms"], 3)}
    if other is None:
        return row
    row = row | {"peer": other["method"]}
    for name in ("step_ms", "peak_mib"):
        if name in other:
            row[f"peer_{name}"] = other[name]
    if "step_ms" in row and "step_ms" in other:
        row["time_ratio"] = round(other["step_ms"] / row["step_ms"], 3)
    if "peak_mib" in row and "peak_mib" in other:
        row["memory_ratio"] = round(row["peak_mib"] / other["peak_mib"], 3)
    return row


# --- the command ------------------------------------------------------------------------------------------------------


def choose_peers(wanted: Sequence[str] | None, model: str) -> tuple[list[str], list[dict[str, str]]]:
    """The peers, the one of all ratios first, and what was left out with the reason. Never silently a weaker first one
    on a GPU."""
    if wanted is not None and "none" in wanted:
        return [], [{"row": "peer", "reason": "--peer none"}]
    reasons = {name: _missing(name, model) for name in (LIGER, *(PEERS[short] for short in wanted or ()))}
    if wanted is None:
        wanted = ["liger"] if torch.cuda.is_available() else ["plain"]
    first, *others = (PEERS[short] for short in wanted)
    if reasons.get(first):
        raise SystemExit(f"the peer {first} cannot run: {reasons[first]}. --peer plain compares with {PLAIN}")
    left_out = [{"row": name, "reason": reasons[name] or ""} for name in others if reasons[name]]
    if first == PLAIN and LIGER not in others:
        left_out.append({"row": LIGER, "reason": reasons[LIGER] or "--peer plain"})
    return [first, *(name for name in others if not reasons[name])], left_out


def _missing(name: str, model: str) -> str | None:
    if "Liger" in name and SHAPES[model]["family"] != "llama":
        return f"its kernels are put into Llama models only, and {model} is not one"
    return missing(name)


@dataclass(frozen=True)
class Saving:
    """What layers of lemo save, as in `lemo.LemoConfig`. offload: "all" in the place of True, 0 in that of False."""

    recompute: str
    offload: int | str = 0
    memory_budget: int | None = None
    recompute_layers: bool | int | str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        return vars(self) | {
            "recompute": self.recompute if self.memory_budget is None else "auto",
            "offload": {"all": True, 0: False}.get(self.offload, self.offload),
        }

    @property
    def fields(self) -> dict[str, Any]:
        """Of a row."""
        return vars(self) | ({} if self.memory_budget is None else {"recompute": "by budget"})


def savings(row: Row, args: argparse.Namespace) -> list[Saving]:
    """What a row is measured with. Mode "backward" saves with "full" what it saves with "attention", and is the only
    one of which everything is offloaded."""
    different, backward = args.recompute, row.mode == "backward"
    if backward:
        different = list({recompute == "none": recompute for recompute in reversed(different)}.values())[::-1]
    pairs = itertools.product(different, args.offload)
    possible = [(recompute, offload) for recompute, offload in pairs if backward or recompute != "none" or not offload]
    return [Saving(*pair, args.memory_budget, args.recompute_layers) for pair in possible]


def parse_offload(text: str) -> int | str:
    """As `lemo finetune --offload`, and 0."""
    value = 0 if text == "0" else offload(text)
    return {True: "all", False: 0}[value] if isinstance(value, bool) else value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    width = max(map(len, ROWS))
    rows = "\n".join(f"  {name:{width}}  {row.describe()}" for name, row in ROWS.items())
    width = max(map(len, PEERS))
    peers = "\n".join(f"  {short:{width}}  {name}" for short, name in PEERS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("{rows}", rows).replace("{peers}", peers),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--context", type=int, nargs="+", default=[65536, 16384], help="tokens of the document (default: 65536 16384)"
    )
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help="rows to measure (default: all)")
    parser.add_argument(
        "--recompute",
        choices=["full", "attention", "none"],
        nargs="+",
        default=["full"],
        help="what the backward pass computes again; attention: all but attention itself, whose output is saved. Peers "
        "have none, if that fits, or full (default: full)",
    )
    parser.add_argument(
        "--offload",
        type=parse_offload,
        nargs="+",
        default=[0],
        metavar="N",
        help="of lemo's rows: layers whose saved rows wait in pinned host memory, all, auto, or a size (default: 0)",
    )
    parser.add_argument(
        "--memory-budget", type=size, help="of lemo's rows: as for lemo finetune, in place of --recompute"
    )
    parser.add_argument(
        "--recompute-layers", type=recompute_layers, default="auto", help="of lemo's rows: as for lemo finetune"
    )
    parser.add_argument("--cap", type=size, help="memory that PyTorch may take of the GPU")
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama3-8b", help="shape (default: llama3-8b)")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a smoke run")
    parser.add_argument("--steps", type=int, help="timed steps per row (default: 3 from 64K tokens, up to 9 below)")
    parser.add_argument(
        "--peer",
        choices=[*PEERS, "none"],
        nargs="+",
        help="the first is compared with, the others are measured as well; none: lemo alone (default: liger on a GPU, "
        "plain without one)",
    )
    add_output(parser, "step")
    args = parser.parse_args(arguments)
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers: expected at least 1, got {args.layers}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    if args.memory_budget is not None and len(args.recompute) > 1:
        parser.error("--memory-budget decides what lemo recomputes: give --recompute one value, that of the peers")
    if args.memory_budget is None and (
        without := [name for name, row in chosen(args).items() if not savings(row, args)]
    ):
        parser.error(
            f"--recompute none with --offload is for mode backward, and leaves no way to measure {', '.join(without)}: "
            "give another value of either as well, or other rows (--only)"
        )
    if args.peer is not None and "none" in args.peer and len(args.peer) > 1:
        parser.error(f"--peer: expected none or names of peers, got {' '.join(args.peer)}")
    layers = args.layers or SHAPES[args.model]["num_hidden_layers"]
    if (most := max((n for n in args.offload if isinstance(n, int)), default=0)) > layers:
        parser.error(f"--offload: the model has {layers} layers, got {most}")
    if min(args.context) < 64:
        parser.error(f"--context: expected at least 64 tokens (one block), got {min(args.context)}")
    return args


def peer_rows(base: Base, peers: Sequence[str], recompute: str, tokens: int, steps: int) -> Iterator[dict[str, Any]]:
    """Rows of all peers, the first one named "peer"; ratios of the others are to it."""
    shorts = {name: short for short, name in PEERS.items()}
    first: dict[str, Any] | None = None
    for name in peers:
        row = {"row": "peer" if first is None else f"peer-{shorts[name]}", "method": name, "mode": "dense", "keep": 1.0}
        row |= {"density": None, "policy": None, "weighted": False, "context": tokens, "recompute": recompute}
        row |= {"offload": "all" if name == OFFLOAD else 0, "model": base.name}
        row |= measure(base, peer(base, name, recompute), tokens, steps)
        first = first or row
        yield compare(row, first, None)


def measure_peers(
    base: Base,
    peers: Sequence[str],
    recompute: Sequence[str],
    tokens: int,
    steps: int,
    add: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The first peer's row by what it recomputes. Without memory for recomputing nothing, it is that of recomputing
    everything: the peer's fastest way that fits."""
    found: dict[str, dict[str, Any]] = {}
    wanted = list(dict.fromkeys(map(peers_recompute, recompute)))
    for what in wanted:
        for row in peer_rows(base, peers, what, tokens, steps):
            found.setdefault(what, add(row))
        if "error" in found.get("none", {}) and "full" not in wanted:
            wanted.append("full")
    if "error" in found.get("none", {}):
        found["none"] = found["full"]
    return found


def lemo_rows(
    base: Base, args: argparse.Namespace, calibration: Path, tokens: int, steps: int, peers: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """peers: the row to compare with, by what it recomputes."""
    dense: dict[Saving, dict[str, Any]] = {}
    for name, row in chosen(args).items():
        for saving in savings(row, args):
            config = settings(row, saving, calibration)
            found = identity_of(name, row, config) | {"context": tokens, **saving.fields, "model": base.name}
            found |= measure(base, ours(base, config), tokens, steps)
            if row.mode == "dense":
                dense[saving] = found
            yield compare(found, peers.get(peers_recompute(saving.recompute)), dense.get(saving))


def peers_recompute(recompute: str) -> str:
    """What a peer does where lemo recomputes as little or as much: gradient checkpointing is all or nothing."""
    return "none" if recompute == "none" else "full"


def chosen(args: argparse.Namespace) -> dict[str, Row]:
    return {name: row for name, row in ROWS.items() if name in (args.only or set(ROWS) - set(MORE))}


def main() -> int:
    args = parse()
    if args.cap is not None:
        torch.cuda.set_per_process_memory_fraction(args.cap / torch.cuda.get_device_properties(0).total_memory)
    made = header()  # before anything is written: a results file under version control would make the commit "-dirty"
    warnings.filterwarnings("ignore", category=FutureWarning)  # new names in transformers that old versions lack
    peers, left_out = choose_peers(args.peer, args.model)
    for missing_row in left_out:
        print(f"left out: {missing_row['row']}: {missing_row['reason']}", flush=True)
    start = time.perf_counter()
    base = make_base(args.model, args.layers)
    print(f"{base.name}: weights made in {time.perf_counter() - start:.0f} s", flush=True)
    checked = None
    if peers:
        ways = savings(ROWS["dense"], args) or [Saving(args.recompute[-1])]
        checked = check(base, peers[0], ways[-1], min(2048, *args.context))
        release(base)
        print(f"nothing eliminated: loss within {checked['loss_error']:.1e}, gradient {checked['gradient_error']:.1e}")
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> dict[str, Any]:
        release(base)
        rows.append(row)
        print(table([row], COLUMNS).splitlines()[1], flush=True)
        write_results(args.out, rows, **made, check=checked, left_out=left_out)
        return row

    print("  ".join(COLUMNS), flush=True)
    calibrated = any(row.calibrated for row in chosen(args).values())
    with tempfile.TemporaryDirectory() if calibrated else nullcontext("") as scratch:
        calibration = untrained_calibration(base, Path(scratch) / "calibration") if calibrated else Path()
        release(base)
        for tokens in args.context:
            steps = args.steps or max(3, min(9, 3 * 65536 // tokens))
            references = measure_peers(base, peers, args.recompute, tokens, steps, add)
            for row in lemo_rows(base, args, calibration, tokens, steps, references):
                add(row)
    print(table(rows, COLUMNS))
    print(write_results(args.out, rows, **made, check=checked, left_out=left_out))
    return int(any("error" in row for row in rows if row["method"] == "lemo"))


if __name__ == "__main__":
    sys.exit(main())
