"""Tiny models, batches and comparisons for the engine's tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

VOCAB = 89
ATTENTION = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "opt": ["q_proj", "k_proj", "v_proj", "out_proj"]}
LINEARS = {
    "llama": [*ATTENTION["llama"], "gate_proj", "up_proj", "down_proj"],
    "opt": [*ATTENTION["opt"], "fc1", "fc2"],
}


def base(family: str, layers: int = 3, **options: Any):
    """A random model in fp32: grouped queries, head_dim 8."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    if family == "llama":
        config = {"intermediate_size": 40, "num_key_value_heads": 2, "initializer_range": 0.2, **common, **options}
        return LlamaForCausalLM(LlamaConfig(**config))
    config = {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32, "init_std": 0.2, **common, **options}
    return OPTForCausalLM(OPTConfig(max_position_embeddings=128, **config))


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


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Relative error of every tensor in the 2-norm."""
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.2e}"


def clone(model):
    return copy.deepcopy(model)
