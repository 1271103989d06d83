"""How much memory a step takes: the exact bytes a layer saves, and an estimate of the peak of every phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lemo.engine.config import LemoConfig, Phase
from lemo.engine.stack import MLP_ROWS

# Workspace of the segmented loss.
_LOSS_BYTES = 128 << 20


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    hidden d, heads Hq, kv_heads Hk, head_dim D, ffn f; gated: SwiGLU (two inner projections) or ReLU (one).
    element: bytes of an activation. lora: rank of the adapter by projection, of "q", "k", "v", "o", "gate", "up",
    "down" ("up" and "down" are OPT's fc1 and fc2); projections without an adapter are left out.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    element: int = 2
    lora: Mapping[str, int] = field(default_factory=dict)


_NAMES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o"}
_NAMES |= {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "fc1": "up", "fc2": "down"}


def layer_shape(config: Any, *, element: int = 2, lora_rank: int = 8, lora_targets: Sequence[str] = ()) -> LayerShape:
    """LayerShape of a transformers Llama or OPT configuration; lora_targets: module names as PEFT takes them."""
    opt = config.model_type == "opt"
    if config.model_type not in ("opt", "llama"):
        raise ValueError(f"model_type must be llama or opt; got {config.model_type!r}")
    heads = config.num_attention_heads
    return LayerShape(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=heads if opt else config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.ffn_dim if opt else config.intermediate_size,
        gated=not opt,
        element=element,
        lora={_NAMES[name]: lora_rank for name in lora_targets if name in _NAMES},
    )


def saved_bytes(
    shape: LayerShape,
    rows: int,
    *,
    recompute: str,
    mode: str = "skip",
    blocks: int = 0,
    documents: int = 1,
    weighted: bool = False,
    everything: bool = False,
) -> int:
    """Bytes that one layer saves between its forward and backward pass, exactly (no dropout; plain LoRA).

    rows M and blocks K: what the layer keeps; documents D of the batch; everything: all blocks are kept (the lists are
    then the step's, not the layer's). With e bytes per element and r the ranks of the adapters in question:

        "full"       e M d
        "attention"  e M (d + Hq D) + 4 Hq M
        "none"       e M (2 d + 2 Hq D + 2 Hk D + f [+ f if gated])  + 4 Hq M
                     + e M d   if q, k or v has an adapter,    + e M d  if gate or up has one
                     + e M f   if gated and down has one       + e M (sum of all r)
        lists        4 M + 4 (D + 1)   [+ 4 M + 4 K if weighted]

    Mode "backward" saves what "attention" saves. Nothing depends on eliminated tokens.
    """
    s, m = shape, rows
    lists = 0 if everything else 4 * m + 4 * (documents + 1) + (4 * m + 4 * blocks if weighted else 0)
    output = s.element * m * s.heads * s.head_dim + 4 * s.heads * m
    if mode == "backward" or recompute == "attention":
        return s.element * m * s.hidden + output + lists
    if recompute == "full":
        return s.element * m * s.hidden + lists
    if recompute != "none":
        raise ValueError(f'recompute must be "none", "attention" or "full"; got {recompute!r}')
    width = 2 * s.hidden + (s.heads + 2 * s.kv_heads) * s.head_dim + (2 if s.gated else 1) * s.ffn
    width += sum(s.lora.values())
    if {"q", "k", "v"} & set(s.lora):
        width += s.hidden
    if {"gate", "up"} & set(s.lora):
        width += s.hidden
    if s.gated and "down" in s.lora:
        width += s.ffn
    return s.element * m * width + output + lists


def _weights(config: Any, shape: LayerShape) -> int:
    d, q, kv, f = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.ffn
    sides = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
    if not shape.gated:
        del sides["gate"]
    layers = config.num_hidden_layers
    base = layers * (sum(a * b for a, b in sides.values()) + 2 * d)
    base += config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    adapters = layers * sum(shape.lora[name] * sum(sides[name]) for name in shape.lora if name in sides)
    # Adapters in fp32: value, gradient and two moments.
    return shape.element * base + 16 * adapters


def _working(shape: LayerShape, tokens: int, rows: int, mode: str, recompute: str) -> int:
    d, q, kv, f, e = (
        shape.hidden,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.ffn,
        shape.element,
    )
    # The residual stream (or its gradient) and one more of its size while the loss is computed.
    stream = 2 * e * tokens * d
    chunk = rows if recompute == "none" and mode != "backward" else min(rows, MLP_ROWS)
    mlp = e * chunk * ((6 if shape.gated else 4) * f + 3 * d)
    recomputed = 0 if recompute == "none" and mode != "backward" else e * rows * (3 * d + 2 * q + 2 * kv)
    layer = mlp + recomputed + e * rows * (3 * q + 4 * kv)
    if mode == "backward":
        exact = e * tokens * (2 * d + 2 * q + 2 * kv) + e * min(tokens, MLP_ROWS) * (3 * f + 2 * d)
        layer = max(layer, exact)
    return stream + max(layer, _LOSS_BYTES + e * tokens * d)


class Estimate(dict[str, Any]):
    """{"tokens", "recompute", "phases": [{"mode", "keep", "weights", "saved", "working", "peak"}], "peak"}, in bytes;
    prints as a table in GiB."""

    def __str__(self) -> str:
        lines = [f"{self['tokens']} tokens, recompute {self['recompute']} (GiB)"]
        lines.append(f"{'phase':<14}{'keep':>6}{'weights':>10}{'saved':>10}{'working':>10}{'peak':>10}")
        for p in self["phases"]:
            sizes = "".join(f"{p[name] / 2**30:>10.2f}" for name in ("weights", "saved", "working", "peak"))
            lines.append(f"{p['mode']:<14}{p['keep']:>6.2f}{sizes}")
        lines.append(f"The largest phase decides what fits: {self['peak'] / 2**30:.2f} GiB.")
        return "\n".join(lines)


def estimate(
    model_config: Any,
    config: LemoConfig | None = None,
    context: int = 4096,
    batch: int = 1,
    *,
    element: int = 2,
    lora_rank: int = 8,
    lora_targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> Estimate:
    """Memory of every phase of a fine-tuning run. What the largest phase needs decides what fits.

    model_config: a transformers Llama or OPT configuration; batch documents of `context` tokens each; element: bytes of
    an activation. `saved` is exact for plain LoRA without dropout, except in weighted phases, where the number of kept
    blocks varies and three standard deviations are added; `working` is an estimate.
    """
    if context < 1 or batch < 1:
        raise ValueError(f"context and batch must be at least 1; got {context} and {batch}")
    config = LemoConfig() if config is None else config
    shape = layer_shape(model_config, element=element, lora_rank=lora_rank, lora_targets=lora_targets)
    recompute = "none" if config.recompute == "auto" else config.recompute
    layers, tokens = model_config.num_hidden_layers, batch * context
    eliminating = layers if config.layers is None else len(set(config.layers))
    weights = _weights(model_config, shape)
    phases = []
    for phase in config.phases or ():
        keep = 1.0 if phase.keep is None else phase.keep

        def saved(rows: int, phase: Phase = phase) -> int:
            return saved_bytes(
                shape,
                rows,
                recompute=recompute,
                mode=phase.mode,
                blocks=-(-rows // config.block_size),
                documents=batch,
                weighted=phase.weighted,
                everything=rows == tokens,
            )

        rows = keep * tokens
        if phase.weighted:  # independent draws: three standard deviations of their number above its mean
            rows += 3.0 * config.block_size * (tokens / config.block_size * keep * (1.0 - keep)) ** 0.5
        rows = min(tokens, round(rows))
        total = eliminating * saved(rows) + (layers - eliminating) * saved(tokens)
        largest = rows if eliminating == layers else tokens
        working = _working(shape, tokens, largest, phase.mode, recompute)
        if config.return_logits:  # they and their gradient, and both in fp32 for the loss
            working += 2 * (element + 4) * tokens * model_config.vocab_size
        phases.append(
            {
                "mode": phase.mode,
                "keep": keep,
                "weights": weights,
                "saved": total,
                "working": working,
                "peak": weights + total + working,
            }
        )
    return Estimate(tokens=tokens, recompute=recompute, phases=phases, peak=max(p["peak"] for p in phases))
