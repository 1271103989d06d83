"""Shapes of known models with random weights, LoRA around them, and lemo on top.

All models of one process share one set of base weights: contestants start from the same numbers, a check can compare
their losses, and none pays for another's copy.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LLAMA = {"family": "llama", "max_position_embeddings": 1 << 20, "tie_word_embeddings": False}
# Positions of OPT are learned: as many as the longest document that is measured with the shape. No dropout: lemo would
# draw it like the peer, but the check of its gradients could not be exact.
_OPT = {"family": "opt", "vocab_size": 50272, "tie_word_embeddings": True, "dropout": 0.0}
SHAPES = {
    "llama3-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama2-7b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "opt-6.7b": _OPT
    | {
        "hidden_size": 4096,
        "word_embed_proj_dim": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 8192,
    },
    "opt-1.3b": _OPT
    | {
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "max_position_embeddings": 16384,
    },
    "opt-350m": _OPT
    | {
        "hidden_size": 1024,
        "word_embed_proj_dim": 512,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 32768,
        "do_layer_norm_before": False,
    },
    # demo/model, and a shape at which the host is the limit as well.
    "demo": _LLAMA
    | {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": _LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "tiny": _LLAMA
    | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1000,
    },
    "tiny-opt": _OPT
    | {
        "hidden_size": 128,
        "word_embed_proj_dim": 128,
        "ffn_dim": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
    },
}
_TINY_OPT = SHAPES["tiny-opt"]
SHAPES["tiny-opt-350m"] = _TINY_OPT | {"word_embed_proj_dim": 64, "do_layer_norm_before": False}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"]  # the last one is OPT's name of o_proj


@dataclass(frozen=True)
class Base:
    """The frozen weights of one shape, made on the device itself."""

    name: str
    config: Any
    device: torch.device
    weights: dict[str, Tensor]

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def _classes(family: str) -> tuple[Any, Any]:
    import transformers

    names = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "opt": ("OPTConfig", "OPTForCausalLM")}[family]
    return getattr(transformers, names[0]), getattr(transformers, names[1])


def make_base(shape: str, layers: int | None = None) -> Base:
    """bf16 on the GPU, fp32 on the CPU; matrices are normal with deviation 0.02, norms are 1, biases 0."""
    values = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    make_config, model = _classes(values.pop("family"))
    config = make_config(**values, attn_implementation="sdpa")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        sizes = {name: tensor.shape for name, tensor in model(config).state_dict().items()}
    weights: dict[str, Tensor] = {}
    for name, size in sizes.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            weights[name] = next(w for n, w in weights.items() if n.endswith("embed_tokens.weight"))
            continue
        made = torch.empty(size, dtype=dtype, device=device)
        if name.endswith("bias"):
            made.zero_()
        else:
            made = made.fill_(1.0) if "norm" in name else made.normal_(0.0, 0.02, generator=generator)
        weights[name] = made
    named = shape if layers in (None, SHAPES[shape]["num_hidden_layers"]) else f"{shape}, {layers} layers"
    return Base(named, config, device, weights)


def make_model(base: Base) -> Any:
    """A transformers model over the shared weights."""
    with torch.device("meta"):
        model = _classes(base.config.model_type)[1](base.config)
    model.load_state_dict(base.weights, assign=True)
    model.tie_weights()
    if hasattr(model.model, "rotary_emb"):
        # Not among the weights. Rotary frequencies are in fp32, as in a model that was loaded.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=base.config).to(base.device)
    model.config.use_cache = False
    return model


def with_adapters(model: Any) -> Any:
    """LoRA r=8 on q, k, v, o in PEFT's own type (fp32), the same numbers for every contestant."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, settings)
    torch.manual_seed(1)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:  # B is zero at initialization: the gradient of A would vanish
            nn.init.normal_(p, std=0.02)
    return wrapped.train()


@contextmanager
def ours(base: Base, config: Any) -> Iterator[tuple[Any, Any]]:
    """The model under `lemo.apply`. Yields (model, controller)."""
    import lemo

    wrapped = with_adapters(make_model(base))
    controller = lemo.apply(wrapped, config)
    try:
        yield wrapped, controller
    finally:
        lemo.remove(wrapped)


def release(base: Base) -> None:
    """Frees what the last contestant had; says so if something stayed, which the next one would be charged for."""
    gc.collect()
    if not base.cuda:
        return
    torch.cuda.empty_cache()
    weights = sum(w.numel() * w.element_size() for w in {id(w): w for w in base.weights.values()}.values())
    left = (torch.cuda.memory_allocated() - weights) >> 20
    if left > 256:
        print(f"warning: {left} MiB of an earlier contestant are still allocated", file=sys.stderr, flush=True)
