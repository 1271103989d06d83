"""What fits, before anything is run: the memory of every phase, and the longest context that a GPU holds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from lemo.engine import budget, families
from lemo.engine.adapted import adapters, countable
from lemo.engine.config import LemoConfig, Phase, Recompute
from lemo.engine.memory import (
    LayerShape,
    frozen_bytes,
    layer_shape,
    quantized,
    stored_bytes,
    trained_bytes,
    weight_bytes,
)
from lemo.engine.sizes import format_bytes, left_for_steps
from lemo.engine.wrappers import base_model

# Contexts are tried in multiples of so many tokens, up to the most that one batch may have.
_STEP, _MOST = 1024, 1 << 30
_GIB = 1 << 30


class Estimate(dict[str, Any]):
    """{"tokens", "recompute", "phases": [{"mode", "keep", "tokens", "weights", "saved", "working", "peak", "host",
    "layers", "offloaded", "segments"}], "peak"}, in bytes; prints as a table in GiB. tokens: of a step, and of one in
    the phase, which may have shorter windows; layers: how many save what; host: in host memory; offloaded: layers of
    which something is there; segments: layers of each, if all but the last run again."""

    def __str__(self) -> str:
        lines = [f"{self['tokens']} tokens, recompute {self['recompute']} (GiB)"]
        host = any(p["host"] for p in self["phases"])
        names = ("weights", "saved", "working", "peak", *(("host",) if host else ()))
        by_layer = self["recompute"] == "by budget" or host or any(p["segments"] for p in self["phases"])
        windows = any(p["tokens"] != self["tokens"] for p in self["phases"])
        tokens = f"{'tokens':>10}" if windows else ""
        lines.append(f"{'phase':<14}{'keep':>6}{tokens}{''.join(f'{name:>10}' for name in names)}")
        for p in self["phases"]:
            sizes = "".join(f"{p[name] / _GIB:>10.2f}" for name in names)
            tokens = f"{p['tokens']:>10}" if windows else ""
            lines.append(f"{p['mode']:<14}{p['keep']:>6.2f}{tokens}{sizes}")
            if by_layer:
                saved = ", ".join(f"{n} {level}" for level, n in p["layers"].items())
                offloaded = f"; rows of {p['offloaded']} in host memory" if p["offloaded"] else ""
                again = _run_again(p["segments"])
                lines.append(f"{'':<14}layers: {saved}{offloaded}{again}")
        lines.append(f"The largest phase decides what fits: {self['peak'] / _GIB:.2f} GiB.")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Model:
    """What an estimate needs to know of a model."""

    shape: LayerShape
    shapes: tuple[LayerShape, ...]
    weights: int
    quantized: bool
    config: Any
    countable: bool = True

    @classmethod
    def of(cls, model: Any, element: int, lora_rank: int, lora_targets: Sequence[str] | str | None) -> _Model:
        if hasattr(model, "peft_config"):
            return cls._adapted(model, element)
        loaded = isinstance(model, torch.nn.Module)
        config = base_model(model).config if loaded else model
        shape = layer_shape(config, element=element, lora_rank=lora_rank, lora_targets=lora_targets)
        shapes = budget.same_objects(shape.at(i) for i in range(shape.layers))
        return cls(
            shape,
            shapes,
            weight_bytes(shape, stored_bytes(model) if loaded else None),
            loaded and quantized(model),
            config,
        )

    @classmethod
    def _adapted(cls, model: Any, element: int) -> _Model:
        """With the adapters that the model has."""
        family, base = families.find(model)
        shape = layer_shape(base.config, element=element)
        found, counted = zip(*(adapters(family, layer) for layer in family.layers(family.decoder(base))), strict=True)
        return cls(
            shape,
            budget.same_objects(dataclasses.replace(shape, lora=ranks).at(i) for i, ranks in enumerate(found)),
            frozen_bytes(model) + trained_bytes(model),
            quantized(model),
            base.config,
            countable=all(counted),
        )

    def plan(self, config: LemoConfig, phase: Phase, context: int, batch: int) -> budget.MemoryPlan:
        shape, tokens = self.shape, context * batch
        windows = families.of(self.config).windows(self.config, context)
        needs = budget.Needs(
            shapes=self.shapes,
            lists=tuple(budget.layer_lists(config, phase, (context,) * batch, windows)),
            phase=phase,
            tokens=tokens,
            weights=self.weights,
            dequantizes=self.quantized,
            logits=budget.logit_bytes(shape, tokens) if config.return_logits else 0,
            countable=countable(phase, shape, self.countable),
        )
        if config.budget is not None:
            return budget.choose(needs, config.budget, config.offload, config.recompute_layers)
        recompute: Recompute = "none" if config.recompute == "auto" else config.recompute
        again = False if config.recompute_layers == "auto" else config.recompute_layers
        return budget.fixed(needs, recompute, config.offload, again, config.recompute == "none")


def estimate(
    model: Any,
    config: LemoConfig | None = None,
    context: int = 4096,
    batch: int = 1,
    *,
    windows: Sequence[Fraction] | None = None,
    element: int = 2,
    lora_rank: int = 8,
    lora_targets: Sequence[str] | str | None = None,
) -> Estimate:
    """Memory of every phase of a fine-tuning run. What the largest phase needs decides what fits.

    model: a transformers configuration, whose weights then count `element` bytes each, or the model itself, whose
    weights count as they are stored (far less if they are quantized); a model of PEFT, which may be on torch's meta
    device, with all that trains in it, in place of lora_rank and lora_targets; batch documents of `context` tokens
    each; windows: of every phase, the share of the context that its documents have (default: all of it); element: bytes
    of an activation; lora_targets: see `layer_shape`. `saved` is exact for plain LoRA without dropout, except in
    weighted phases, where the number of kept blocks varies and three standard deviations are added, with thresholds,
    which may keep everything, and with `Phase.mass`, where the lists of tiles are counted as long as the other limits
    let them become; `working` is an estimate. Raises UnsupportedModelError for a model that lemo does not know,
    ValueError for windows without a token or not of every phase and for layers that the model lacks, and BudgetError (a
    ValueError), naming every phase that does not fit, for a memory_budget that is too small.
    """
    if context < 1 or batch < 1:
        raise ValueError(f"context and batch must be at least 1; got {context} and {batch}")
    config = LemoConfig() if config is None else config
    known = _Model.of(model, element, lora_rank, lora_targets)
    config.check_layers(len(known.shapes))
    phases = tuple(config.phases or ())
    lengths = [int(context * share) for share in _shares(windows, phases)]
    if min(lengths) < 1:
        raise ValueError(f"windows: a context of {context} tokens has none in the shortest; give a longer context")
    plans = budget.planned_together(
        functools.partial(known.plan, config, phase, tokens, batch)
        for phase, tokens in zip(phases, lengths, strict=True)
    )
    rows = [_row(*values) for values in zip(phases, plans, (batch * tokens for tokens in lengths), strict=True)]
    recompute = "none" if config.recompute == "auto" else config.recompute
    return Estimate(
        tokens=batch * context,
        recompute=recompute if config.memory_budget is None else "by budget",
        phases=rows,
        peak=max(row["peak"] for row in rows),
    )


def _shares(windows: Sequence[Fraction] | None, phases: Sequence[Phase]) -> list[Fraction]:
    """Of the context, by phase. Raises ValueError."""
    shares = [Fraction(1)] * len(phases) if windows is None else [Fraction(share) for share in windows]
    if len(shares) != len(phases) or not all(0 < share <= 1 for share in shares):
        raise ValueError(
            f"windows must have a share of the context, above 0 and at most 1, for each of {len(phases)} phases; got "
            f"{[str(share) for share in shares]}"
        )
    return shares


def _run_again(segments: Sequence[int]) -> str:
    return f"; {sum(segments[:-1])} run again, in segments of {', '.join(map(str, segments[:-1]))}" if segments else ""


def _row(phase: Phase, plan: budget.MemoryPlan, tokens: int) -> dict[str, Any]:
    return {
        "mode": phase.mode,
        "keep": 1.0 if phase.keep is None else phase.keep,
        "tokens": tokens,
        "weights": plan.weights,
        "saved": plan.saved,
        "working": plan.working,
        "peak": plan.peak,
        "host": plan.host,
        "layers": plan.layers,
        "offloaded": len(plan.away),
        "segments": list(plan.segments),
    }


# --- the longest context ----------------------------------------------------------------------------------------------


class Longest(dict[str, Any]):
    """{"gpu", "left", "batch", "positions", "phases": [{"mode", "keep", "limits", "window", "context",
    "context_offload", "host", "context_again"}]}: the longest contexts whose steps take at most `left` bytes, with
    everything recomputed, without and with offload (which then has `host` bytes in host memory), and with segments of
    layers that run again. window: the share of the context that the phase's documents have; positions: the model's own,
    or None. Prints as a table."""

    def __str__(self) -> str:
        lines = [
            f"The longest context that fits {format_bytes(self['gpu'])}, everything recomputed, batch {self['batch']} "
            f"({format_bytes(self['left'])} for a step; the rest is for the CUDA context and fragmentation)",
        ]
        names = []
        for p in self["phases"]:
            name = f"{p['mode']} keep {p['keep']:g}" if p["keep"] < 1 else p["mode"]
            name += "".join(f" {limit}={value:g}" for limit, value in p["limits"].items())
            names.append(name + (f" window={p['window']:g}" if p["window"] < 1 else ""))
        width = max([26, *(len(name) + 1 for name in names)])
        lines.append(f"{'mode':<{width}}{'tokens':>12}{'run again':>12}{'with offload':>14}{'host GiB':>10}")
        for name, p in zip(names, self["phases"], strict=True):
            contexts = f"{p['context']:>12}{p['context_again']:>12}{p['context_offload']:>14}"
            lines.append(f"{name:<{width}}{contexts}{p['host'] / _GIB:>10.1f}")
        positions = self["positions"]
        if positions is not None and any(p["context_offload"] > positions for p in self["phases"]):
            lines.append(f"The model itself has {positions} positions: what lies beyond needs --interpolate-positions.")
        return "\n".join(lines)


def longest(
    model: Any,
    gpu: int,
    config: LemoConfig | None = None,
    batch: int = 1,
    *,
    windows: Sequence[Fraction] | None = None,
    element: int = 2,
    lora_rank: int = 8,
    lora_targets: Sequence[str] | str | None = None,
) -> Longest:
    """The longest context that fits a GPU of `gpu` bytes, for every phase of `config`; 0 if not even 1024 tokens do.

    Everything is recomputed, whatever `config` says of it, and `batch` documents make a step; the other arguments are
    those of `estimate`. A context is a multiple of 1024 tokens, and longer in phases whose documents are a share of it.
    Raises UnsupportedModelError for a model whose attention CUDA kernels do not compute, and ValueError for windows
    that are not shares of every phase and for layers that the model lacks.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    config = LemoConfig() if config is None else config
    known, left = _Model.of(model, element, lora_rank, lora_targets), left_for_steps(gpu)
    base = dataclasses.replace(config, recompute="full", memory_budget=None, offload=False, recompute_layers=False)
    base.check_layers(len(known.shapes))
    families.of(known.config).check_kernels(known.config, torch.device("cuda"))
    rows = []
    phases = tuple(config.phases or ())
    for phase, share in zip(phases, _shares(windows, phases), strict=True):
        found = []
        offloaded = dataclasses.replace(base, offload=True)
        for settings in (base, offloaded, dataclasses.replace(base, recompute_layers=True)):
            found.append(_search(known, settings, phase, batch, left, share))
        host = known.plan(offloaded, phase, _window(found[1], share), batch).host if found[1] else 0
        rows.append(
            {
                "mode": phase.mode,
                "keep": 1.0 if phase.keep is None else phase.keep,
                "limits": phase.limits,
                "window": float(share),
                "context": found[0],
                "context_offload": found[1],
                "host": host,
                "context_again": found[2],
            }
        )
    positions = getattr(known.config, "max_position_embeddings", None)
    return Longest(gpu=gpu, left=left, batch=batch, positions=positions, phases=rows)


def _window(context: int, share: Fraction) -> int:
    """Tokens of a window; a context of a few of them has at least one."""
    return max(1, int(context * share))


# One argument more than usual, rather than the same five in an object for one caller.
def _search(known: _Model, config: LemoConfig, phase: Phase, batch: int, left: int, share: Fraction) -> int:
    """The largest multiple of _STEP whose step fits: a step's memory grows with its context."""

    def fits(steps: int) -> bool:
        return known.plan(config, phase, _window(steps * _STEP, share), batch).peak <= left

    most = _MOST // batch // _STEP
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * _STEP
