"""The interface of a model family: pre-norm decoder layers of attention and MLP around one residual stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lemo.engine.linear import unwrap

# (module, name) of classes.
Classes = tuple[tuple[str, str], ...]
# Rotary tables cos, sin [T, D] of a step's tokens; None where positions enter with the embedding.
Tables = tuple[Tensor, Tensor] | None


class UnsupportedModelError(ValueError):
    """The model, or this version of transformers, is not one lemo knows how to run; nothing was changed."""


@dataclass(frozen=True, eq=False)
class NormWeights:
    """kind "rms" or "layer"; weight, bias [d] or None."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def contiguous(self) -> tuple[Tensor | None, Tensor | None]:
        """weight and bias as the operators read them; the parameters themselves may be strided."""
        weight, bias = self.weight, self.bias
        return None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()


def rms_norm(module: nn.Module) -> NormWeights:
    """Weights of a transformers RMSNorm."""
    module = unwrap(module)
    return NormWeights("rms", module.weight, None, float(module.variance_epsilon))  # type: ignore[arg-type]


def layer_norm(module: nn.Module) -> NormWeights:
    """Weights of an `nn.LayerNorm`."""
    module = unwrap(module)
    return NormWeights("layer", module.weight, module.bias, float(module.eps))  # type: ignore[arg-type]


class Family(ABC):
    """One model family. Rows are packed tokens: M kept ones in a layer, T of the whole batch."""

    model_class: str
    model_type: str
    # The module of transformers that defines the family, and its functions that lemo stands in for.
    modeling: str
    functions: tuple[str, ...]
    # Modules whose forward lemo stands in for, by path from the language model and from a layer ("" is the layer
    # itself), each with the classes it may have as (module, name).
    outer_modules: Mapping[str, Classes]
    layer_modules: Mapping[str, Classes]
    layers_path: str

    def matches(self, lm: nn.Module) -> bool:
        """Whether `lm` is this family's causal language model of transformers itself, not one derived from it."""
        kind = type(lm)
        return kind.__name__ == self.model_class and kind.__module__.startswith("transformers.")

    @abstractmethod
    def check(self, lm: Any) -> None:
        """Raises UnsupportedModelError for settings of the family that lemo does not compute."""

    def check_layer(self, layer: Any, path: str) -> None:
        """Raises UnsupportedModelError for attributes of one layer's attention that lemo does not compute."""
        attention = layer.self_attn
        if not getattr(attention, "is_causal", True):
            refuse(f"attention that is not causal ({path}.self_attn.is_causal=False)", "train this model without lemo")
        p = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
        if isinstance(p, float) and p > 0:
            refuse(f"attention dropout ({p} in {path}.self_attn)", "set it to 0")

    @abstractmethod
    def decoder(self, lm: Any) -> Any:
        """The module that holds the layers."""

    def layers(self, decoder: Any) -> list[nn.Module]:
        return list(decoder.layers)

    @abstractmethod
    def embed(self, decoder: Any, ids: Tensor | None, embeddings: Tensor | None, positions: Tensor) -> Tensor:
        """Residual stream [T, d] from token ids [T] or their embeddings [T, d], and positions int64 [T]."""

    @abstractmethod
    def default_positions(self, mask: Tensor) -> Tensor:
        """Positions int64 [B, S] that the family gives tokens of a 0/1 mask int64 [B, S] by itself."""

    @abstractmethod
    def tables(self, decoder: Any, x: Tensor, positions: Tensor) -> Tables: ...

    @abstractmethod
    def norms(self, layer: Any) -> tuple[NormWeights, NormWeights]:
        """The norms before attention and before the MLP."""

    @abstractmethod
    def norm_modules(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """The modules that hold the weights of `norms`."""

    @abstractmethod
    def final_norm(self, decoder: Any) -> NormWeights | None: ...

    @abstractmethod
    def attention_modules(self, layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """Query, key, value and output projections."""

    @abstractmethod
    def mlp_modules(self, layer: Any) -> tuple[nn.Module, ...]:
        """The modules that `mlp` calls."""

    @abstractmethod
    def queries_keys_values(
        self, layer: Any, h: Tensor, tables: Tables, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [M, Hq, D], k and v [M, Hk, D] from the norm's output h [M, d], position embedding applied."""

    @abstractmethod
    def attention_output(self, layer: Any, out: Tensor, want_output: bool = True) -> Tensor:
        """What attention adds to the residual stream, [M, d], from out [M, Hq * D].

        want_output False, here and in `mlp`: only the graph is needed (recomputation), values may be anything.
        """

    @abstractmethod
    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor:
        """What the MLP adds to the residual stream, [M, d], from the norm's output h [M, d]."""

    @abstractmethod
    def scale(self, layer: Any) -> float:
        """Factor of q.k before the softmax."""

    @abstractmethod
    def dropout(self, lm: Any) -> float:
        """Probability of the family's own dropout in training."""


def refuse(what: str, instead: str) -> None:
    raise UnsupportedModelError(f"lemo does not support {what}; {instead}")
