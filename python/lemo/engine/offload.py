"""Saved rows in host memory between a layer's forward and its backward pass.

`OffloadedRecords.put` takes a layer's rows; `send` starts their copy once the next layer has chosen its lists. They
stay on the device until that layer is done, and are dropped then. `pop` starts the copy of the next record it will be
asked for, so that it arrives while the layer before it is worked on. Thus at most two layers' rows are on the device,
in either direction; those of the last layer never leave it. Streams, from which segments of layers run again, travel
the same way; one is fetched while the first layer after it is worked on.

Why copies wait for the next layer's choice: the host reads a list's size, a few bytes, before it can queue the layer.
All copies from the device to the host share one copy engine, which serves them in order whatever their streams are.
Behind a layer's rows, the few bytes arrive when those have, and until then the GPU has nothing to do. So whatever the
host reads to choose lists comes first. What it reads within a layer still queues behind the rows of the layer before:
experts' loads if there are no grouped products (`lemo.engine.experts`), and the ends of documents in a new list, of
which `lemo.engine.tiles.PredictedTiles` cuts tiles. Then the GPU idles for what is left of that copy.

On CUDA all copies run on a separate stream, into pinned memory. Two hazards, and how they are avoided:

- Memory that a copy still reads or writes must not be reused. `Tensor.record_stream` would make the allocator poll
  for the copy's end, late and at unpredictable times, so that memory grows. Instead, every tensor here is allocated and
  freed on the compute stream, and before its last reference is dropped, the compute stream is made to wait for its
  copy (on the device; the host never waits). What the allocator hands out next is then ordered after the copy.
- A copy must not start before its source is written, or before earlier kernels are done with the memory of its
  destination. The copy stream therefore first waits for what the compute stream has been given so far.

Chunks of host memory are reused as soon as their copy back is queued: later copies run on the same stream.

What graphs of a record hold (`lemo.engine.segments.Held`) travels with its rows.

On the CPU the same steps copy to separate memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemo.engine.records import Record, Records, Stream
from lemo.engine.segments import HeldTensor
from lemo.engine.sizes import format_bytes

# Host memory is pinned in chunks of this size: a power of two, to which torch rounds pinned memory up.
CHUNK_BYTES = 16 << 20
# The share of a forward or backward pass that may be spent waiting for copies before it is reported.
_SLOW = 0.05
# Passes that are measured; the first one pins memory and is left out.
_MEASURED = 3
_MOVED = ("x_kept", "x_mlp", "x_out", "out", "lse")


class HostMemory:
    """Chunks of host memory, reused by all passes of a run: never more than the largest of them needed at once.

    note: is called once if the host cannot keep up.
    """

    def __init__(self, note: Callable[[str], None] = lambda text: None) -> None:
        self._note = note
        self._free: list[Tensor] = []
        self.chunks = 0
        self._stream: torch.cuda.Stream | None = None
        self.meter: _Meter | None = None
        self._pending: _Meter | None = None
        self._measured = 0

    @property
    def nbytes(self) -> int:
        return self.chunks * CHUNK_BYTES

    def take(self, nbytes: int, pinned: bool) -> list[Tensor]:
        """Chunks for so many bytes. Raises ValueError if the host has no more."""
        taken: list[Tensor] = []
        try:
            for _ in range(-(-nbytes // CHUNK_BYTES)):
                taken.append(self._free.pop() if self._free else self._allocate(pinned))
        except ValueError:
            self.give_back(taken)
            raise
        return taken

    def give_back(self, chunks: list[Tensor]) -> None:
        self._free.extend(chunks)
        chunks.clear()

    def _allocate(self, pinned: bool) -> Tensor:
        try:
            chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if pinned else "host memory"
            raise ValueError(
                f"offload: the host gave no more {kind} after {format_bytes(self.nbytes)} "
                f"({str(error).splitlines()[0]}). Offload fewer layers (offload=N, --offload N), keep fewer tokens, or "
                "raise what the process may pin: the memory limit of its container, and `ulimit -l`"
            ) from error
        self.chunks += 1
        return chunk

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def begin(self, device: torch.device) -> None:
        """A pass begins. Looks at what an earlier one measured, once the device is through with it."""
        self.meter = None
        if device.type != "cuda" or self._measured >= _MEASURED:
            return
        if self._pending is not None and self._pending.complete():
            slow, self._pending = self._pending.slow(), None
            self._measured += 1
            if slow:
                self._note(slow)
                self._measured = _MEASURED  # once is enough
                return
        if self._pending is None and self.chunks:  # the first pass pins memory, and is left out
            self.meter = self._pending = _Meter()


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Meter:
    """Times on the device of one pass, by events: of copies, with their bytes, and of the compute stream's waits."""

    copies: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = field(default_factory=list)
    waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def complete(self) -> bool:
        """Whether the device has done all that was measured, without waiting for it."""
        return all(after.query() for _, after in self.waits[-1:]) and all(c[1].query() for c in self.copies[-1:])

    def slow(self) -> str:
        """What to report if copies slowed the pass down; empty if not."""
        if not self.copies or not self.waits:
            return ""
        whole = self.waits[0][0].elapsed_time(self.waits[-1][1])
        waited = sum(before.elapsed_time(after) for before, after in self.waits)
        copying = sum(start.elapsed_time(stop) for start, stop, _ in self.copies)
        moved = sum(nbytes for _, _, nbytes in self.copies)
        if waited <= _SLOW * whole:
            return ""
        return (
            f"offload: layers waited for copies {waited / whole:.0%} of a step's time; the host moves "
            f"{moved / max(copying, 1e-3) / 1e6:.1f} GB/s. Offload fewer layers (offload=N, --offload N), save less "
            'with recompute="full", or bind the process to the CPU next to its GPU'
        )


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


# --- copies -----------------------------------------------------------------------------------------------------------


class _Copies:
    """Copies of one pass between the device and the host."""

    def __init__(self, host: HostMemory, device: torch.device) -> None:
        self.host = host
        self.stream = host.stream(device) if device.type == "cuda" else None
        self.meter = host.meter

    @contextlib.contextmanager
    def running(self, nbytes: int) -> Iterator[None]:
        """Inside, copies are queued on the copy stream, after what the compute stream has been given so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            start = _event(self.stream) if self.meter is not None else None
            yield
            if self.meter is not None and start is not None:
                self.meter.copies.append((start, _event(self.stream), nbytes))

    def mark(self) -> torch.cuda.Event | None:
        """What has been queued so far, to be waited for."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """The compute stream waits; the host does not."""
        if mark is None or self.stream is None:
            return
        compute = torch.cuda.current_stream(self.stream.device)
        before = _event(compute) if self.meter is not None else None
        compute.wait_event(mark)
        if self.meter is not None and before is not None:
            self.meter.waits.append((before, _event(compute)))


class _Moved:
    """What a record or a stream has to have in host memory: its rows, and what its graphs hold. tensors: the bytes on
    the device while they are there, by the rows' name or by number. chunks: in host memory, from `send` on."""

    def __init__(self, copies: _Copies, record: Record | Stream) -> None:
        self.copies, self.record = copies, record
        held = [graph.held for graph in record.graphs if graph.held is not None]
        self.held = [(one, len(one.memory)) for one in held]
        self.tensors: dict[str | tuple[int, int], Tensor] = {}
        # Rows as they were: their kind and shape, or their place in what a graph holds.
        self.rows: dict[str, Tensor | HeldTensor] = {}
        for name in _MOVED:
            rows: Tensor | None = getattr(record, name)
            if rows is None:
                continue
            within = next((found for one in held if (found := one.find(rows)) is not None), None)
            self.rows[name] = torch.empty_like(rows, device="meta") if within is None else within
            if within is None:
                self.tensors[name] = rows.contiguous().view(-1).view(torch.uint8)
            setattr(record, name, None if name != "x_kept" else rows.new_empty(0))
        for i, one in enumerate(held):
            self.tensors.update(((i, j), memory) for j, memory in enumerate(one.memory))
            one.memory = []
        self.sizes = {name: t.nbytes for name, t in self.tensors.items()}
        self.nbytes = sum(self.sizes.values())
        self.chunks: list[Tensor] = []
        self.mark: torch.cuda.Event | None = None
        self.sent = self.fetched = False

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The bytes on the device, piece by piece, and the part of a chunk that each belongs to."""
        at = 0
        for flat in self.tensors.values():
            first = 0
            while first < flat.shape[0]:
                chunk, offset = divmod(at, CHUNK_BYTES)
                size = min(flat.shape[0] - first, CHUNK_BYTES - offset)
                yield flat[first : first + size], self.chunks[chunk][offset : offset + size]
                first, at = first + size, at + size

    def send(self) -> None:
        """Starts the copy to the host, once."""
        if self.sent:
            return
        self.chunks = self.copies.host.take(self.nbytes, pinned=self.copies.stream is not None)
        self.sent = True
        with self.copies.running(self.nbytes):
            for device, host in self._pieces():
                host.copy_(device, non_blocking=True)
        self.mark = self.copies.mark()

    def leave(self) -> None:
        """Drops what is on the device once it is copied."""
        self.send()
        self.copies.wait(self.mark)
        self.tensors.clear()

    def fetch(self) -> None:
        """Starts the copy back, if everything has left the device."""
        if self.tensors:
            return
        device = self.record.x_kept.device
        self.tensors = {name: torch.empty(n, dtype=torch.uint8, device=device) for name, n in self.sizes.items()}
        with self.copies.running(self.nbytes):
            for rows, host in self._pieces():
                rows.copy_(host, non_blocking=True)
        self.mark, self.fetched = self.copies.mark(), True

    def restore(self) -> None:
        """The record is as it was put."""
        self.fetch()
        if self.fetched:  # if not, nothing ever left: nobody reads the copy that was perhaps started
            self.copies.wait(self.mark)
        for i, (held, count) in enumerate(self.held):
            held.memory = [self.tensors[i, j] for j in range(count)]
        for name, like in self.rows.items():
            if isinstance(like, HeldTensor):
                rows = like.tensor()
            else:
                rows = self.tensors[name].view(like.dtype).view(like.shape)
            setattr(self.record, name, rows)
        self.close()

    def close(self) -> None:
        self.tensors = {}
        self.copies.host.give_back(self.chunks)

    def __del__(self) -> None:
        # A pass without its backward pass, or one that failed: a copy may still run.
        if getattr(self, "chunks", None):
            self.copies.wait(self.mark)
            self.close()


class OffloadedRecords(Records):
    """Records of which some layers' rows are in host memory meanwhile."""

    def __init__(self, host: HostMemory, layers: frozenset[int]) -> None:
        super().__init__()
        self._host, self._offloaded = host, layers
        self._copies: _Copies | None = None
        self._moved: dict[int, _Moved] = {}  # by id of the record
        self._leaving: _Moved | None = None

    def moves(self, layer: int) -> bool:
        return layer in self._offloaded

    def put(self, record: Record) -> None:
        super().put(record)
        self._move(record)

    def put_stream(self, stream: Stream) -> None:
        super().put_stream(stream)
        self._move(stream)

    def send(self) -> None:
        if self._leaving is not None:
            self._leaving.send()

    def _move(self, record: Record | Stream) -> None:
        if self._leaving is not None:  # its copy had the time that this layer took
            self._leaving.leave()
            self._leaving = None
        if record.layer not in self._offloaded or not record.x_kept.numel():
            return
        if self._copies is None:
            self._host.begin(record.x_kept.device)
            self._copies = _Copies(self._host, record.x_kept.device)
        self._leaving = self._moved[id(record)] = _Moved(self._copies, record)

    def pop(self, layer: int) -> Record | None:
        record = super().pop(layer)
        if record is None:
            return None
        moved, self._leaving = self._moved.pop(id(record), None), None
        if moved is not None:
            moved.restore()
        self._fetch(self._records or self._streams)
        return record

    def pop_stream(self) -> Tensor:
        moved, self._leaving = self._moved.pop(id(self._streams[-1]), None), None
        if moved is not None:
            moved.restore()
        return super().pop_stream()

    def _fetch(self, waiting: Sequence[Record | Stream]) -> None:
        """Starts the copy of what is needed next."""
        following = self._moved.get(id(waiting[-1])) if waiting else None
        if following is not None:
            following.fetch()
