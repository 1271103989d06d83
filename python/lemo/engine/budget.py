"""What each layer saves for its backward pass, and where: decided on the host, before a step, from shapes alone.

Layers are sized by the most rows that their lists can have, never by counts that only the device knows, so a choice
costs no synchronization, and processes and resumed runs that see batches of the same shape choose alike. No choice
changes a result: saving less means computing the same numbers again. (In mode "backward" up to rounding: with "none",
the forward pass multiplies kept rows and the others apart.)

Which layers save more ("richer" ones), in `choose`:

1. Attention's output comes first, on as many layers as fit: its recomputation costs the most per byte, and the more so
   the longer the documents. Only what is left over is spent on "none", which saves many more bytes of cheaper products.
   (Mode "backward" always saves attention's output.)
2. Among layers, those with more rows come first, since attention's cost grows with the square of the rows; among equal
   ones the last layers, whose records the backward pass frees first.

Rows are offloaded from the layers that keep most, and among equal ones from the first, which need them back last.

If neither suffices, layers run again in segments (`Step.segments`): as few layers as fit, since each costs another
forward pass. The last segment's layers do not: their backward pass begins as soon as they are done. While a segment is
worked on, only the streams before it are saved besides, so segments grow shorter towards the end.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lemo.engine.config import LemoConfig, Phase, Recompute
from lemo.engine.layout import kept_counts
from lemo.engine.memory import LayerShape, expert_bytes, forward_bytes, saved_bytes, working_bytes
from lemo.engine.sizes import format_bytes, parse_bytes, rounded_up
from lemo.engine.tiles import STRIP_BYTES, TILE, capacity, leaves_out

# As in `LemoConfig`: a text other than "auto" is a number of bytes.
Offload = bool | int | str
Again = bool | int | Literal["auto"]
_LEVELS: tuple[Recompute, ...] = ("full", "attention", "none")


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListSize:
    """The most rows that a list can have. documents: the batch's; longest: of its documents, in rows of the list;
    blocks: of the list; everything: it is the step's own list of all tokens."""

    count: int
    documents: int
    longest: int
    blocks: int
    everything: bool


@dataclass(frozen=True)
class LayerLists:
    """The lists of a layer. mlp: None if the MLP has that of attention. windowed: its attention has a window that
    documents exceed, and so no lists of tiles."""

    attention: ListSize
    mlp: ListSize | None = None
    windowed: bool = False

    @property
    def most(self) -> int:
        return self.attention.count if self.mlp is None else max(self.attention.count, self.mlp.count)


def layer_lists(
    config: LemoConfig, phase: Phase, lengths: Sequence[int], windows: Sequence[int | None], required: bool = False
) -> list[LayerLists]:
    """The lists of every layer for documents of these lengths. windows: of every layer's attention, if documents exceed
    it. required: blocks are kept beyond the budget, and only the device knows how many."""
    everything = chosen = LayerLists(_rows(lengths, lengths, config.block_size, True))
    if phase.chooses_blocks:
        attention = _list(config, phase, phase.keep, lengths, required)
        mlp = None if phase.mlp_keep is None else _list(config, phase, phase.mlp_keep, lengths, required)
        chosen = LayerLists(attention, None if mlp is not None and mlp.everything and attention.everything else mlp)
    eliminating = range(len(windows)) if config.layers is None else set(config.layers)
    found = [chosen if i in eliminating else everything for i in range(len(windows))]
    return [
        lists if window is None else replace(lists, windowed=True) for lists, window in zip(found, windows, strict=True)
    ]


def _rows(lengths: Sequence[int], kept: Sequence[int], block_size: int, everything: bool) -> ListSize:
    count = sum(kept)
    return ListSize(count, len(lengths), max(kept), -(-count // block_size), everything)


def _list(config: LemoConfig, phase: Phase, keep: float | None, lengths: Sequence[int], required: bool) -> ListSize:
    b, tokens = config.block_size, sum(lengths)
    threshold = phase.select == "threshold" and keep is phase.keep
    if keep is None or threshold or (required and keep < 1.0):
        return _rows(lengths, lengths, b, False)
    if keep == 1.0 and not phase.weighted:
        return _rows(lengths, lengths, b, True)
    if keep == 0.0:
        return ListSize(0, len(lengths), 0, 0, False)
    if phase.weighted:  # independent draws: three standard deviations of their number above its mean
        drawn = keep * tokens + 3.0 * b * (tokens / b * keep * (1.0 - keep)) ** 0.5
        count = min(tokens, round(drawn))
        return ListSize(count, len(lengths), min(count, max(lengths)), -(-count // b), False)
    counts = kept_counts([-(-n // b) for n in lengths], keep, config.always_first, config.always_last)
    kept = [min(n, k * b) for n, k in zip(lengths, counts, strict=True)]
    # A list that happens to hold everything is the step's own; to count its own as well is an upper bound.
    return _rows(lengths, kept, b, all(-(-n // b) == k for n, k in zip(lengths, counts, strict=True)))


# --- bytes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerBytes:
    """What a layer saves. rows: what offload moves, activations of kept rows; others: lists, and graphs. last: those of
    the rows that are in its last record: all, unless its MLP has a list of its own."""

    rows: int
    others: int
    last: int

    @property
    def total(self) -> int:
        return self.rows + self.others


def layer_bytes(shape: LayerShape, lists: LayerLists, phase: Phase, recompute: Recompute) -> LayerBytes:
    """What a layer saves, exactly if its lists are as long as `lists` says (see `saved_bytes`)."""
    a, m, s = lists.attention, lists.mlp, shape
    tiles = None
    if phase.mode == "sparse" and not lists.windowed and leaves_out(a.longest, phase):
        tiles = (a.count // TILE + a.documents, capacity(a.count, a.documents, a.longest, phase))
    total = 0
    if a.count:
        total = saved_bytes(
            s,
            a.count,
            recompute=recompute,
            mode=phase.mode,
            blocks=a.blocks,
            documents=a.documents,
            weighted=phase.weighted,
            everything=a.everything,
            tiles=tiles,
        )
    moved, of_mlp = s.element * a.count * s.hidden, 0
    if recompute == "attention" or (recompute == "full" and phase.mode == "backward"):
        moved += s.element * a.count * s.heads * s.head_dim + 4 * s.heads * a.count
    if m is not None:  # a second record, with its list; with "none", the MLP's graph has its rows, not attention's
        of_mlp = s.element * m.count * s.hidden
        moved += of_mlp
        total += 0 if m.everything or not m.count else 4 * m.count + 4 * (m.documents + 1)
        none = _mlp_bytes(s, m.count) - _mlp_bytes(s, a.count)
        none += s.element * m.count * s.hidden if s.post_norm else 0  # what the MLP reads: here not what attention left
        total += none if recompute == "none" else s.element * m.count * s.hidden
    if recompute == "none":  # only mode "backward" moves graphs, with all that they save
        moved = total - layer_bytes(shape, lists, phase, "full").others if phase.mode == "backward" else 0
        of_mlp = 0
    return LayerBytes(moved, total - moved, of_mlp or moved)


def _mlp_bytes(s: LayerShape, rows: int) -> int:
    """What the MLP saves with "none": its norm's input, and what its graph holds."""
    width = s.hidden + sum(rank for name, rank in s.lora.items() if name in ("gate", "up", "gate_up", "down"))
    if s.experts is not None:
        return s.element * rows * width + expert_bytes(s, rows)
    return rows * (s.element * width + s.activation_bytes)


def same_objects(shapes: Iterable[LayerShape]) -> tuple[LayerShape, ...]:
    """Equal shapes as one object, so that they are looked at once."""
    known: list[LayerShape] = []
    found = []
    for shape in shapes:
        first = next((k for k in known if k == shape), shape)
        if first is shape:
            known.append(shape)
        found.append(first)
    return tuple(found)


def logit_bytes(shape: LayerShape, tokens: int) -> int:
    """Logits that are made whole, and their gradient, and both in fp32 for the loss."""
    return 2 * (shape.element + 4) * tokens * shape.vocab


# --- plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """What every layer saves, the layers whose rows may go to host memory, and the bytes that this takes. weights: with
    what the optimizer keeps; saved: on the device; host: in host memory. away: the offloaded layers of which something
    is there, in effect. segments: layers of each, if all but the last run again; else empty."""

    recompute: tuple[Recompute, ...]
    offloaded: frozenset[int]
    weights: int
    saved: int
    working: int
    host: int
    away: frozenset[int] = frozenset()
    segments: tuple[int, ...] = ()

    @property
    def again(self) -> int:
        """How many layers run again."""
        return sum(self.segments[:-1])

    @property
    def peak(self) -> int:
        return self.weights + self.saved + self.working

    @property
    def layers(self) -> dict[str, int]:
        """How many layers save what."""
        return {level: self.recompute.count(level) for level in _LEVELS if level in self.recompute}

    def __str__(self) -> str:
        layers = ", ".join(f"{level} in {count}" for level, count in self.layers.items())
        host = f"; rows of {len(self.away)} in host memory ({format_bytes(self.host)})" if self.away else ""
        again = f"; {self.again} run again, in {len(self.segments) - 1} segments" if self.again else ""
        return f"layers recompute {layers}{host}{again}; about {format_bytes(self.peak)} a step"


@dataclass(frozen=True)
class Needs:
    """What a step's memory depends on.

    shapes, lists: of every layer. weights: bytes of the model and its optimizer. tokens: of the batch. dequantizes:
    weights are made dense for each use. logits: bytes of logits that are made whole. countable: whether `saved_bytes`
    knows what "none" saves; otherwise it is not chosen.
    """

    shapes: tuple[LayerShape, ...]
    lists: tuple[LayerLists, ...]
    phase: Phase
    tokens: int
    weights: int
    dequantizes: bool = False
    logits: int = 0
    countable: bool = True

    @functools.cached_property
    def _bytes(self) -> list[dict[Recompute, LayerBytes]]:
        known: dict[tuple[int, LayerLists], dict[Recompute, LayerBytes]] = {}
        found = []
        for shape, lists in zip(self.shapes, self.lists, strict=True):
            key = (id(shape), lists)
            if key not in known:
                known[key] = {level: layer_bytes(shape, lists, self.phase, level) for level in _LEVELS}
            found.append(known[key])
        return found

    def of(self, layer: int, recompute: Recompute) -> LayerBytes:
        return self._bytes[layer][recompute]

    def working(self, recompute: Sequence[Recompute], again: bool = False) -> int:
        """What is needed at a time besides weights and saved rows, at most. again: layers run again."""
        return max([self._working[level] for level in set(recompute)] + [self._forward_again] * again)

    @functools.cached_property
    def _working(self) -> dict[Recompute, int]:
        """By what layers save."""
        layers = zip(self.shapes, self.lists, strict=True)
        kinds = {(id(s), lists.most, self._in_place(lists), lists.mlp is None): s for s, lists in layers}
        return {
            level: self._always
            + max(
                working_bytes(
                    s,
                    self.tokens,
                    rows,
                    self.phase.mode,
                    level,
                    self.dequantizes,
                    in_place=in_place,
                    separable=self.countable and one_list,
                )
                for (_, rows, in_place, one_list), s in kinds.items()
            )
            for level in _LEVELS
        }

    @property
    def _always(self) -> int:
        sparse = self.phase.mode == "sparse" and any(leaves_out(x.attention.longest, self.phase) for x in self.lists)
        return self.logits + (STRIP_BYTES if sparse else 0)

    def _in_place(self, lists: LayerLists) -> bool:
        return lists.mlp is None and lists.attention.everything and not self.phase.weighted

    @functools.cached_property
    def _forward_again(self) -> int:
        """With the gradient of the stream, of a layer whose rows are not saved yet."""
        rows = self.tokens if self.phase.mode == "backward" else max(lists.most for lists in self.lists)
        least = min(self.of(i, "full").rows for i in range(len(self.shapes)))
        kinds = {id(s): s for s in self.shapes}.values()
        return self._always + self.stream + max(forward_bytes(s, self.tokens, rows) for s in kinds) - least

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.shapes[0].element * self.shapes[0].hidden * self.tokens

    def plan(
        self, recompute: Sequence[Recompute], offloaded: frozenset[int], segments: tuple[int, ...] = ()
    ) -> MemoryPlan:
        sizes = [self.of(i, level) for i, level in enumerate(recompute)]
        lists = [self.of(i, "full").others for i in range(len(sizes))]
        saved = host = start = 0
        away: set[int] = set()
        streams: list[int] = []  # the first layers of the segments before, which have their streams
        for count in segments or (len(sizes),):
            layers = range(start, start + count)
            here = sum(sizes[i].others for i in layers) + sum(lists[:start])
            units = [(self.stream, i in offloaded) for i in streams]
            units += [(sizes[i].rows, i in offloaded) for i in layers]
            saved = max(saved, here + _on_device(units))
            moved = [nbytes for nbytes, goes in units if goes]
            # What is put last is needed back first, and never leaves.
            stays = sizes[layers[-1]].last if layers[-1] in offloaded else 0
            host = max(host, sum(moved) - stays)
            away |= {i for i in layers if i in offloaded and sizes[i].rows > (stays if i == layers[-1] else 0)}
            away |= offloaded.intersection(streams)
            streams.append(start)
            start += count
        working = self.working(recompute, len(segments) > 1)
        known = (tuple(recompute), offloaded, self.weights, saved, working, host, frozenset(away))
        return MemoryPlan(*known, segments if len(segments) > 1 else ())


def _on_device(units: Iterable[tuple[int, bool]]) -> int:
    """The most that is on the device at a time of what is saved: bytes in the order in which they are put, and whether
    they go to the host. What goes is there while it is worked on, and while what follows it is: on its way out in the
    forward pass, and on its way in in the backward pass."""
    most = stays = before = 0
    for nbytes, goes in units:
        most = max(most, stays + before + nbytes)
        before = nbytes if goes else 0
        stays += nbytes - before
    return most


@dataclass(frozen=True)
class _TooSmall:
    """A step that does not fit. plan: what it needs at least; offloading_helps, segments_help: it would fit so."""

    step: str
    keep: float
    tokens: int
    plan: MemoryPlan
    offloading_helps: bool
    segments_help: bool

    def __str__(self) -> str:
        plan = self.plan
        in_segments = ", in segments of layers that run again" if plan.segments else ""
        return (
            f"needs at least {rounded_up(plan.peak)} with everything recomputed{in_segments} (weights and optimizer "
            f"{format_bytes(plan.weights)}, saved rows {format_bytes(plan.saved)}, working memory "
            f"{format_bytes(plan.working)})"
        )


class BudgetError(ValueError):
    """A memory_budget that is too small for one step or several, of different phases."""

    def __init__(self, budget: int, steps: Sequence[_TooSmall]) -> None:
        self.budget, self.steps = budget, tuple({(s.step, s.keep, s.tokens, str(s)): s for s in steps}.values())
        if len(self.steps) == 1:
            (one,) = self.steps
            what = f"a step of {one.step} with {one.tokens} tokens {one}"
            raised = "raise it"
        else:
            lines = (f"{s.step} keep {s.keep:g} with {s.tokens} tokens {s}" for s in self.steps)
            what = f"the steps of {len(self.steps)} phases do not fit: " + "; ".join(lines)
            raised = f"raise it to {rounded_up(max(s.plan.peak for s in self.steps))}"
        ways = [raised]
        if all(s.offloading_helps for s in self.steps):
            ways.append("offload saved rows to host memory (offload=True, --offload all)")
        if all(s.segments_help for s in self.steps):
            ways.append('let layers run again in segments (recompute_layers="auto", --recompute-layers auto)')
        ways.append("keep fewer tokens or train on shorter windows")
        super().__init__(f"memory_budget is {format_bytes(budget)}, and {what}: {', or '.join(ways)}")


def planned_together(plans: Iterable[Callable[[], MemoryPlan]]) -> list[MemoryPlan]:
    """The plans of all phases. Raises BudgetError, naming every phase that does not fit, each with its least."""
    found: list[MemoryPlan] = []
    errors: list[BudgetError] = []
    for plan in plans:
        try:
            found.append(plan())
        except BudgetError as error:
            errors.append(error)
    if errors:
        raise BudgetError(errors[0].budget, [step for error in errors for step in error.steps])
    return found


def fixed(
    needs: Needs, recompute: Recompute, offload: Offload = False, again: Again = False, graphs: bool = False
) -> MemoryPlan:
    """All layers save the same; offloaded ones at most attention's output, unless `graphs`, in mode "backward": only
    its forward pass, which is over all tokens, takes as long as copies of all that kept ones save. again: layers of a
    segment that runs again, or True: in those segments that need the least memory."""
    offloaded = _to_offload(needs, 0 if isinstance(offload, str) else offload)
    graphs = graphs and needs.phase.mode == "backward"
    levels = [
        "attention" if i in offloaded and recompute == "none" and not graphs else recompute
        for i in range(len(needs.shapes))
    ]
    return needs.plan(levels, offloaded, next(iter(_to_try(needs, again, 0, offload))))


def choose(needs: Needs, budget: int, offload: Offload = False, again: Again = "auto") -> MemoryPlan:
    """The plan that recomputes least within `budget` bytes; see the top of this file. Raises BudgetError, naming the
    least budget, if nothing fits."""
    count = len(needs.shapes)
    levels: list[Recompute] = ["full"] * count
    plan = _fitting(needs, budget, offload, _to_try(needs, again, budget, offload))
    offloaded, segments = plan.offloaded, plan.segments
    everything = needs.plan(["none"] * count, offloaded)
    if needs.countable and not offloaded and not segments and everything.peak <= budget:
        return everything  # which may need less working memory
    limit = _host_limit(offload)
    order = sorted(range(count), key=lambda i: (-needs.lists[i].most, -i))
    steps: tuple[tuple[Recompute, Recompute], ...] = (("attention", "full"), ("none", "attention"))
    if needs.phase.mode == "backward":  # saves with "full" what it saves with "attention"
        steps = (("none", "full"),)
    for level, before in steps:
        for i in order:
            if levels[i] != before or (level == "none" and (i in offloaded or not needs.countable)):
                continue
            trial = needs.plan([*levels[:i], level, *levels[i + 1 :]], offloaded, segments)
            if trial.peak <= budget and trial.host <= max(limit, plan.host):
                levels[i], plan = level, trial
    return plan


def _fitting(needs: Needs, budget: int, offload: Offload, ways: Iterable[tuple[int, ...]]) -> MemoryPlan:
    """With everything recomputed, the first of these segments that fit, and the fewest offloaded layers."""
    least: MemoryPlan | None = None
    for segments in ways:
        plan = _fewest_offloaded(needs, budget, offload, segments)
        if plan.peak <= budget:
            return plan
        if least is None or plan.peak < least.peak:
            least = plan
    assert least is not None
    raise BudgetError(budget, [_too_small(needs, least, budget, offload)])


def _fewest_offloaded(needs: Needs, budget: int, offload: Offload, segments: tuple[int, ...]) -> MemoryPlan:
    """As few layers as the budget needs; as many as the host may hold if it is too small for that."""
    levels: list[Recompute] = ["full"] * len(needs.shapes)
    if not isinstance(offload, str):
        return needs.plan(levels, _to_offload(needs, offload), segments)
    limit, numbers = _host_limit(offload), range(len(levels) + 1)

    def plan(n: int) -> MemoryPlan:
        return needs.plan(levels, _to_offload(needs, n), segments)

    # More layers need more of the host and less of the device.
    most = bisect.bisect_right(numbers, limit, key=lambda n: plan(n).host) - 1
    return plan(min(most, bisect.bisect_left(numbers, -budget, key=lambda n: -plan(n).peak)))


def _host_limit(offload: Offload) -> float:
    """Bytes of host memory that may be used."""
    return parse_bytes(offload) if isinstance(offload, str) and offload != "auto" else math.inf


def _to_try(needs: Needs, again: Again, budget: int, offload: Offload) -> Iterator[tuple[int, ...]]:
    """The segments to try, those in which the fewest layers run again first."""
    count = len(needs.shapes)
    if again != "auto":
        yield _least(needs, offload) if again is True else _equal(count, again)
        return
    yield ()
    least = _least(needs, offload)
    if _fewest_offloaded(needs, budget, offload, least).peak <= budget:
        for last in range(count - 1, 0, -1):
            for m in range(1, (count - last) // 2 + 1):
                yield (*_uneven(needs, m, count - last), last)
    yield least


def _equal(layers: int, size: int) -> tuple[int, ...]:
    """Segments of so many layers, but for the first, which may be shorter."""
    if not size:
        return ()
    first = layers % size
    return (first,) * (first > 0) + (size,) * (layers // size)


def _least(needs: Needs, offload: Offload) -> tuple[int, ...]:
    """The segments that need the least memory; () if that is to save the input of every layer."""
    count = len(needs.shapes)
    ways = [(), *(_uneven(needs, m, count) for m in range(2, count // 2 + 1))]
    return min(ways, key=lambda segments: _fewest_offloaded(needs, 0, offload, segments).peak)


def _uneven(needs: Needs, segments: int, layers: int) -> tuple[int, ...]:
    """Layers in so many segments, each of at least two, so that the most that is saved at a time is as little as
    possible."""
    row = sum(needs.of(i, "full").rows for i in range(len(needs.shapes))) / len(needs.shapes)
    sizes = [2] * segments
    for _ in range(layers - 2 * segments):
        least = min(range(segments), key=lambda j: j * needs.stream + (sizes[j] + 1) * row)
        sizes[least] += 1
    return tuple(sizes)


def _to_offload(needs: Needs, layers: bool | int) -> frozenset[int]:
    """The layers whose rows go to host memory: those that keep most, the first of equal ones."""
    count = len(needs.lists)
    number = count if layers is True else min(int(layers), count)
    return frozenset(sorted(range(count), key=lambda i: (-needs.lists[i].most, i))[:number])


def _too_small(needs: Needs, plan: MemoryPlan, budget: int, offload: Offload) -> _TooSmall:
    again = () if plan.segments else _least(needs, offload)
    helps = needs.plan(plan.recompute, _to_offload(needs, True), plan.segments)
    return _TooSmall(
        step=f"mode {needs.phase.mode!r}",
        keep=1.0 if needs.phase.keep is None else needs.phase.keep,
        tokens=needs.tokens,
        plan=plan,
        offloading_helps=offload is False and bool(helps.away) and helps.peak <= budget,
        segments_help=bool(again) and needs.plan(plan.recompute, plan.offloaded, again).peak <= budget,
    )
