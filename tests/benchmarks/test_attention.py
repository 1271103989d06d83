"""The benchmark of attention: its peer with options computes what ours does, and how work is counted and shown."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lemo.engine.layout import Blocks, Kept

OPTIONS = {
    "window": {"window": 40},
    "sinks": {"window": 16, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "softcap": {"softcap": 2.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_peer_with_options_computes_the_same(
    module: Callable[[str], Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import flex_attention

    attention, peers = module("attention"), module("peers")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # which refuses gradients on the CPU
    monkeypatch.setattr(peers, "_flex", lambda: flex_attention.flex_attention)
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(150, heads, 64) for heads in (4, 2, 2, 4))
    ours = attention.Lemo(
        (q, k, v, dout), Kept.everything(Blocks.from_lengths([150], 128, "cpu")), False, None, None, None, options
    )
    theirs = peers.flex_with_options(q, k, v, dout, **options)
    out = theirs["forward"]()
    assert torch.allclose(out[0].transpose(0, 1), ours.out, atol=1e-5)
    ours.passes["backward"]()
    gradients = theirs["backward"]()
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=False):
        assert torch.allclose(gradient[0].transpose(0, 1), ours.gradients[name], atol=1e-4), name


def test_work_is_that_of_the_visible_pairs(module: Callable[[str], Any]) -> None:
    attention = module("attention")
    full = attention.Optioned("a", 4096, 32, 8, 128)
    assert full.share == 1.0 and attention.Optioned("a", 4096, 8, 4, 128).share == 0.25
    near = attention.Optioned("a", 4096, 32, 8, 128, window=1024)
    pairs = sum(min(i + 1, 1024) for i in range(4096))
    assert near.share == pytest.approx(pairs / (4096**2 / 2), rel=1e-3)


def test_the_table(module: Callable[[str], Any]) -> None:
    attention, pages = module("attention"), module("attention_pages")
    row = attention.Optioned("gpt-oss 20B", 16384, 64, 8, 64, window=128, sinks=True).row
    row |= {"pass": "forward", "ms": 0.5, "tflops": 300.4, "peer": "flex", "peer_ms": 1.0, "ratio": 2.0}
    plain = attention.Optioned("Gemma 3 4B", 16384, 8, 4, 256).row | {key: row[key] for key in row.keys() - {"case"}}
    plain |= {"window": 0, "sinks": False}
    title, header, rows = pages.options({"gpu": "NVIDIA H200", "rows": [row, plain]})
    assert "NVIDIA H200" in title and all(len(cells) == len(header) for cells in rows)
    assert rows[0] == ["gpt-oss 20B", "16K", "64/8", "64", "window 128, sinks", *rows[0][5:]]
    assert rows[0][5:] == ["forward", "0.500", "300", "flex", "1.000", "2.00"] and rows[1][4] == "none"
