"""How many operators a layer dispatches in a training step: on a GPU each is a launch, and small models wait for them.

Counted, not timed, and by the difference between two depths, so that what a step does once does not count. Bounds are
what a step needs today; a number that grew has a reason, which the commit that raises it gives.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import lemo
import pytest
import torch
from lemo.engine.linear import LinearGroup
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

# Operators that compute nothing: views, and memory without contents.
FREE = {"detach", "view", "_unsafe_view", "t", "transpose", "slice", "select", "expand", "unsqueeze", "alias", "split"}
FREE |= {"split_with_sizes", "empty", "new_empty", "empty_like"}
SHALLOW, DEEP = 2, 5


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().rpartition("::")[2].partition(".")[0]
        if name not in FREE:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def step(layers: int, phase: lemo.Phase | None, recompute: Any = "none", targets: Any = ("q", "k", "v", "o")) -> Count:
    """Operators of one step of a model with adapters on the targets; phase None: without lemo."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 40}
    model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, **sizes))
    model = get_peft_model(model, LoraConfig(target_modules=[f"{name}_proj" for name in targets])).train()
    if phase is not None:
        lemo.apply(model, lemo.LemoConfig(block_size=4, phases=[phase], recompute=recompute))
    ids = torch.arange(32)[None] % 40
    with Count() as count:
        model(input_ids=ids, labels=ids).loss.backward()
    return count


def a_layer(*args: Any) -> Counter[str]:
    """Of one layer; fails unless all layers are alike."""
    shallow, deep = step(SHALLOW, *args).found, step(DEEP, *args).found
    added = deep - shallow
    assert all(number % (DEEP - SHALLOW) == 0 for number in added.values()), added
    return Counter({name: number // (DEEP - SHALLOW) for name, number in added.items()})


DENSE = lemo.Phase("dense")
SHARED = lemo.Phase("skip", policy="random", policy_options={"shared": True})
SKIP, UPDATES = lemo.Phase("skip", policy="random"), lemo.Phase("skip", policy="update_norm")
ALL = ("q", "k", "v", "o", "gate", "up", "down")
# Of a layer with LoRA on q, k, v and o: 7 products with weights and 6 with adapters (q, k and v share the first) in the
# forward pass, as many for the input's gradient, 6 for the adapters', and 18 others. Inputs of adapters are not saved:
# with "none", one more operator makes each of them again (outputs of the norms, and SwiGLU's for `down`).
BOUNDS = [
    pytest.param((DENSE,), 51, id="dense"),
    pytest.param((DENSE, "full"), 70, id="dense-full"),
    pytest.param((lemo.Phase("sparse", keys=128),), 51, id="sparse"),
    pytest.param((SHARED,), 51, id="skip-shared"),
    pytest.param((SHARED, "full"), 70, id="skip-shared-full"),
    # A separate list for every layer: drawing it, reading its sizes, noting which tokens took part.
    pytest.param((SKIP,), 60, id="skip"),
    pytest.param((SKIP, "full"), 79, id="skip-full"),
    pytest.param((UPDATES,), 69, id="update-norm"),
    pytest.param((DENSE, "none", ALL), 72, id="all-projections"),
]


@pytest.mark.parametrize(("setting", "most"), BOUNDS)
def test_a_layer_dispatches_few_operators(setting, most) -> None:
    found = a_layer(*setting)
    assert found.total() <= most, f"{found.total()} operators a layer: {dict(found)}"


def test_fewer_than_without_lemo() -> None:
    assert a_layer(DENSE).total() < a_layer(None).total() / 2


def test_adapters_in_another_dtype_are_cast_at_once() -> None:
    """Float32 adapters of a bfloat16 model, as PEFT makes them: one launch for q, k and v, one for o, and each again
    for the gradients; adapters of one input are one product."""
    torch.manual_seed(0)
    h = torch.randn(12, 16, dtype=torch.bfloat16)
    sizes, ranks = (16, 8, 8), (4, 2, 3)
    weights = [torch.randn(o, 16, dtype=torch.bfloat16) for o in sizes]
    a = [torch.randn(r, 16, requires_grad=True) for r in ranks]
    b = [torch.randn(o, r, requires_grad=True) for o, r in zip(sizes, ranks, strict=True)]
    parts = [p for w, x, y in zip(weights, a, b, strict=True) for p in (w, None, x, y, None)]
    scales = [(0.5, None), (2.0, None), (3.0, None)]
    with Count() as count:
        outputs = LinearGroup.apply(h.requires_grad_(), scales, True, None, *parts)
        found = torch.autograd.grad(sum(y.float().sum() for y in outputs), [h, *a, *b])
    assert count.found["_foreach_copy_"] == 2 and count.found["cat"] == 0
    leaves = [t.detach().double().requires_grad_() for t in (h, *a, *b)]
    x, p, q = leaves[0], leaves[1:4], leaves[4:]
    total: Any = sum(
        (x @ w.double().t() + s * (x @ u.t()) @ v.t()).sum()
        for w, u, v, (s, _) in zip(weights, p, q, scales, strict=True)
    )
    for got, expected in zip(found, torch.autograd.grad(total, leaves), strict=True):
        assert (got.double() - expected).norm() < 0.02 * expected.norm()
