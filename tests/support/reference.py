"""The modes in plain torch, from their definition: dense masks, index_select, autograd. Packed tokens, fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lemo.engine.families.base import AttentionOptions
from torch import Tensor

Lists = list[tuple[Tensor | None, Tensor | None]]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


class Model:
    """A transformers model seen as norms, projections and MLPs over packed rows [T, d]."""

    def __init__(self, model, positions: Tensor, document: Tensor) -> None:
        self.lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.opt = self.lm.config.model_type == "opt"
        # Norms are those of sums of sub-layers' inputs and outputs.
        self.after = self.opt and not self.lm.config.do_layer_norm_before
        self.decoder = self.lm.model.decoder if self.opt else self.lm.model
        self.positions, self.document = positions, document
        self.heads = self.lm.config.num_attention_heads

    def embed(self, ids: Tensor) -> Tensor:
        x = self.decoder.embed_tokens(ids)
        if self.opt:
            x = x if self.decoder.project_in is None else self.decoder.project_in(x)
            return x + self.decoder.embed_positions(None, 0, position_ids=self.positions)
        self.cos, self.sin = (t[0] for t in self.decoder.rotary_emb(x[None], self.positions[None]))
        return x

    def first_norm(self, layer, x):
        if self.after:
            return x
        return (layer.self_attn_layer_norm if self.opt else layer.input_layernorm)(x)

    def qkv(self, layer, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H, D] each, key and value heads repeated."""
        a, h = layer.self_attn, self.first_norm(layer, x)
        q, k, v = (p(h).view(len(rows), -1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
        if not self.opt:
            q, k = rotate(q, self.cos[rows], self.sin[rows]), rotate(k, self.cos[rows], self.sin[rows])
        return q, k.repeat_interleave(self.heads // k.shape[1], 1), v.repeat_interleave(self.heads // v.shape[1], 1)

    def options(self, layer) -> AttentionOptions:
        return AttentionOptions(layer.self_attn.scaling)

    def visible(self, queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
        seen = (keys[None] <= queries[:, None]) & (self.document[keys][None] == self.document[queries][:, None])
        return seen if window is None else seen & (keys[None] > queries[:, None] - window)

    def products(self, layer, q: Tensor, k: Tensor) -> Tensor:
        options = self.options(layer)
        s = torch.einsum("ihd,jhd->hij", q, k) * options.scale
        return options.softcap * torch.tanh(s / options.softcap) if options.softcap else s

    def scores(self, layer, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return self.products(layer, q, k).masked_fill(~mask, float("-inf"))

    def probabilities(self, layer, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of the keys, and that of the sink [H, M] if the layer has one."""
        sinks = self.options(layer).sinks
        if sinks is None:
            return s.softmax(-1), None
        p = torch.cat((s, sinks[:, None, None].expand(-1, s.shape[1], 1)), -1).softmax(-1)
        return p[..., :-1], p[..., -1]

    def out_proj(self, layer, out: Tensor) -> Tensor:
        return (layer.self_attn.out_proj if self.opt else layer.self_attn.o_proj)(out.flatten(1))

    def mlp(self, layer, x: Tensor) -> Tensor:
        if self.opt:
            return layer.fc2(F.relu(layer.fc1(x if self.after else layer.final_layer_norm(x))))
        return layer.mlp(layer.post_attention_layernorm(x))

    def attention(self, layer, x: Tensor, rows: Tensor) -> Tensor:
        """What attention among `rows` adds to them."""
        q, k, v = self.qkv(layer, x, rows)
        seen = self.visible(rows, rows, self.options(layer).window)
        p, _ = self.probabilities(layer, self.scores(layer, q, k, seen))
        return self.out_proj(layer, torch.einsum("hij,jhd->ihd", p, v))

    def past_attention(self, layer, x: Tensor, added: Tensor) -> Tensor:
        """Rows x [M, d] once attention has added something to them."""
        return layer.self_attn_layer_norm(x + added) if self.after else x + added

    def past_mlp(self, layer, x: Tensor, added: Tensor) -> Tensor:
        return layer.final_layer_norm(x + added) if self.after else x + added

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        norm = self.decoder.final_layer_norm if self.opt else self.decoder.norm
        x = x if norm is None else norm(x)
        project = self.decoder.project_out if self.opt else None
        x = x if project is None else project(x)
        return F.cross_entropy(self.lm.lm_head(x), targets)


def skip(m: Model, ids: Tensor, targets: Tensor, lists: Lists, everyone: bool = False) -> Tensor:
    """Loss of mode "skip"; lists: rows of every layer's attention and MLP (None: all left out).

    It is the mean over tokens that took part in a sub-layer; `everyone`: over all of them.
    """
    x = m.embed(ids)
    for layer, (attention, mlp) in zip(m.decoder.layers, lists, strict=True):
        if attention is not None:
            kept = x[attention]
            x = x.index_copy(0, attention, m.past_attention(layer, kept, m.attention(layer, kept, attention)))
        if mlp is not None:
            x = x.index_copy(0, mlp, m.past_mlp(layer, x[mlp], m.mlp(layer, x[mlp])))
    return m.loss(x, targets if everyone else targets.masked_fill(~took_part(lists, len(targets)), -100))


def took_part(lists: Lists, tokens: int) -> Tensor:
    """bool [tokens]: whether any list names a token."""
    named = [rows for pair in lists for rows in pair if rows is not None]
    return torch.isin(torch.arange(tokens), torch.cat(named)) if named else torch.zeros(tokens, dtype=torch.bool)


def backward(
    m: Model, ids: Tensor, targets: Tensor, lists: list[Tensor], weights: list[Tensor] | None, block: Tensor
) -> Tensor:
    """Loss of mode "backward"; lists: kept rows by layer; weights: 1/p of every kept row, or None; block: of tokens.

    The value is the dense model's. Gradients: P and the output are the exact ones; kept keys j reach kept queries i
    with w_ij = weights[j], 1 within a block; what the layer adds to row i has its gradient weighted by weights[i].
    """
    x = m.embed(ids)
    every = torch.arange(len(ids))
    for n, layer in enumerate(m.decoder.layers):
        rows = lists[n]
        w = torch.ones(len(rows)) if weights is None else weights[n]
        with torch.no_grad():
            q, k, v = m.qkv(layer, x, every)
            seen = m.visible(every, every, m.options(layer).window)
            p_all, p_sink = m.probabilities(layer, m.scores(layer, q, k, seen))
            out_all = torch.einsum("hij,jhd->ihd", p_all, v)
            full = m.past_attention(layer, x, m.out_proj(layer, out_all))
            full = m.past_mlp(layer, full, m.mlp(layer, full))
            p, out = p_all[:, rows][:, :, rows], out_all[rows]
        xk = x[rows]
        q, k, v = m.qkv(layer, xk, rows)
        w_ij = torch.where(block[rows][:, None] == block[rows][None], torch.ones(()), w[None])
        s = m.products(layer, q, k)
        # Zero in value; in gradient dS_ij = P_ij (dout_i . (v_j - out_i)) and dv_j = P_ij dout_i, each times w_ij.
        change = torch.einsum("hij,jhd->ihd", w_ij * p, v - v.detach())
        slope = torch.einsum("hij,hijd->ihd", w_ij * p * (s - s.detach()), value_minus_output(v.detach(), out))
        sinks = m.options(layer).sinks
        if sinks is not None and p_sink is not None:  # a key with the value 0, which every query sees
            slope = slope - torch.einsum("hi,h,ihd->ihd", p_sink[:, rows], sinks - sinks.detach(), out)
        a = m.out_proj(layer, out + change + slope)
        middle = m.past_attention(layer, xk, a)
        delta = m.past_mlp(layer, middle, m.mlp(layer, middle)) - xk
        scaled = delta.detach() + w[:, None] * (delta - delta.detach())
        x = (x + (full - x).detach()).index_add(0, rows, scaled - scaled.detach())
    return m.loss(x, targets)


def value_minus_output(v: Tensor, out: Tensor) -> Tensor:
    """v_j - out_i, [H, M, M, D]."""
    return v.transpose(0, 1)[:, None] - out.transpose(0, 1)[:, :, None]
