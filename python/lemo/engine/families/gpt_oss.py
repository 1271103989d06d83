"""gpt-oss: sinks in every head's softmax, a window in every other layer, biases, and in every layer a mixture of
experts whose gates are clamped. Router and experts are frozen in the cheap path; adapters are for attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemo.engine.experts import Stacked, balance, clamped_swiglu, experts, row_statistics
from lemo.engine.families.base import AttentionOptions, Classes, Experts, ModelShape, Tables, refuse
from lemo.engine.families.llama import Llama


class GptOss(Llama):
    name, model_type = "GptOss", "gpt_oss"
    projections: Mapping[str, str] = {f"{role}_proj": role for role in ("q", "k", "v", "o")}

    @cached_property
    def layer_modules(self) -> Mapping[str, Classes]:
        return {**super().layer_modules, "mlp.router": self.own("TopKRouter"), "mlp.experts": self.own("Experts")}

    def loading(self, config: Any) -> dict[str, Any]:
        # The only attention of transformers' own that knows sinks.
        arguments: dict[str, Any] = {"attn_implementation": "eager"}
        if getattr(config, "quantization_config", None) is not None:
            from transformers import Mxfp4Config

            arguments["quantization_config"] = Mxfp4Config(dequantize=True)
        return arguments

    def shape(self, config: Any) -> ModelShape:
        shape, count = super().shape(config), config.num_local_experts
        mixture = Experts(
            count=count,
            per_token=config.num_experts_per_tok,
            ffn=config.intermediate_size,
            layers=tuple(range(config.num_hidden_layers)),
            normed=None,
        )
        # Sinks, and the biases of router and experts.
        biases = shape.heads + count * (1 + 2 * mixture.ffn + shape.hidden)
        return replace(shape, experts=mixture, inner_parameters=biases)

    def check(self, lm: Any) -> None:
        super().check(lm)
        layers: list[Any] = self.layers(self.decoder(lm))
        for i, layer in enumerate(layers):
            path = f"{self.layers_path}.{i}.mlp"
            if "Mxfp4" in f"{type(layer.mlp).__name__} {type(layer.mlp.experts).__name__}":
                refuse(
                    f"experts in mxfp4 ({path}.experts)",
                    "load the model with quantization_config=Mxfp4Config(dequantize=True): in 16 bits a weight",
                )
            if hasattr(layer.mlp.experts, "base_layer"):
                refuse(
                    f"adapters of experts ({path}.experts)",
                    f"put them on attention: target_modules={list(self.lora_targets)}",
                )

    def check_layer(self, layer: Any, path: str) -> None:
        super().check_layer(layer, path)
        if getattr(layer.mlp.experts, "_is_expert_parallel", False):
            refuse(f"experts on several devices ({path}.mlp.experts)", "load the model without a plan of parallelism")

    def attention_options(self, layer: Any) -> AttentionOptions:
        return replace(super().attention_options(layer), sinks=layer.self_attn.sinks)

    def mlp_modules(self, layer: Any) -> Sequence[nn.Module]:
        return layer.mlp.router, layer.mlp.experts

    def tables(self, decoder: Any, x: Tensor, positions: Tensor) -> Tables:
        # transformers' have one column for both elements that are rotated together.
        return tuple(torch.cat((t[0], t[0]), -1) for t in decoder.rotary_emb(x[None], positions[None]))

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor | tuple[Tensor, Tensor]:
        router, mixture = layer.mlp.router, layer.mlp.experts
        logits = F.linear(h, router.weight.to(h.dtype), router.bias.to(h.dtype))
        largest, index = logits.topk(router.top_k, -1)
        weights = largest.softmax(-1)
        if any(p.requires_grad for p in mixture.parameters()):
            y = mixture(h, index, weights)
        else:
            stacked = Stacked(
                mixture.gate_up_proj, mixture.down_proj, mixture.gate_up_proj_bias, mixture.down_proj_bias
            )
            y = experts(h, index, weights, stacked, clamped_swiglu(mixture.alpha, mixture.limit), want_output)
        if not layer.self_attn.config.output_router_logits:
            return y
        return y, row_statistics(logits.softmax(-1, dtype=torch.float32), index)

    def decoder_output(self, hidden: Tensor) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=hidden)

    def auxiliary_loss(self, config: Any, statistics: Tensor) -> Tensor | None:
        return config.router_aux_loss_coef * balance(statistics, config.num_local_experts)
