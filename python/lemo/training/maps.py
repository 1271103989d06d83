"""What layers kept and attended to at a few steps of a run, for its page: `maps.jsonl` in the run folder.

A line is one window of one step: which blocks each layer kept of its documents, which tiles attention computed in mode
"sparse", and the tokens of the blocks, so that they can be read. Everything is bounded: the file stays below `BUDGET`
bytes whatever the model, the context and the number of steps; what does not fit is thinned out (every n-th layer, fewer
cells of a tile map, the first tokens of each block), and the line records how.

Steps between the recorded ones cost nothing; at a recorded one the lists are copied from the device once.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from lemo.engine.tiles import TILE, TileChooser
from lemo.integration.reference import Pass
from lemo.training.run_log import RunLog, read_log

MAPS_FILE = "maps.jsonl"
BUDGET = 4 << 20
_MOST_CELLS, _MOST_TILED_DOCUMENTS = 64, 4


def recorded_steps(boundaries: Sequence[int], count: int) -> list[int]:
    """Optimizer steps (from 1) that are recorded: at most `count`, spread over the run, and as many phases as possible.

    boundaries: the first step (from 0) after every phase; the last is the number of steps.
    """
    total = boundaries[-1]
    if count < 1 or total < 1:
        return []
    if total <= count:
        return list(range(1, total + 1))
    ends = sorted({b for b in boundaries if b > 0}, reverse=True)[:count]
    steps = set(ends)
    even = [1 + round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
    for step in sorted(even, key=lambda s: -min(abs(s - e) for e in ends)):
        if len(steps) < count:
            steps.add(step)
    return sorted(steps)


def _coded(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def _room(budget: int) -> int:
    """Bytes that fit into `budget` characters of base64."""
    return budget * 3 // 4


# ---- one step --------------------------------------------------------------------------------------------------------


def describe_pass(seen: Pass, tiles: TileChooser | None, block_size: int, budget: int) -> dict[str, Any]:
    """The first window of a pass as JSON values of at most about `budget` bytes. Reads from the device."""
    context = seen.batch.shape[1]
    ends = list(itertools.accumulate(seen.lengths))
    lengths = [n for n, end in zip(seen.lengths, ends, strict=True) if end <= context] or [seen.lengths[0]]
    blocks = sum(-(-n // block_size) for n in lengths)
    stride = max(1, math.ceil(len(seen.lists) * -(-blocks // 8) / _room(budget // 4)))
    layers = list(range(0, len(seen.lists), stride))
    maps, attention, mlp = _kept_maps(seen, layers, blocks)
    values: dict[str, Any] = {
        "block_size": block_size,
        "lengths": lengths,
        "of_layers": len(seen.lists),
        "layers": layers,
        "maps": maps,
        "attention": attention,
    }
    if mlp != attention:
        values["mlp"] = mlp
    if tiles is not None:
        values["tiles"] = _tile_maps(seen, tiles, layers, len(lengths), _room(budget // 4))
    if seen.batch.dim() == 2:
        values |= _tokens(seen.batch[0].cpu().numpy(), lengths, block_size, _room(budget // 2))
    return values


def _kept_maps(seen: Pass, layers: Sequence[int], blocks: int) -> tuple[list[str], list[int], list[int]]:
    """Distinct bit maps (bit b of byte b // 8: block b is kept), and which of them each layer's parts have."""
    found: dict[str, int] = {}

    def number(ids: Any) -> int:
        mask = np.zeros(blocks, bool)
        if ids is not None:
            kept = ids.cpu().numpy()
            mask[kept[kept < blocks]] = True
        return found.setdefault(_coded(np.packbits(mask, bitorder="little")), len(found))

    pairs = [(number(seen.lists[i][0]), number(seen.lists[i][1])) for i in layers]
    return list(found), [a for a, _ in pairs], [m for _, m in pairs]


def _tile_maps(
    seen: Pass, tiles: TileChooser, layers: Sequence[int], documents: int, room: int
) -> list[dict[str, Any]]:
    """Maps of the longest documents: shares of the pairs of tiles that were computed, 0 to 255, cells [n, n] by layer;
    None for a layer that computed every pair."""
    sizes: dict[int, int] = {}
    for i in layers:
        if i in tiles.chosen:
            ends = tiles.chosen[i].cu_seqlens.tolist()
            for d in range(documents):
                sizes[d] = max(sizes.get(d, 0), -(-(ends[d + 1] - ends[d]) // TILE))
    longest = sorted((d for d in sizes if sizes[d] > 1), key=lambda d: -sizes[d])[:_MOST_TILED_DOCUMENTS]
    if not longest:
        return []
    most = min(_MOST_CELLS, math.isqrt(room // (len(layers) * len(longest))))
    found = []
    for d in sorted(longest):
        cells = max(1, min(most, sizes[d]))
        maps = [_cells(seen, tiles, i, d, cells) for i in layers]
        found.append({"document": d, "size": sizes[d], "cells": cells, "layers": maps})
    return found


def _cells(seen: Pass, tiles: TileChooser, layer: int, document: int, cells: int) -> str | None:
    if layer not in seen.tiles or layer not in tiles.chosen:
        return None
    ends = tiles.chosen[layer].cu_seqlens.tolist()
    count = -(-(ends[document + 1] - ends[document]) // TILE)
    slot = ends[document] // TILE + document
    offsets, listed = seen.tiles[layer].offsets.cpu().numpy(), seen.tiles[layer].tiles.cpu().numpy()
    computed, possible = np.zeros((cells, cells)), np.zeros((cells, cells))
    cell = np.arange(max(count, 1)) * cells // max(count, 1)
    for q in range(count):
        keys = np.append(listed[offsets[slot + q] : offsets[slot + q + 1]], q)  # its own tile is never listed
        np.add.at(computed[cell[q]], cell[keys], 1.0)
        np.add.at(possible[cell[q]], cell[: q + 1], 1.0)
    share = np.divide(computed, possible, out=np.zeros_like(computed), where=possible > 0)
    return _coded(np.round(255 * share).astype(np.uint8))


def _tokens(ids: np.ndarray, lengths: Sequence[int], block_size: int, room: int) -> dict[str, Any]:
    """The first tokens of every block: as many as fit."""
    dtype = np.dtype("<u2") if int(ids.max(initial=0)) < 1 << 16 else np.dtype("<u4")
    starts = [
        np.arange(0, n, block_size) + end - n for n, end in zip(lengths, itertools.accumulate(lengths), strict=True)
    ]
    places = np.concatenate(starts)
    stops = np.append(places[1:], sum(lengths))
    per_block = min(block_size, room // dtype.itemsize // len(places))
    if per_block == 0:
        return {}
    parts = [ids[a : min(a + per_block, b)] for a, b in zip(places, stops, strict=True)]
    return {"tokens_per_block": per_block, "dtype": dtype.str, "tokens": _coded(np.concatenate(parts).astype(dtype))}


# ---- the run ---------------------------------------------------------------------------------------------------------


class MapRecorder(TrainerCallback):
    """Records a run's maps while it trains.

    count: steps that are recorded, 0 = none. active: whether this process writes. windows: the run's, to name
    documents.
    """

    def __init__(self, controller: Any, path: Path, block_size: int, count: int, active: bool, windows: Any) -> None:
        self.controller, self.block_size, self.count, self.active = controller, block_size, count, active
        self.log, self.windows = RunLog(path, active), windows
        self._steps: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        schedule = self.controller.schedule
        self._steps = recorded_steps(schedule.boundaries(state.max_steps), self.count if self.active else 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.controller.watch(state.global_step + 1 in self._steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        watched = self.controller.watch(False)
        if watched is None:
            return
        budget = BUDGET // len(self._steps) - 1024
        seen, tiles = watched
        values = describe_pass(seen, tiles, self.block_size, budget)
        passes = state.global_step * args.gradient_accumulation_steps - 1  # before the step's last, in each process
        names = self._names(seen, passes * args.world_size * args.per_device_train_batch_size)
        self.log.write(step=state.global_step, mode=self.controller.report()["mode"], **values, **names)

    def _names(self, seen: Pass, window: int) -> dict[str, Any]:
        """Where the documents of the first row come from, if that is the window expected there."""
        if seen.batch.dim() != 2 or window >= len(self.windows):
            return {}
        documents, spans = self.windows.documents, self.windows.spans(window)
        tokens = np.concatenate([documents.document(d)[a:b] for d, a, b in spans])
        if not np.array_equal(tokens, seen.batch[0].cpu().numpy()):
            return {}
        named = [{"number": d, "start": a, "source": documents.names[documents.origins[d]]} for d, a, _ in spans]
        return {"documents": named}


def read_maps(folder: Path, report: Any = lambda line: None) -> list[dict[str, Any]]:
    """The recorded maps of a run folder, in order; damaged lines are left out and reported."""
    return [r for r in read_log(folder / MAPS_FILE, report) if {"step", "maps", "lengths", "attention"} <= r.keys()]


def kept_of(record: dict[str, Any], part: str = "attention") -> np.ndarray:
    """bool [recorded layers, blocks]: what each layer kept in a recorded map."""
    blocks = sum(-(-n // record["block_size"]) for n in record["lengths"])
    masks = [np.frombuffer(base64.b64decode(m), np.uint8) for m in record["maps"]]
    bits = [np.unpackbits(m, count=blocks, bitorder="little").astype(bool) for m in masks]
    return np.stack([bits[i] for i in record.get(part, record["attention"])])


def block_tokens(record: dict[str, Any]) -> list[np.ndarray] | None:
    """The recorded first tokens of every block; None if there are none."""
    if "tokens" not in record:
        return None
    flat = np.frombuffer(base64.b64decode(record["tokens"]), np.dtype(record["dtype"]))
    size, most, out, place = record["block_size"], record["tokens_per_block"], [], 0
    for n in record["lengths"]:
        for start in range(0, n, size):
            count = min(most, size, n - start)
            out.append(flat[place : place + count])
            place += count
    return out
