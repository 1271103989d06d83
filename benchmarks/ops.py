"""Every operation on the GPU, and the PyTorch composition it replaces, in bf16 at the sizes of a Llama-3-8B layer.

ratio = peer_ms / ms: above 1, lemo is faster. Times are medians of calls that rotate through enough buffers to outgrow
the L2 cache; both sides run in this process. Attention has one size here and a separate benchmark, attention.py. Rows
of Liger's loss need liger-kernel, those of its CuTe kernels liger-kernel[cutedsl] and a Hopper GPU; a peer that cannot
run, or whose gradient is not ours, is left out with the reason. One peer of the loss is its floor: the two products
that it cannot do without, in chunks of the same size, so that the ratio is the share of our time that they take.

  python benchmarks/ops.py
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
from common import add_output, compete, copies, milliseconds, reason, require_same, table, write_results
from lemo import ops
from lemo.engine.layout import Blocks, Kept, select
from torch import Tensor
from torch.nn.attention import SDPBackend

BF = torch.bfloat16
D, HEADS, KV_HEADS, HEAD, VOCAB, BLOCK = 4096, 32, 8, 128, 128256, 64
TOKENS = 16384  # of attention and of the loss
EPS = 1e-5
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# Rows of logits at a time: what the operation chooses by itself at this vocabulary, for the floor as for ours.
SEGMENT = 512
FLOOR = f"its two products alone (cuBLAS, {SEGMENT} rows at a time)"
Rows = list[dict[str, Any]]
LeftOut = list[dict[str, str]]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF) * scale


def half(tokens: int) -> Kept:
    blocks = Blocks.from_lengths([tokens], BLOCK, "cuda")
    return select(torch.rand(blocks.num_blocks, device="cuda"), blocks, mode="budget", keep=0.5)


def add(rows: Rows, op: str, case: str, ms: float, peers_ms: dict[str, float], **more: Any) -> None:
    for peer, peer_ms in peers_ms.items():
        row = {"op": op, "case": case, "ms": round(ms, 4), "peer": peer, "peer_ms": round(peer_ms, 4)}
        rows.append(row | {"ratio": round(peer_ms / ms, 3)} | more)


def together(
    make: Callable[[], Any], bytes_each: int, ours: Callable, theirs: dict[str, Callable], **timing: int
) -> tuple:
    """Times ``ours`` and each of ``theirs`` on the same rotating inputs."""
    inputs = [make() for _ in range(copies(bytes_each))]

    def time(run: Callable) -> float:
        return milliseconds([lambda i=i: run(*i) for i in inputs], **timing)

    return time(ours), {name: time(run) for name, run in theirs.items()}


def rows_ops(rows: Rows) -> None:
    tokens = 65536
    kept = half(tokens)
    long, m = kept.rows.long(), kept.num_rows
    weight = normal(D)
    moved = m * D * 2

    def forward_inputs() -> tuple:
        return (normal(tokens, D),)

    ms, other = together(
        forward_inputs,
        moved * 2,
        lambda x: ops.gather_norm(x, kept.rows, None, weight, None, "rms", EPS),
        {"index_select + rms_norm": lambda x: peers.gather_norm(x, long, weight, EPS)},
    )
    # Reads the kept rows, writes them normed and as they are (for backward).
    add(rows, "gather_norm", "65536 x 4096, half kept, rms", ms, other, gb_per_s=round(3 * moved / ms / 1e6))

    ms, other = together(
        lambda: (normal(tokens, D), normal(m, D)),
        moved * 3,
        lambda x, y: ops.scatter_add_(x, kept.rows, y),
        {"index_add_": lambda x, y: peers.scatter_add_(x, long, y)},
    )
    add(rows, "scatter_add", "65536 x 4096, half kept", ms, other, gb_per_s=round(3 * moved / ms / 1e6))

    ms, other = together(
        forward_inputs,
        moved * 2,
        lambda x: ops.gather(x, kept.rows),
        {"index_select": lambda x: x.index_select(0, long)},
    )
    add(rows, "gather", "65536 x 4096, half kept", ms, other, gb_per_s=round(2 * moved / ms / 1e6))

    def backward_inputs() -> tuple:
        s = normal(m, D).requires_grad_()
        return s, normal(m, D), normal(tokens, D), torch.nn.functional.rms_norm(s, (D,), weight, EPS)

    def peer_backward(s: Tensor, dy: Tensor, dx: Tensor, y: Tensor) -> None:
        (ds,) = torch.autograd.grad(y, s, dy, retain_graph=True)
        dx.index_add_(0, long, ds)

    ms, other = together(
        backward_inputs,
        moved * 4,
        lambda s, dy, dx, y: ops.gather_norm_backward_(dx, kept.rows, dy, s.detach(), weight, None, "rms", EPS),
        {"rms_norm backward + index_add_": peer_backward},
    )
    # Reads dy, s and dx, writes dx.
    add(rows, "gather_norm_backward", "65536 x 4096, half kept, rms", ms, other, gb_per_s=round(4 * moved / ms / 1e6))


def choice_ops(rows: Rows) -> None:
    tokens = 65536
    blocks = Blocks.from_lengths([tokens], BLOCK, "cuda")
    layout = (blocks.offsets, blocks.documents, BLOCK)
    rule = ("budget", 0.5, 0.0, 0, 0, 0)
    ms, other = together(
        lambda: (torch.rand(blocks.num_blocks, device="cuda"),),
        blocks.num_blocks * 4,
        lambda s: ops.select_blocks(s, *layout, tokens, *rule),
        {"topk + sort": lambda s: peers.select(s, BLOCK, 0.5)},
    )
    add(rows, "select", "1024 blocks, budget 0.5", ms, other)

    sizes = ((128, D), (64, 128), (64, 64))
    networks = [[normal(*s, scale=s[1] ** -0.5) for s in sizes] for _ in range(2)]
    ms, other = together(
        lambda: (normal(tokens, D),),
        tokens * D * 2,
        lambda x: ops.predict(x, *networks[0], *networks[1], *layout, eps=EPS),
        {"rms_norm + linear + relu + mean": lambda x: peers.predict(x, networks, BLOCK, EPS)},
    )
    add(rows, "predict", "65536 x 4096, ranks 128/64/64", ms, other)

    tokens = 16384
    blocks = Blocks.from_lengths([tokens], BLOCK, "cuda")
    layout = (blocks.offsets, blocks.documents, BLOCK)
    ms, other = together(
        lambda: (normal(tokens, HEADS, HEAD), normal(tokens, KV_HEADS, HEAD)),
        tokens * (HEADS + KV_HEADS) * HEAD * 2,
        lambda q, k: ops.block_scores(q, k, *layout, HEAD**-0.5),
        {"strips of q k^T": lambda q, k: peers.block_scores(q, k, BLOCK, HEAD**-0.5)},
        repeat=5,
        warm=2,
    )
    work = 2 * HEADS * HEAD * tokens * tokens / 2
    add(rows, "scores", "16384, 32/8 heads of 128", ms, other, tflops=round(work / ms / 1e9, 1))


def attention_ops(rows: Rows) -> None:
    """One row per pass and peer, for the table; benchmarks/attention.py has the rest."""
    kept = Kept.everything(Blocks.from_lengths([TOKENS], BLOCK, "cuda"))
    q, k, v, dout = (normal(TOKENS, h, HEAD) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    end = (TOKENS, HEAD**-0.5)
    out, lse = ops.attention_forward(q, k, v, kept.cu_seqlens, None, *end)
    ours = {
        "forward": partial(ops.attention_forward, q, k, v, kept.cu_seqlens, None, *end),
        "backward": partial(ops.attention_backward, dout, q, k, v, out, lse, kept.cu_seqlens, None, None, None, *end),
    }
    theirs = {
        name: peers.dense_attention(backend, q, k, v, dout, heads_first=False, repeat_keys=False)
        for name, backend in SDPA.items()
    }
    work = 4 * HEADS * HEAD * TOKENS**2 / 2
    for kind, factor in (("forward", 1.0), ("backward", 2.5)):
        times = compete({"lemo": [ours[kind]]} | {name: [passes[kind]] for name, passes in theirs.items()})
        ms = times.pop("lemo")
        case = f"{TOKENS}, 32/8 heads of 128, packed"
        add(rows, f"attention {kind}", case, ms, times, tflops=round(factor * work / ms / 1e9, 1))


def peak(run: Callable[[], Any]) -> int:
    """MiB above what is allocated before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def loss_op(rows: Rows, left_out: LeftOut) -> None:
    """left_out: for the peers that cannot run here, with their reasons. The last of them are compiled on this GPU for
    the first time, so whatever they raise must not cost the rows before."""
    hidden, weight = normal(TOKENS, D), normal(VOCAB, D, scale=D**-0.5)
    targets = torch.randint(VOCAB, (TOKENS,), device="cuda")
    leaf = hidden.detach().requires_grad_()

    def ours() -> Tensor:
        dhidden = ops.linear_cross_entropy(hidden, weight, None, None, None, 1.0, targets, segment_rows=SEGMENT)[2]
        assert dhidden is not None
        return dhidden

    def plain() -> Tensor:
        return torch.autograd.grad(peers.cross_entropy(leaf, weight, targets), leaf)[0]

    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "linear + cross_entropy": lambda: plain,
        "the same in chunks of 2048": lambda: lambda: peers.chunked_cross_entropy(hidden, weight, targets)[1],
        FLOOR: lambda: peers.two_products(hidden, weight, SEGMENT),
    } | peers.liger_losses(leaf, weight, targets)
    timing = {"repeat": 5, "warm": 1}
    ms, mib, expected = milliseconds([ours], **timing), peak(ours), ours()
    work = 4 * TOKENS * D * VOCAB  # two products: logits and the gradient of the hidden states
    case = f"{TOKENS} x {D}, vocab {VOCAB}"
    for name, make in makers.items():
        try:
            run = make()
            if name != FLOOR:
                require_same(expected, run(), name)
            more: dict[str, Any] = {"peak_mib": mib, "peer_peak_mib": peak(run), "tflops": round(work / ms / 1e9, 1)}
            more |= {"floor": True} if name == FLOOR else {}
            add(rows, "linear_cross_entropy", case, ms, {name: milliseconds([run], **timing)}, **more)
        except Exception as error:  # of whatever class the peer's library has
            left_out.append({"row": name, "reason": reason(error)})
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=["rows", "choice", "attention", "loss"], help="parts to run")
    add_output(parser, "ops")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    torch.manual_seed(0)
    rows: Rows = []
    left_out: LeftOut = []
    parts: dict[str, Callable[[], None]] = {
        "rows": partial(rows_ops, rows),
        "choice": partial(choice_ops, rows),
        "attention": partial(attention_ops, rows),
        "loss": partial(loss_op, rows, left_out),
    }
    failed = []
    for name, run in parts.items():
        if args.only is None or name in args.only:
            try:
                run()
                torch.cuda.empty_cache()
            except Exception:  # the rows so far are written all the same
                traceback.print_exc()
                failed.append(name)
    for row in left_out:
        print(f"left out: {row['row']}: {row['reason']}")
    columns = ["op", "case", "ms", "peer", "peer_ms", "ratio", "tflops", "gb_per_s", "peak_mib", "peer_peak_mib"]
    print(table(rows, columns))
    print(f"written: {write_results(args.out, rows, left_out=left_out)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
