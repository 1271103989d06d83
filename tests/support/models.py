"""Tiny models, batches and comparisons for the engine's tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB = 89


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model. separates: whether transformers itself keeps packed documents apart; counts_padding:
    whether it gives padding on the left a position; kernels: options for tests on CUDA, with a size of heads that the
    kernels have; outside: linear layers of the decoder outside its layers."""

    model: Any
    config: Any
    attention: list[str]
    mlp: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    separates: bool = True
    counts_padding: bool = True
    kernels: dict[str, Any] = field(default_factory=lambda: {"num_key_value_heads": 1})
    outside: tuple[str, ...] = ()


ROTARY: dict[str, Any] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
# Head sizes that the kernels have, for families whose head size is a setting.
HEADS_OF_128 = {"num_key_value_heads": 1, "head_dim": 128}
HEADS_OF_256 = {"num_key_value_heads": 1, "head_dim": 256}
# Rounding to 16 bits would choose other experts for some of the rows.
EVERY_EXPERT = {"num_experts_per_tok": 5}
GATED = {"intermediate_size": 40, "num_key_value_heads": 2, "initializer_range": 0.2}
# Windows that documents of these tests exceed, in some of the layers.
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {**GATED, "head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24, "layer_types": ALTERNATING}
# Every family that lemo supports; a new one is a line here. tests/engine/test_every_family.py compares each one with
# transformers' own layers, in every mode, with a few combinations of options that together touch everything a family
# defines (about 4 seconds a family). Give the model what sets the family apart: heads wider than hidden / heads, layers
# that differ, a window.
FAMILIES = {
    "llama": Tiny(LlamaForCausalLM, LlamaConfig, **ROTARY, options=GATED),
    # Heads wider than hidden / heads, and a window that no document of these tests reaches (test_families.py has those
    # that do).
    "mistral": Tiny(
        MistralForCausalLM,
        MistralConfig,
        **ROTARY,
        options={**GATED, "head_dim": 16, "sliding_window": 1024},
        kernels={**HEADS_OF_128, "sliding_window": 150},
    ),
    "ministral": Tiny(
        MinistralForCausalLM,
        MinistralConfig,
        **ROTARY,
        options={**GATED, "head_dim": 8, "sliding_window": 12, "layer_types": ALTERNATING},
        kernels=HEADS_OF_128,
    ),
    "opt": Tiny(
        OPTForCausalLM,
        OPTConfig,
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        ["fc1", "fc2"],
        {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32, "init_std": 0.2, "max_position_embeddings": 128},
        separates=False,
        counts_padding=False,
        kernels={"word_embed_proj_dim": 128, "max_position_embeddings": 1024},
    ),
    # Norms behind the residual sums, embeddings of another width.
    "opt_350m": Tiny(
        OPTForCausalLM,
        OPTConfig,
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        ["fc1", "fc2"],
        {
            "ffn_dim": 48,
            "dropout": 0.0,
            "word_embed_proj_dim": 24,
            "do_layer_norm_before": False,
            "init_std": 0.2,
            "max_position_embeddings": 128,
        },
        separates=False,
        counts_padding=False,
        kernels={"word_embed_proj_dim": 64, "max_position_embeddings": 1024},
        outside=("project_in", "project_out"),
    ),
    "qwen2": Tiny(Qwen2ForCausalLM, Qwen2Config, **ROTARY, options=GATED),
    "qwen3": Tiny(Qwen3ForCausalLM, Qwen3Config, **ROTARY, options={**GATED, "head_dim": 16}, kernels=HEADS_OF_128),
    # Layers with experts, and one with an MLP.
    "qwen3_moe": Tiny(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        ROTARY["attention"],
        [],  # PEFT takes the names of an MLP's projections for those of experts
        options={
            **GATED,
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        kernels={**HEADS_OF_128, **EVERY_EXPERT},
    ),
    "gemma2": Tiny(
        Gemma2ForCausalLM,
        Gemma2Config,
        **ROTARY,
        options={
            **GEMMA,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
            "attn_implementation": "eager",
        },
        kernels=HEADS_OF_256,
    ),
    "gemma3_text": Tiny(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        **ROTARY,
        options=GEMMA,
        kernels={**HEADS_OF_256, "query_pre_attn_scalar": 256},  # with larger scores, rounding them matters
    ),
    # Gates that are clamped, sinks that matter.
    "gpt_oss": Tiny(
        GptOssForCausalLM,
        GptOssConfig,
        ROTARY["attention"],
        [],
        options={
            **GATED,
            "head_dim": 16,
            "sliding_window": 12,
            "layer_types": ALTERNATING,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "truncate": False,
            },
        },
        separates=False,
        kernels={"num_key_value_heads": 1, "head_dim": 64, **EVERY_EXPERT},
    ),
    "granite": Tiny(
        GraniteForCausalLM,
        GraniteConfig,
        **ROTARY,
        options={
            **GATED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.5,
        },
    ),
    # Half of a head is rotated.
    "phi3": Tiny(
        Phi3ForCausalLM,
        Phi3Config,
        ["qkv_proj", "o_proj"],
        ["gate_up_proj", "down_proj"],
        {**GATED, "pad_token_id": 0, "partial_rotary_factor": 0.5},
    ),
    # The second layer has no position embedding.
    "smollm3": Tiny(
        SmolLM3ForCausalLM, SmolLM3Config, **ROTARY, options={**GATED, "pad_token_id": 0, "no_rope_layer_interval": 2}
    ),
}
# The families that the tests of the engine run with: combinations of mode, recomputation, packing, adapters and
# surroundings depend on the engine, not on the family. Two suffice: one with rotary positions, a gated MLP and grouped
# queries, and one with none of these. Another joins them only if the engine itself takes another path for it.
LAYERS = ("llama", "opt")
# With the family for which the engine does: its norms are behind the residual sums (lemo.engine.residual).
NORM_PLACES = (*LAYERS, "opt_350m")
ATTENTION = {name: tiny.attention for name, tiny in FAMILIES.items()}
LINEARS = {name: [*tiny.attention, *tiny.mlp] for name, tiny in FAMILIES.items()}


def base(family: str, layers: int = 3, **options: Any) -> Any:
    """A random model in fp32: grouped queries, head_dim 8 (Mistral: 16). Biases are random too."""
    torch.manual_seed(0)
    tiny = FAMILIES[family]
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    model = tiny.model(tiny.config(**{**tiny.options, **common, **options}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "sinks")):  # transformers makes them zero, or small
                p.normal_(std=0.2)
            elif "norm" in name:  # and these all alike
                p.add_(torch.randn_like(p), alpha=0.2)
    return model


def lora(model, targets: list[str], **options: Any):
    """LoRA with both matrices random, so that no gradient is zero by construction."""
    torch.manual_seed(1)
    return get_peft_model(
        model,
        LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options
        ),
    )


def tuned(family: str, **options: Any):
    return lora(base(family, **options), ATTENTION[family]).train()


def batch(kind: str) -> dict[str, Tensor]:
    """ids, labels and what says where documents lie: "plain", "right", "left" (padding), "packed", "lengths"."""
    torch.manual_seed(2)
    shape = (1, 50) if kind in ("packed", "lengths") else (3, 37)
    ids = torch.randint(3, VOCAB, shape)
    labels = ids.clone()
    labels[:, ::7] = -100
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if kind in ("right", "left"):
        mask = torch.ones(shape, dtype=torch.long)
        for row, n in enumerate((0, 9, 30)):
            gone = slice(shape[1] - n, None) if kind == "right" else slice(0, n)
            mask[row, gone] = 0
            labels[row, gone] = -100
            if kind == "left":  # transformers predicts the first token from padding unless it is masked
                labels[row, n] = -100
        inputs["attention_mask"] = mask
    if kind in ("packed", "lengths"):
        lengths = [17, 1, 32]
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        inputs["use_cache"] = False  # with a cache, transformers does not look for documents
        if kind == "lengths":
            inputs["cu_seq_lens_q"] = torch.tensor([0, 17, 18, 50], dtype=torch.int32)
    return inputs


def gradients(model, inputs: dict[str, Tensor], scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    (loss * scale).backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Relative error of every tensor in the 2-norm. Sums of float32 in another order, as processors differ in, move the
    smallest gradients by 1.1e-5."""
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.2e}"


def clone(model):
    return copy.deepcopy(model)


def packed(family: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed ids, shifted targets, positions and documents of a batch, as the reference models take them."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    document = torch.arange(mask.shape[0])[:, None].expand(mask.shape)[mask]
    if "position_ids" in inputs:
        positions = inputs["position_ids"][mask]
        document = document + (positions == 0).cumsum(0)
    elif FAMILIES[family].counts_padding:
        positions = torch.arange(mask.shape[1]).expand(mask.shape)[mask]
    else:
        positions = (mask.long().cumsum(1) * mask - 1)[mask]
    return inputs["input_ids"][mask], targets[mask], positions, document


def reference_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that was made from the model's parameters."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
