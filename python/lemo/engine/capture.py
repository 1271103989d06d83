"""A forward and a backward pass of the layers, recorded once and run again without Python.

Small models wait for the host: a layer is some fifty launches, each of which takes Python and torch longer than the
GPU. A CUDA graph holds all launches of a pass and starts them at once. It holds addresses and sizes as well, and
whatever the host decided while it was recorded. So everything that changes from one step to the next has to reach it
through memory that stays in place:

- the stream, the rotary tables and the kept lists are copied into buffers before a pass runs;
- weights are read where they lie, as the optimizer leaves them (`lemo.integration.graphs` notices if they move);
- gradients are copied out of the graph's memory, so that what holds them is not overwritten by the next step.

Both graphs are recorded before either runs: recording executes nothing, so a failure leaves no trace in the step.

All graphs of a run share one pool of memory, in which what a forward pass saves lies until its backward pass. Therefore
only one pass at a time may be under way (`Captured.begin`).
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lemo.engine.backward import backward
from lemo.engine.families.base import Tables
from lemo.engine.forward import forward
from lemo.engine.gradients import handed_out, without_hooks
from lemo.engine.layout import Kept, KeptPair
from lemo.engine.step import Step
from lemo.ops._autograd import first_order

# Records what a function launches, without running it, and returns what runs it.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


# One for each device: cuBLAS keeps a workspace for every stream that it has seen.
_streams: dict[torch.device, torch.cuda.Stream] = {}


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._pool = device, torch.cuda.graph_pool_handle()
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        self._stream = _streams[device]
        self._last: torch.cuda.Stream | None = None

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        # As torch.cuda.graph does, which leaves its stream the current one if recording fails.
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), self._recovered(), _no_collection():
            # Other threads (a data loader that pins memory) may do what this one must not.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
        return lambda: self._run(graph)

    @contextlib.contextmanager
    def _recovered(self) -> Iterator[None]:
        """If recording fails: the allocator takes it for one that is still under way, and would free memory late; and a
        pool without a graph cannot be used again."""
        try:
            yield
        except BaseException:
            end: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)
            if end is not None:
                with contextlib.suppress(Exception):
                    end(self._stream.device_index, self._pool)
            self._pool = torch.cuda.graph_pool_handle()
            raise

    def _run(self, graph: torch.cuda.CUDAGraph) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)  # the graphs' memory may still be in use there
        self._last = stream
        graph.replay()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing is freed that happens to be garbage: what frees it may not be allowed while a graph is recorded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Running:
    """A pass of a captured step that has not had its backward pass yet. Nothing else holds it."""


class Turns:
    """Whose turn it is to use the pool."""

    def __init__(self) -> None:
        self._running: weakref.ref[_Running] | None = None

    @property
    def taken(self) -> bool:
        """Whether a pass may still have its backward pass."""
        return self._running is not None and self._running() is not None

    def take(self) -> _Running:
        running = _Running()
        self._running = weakref.ref(running)
        return running


# --- what changes from one step to the next ---------------------------------------------------------------------------


def copy_all(to: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Copies tensors into others, those of one dtype with one launch on a GPU."""
    for dtype in {t.dtype for t in to}:
        pairs = [(a, b) for a, b in zip(to, given, strict=True) if a.dtype == dtype]
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])


_OF_LISTS = ("blocks", "slots", "row_offsets", "cu_seqlens", "rows", "row_slots", "weights")


def distinct(pairs: Iterable[KeptPair]) -> list[Kept]:
    """Lists that leave something out, each once. Those that keep everything follow from the lengths of documents."""
    found = {id(k): k for pair in pairs for k in pair if k is not None and not k.is_everything}
    return list(found.values())


def tensors_of(lists: Iterable[Kept]) -> list[Tensor]:
    return [getattr(kept, name) for kept in lists for name in _OF_LISTS]


def layout_of(pairs: Sequence[KeptPair]) -> tuple[Any, ...]:
    """What a graph depends on of lists whose contents may change: their sizes, and which layers share one."""
    numbers: dict[int, int] = {}
    shapes: list[Any] = []
    for pair in pairs:
        for kept in pair:
            if kept is not None and id(kept) not in numbers:
                numbers[id(kept)] = len(numbers)
                shapes.append((kept.num_blocks, kept.num_rows, kept.max_seqlen, kept.is_everything))
    places = tuple(-1 if kept is None else numbers[id(kept)] for pair in pairs for kept in pair)
    return places, tuple(shapes)


def _copies(pairs: Sequence[KeptPair]) -> tuple[list[KeptPair], list[Tensor]]:
    """Lists in separate memory, and the tensors that new contents are copied to."""
    lists = distinct(pairs)
    own = {id(k): replace(k, **{name: getattr(k, name).clone() for name in _OF_LISTS}, info=None) for k in lists}
    copied: list[KeptPair] = [(own.get(id(a), a), own.get(id(m), m)) for a, m in pairs]
    return copied, tensors_of(own.values())


# --- one captured step ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Buffers:
    """Memory that stays in place: stream and gradient [T, d], rotary tables, what the policy drew on the host, and the
    lists if they are chosen before the layers run (None: the layers choose them)."""

    stream: Tensor
    gradient: Tensor
    tables: Tables
    drawn: Tensor | None
    pairs: list[KeptPair] | None
    lists: list[Tensor]

    @classmethod
    def like(cls, x: Tensor, tables: Tables, drawn: Tensor | None, pairs: Sequence[KeptPair] | None) -> Buffers:
        x = x.detach()
        stream, gradient = (x.clone(memory_format=torch.contiguous_format) for _ in range(2))
        copies, lists = (None, []) if pairs is None else _copies(pairs)
        own = None if tables is None else tuple(t.clone() for t in tables)
        return cls(stream, gradient, own, None if drawn is None else drawn.clone(), copies, lists)

    def fill(self, x: Tensor, tables: Tables, drawn: Tensor | None, pairs: Sequence[KeptPair] | None) -> None:
        to, given = [self.stream, *(self.tables or ()), *self.lists], [x.detach(), *(tables or ())]
        if pairs is not None:
            given += tensors_of(distinct(pairs))
        if self.drawn is not None and drawn is not None:
            to.append(self.drawn)
            given.append(drawn)
        copy_all(to, given)


@dataclass(eq=False)
class Captured:
    """A step's passes, ready to run again. step: as it was recorded; its participation, unchecked lists and tiles are
    those of the last pass that ran."""

    step: Step
    buffers: Buffers
    run_forward: Callable[[], None]
    run_backward: Callable[[], None]
    # By dtype: gradients one after the other, and which of the parameters they belong to.
    flat: list[tuple[Tensor, list[int]]] = field(default_factory=list)
    kept_ratios: tuple[list[float], list[float]] = ([], [])
    tiles: dict[int, Any] = field(default_factory=dict)
    # Whatever else holds memory that the graphs read.
    holds: Any = None

    def begin(self, step: Step, x: Tensor, params: Sequence[Tensor], turns: Turns) -> Tensor:
        """The stream after the last layer, with its graph. The buffers are filled; step: the pass's own."""
        return Replayed.apply(x, _Pass(self, step, turns.take(), [p._version for p in params]), *params)

    def gradients(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """In memory that the caller owns."""
        found: list[Tensor | None] = [None] * len(params)
        for flat, places in self.flat:
            parts = torch._utils._unflatten_dense_tensors(flat.clone(), [params[i] for i in places])
            for i, part in zip(places, parts, strict=True):
                found[i] = part
        return found


def capture(step: Step, buffers: Buffers, params: Sequence[Tensor], record: Recorder) -> Captured:
    """Records both passes of a step that was made for the buffers. Nothing runs."""
    if buffers.pairs is not None:
        pairs = buffers.pairs
        step.choose, step.observe = lambda i, _: pairs[i], None
    flat: list[tuple[Tensor, list[int]]] = []

    @torch.no_grad()
    def first() -> None:
        with step.autocast():
            forward(step, buffers.stream)

    @torch.no_grad()
    def second() -> None:
        with step.autocast(), without_hooks(params):
            grads = backward(step, buffers.gradient, params)
        found = [(i, g) for i, g in enumerate(map(grads.of, params)) if g is not None]
        for dtype in dict.fromkeys(g.dtype for _, g in found):
            places = [i for i, g in found if g.dtype == dtype]
            flat.append((torch.cat([g.reshape(-1) for _, g in found if g.dtype == dtype]), places))

    run_forward = record(first)
    return Captured(step, buffers, run_forward, record(second), flat)


@dataclass(eq=False)
class _Pass:
    """captured, for the pass of `step`. versions: of the parameters in the forward pass."""

    captured: Captured
    step: Step
    running: _Running
    versions: list[int]


class Replayed(Function):
    """`lemo.engine.stack.Stack` of a captured step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, of: _Pass, *params: Tensor) -> Tensor:
        ctx.of, ctx.params = of, params
        ctx.depends = params
        of.captured.run_forward()
        return of.captured.buffers.stream.clone()

    @staticmethod
    @first_order("a training step")
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        of: _Pass | None
        of, ctx.of = ctx.of, None
        if of is None:
            raise RuntimeError(
                "lemo: backward through the same step a second time: its saved tensors are gone (and retain_graph "
                "cannot keep them); run the forward pass again"
            )
        if [p._version for p in ctx.params] != of.versions:
            raise RuntimeError(
                "lemo: a trained parameter of the layers was changed in place between a step's forward and its "
                "backward pass, which needs the former values: change it after backward()"
            )
        captured, step = of.captured, of.step
        captured.buffers.gradient.copy_(step.handover.take(dy))
        captured.run_backward()
        grads = captured.gradients(ctx.params)
        dx = captured.buffers.gradient.clone() if ctx.needs_input_grad[0] else None
        step.raise_on_fault()
        captured.step.raise_on_fault()
        if step.when_done is not None:
            step.when_done()
        return dx, None, *(handed_out(p, g) for p, g in zip(ctx.params, grads, strict=True))
