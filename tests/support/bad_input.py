"""What goes wrong for users, in one table: wrong arguments of every operation, layouts, settings, models, batches,
calibrations, full disks, and commands. tool/test_bad_input.py does each of them and checks that the message says the
key words and that nothing was written or changed: no tensor, no model, no file.

An entry is a name, what is done wrong (a function of the test's World), key words, and the kind of error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lemo
import torch
from lemo import _native, ops
from lemo.engine.layout import Blocks, Kept, select
from lemo.engine.policies import make_policy
from lemo.predictors import CalibrationError
from support.attention_cases import Attention
from support.bad_commands import COMMANDS, change_config, flip, truncate
from support.cases import PACKINGS
from torch import Tensor

if TYPE_CHECKING:
    from tool.test_bad_input import World

P = PACKINGS["documents"]
T, M, NB = P.tokens, len(P.layout["rows"]), sum(len(document) for document in P.documents)
SPLIT = Attention("kept_of_both", 4, 2, 16, "rows", given=True)
TK, MK, DOCUMENTS = SPLIT.keys.tokens, len(SPLIT.keys.layout["rows"]), len(SPLIT.keys.documents)
MQ = len(SPLIT.layout.layout["rows"])
NAN, INF = float("nan"), float("inf")
HALF = (NotImplementedError, ("float32", "bfloat16"))


class CommandError(Exception):
    """A command that failed as it should; the message is its last line on stderr."""


@dataclass(frozen=True)
class Bad:
    name: str
    act: Callable[[World], Any]
    words: tuple[str, ...]
    error: type[Exception] = ValueError


def wrong(
    op: str,
    argument: str,
    change: Callable[[Any], Any],
    words: tuple[str, ...],
    error: type[Exception] = ValueError,
    others: dict[str, Any] | None = None,
) -> Bad:
    """An operation with valid arguments of which one is changed; others: changed likewise, or to the value given."""
    silent = argument in ("block_offsets", "norm", "slots", "width", "capacity") or (
        argument == "weight" and "bias" in words
    )
    named = (*words, "expect") if silent else (*words, argument, "expect")
    name = f"{op}-{argument}-{'-'.join(words)}".replace(" ", "_")
    return Bad(name, lambda w: w.operate(op, argument, change, others or {}), named, error)


# --- how a value is made wrong ----------------------------------------------------------------------------------------


def unaligned(shape: tuple[int, ...]) -> Tensor:
    """float32 at an odd address."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(4 * count + 8), dtype=torch.float32, count=count, offset=1).view(shape)


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype)


def columns(x: Tensor) -> Tensor:
    """The same values with a last dimension that is not contiguous."""
    return torch.stack([x, x], dim=-1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    """Every row at the same address."""
    return x[:1].expand(x.shape)


def put(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


def swapped(x: Tensor) -> Tensor:
    """The first two values in the other order."""
    return torch.cat([x[:2].flip(0), x[2:]])


def longer(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]])


def value(v: object) -> Callable[[object], object]:
    return lambda _: v


# --- operations -------------------------------------------------------------------------------------------------------

OPERATIONS = [
    # dtype
    *(
        wrong(op, name, to(torch.bfloat16), HALF[1], HALF[0])
        for op, name in (
            ("gather", "x"),
            ("scatter_add_", "x"),
            ("gather_norm", "x"),
            ("gather_norm_backward", "dy"),
            ("attention_forward", "q"),
            ("attention_backward", "q"),
            ("block_scores", "q"),
            ("predict", "x"),
            ("linear_cross_entropy", "hidden"),
            ("tile_scores", "q"),
            ("rotary", "x"),
            ("swiglu", "gate"),
            ("swiglu_backward", "dout"),
        )
    ),
    wrong("gather", "x", to(torch.float64), ("expected float32, got float64 [",)),
    wrong("gather", "rows", to(torch.int16), ("expected int32 [", "got int16 [")),
    wrong("gather_norm", "weight", to(torch.float64), ("expected float32 [", "as x", "got float64 [")),
    wrong("swiglu_backward", "up", to(torch.float64), ("expected float32 [", "got float64 [")),
    wrong("gather", "x", to(torch.int32), ("float32", "got int32")),
    wrong("gather", "rows", to(torch.int64), ("int32", "got int64")),
    wrong("gather", "weights", to(torch.float16), ("float32", "got float16")),
    wrong("scatter_add_", "y", to(torch.float16), ("float32", "got float16")),
    wrong("gather_norm", "weight", to(torch.float16), ("float32", "got float16")),
    wrong("gather_norm_backward", "s", to(torch.bfloat16), ("float32", "got bfloat16")),
    wrong("attention_forward", "k", to(torch.float16), ("float32", "got float16")),
    wrong("attention_forward", "cu_seqlens", to(torch.int64), ("int32", "got int64")),
    wrong("attention_backward", "lse", to(torch.float16), ("float32", "got float16")),
    wrong("select_blocks", "scores", to(torch.float16), ("float32", "got float16")),
    wrong("select_blocks", "block_offsets", to(torch.int64), ("offsets", "int32", "got int64")),
    wrong("block_scores", "k", to(torch.float16), ("float32", "got float16")),
    wrong("predict", "wk2", to(torch.float16), ("float32", "got float16")),
    wrong("linear_cross_entropy", "weight", to(torch.float16), ("float32", "got float16")),
    wrong("linear_cross_entropy", "targets", to(torch.int32), ("int64", "got int32")),
    # shape
    wrong("gather", "x", lambda x: x[0], ("expected shape [T, d]", "got [16]")),
    wrong("gather", "slots", longer, (str(M), str(M + 1))),
    wrong("scatter_add_", "y", longer, (str(M), str(M + 1))),
    wrong("scatter_add_", "base", lambda x: x[:, :8], ("16", "8]")),
    wrong("gather_norm", "residual", longer, (str(M), str(M + 1))),
    wrong("gather_norm", "weight", longer, ("16", "17")),
    wrong("gather_norm_backward", "s", longer, (str(M), str(M + 1))),
    wrong("gather_norm_backward_", "dx", lambda x: x[:, :8], ("16", "8]")),
    wrong("attention_forward", "q", lambda x: x[0], ("expected shape [R, Hq, D]", "got [4, 16]")),
    wrong("attention_forward", "k", lambda x: x[:, :, :8], ("16", "8]")),
    wrong("attention_forward", "v", longer, (str(T), str(T + 1))),
    wrong("attention_forward", "k", lambda x: x[:, [0, 1, 0]], ("divides", "4", "3"), others={"v": ("k",)}),
    wrong("attention_backward", "lse", lambda x: x[:, :-1].contiguous(), (str(M), str(M - 1))),
    wrong("attention_backward", "row_slots", longer, (str(M), str(M + 1))),
    wrong("attention_backward", "row_slots", value(None), ("no tensor",)),
    wrong("select_blocks", "scores", longer, (str(NB), str(NB + 1))),
    wrong("block_scores", "k", longer, (str(T), str(T + 1))),
    wrong("predict", "wq2", lambda x: x[:, :4].contiguous(), ("8", "4]")),
    wrong("predict", "wk3", longer, ("8", "9")),
    wrong("linear_cross_entropy", "weight", lambda x: x[:, :8].contiguous(), ("16", "8]")),
    wrong("linear_cross_entropy", "targets", longer, ("20", "21")),
    wrong("linear_cross_entropy", "lora_b", value(None), ("no tensor",)),
    wrong("linear_cross_entropy", "bias", value(None), ("gradient",)),
    # strides and alignment
    wrong("gather", "x", columns, ("last dimension contiguous", "strides")),
    wrong("scatter_add_", "x", columns, ("last dimension contiguous",)),
    wrong("scatter_add_", "x", expanded, ("overlapping",)),
    wrong("gather_norm_backward", "dy", columns, ("last dimension contiguous",)),
    wrong("attention_forward", "v", columns, ("last dimension contiguous",)),
    wrong("attention_backward", "dout", columns, ("last dimension contiguous",)),
    wrong("block_scores", "q", columns, ("last dimension contiguous",)),
    wrong("predict", "x", columns, ("last dimension contiguous",)),
    wrong("linear_cross_entropy", "hidden", columns, ("last dimension contiguous",)),
    wrong("gather", "x", lambda x: unaligned(x.shape), ("aligned to 4 bytes",)),
    wrong("attention_forward", "q", lambda x: unaligned(x.shape), ("aligned to 4 bytes",)),
    wrong("linear_cross_entropy", "weight", lambda x: unaligned(x.shape), ("aligned to 4 bytes",)),
    # index lists
    wrong("gather", "rows", put(2, T), (f"[0, {T})", str(T), "position 2")),
    wrong("gather", "rows", put(0, -2), ("got -2",)),
    wrong("gather", "slots", put(1, NB), (str(NB), "position 1")),
    wrong("scatter_add_", "rows", lambda r: put(1, r[0].item())(r), ("no row twice",)),
    wrong("gather_norm_backward_", "rows", lambda r: put(1, r[0].item())(r), ("no row twice",)),
    wrong("attention_forward", "rows", put(3, T), (str(T), "position 3")),
    *(wrong(op, "rows", swapped, ("ascending", "position 1")) for op in ("attention_forward", "attention_backward")),
    wrong("attention_forward", "cu_seqlens", put(0, 1), ("begin with 0", "got 1")),
    wrong("attention_forward", "cu_seqlens", put(-1, M + 1), (str(M), str(M + 1))),
    wrong("attention_forward", "max_seqlen", value(1), ("longest document", "got 1")),
    wrong("attention_backward", "row_slots", put(0, NB + 5), (str(NB + 5), "position 0")),
    wrong("select_blocks", "block_offsets", lambda o: put(2, o[1].item())(o), ("offsets", "empty", "got 0")),
    wrong("select_blocks", "documents", lambda d: put(1, 0)(d), ("document 0 is empty",)),
    wrong("select_blocks", "documents", put(-1, NB + 1), (str(NB + 1),)),
    wrong("block_scores", "block_size", value(8), ("at most block_size = 8", "got 16")),
    wrong("predict", "block_offsets", put(-1, T - 1), ("offsets", str(T), str(T - 1))),
    wrong("linear_cross_entropy", "targets", put(4, 30), ("[0, 30)", "got 30", "position 4")),
    wrong("linear_cross_entropy", "targets", put(4, -1), ("got -1", "position 4")),
    # ranges and names
    wrong("gather_norm", "norm", value("batch"), ("rms, layer", "'batch'")),
    wrong("gather_norm", "eps", value(-1.0), ("at least 0", "got -1")),
    wrong("gather_norm", "eps", value(NAN), ("finite",)),
    wrong("gather_norm", "weight", value(None), ("bias",)),
    wrong("attention_forward", "scale", value(INF), ("finite",)),
    wrong("block_scores", "scale", value(NAN), ("finite",)),
    wrong("block_scores", "block_size", value(0), ("at least 1", "got 0")),
    wrong("predict", "pool", value("sum"), ("mean, max", "'sum'")),
    wrong("select_blocks", "mode", value("best"), ("threshold, budget, sample, poisson", "'best'")),
    wrong("select_blocks", "seed", value(-1), ("[0, 2**64)", "got -1")),
    wrong("select_blocks", "seed", value(2**64), ("got 18446744073709551616",)),
    wrong("select_blocks", "keep", value(0.0), ("(0, 1]", "got 0")),
    wrong("select_blocks", "keep", value(1.5), ("(0, 1]", "got 1.5")),
    wrong("select_blocks", "always_first", value(-1), ("at least 0", "got -1")),
    wrong("select_blocks", "threshold", value(NAN), ("a number",), others={"mode": "threshold"}),
    wrong("linear_cross_entropy", "reduction", value("none"), ("mean, sum", "'none'")),
    wrong("linear_cross_entropy", "softcap", value(-2.0), ("got -2",)),
    wrong("linear_cross_entropy", "segment_rows", value(-1), ("at least 0", "got -1")),
    # rotary positions and SwiGLU
    wrong("rotary", "x", lambda x: x[0], ("expected shape [M, H, D]", "got float32 [4, 16]")),
    wrong("rotary", "x", lambda x: x[..., :15], ("even", "got 15")),
    wrong("rotary", "x", longer, (f"M={M + 1}", f"got int32 [{M}]", "rows")),
    wrong("rotary", "x", columns, ("last dimension contiguous",)),
    wrong("rotary", "cos", to(torch.bfloat16), ("float32", "got bfloat16")),
    wrong("rotary", "cos", lambda c: c[:, :8], ("D=16", f"got float32 [{T}, 8]")),
    wrong("rotary", "sin", lambda s: s[:-1], (f"T={T}", f"got float32 [{T - 1}, 16]")),
    wrong("rotary", "sin", to(torch.float16), ("float32", "got float16")),
    wrong("rotary", "sin", columns, ("last dimension contiguous",)),
    wrong("rotary", "cos", lambda c: c, (f"T=M={M}", f"got float32 [{T}, 16]"), others={"rows": None}),
    wrong("rotary", "rows", to(torch.int64), ("int32", "got int64")),
    wrong("rotary", "rows", put(3, T), (f"[0, {T}) or -1", f"got {T} at position 3")),
    wrong("rotary", "rows", put(0, -2), ("got -2 at position 0",)),
    wrong("swiglu", "gate", lambda x: x[0], ("expected shape [M, f]", "got float32 [24]")),
    wrong("swiglu", "up", longer, (f"M={M}", f"got float32 [{M + 1}, 24]")),
    wrong("swiglu", "up", to(torch.float16), ("float32", "got float16")),
    wrong("swiglu", "up", columns, ("last dimension contiguous",)),
    wrong("swiglu_backward", "gate", lambda x: x[:, :8], ("f=24", f"got float32 [{M}, 8]")),
    wrong("swiglu_backward", "gate", to(torch.bfloat16), ("float32", "got bfloat16")),
    wrong("swiglu_backward", "up", longer, (f"M={M}", f"got float32 [{M + 1}, 24]")),
    # tile lists
    wrong("attention_forward:lists", "tile_offsets", value(None), ("tiles",)),
    wrong("attention_forward:lists", "tile_offsets", lambda o: o[:-1], ("S + 1",)),
    wrong("attention_forward:lists", "tile_offsets", lambda o: o + 1, ("begin with 0", "got 1")),
    wrong("attention_forward:lists", "tile_offsets", put(1, 9), ("ascending", "9")),
    wrong("attention_forward:lists", "tile_offsets", put(-1, 99), ("ascending", "got 99")),
    wrong("attention_forward:lists", "tiles", put(0, 9), ("slot", "got 9")),
    wrong("attention_forward:lists", "tiles", to(torch.float32), ("int32", "got float32")),
    # keys with separate rows
    *(
        bad
        for op in ("attention_forward:keys", "attention_backward:keys")
        for bad in (
            wrong(op, "cu_seqlens_k", to(torch.int64), ("int32", "got int64")),
            wrong(op, "cu_seqlens_k", longer, (f"D + 1={DOCUMENTS + 1}", f"[{DOCUMENTS + 2}]")),
            wrong(op, "cu_seqlens_k", put(0, 1), ("begin with 0", "got 1")),
            wrong(op, "cu_seqlens_k", put(2, -5), ("ascending", "got -5")),
            wrong(op, "cu_seqlens_k", put(-1, MK + 1), (f"at most {MK} rows", f"got {MK + 1}")),
            wrong(op, "rows_k", to(torch.int64), ("int32", "got int64")),
            wrong(op, "rows_k", put(3, TK), (str(TK), "position 3")),
            wrong(op, "rows_k", lambda r: put(1, r[0].item())(r), ("no row twice",)),
            wrong(op, "rows_k", swapped, ("ascending", "position 1")),
            wrong(op, "max_seqlen_k", value(1), ("longest document", "got 1")),
            wrong(op, "max_seqlen_k", value(None), ("longest document", "got None")),
            wrong(op, "max_seqlen_k", value(-1), ("at least 0", "got -1")),
            wrong(op, "v", longer, (f"Rk={TK}", str(TK + 1))),
        )
    ),
    wrong("attention_forward", "rows_k", value(P.tensor("rows", "cpu")), ("cu_seqlens_k",)),
    wrong("attention_forward", "max_seqlen_k", value(7), ("0 without cu_seqlens_k", "got 7")),
    wrong("attention_backward", "row_slots_k", value(P.tensor("row_slots", "cpu")), ("cu_seqlens_k",)),
    wrong("attention_backward:keys", "row_slots_k", value(None), ("no tensor",)),
    wrong("attention_backward:keys", "row_slots_k", longer, (f"capacity_k={MK}", str(MK + 1))),
    wrong("attention_backward:keys", "row_slots_k", put(0, 999), ("got 999", "position 0")),
    wrong("attention_backward:keys", "key_weights", value(None), ("row_slots_k",)),
    wrong(
        "attention_forward:lists",
        "tile_offsets",
        lambda o: o,
        ("cu_seqlens_k", "leave out"),
        NotImplementedError,
        {"cu_seqlens_k": torch.tensor([0, 192, 512], dtype=torch.int32), "max_seqlen_k": 320},
    ),
    # window, soft-cap, sinks
    *(
        bad
        for op in ("attention_forward:window", "attention_backward:window")
        for bad in (
            wrong(op, "window", value(-1), ("at least 0", "got -1")),
            wrong(op, "window", value(0), ("at least 1 with places", "got 0")),
            wrong(op, "softcap", value(-0.5), ("at least 0", "got -0.5")),
            wrong(op, "softcap", value(NAN), ("finite",)),
            wrong(op, "sinks", to(torch.float64), ("float32", "got float64")),
            wrong(op, "sinks", longer, ("Hq=4", "got float32 [5]")),
            wrong(op, "places", value(None), ("places_k", "no tensor")),
            wrong(op, "places", value(None), ("window and cu_seqlens_k",), others={"places_k": None}),
            wrong(op, "places", longer, (f"capacity={MQ}", f"[{MQ + 1}]")),
            wrong(op, "places", swapped, ("ascending", "position 1")),
            wrong(op, "places_k", value(None), (f"capacity_k={MK}", "no tensor")),
            wrong(op, "places_k", to(torch.int64), ("int32", "got int64")),
            wrong(op, "places_k", put(0, -1), ("at least 0", "got -1", "position 0")),
        )
    ),
    wrong("attention_forward", "places_k", value(P.tensor("rows", "cpu")), ("expected places",)),
    wrong(
        "attention_forward",
        "places_k",
        value(P.tensor("rows", "cpu")),
        ("cu_seqlens_k",),
        others={"window": 3, "places": P.tensor("rows", "cpu")},
    ),
    wrong(
        "attention_forward:lists",
        "tile_offsets",
        lambda o: o,
        ("window", "leave out"),
        NotImplementedError,
        {"window": 3},
    ),
    wrong("attention_backward:window", "sinks", value(None), ("want_dsinks",)),
    wrong("block_scores", "window", value(-1), ("at least 0", "got -1")),
    wrong("block_scores", "softcap", value(INF), ("finite",)),
    # the choice of tiles: documents of 300, 0 and 500 rows, so 9 slots and 4 tiles at most
    wrong("tile_scores", "k", to(torch.float16), ("float32", "got float16")),
    wrong("tile_scores", "k", lambda x: x[:, [0, 1, 0]], ("divides", "4", "3")),
    wrong("tile_scores", "k", lambda x: x[:-1], ("R=800", "got float32 [799, 2, 16]")),
    wrong("tile_scores", "q", columns, ("last dimension contiguous",)),
    wrong("tile_scores", "cu_seqlens", to(torch.int64), ("int32", "got int64")),
    wrong("tile_scores", "cu_seqlens", put(0, 1), ("begin with 0", "got 1")),
    wrong("tile_scores", "cu_seqlens", put(-1, 801), ("at most 800", "got 801"), others={"max_seqlen": 501}),
    wrong("tile_scores", "rows", put(3, 800), ("800", "position 3")),
    wrong("tile_scores", "rows", swapped, ("ascending", "position 1")),
    wrong("tile_scores", "max_seqlen", value(499), ("longest document, 500 rows", "got 499")),
    wrong("tile_scores", "max_seqlen", value(513), ("scores", "W >= 5", "got float32 [4, 4]")),
    wrong("tile_scores", "scale", value(-0.5), ("at least 0", "got -0.5")),
    wrong("tile_scores", "scale", value(INF), ("finite",)),
    wrong("tile_scores", "probes", value(0), ("1 to LEMO_TILE_ROWS", "got 0")),
    wrong("tile_scores", "probes", value(129), ("1 to LEMO_TILE_ROWS", "got 129")),
    wrong("tile_scores", "first_slot", value(-1), ("at least 0", "got -1")),
    wrong("tile_scores", "first_slot", value(6), ("first_slot + C <= S", "got 6 + 4 with S = 9")),
    wrong("tile_scores", "first_slot", value(2**63 - 1), ("first_slot + C <= S",)),
    wrong("tile_scores", "slots", value(10), ("first_slot", "got 2 + 10 with S = 9")),
    wrong("tile_scores", "width", value(3), ("scores", "W >= 4", "got float32 [4, 3]")),
    wrong("select_tiles_", "scores", to(torch.float16), ("float32", "got float16")),
    wrong("select_tiles_", "scores", lambda x: x[0], ("expected shape [C, W]", "got [40]")),
    wrong(
        "select_tiles_",
        "scores",
        lambda x: x[:, :3],
        ("W >= 4", "document 2", "got W = 3"),
        others={"masses": None},
    ),
    wrong("select_tiles_", "masses", to(torch.float16), ("float32", "got float16")),
    wrong("select_tiles_", "masses", lambda x: x[:5], ("masses", "C=6", "got float32 [5, 40]")),
    wrong("select_tiles_", "masses", lambda x: x[:, :39], ("masses", "W=40", "got float32 [6, 39]")),
    wrong("select_tiles_", "chosen", to(torch.int64), ("int32", "got int64")),
    wrong("select_tiles_", "chosen", lambda x: x[:, :1], ("B >= 2", "W = 40", "got int32 [9, 1]")),
    wrong("select_tiles_", "chosen", expanded, ("overlapping",)),
    wrong("select_tiles_", "chosen", lambda x: x[:7], ("S >= 8", "got S = 7"), others={"first_slot": 0}),
    wrong("select_tiles_", "chosen", lambda x: x[:2], ("S >= D = 3", "got int32 [2, 2]")),
    wrong("select_tiles_", "cu_seqlens", put(1, 900), ("ascending", "got 300 after 900")),
    wrong("select_tiles_", "cu_seqlens", lambda x: x[:1], ("at least one document", "got 1")),
    wrong("select_tiles_", "first_slot", value(-1), ("at least 0", "got -1")),
    wrong("select_tiles_", "first_slot", value(4), ("got 4 + 6 with S = 9",)),
    wrong("select_tiles_", "keys", value(0), ("at least 1", "got 0")),
    wrong("select_tiles_", "density", value(0.0), ("(0, 1]", "got 0")),
    wrong("select_tiles_", "density", value(1.5), ("(0, 1]", "got 1.5")),
    wrong("select_tiles_", "density", value(NAN), ("(0, 1]", "got nan")),
    wrong("select_tiles_", "mass", value(0.0), ("above 0", "got 0")),
    wrong("select_tiles_", "mass", value(NAN), ("above 0", "got nan")),
    wrong("select_tiles_", "first", value(-1), ("at least 0", "got -1")),
    wrong("select_tiles_", "local", value(-2), ("at least 0", "got -2")),
    wrong("list_tiles", "chosen", to(torch.int64), ("int32", "got int64")),
    wrong("list_tiles", "chosen", lambda x: x[0], ("expected shape [S, B]", "got [2]")),
    wrong("list_tiles", "chosen", lambda x: x[:, :0], ("32 B >= 1", "got 32 B = 0")),
    wrong("list_tiles", "chosen", lambda x: x[:7], ("S >= 8", "got S = 7")),
    wrong("list_tiles", "chosen", lambda x: x + 4, ("slot 0", "below 0", "got bit 2")),
    wrong("list_tiles", "cu_seqlens", put(-1, 200), ("ascending", "got 200 after 300")),
    wrong("list_tiles", "capacity", value(8), ("tiles", "L >= 9", "got L = 8")),
    # numbers
    *(
        wrong("select_blocks", "scores", put(3, number), ("3", "finite"), FloatingPointError, {"mode": mode})
        for number in (NAN, INF, -INF)
        for mode in ("threshold", "budget")
    ),
    *(
        wrong("select_blocks", "scores", put(3, number), ("3", words), FloatingPointError, {"mode": mode})
        for mode in ("sample", "poisson")
        for number, words in ((NAN, "nan"), (0.0, "(0, 1]"), (1.25, "(0, 1]"), (-0.5, "(0, 1]"))
    ),
    wrong("select_blocks", "threshold", value(9.0), ("9",), FloatingPointError, {"mode": "threshold"}),
]


def another_device(w: World) -> None:
    """A C call with a tensor of another device: none of lemo.ops comes this far."""
    x, out = torch.ones(T, 16), torch.full((M, 16), 7.0)
    w.watch("out", out)
    rows = P.tensor("rows", "cpu").to("meta")
    _native.call("gather", x.device, {"x": x, "rows": rows, "weights": None, "slots": None, "out": out})


def out_without_lse(w: World) -> None:
    t = Attention("documents", 4, 2, 16).inputs("cpu", torch.float32)
    ops.attention(t["q"], t["k"], t["v"], t["cu_seqlens"], T, out=t["q"])


def one_infinite_score(w: World) -> None:
    scores = torch.zeros(7)
    scores[4] = NAN
    select(scores, Blocks.from_lengths([100], 16), mode="budget", keep=0.5)


def fault(code: int) -> Callable[[World], None]:
    """A fault that a kernel left on the device."""

    def act(w: World) -> None:
        kept = Kept.everything(Blocks.from_lengths([100], 16))
        kept.raise_on_fault()
        info = torch.tensor([0, 0, 0, code], dtype=torch.int32)
        Kept(**(dict(vars(kept)) | {"info": info})).raise_on_fault()

    return act


LAYOUTS = [
    Bad("no document", lambda w: Blocks.from_lengths((), 16), ("at least one document, got none",)),
    Bad("empty document", lambda w: Blocks.from_lengths((4, 0, 3), 16), ("got 0 (empty document) at index 1",)),
    Bad("negative length", lambda w: Blocks.from_lengths((4, -2), 16), ("got -2",)),
    Bad("empty block", lambda w: Blocks.from_lengths((4,), 0), ("block_size: expected at least 1, got 0",)),
    Bad("too many tokens", lambda w: Blocks.from_lengths((2**31,), 64), ("fewer than",)),
    Bad("another device", another_device, ("rows: expected a tensor on cpu, got one on meta",)),
    Bad(
        "unknown device",
        lambda w: _native.call("gather", torch.device("meta"), {}),
        ("device: expected cpu or cuda, got meta",),
    ),
    Bad("out without lse", out_without_lse, ("lse: expected out and lse together",)),
    Bad("score of a block", one_infinite_score, ("4",), FloatingPointError),
    Bad(
        "unreachable threshold",
        lambda w: select(
            torch.zeros(7), Blocks.from_lengths([100], 16), mode="threshold", threshold=1.0, always_first=0
        ),
        ("threshold",),
        FloatingPointError,
    ),
    Bad("fault of a block", fault(5), ("block 4",), FloatingPointError),
    Bad("fault of the threshold", fault(-1), ("no block reaches",), FloatingPointError),
]

# --- the engine -------------------------------------------------------------------------------------------------------

SETTINGS = [
    (lambda w: lemo.Phase("thin"), ("Phase.mode", "skip, backward, sparse, dense")),
    (lambda w: lemo.Phase(keep=1.5), ("Phase.keep", "1.5")),
    (lambda w: lemo.Phase("dense", keep=0.5), ("Phase.keep", "dense")),
    (lambda w: lemo.Phase(share=0), ("Phase.share",)),
    (lambda w: lemo.Phase(policy="best"), ("Phase.policy", "update_norm")),
    (lambda w: lemo.Phase(weighted=True), ("Phase.weighted", "backward")),
    (lambda w: lemo.Phase("backward", mlp_keep=0.5), ("Phase.mlp_keep", "skip")),
    (lambda w: lemo.Phase(select="threshold", policy="random"), ("threshold", "predictors")),
    (lambda w: lemo.Phase("backward", weighted="no"), ("Phase.weighted", "True or False", "'no'")),
    (lambda w: lemo.Phase(policy_options=["shared"]), ("Phase.policy_options", "dictionary")),
    (lambda w: w.settings(block_size=0), ("block_size", "0")),
    (lambda w: w.settings(deterministic="no"), ("LemoConfig.deterministic", "'no'")),
    (lambda w: w.settings(keep_labelled=1), ("LemoConfig.keep_labelled", "1")),
    (lambda w: w.settings(calibration=3), ("LemoConfig.calibration", "3")),
    (lambda w: w.settings(layers=3), ("LemoConfig.layers", "list", "3")),
    (lambda w: w.settings(layers="12"), ("LemoConfig.layers", "'12'")),
    (lambda w: w.settings(layers=[1.5]), ("LemoConfig.layers", "1.5")),
    (lambda w: w.settings(layers=[True]), ("LemoConfig.layers", "True")),
    (lambda w: w.settings(layers=[]), ("LemoConfig.layers", "dense")),
    (lambda w: w.settings(recompute="some"), ("recompute", "attention")),
    (lambda w: w.settings(memory_budget="some"), ("memory_budget", "40GiB", "'some'")),
    (lambda w: w.settings(offload="some"), ("offload", "'some'")),
    (lambda w: w.settings(phases=[]), ("phases", "empty")),
    (lambda w: w.settings(phases=["skip"]), ("phases", "str")),
    (lambda w: w.settings(phases=[lemo.Phase(policy="predictors")]), ("calibration", "lemo calibrate")),
    (lambda w: w.settings(phases=[lemo.Phase(select="threshold")]), ("calibration",)),
    (lambda w: lemo.LemoConfig.from_dict({"blocksize": 3}), ("blocksize", "block_size")),
    (lambda w: lemo.apply(w.model(), {"keep": 1}), ("LemoConfig", "dict")),
    (lambda w: lemo.apply(w.model(), w.settings(layers=[7])), ("layers", "7")),
    (lambda w: make_policy("random", {"extra": 1}), ("random", "extra")),
    (lambda w: make_policy("sampled", {"floor": 0.0}), ("floor",)),
    (lambda w: make_policy("random", {"shared": "no"}), ("random", "shared", "'no'")),
    (lambda w: make_policy("exact", {"normalize": 1}), ("exact", "normalize", "1")),
    (lambda w: make_policy("update_norm", {"dense_layers": -1}), ("update_norm", "dense_layers", "-1")),
]  # fmt: skip

MODELS = [
    ("family", ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "OPTForCausalLM", "Qwen2ForCausalLM")),
    ("head", ("LlamaModel", "LlamaForCausalLM")),
    ("post_norm", ("do_layer_norm_before", "350m")),
    ("projected", ("word_embed_proj_dim",)),
    ("layerdrop", ("LayerDrop", "0")),
    ("attention_dropout", ("attention_dropout=0.1", "0")),
]

BATCHES = [
    ({"attention_mask": torch.ones(3, 1, 37, 37)}, ("attention_mask", "[3, 37]")),
    ({"attention_mask": torch.tensor([[1] * 37, [0] * 37, [1] * 37])}, ("row 1", "empty")),
    ({"attention_mask": torch.zeros(3, 37)}, ("row 0", "empty")),
    ({"cu_seq_lens_q": torch.tensor([0, 5, 5, 111])}, ("at least one token",)),
    ({"seq_lens": [10, 20]}, ("111", "30")),
    ({"position_ids": torch.arange(5)[None]}, ("position_ids", "[3, 37]")),
    ({"labels": torch.ones(3, 5, dtype=torch.long)}, ("labels", "[3, 37]")),
    ({"output_hidden_states": True}, ("output_hidden_states", "eval")),
    ({"inputs_embeds": torch.ones(3, 37, 32)}, ("exactly one",)),
]

ENGINE = [
    *(Bad(f"settings-{'-'.join(words)}", act, words) for act, words in SETTINGS),
    *(Bad(f"model-{kind}", lambda w, kind=kind: w.apply(w.bad_model(kind)), words) for kind, words in MODELS),
    *(Bad(f"batch-{'-'.join(words)}", lambda w, c=change: w.forward(**c), words) for change, words in BATCHES),
    Bad("another transformers", lambda w: w.apply_under("4.30.1"), ("transformers from 5", "4.30.1")),
    Bad("applied twice", lambda w: w.apply(w.applied()), ("already applied",)),
    Bad("removed without", lambda w: lemo.remove(w.model()), ("not applied",)),
    Bad("bfloat16 on the CPU", lambda w: w.forward(dtype=torch.bfloat16), ("float32 on the CPU", "bfloat16")),
    Bad("dropout in backward mode", lambda w: w.forward("opt", mode="backward", dropout=0.1), ("dropout",)),
]

# --- calibrations -----------------------------------------------------------------------------------------------------

DAMAGE = [
    ("no config", lambda f: (f / "lemo_config.json").unlink(), "lemo_config.json is missing"),
    ("no weights", lambda f: (f / "predictors.safetensors").unlink(), "predictors.safetensors is missing"),
    ("truncated", lambda f: truncate(f, 100), "truncated"),
    ("empty", lambda f: truncate(f, 0), "truncated"),
    ("flipped", flip, "digest"),
    ("no JSON", lambda f: (f / "lemo_config.json").write_text("{"), "cannot be read"),
    ("a list", lambda f: (f / "lemo_config.json").write_text("[]"), "version None"),
    ("other version", lambda f: change_config(f, format_version=99), "version 99, this lemo reads versions 1 to 2"),
    ("no block size", lambda f: change_config(f, block_size=None), "block_size is missing"),
    ("strange pool", lambda f: change_config(f, pool="sum"), "'sum'"),
    ("layers differ", lambda f: change_config(f, keep=[0.5]), "number of layers"),
    ("other sizes", lambda f: change_config(f, sizes=[[[1, 1]] * 6] * 2, digest=None), "layers.0.wq1: expected shape"),
    ("no shapes", lambda f: change_config(f, sizes=[[1] * 6] * 2), "something other than numbers"),
    ("other thresholds", lambda f: change_config(f, thresholds=[0.1, 0.2]), "its own digest differs"),
]
CALIBRATIONS = [
    *(
        Bad(f"calibration-{name}", lambda w, d=damage: w.load_calibration(d), (words,), CalibrationError)
        for name, damage, words in DAMAGE
    ),
    Bad("calibration-none", lambda w: w.load_calibration(None), ("does not exist", "lemo calibrate"), CalibrationError),
    Bad(
        "calibration-other model",
        lambda w: w.load_calibration(lambda f: None, another_model=True),
        ("another model",),
        CalibrationError,
    ),
    Bad("calibration-overwritten", lambda w: w.save_calibration(), ("exists already",), CalibrationError),
    Bad(
        "calibration over a thesis",
        lambda w: w.save_calibration("thesis", overwrite=True),
        ("not a calibration",),
        CalibrationError,
    ),
    Bad(
        "calibration on a full disk",
        lambda w: w.save_calibration(overwrite=True, full=True),
        ("no space left", "nothing was changed"),
        CalibrationError,
    ),
]

TABLE = [
    *OPERATIONS,
    *LAYOUTS,
    *ENGINE,
    *CALIBRATIONS,
    *(
        Bad(f"command-{name}", lambda w, make=make: w.command(make(w)), words, CommandError)
        for name, make, words in COMMANDS
    ),
]
