"""The interface of a model family: pre-norm decoder layers of attention and MLP around one residual stream.

A family owns every fact about its models: sizes, names of modules and settings, norms, biases, soft-cap, window, scale.
Nothing outside this package asks for a model's type. CONTRIBUTING.md has the steps that add a family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lemo.engine.linear import unwrap
from lemo.engine.wrappers import kind_of

# (module, name) of classes.
Classes = tuple[tuple[str, str], ...]
# Rotary tables cos, sin [T, D] of a step's tokens; None if positions enter with the embedding.
Tables = tuple[Tensor, Tensor] | None
NormKind = Literal["rms", "layer"]
# The projections of a layer, in the order of computation.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class UnsupportedModelError(ValueError):
    """The model, or this version of transformers, is not one lemo knows how to run; nothing was changed."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model: hidden d, heads Hq, kv_heads Hk, head_dim D, ffn f.

    gated: SwiGLU (two inner projections) or a plain MLP (one). tied: the head is the embedding's weight. positions:
    rows of a learned position embedding. biases: which of PROJECTIONS have one.
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

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Input and output width of every projection of a layer."""
        d, q, kv, f = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn
        sides = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
        return {name: sides[name] for name in PROJECTIONS if name != "gate" or self.gated}


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


@dataclass(frozen=True, eq=False)
class NormWeights:
    """kind "rms" or "layer"; weight, bias [d] or None. The norm multiplies by offset + weight."""

    kind: NormKind
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float = 0.0

    @property
    def operands(self) -> tuple[Tensor | None, Tensor | None]:
        """Factor and bias as the operators read them: contiguous, offset included. The parameters may be strided.

        The gradient of the factor is the weight's: differentiable if gradients are on.
        """
        weight, bias = self.weight, self.bias
        if weight is not None and self.offset:
            # In float32, as 1 + weight has fewer digits of the weight in 16 bits.
            weight = weight.float() + self.offset
            bias = None if bias is None else bias.float()
        return None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()

    @property
    def parameters(self) -> tuple[Tensor | None, Tensor | None]:
        return self.weight, self.bias


def rms_norm(module: nn.Module, offset: float = 0.0) -> NormWeights:
    """Weights of a transformers RMSNorm."""
    module = unwrap(module)
    return NormWeights("rms", module.weight, None, float(module.variance_epsilon), offset)  # type: ignore[arg-type]


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

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the modules that an adapter of attention is for."""
        return tuple(name for name, role in self.projections.items() if role in ("q", "k", "v", "o"))

    # --- facts of a configuration ---

    @abstractmethod
    def shape(self, config: Any) -> ModelShape: ...

    def logit_softcap(self, config: Any) -> float:
        """c > 0: the model's logits are c tanh(z / c); 0: as the head gives them."""
        return float(getattr(config, "final_logit_softcapping", None) or 0.0)

    def window(self, config: Any) -> int | None:
        """Tokens that a query sees, itself included, if not all before it. Documents beyond it are refused."""
        return getattr(config, "sliding_window", None)

    def check_length(self, config: Any, tokens: int) -> None:
        """Raises UnsupportedModelError if a window would cut attention within a document of so many tokens."""
        window = self.window(config)
        if window is not None and tokens > window:
            refuse(
                f"sliding-window attention (sliding_window={window} of {self.model_class}, in a document of {tokens} "
                "tokens): a layer here sees all tokens before its own",
                f"train on documents of at most {window} tokens (--context), or set sliding_window to null in the "
                "model's configuration if every token should see all before it",
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
        self, layer: Any, h: Tensor, tables: Tables, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [M, Hq, D], k and v [M, Hk, D] from the norm's output h [M, d], position embedding applied."""

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
        return AttentionOptions(float(layer.self_attn.scaling))

    def dropout(self, lm: Any) -> float:
        """Probability of the family's own dropout in training."""
        return 0.0


def refuse(what: str, instead: str) -> None:
    raise UnsupportedModelError(f"lemo does not support {what}; {instead}")
