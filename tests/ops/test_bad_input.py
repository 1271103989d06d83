"""Wrong arguments of every operation: the error names the argument, what was expected and what was given, and no output
was touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import PACKINGS, Attention, Draw
from lemo import _native, ops
from lemo.layout import Blocks, Kept, select
from torch import Tensor

INT = torch.int32
P = PACKINGS["documents"]
T, M, NB = P.tokens, len(P.layout["rows"]), sum(len(document) for document in P.documents)


def unaligned(shape: tuple[int, ...]) -> Tensor:
    """float32 at an odd address."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(4 * count + 8), dtype=torch.float32, count=count, offset=1).view(shape)


def layout() -> dict[str, Any]:
    b = P.blocks("cpu")
    return {"block_offsets": b.offsets, "documents": b.documents, "block_size": b.block_size}


def base(op: str) -> dict[str, Any]:
    """Valid keyword arguments of an operation."""
    draw, rows = Draw("cpu", torch.float32), P.tensor("rows", "cpu")
    if op == "gather":
        return {"x": draw.normal(T, 16), "rows": rows, "weights": torch.ones(NB), "slots": P.tensor("row_slots", "cpu")}
    if op == "scatter_add_":
        return {"x": draw.normal(T, 16), "rows": rows, "y": draw.normal(M, 16), "base": draw.normal(M, 16)}
    if op == "gather_norm":
        names = {"x": draw.normal(T, 16), "rows": rows, "residual": draw.normal(M, 16)}
        return names | {"weight": draw.normal(16), "bias": draw.normal(16), "norm": "layer", "eps": 1e-5}
    if op == "gather_norm_backward":
        names = {"dy": draw.normal(M, 16), "s": draw.normal(M, 16), "weight": draw.normal(16)}
        return names | {"ds_extra": draw.normal(M, 16), "norm": "rms", "eps": 1e-5}
    if op == "gather_norm_backward_":
        return {"dx": draw.normal(T, 16), "rows": rows} | base("gather_norm_backward")
    if op in ("attention_forward", "attention_backward"):
        case = Attention("documents", 4, 2, 16, "rows", given=True)
        t = case.inputs("cpu", torch.float32)
        names = ["q", "k", "v", "cu_seqlens", "rows"]
        names += ["dout", "out", "lse", "key_weights", "row_slots"] if op == "attention_backward" else []
        return {n: t[n] for n in names} | {"max_seqlen": case.max_seqlen, "scale": 0.25}
    if op == "select_blocks":
        rule = {"mode": "budget", "keep": 0.5, "threshold": 0.0, "always_first": 0, "always_last": 0, "seed": 0}
        return {"scores": draw.uniform(NB, low=0.1, high=0.9), "num_tokens": T} | layout() | rule
    if op == "block_scores":
        return {"q": draw.normal(T, 4, 16), "k": draw.normal(T, 2, 16), "scale": 0.25, "want_map": True} | layout()
    if op == "predict":
        shapes = {"wq1": (8, 16), "wq2": (8, 8), "wq3": (8, 8), "wk1": (16, 16), "wk2": (8, 16), "wk3": (8, 8)}
        return {"x": draw.normal(T, 16)} | {n: draw.normal(*s) for n, s in shapes.items()} | layout()
    assert op == "linear_cross_entropy"
    names = {"hidden": draw.normal(20, 16), "weight": draw.normal(30, 16), "bias": draw.normal(30)}
    names |= {"lora_a": draw.normal(4, 16), "lora_b": draw.normal(30, 4), "lora_scale": 0.5}
    wants = dict.fromkeys(("want_dhidden", "want_dweight", "want_dbias", "want_dlora"), True)
    return names | {"targets": draw.integers(30, 20)} | wants


@dataclass(frozen=True)
class Bad:
    op: str
    argument: str
    make: Callable[[Any], Any]  # the valid value -> the wrong one
    words: tuple[str, ...]  # what the message has to say, besides the argument's name
    error: type[Exception] = ValueError
    others: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{'-'.join(self.words)}".replace(" ", "_")


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


def longer(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]])


def value(v: object) -> Callable[[object], object]:
    return lambda _: v


NAN, INF = float("nan"), float("inf")
HALF = (NotImplementedError, ("float32", "bfloat16"))
TABLE = [
    # dtype
    *(
        Bad(op, name, to(torch.bfloat16), HALF[1], HALF[0])
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
        )
    ),
    Bad("gather", "x", to(torch.float64), ("expected a dtype of float32", "got float64")),
    Bad("gather", "x", to(torch.int32), ("float32", "got int32")),
    Bad("gather", "rows", to(torch.int64), ("int32", "got int64")),
    Bad("gather", "weights", to(torch.float16), ("float32", "got float16")),
    Bad("scatter_add_", "y", to(torch.float16), ("float32", "got float16")),
    Bad("gather_norm", "weight", to(torch.float16), ("float32", "got float16")),
    Bad("gather_norm_backward", "s", to(torch.bfloat16), ("float32", "got bfloat16")),
    Bad("attention_forward", "k", to(torch.float16), ("float32", "got float16")),
    Bad("attention_forward", "cu_seqlens", to(torch.int64), ("int32", "got int64")),
    Bad("attention_backward", "lse", to(torch.float16), ("float32", "got float16")),
    Bad("select_blocks", "scores", to(torch.float16), ("float32", "got float16")),
    Bad("select_blocks", "block_offsets", to(torch.int64), ("offsets", "int32", "got int64")),
    Bad("block_scores", "k", to(torch.float16), ("float32", "got float16")),
    Bad("predict", "wk2", to(torch.float16), ("float32", "got float16")),
    Bad("linear_cross_entropy", "weight", to(torch.float16), ("float32", "got float16")),
    Bad("linear_cross_entropy", "targets", to(torch.int32), ("int64", "got int32")),
    # shape
    Bad("gather", "x", lambda x: x[0], ("expected shape [T, d]", "got [16]")),
    Bad("gather", "slots", longer, (str(M), str(M + 1))),
    Bad("scatter_add_", "y", longer, (str(M), str(M + 1))),
    Bad("scatter_add_", "base", lambda x: x[:, :8], ("16", "8]")),
    Bad("gather_norm", "residual", longer, (str(M), str(M + 1))),
    Bad("gather_norm", "weight", longer, ("16", "17")),
    Bad("gather_norm_backward", "s", longer, (str(M), str(M + 1))),
    Bad("gather_norm_backward_", "dx", lambda x: x[:, :8], ("16", "8]")),
    Bad("attention_forward", "q", lambda x: x[0], ("expected shape [R, Hq, D]", "got [4, 16]")),
    Bad("attention_forward", "k", lambda x: x[:, :, :8], ("16", "8]")),
    Bad("attention_forward", "v", longer, (str(T), str(T + 1))),
    Bad("attention_forward", "k", lambda x: x[:, [0, 1, 0]], ("divides", "4", "3"), others={"v": ("k",)}),
    Bad("attention_backward", "lse", lambda x: x[:, :-1].contiguous(), (str(M), str(M - 1))),
    Bad("attention_backward", "row_slots", longer, (str(M), str(M + 1))),
    Bad("attention_backward", "row_slots", value(None), ("no tensor",)),
    Bad("select_blocks", "scores", longer, (str(NB), str(NB + 1))),
    Bad("block_scores", "k", longer, (str(T), str(T + 1))),
    Bad("predict", "wq2", lambda x: x[:, :4].contiguous(), ("8", "4]")),
    Bad("predict", "wk3", longer, ("8", "9")),
    Bad("linear_cross_entropy", "weight", lambda x: x[:, :8].contiguous(), ("16", "8]")),
    Bad("linear_cross_entropy", "targets", longer, ("20", "21")),
    Bad("linear_cross_entropy", "lora_b", value(None), ("no tensor",)),
    Bad("linear_cross_entropy", "bias", value(None), ("gradient",)),
    # strides and alignment
    Bad("gather", "x", columns, ("last dimension contiguous", "strides")),
    Bad("scatter_add_", "x", columns, ("last dimension contiguous",)),
    Bad("scatter_add_", "x", expanded, ("overlapping",)),
    Bad("gather_norm_backward", "dy", columns, ("last dimension contiguous",)),
    Bad("attention_forward", "v", columns, ("last dimension contiguous",)),
    Bad("attention_backward", "dout", columns, ("last dimension contiguous",)),
    Bad("block_scores", "q", columns, ("last dimension contiguous",)),
    Bad("predict", "x", columns, ("last dimension contiguous",)),
    Bad("linear_cross_entropy", "hidden", columns, ("last dimension contiguous",)),
    Bad("gather", "x", lambda x: unaligned(x.shape), ("aligned to 4 bytes",)),
    Bad("attention_forward", "q", lambda x: unaligned(x.shape), ("aligned to 4 bytes",)),
    Bad("linear_cross_entropy", "weight", lambda x: unaligned(x.shape), ("aligned to 4 bytes",)),
    # index lists
    Bad("gather", "rows", put(2, T), (f"[0, {T})", str(T), "position 2")),
    Bad("gather", "rows", put(0, -2), ("got -2",)),
    Bad("gather", "slots", put(1, NB), (str(NB), "position 1")),
    Bad("scatter_add_", "rows", lambda r: put(1, r[0].item())(r), ("no row twice",)),
    Bad("gather_norm_backward_", "rows", lambda r: put(1, r[0].item())(r), ("no row twice",)),
    Bad("attention_forward", "rows", put(3, T), (str(T), "position 3")),
    Bad("attention_forward", "cu_seqlens", put(0, 1), ("begin with 0", "got 1")),
    Bad("attention_forward", "cu_seqlens", put(-1, M + 1), (str(M), str(M + 1))),
    Bad("attention_forward", "max_seqlen", value(1), ("longest document", "got 1")),
    Bad("attention_backward", "row_slots", put(0, NB + 5), (str(NB + 5), "position 0")),
    Bad("select_blocks", "block_offsets", lambda o: put(2, o[1].item())(o), ("offsets", "empty", "got 0")),
    Bad("select_blocks", "documents", lambda d: put(1, 0)(d), ("document 0 is empty",)),
    Bad("select_blocks", "documents", put(-1, NB + 1), (str(NB + 1),)),
    Bad("block_scores", "block_size", value(8), ("at most block_size = 8", "got 16")),
    Bad("predict", "block_offsets", put(-1, T - 1), ("offsets", str(T), str(T - 1))),
    Bad("linear_cross_entropy", "targets", put(4, 30), ("[0, 30)", "got 30", "position 4")),
    Bad("linear_cross_entropy", "targets", put(4, -1), ("got -1", "position 4")),
    # ranges and names
    Bad("gather_norm", "norm", value("batch"), ("rms, layer", "'batch'")),
    Bad("gather_norm", "eps", value(-1.0), ("at least 0", "got -1")),
    Bad("gather_norm", "eps", value(NAN), ("finite",)),
    Bad("gather_norm", "weight", value(None), ("bias",)),
    Bad("attention_forward", "scale", value(INF), ("finite",)),
    Bad("block_scores", "scale", value(NAN), ("finite",)),
    Bad("block_scores", "block_size", value(0), ("at least 1", "got 0")),
    Bad("predict", "pool", value("sum"), ("mean, max", "'sum'")),
    Bad("select_blocks", "mode", value("best"), ("threshold, budget, sample", "'best'")),
    Bad("select_blocks", "seed", value(-1), ("[0, 2**64)", "got -1")),
    Bad("select_blocks", "seed", value(2**64), ("got 18446744073709551616",)),
    Bad("select_blocks", "keep", value(0.0), ("(0, 1]", "got 0")),
    Bad("select_blocks", "keep", value(1.5), ("(0, 1]", "got 1.5")),
    Bad("select_blocks", "always_first", value(-1), ("at least 0", "got -1")),
    Bad("select_blocks", "threshold", value(NAN), ("a number",), others={"mode": "threshold"}),
    Bad("linear_cross_entropy", "reduction", value("none"), ("mean, sum", "'none'")),
    Bad("linear_cross_entropy", "softcap", value(-2.0), ("got -2",)),
    Bad("linear_cross_entropy", "segment_rows", value(-1), ("at least 0", "got -1")),
    # numbers
    *(
        Bad("select_blocks", "scores", put(3, bad), ("3", "finite"), FloatingPointError, {"mode": mode})
        for bad in (NAN, INF, -INF)
        for mode in ("threshold", "budget")
    ),
    *(
        Bad("select_blocks", "scores", put(3, bad), ("3", words), FloatingPointError, {"mode": "sample"})
        for bad, words in ((NAN, "nan"), (0.0, "(0, 1]"), (1.25, "(0, 1]"), (-0.5, "(0, 1]"))
    ),
    Bad("select_blocks", "threshold", value(9.0), ("9",), FloatingPointError, {"mode": "threshold"}),
]


@pytest.mark.parametrize("bad", TABLE, ids=str)
def test_error_names_the_argument_and_nothing_is_written(bad: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Tensor, bytes]] = []
    convert = _native._value

    def watch(name: str, given: Any, device: torch.device) -> object:
        if isinstance(given, Tensor):
            seen.append((name, given, content(given)))
        return convert(name, given, device)

    monkeypatch.setattr(_native, "_value", watch)
    arguments = base(bad.op)
    valid = {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    getattr(ops, bad.op)(**valid)  # the table's starting point is accepted
    assert seen
    seen.clear()

    arguments[bad.argument] = bad.make(arguments.get(bad.argument))
    for name, other in bad.others.items():
        arguments[name] = bad.make(arguments[name]) if isinstance(other, tuple) else other
    with pytest.raises(bad.error) as caught:
        getattr(ops, bad.op)(**arguments)
    message = str(caught.value)
    if bad.argument not in ("block_offsets", "norm") and not (bad.argument == "weight" and "bias" in bad.words):
        assert bad.argument in message
    for word in bad.words:
        assert word in message, message
    assert "expect" in message, message
    for name, tensor, before in seen:
        assert content(tensor) == before, f"{name} was written"


def content(t: Tensor) -> bytes:
    return bytes(t.detach().contiguous().view(-1).view(torch.uint8).tolist())


def test_a_tensor_of_another_device_is_named() -> None:
    t = base("gather")
    fields = {"x": t["x"], "rows": t["rows"].to("meta"), "weights": None, "slots": None, "out": torch.empty(M, 16)}
    with pytest.raises(ValueError, match="rows: expected a tensor on cpu, got one on meta"):
        _native.call("gather", t["x"].device, fields)
    assert fields["out"].isnan().all()


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got meta"):
        _native.call("gather", torch.device("meta"), {})


@pytest.mark.parametrize(
    ("lengths", "block", "words"),
    [
        ((), 16, "at least one document, got none"),
        ((4, 0, 3), 16, "got 0 .empty document. at index 1"),
        ((4, -2), 16, "got -2"),
        ((4,), 0, "block_size: expected at least 1, got 0"),
        ((2**31,), 64, "fewer than"),
    ],
)
def test_layouts(lengths, block, words) -> None:
    with pytest.raises(ValueError, match=words):
        Blocks.from_lengths(lengths, block)


def test_selection_faults_name_the_block() -> None:
    blocks = Blocks.from_lengths([100], 16)
    scores = torch.zeros(blocks.num_blocks)
    scores[4] = NAN
    with pytest.raises(FloatingPointError, match="4"):
        select(scores, blocks, mode="budget", keep=0.5)
    with pytest.raises(FloatingPointError, match="threshold"):
        select(torch.zeros(blocks.num_blocks), blocks, mode="threshold", threshold=1.0, always_first=0)


@pytest.mark.parametrize(("fault", "words"), [(5, "block 4"), (-1, "no block reaches")])
def test_a_fault_left_on_the_device_is_raised_when_asked(fault, words) -> None:
    kept = Kept.everything(Blocks.from_lengths([100], 16))
    kept.raise_on_fault()
    pending = dict(vars(kept)) | {"info": torch.tensor([0, 0, 0, fault], dtype=INT)}
    with pytest.raises(FloatingPointError, match=words):
        Kept(**pending).raise_on_fault()


def test_attention_wants_out_and_lse_together() -> None:
    t = Attention("documents", 4, 2, 16).inputs("cpu", torch.float32)
    with pytest.raises(ValueError, match="lse: expected out and lse together"):
        ops.attention(t["q"], t["k"], t["v"], t["cu_seqlens"], T, out=t["q"])
