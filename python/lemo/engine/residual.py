"""Where sub-layers meet the residual stream: what each reads of its rows, and how what it computed joins them.

    pre-norm    x + f(norm(x))
    post-norm   norm(x + f(x))      `NormWeights.after`, of both norms of a layer or of neither

Either way a layer on M kept rows is entered, crossed from attention to the MLP, and left again, and each of these three
places has one norm at most:

                enter                   cross                                   leave
    pre-norm    h = norm1(kept)         s = kept + a, h2 = norm2(s)             x[rows] = s + m
    post-norm   h = kept                s = kept + a, h2 = norm1(s)             x[rows] = norm2(h2 + m)

The functions of the backward pass undo the same three places. A sub-layer alone (the other one has another list) is
entered and left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lemo import ops
from lemo.engine.families.base import NormWeights

if TYPE_CHECKING:  # which imports what enters a layer
    from lemo.engine.gradients import ParameterGradients

Norms = tuple[NormWeights, NormWeights]


def gather_norm(x: Tensor, rows: Tensor | None, residual: Tensor | None, n: NormWeights) -> tuple[Tensor, Tensor]:
    """(norm(s), s), both [M, d], of s = x[rows] + residual; rows int32 [M], None: all of x."""
    return ops.gather_norm(x, rows, residual, *n.operands, n.kind, n.eps)


# --- forward ----------------------------------------------------------------------------------------------------------


def enter(x: Tensor, rows: Tensor | None, n: NormWeights) -> tuple[Tensor, Tensor]:
    """(h, kept), both [M, d]: what a sub-layer with norm n reads of rows of x (None: all), and the rows themselves."""
    if not n.after:
        return gather_norm(x, rows, None, n)
    kept = x if rows is None else ops.gather(x, rows)
    return kept, kept


def cross(x: Tensor, rows: Tensor | None, a: Tensor, norms: Norms) -> tuple[Tensor, Tensor, Tensor]:
    """(h2, s, base), all [M, d]: what the MLP reads if attention adds a to rows of x (None: all), the sum that this is
    the norm of, and what the MLP's output is added to."""
    h2, s = gather_norm(x, rows, a, _crossed(norms))
    return h2, s, h2 if norms[0].after else s


def cross_again(s: Tensor, norms: Norms) -> Tensor:
    """h2 from s, both as of `cross`."""
    return gather_norm(s, None, None, _crossed(norms))[0]


def _crossed(norms: Norms) -> NormWeights:
    return norms[0] if norms[0].after else norms[1]


def join(m: Tensor, base: Tensor, n: NormWeights) -> tuple[Tensor, Tensor | None]:
    """(y, s): the last sub-layer's part in the rows, for `leave`, if it adds m [M, d] to base [M, d]; and the input of
    the norm n in between, if it is there."""
    return gather_norm(m, None, base, n) if n.after else (m, None)


def leave(x: Tensor, rows: Tensor | None, y: Tensor, base: Tensor, n: NormWeights) -> None:
    """Puts the rows of x (None: all), in place. y, base: of `join`."""
    if rows is None:
        x.copy_(y) if n.after else torch.add(base, y, out=x)
    else:
        ops.scatter_add_(x, rows, y, torch.zeros_like(y) if n.after else base)


def change(y: Tensor, added: Tensor | None, kept: Tensor | None, n: NormWeights) -> Tensor:
    """[M, d]: what a layer added to its rows `kept`, which only post-norm needs. y: of `join`; added: what attention
    added before the MLP."""
    if n.after:
        assert kept is not None
        return y - kept
    return y if added is None else y + added


# --- backward ---------------------------------------------------------------------------------------------------------


def norm_backward(dy: Tensor, s: Tensor, n: NormWeights, extra: Tensor | None, grads: ParameterGradients) -> Tensor:
    """ds [M, d] of the norm at s [M, d], plus `extra`; adds the gradients of its weights."""
    ds, dw, db = ops.gather_norm_backward(
        dy, s, n.operands[0], extra, n.kind, n.eps, grads.wants(n.weight), grads.wants(n.bias)
    )
    grads.add((n.weight, n.bias), (dw, db))
    return ds


def leave_backward(g: Tensor, s: Tensor | None, n: NormWeights, grads: ParameterGradients) -> Tensor:
    """Gradient [M, d] of m, and of `base`, from that of the rows that were left; s: of `join`."""
    if not n.after:
        return g
    assert s is not None
    return norm_backward(g, s, n, None, grads)


def cross_backward(dh2: Tensor, s: Tensor, norms: Norms, g: Tensor, grads: ParameterGradients) -> Tensor:
    """Gradient [M, d] of a, and of the kept rows besides attention, from dh2 by way of the MLP and g of `base`."""
    if norms[0].after:
        return norm_backward(dh2 + g, s, norms[0], None, grads)
    return norm_backward(dh2, s, norms[1], g, grads)


# As many arguments as the operator for the norm has.
def enter_backward(
    dx: Tensor,
    rows: Tensor | None,
    dh: Tensor,
    kept: Tensor,
    n: NormWeights,
    extra: Tensor | None,
    accumulate: bool,
    grads: ParameterGradients,
) -> None:
    """Adds the gradient of the kept rows, from that of h plus `extra`, to the rows of dx (None: to all), or (not
    `accumulate`) puts it in their place."""
    if not n.after:
        norm_backward_into(dx, rows, dh, kept, n, extra, accumulate, grads)
    elif rows is None:
        assert extra is None and accumulate
        dx.add_(dh)
    elif accumulate:
        ops.scatter_add_(dx, rows, dh if extra is None else dh + extra)
    else:
        ops.scatter_add_(dx, rows, dh, torch.zeros_like(dh) if extra is None else extra)


def norm_backward_into(
    dx: Tensor,
    rows: Tensor | None,
    dy: Tensor,
    s: Tensor,
    n: NormWeights,
    extra: Tensor | None,
    accumulate: bool,
    grads: ParameterGradients,
) -> None:
    """As `norm_backward`, added to the rows of dx (None: to all), or (not `accumulate`) in place of them."""
    dw, db = ops.gather_norm_backward_(
        dx, rows, dy, s, n.operands[0], extra, n.kind, n.eps, accumulate, grads.wants(n.weight), grads.wants(n.bias)
    )
    grads.add((n.weight, n.bias), (dw, db))
