"""What to eliminate, when, and how: the settings of one fine-tuning run, and the vocabulary they are written in."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from lemo.engine.sizes import parse_bytes

# How a phase eliminates; how blocks are chosen; by share or by score.
Mode = Literal["skip", "backward", "sparse", "dense"]
PolicyName = Literal["predictors", "update_norm", "random", "sampled", "exact"]
Select = Literal["budget", "threshold"]
# How the key tiles of mode "sparse" are chosen.
TilePolicyName = Literal["probe", "recent", "predictors"]
# What a layer saves; "auto" is decided at every step.
Recompute = Literal["none", "attention", "full"]
RecomputeSetting = Literal["auto", "none", "attention", "full"]
# What a record of the backward pass is of: a whole layer, or one of its two parts.
Part = Literal["layer", "attention", "mlp"]

MODES: tuple[Mode, ...] = get_args(Mode)
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
RECOMPUTE: tuple[RecomputeSetting, ...] = get_args(RecomputeSetting)
SELECT: tuple[Select, ...] = get_args(Select)
TILE_POLICIES: tuple[TilePolicyName, ...] = get_args(TilePolicyName)
# Keyword arguments of the tile policies, by name (`lemo.engine.tiles`).
TILE_OPTIONS: Mapping[TilePolicyName, tuple[str, ...]] = {"probe": ("rows", "rank"), "recent": (), "predictors": ()}

_TILE = 128  # LEMO_TILE_ROWS: settings are read without the library
_MOST_KEYS = 2**62
_MOST_LOCAL = 2**31 - 1


def _choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def _layer_indices(value: Any) -> tuple[int, ...]:
    whole = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not whole or not value or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
        raise ValueError(
            "LemoConfig.layers must be a list of layer indices (integers from 0), or None for all layers; to eliminate "
            f'in none of them use mode "dense"; got {value!r}'
        )
    return tuple(value)


def _integer(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}; got {value!r}")


def _share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be a number above 0, and at most 1; got {value!r}")
    if ctypes.c_float(value).value == 0.0:
        raise ValueError(f"{name} must be a number above 0 in float32 as well; got {value!r}")


def _fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a number from 0 (nothing kept) to 1 (everything kept); got {value!r}")


@dataclass(frozen=True)
class Phase:
    """A run of training steps that share one elimination strategy.

    mode: "skip" leaves tokens out of layers forward and backward (paper section 4); "backward" computes the forward
        pass exactly and sends gradients through kept tokens only; "sparse" keeps all tokens and leaves out pairs of
        query and key tiles in attention, forward and backward; "dense" keeps everything.
    keep: fraction of every document's blocks that a layer keeps. Default 0.5 (1 in "sparse" and "dense"). With 0 a
        layer keeps nothing, not even `always_first`, and trains nothing. With less than 1, "sparse" also leaves tokens
        out as "skip" does, and pairs of tiles among the others.
    share: share of the steps, relative to the other phases' shares.
    policy: how blocks are chosen (see `lemo.engine.policies`). Default in "skip": if the run has calibrated predictors,
        "sampled" with their scores, one draw for all layers ("predictors" with `select` "threshold" or `mlp_keep`);
        otherwise "update_norm". Default in "backward": "random", because informed choices bias the gradient there.
    weighted: weight gradients by inverse probabilities so that their expectation is the dense gradient. "backward" with
        "random" or "sampled" only. Blocks are then drawn independently of one another (Poisson sampling), so the number
        kept varies around `keep`: with n blocks by a standard deviation of at most sqrt(n) / 2.
    policy_options: keyword arguments of the policy.
    select: "budget" keeps `keep` of the blocks; "threshold" keeps blocks that score at least the layer's calibrated
        threshold ("predictors" only; `keep` is then ignored).
    mlp_keep: fraction that the MLP keeps, as a separate list from the same scores ("skip" only). Default: the list of
        attention.
    density, keys, mass: limits of what a tile of 128 queries attends to in mode "sparse": a share of the keys before
        it; a number of keys, in tokens; as many tiles as hold a share of its attention (as `tile_policy` estimates it).
        Whichever is reached first holds. Default: density 0.25 if none is given.
    local: tiles directly before a query tile that it always attends to, as it does to itself and to the document's
        first tile, whatever the limits.
    tile_policy: how the other tiles are chosen ("sparse" only): "probe", by the exact attention of a few rows of the
        query tile, in the head that needs a tile most; "recent", the nearest ones; "predictors", by networks calibrated
        for it (`lemo calibrate --target mass`). See `lemo.engine.tiles`.
    tile_options: keyword arguments of the tile policy.
    """

    mode: Mode = "skip"
    keep: float | None = None
    share: float = 1.0
    policy: PolicyName | None = None
    weighted: bool = False
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    select: Select = "budget"
    mlp_keep: float | None = None
    density: float | None = None
    keys: int | None = None
    mass: float | None = None
    local: int = 1
    tile_policy: TilePolicyName = "probe"
    tile_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _choice("Phase.mode", self.mode, MODES)
        if self.keep is None:
            object.__setattr__(self, "keep", 1.0 if self.mode in ("sparse", "dense") else 0.5)
        _fraction("Phase.keep", self.keep)
        if self.mode == "dense" and self.keep != 1.0:
            raise ValueError(f'Phase.keep must be 1 (or left out) if mode is "dense"; got {self.keep}')
        if (
            isinstance(self.share, bool)
            or not isinstance(self.share, (int, float))
            or not 0 < self.share < float("inf")
        ):
            raise ValueError(f"Phase.share must be a positive number; got {self.share!r}")
        if self.policy is not None:
            _choice("Phase.policy", self.policy, POLICIES)
        _choice("Phase.select", self.select, SELECT)
        _flag("Phase.weighted", self.weighted)
        if not isinstance(self.policy_options, Mapping):
            raise ValueError(f"Phase.policy_options must be a dictionary of options; got {self.policy_options!r}")
        if self.select == "threshold" and self.policy not in (None, "predictors"):
            raise ValueError(
                f'Phase.select "threshold" needs policy "predictors" (thresholds are calibrated); got {self.policy!r}'
            )
        if self.mlp_keep is not None:
            _fraction("Phase.mlp_keep", self.mlp_keep)
            if self.mode != "skip":
                raise ValueError(f'Phase.mlp_keep needs mode "skip"; got mode {self.mode!r}')
        self._check_tiles()
        self._check_policy()
        if self.weighted and (self.mode != "backward" or self.policy not in (None, "random", "sampled")):
            raise ValueError(
                'Phase.weighted needs mode "backward" and policy "random" or "sampled" (weights are inverse '
                f"probabilities); got mode {self.mode!r}, policy {self.policy!r}"
            )
        if self.weighted and self.keep == 0.0:
            raise ValueError("Phase.keep must be above 0 with Phase.weighted: a block that is never kept has no weight")
        if self.weighted and self.policy_options.get("shared"):
            raise ValueError(
                "Phase.weighted needs a separate draw in every layer: a block drawn once for all layers would be "
                "weighted by 1/p again in each layer that uses it, and the gradient would grow with depth. Leave out "
                "`shared`, or `weighted`"
            )

    def _check_policy(self) -> None:
        """A policy of blocks must have blocks to choose."""
        if self.chooses_blocks:
            return
        for name in ("policy", "policy_options"):
            value = getattr(self, name)
            if value not in (None, {}):
                instead = "; key tiles are chosen by Phase.tile_policy" if self.mode == "sparse" else ""
                fix = "give a keep below 1, or leave it out" if self.mode == "sparse" else "leave it out"
                raise ValueError(
                    f"Phase.{name} chooses the blocks that a layer keeps, and mode {self.mode!r} with keep=1 keeps all "
                    f"of them: {fix}{instead}; got {value!r}"
                )

    def _check_tiles(self) -> None:
        """The settings of mode "sparse"."""
        _choice("Phase.tile_policy", self.tile_policy, TILE_POLICIES)
        _integer("Phase.local", self.local, 0, _MOST_LOCAL)
        if not isinstance(self.tile_options, Mapping):
            raise ValueError(f"Phase.tile_options must be a dictionary of options; got {self.tile_options!r}")
        if self.mode != "sparse":
            defaults = {f.name: f.default for f in dataclasses.fields(self)} | {"tile_options": {}}
            for name in ("density", "keys", "mass", "local", "tile_policy", "tile_options"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f'Phase.{name} needs mode "sparse", which takes `keep` as well to leave tokens out; got mode '
                        f"{self.mode!r}"
                    )
            return
        known = TILE_OPTIONS[self.tile_policy]
        unknown = [str(name) for name in self.tile_options if name not in known]
        if unknown:
            raise ValueError(
                f"Phase.tile_options: tile_policy {self.tile_policy!r} has no option {', '.join(unknown)}; it has "
                f"{', '.join(known) or 'none'}"
            )
        if self.density is None and self.keys is None and self.mass is None:
            object.__setattr__(self, "density", 0.25)
        if self.density is not None:
            _share("Phase.density", self.density)
        if self.keys is not None:
            _integer("Phase.keys", self.keys, 1, _MOST_KEYS)
            if self.keys < _TILE:
                raise ValueError(
                    f"Phase.keys must be at least one tile of {_TILE} tokens, and a query tile attends to itself, the "
                    f"document's first tile and `local` others in any case; got {self.keys}"
                )
        if self.mass is not None:
            _share("Phase.mass", self.mass)
            if self.tile_policy == "recent":
                raise ValueError(
                    'Phase.mass needs a tile_policy that estimates attention ("probe", "predictors"); "recent" knows '
                    "only which tiles are near: limit it by density or keys"
                )
        if self.keep == 0.0:
            raise ValueError('Phase.keep must be above 0 in mode "sparse": without tokens there are no pairs')

    @property
    def skips(self) -> bool:
        """Whether the forward pass leaves tokens out of layers."""
        everything = self.select == "budget" and self.keep == 1.0 and self.mlp_keep in (None, 1.0)
        return self.mode in ("skip", "sparse") and not everything

    @property
    def chooses_blocks(self) -> bool:
        """Whether a policy chooses blocks."""
        return self.mode in ("skip", "backward") or self.skips

    @property
    def limits(self) -> dict[str, float]:
        """What limits the tiles that a query tile attends to in mode "sparse"."""
        given = {"density": self.density, "keys": self.keys, "mass": self.mass}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def exact(self) -> bool:
        """Whether the forward pass is that of the whole model."""
        return self.mode != "sparse" and not self.skips

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        values["policy_options"] = dict(self.policy_options)
        values["tile_options"] = dict(self.tile_options)
        return values


def default_phases() -> tuple[Phase, ...]:
    """Skip half of the blocks for most of the steps, then train with an exact forward pass.

    Elimination trains the adapter for a model with tokens missing; the exact phase fits it to the dense model that
    will be served. With skipped steps at 0.36 of a dense step's cost, 0.865 : 0.135 spends 70 % of the cost skipping.
    """
    return (Phase("skip", keep=0.5, share=0.865), Phase("dense", share=0.135))


@dataclass
class LemoConfig:
    """Settings of one run.

    block_size: tokens per block; at least 1.
    phases: `Phase`s in order, or None for `default_phases()`.
    recompute: what a layer saves for its backward pass. "none": everything the kept tokens need; "attention": the
        layer's kept input and attention output, the rest is recomputed; "full": the kept input only; "auto": "full"
        if the model has gradient checkpointing switched on, else "none"; with `memory_budget`, chosen by layer. The
        flag itself is ignored: lemo runs the layers, not transformers.
    memory_budget: bytes, or a text like "40GiB", that a step may take on the device: weights, the optimizer's states,
        saved rows and working memory, as `lemo.estimate` counts them. Every layer then saves as much as fits
        (`lemo.engine.budget` says which layers save more). None: `recompute` decides.
    offload: keep saved rows in pinned host memory until the backward pass needs them: True for all layers, a number of
        layers (those that keep most), or "auto": as few as `memory_budget` needs; a text like "100GiB": likewise, and
        no more bytes of host memory than that. Offloaded layers save at most attention's output, except in mode
        "backward" if recompute is "none".
    recompute_layers: run whole segments of layers again in the backward pass, from the residual stream before the
        first of them, so that between the passes they save nothing else (every token's stream, whatever is kept). A
        number of layers: the size of a segment; True: the segments that need the least memory; "auto": if
        `memory_budget` needs it, with as few such layers as possible; False: never. The last segment does not run
        again.
    cuda_graphs: record the layers' forward and backward pass as CUDA graphs when a shape of batches comes a second
        time, and run those from then on: for models so small that the host launches kernels more slowly than the GPU
        runs them. What graphs cannot hold runs as usual, and a warning gives the reason (docs/howto/small-models.md).
        Not with `memory_budget` or `offload`.
    seed: of all random choices, together with the process's rank, the step, the micro-batch and the layer.
    always_first, always_last: blocks at either end of every document that are always kept.
    layers: indices of the layers that eliminate; the others keep everything. None: all of them.
    keep_labelled: in mode "skip", whether blocks with labels are always kept, beyond the budget if need be. None: if
        fewer than half of a batch's tokens have one (answers only); a token left out of all layers teaches nothing.
    calibration: folder written by `lemo calibrate`; needed by the policies that predict.
    deterministic: bitwise repeatable gradients on CUDA, slower. (The CPU is repeatable anyway.) In mode "sparse" on a
        Hopper GPU this counts on all multiprocessors that the device reports: not next to a kernel that never ends, nor
        in a context that is given fewer, where a backward pass may not return.
    segment_rows: tokens per segment of the loss; 0 lets the library choose.
    return_logits: make the logits of a training forward pass with labels whole and return them with the loss, as
        transformers does and at the same cost in memory (tokens x vocabulary). Logits of tokens that were in no layer
        mean little.
    """

    block_size: int = 64
    phases: Sequence[Phase] | None = None
    recompute: RecomputeSetting = "auto"
    seed: int = 0
    always_first: int = 1
    always_last: int = 0
    layers: Sequence[int] | None = None
    keep_labelled: bool | None = None
    calibration: str | os.PathLike[str] | None = None
    deterministic: bool = False
    segment_rows: int = 0
    return_logits: bool = False
    memory_budget: int | str | None = None
    offload: bool | int | str = False
    recompute_layers: bool | int | Literal["auto"] = "auto"
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("always_first", 0), ("always_last", 0), ("segment_rows", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"LemoConfig.{name} must be an integer of at least {least}; got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"LemoConfig.seed must be an integer; got {self.seed!r}")
        _flag("LemoConfig.return_logits", self.return_logits)
        _flag("LemoConfig.deterministic", self.deterministic)
        _flag("LemoConfig.cuda_graphs", self.cuda_graphs)
        if self.layers is not None:
            self.layers = _layer_indices(self.layers)
        if self.calibration is not None and not isinstance(self.calibration, (str, os.PathLike)):
            raise ValueError(f"LemoConfig.calibration must be the path of a folder; got {self.calibration!r}")
        if self.keep_labelled is not None and not isinstance(self.keep_labelled, bool):
            raise ValueError(f"LemoConfig.keep_labelled must be True, False or None; got {self.keep_labelled!r}")
        _choice("LemoConfig.recompute", self.recompute, RECOMPUTE)
        phases = default_phases() if self.phases is None else tuple(self.phases)
        if not phases:
            raise ValueError("LemoConfig.phases must name at least one Phase; got an empty list")
        for phase in phases:
            if not isinstance(phase, Phase):
                raise ValueError(f"LemoConfig.phases must hold lemo.Phase objects; got {type(phase).__name__}")
        self.phases = phases
        self._check_memory()
        for phase in phases:
            policy, _ = self.policy(phase)
            if phase.select == "threshold" and policy != "predictors":
                raise ValueError(
                    'Phase.select "threshold" needs LemoConfig.calibration: the folder with the thresholds'
                )
            if policy == "predictors" and self.calibration is None:
                raise ValueError(
                    'policy "predictors" needs LemoConfig.calibration: a folder written by `lemo calibrate`; got None'
                )
            if phase.tile_policy == "predictors" and self.calibration is None:
                raise ValueError(
                    'tile_policy "predictors" needs LemoConfig.calibration: a folder written by `lemo calibrate '
                    "--target mass`; got None"
                )

    def _check_memory(self) -> None:
        if self.memory_budget is not None:
            try:
                self.memory_budget = parse_bytes(self.memory_budget)
            except ValueError as error:
                raise ValueError(f"LemoConfig.memory_budget: {error}") from None
            if self.memory_budget < 1:
                raise ValueError(
                    f"LemoConfig.memory_budget must be a positive number of bytes; got {self.memory_budget}"
                )
            if self.recompute != "auto":
                raise ValueError(
                    "LemoConfig.memory_budget chooses what every layer recomputes, which recompute="
                    f'"{self.recompute}" has already decided: leave recompute at "auto", or memory_budget out'
                )
        self._check_offload()
        again = self.recompute_layers
        number = isinstance(again, int) and (isinstance(again, bool) or again == 0 or again > 1)
        if again != "auto" and not number:
            raise ValueError(
                'LemoConfig.recompute_layers must be True, False, "auto" or the number of layers of a segment, at '
                f"least 2; got {again!r}"
            )
        if self.cuda_graphs and (self.memory_budget is not None or self.offload):
            given = "memory_budget" if self.memory_budget is not None else "offload"
            raise ValueError(
                f"LemoConfig.cuda_graphs keeps what layers save in separate memory, which {given} neither counts nor "
                f"moves: give cuda_graphs or {given}"
            )

    def _check_offload(self) -> None:
        offload = self.offload
        if isinstance(offload, str) and offload != "auto":
            try:
                if parse_bytes(offload) < 1 or offload.strip().isdecimal():
                    raise ValueError(f"expected a unit, like 100GiB; got {offload!r}")
            except ValueError as error:
                raise ValueError(
                    'LemoConfig.offload must be True, False, a number of layers, "auto" or the bytes of host memory '
                    f"that it may take: {error}"
                ) from None
        elif not isinstance(offload, str) and (not isinstance(offload, int) or offload < 0):
            raise ValueError(f'LemoConfig.offload must be True, False, a number of layers or "auto"; got {offload!r}')
        if isinstance(offload, str) and self.memory_budget is None:
            raise ValueError(
                f'LemoConfig.offload "{offload}" offloads as few layers as memory_budget needs: give memory_budget, or '
                "a number of layers, or True for all"
            )
        if offload and self.recompute == "none" and not any(p.mode == "backward" for p in self.phases or ()):
            raise ValueError(
                'LemoConfig.offload with recompute="none" moves everything that kept tokens need, for which only the '
                'forward pass of mode "backward" is long enough, and no phase has that mode: use recompute "attention" '
                'or "full", or leave it at "auto"'
            )

    def check_layers(self, count: int) -> None:
        """Raises ValueError for settings that name layers, or numbers of them, that a model of `count` layers lacks."""
        outside = [i for i in self.layers or () if not 0 <= i < count]
        if outside:
            raise ValueError(f"LemoConfig.layers: the model has layers 0 to {count - 1}; got {outside}")
        if not isinstance(self.offload, (bool, str)) and self.offload > count:
            raise ValueError(
                f"LemoConfig.offload: the model has {count} layers; got {self.offload}: give at most {count}, or True "
                "(--offload all) for all of them"
            )
        again = self.recompute_layers
        if isinstance(again, (bool, str)) or again < count:
            return
        # The last segment does not run again, and a single one is the last.
        fewer = f"at most {count - 1}, or " if count > 2 else ""
        raise ValueError(
            f"LemoConfig.recompute_layers: the model has {count} layers; got {again}, a single segment, and the last "
            f"never runs again: give {fewer}True (--recompute-layers least) for the least memory"
        )

    @property
    def plans_memory(self) -> bool:
        """Whether what layers save, and where, follows from the shapes of a batch, not from `recompute` alone."""
        return bool(self.memory_budget is not None or self.offload or self.recompute_layers not in (False, "auto"))

    @property
    def budget(self) -> int | None:
        """`memory_budget` in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    def policy(self, phase: Phase) -> tuple[PolicyName, Mapping[str, Any]]:
        """The policy of a phase and its options, defaults resolved."""
        if phase.policy is not None:
            return phase.policy, phase.policy_options
        if phase.mode == "backward":
            return "random", phase.policy_options
        # A calibration whose predictors choose tiles knows nothing of blocks.
        if self.calibration is None or phase.mode not in ("skip", "sparse") or phase.tile_policy == "predictors":
            return "update_norm", phase.policy_options
        if phase.select == "threshold" or phase.mlp_keep is not None:
            return "predictors", phase.policy_options
        # Chosen anew in every layer, the same blocks train a worse adapter (docs/notebook.md).
        return "sampled", {"shared": True, **phase.policy_options}

    def scores_exactly(self, phase: Phase) -> bool:
        """Whether a phase chooses blocks by the exact scores of a layer's queries and keys."""
        policy, options = self.policy(phase)
        return phase.chooses_blocks and "exact" in (policy, options.get("source"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["phases"] = [phase.to_dict() for phase in self.phases or ()]
        values["layers"] = None if self.layers is None else list(self.layers)
        values["calibration"] = None if self.calibration is None else os.fspath(self.calibration)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Unknown names are an error, not ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"LemoConfig has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        values = dict(values)
        if values.get("phases") is not None:
            fields = {f.name for f in dataclasses.fields(Phase)}
            for phase in values["phases"]:
                extra = sorted(set(phase) - fields)
                if extra:
                    raise ValueError(f"Phase has no setting {', '.join(extra)}; it has {', '.join(sorted(fields))}")
            values["phases"] = tuple(Phase(**phase) for phase in values["phases"])
        return cls(**values)
