"""The interface of a model family: pre-norm decoder layers of attention and MLP around one residual stream.

A family owns every fact about its models: sizes, names of modules and settings, norms, biases, soft-cap, window, scale.
Nothing outside this package asks for a model's type. CONTRIBUTING.md has the steps that add a family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor, nn

from lemo.engine.linear import unwrap
from lemo.engine.wrappers import kind_of

# (module, name) of classes.
Classes = tuple[tuple[str, str], ...]
# Rotary tables [T, D] of a step, cos and sin of every kind of layer; None if positions enter with the embedding.
Tables = tuple[Tensor, ...] | None
NormKind = Literal["rms", "layer"]
# The projections of a layer, in the order of computation; "qkv" and "gate_up" are those of a fused one.
PROJECTIONS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
OF_ATTENTION = PROJECTIONS[:5]
# Sizes of heads that CUDA kernels have: those of attention and of the mass of tiles, and those of exact block scores.
CUDA_HEADS = (64, 80, 96, 128, 256)
CUDA_SCORE_HEADS = CUDA_HEADS[:-1]


class UnsupportedModelError(ValueError):
    """The model, or this version of transformers, is not one lemo knows how to run; nothing was changed."""


@dataclass(frozen=True)
class Experts:
    """A router and `count` gated MLPs of width f, of which every row takes `per_token`; in the layers named.

    normed: the router's weights of a row are made to sum to 1; None: they do, being a softmax over the chosen experts.
    """

    count: int
    per_token: int
    ffn: int
    layers: tuple[int, ...]
    normed: bool | None


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model: hidden d, heads Hq, kv_heads Hk, head_dim D, ffn f.

    gated: SwiGLU (two inner projections) or a plain MLP (one). tied: the head is the embedding's weight. positions:
    rows of a learned position embedding. biases: which of PROJECTIONS have one. fused: q, k and v are one projection,
    gate and up another. experts: what some layers have in place of the MLP; `at` is the shape of one layer. Beyond
    projections, their biases and the two norms that every layer has: inner_parameters of a layer, and inner_saved
    elements of every row that its graphs save (for norms of queries and keys, for example).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    positions: int = 0
    biases: tuple[str, ...] = ()
    fused: bool = False
    experts: Experts | None = None
    inner_parameters: int = 0
    inner_saved: int = 0

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Input and output width of every projection of a layer, those of experts left out."""
        d, q, kv, f = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn
        sides = {"qkv": (d, q + 2 * kv)} if self.fused else {"q": (d, q), "k": (d, kv), "v": (d, kv)}
        sides["o"] = (q, d)
        if self.experts is None or len(self.experts.layers) < self.layers:
            inner = "gate_up" if self.fused else "gate"
            sides |= {inner: (d, 2 * f if self.fused else f)} if self.gated else {}
            sides |= {"down": (f, d)} if self.fused else {"up": (d, f), "down": (f, d)}
        return sides

    def at(self, layer: int) -> Self:
        """The shape of a model all of whose layers are like this one."""
        if self.experts is None:
            return self
        if layer not in self.experts.layers:
            return replace(self, experts=None)
        return replace(self, experts=replace(self.experts, layers=tuple(range(self.layers))))


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """How a layer's queries see keys, besides causality within the document.

    scale: factor of q.k. window: tokens that a query sees, itself included, counted by their places in the sequence,
    so that eliminated tokens count as well; None: all before it. softcap c > 0: scores are c tanh(s / c), before
    anything is hidden; 0: as they are. sinks: float [Hq], logits that join the denominator of a head's softmax only;
    may be a trained parameter of the layer.
    """

    scale: float
    window: int | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None

    def within(self, tokens: int) -> Self:
        """In documents of so many tokens: without a window that they do not exceed."""
        return self if self.window is None or tokens > self.window else replace(self, window=None)


@dataclass(frozen=True, eq=False)
class NormWeights:
    """kind "rms" or "layer"; weight, bias [d] or None. The norm multiplies by scale (offset + weight); so does its bias
    by scale."""

    kind: NormKind
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float = 0.0
    scale: float = 1.0

    @property
    def operands(self) -> tuple[Tensor | None, Tensor | None]:
        """Factor and bias as the operators read them: contiguous, with offset and scale. The parameters may be strided.

        The gradient of the factor is the weight's: differentiable if gradients are on.
        """
        weight, bias = self.weight, self.bias
        if weight is not None and (self.offset or self.scale != 1.0):
            # In float32, as 1 + weight has fewer digits of the weight in 16 bits.
            weight = (weight.float() + self.offset) * self.scale
            bias = None if bias is None else bias.float() * self.scale
        return None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()

    @property
    def parameters(self) -> tuple[Tensor | None, Tensor | None]:
        return self.weight, self.bias


def rms_norm(module: nn.Module, offset: float = 0.0) -> NormWeights:
    """Weights of a transformers RMSNorm."""
    module = unwrap(module)
    eps: Any = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return NormWeights("rms", module.weight, None, float(eps), offset)  # type: ignore[arg-type]


def layer_norm(module: nn.Module) -> NormWeights:
    """Weights of an `nn.LayerNorm`."""
    module = unwrap(module)
    return NormWeights("layer", module.weight, module.bias, float(module.eps))  # type: ignore[arg-type]


class Family(ABC):
    """One model family. Rows are packed tokens: M kept ones in a layer, T of the whole batch.

    name: how the names of its transformers classes begin; model_type: of its configuration.
    """

    name: str
    model_type: str
    # Functions of `modeling` that lemo stands in for; names that a version of transformers lacks are ignored.
    functions: tuple[str, ...] = (
        "apply_rotary_pos_emb",
        "rotate_half",
        "repeat_kv",
        "eager_attention_forward",
        "create_causal_mask",
        "create_sliding_window_causal_mask",
    )
    # Liger's classes that compute what this family's own modules do.
    liger: frozenset[str] = frozenset()
    layers_path = "model.layers"
    # Role of every projection of a layer (one of PROJECTIONS) by its module's name.
    projections: Mapping[str, str]
    norm_offset = 0.0
    # The model_type of models of several modalities that hold one of this family, which can be loaded alone.
    within: str | None = None

    # --- names ---

    @property
    def model_class(self) -> str:
        return f"{self.name}ForCausalLM"

    @property
    def modeling(self) -> str:
        """The module of transformers that defines the family."""
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"

    def own(self, suffix: str) -> Classes:
        """A class of the family's own, by what follows its name."""
        return ((self.modeling, self.name + suffix),)

    @property
    @abstractmethod
    def outer_modules(self) -> Mapping[str, Classes]:
        """Modules outside the layers whose forward lemo stands in for, by path from the language model, and the
        classes each may have."""

    @property
    @abstractmethod
    def layer_modules(self) -> Mapping[str, Classes]:
        """The same within a layer, by path from the layer; "" is the layer itself."""

    def layer_modules_of(self, layer: Any) -> Mapping[str, Classes]:
        """Those of `layer_modules` that this layer has."""
        return self.layer_modules

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the modules that an adapter of attention is for."""
        return tuple(name for name, role in self.projections.items() if role in OF_ATTENTION)

    def loading(self, config: Any) -> dict[str, Any]:
        """Arguments of transformers' from_pretrained, beyond the obvious ones, for a model that lemo can train."""
        return {"attn_implementation": "sdpa"}

    # --- facts of a configuration ---

    @abstractmethod
    def shape(self, config: Any) -> ModelShape: ...

    def logit_softcap(self, config: Any) -> float:
        """c > 0: the model's logits are c tanh(z / c); 0: as the head gives them."""
        return float(getattr(config, "final_logit_softcapping", None) or 0.0)

    def score_softcap(self, config: Any) -> float:
        """c > 0: the scores of attention are c tanh(s / c); 0: as they are."""
        return 0.0

    def logit_scale(self, config: Any) -> float:
        """The factor of the head's output that makes the logits."""
        return 1.0

    def window(self, config: Any, layer: int) -> int | None:
        """Tokens that a query of layer `layer` sees, itself included; None: all before it."""
        kinds = getattr(config, "layer_types", None)
        return config.sliding_window if kinds and kinds[layer] == "sliding_attention" else None

    def windows(self, config: Any, tokens: int) -> list[int | None]:
        """Of every layer, if it hides anything in documents of so many tokens."""
        found = (self.window(config, i) for i in range(self.shape(config).layers))
        return [None if window is None or window >= tokens else window for window in found]

    def check_kernels(self, config: Any, device: torch.device) -> None:
        """Raises UnsupportedModelError if the device cannot compute the model's attention."""
        size = self.shape(config).head_dim
        if device.type == "cuda" and size not in CUDA_HEADS:
            refuse(
                f"heads of {size} values on CUDA ({self.model_class}), whose kernels have {listed(CUDA_HEADS)}",
                "train on the CPU (--device cpu)",
            )

    def check_score_kernels(self, config: Any, tokens: int, device: torch.device) -> None:
        """Raises UnsupportedModelError if the device cannot compute exact scores of blocks in documents of so many
        tokens: on CUDA their kernels have none of attention's options, and fewer sizes of heads."""
        if device.type != "cuda":
            return
        size, windows = self.shape(config).head_dim, [w for w in self.windows(config, tokens) if w is not None]
        missing = [] if size in CUDA_SCORE_HEADS else [f"heads of {size} values"]
        missing += ["soft-capped scores"] if self.score_softcap(config) else []
        missing += [f"a sliding window of {windows[0]} in documents of {tokens} tokens"] if windows else []
        if missing:
            refuse(
                f"exact scores of blocks with {' and '.join(missing)} on CUDA ({self.model_class})",
                "calibrate on the CPU (--device cpu), whose predictors serve CUDA as well, or choose blocks by a "
                'policy that needs no exact scores: "update_norm" or "random"',
            )

    # --- checks ---

    def matches(self, lm: nn.Module) -> bool:
        """Whether `lm` is this family's causal language model of transformers itself, not one derived from it."""
        kind = kind_of(lm)
        return kind.__name__ == self.model_class and kind.__module__.startswith("transformers.")

    def check(self, lm: Any) -> None:
        """Raises UnsupportedModelError for settings of the family that lemo does not compute."""
        p = getattr(lm.config, "attention_dropout", 0.0)
        if p:
            refuse(f"attention dropout (attention_dropout={p})", "set it to 0")

    def check_layer(self, layer: Any, path: str) -> None:
        """Raises UnsupportedModelError for attributes of one layer's attention that lemo does not compute."""
        attention = layer.self_attn
        if not getattr(attention, "is_causal", True):
            refuse(f"attention that is not causal ({path}.self_attn.is_causal=False)", "train this model without lemo")
        p = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
        if isinstance(p, float) and p > 0:
            refuse(f"attention dropout ({p} in {path}.self_attn)", "set it to 0")

    # --- modules ---

    def decoder(self, lm: Any) -> Any:
        """The module that holds the layers."""
        return lm.model

    def layers(self, decoder: Any) -> list[nn.Module]:
        """Those that the model runs."""
        return list(decoder.layers[: decoder.config.num_hidden_layers])

    @abstractmethod
    def norms(self, layer: Any) -> tuple[NormWeights, NormWeights]:
        """The norms before attention and before the MLP."""

    @abstractmethod
    def final_norm(self, decoder: Any) -> NormWeights | None: ...

    def decoder_output(self, hidden: Tensor) -> Any:
        """What the model's decoder returns in training, with hidden states [B, S, d]."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def head_norm(self, decoder: Any) -> NormWeights | None:
        """The final norm as the loss reads it: with `logit_scale`, since the head is linear."""
        norm, scale = self.final_norm(decoder), self.logit_scale(decoder.config)
        if scale == 1.0:
            return norm
        if norm is None or norm.weight is None:
            refuse(f"scaled logits ({self.model_class}) without a weight of the final norm", "train it without lemo")
        return replace(norm, scale=scale)

    @abstractmethod
    def attention_modules(self, layer: Any) -> Sequence[nn.Module]:
        """The modules whose parameters `queries_keys_values` and `attention_output` use: projections, norms of queries
        and keys. A trained parameter of a layer that is in none of these, `mlp_modules`, `norms` and the sinks of
        `attention_options` is an error."""

    @abstractmethod
    def mlp_modules(self, layer: Any) -> Sequence[nn.Module]:
        """The modules whose parameters `mlp` uses."""

    def final_modules(self, decoder: Any) -> Sequence[nn.Module | None]:
        """The module of the final norm, if there is one."""
        return (decoder.norm,)

    def outside_modules(self, decoder: Any) -> Sequence[nn.Module]:
        """Modules of the decoder outside its layers whose parameters may train, apart from the final norm."""
        return (decoder.embed_tokens,)

    # --- computation ---

    def embed(self, decoder: Any, ids: Tensor | None, embeddings: Tensor | None, positions: Tensor) -> Tensor:
        """Residual stream [T, d] from token ids [T] or their embeddings [T, d], and positions int64 [T]."""
        # A leading dimension of 1: hooks on the embedding (NEFTune) expect a batch.
        return decoder.embed_tokens(ids[None])[0] if embeddings is None else embeddings  # type: ignore[index]

    @abstractmethod
    def default_positions(self, mask: Tensor) -> Tensor:
        """Positions int64 [B, S] that the model gives tokens of a 0/1 mask int64 [B, S] if it is given none."""

    @abstractmethod
    def tables(self, decoder: Any, x: Tensor, positions: Tensor) -> Tables: ...

    @abstractmethod
    def queries_keys_values(
        self, layer: Any, h: Tensor, tables: Tables, rows: Tensor | None, want_output: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [M, Hq, D], k and v [M, Hk, D] from the norm's output h [M, d], position embedding applied.

        Every row is computed by itself, as in `attention_output`: a layer may be given its rows in pieces.

        want_output False: only the graph is needed, values may be anything. The engine asks for that only if everything
        in `attention_modules` is a projection.
        """

    @abstractmethod
    def attention_output(self, layer: Any, out: Tensor, want_output: bool = True) -> Tensor:
        """What attention adds to the residual stream, [M, d], from out [M, Hq * D].

        want_output False, here and in `mlp`: only the graph is needed (recomputation), values may be anything.
        """

    @abstractmethod
    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor | tuple[Tensor, Tensor]:
        """What the MLP adds to the residual stream, [M, d], from the norm's output h [M, d].

        Every row is computed by itself: a layer may be given its rows in pieces. A family with an auxiliary loss
        returns a second tensor, statistics float32 [M, S] of every row; see `auxiliary_loss`.
        """

    def auxiliary_loss(self, config: Any, statistics: Tensor) -> Tensor | None:
        """A scalar that is added to the loss (a router's balance), or None.

        statistics: float32 [L, S]: for every layer the sum of its rows' statistics over all rows that its MLP computed,
        in however many pieces; zeros for a layer that kept nothing. A family that wants means has a statistic that is
        1 in every row. Sums, since a mean of pieces' means depends on the pieces, and any function of token means is
        one of these. The gradient reaches every kept row, weighted in mode "backward" as that of its output.
        """
        return None

    def attention_options(self, layer: Any) -> AttentionOptions:
        """The layer's scale, and the window, soft-cap and sinks that its attention has."""
        a = layer.self_attn
        return AttentionOptions(float(a.scaling), self.window(a.config, a.layer_idx))

    def dropout(self, lm: Any) -> float:
        """Probability of the family's own dropout in training."""
        return 0.0


def listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def refuse(what: str, instead: str) -> NoReturn:
    raise UnsupportedModelError(f"lemo does not support {what}; {instead}")
