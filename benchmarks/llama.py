"""Llama shapes with random weights, LoRA around them, and the ways to train them that are compared.

All models of one process share one set of base weights: contestants start from the same numbers, a check can compare
their losses, and none pays for another's copy.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1000,
    },
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LIGER, PLAIN = "transformers + PEFT + Liger", "transformers + PEFT"


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


def make_base(shape: str, layers: int | None = None) -> Base:
    """bf16 on the GPU, fp32 on the CPU; matrices are normal with deviation 0.02, norms are 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(
        **values, max_position_embeddings=1 << 20, attn_implementation="sdpa", tie_word_embeddings=False
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        sizes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    weights = {}
    for name, size in sizes.items():
        made = torch.empty(size, dtype=dtype, device=device)
        weights[name] = made.fill_(1.0) if "norm" in name else made.normal_(0.0, 0.02, generator=generator)
    named = shape if layers in (None, SHAPES[shape]["num_hidden_layers"]) else f"{shape}, {layers} layers"
    return Base(named, config, device, weights)


def make_model(base: Base) -> Any:
    """A transformers model over the shared weights."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(base.config)
    model.load_state_dict(base.weights, assign=True)
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


def missing_liger() -> str | None:
    """Why Liger cannot run here, or None."""
    if not torch.cuda.is_available():
        return "liger-kernel needs a GPU"
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return "liger-kernel is not installed (pip install liger-kernel: one pure Python wheel)"
    return None


@contextmanager
def _liger(model: Any) -> Iterator[None]:
    """Liger's kernels in one model. It also exchanges names in transformers' module, which are put back."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    before = {name: getattr(modeling_llama, name) for name in names}
    try:
        apply_liger_kernel_to_llama(model=model)
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_llama, name, value)


@contextmanager
def peer(base: Base, name: str, recompute: str) -> Iterator[tuple[Any, None]]:
    """What a user would train without lemo: with the fastest attention PyTorch has, cuDNN first, then FlashAttention.

    recompute: "full" (gradient checkpointing) or "none". Yields (model, None): nothing controls it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = make_model(base)
    with ExitStack() as stack:
        if name == LIGER:
            stack.enter_context(_liger(model))
        if base.cuda:
            backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
            stack.enter_context(sdpa_kernel(backends, set_priority=True))
        wrapped = with_adapters(model)
        if recompute == "full":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        yield wrapped, None


@contextmanager
def ours(base: Base, config: Any) -> Iterator[tuple[Any, Any]]:
    """The same model under `lemo.apply`. Yields (model, controller)."""
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
    weights = sum(w.numel() * w.element_size() for w in base.weights.values())
    left = (torch.cuda.memory_allocated() - weights) >> 20
    if left > 256:
        print(f"warning: {left} MiB of an earlier contestant are still allocated", file=sys.stderr, flush=True)
