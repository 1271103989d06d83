"""Evaluation that needs the loss alone: the dense model's, computed without its logits ever being whole.

The model is transformers' own, layers and head: its decoder runs once, and then its head over slices of tokens, by
transformers' `logits_to_keep`, with the decoder's output held meanwhile. Whatever the model does to its logits takes
part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemo.engine.loss import causal_lm_output, shift
from lemo.integration.entries import arguments
from lemo.integration.trainers import evaluates_loss_only

# Tokens whose logits exist at a time.
SLICE_TOKENS = 1024
# What makes a head return something else than the logits of its tokens.
_OTHER_HEADS = ("fused_lm_head", "lemo_head", "logits_to_keep")


class LossOnly:
    """The evaluation passes of one model. wanted: whether a caller asked for losses alone."""

    def __init__(self) -> None:
        self.wanted = False
        self._slicing = False
        self._decoded: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LossOnly:
        return LossOnly()

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        before, self.wanted = self.wanted, True
        try:
            yield
        finally:
            self.wanted = before

    def serves(self, module: nn.Module, named: dict[str, Any]) -> bool:
        """Whether a forward pass of `module` is one of the decoder while the head runs in slices, or one of the whole
        model whose loss is all that is wanted."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training:
            return False
        if self._slicing:
            return True
        return named.get("labels") is not None and (self.wanted or evaluates_loss_only())

    def run(self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if self._slicing:  # the decoder, as the head calls it
            if self._decoded is None:
                self._decoded = original(*args, **kwargs)
            return self._decoded
        named = arguments(module, args, kwargs)
        if not _has_plain_head(module, named):
            return original(*args, **kwargs)
        self._slicing = True
        try:
            return self._loss(original, named)
        finally:
            self._slicing, self._decoded = False, None

    def _loss(self, original: Callable[..., Any], named: dict[str, Any]) -> Any:
        labels, ignore_index = named.pop("labels"), named.pop("ignore_index", -100)
        shifted, items = named.pop("shift_labels", None), named.pop("num_items_in_batch", None)
        return_dict = named.pop("return_dict", None)
        targets = shift(labels, ignore_index) if shifted is None else shifted
        total: Tensor | float = 0.0
        size = max(1, SLICE_TOKENS // targets.shape[0])
        for start in range(0, targets.shape[1], size):
            positions = torch.arange(start, min(start + size, targets.shape[1]), device=targets.device)
            logits = original(**named, logits_to_keep=positions, return_dict=True).logits
            wanted = targets[:, positions].to(logits.device)
            total = total + F.cross_entropy(
                logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=ignore_index, reduction="sum"
            )
            del logits
        assert isinstance(total, Tensor)
        count = (targets != ignore_index).sum() if items is None else items
        return causal_lm_output(
            total / (count.to(total.device) if torch.is_tensor(count) else count), None, return_dict
        )


def _has_plain_head(module: nn.Module, named: dict[str, Any]) -> bool:
    """Whether transformers' own loss is the mean cross-entropy of the head's logits, and the head can run in slices."""
    if any(named.get(name) is not None and named.get(name) != 0 for name in _OTHER_HEADS):
        return False
    if getattr(module, "_loss_function", None) is not None or getattr(module.config, "output_router_logits", False):
        return False
    others = ("output_hidden_states", "output_attentions", "output_router_logits")
    return not any(named.get(name) for name in others) and (
        "logits_to_keep" in inspect.signature(type(module).forward).parameters
    )
