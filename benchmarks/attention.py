"""Attention on a Hopper GPU, compared with the best dense kernels, in bf16, 32 query heads over 8 key heads.

  python benchmarks/attention.py                     # everything, about three minutes
  python benchmarks/attention.py --quick --cases packed blocks
  python benchmarks/attention.py --plot benchmarks/results/attention-h100.json

Cases, each measured in turn with its peers in one process:
  packed         one causal document, everything kept
  padded         `packed` at head_dim 80 and 96; peers also: lemo at 96 and 128, its inputs filled up with zeros before
                 the clock runs
  deterministic  the deterministic backward pass of `packed`; SDPA has one of FlashAttention-2 only. FlashAttention-4
                 takes part here and in `packed` where its package is installed
  blocks         rows at their original offsets through a block list, all or some blocks kept at random
  given          backward over kept queries and kept keys, with the output and LSE of the dense forward pass and key
                 weights
  lists          a key list for every tile of queries, half of the tiles
  scores         exact block scores; its peer is our own forward pass at half its time, since scores is half its
                 operations
  fallback       `packed` again by the kernels for sm_80, on this GPU

tflops counts the operations that the kept rows need (4 M^2 D Hq / 2 forward, 2.5 times that backward), D being the
head_dim before any padding. ratio = peer_ms / ms: above 1, lemo is faster. lemo is called through its C interface into
outputs that are there already; "lemo op" is the torch operation, which also zeroes the rows that the list does not
name. SDPA peers are timed in both tensor layouts (cuDNN) or with their keys repeated and not (FlashAttention-2), and
the faster one is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from common import add_output, compete, copies, reason, require_same, table, write_results
from lemo import _native, ops
from lemo.engine.layout import Blocks, Kept, select
from peers import Passes
from torch import Tensor
from torch.nn.attention import SDPBackend

HEADS, KV_HEADS = 32, 8
PASSES = ("forward", "backward")
DETERMINISTIC = "deterministic backward"  # a pass too, of lemo
COLUMNS = ["case", "n", "head_dim", "block", "keep", "pass", "ms", "tflops", "peer", "peer_ms", "ratio"]
KEEPS = [i / 10 for i in range(1, 11)]
Peers = dict[str, Callable[..., Passes]]

DENSE: Peers = {
    "cudnn, heads first": partial(
        peers.dense_attention, SDPBackend.CUDNN_ATTENTION, heads_first=True, repeat_keys=False
    ),
    "cudnn, rows first": partial(
        peers.dense_attention, SDPBackend.CUDNN_ATTENTION, heads_first=False, repeat_keys=False
    ),
    "flash, grouped": partial(peers.dense_attention, SDPBackend.FLASH_ATTENTION, heads_first=False, repeat_keys=False),
    "flash, repeated": partial(peers.dense_attention, SDPBackend.FLASH_ATTENTION, heads_first=False, repeat_keys=True),
    "flash 4": peers.flash_attention_4,
}
CUDNN = {name: make for name, make in DENSE.items() if name.startswith("cudnn")}
SDPA = {name: make for name, make in DENSE.items() if not name.startswith("flash 4")}


def make_inputs(n: int, head_dim: int) -> tuple[Tensor, ...]:
    """q, k, v, dout"""
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return tuple(torch.randn(n, h, head_dim, device="cuda", dtype=torch.bfloat16) for h in heads)


def choose(n: int, block: int, keep: float) -> Kept:
    blocks = Blocks.from_lengths([n], block, "cuda")
    if keep == 1.0:
        return Kept.everything(blocks)
    return select(torch.rand(blocks.num_blocks, device="cuda"), blocks, mode="budget", keep=keep)


class Lemo:
    """lemo through its C interface, for one set of inputs; ``passes`` as the peers'."""

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        kept: Kept,
        listed: bool,
        given: tuple[Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        q, k, v, dout = inputs
        rows = kept.rows if listed else None
        capacity = q.shape[0] if rows is None else kept.num_rows
        self.out, self.lse = given or (torch.empty_like(q), torch.empty(q.shape[1], capacity, device=q.device))
        self.gradients = {f"d{name}": torch.empty_like(t) for name, t in zip("qkv", (q, k, v), strict=True)}
        end = {"max_seqlen": kept.max_seqlen, "scale": scale or q.shape[2] ** -0.5}
        no_lists = {"tile_offsets": None, "tiles": None}
        lists = {"cu_seqlens": kept.cu_seqlens, "rows": rows}
        forward = {"q": q, "k": k, "v": v} | lists | end | {"out": self.out, "lse": self.lse} | no_lists
        weighted = {"key_weights": weights, "row_slots": None if weights is None else kept.row_slots}
        backward = {"dout": dout, "q": q, "k": k, "v": v, "out": self.out, "lse": self.lse}
        backward |= lists | weighted | end | self.gradients | no_lists
        run_backward = partial(_native.call, "attention_backward", q.device, backward)
        self.passes: Passes = {
            "forward": partial(_native.call, "attention_forward", q.device, forward),
            "backward": run_backward,
            DETERMINISTIC: partial(run_backward, deterministic=True),
        }
        if given is None:
            self.passes["forward"]()


def lemo_op(inputs: tuple[Tensor, ...], kept: Kept, out: Tensor, lse: Tensor) -> Passes:
    """The torch operations, which make their own outputs."""
    q, k, v, dout = inputs
    end = (kept.max_seqlen, q.shape[2] ** -0.5)
    return {
        "forward": partial(ops.attention_forward, q, k, v, kept.cu_seqlens, kept.rows, *end),
        "backward": partial(
            ops.attention_backward, dout, q, k, v, out, lse, kept.cu_seqlens, kept.rows, None, None, *end
        ),
    }


def operations(kind: str, head_dim: int, rows: int) -> float:
    """Of a causal pass over so many rows."""
    return 2 * HEADS * head_dim * rows**2 * (1 if kind == "forward" else 2.5)


class Bench:
    """The rows so far, and how long a comparison may take."""

    def __init__(self, quick: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []  # peers that cannot run here
        self.timing = (150.0, 3) if quick else (1000.0, 9)  # milliseconds of a comparison, and rounds at least
        self.quick = quick

    def contest(
        self,
        row: dict[str, Any],
        ours: list[Passes],
        others: dict[str, list[Passes]],
        rows: int,
        passes: tuple[str, ...] = PASSES,
    ) -> None:
        """Times every pass of ours in turn with the others and adds a row per peer. others: "name, variant"; the
        fastest variant of a name is reported. rows: M."""
        for kind in passes:
            everyone = {"lemo": ours} | others
            times = compete({name: [p[kind] for p in sets] for name, sets in everyone.items()}, *self.timing)
            ms = times.pop("lemo")
            work = operations(kind, row["head_dim"], rows)
            best: dict[str, tuple[float, str]] = {}
            for label, peer_ms in times.items():
                name, _, variant = label.partition(", ")
                best[name] = min(best.get(name, (peer_ms, variant)), (peer_ms, variant))
            for name, (peer_ms, variant) in best.items():
                self.add(row | {"pass": kind}, ms, work, name, peer_ms, variant)

    def build(self, makers: Peers, sets: list[tuple[Tensor, ...]]) -> dict[str, list[Passes]]:
        """Peers that run here, both passes, on every set of inputs; why the others do not is kept for the results."""
        made = {}
        for name, make in makers.items():
            try:
                passes = [make(*inputs) for inputs in sets]
                passes[0]["backward"]()
                made[name] = passes
            except Exception as error:  # of whatever class the peer's library has
                missing = {"row": name, "reason": reason(error)}
                if missing not in self.left_out:
                    self.left_out.append(missing)
                    print(f"# {name} not run: {missing['reason']}", flush=True)
        return made

    def add(self, row: dict[str, Any], ms: float, work: float, peer: str, peer_ms: float, variant: str = "") -> None:
        made = row | {"ms": round(ms, 4), "tflops": round(work / ms / 1e9, 1), "peer": peer}
        made |= {"peer_ms": round(peer_ms, 4), "ratio": round(peer_ms / ms, 3)}
        self.rows.append(made | ({"peer_variant": variant} if variant else {}))
        print(table([made], COLUMNS).splitlines()[1], flush=True)


def agree(ours: Tensor, others: dict[str, list[Passes]]) -> None:
    """The same with cuDNN and FlashAttention-4, where they are among them."""
    for name in CUDNN:
        if name in others:
            require_same(ours, others[name][0]["forward"]()[0].transpose(0, 1), name)
    if "flash 4" in others:
        require_same(ours, others["flash 4"][0]["forward"]()[0], "flash 4")


def packed(bench: Bench, name: str = "packed") -> None:
    for head_dim in (128, 64):
        for n in (4096, 16384) if bench.quick else (4096, 16384, 65536):
            makers = dict(DENSE if name == "packed" else SDPA)
            if n == 16384 and name == "packed":
                makers["flex"] = peers.flex_attention
            sets = [make_inputs(n, head_dim) for _ in range(copies(2 * n * head_dim * 2 * (HEADS + KV_HEADS)))]
            kept = choose(n, 128, 1.0)
            ours = [Lemo(inputs, kept, listed=False) for inputs in sets]
            others = bench.build(makers, sets)
            agree(ours[0].out, others)
            row = {"case": name, "n": n, "head_dim": head_dim, "keep": 1.0}
            bench.contest(row, [lemo.passes for lemo in ours], others, n)
            del sets, ours, others
            torch.cuda.empty_cache()


def padded(bench: Bench) -> None:
    n = 16384
    for head_dim, wider in ((80, (96, 128)), (96, (128,))):
        sets = [make_inputs(n, head_dim) for _ in range(copies(2 * n * head_dim * 2 * (HEADS + KV_HEADS)))]
        kept = choose(n, 128, 1.0)
        try:
            ours = [Lemo(inputs, kept, listed=False) for inputs in sets]
        except NotImplementedError as error:
            print(f"# padded not run: {error}", flush=True)
            return
        others = bench.build(SDPA, sets)
        agree(ours[0].out, others)
        for width in wider:
            filled = [tuple(F.pad(t, (0, width - head_dim)) for t in inputs) for inputs in sets]
            wide = [Lemo(inputs, kept, listed=False, scale=head_dim**-0.5) for inputs in filled]
            require_same(ours[0].out, wide[0].out[:, :, :head_dim], f"lemo at {width}")
            others[f"lemo padded to {width}"] = [lemo.passes for lemo in wide]
        row = {"case": "padded", "n": n, "head_dim": head_dim, "keep": 1.0}
        bench.contest(row, [lemo.passes for lemo in ours], others, n)


def deterministic(bench: Bench) -> None:
    """cuDNN's pass is the usual one: in torch's deterministic mode SDPA refuses that backend."""
    n = 16384
    for head_dim in (128, 64):
        inputs = make_inputs(n, head_dim)
        ours = Lemo(inputs, choose(n, 128, 1.0), listed=False)
        others = {"lemo not deterministic": [{DETERMINISTIC: ours.passes["backward"]}]}
        for name, (passes,) in bench.build(SDPA, [inputs]).items():
            if name in CUDNN:
                others[name.replace("cudnn", "cudnn not deterministic")] = [{DETERMINISTIC: passes["backward"]}]
            else:
                run = peers.deterministic(passes["backward"])
                others[name.replace("flash", "flash deterministic")] = [{DETERMINISTIC: run}]
        made = bench.build({"flash 4 deterministic": partial(peers.flash_attention_4, deterministic=True)}, [inputs])
        others |= {peer: [{DETERMINISTIC: passes["backward"]}] for peer, (passes,) in made.items()}
        row = {"case": "deterministic", "n": n, "head_dim": head_dim, "keep": 1.0}
        bench.contest(row, [ours.passes], others, n, (DETERMINISTIC,))


def blocks(bench: Bench) -> None:
    n, head_dim = 16384, 128
    inputs = make_inputs(n, head_dim)
    whole = Lemo(inputs, choose(n, 128, 1.0), listed=False)
    dense = bench.build(CUDNN, [inputs])
    for block in (128, 64):
        for keep in (0.5, 1.0) if bench.quick else KEEPS:
            kept = choose(n, block, keep)
            ours = Lemo(inputs, kept, listed=True)
            others = dict(dense)
            if keep in (0.5, 1.0):  # the points that tables name
                others |= bench.build({"flex": partial(peers.flex_attention, rows=kept.rows.long())}, [inputs])
            if keep == 1.0:
                others["lemo packed"] = [whole.passes]
                agree(ours.out, others)
            if keep in (0.5, 1.0):
                others["lemo op"] = [lemo_op(inputs, kept, ours.out, ours.lse)]
            if keep == 0.5:
                picked = partial(peers.gathered_attention, SDPBackend.CUDNN_ATTENTION, rows=kept.rows.long())
                others |= bench.build({"gather + cudnn": picked}, [inputs])
            row = {"case": "blocks", "n": n, "head_dim": head_dim, "block": block, "keep": keep}
            bench.contest(row, [ours.passes], others, kept.num_rows)


def given(bench: Bench) -> None:
    n, head_dim, block = 16384, 128, 64
    inputs = make_inputs(n, head_dim)
    whole = Lemo(inputs, choose(n, block, 1.0), listed=False)
    dense = bench.build(SDPA, [inputs])
    for keep in (0.5,) if bench.quick else (0.25, 0.5, 0.75, 1.0):
        kept = choose(n, block, keep)
        forward = (whole.out, whole.lse[:, kept.rows.long()].contiguous())
        weights = torch.full((kept.num_blocks,), 1 / keep, device="cuda")
        ours = Lemo(inputs, kept, listed=True, given=forward, weights=weights)
        row = {"case": "given", "n": n, "head_dim": head_dim, "block": block, "keep": keep}
        bench.contest(row, [ours.passes], dense, kept.num_rows, ("backward",))


def lists(bench: Bench) -> None:
    lists_of(bench, 16384, 128, (*PASSES, DETERMINISTIC))
    lists_of(bench, 16384, 64, (*PASSES, DETERMINISTIC))
    if not bench.quick:
        lists_of(bench, 65536, 128, PASSES)


def lists_of(bench: Bench, n: int, head_dim: int, passes: tuple[str, ...]) -> None:
    """Two-dimensional sparsity: every tile of 128 queries sees itself, causally, and a random half of those before.

    The peer "lemo packed, same rate" is our dense kernel's time for as many operations as this mask leaves, in the
    deterministic pass as well; others have their usual backward pass there. FlexAttention takes part at one size: it
    compiles each anew.
    """
    tile = 128
    inputs, kept = make_inputs(n, head_dim), choose(n, tile, 1.0)
    (q, k, v, dout), tiles = inputs, n // tile
    seen = torch.tril(torch.rand(tiles, tiles, device="cuda") < 0.5, diagonal=-1)
    offsets = torch.zeros(tiles + 2, dtype=torch.int32, device="cuda")  # one slot per tile, and one per document
    offsets[1:] = torch.cat((seen.sum(1), seen.new_zeros(1, dtype=torch.int64))).cumsum(0)
    forward_lists = (offsets, seen.nonzero()[:, 1].int())
    backward_lists = ops.transpose_tile_lists(*forward_lists, kept.cu_seqlens)
    end = (n, head_dim**-0.5)
    forward = partial(ops.attention_forward, q, k, v, kept.cu_seqlens, None, *end, *forward_lists)
    out, lse = forward()
    backward = partial(ops.attention_backward, dout, q, k, v, out, lse, kept.cu_seqlens, None, None, None, *end)
    ours: Passes = {
        "forward": forward,
        "backward": partial(backward, False, *backward_lists),
        DETERMINISTIC: partial(backward, True, *backward_lists),
    }
    whole = Lemo(inputs, kept, listed=False)
    seen |= torch.eye(tiles, dtype=torch.bool, device="cuda")
    makers = dict(CUDNN)
    if (n, head_dim) == (16384, 128):
        makers["flex"] = partial(peers.flex_attention, tiles=seen)
    others = bench.build(makers, [inputs])
    share = (seen.sum().item() - tiles / 2) / (tiles**2 / 2)  # of the causal half; half of each diagonal tile
    row = {"case": "lists", "n": n, "head_dim": head_dim, "block": tile, "keep": round(share, 3)}
    for kind in passes:
        usual = "backward" if kind == DETERMINISTIC else kind
        runs = {"ours": [ours[kind]], "packed": [whole.passes[kind]]}
        runs |= {name: [p[usual] for p in sets] for name, sets in others.items()}
        if kind == DETERMINISTIC:
            runs["lemo not deterministic"] = [ours[usual]]
        times = compete(runs, *bench.timing)
        ms = times.pop("ours")
        theirs = {"lemo packed, same rate": share * times.pop("packed")}
        name = "cudnn" if kind == usual else "cudnn not deterministic"
        theirs[name] = min((times.pop(variant) for variant in CUDNN if variant in times), default=float("nan"))
        for name, peer_ms in (theirs | times).items():
            bench.add(row | {"pass": kind}, ms, share * operations(kind, head_dim, n), name, peer_ms)


def scores(bench: Bench) -> None:
    n = 16384
    for head_dim, block in ((128, 64),) if bench.quick else ((128, 64), (128, 128), (64, 64)):
        inputs, kept = make_inputs(n, head_dim), choose(n, block, 1.0)
        layout = (kept.source.offsets, kept.source.documents, block)
        dense = Lemo(inputs, kept, listed=False)
        ours = partial(ops.block_scores, inputs[0], inputs[1], *layout, head_dim**-0.5)
        times = compete({"ours": [ours], "forward": [dense.passes["forward"]]}, *bench.timing)
        row = {"case": "scores", "n": n, "head_dim": head_dim, "block": block, "keep": 1.0, "pass": "scores"}
        bench.add(row, times["ours"], HEADS * head_dim * n**2, "half of lemo packed", times["forward"] / 2)


def fallback(bench: Bench) -> None:
    """The library reads this variable once, hence a separate process."""
    variable = "LEMO_CUDA_CAPABILITY"
    if os.environ.get(variable) == "80":
        return packed(bench, "fallback")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--quick", "--cases", "fallback", "--out", str(path)]
        subprocess.run(command, env=os.environ | {variable: "80"}, check=True)
        result = json.loads(path.read_text())
        bench.rows += result["rows"]
        bench.left_out += [row for row in result["left_out"] if row not in bench.left_out]


CASES: dict[str, Callable[[Bench], None]] = {
    "packed": packed,
    "padded": padded,
    "deterministic": deterministic,
    "blocks": blocks,
    "given": given,
    "lists": lists,
    "scores": scores,
    "fallback": fallback,
}


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed-up over dense cuDNN by the kept share, and the square that the operations promise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(KEEPS, [keep**-2 for keep in KEEPS], color="0.6", linestyle="--", label="ideal: 1 / keep²")
    for kind, colour in zip(PASSES, ("tab:blue", "tab:red"), strict=True):
        for block, marker in ((128, "o"), (64, "x")):
            found = [
                (row["keep"], row["ratio"])
                for row in result["rows"]
                if (row["case"], row["pass"], row["peer"], row.get("block")) == ("blocks", kind, "cudnn", block)
            ]
            if found:
                label = f"{kind}, blocks of {block}"
                axes.plot(*zip(*sorted(found), strict=True), color=colour, marker=marker, label=label)
    axes.set(xlabel="kept share of the blocks", ylabel="speed-up over dense cuDNN", yscale="log")
    axes.set_title(f"Causal attention over kept blocks, 16K tokens, head_dim 128 ({result['gpu']})", fontsize=10)
    axes.set_yticks([1, 2, 4, 10, 25, 100], ["1", "2", "4", "10", "25", "100"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="only draw the picture of this result file")
    add_output(parser, "attention")
    args = parser.parse_args()
    if args.plot:
        return plot(json.loads(args.plot.read_text()), args.plot.with_suffix(".png"))
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    torch.manual_seed(0)
    bench = Bench(args.quick)
    print(table([], COLUMNS))
    failed = []
    for name in args.cases:
        try:
            CASES[name](bench)
        except Exception:  # of a peer, say: the other cases do not need it
            traceback.print_exc()
            failed.append(name)
        torch.cuda.empty_cache()
        if bench.rows:  # after every case: a run that is stopped leaves what it has
            print(f"written: {write_results(args.out, bench.rows, left_out=bench.left_out)}", flush=True)
    print(table(bench.rows, COLUMNS))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
