"""The modes in terms of transformers' own decoder layers, for any family: what lemo has to equal.

`tests/support/reference.py` writes the modes out for two families, down to the projections; here a layer is what
transformers computes for the rows it is given, and only attention itself is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from support.reference import took_part
from torch import Tensor
from transformers import AttentionInterface

NAME = "lemo-test"


@dataclass(frozen=True)
class Options:
    """What a layer of transformers hands to its attention function."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


# Gets q [Hq, M, D], k and v [Hq, M, D] and the options; returns [Hq, M, D].
Attend = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
_attend: list[Attend] = []


def _attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scaling: float = 1.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Any:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    options = Options(scaling, sliding_window, softcap, s_aux)
    return _attend[-1](q[0], k[0], v[0], options).transpose(0, 1)[None], None


AttentionInterface.register(NAME, _attention)


class Model:
    """A transformers model over packed rows [T, d]; positions int64 [T] and the document of every row."""

    def __init__(self, model: Any, positions: Tensor, document: Tensor) -> None:
        self.lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = self.lm.get_decoder()
        self.layers = list(self.decoder.layers)
        self.positions, self.document = positions, document
        self.arguments: dict[int, dict[str, Any]] = {}

    def embed(self, ids: Tensor) -> Tensor:
        """The input [T, d] of the first layer; collects what the decoder passes to each of them."""
        found: list[Tensor] = []

        def collect(i: int) -> Any:
            def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
                found.append(args[0])
                self.arguments[i] = dict(kwargs)

            return self.layers[i].register_forward_pre_hook(hook, with_kwargs=True)

        handles = [collect(i) for i in range(len(self.layers))]
        try:
            self.decoder(input_ids=ids[None], position_ids=self.positions[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.lm.config._attn_implementation = NAME
        return found[0][0]

    def visible(self, rows: Tensor) -> Tensor:
        """bool [M, M]: which of the rows (keys) each of them (queries) sees."""
        return (rows[None] <= rows[:, None]) & (self.document[rows][None] == self.document[rows][:, None])

    def layer(self, i: int, x: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """The layer's output [M, d] for its input x [M, d], those of rows."""
        arguments = dict(self.arguments[i], attention_mask=None, position_ids=self.positions[rows][None])
        tables = arguments.get("position_embeddings")
        if tables is not None:
            arguments["position_embeddings"] = tuple(t[:, rows] for t in tables)
        _attend.append(attend)
        try:
            y = self.layers[i](x[None], **arguments)
        finally:
            _attend.pop()
        return (y[0] if isinstance(y, tuple) else y)[0]

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Of the last layer's output [T, d]: what the model makes of it, norm and head included."""
        last = self.layers[-1].register_forward_hook(lambda _m, _a, y: (x[None],) if isinstance(y, tuple) else x[None])
        _attend.append(lambda q, k, v, options: v)
        try:
            ids = torch.zeros(1, len(x), dtype=torch.long)
            logits = self.lm(input_ids=ids, position_ids=self.positions[None], use_cache=False).logits[0]
        finally:
            last.remove()
            _attend.pop()
        return F.cross_entropy(logits, targets)


def probabilities(q: Tensor, k: Tensor, options: Options, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and softmax, [Hq, M, M], of rows that see what mask bool [M, M] allows, and the window."""
    s = q @ k.transpose(1, 2) * options.scaling
    if options.softcap is not None:
        s = options.softcap * torch.tanh(s / options.softcap)
    if options.window is not None:
        mask = mask & (rows[None] > rows[:, None] - options.window)
    visible = s.masked_fill(~mask, float("-inf"))
    if options.sinks is None:
        return s, visible.softmax(-1)
    sinks = options.sinks[:, None, None].expand(-1, len(rows), 1)
    return s, torch.cat((visible, sinks), -1).softmax(-1)[..., :-1]


def masked(rows: Tensor, mask: Tensor) -> Attend:
    return lambda q, k, v, options: probabilities(q, k, options, rows, mask)[1] @ v


def skip(m: Model, ids: Tensor, targets: Tensor, lists: list[Tensor], masks: list[Tensor] | None = None) -> Tensor:
    """Loss of mode "skip"; lists: kept rows by layer; masks: bool [M, M] of the pairs that a layer attends to."""
    x = m.embed(ids)
    for i, rows in enumerate(lists):
        mask = m.visible(rows)
        pairs = None if masks is None else masks[i]
        if pairs is not None:
            mask = mask & pairs
        x = x.index_copy(0, rows, m.layer(i, x[rows], rows, masked(rows, mask)))
    both = [(rows, rows) for rows in lists]
    return m.loss(x, targets.masked_fill(~took_part(both, len(targets)), -100))


def backward(
    m: Model, ids: Tensor, targets: Tensor, lists: list[Tensor], weights: list[Tensor] | None, block: Tensor
) -> Tensor:
    """Loss of mode "backward", as `support.reference.backward` defines it."""
    x = m.embed(ids)
    every = torch.arange(len(ids))
    for i, rows in enumerate(lists):
        w = torch.ones(len(rows)) if weights is None else weights[i]
        exact: list[Tensor] = []

        def dense(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
            p = probabilities(q, k, options, every, m.visible(every))[1]
            exact.extend((p, p @ v))  # noqa: B023 - called before the next layer
            return exact[1]  # noqa: B023

        with torch.no_grad():
            full = m.layer(i, x, every, dense)
        w_ij = torch.where(block[rows][:, None] == block[rows][None], torch.ones(()), w[None])
        p_all, out_all = exact

        def kept(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
            p, out = p_all[:, rows][:, :, rows], out_all[:, rows]  # noqa: B023
            s, _ = probabilities(q, k, options, rows, m.visible(rows))  # noqa: B023
            change = (w_ij * p) @ (v - v.detach())  # noqa: B023
            slope = (v.detach()[:, None] - out[:, :, None]) * (w_ij * p * (s - s.detach()))[..., None]  # noqa: B023
            return out + change + slope.sum(2)

        delta = m.layer(i, x[rows], rows, kept) - x[rows]
        scaled = w[:, None] * (delta - delta.detach())
        x = (x + (full - x).detach()).index_add(0, rows, scaled)
    return m.loss(x, targets)
