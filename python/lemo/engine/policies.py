"""How a layer's blocks are chosen: one small interface, five policies.

A policy gives every block of the batch a score (or a probability); `Policy.choose` turns scores into a kept list. What
a policy sees of a step is a `StepContext`. Its random choices derive from the run's seed, the process's rank, the step,
the micro-batch and the layer, so that a repeated run makes the same ones.

To add one: derive from `Policy`, set `name`, implement `scores`, and enter the class in `_CLASSES` and its name in
`lemo.engine.config.PolicyName`.
"""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from lemo import ops
from lemo.engine.config import Phase, PolicyName
from lemo.engine.families.base import AttentionOptions
from lemo.engine.layout import Blocks, Kept, KeptPair, Selection, SelectMode, select, sizes_known, start
from lemo.engine.sequence import Share

_MASK = 2**64 - 1


def mix_seed(*values: int) -> int:
    """One 63-bit seed from several integers (splitmix64 steps)."""
    z = 0
    for value in values:
        z = (z + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return z >> 1


class BlockScorer(Protocol):
    """Calibrated scores of blocks, as `lemo.predictors.PredictorSet` has them.

    thresholds, keep: per layer, the score from which a block is kept, and the share of blocks as a budget.
    """

    @property
    def thresholds(self) -> Sequence[float]: ...

    @property
    def keep(self) -> Sequence[float]: ...

    def scores(self, layer: int, x: Tensor, blocks: Blocks, share: Share | None = None) -> Tensor:
        """float32 [nb] for a layer with input x [T, d]; or with the tokens of a share of them."""
        ...

    def to(self, *, device: torch.device, dtype: torch.dtype) -> BlockScorer: ...


# A list, or the selection that makes it; None: nothing kept.
_Chosen = Kept | Selection | None


class _Forced(TypedDict):
    """Arguments of `select` that are the same for all lists of a layer."""

    always_first: int
    always_last: int
    seed: int
    chosen_by: str


@dataclass(frozen=True, eq=False)
class StepContext:
    """What is fixed during one forward pass.

    blocks: of the packed batch; seed: of this micro-batch in this process; queries_keys(layer, x): the layer's own
    q [T, Hq, D] and k [T, Hk, D] for residual rows x [T, d], position embedding applied; attention(layer): its options;
    required: bool [nb], blocks that are kept whatever their score and the budget (mode "skip": those with labels).
    share: what this process holds of them, if several share the batch: it is given x [T, d] of its own tokens.
    layers: those that lists are chosen for, in order, if they are known.
    """

    blocks: Blocks
    phase: Phase
    seed: int
    always_first: int
    always_last: int
    queries_keys: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    attention: Callable[[int], AttentionOptions]
    required: Tensor | None = None
    share: Share | None = None
    layers: Sequence[int] = ()

    @property
    def own_blocks(self) -> Blocks:
        """Those whose tokens this process holds."""
        return self.blocks if self.share is None else self.share.own

    def of_all(self, values: Tensor) -> Tensor:
        """[nb, ...] from the values of this process's blocks."""
        return values if self.share is None else self.share.gather(values)


class Policy(ABC):
    """Scores blocks, layer after layer, for one forward pass at a time."""

    name: PolicyName
    # Whether `observe` needs the norms of what a layer added to the residual stream.
    needs_update: bool = False
    # How scores become a list: "budget" keeps the highest; with "sample" they are probabilities.
    select_mode: SelectMode = "budget"
    # Whether all layers of a step share the first layer's choice, as one object.
    shared: bool = False
    # Whether scores depend on nothing that layers compute.
    blind: bool = False

    def __init__(self, predictors: BlockScorer | None = None) -> None:
        """Policies are made with the run's predictors, which most ignore, and their options as keyword arguments."""
        super().__init__()

    def begin(self, context: StepContext) -> None:
        """A new forward pass; forgets the last one."""
        self.context = context
        self._pair: KeptPair | None = None
        self._started: dict[int, tuple[_Chosen, _Chosen]] = {}

    @abstractmethod
    def scores(self, layer: int, x: Tensor) -> Tensor:
        """float32 [nb] for a layer with input x [T, d]."""

    def observe(self, layer: int, norms: Tensor, kept: Kept) -> None:
        """norms: float32 [M], length of what the layer added to every kept row."""
        return None

    def draw(self, device: torch.device) -> Tensor | None:
        """What the host draws for the first layer's scores of this pass; None: nothing. The policy draws the same by
        itself unless `use` has given it: so a recorded pass can have other numbers each time."""
        return None

    def use(self, drawn: Tensor) -> None:
        """`drawn`: of `draw`."""
        raise NotImplementedError

    def seed(self, layer: int) -> int:
        return mix_seed(self.context.seed, 0 if self.shared else layer)

    def keep(self, layer: int) -> float:
        """Fraction of the blocks that the layer keeps."""
        assert self.context.phase.keep is not None
        return self.context.phase.keep

    def threshold(self, layer: int) -> float:
        raise ValueError(f'Phase.select "threshold" needs policy "predictors"; got {self.name!r}')

    def choose(self, layer: int, x: Tensor) -> KeptPair:
        """Kept lists of the layer's attention and MLP; None = nothing kept. The same object if they share one. Called
        for one layer after the other."""
        if self._pair is None or not self.shared:
            started = self._started.pop(layer) if layer in self._started else self._start(layer, x)
            attention, mlp = started
            first = self._finish(attention)
            self._pair = first, first if mlp is attention else self._finish(mlp)
            following = self._following(layer)
            if following is not None:
                self._started[following] = self._start(following, x)
        return self._pair

    def _following(self, layer: int) -> int | None:
        """The next layer, if its lists can be selected already and only the device knows their sizes. The host reads
        these one layer later: the device has made the lists by then, and does not wait for the host meanwhile."""
        context = self.context
        mode = "poisson" if context.phase.weighted else self.select_mode
        if not self.blind or self.shared or context.required is not None or sizes_known(mode, context.blocks):
            return None
        return next((i for i in context.layers if i > layer), None)

    def _finish(self, chosen: _Chosen) -> Kept | None:
        if chosen is None or isinstance(chosen, Kept):
            return chosen
        kept = chosen.finish()
        return None if self.context.phase.weighted and not kept.num_blocks else kept

    def _start(self, layer: int, x: Tensor) -> tuple[_Chosen, _Chosen]:
        phase = self.context.phase
        if phase.select == "threshold":
            scores = self.scores(layer, x)
            passed = self._select(layer, scores, "threshold", 1.0, self.threshold(layer))
            return passed, passed if phase.mlp_keep is None else self._budget(layer, scores, phase.mlp_keep)
        keep = self.keep(layer)
        known: Tensor | None = None
        if keep not in (0.0, 1.0) or phase.mlp_keep not in (None, 0.0, 1.0):
            known = self.scores(layer, x)
        shared = self._budget(layer, known, keep)
        return shared, shared if phase.mlp_keep is None else self._budget(layer, known, phase.mlp_keep)

    def _budget(self, layer: int, scores: Tensor | None, keep: float) -> _Chosen:
        if keep == 0.0:
            required = self.context.required
            # Nothing but what is required; there is a required block, or there would be no list of them.
            return None if required is None else self._only(layer, required)
        if keep == 1.0 or scores is None:
            return Kept.everything(self.context.blocks)
        return self._select(layer, scores, self.select_mode, keep, 0.0)

    def _select(self, layer: int, scores: Tensor, mode: SelectMode, keep: float, threshold: float) -> Kept | Selection:
        context = self.context
        options: _Forced = {
            "always_first": context.always_first,
            "always_last": context.always_last,
            "seed": self.seed(layer),
            "chosen_by": f"layer {layer}, policy {self.name!r}",
        }
        if context.phase.weighted:
            # Certain blocks have probability 1 already; see `inclusion_probabilities`.
            options |= {"always_first": 0, "always_last": 0}
            return start(scores, context.blocks, mode="poisson", **options)
        required = context.required
        if required is None:
            return start(scores, context.blocks, mode=mode, keep=keep, threshold=threshold, **options)
        # Required blocks come first within the budget; if they exceed it, the list grows by what is missing.
        if mode != "sample":
            scores = torch.where(required & scores.isfinite(), torch.finfo(scores.dtype).max, scores)
        kept = start(scores, context.blocks, mode=mode, keep=keep, threshold=threshold, **options).finish()
        return self._only(layer, (kept.slots >= 0) | required)

    def _only(self, layer: int, chosen: Tensor) -> Kept:
        """The blocks of a mask bool [nb], which has at least one."""
        chosen_by = f"layer {layer}, policy {self.name!r}"
        return select(
            chosen.float(), self.context.blocks, mode="threshold", threshold=0.5, always_first=0, chosen_by=chosen_by
        )


class Predictors(Policy):
    """The paper's (section 4.2): small networks read the layer's input (lemo.predictors). per_layer: the calibrated
    budget of every layer in place of `Phase.keep`."""

    name = "predictors"

    def __init__(self, predictors: BlockScorer | None, *, per_layer: bool = False) -> None:
        if predictors is None:
            raise ValueError('policy "predictors" needs LemoConfig.calibration: a folder written by `lemo calibrate`')
        self.predictors: BlockScorer = predictors
        self.per_layer = per_layer
        self._placed: tuple[torch.device, torch.dtype] | None = None

    def scores(self, layer: int, x: Tensor) -> Tensor:
        place = (x.device, x.dtype)
        if self._placed != place:
            self.predictors, self._placed = self.predictors.to(device=x.device, dtype=x.dtype), place
        return self.predictors.scores(layer, x, self.context.blocks, self.context.share)

    def keep(self, layer: int) -> float:
        return float(self.predictors.keep[layer]) if self.per_layer else super().keep(layer)

    def threshold(self, layer: int) -> float:
        return float(self.predictors.thresholds[layer])


class UpdateNorm(Policy):
    """A block scores what the previous layer added to it: the largest update of its tokens (no predictor needed).

    Eliminated blocks had no update and score 0, so that with one budget for all layers the first layer's choice, drawn
    at random, stays for the whole step: tokens are in or out of the network as a whole. Options: `dense_layers` keeps
    everything in the first n layers, so that the first choice is an informed one; `carry` lets an eliminated block keep
    its last known update, so that it may come back once the kept ones' updates shrink.
    """

    name = "update_norm"
    needs_update = True

    def __init__(self, predictors: BlockScorer | None = None, *, carry: bool = False, dense_layers: int = 0) -> None:
        self.carry, self.dense_layers = carry, dense_layers

    def begin(self, context: StepContext) -> None:
        super().begin(context)
        self._last: Tensor | None = None
        self._drawn: Tensor | None = None

    def draw(self, device: torch.device, layer: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed(layer))
        drawn = torch.rand(self.context.blocks.num_blocks, generator=generator, dtype=torch.float32)
        return drawn.to(device)

    def use(self, drawn: Tensor) -> None:
        self._drawn = drawn

    def keep(self, layer: int) -> float:
        return 1.0 if layer < self.dense_layers else super().keep(layer)

    def scores(self, layer: int, x: Tensor) -> Tensor:
        if self._last is None:
            return self.draw(x.device, layer) if self._drawn is None or layer else self._drawn
        return self.context.of_all(self._last)

    def observe(self, layer: int, norms: Tensor, kept: Kept) -> None:
        largest = norms.new_zeros(kept.num_blocks).scatter_reduce_(0, kept.row_slots.long(), norms, "amax")
        if self.carry and self._last is not None:
            last = self._last.clone()
        else:
            last = norms.new_zeros(self.context.own_blocks.num_blocks)
        self._last = last.index_copy_(0, kept.blocks.long(), largest)


class Random(Policy):
    """Blocks at random, anew in every layer, or with `shared` one draw for all layers of a step."""

    name = "random"
    select_mode = "sample"
    blind = True

    def __init__(self, predictors: BlockScorer | None = None, *, shared: bool = False) -> None:
        self.shared = shared

    def begin(self, context: StepContext) -> None:
        super().begin(context)
        self._even: Tensor | None = None

    def scores(self, layer: int, x: Tensor) -> Tensor:
        if self._even is None:  # the same for all layers of a pass
            flat = torch.ones(self.context.blocks.num_blocks, dtype=torch.float32, device=x.device)
            self._even = probabilities(flat, self.context, self.keep(layer), floor=1.0)
        return self._even


class Sampled(Policy):
    """Blocks drawn with probabilities that grow with a score: p proportional to floor + (1 - floor) score / mean.

    source: the policy that scores, "predictors", "update_norm" or "exact"; by default "predictors" if calibrated.
    shared: one draw for all layers of a step, with the first layer's probabilities, so that a token is in or out of the
    network as a whole.
    """

    name = "sampled"
    select_mode = "sample"

    def __init__(
        self,
        predictors: BlockScorer | None = None,
        *,
        source: PolicyName | None = None,
        floor: float = 0.3,
        shared: bool = False,
    ) -> None:
        if not 0.0 < floor <= 1.0:
            raise ValueError(f'policy "sampled": floor must be in (0, 1]; got {floor}')
        source = source or ("update_norm" if predictors is None else "predictors")
        if source not in ("predictors", "update_norm", "exact"):
            raise ValueError(f'policy "sampled": source must be predictors, update_norm or exact; got {source!r}')
        self.source: Policy = _CLASSES[source](predictors)
        self.floor, self.shared = floor, shared
        self.needs_update = self.source.needs_update

    def begin(self, context: StepContext) -> None:
        super().begin(context)
        self.source.begin(context)

    def scores(self, layer: int, x: Tensor) -> Tensor:
        scores = self.source.scores(layer, x).float()
        return probabilities(scores, self.context, self.keep(layer), floor=self.floor)

    def observe(self, layer: int, norms: Tensor, kept: Kept) -> None:
        self.source.observe(layer, norms, kept)


class Exact(Policy):
    """The exact scores of the layer's own queries and keys (paper eq. 2): the oracle, as costly as attention itself.
    A key counts for the queries whose window it is in; sinks do not matter, as scores are no shares of attention.

    normalize: divide a block's sum by the number of query blocks that see it.
    """

    name = "exact"

    def __init__(self, predictors: BlockScorer | None = None, *, normalize: bool = False) -> None:
        self.normalize = normalize

    def scores(self, layer: int, x: Tensor) -> Tensor:
        q, k = self.context.queries_keys(layer, x)
        blocks = self.context.blocks
        options = self.context.attention(layer)
        where = (blocks.offsets, blocks.documents, blocks.block_size, options.scale, self.normalize)
        return ops.block_scores(q, k, *where, window=options.window or 0, softcap=options.softcap)[0]


_CLASSES: dict[PolicyName, Callable[..., Policy]] = {
    cls.name: cls for cls in (Predictors, UpdateNorm, Random, Sampled, Exact)
}


def make_policy(name: PolicyName, options: Mapping[str, Any], predictors: BlockScorer | None = None) -> Policy:
    """A policy by name. Raises ValueError for unknown names and options."""
    if name not in _CLASSES:
        raise ValueError(f"policy must be one of {', '.join(_CLASSES)}; got {name!r}")
    for option in ("shared", "carry", "normalize", "per_layer"):
        if option in options and not isinstance(options[option], bool):
            raise ValueError(f"policy {name!r}: {option} must be True or False; got {options[option]!r}")
    dense = options.get("dense_layers", 0)
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        raise ValueError(f"policy {name!r}: dense_layers must be an integer of at least 0; got {dense!r}")
    try:
        return _CLASSES[name](predictors, **options)
    except TypeError as error:
        raise ValueError(f"policy {name!r} does not take these options: {dict(options)} ({error})") from None


def probabilities(scores: Tensor, context: StepContext, keep: float, *, floor: float) -> Tensor:
    """Probabilities float32 [nb] of drawing every block, floor + (1 - floor) score / mean score before scaling.

    scores: [nb]. Without weights the draw has a fixed size: forced and required blocks get 1 and the others share what
    is left of the document's budget, min(n, max(floor(keep n + 1/2), forced, 1)) of its n blocks.

    With weights (`Phase.weighted`) every block needs a positive probability, and the sum is keep n, not rounded: forced
    blocks get 1 only while they use at most half of that, and are drawn like the others in shorter documents. No block
    gets less than about floor keep / 2.

    A non-finite score yields NaN for its block, which the selection reports; other blocks are unaffected. All on the
    device.
    """
    blocks = context.blocks
    counts = (blocks.documents[1:] - blocks.documents[:-1]).long()
    document = torch.repeat_interleave(
        torch.arange(counts.shape[0], device=scores.device), counts, output_size=scores.shape[0]
    )
    place = torch.arange(scores.shape[0], device=scores.device) - blocks.documents[:-1].long()[document]
    size = counts[document]

    def per_document(values: Tensor) -> Tensor:
        sums = torch.zeros(counts.shape[0], dtype=values.dtype, device=values.device)
        return sums.scatter_add_(0, document, values)

    certain = (place < context.always_first) | (place >= size - context.always_last)
    share = ctypes.c_float(keep).value  # as the kernels count
    if context.phase.weighted:
        budget = share * counts.double()
        certain &= (2.0 * per_document(certain.double()) <= budget)[document]
    else:
        if context.required is not None:
            certain |= context.required
        fixed = per_document(certain.double())
        budget = torch.floor(share * counts.double() + 0.5).clamp(min=1.0).maximum(fixed)
        budget = torch.minimum(budget, counts.double())
    finite = scores.isfinite()
    free = (~certain).double()
    values = torch.where(finite, scores, 0.0).double() * free
    mean = per_document(values) / per_document(free).clamp(min=1.0)
    # A document whose scores are all zero has no information: every block alike.
    relative = torch.where(mean[document] > 0, values / mean[document].clamp(min=1e-300), torch.ones_like(values))
    weight = (floor + (1.0 - floor) * relative.clamp(min=0.0)) * free
    p = certain.double()
    open_ = free.bool()
    # Every round caps what exceeded 1 and shares the rest among the others. With equal weights the first one is enough.
    for _ in range(1 if floor == 1.0 else 8):
        rest = budget - per_document(torch.where(open_, 0.0, p))
        total = per_document(torch.where(open_, weight, 0.0)).clamp(min=1e-300)
        p = torch.where(open_, weight * (rest / total)[document], p)
        over = open_ & (p >= 1.0)
        p = p.clamp(max=1.0)
        open_ = open_ & ~over
    # The lower bound keeps weights 1/p finite.
    return torch.where(finite, p.clamp(min=1e-3), math.nan).float()
