"""Qwen3-MoE: Qwen3's attention, and a mixture of experts in place of the MLP, in all layers of the published models.

Adapters are for attention, and for the MLPs of layers that have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lemo.engine.experts import Stacked, balance, experts, route, row_statistics
from lemo.engine.families.base import Classes, Experts, ModelShape, refuse
from lemo.engine.families.llama import SILU, swiglu
from lemo.engine.families.qwen3 import Qwen3
from lemo.engine.linear import ordinary, unwrap


class Qwen3MoE(Qwen3):
    name, model_type = "Qwen3Moe", "qwen3_moe"
    liger = frozenset({"LigerRMSNorm", "LigerQwen3MoeSwiGLUMLP"})

    @cached_property
    def layer_modules(self) -> Mapping[str, Classes]:
        own = {"mlp": self.own("MLP") + self.own("SparseMoeBlock")}
        return {**super().layer_modules, **own, **self._sparse_modules}

    @property
    def _sparse_modules(self) -> dict[str, Classes]:
        return {"mlp.gate": self.own("TopKRouter"), "mlp.experts": self.own("Experts")}

    def layer_modules_of(self, layer: Any) -> Mapping[str, Classes]:
        names = self.layer_modules
        return names if _sparse(layer) else {name: names[name] for name in names if name not in self._sparse_modules}

    def shape(self, config: Any) -> ModelShape:
        sparse = tuple(
            i
            for i in range(config.num_hidden_layers)
            if config.num_experts > 0 and i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
        )
        mixture = Experts(
            count=config.num_experts,
            per_token=config.num_experts_per_tok,
            ffn=config.moe_intermediate_size,
            layers=sparse,
            normed=bool(config.norm_topk_prob),
        )
        return replace(super().shape(config), experts=mixture if sparse else None)

    def window(self, config: Any, layer: int) -> int | None:
        return config.sliding_window

    def check(self, lm: Any) -> None:
        super().check(lm)
        layers: list[Any] = self.layers(self.decoder(lm))
        for i, layer in enumerate(layers):
            # PEFT makes them of the names gate_proj, up_proj and down_proj as well.
            if _sparse(layer) and hasattr(layer.mlp.experts, "base_layer"):
                refuse(
                    f"adapters of experts ({self.layers_path}.{i}.mlp.experts)",
                    f"put them on attention: target_modules={list(self.lora_targets)}",
                )

    def check_layer(self, layer: Any, path: str) -> None:
        super().check_layer(layer, path)
        if _sparse(layer) and getattr(layer.mlp.experts, "_is_expert_parallel", False):
            refuse(f"experts on several devices ({path}.mlp.experts)", "load the model without a plan of parallelism")

    def mlp_modules(self, layer: Any) -> Sequence[nn.Module]:
        if not _sparse(layer):
            return super().mlp_modules(layer)
        return layer.mlp.gate, layer.mlp.experts, layer.mlp.experts.act_fn

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor | tuple[Tensor, Tensor]:
        if not _sparse(layer):
            return swiglu(unwrap(layer.mlp), h, want_output)
        router, mixture = layer.mlp.gate, layer.mlp.experts
        logits = F.linear(h, router.weight.to(h.dtype))
        probabilities, index, weights = route(logits, router.top_k, router.norm_topk_prob)
        if ordinary(mixture.act_fn, *SILU) and not any(p.requires_grad for p in mixture.parameters()):
            stacked = Stacked(mixture.gate_up_proj.transpose(1, 2), mixture.down_proj.transpose(1, 2))
            y = experts(h, index, weights, stacked, want_output=want_output)
        else:
            y = mixture(h, index, weights)
        return (y, row_statistics(probabilities, index)) if layer.self_attn.config.output_router_logits else y

    def decoder_output(self, hidden: Tensor) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=hidden)

    def auxiliary_loss(self, config: Any, statistics: Tensor) -> Tensor | None:
        """The balance of the experts' load, over the rows of all layers together."""
        return config.router_aux_loss_coef * balance(statistics, config.num_experts)


def _sparse(layer: Any) -> bool:
    return hasattr(unwrap(layer.mlp), "experts")
