"""How much memory a step takes: the exact bytes a layer saves, and estimates of what it needs besides.

`lemo.engine.budget` adds them up for all layers, and `lemo.engine.estimate` for the phases of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch

from lemo.engine import families
from lemo.engine.families.base import ModelShape
from lemo.engine.step import MLP_ROWS, SEPARATE_BYTES
from lemo.engine.wrappers import base_model
from lemo.ops.attention import heads_at_a_time

# Workspace of the segmented loss.
_LOSS_BYTES = 128 << 20


@dataclass(frozen=True)
class LayerShape(ModelShape):
    """A model's sizes, and what one of its layers holds in training.

    element: bytes of an activation. lora: rank of the adapter by projection, of "q", "k", "v", "o", "gate", "up",
    "down" ("up" and "down" are OPT's fc1 and fc2), "qkv" and "gate_up" of fused ones; projections without an adapter
    are left out.
    """

    element: int = 2
    lora: Mapping[str, int] = field(default_factory=dict)

    def at(self, layer: int) -> Self:
        shape = super().at(layer)
        return shape if shape is self else replace(shape, lora=_present(self.lora, shape))


def layer_shape(
    config: Any, *, element: int = 2, lora_rank: int = 8, lora_targets: Sequence[str] | str | None = None
) -> LayerShape:
    """LayerShape of a transformers configuration of a family that lemo knows.

    lora_targets: module names as PEFT takes them, or "all-linear"; None: the family's attention projections. Names of
    what is not in a layer, or not in this family's, do not count. Raises UnsupportedModelError for another model.
    """
    family = families.of(config)
    names = family.lora_targets if lora_targets is None else lora_targets
    if isinstance(names, str):
        names = tuple(family.projections) if names == "all-linear" else (names,)
    shape = family.shape(config)
    ranks = _present({family.projections[name]: lora_rank for name in names if name in family.projections}, shape)
    sizes = {f.name: getattr(shape, f.name) for f in fields(ModelShape)}
    return LayerShape(**sizes, element=element, lora=ranks)


def _present(ranks: Mapping[str, int], shape: ModelShape) -> dict[str, int]:
    return {name: rank for name, rank in ranks.items() if name in shape.projections}


def stored_bytes(model: Any) -> int:
    """Bytes of a model's weights as they are stored (4-bit ones with their scales), adapters that train left out."""
    return _storage_bytes(model, with_trained=not hasattr(model, "peft_config"))


def frozen_bytes(model: Any) -> int:
    """As `stored_bytes`, without any weight that trains."""
    return _storage_bytes(model, with_trained=False)


def trained_bytes(model: Any) -> int:
    """Bytes of the weights that train, each with its gradient and the two moments of Adam."""
    return sum(4 * p.nbytes for p in base_model(model).parameters() if p.requires_grad)


def _storage_bytes(model: Any, with_trained: bool) -> int:
    storages: dict[int, int] = {}
    for tensor in (*base_model(model).parameters(), *base_model(model).buffers()):
        if tensor.requires_grad and not with_trained:
            continue
        for t in (*_parts(tensor), *_tensors_of(getattr(tensor, "quant_state", None))):
            storages[t.untyped_storage().data_ptr() or id(t)] = t.untyped_storage().nbytes()
    return sum(storages.values())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor holds in memory: the tensors inside of one of another kind (torchao's), else itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


def _tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """Tensors of bitsandbytes' QuantState, which may hold another for its own scales."""
    for value in vars(state).values() if hasattr(state, "__dict__") else ():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) is type(state):
            yield from _tensors_of(value)


def quantized(model: Any) -> bool:
    weights = (p for p in base_model(model).parameters() if p.dim() > 1)
    return any(part.element_size() == 1 for p in weights for part in _parts(p))


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
    tiles: tuple[int, int] | None = None,
) -> int:
    """Bytes that one layer saves between its forward and backward pass, exactly (no dropout; plain LoRA).

    rows M and blocks K: what the layer keeps; documents D of the batch; everything: all blocks are kept (the lists are
    then the step's, not the layer's); tiles: slots S and entries L of the lists of tiles, in mode "sparse". With e
    bytes per element and r the ranks of the adapters in question:

        "full"       e M d
        "attention"  e M (d + Hq D) + 4 Hq M
        "none"       e M (2 d + 2 Hq D + 2 Hk D + f [+ f if gated])  + 4 Hq M
                     + e M (sum of all r)
                     with experts in place of the MLP, k of E for a row, in place of f + f:
                       e M k (2 f + 1) + 16 M k + 4 E  [+ 4 M E unless the router looks at chosen experts only]
                       [+ 4 M (k + 1) if its weights are made to sum to 1]
                     + e M (elements of norms inside attention and MLP, `inner_saved` of the model's shape)
        lists        4 M + 4 (D + 1)   [+ 4 M + 4 K if weighted]
        tiles        8 (S + 1 + L)     [half of it with "none"]

    Inputs of adapters are not saved: each is made again, without a product, of rows that are (`lemo.engine.linear`).
    Mode "backward" saves with "full" what it saves with "attention". Nothing depends on eliminated tokens.
    """
    s, m = shape, rows
    lists = 0 if everything else 4 * m + 4 * (documents + 1) + (4 * m + 4 * blocks if weighted else 0)
    if tiles is not None:
        lists += (4 if recompute == "none" else 8) * (tiles[0] + 1 + tiles[1])
    output = s.element * m * s.heads * s.head_dim + 4 * s.heads * m
    if recompute == "attention" or (recompute == "full" and mode == "backward"):
        return s.element * m * s.hidden + output + lists
    if recompute == "full":
        return s.element * m * s.hidden + lists
    if recompute != "none":
        raise ValueError(f'recompute must be "none", "attention" or "full"; got {recompute!r}')
    width = 2 * s.hidden + (s.heads + 2 * s.kv_heads) * s.head_dim
    width += sum(s.lora.values()) + s.inner_saved
    if s.experts is not None:
        return s.element * m * width + output + lists + expert_bytes(s, m)
    width += (2 if s.gated else 1) * s.ffn
    return s.element * m * width + output + lists


def expert_bytes(shape: LayerShape, rows: int) -> int:
    """What router and experts save: gate and up, and the weights of every row's experts; the router's probabilities and
    order."""
    e = shape.experts
    assert e is not None
    router = 16 * e.per_token + (0 if e.normed is None else 4 * e.count)
    router += 4 * (e.per_token + 1) if e.normed else 0
    return rows * (shape.element * e.per_token * (2 * e.ffn + 1) + router) + 4 * e.count


def _layer_parameters(shape: ModelShape) -> int:
    sides = shape.projections
    found = sum(a * b for a, b in sides.values()) + sum(sides[name][1] for name in shape.biases) + 2 * shape.hidden
    if shape.experts is not None:
        found += shape.experts.count * shape.hidden * (3 * shape.experts.ffn + 1)
    return found + shape.inner_parameters


def weight_bytes(shape: LayerShape, stored: int | None) -> int:
    """Bytes of the model, by its shape unless `stored` says them, and of adapters that train."""
    d, layers = shape.hidden, [shape.at(i) for i in range(shape.layers)]
    outside = d * (shape.vocab * (1 if shape.tied else 2) + shape.positions + 1)
    base = shape.element * (sum(map(_layer_parameters, layers)) + outside) if stored is None else stored
    adapters = sum(rank * sum(layer.projections[name]) for layer in layers for name, rank in layer.lora.items())
    # Adapters in fp32: value, gradient and two moments.
    return base + 16 * adapters


def working_bytes(
    shape: LayerShape,
    tokens: int,
    rows: int,
    mode: str,
    recompute: str,
    dequantizes: bool,
    *,
    in_place: bool = False,
    separable: bool = True,
) -> int:
    """What a step needs at a time besides weights and saved rows, at most: an estimate (docs/howto/memory.md).

    in_place: the layer works on all tokens, without weights, so that the stream's gradient is that of its rows.
    separable: see `lemo.engine.attend.Attention.separable`, as far as the shape does not decide it.
    """
    d, _, _, f, e = _widths(shape)
    # The residual stream or its gradient; both, and one more of their size, while the loss is computed.
    stream = e * tokens * d
    # Rotary tables; ids, targets, positions and lists of all tokens.
    fixed = tokens * (2 * e * shape.head_dim + 64)
    again = recompute != "none"
    chunk = min(rows, MLP_ROWS) if again else rows
    # Gate, up and the gradient of their product, and that product for an adapter; gradients of gate and up take their
    # memory. Without gates: what the activation gives, and the gradients on both sides of it.
    mlp = e * chunk * ((3 + ("down" in shape.lora) if shape.gated else 4) * f + 3 * d)
    if shape.experts is not None:  # rows of gate and up, and their inputs and outputs, once for every expert of a row
        mlp = max(mlp, chunk * shape.experts.per_token * e * (6 * shape.experts.ffn + 3 * d) + 12 * shape.experts.count)
    if again:
        layer = _layer_again(shape, rows, mlp, mode == "backward" or recompute == "attention", in_place, separable)
    else:
        layer = _layer_once(shape, rows, mlp)
    if mode == "backward":
        layer = max(layer, _exact(shape, tokens) if again else _exact_in_parts(shape, tokens, rows))
    if dequantizes:  # one weight at a time is made dense
        layer += e * max(a * b for a, b in shape.projections.values())
    return fixed + max(stream + layer, 3 * stream + _LOSS_BYTES)


def forward_bytes(shape: LayerShape, tokens: int, rows: int) -> int:
    """What a layer needs in addition to the stream's gradient and to what is saved, if it runs again: the stream and
    its own work."""
    return shape.element * tokens * shape.hidden + _forward(shape, rows)


def _widths(shape: LayerShape) -> tuple[int, int, int, int, int]:
    """Hidden size, widths of queries, of keys, and of the MLP, and bytes of an element."""
    heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return shape.hidden, *heads, shape.ffn, shape.element


def _forward(shape: LayerShape, rows: int) -> int:
    """Attention of so many rows: the norm's output, and q, k, v before and after they are rotated."""
    d, q, kv, _, e = _widths(shape)
    return e * rows * (d + 2 * q + 3 * kv + (q + kv if shape.inner_saved else 0))


def _exact(shape: LayerShape, tokens: int) -> int:
    """The forward pass of mode "backward": attention of all tokens, and then the MLP in pieces."""
    d, q, _, f, e = _widths(shape)
    return max(_forward(shape, tokens), e * tokens * q + e * min(tokens, MLP_ROWS) * (3 * f + 3 * d))


def _exact_in_parts(shape: LayerShape, tokens: int, rows: int) -> int:
    """The same with local graphs of the kept rows, without what these save."""
    d, q, kv, f, e = _widths(shape)
    others, chunk = tokens - rows, min(tokens - rows, MLP_ROWS)
    # While attention runs, its output and the MLP have not saved anything yet.
    missing = rows * (q + d + (2 if shape.gated else 1) * f) if shape.experts is None else 0
    projected = others * (d + 2 * q + 3 * kv + (q + kv if shape.inner_saved else 0))
    joined = (others + tokens) * (q + 2 * kv) if others else 0
    attention = rows * d + max(projected, joined, tokens * (2 * q + 2 * kv)) - missing
    mlp = tokens * q + max(rows * (f + 2 * d), rows * d + chunk * (q + 3 * f + 3 * d))
    return e * max(attention, mlp)


def _layer_once(shape: LayerShape, rows: int, mlp: int) -> int:
    """A layer that is not computed again, without what it saves. mlp: what its MLP needs with what that saves."""
    d, q, kv, f, e = _widths(shape)
    saved = 0 if shape.experts is not None else e * rows * (2 if shape.gated else 1) * f
    # A fused projection of gate and up joins their gradients.
    joined = e * rows * f if shape.fused and shape.gated else 0
    # Attention's gradients on both sides, dq in float32 as well; what the MLP saves is gone then.
    return max(mlp - saved + joined, e * rows * (2 * d + 5 * q + 3 * kv) - saved)


def _layer_again(shape: LayerShape, rows: int, mlp: int, has_output: bool, in_place: bool, separable: bool) -> int:
    """The backward pass of a layer that is computed again (`lemo.engine.backward`). mlp: what a chunk of rows needs;
    has_output: attention's output is saved."""
    d, q, kv, _, e = _widths(shape)
    row = e * rows
    # q, k, v and the gradient of attention's output; its output; the rows' gradient; the norm's output.
    held = row * (2 * q + 2 * kv + shape.inner_saved)
    held += 0 if has_output else row * q
    held += 0 if in_place else row * d
    held += 0 if separable and not shape.inner_saved and row * d >= SEPARATE_BYTES else row * d
    # Gradients of q, k, v of as many heads as are worked on at a time, dq in float32 as well, two statistics of rows.
    heads = heads_at_a_time(rows, shape.heads, shape.kv_heads, shape.head_dim) if rows else shape.kv_heads
    share = heads / shape.kv_heads
    attention = int(share * rows * (e * (q + 2 * kv) + 4 * q + 8 * shape.heads))
    if heads < shape.kv_heads:
        attention += row * 2 * kv
    return held + max(attention, mlp + e * min(rows, MLP_ROWS) * (d + q))
