"""Which passes run as CUDA graphs (`LemoConfig.cuda_graphs`), when they are recorded, and when a recording is stale.

A graph serves passes of one shape: a phase, the lengths of documents, the sizes of kept lists, and what layers save.
The first pass of a shape runs as usual; the second records the forward and the backward pass of the layers
(`lemo.engine.capture`) and runs them; every later one only fills buffers and starts the graphs. Embedding, final norm
and loss stay outside.

Kept lists are chosen before the graph if that needs nothing that layers compute (one draw for all layers, or policy
`random`), and else within it, provided their sizes are known on the host. What a graph cannot do runs as usual, and the
reason is noted once. Addresses of weights, and which adapters are active, are compared before every pass: if anything
moved, all graphs are recorded again.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine import stack
from lemo.engine.capture import Buffers, Captured, CudaRecorder, Recorder, Turns, capture, layout_of
from lemo.engine.layout import KeptPair
from lemo.engine.linear import projection
from lemo.engine.policies import Policy
from lemo.engine.records import Records
from lemo.engine.step import Step
from lemo.engine.weights import AliasedWeights
from lemo.integration.training_pass import Begun, Made

# Shapes that are recorded; the buffers of each stay in memory.
MOST_SHAPES = 8
# Shapes that were seen once and may come again.
_MOST_SEEN = 256


class Graphs:
    """The graphs of one model. record: what records them; None: CUDA graphs on a CUDA device, nothing elsewhere."""

    def __init__(self, note: Callable[[str], None], record: Recorder | None = None) -> None:
        self.note, self.record = note, record
        self.captured: dict[Any, Captured] = {}
        # Tracebacks of recordings that failed, by phase, which is not tried again.
        self.failures: dict[Any, str] = {}
        self.replays = 0
        # Why the last pass could not be recorded, if so.
        self.reason: str | None = None
        self._seen: dict[Any, None] = {}
        self._turns = Turns()
        self._weights: tuple[Any, ...] = ()
        self._readable, self._routed = False, False
        self._records = record

    def run(
        self,
        begun: Begun,
        made: Made,
        params: Sequence[Tensor],
        weights: tuple[Any, ...],
        watched: bool = False,
    ) -> Tensor:
        """As `lemo.engine.stack.run`, of a pass that no other repeats. weights: their `fingerprint`. watched: a report
        needs the pass's lists, so it runs without a graph; what no graph can do is noted all the same, since a short
        run may have no other passes."""
        step, x = made.step, begun.x
        if weights != self._weights:
            self._forget(weights, begun)
        self.reason = self._reason(begun, step)
        if self.reason is not None:
            self.note(f"cuda_graphs: layers run without graphs: {self.reason}")
        if self.reason is not None or watched:
            return stack.run(step, x, params)
        policy = begun.plan.policy
        drawn, pairs = None, None
        if policy is None or _ahead(policy, begun):
            pairs = _choose_ahead(step, x)
        key = _key(begun, step, pairs, params)
        captured = self.captured.get(key)
        if self._turns.taken:  # another pass's saved rows are in the graphs' memory
            return stack.run(step, x, params)
        if captured is None and not self._worth(key, begun):
            return stack.run(step, x, params)
        if policy is not None and pairs is None:
            drawn = policy.draw(x.device)
        if captured is None:
            captured = self._capture(begun, drawn, pairs, params)
            if captured is None:
                return stack.run(step, x, params)
            self.captured[key] = captured
        captured.buffers.fill(x, begun.tables, drawn, pairs)
        self._tell(captured, begun, made, inside=pairs is None)
        self.replays += 1
        return captured.begin(step, x, params, self._turns)

    def clear(self) -> None:
        """Drops all graphs, and with them their memory."""
        self._weights = ()
        self.captured.clear()
        self._seen.clear()
        self._records = self.record  # CUDA: a pool whose graphs are gone cannot be used again

    def _forget(self, weights: tuple[Any, ...], begun: Begun) -> None:
        """Other weights or adapters than before."""
        self.clear()
        self._weights = weights
        self._readable = all(_readable(m) for layer in begun.layers for m in _projections(begun, layer))
        self._routed = begun.family.shape(begun.model.config).experts is not None

    def _worth(self, key: Any, begun: Begun) -> bool:
        """Whether to record a shape: if it comes a second time, and there is room."""
        if id(begun.plan.phase) in self.failures:
            self.reason = "recording failed in an earlier pass of this phase"
            return False
        if key not in self._seen:
            if len(self._seen) >= _MOST_SEEN:
                del self._seen[next(iter(self._seen))]
            self._seen[key] = None
            return False
        if len(self.captured) >= MOST_SHAPES:
            self.note(
                f"cuda_graphs: {MOST_SHAPES} shapes of batches and lists are recorded, and others run without graphs: "
                "graphs pay if windows are of one length and hold one document each, or few"
            )
            return False
        return True

    def _capture(
        self, begun: Begun, drawn: Tensor | None, pairs: Sequence[KeptPair] | None, params: Sequence[Tensor]
    ) -> Captured | None:
        policy = begun.plan.policy
        context = None if policy is None else policy.context
        buffers = Buffers.like(begun.x, begun.tables, drawn, pairs)
        blocks = begun.packed.blocks
        _ = blocks.cu_seqlens, blocks.num_tokens  # made before, so that they lie outside of the graphs' memory
        twin = begun.make(buffers.tables, remember=False)
        twin.step.weights = AliasedWeights(begun.layers)
        if policy is not None and buffers.drawn is not None:
            policy.use(buffers.drawn)
        try:
            captured = capture(twin.step, buffers, params, self._recorder(begun.x.device))
        except Exception as error:
            self.failures[id(begun.plan.phase)] = traceback.format_exc()
            self.reason = f"recording failed with {type(error).__name__}: {error}"
            mode = begun.plan.phase.mode
            self.note(f"cuda_graphs: layers run without graphs in a phase of mode {mode!r}: {self.reason}")
            return None
        finally:
            if policy is not None and context is not None:
                policy.begin(context)
        captured.kept_ratios = twin.lists.kept_ratios, twin.lists.mlp_kept_ratios
        captured.tiles = {} if twin.tiles is None else twin.tiles.chosen
        captured.holds = twin, blocks, policy
        return captured

    def _recorder(self, device: torch.device) -> Recorder:
        if self._records is None:
            self._records = CudaRecorder(device)
        return self._records

    def _tell(self, captured: Captured, begun: Begun, made: Made, inside: bool) -> None:
        """What others read of a pass after its layers ran, taken from the graph where it chose. inside: the lists."""
        step, remembered = made.step, begun.plan.remembered
        if inside:
            made.lists.kept_ratios[:], made.lists.mlp_kept_ratios[:] = captured.kept_ratios
            step.participation = captured.step.participation
        if made.tiles is not None:
            made.tiles.chosen.update(captured.tiles)
        if remembered is not None and (inside or captured.tiles):
            remembered.in_graph = True

    # --- what cannot be recorded ---

    def _reason(self, begun: Begun, step: Step) -> str | None:
        """Why a pass runs as usual; None: it can be recorded."""
        plan, packed, phase = begun.plan, begun.packed, begun.plan.phase
        if self.record is None and not begun.x.is_cuda:
            return "the model is not on a CUDA device"
        if plan.share is not None or step.weights.divided:
            return "processes share a sequence or divide the weights (FSDP2), and exchange them in every layer"
        if type(step.records) is not Records:
            return "saved rows are offloaded to host memory"
        if plan.general:
            return "modules of the layers (dropout, other kinds of adapters, trained weights) are called as they are"
        if plan.random is not False:
            return "layers draw random numbers (dropout)"
        if step.attention.places is not None:
            return "documents with padding inside are longer than a sliding window"
        if phase.select == "threshold" or phase.weighted:
            return "how many blocks this phase keeps changes from step to step (select threshold, weighted)"
        if phase.mode == "sparse" and (phase.mass is not None or phase.tile_policy == "predictors"):
            return "the host has to read sizes of lists of tiles (mass, tile_policy predictors)"
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return "a checkpoint, or a library that offloads activations, wants to see saved tensors"
        if self._routed:
            return "how many rows an expert has is known on the device alone"
        if not self._readable:
            return "weights are quantized, or several adapters are active together"
        if plan.policy is None or _ahead(plan.policy, begun):
            return None
        if plan.policy.select_mode != "budget":
            return (
                f"policy {plan.policy.name!r} draws anew in every layer; with the option `shared` it draws once a step"
            )
        if begun.required is not None:
            return "blocks with labels are kept beyond the budget, and only the device knows how many"
        if any(n % packed.blocks.block_size for n in packed.blocks.lengths):
            return (
                f"documents are no multiples of block_size ({packed.blocks.block_size}) long, so that only the device "
                "knows how many tokens are kept"
            )
        return None


def _projections(begun: Begun, layer: nn.Module) -> list[nn.Module]:
    return [*begun.family.attention_modules(layer), *begun.family.mlp_modules(layer)]


def _readable(module: nn.Module) -> bool:
    """Whether a graph can read the module's weights where they lie."""
    spec = projection(module)
    return spec is None or (spec.form is None and (spec.a is None or isinstance(spec.a, nn.Parameter)))


def _ahead(policy: Policy, begun: Begun) -> bool:
    """Whether all lists can be chosen from the stream before the first layer."""
    layers = begun.config.layers
    return policy.blind or (policy.shared and (layers is None or 0 in layers))


def _choose_ahead(step: Step, x: Tensor) -> list[KeptPair]:
    with torch.no_grad(), step.autocast():
        pairs = [step.choose(i, x.detach()) for i in range(len(step.layers))]
    for pair in pairs:
        for kept in pair:
            step.check_later(kept)
    step.choose = lambda i, _: pairs[i]
    return pairs


def _key(begun: Begun, step: Step, pairs: Sequence[KeptPair] | None, params: Sequence[Tensor]) -> tuple[Any, ...]:
    """All that a graph depends on, but for weights."""
    x, blocks = begun.x, begun.packed.blocks
    saves = step.recompute if isinstance(step.recompute, str) else tuple(step.recompute)
    tables = () if begun.tables is None else tuple((tuple(t.shape), t.dtype) for t in begun.tables)
    modes = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), begun.trained
    lists = None if pairs is None else layout_of(pairs)
    phase, trained = id(begun.plan.phase), tuple(id(p) for p in params)
    size = blocks.block_size, blocks.lengths, tuple(x.shape), x.dtype, x.device
    return phase, size, saves, tuple(step.segments), step.autocast, tables, modes, lists, trained
