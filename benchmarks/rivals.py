"""What a user would train with instead of lemo: a whole LoRA step, put together from the best that others offer.

All of them run transformers' layers with PEFT's adapters and the fastest attention that PyTorch has, cuDNN first, then
FlashAttention. They differ in the other kernels, in the loss, and in where the inputs of checkpointed layers wait for
the backward pass. None of TRL needs its trainer, whose step is this one with logging around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from models import Base, make_model, with_adapters
from torch import Tensor

PLAIN = "transformers + PEFT"
LIGER = f"{PLAIN} + Liger"
OFFLOAD = f"{LIGER} + TRL activation offloading"
TRL = f"{PLAIN} + TRL chunked loss"
# By the name that --peer gives.
PEERS = {"liger": LIGER, "liger-offload": OFFLOAD, "trl": TRL, "plain": PLAIN}
# Columns of logits that TRL 1.16's trainer computes at a time (trl.trainer.utils), and what it asks of the kernel.
_CHUNK, _OUTPUTS = 32768, ("log_probs", "entropy", "is_top1")


def missing(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    needed = [_missing_liger] if "Liger" in name else []
    needed += [_missing_trl] if "TRL" in name else []
    if name == OFFLOAD:
        needed += [_missing_gpu]
    return next((reason for look in needed if (reason := look()) is not None), None)


def _missing_gpu() -> str | None:
    return None if torch.cuda.is_available() else "activations are offloaded from a GPU"


def _missing_liger() -> str | None:
    if not torch.cuda.is_available():
        return "liger-kernel needs a GPU"
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return "liger-kernel is not installed (pip install liger-kernel: one pure Python wheel)"
    return None


def _missing_trl() -> str | None:
    try:
        from trl.kernels import ChunkedLogProbFunction  # noqa: F401
        from trl.models.activation_offloading import get_act_offloading_ctx_manager  # noqa: F401
        from trl.trainer import utils  # noqa: F401  (the loss's backward pass imports it)
    except ImportError as error:
        return f"trl 1.16 or later is not installed, or something that it needs ({error}; pip install trl)"
    return None


class Contestant:
    """A model as the benchmark calls it, if its loss or its surroundings are not those of the model itself."""

    def __init__(
        self, model: Any, loss: Callable[[Tensor], Tensor], around: AbstractContextManager[Any] | None
    ) -> None:
        self._model, self._loss, self._around = model, loss, around

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self._model.parameters()

    def __call__(self, input_ids: Tensor, labels: Tensor) -> Any:
        assert labels is input_ids, "every token is a label"
        with ExitStack() as stack:
            if self._around is not None:
                stack.enter_context(self._around)
            return SimpleNamespace(loss=self._loss(input_ids))


@contextmanager
def peer(base: Base, name: str, recompute: str) -> Iterator[tuple[Any, None]]:
    """recompute: "none", or gradient checkpointing. Yields (model, None): nothing controls it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = make_model(base)
    with ExitStack() as stack:
        if "Liger" in name:
            stack.enter_context(_liger(model))
        if base.cuda:
            backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
            stack.enter_context(sdpa_kernel(backends, set_priority=True))
        wrapped = with_adapters(model)
        if recompute != "none":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if name == OFFLOAD:
            from trl.models.activation_offloading import get_act_offloading_ctx_manager

            around = get_act_offloading_ctx_manager(wrapped, warn_if_no_head=False)
            yield Contestant(wrapped, lambda ids: wrapped(input_ids=ids, labels=ids).loss, around), None
        elif name == TRL:
            yield Contestant(wrapped, lambda ids: chunked_loss(wrapped, ids), None), None
        else:
            yield wrapped, None


def chunked_loss(wrapped: Any, ids: Tensor) -> Tensor:
    """The mean loss over all next tokens as TRL's SFTTrainer computes it (its `add_fused_lm_head`)."""
    from trl.kernels import ChunkedLogProbFunction

    model = wrapped.get_base_model()
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head = model.get_output_embeddings()
    targets = ids[:, 1:].flatten()
    found = ChunkedLogProbFunction.apply(hidden, head.weight, head.bias, targets, 1.0, _CHUNK, None, 1.0, _OUTPUTS)
    return -found[0].sum() / targets.numel()


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
