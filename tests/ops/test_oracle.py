"""The oracle against torch's own operations: a reference has to be right before it judges."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.attention_cases import ATTENTION
from support.cases import LOSS, NORMS, PACKINGS, PREDICT, SCORES, leaf, name_of


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", [c for c in ATTENTION if not c.given and c.storage == "packed"], ids=name_of)
def test_attention(case) -> None:
    t = case.inputs("cpu", torch.float32)
    q, k, v = leaf(t["q"]), leaf(t["k"]), leaf(t["v"])
    ends = t["cu_seqlens"].tolist()
    key_ends = t["cu_seqlens_k"].tolist() if case.split else None
    parts = []
    for (a, b), (c, d) in zip(itertools.pairwise(ends), itertools.pairwise(key_ends or ends), strict=True):
        blank = max(0, (b - a) - (d - c))  # the first queries see no key
        one = [x.transpose(0, 1)[None] for x in (q[a + blank : b], k[c:d], v[c:d])]
        mask = torch.ones(b - a - blank, d - c, dtype=torch.bool).tril((d - c) - (b - a - blank))
        seen = F.scaled_dot_product_attention(*one, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        parts += [q.new_zeros(blank, *q.shape[1:]), seen]
    expected = torch.cat(parts)
    out, lse = oracle.attention(q, k, v, ends, case.dim**-0.5, cu_seqlens_k=key_ends)
    equal(out, expected)
    found = torch.autograd.grad(expected, (q, k, v), t["dout"].double())
    # With its own output and LSE and no weights, the header's backward pass is the ordinary gradient.
    given = oracle.attention_backward(t["dout"], q, k, v, out, lse, ends, case.dim**-0.5, cu_seqlens_k=key_ends)
    for a, b in zip(given, found, strict=True):
        equal(a, b)


def test_attention_weights_of_all_blocks_give_the_dense_gradient_on_average() -> None:
    """Weights 1/p make the restricted gradient unbiased: its mean over all selections is the dense gradient."""
    torch.manual_seed(0)
    n, block = 12, 4
    q, k, v, dout = (torch.randn(n, 1, 8, dtype=torch.float64) for _ in range(4))
    out, lse = oracle.attention(q, k, v, [0, n], 0.3)
    dense = oracle.attention_backward(dout, q, k, v, out, lse, [0, n], 0.3)
    blocks, p = n // block, 0.5
    mean = [torch.zeros_like(x) for x in (q, k, v)]
    for subset in itertools.product((False, True), repeat=blocks):
        kept = [b for b in range(blocks) if subset[b]]
        if not kept:
            continue
        rows = torch.cat([torch.arange(b * block, (b + 1) * block) for b in kept])
        slots = torch.arange(len(kept)).repeat_interleave(block)
        weights = torch.full((len(kept),), 1 / p, dtype=torch.float64)
        # dout carries the weight of the query, as the branch gradient of a kept token does.
        parts = oracle.attention_backward(
            dout[rows] / p,
            q[rows],
            k[rows],
            v[rows],
            out[rows],
            lse[:, rows],
            [0, len(rows)],
            0.3,
            weights,
            slots,
        )
        probability = p ** len(kept) * (1 - p) ** (blocks - len(kept))
        for total, part in zip(mean, parts, strict=True):
            total[rows] += probability * part
    for a, b in zip(mean, dense, strict=True):
        equal(a, b)


@pytest.mark.parametrize("case", LOSS, ids=name_of)
def test_linear_cross_entropy(case) -> None:
    t = {n: x.double() if x.is_floating_point() else x for n, x in case.inputs("cpu", torch.float32).items()}
    weight = t["weight"] + (0.5 * t["lora_b"] @ t["lora_a"] if case.rank else 0)
    z = F.linear(t["hidden"], weight, t.get("bias"))
    z = case.softcap * torch.tanh(z / case.softcap) if case.softcap else z
    expected = F.cross_entropy(z, t["targets"], ignore_index=case.ignore_index, reduction=case.reduction)
    if case.ignored == "all":
        expected = torch.zeros_like(expected)  # torch's mean over nothing is NaN, lemo's is 0
    equal(case.expect(t)["loss"], expected)


@pytest.mark.parametrize("case", [c for c in NORMS if not c.rows and not c.residual], ids=name_of)
def test_norm(case) -> None:
    t = {n: x.double() for n, x in case.inputs("cpu", torch.float32).items()}
    x = leaf(t["x"])
    if case.norm == "rms":
        y = F.rms_norm(x, (case.d,), t.get("weight"), case.eps)
    else:
        y = F.layer_norm(x, (case.d,), t.get("weight"), t.get("bias"), case.eps)
    expected = case.expect(t)
    equal(expected["y"], y)
    equal(expected["ds"], torch.autograd.grad(y, x, t["dy"])[0])


@pytest.mark.parametrize("case", SCORES[:8], ids=name_of)
def test_block_scores_by_definition(case) -> None:
    t = case.inputs("cpu", torch.float32)
    q, k = t["q"].double(), t["k"].double()
    group = case.heads // case.kv_heads
    documents = PACKINGS[case.packing].documents
    expected = []
    for document in documents:
        for n, (j0, j1) in enumerate(document):
            total = torch.zeros((), dtype=torch.float64)
            for i0, i1 in document[n:]:
                best = torch.zeros((), dtype=torch.float64)
                for j in range(j0, j1):
                    i = torch.arange(max(i0, j), i1)
                    per_head = [(q[i, h] @ k[j, h // group] * case.dim**-0.5).clamp(min=0) for h in range(case.heads)]
                    if len(i):
                        best = torch.maximum(best, torch.stack(per_head).mean(0).max())
                total = total + best
            expected.append(total / (len(document) - n if case.normalize else 1))
    equal(case.expect(t)["scores"], torch.stack(expected))


@pytest.mark.parametrize("case", PREDICT[-4:], ids=name_of)
def test_predict_does_not_depend_on_later_blocks_of_other_documents(case) -> None:
    t = case.inputs("cpu", torch.float32)
    documents = PACKINGS[case.packing].documents
    scores, queries, keys = (case.expect(t)[n] for n in ("scores", "queries", "keys"))
    first = 0
    for document in documents:
        last = first + len(document)
        for n in range(first, last):
            total = sum(queries[m] @ keys[n] for m in range(n, last))
            equal(scores[n], total / (last - n if case.normalize else 1))
        first = last


def test_hash_is_splitmix64() -> None:
    # The first outputs of the published splitmix64 for seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [oracle.hash_uniform(1234567, i) for i in range(3)] == [((z >> 11) + 0.5) * 2.0**-53 for z in expected]
