"""A family made up for tests: mixtures of two experts with a router's loss, norms that multiply by 1 + weight, and
soft-capped logits. It exercises the seams of `Family` that no supported model needs yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lemo.engine.checks
import lemo.engine.families
import pytest
import torch
import torch.nn.functional as F
from lemo.engine.families.base import Classes
from lemo.engine.families.llama import Llama, swiglu
from lemo.engine.linear import linear_group
from support import reference
from support.models import VOCAB, lora
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

EXPERTS, COEFFICIENT, SOFTCAP = 2, 3.0, 4.0
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ToyRMSNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden) * 0.2)
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1.0 + self.weight, self.variance_epsilon)


class ToyMoE(nn.Module):
    """Every row goes through the expert its router prefers. seen: what it was called with, as statistics of rows."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = nn.ModuleList(modeling_llama.LlamaMLP(config) for _ in range(EXPERTS))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y, statistics = mixture(self.router(x), [expert(x) for expert in self.experts])
        self.seen.append(statistics)
        return y


def mixture(logits: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The output, and of every row: probabilities, which expert it went to, and 1."""
    p = logits.float().softmax(-1)
    chosen = F.one_hot(p.argmax(-1), EXPERTS).to(p)
    weights = (p * chosen).to(logits.dtype)
    y = sum(weights[..., i : i + 1] * output for i, output in enumerate(outputs))
    return y, torch.cat((p, chosen, torch.ones_like(p[..., :1])), -1)


def balance(sums: Tensor) -> Tensor:
    """The router's loss from sums [L, S] of statistics: over the rows of all layers together."""
    p, chosen, count = sums.sum(0).split((EXPERTS, EXPERTS, 1))
    return COEFFICIENT * EXPERTS * (p / count.clamp(min=1) * chosen / count.clamp(min=1)).sum()


class ToyForCausalLM(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ToyMoE(config)
            layer.input_layernorm = ToyRMSNorm(config.hidden_size)
            layer.post_attention_layernorm = ToyRMSNorm(config.hidden_size)
        self.model.norm = ToyRMSNorm(config.hidden_size)


class Toy(Llama):
    norm_offset = 1.0

    def matches(self, lm: nn.Module) -> bool:
        return type(lm) is ToyForCausalLM

    @property
    def outer_modules(self) -> Mapping[str, Classes]:
        return {**super().outer_modules, "model.norm": ((__name__, "ToyRMSNorm"),)}

    @property
    def layer_modules(self) -> Mapping[str, Classes]:
        norm: Classes = ((__name__, "ToyRMSNorm"),)
        own = {"mlp": ((__name__, "ToyMoE"),), "input_layernorm": norm, "post_attention_layernorm": norm}
        return {**super().layer_modules, **own}

    def logit_softcap(self, config: Any) -> float:
        return SOFTCAP

    def mlp_modules(self, layer: Any) -> Sequence[nn.Module]:
        experts = [(e.gate_proj, e.up_proj, e.down_proj, e.act_fn) for e in layer.mlp.experts]
        return (layer.mlp.router, *(module for expert in experts for module in expert))

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> tuple[Tensor, Tensor]:
        moe = layer.mlp
        return mixture(linear_group((moe.router,), h)[0], [swiglu(expert, h) for expert in moe.experts])

    def auxiliary_loss(self, config: Any, statistics: Tensor) -> Tensor | None:
        return balance(statistics) if config.router else None


class Reference(reference.Model):
    """The toy in plain torch: `loss` is the total one, over what the experts saw."""

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm.lm_head(self.decoder.norm(x))
        return F.cross_entropy(SOFTCAP * torch.tanh(logits / SOFTCAP), targets) + balance(self.sums())

    def sums(self) -> Tensor:
        return torch.stack([torch.cat(layer.mlp.seen).sum(0) for layer in self.decoder.layers])


@pytest.fixture
def toy(monkeypatch):
    """Makes models of the toy family, LoRA on every projection, routers and norms trained; lemo knows it meanwhile."""
    monkeypatch.setattr(lemo.engine.families, "FAMILIES", (*lemo.engine.families.FAMILIES, Toy()))
    monkeypatch.setattr(lemo.engine.checks, "_TRUSTED", (*lemo.engine.checks._TRUSTED, __name__))

    def make(layers: int = 3, **options: Any) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCAB, initializer_range=0.2, **{"router": True, **options},
        )  # fmt: skip
        model = lora(ToyForCausalLM(config), PROJECTIONS).train()
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or "router" in name or "norm" in name)
        return model

    return make
