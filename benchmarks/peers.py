"""The PyTorch compositions that lemo's operations replace, as a user would write them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Passes = dict[str, Callable[[], Any]]  # by pass: "forward" and "backward"


def gather_norm(x: Tensor, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.index_select(0, rows), (x.shape[1],), weight, eps)


def scatter_add_(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    return x.index_add_(0, rows, y)


def _passes(attend: Callable[[], Tensor], leaves: list[Tensor], direction: Tensor) -> Passes:
    """The forward pass without a graph; the backward pass of a graph that is built now, once."""
    out = attend()
    assert out.shape == direction.shape

    def forward() -> Tensor:
        with torch.no_grad():
            return attend()

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, leaves, direction, retain_graph=True),
    }


def dense_attention(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, heads_first: bool, repeat_keys: bool
) -> Passes:
    """Causal attention of one document [M, H, D], its tensors laid out and its keys repeated before any clock runs."""
    if repeat_keys:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))

    def laid_out(t: Tensor) -> Tensor:
        t = t.detach().transpose(0, 1)[None]
        return t.contiguous() if heads_first else t

    leaves = [laid_out(t).requires_grad_() for t in (q, k, v)]

    def attend() -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=not repeat_keys)

    return _passes(attend, leaves, laid_out(dout))


def deterministic(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same in torch's deterministic mode, where FlashAttention's backward pass adds in a fixed order.

    That mode also fills new tensors, which only serves to find bugs and would be timed as the peer's: not so here.
    """

    def run_in_order() -> Any:
        before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            return run()
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.utils.deterministic.fill_uninitialized_memory = before[1]

    return run_in_order


def gathered_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Tensor) -> Passes:
    """The same over some rows, which are gathered first; gradients go back to the rows they came from."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]

    def attend() -> Tensor:
        packed = [t.index_select(0, rows).transpose(0, 1)[None] for t in leaves]
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(*packed, is_causal=True, enable_gqa=True)

    return _passes(attend, leaves, dout.index_select(0, rows).transpose(0, 1)[None])


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch.nn.attention.flex_attention import flex_attention

    functorch.donated_buffer = False  # one graph, many backward passes
    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 64, True  # never the slow path unnoticed
    return torch.compile(flex_attention, dynamic=False)


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


@functools.cache
def _causal_among_kept(tokens: int) -> tuple[Tensor, Callable[..., Tensor]]:
    """One mask function and the bool tensor it reads for every choice of tokens: nothing is compiled twice."""
    kept = torch.zeros(tokens, dtype=torch.bool, device="cuda")
    return kept, lambda b, h, i, j: (i >= j) & kept[i] & kept[j]


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Tensor | None = None, tiles: Tensor | None = None
) -> Passes:
    """FlexAttention, causal, of one document [M, H, D].

    rows: kept queries see kept keys; such calls share a mask, so use one up before the next. tiles: bool, which tiles
    of keys every tile of queries sees.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = q.shape[0]
    visible: Callable[..., Tensor] = _causal
    if rows is not None:
        kept, visible = _causal_among_kept(tokens)
        kept.zero_()[rows] = True
    elif tiles is not None:
        side = tokens // tiles.shape[0]

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & tiles[i // side, j // side]

    mask = create_block_mask(visible, None, None, tokens, tokens, device="cuda")
    leaves = [t.detach().transpose(0, 1)[None].contiguous().requires_grad_() for t in (q, k, v)]
    direction = dout.transpose(0, 1)[None].contiguous()
    return _passes(lambda: _flex()(*leaves, block_mask=mask, enable_gqa=True), leaves, direction)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, deterministic: bool = False) -> Passes:
    """FlashAttention-4's kernels for this GPU. Raises ImportError if its package is not installed."""
    try:
        from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(f"flash-attn-4 is not installed (pip install 'flash-attn-4[cu13]'): {error}") from error

    leaves = [t.detach()[None].contiguous().requires_grad_() for t in (q, k, v)]

    def attend() -> Tensor:
        out = flash_attn_func(*leaves, causal=True, deterministic=deterministic)
        return out[0] if isinstance(out, tuple) else out

    return _passes(attend, leaves, dout[None])


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 2048) -> tuple[Tensor, Tensor]:
    """(loss, dhidden), chunk by chunk, gradients computed at once."""
    dhidden = torch.empty_like(hidden)
    total = torch.zeros((), device=hidden.device)
    for first in range(0, hidden.shape[0], rows):
        part = slice(first, first + rows)
        h = hidden[part].detach().requires_grad_()
        loss = F.cross_entropy(F.linear(h, weight).float(), targets[part], reduction="sum") / hidden.shape[0]
        (dhidden[part],) = torch.autograd.grad(loss, h)
        total += loss.detach()
    return total, dhidden


def block_scores(q: Tensor, k: Tensor, block: int, scale: float, rows: int = 1024) -> Tensor:
    """Column sums of block maxima for one document of whole blocks, a strip of query rows at a time."""
    tokens, heads, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1).transpose(0, 1)
    scores = torch.zeros(tokens // block, device=q.device)
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens)
        s = torch.zeros(last - first, last, device=q.device)
        for h in range(heads):
            s += F.relu(q[first:last, h] @ k[h, :last].T)
        s = torch.tril(s, diagonal=first) * (scale / heads)
        scores[: last // block] += s.view((last - first) // block, block, last // block, block).amax((1, 3)).sum(0)
    return scores


def select(scores: Tensor, block: int, keep: float) -> Tensor:
    """Token rows of the highest blocks, ascending."""
    kept = torch.topk(scores, int(keep * scores.shape[0] + 0.5)).indices.sort().values
    return (kept[:, None] * block + torch.arange(block, device=scores.device)).flatten()


def predict(x: Tensor, networks: list[list[Tensor]], block: int, eps: float) -> Tensor:
    z = F.rms_norm(x, (x.shape[1],), None, eps)
    yq, yk = (
        F.linear(F.relu(F.linear(F.relu(F.linear(z, w1)), w2)).unflatten(0, (-1, block)).mean(1), w3)
        for w1, w2, w3 in networks
    )
    return torch.tril(yq.float() @ yk.float().T).sum(0)


def two_products(hidden: Tensor, weight: Tensor, rows: int) -> Callable[[], Tensor]:
    """What no linear cross-entropy does without: logits, and from them the gradient of the hidden states, by cuBLAS
    and ``rows`` at a time into outputs that are there already. Nothing happens between the two products."""
    logits, dhidden = hidden.new_empty(rows, weight.shape[0]), torch.empty_like(hidden)

    def run() -> Tensor:
        for h, d in zip(hidden.detach().split(rows), dhidden.split(rows), strict=True):
            z = logits[: h.shape[0]]
            torch.mm(h, weight.T, out=z)
            torch.mm(z, weight, out=d)
        return dhidden

    return run


# Liger's fused linear cross-entropy. What its users call: cuBLAS products in chunks, with the softmax between them in
# Triton. The same with the softmax in CuTe, which is chosen by name. Then two that are CuTe throughout, for Hopper
# alone: one with three kernels over whole logits, called here so that the weight's gradient is left to a backward pass
# that a frozen head never runs; and one that keeps no logits and always computes the weight's gradient as well, so that
# its time has a product more.
LIGER_TRITON, LIGER_CUTE = "Liger, Triton", "Liger, CuTe DSL softmax"
LIGER_KERNELS = "Liger, CuTe DSL products and softmax, whole logits"
LIGER_ONE_KERNEL = "Liger, CuTe DSL in one kernel (with the weight's gradient)"


def liger_losses(leaf: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """By peer, what makes its call: mean loss and gradient of the hidden states, which the call returns. Making or
    calling one raises whatever a package that is missing, or made for another GPU, raises."""

    def chunked() -> Callable[[], Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        module = LigerFusedLinearCrossEntropyLoss()
        return lambda: torch.autograd.grad(module(weight, leaf, targets), leaf)[0]

    def chunked_with_cute() -> Callable[[], Tensor]:
        # That module's softmax is Triton's, whatever liger_kernel.backends.set_impl says: this function obeys.
        from liger_kernel.functional import fused_linear_cross_entropy

        def run() -> Tensor:
            loss = fused_linear_cross_entropy(leaf, weight, targets, impl="nvidia-cutedsl")[0]
            return torch.autograd.grad(loss, leaf)[0]

        return run

    def kernels() -> Callable[[], Tensor]:
        from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
            fused_linear_cross_entropy_forward_sm90 as forward,
        )

        return lambda: forward(leaf.detach(), weight, targets, defer_dw=True)[1]

    def one_kernel() -> Callable[[], Tensor]:
        from liger_kernel.ops.cutedsl.ops import LigerFusedScaledCrossEntropySM90Function as Function

        return lambda: torch.autograd.grad(Function.apply(leaf, weight, targets).mean(), leaf)[0]

    return {
        LIGER_TRITON: chunked,
        LIGER_CUTE: chunked_with_cute,
        LIGER_KERNELS: kernels,
        LIGER_ONE_KERNEL: one_kernel,
    }
