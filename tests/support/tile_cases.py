"""Cases of the operations that choose tiles, a part of the table in cases.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from lemo import ops
from support import oracle
from support.draws import Draw
from support.packings import TILE_PACKINGS, Packing
from torch import Tensor


@dataclass(frozen=True)
class TileScores:
    """Attention mass of tiles, of all slots at once and in strips.

    storage: as in ``Attention``. strip: slots at a time. more: columns and slots that no tile has.
    """

    packing: str
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    probes: int = 4
    storage: str = "packed"
    strip: int = 3
    more: int = 0
    magnitude: float = 1.0

    @property
    def layout(self) -> Packing:
        return TILE_PACKINGS[self.packing]

    @property
    def max_seqlen(self) -> int:
        return self.layout.layout["max_seqlen"][0]

    @property
    def width(self) -> int:
        return math.ceil(self.max_seqlen / oracle.TILE) + self.more

    def slots(self, t: dict[str, Tensor]) -> int:
        capacity = (t["rows"] if "rows" in t else t["q"]).shape[0]
        return capacity // oracle.TILE + t["cu_seqlens"].shape[0] - 1

    def inputs(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        draw, p = Draw(device, dtype, 8), self.layout
        rows = p.tensor("rows", device)
        both = draw.normal(p.tokens, self.heads + self.kv_heads, self.dim, scale=self.magnitude)
        q, k = both[:, : self.heads], both[:, self.heads :]
        tensors = {"q": q, "k": k, "cu_seqlens": p.tensor("cu_seqlens", device)}
        if self.storage == "rows":
            named = torch.zeros(p.tokens, dtype=torch.bool, device=device)
            named[rows.long()] = True
            both[~named] = math.nan
            padding = torch.full((oracle.TILE * self.more,), -1, dtype=torch.int32, device=device)
            tensors["rows"] = torch.cat((rows, padding))
        else:
            both = both[rows.long()]
            tensors["q"], tensors["k"] = both[:, : self.heads], both[:, self.heads :]
        if self.storage == "packed":
            tensors["q"], tensors["k"] = tensors["q"].contiguous(), tensors["k"].contiguous()
        return tensors

    def scores(self, t: dict[str, Tensor], first: int, count: int) -> tuple[Tensor, Tensor]:
        layout = (t["cu_seqlens"], t.get("rows"), self.max_seqlen)
        return ops.tile_scores(t["q"], t["k"], *layout, self.dim**-0.5, self.probes, first, count, self.width, True)

    def run(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        slots = self.slots(t)
        strips = [self.scores(t, s, min(self.strip, slots - s)) for s in range(0, slots, self.strip)]
        found = [*self.scores(t, 0, slots), *map(torch.cat, zip(*strips, strict=True))]
        return dict(zip(("scores", "peaks", "strips", "strip_peaks"), found, strict=True))

    def expect(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        cu = t["cu_seqlens"].tolist()
        q, k = (t[n] if "rows" not in t else t[n][t["rows"][: cu[-1]].long()] for n in "qk")
        where = (cu, self.dim**-0.5, self.probes, self.slots(t), self.width)
        scores, peaks = oracle.tile_scores(q, k, *where)
        return {"scores": scores, "peaks": peaks, "strips": scores, "strip_peaks": peaks}


TILE_SCORES = [
    *(TileScores(p, storage=s) for p in TILE_PACKINGS for s in ("packed", "rows")),
    *(TileScores("documents", 4, 2, dim, 2, "strided") for dim in (64, 80, 96, 128, 256)),
    *(TileScores("documents", hq, hk, 64, 1) for hq, hk in ((1, 1), (9, 3), (8, 1), (3, 3))),
    *(TileScores(p, probes=probes) for p in ("documents", "kept") for probes in (1, 2, 3, 128)),
    TileScores("documents", 9, 3, 64, 128, "rows"),
    TileScores("documents", more=2, strip=1),
    TileScores("kept", storage="rows", more=2, strip=100),
    TileScores("documents", magnitude=4.0),
]


@dataclass(frozen=True)
class SelectTiles:
    """Choices and lists, which must agree exactly. scores: "even" (0 to 0.2), "mass" (a row adds up to 1), "ties", or
    "wild" (NaN, infinities, negative, above 1). masses: the same, of the tensor that limits add up; None: the scores.
    strip: slots at a time."""

    lengths: tuple[int, ...]
    keys: int = 1 << 40
    density: float = 1.0
    mass: float = 1.0
    first: int = 0
    local: int = 0
    scores: str = "mass"
    strip: int = 1000
    masses: str | None = None

    @property
    def cu_seqlens(self) -> list[int]:
        return [0, *itertools.accumulate(self.lengths)]

    @property
    def slots(self) -> int:
        return self.cu_seqlens[-1] // oracle.TILE + len(self.lengths)

    @property
    def width(self) -> int:
        return math.ceil(max(self.lengths) / oracle.TILE)

    def inputs(self, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        draw = Draw("cpu", torch.float32, 9)
        tensors = {"scores": self.values(self.scores, draw)}
        tensors["cu_seqlens"] = torch.tensor(self.cu_seqlens, dtype=torch.int32)
        if self.masses is not None:
            tensors["masses"] = self.values(self.masses, draw)
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def values(self, kind: str, draw: Draw) -> Tensor:
        shape = (self.slots, self.width)
        if kind == "ties":
            return draw.integers(3, *shape) / 16
        if kind == "wild":
            kinds = torch.tensor([math.nan, -math.inf, math.inf, -1.0, 2.0, -0.0, 0.0, 0.125, 1e-9])
            return kinds[draw.integers(len(kinds), *shape)]
        if kind == "even":
            return draw.uniform(*shape) / 5
        values = draw.uniform(*shape).pow(6)
        for slot, m, _, _ in oracle.tiles_of(self.cu_seqlens):
            values[slot, : m + 1] /= values[slot, : m + 1].sum()
        return values

    def run(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """Strips write into one choice, whose words hold every bit before; then its lists, with three entries more."""
        words = math.ceil(self.width / 32) + 1
        chosen = torch.full((self.slots, words), -1, dtype=torch.int32, device=t["scores"].device)
        rule = (self.keys, self.density, self.mass, self.first, self.local)
        covered = []
        for first in range(0, self.slots, self.strip):
            strip = slice(first, first + self.strip)
            masses = t["masses"][strip] if "masses" in t else None
            covered.append(ops.select_tiles_(chosen, t["scores"][strip], t["cu_seqlens"], first, *rule, masses))
            assert (chosen[first + self.strip :] == -1).all()  # of later strips
        capacity = sum(len(tiles) for tiles in lists_of(chosen)) + 3
        names = ("tile_offsets", "tiles", "transposed_offsets", "transposed_tiles")
        lists = ops.list_tiles(chosen, t["cu_seqlens"], capacity)
        return {"chosen": chosen, "covered": torch.cat(covered)} | dict(zip(names, lists, strict=True))


def lists_of(chosen: Tensor) -> oracle.TileLists:
    """The tiles whose bits are set, by slot."""
    words = chosen.tolist()
    return [[32 * w + n for w, word in enumerate(row) for n in range(32) if word >> n & 1] for row in words]


_MANY = (1500, 0, 129, 5000, 1, 300)  # more than 32 tiles, an empty document, one of a single row
SELECT_TILES = [
    *(SelectTiles(_MANY, first=first, local=local) for first, local in ((0, 0), (1, 1))),  # no limit: everything
    *(SelectTiles(_MANY, keys=keys, first=1, local=2) for keys in (1, 128, 129, 1024, 1280)),
    *(SelectTiles(_MANY, density=density) for density in (0.01, 0.1, 0.25, 0.3, 0.5, 0.999)),
    *(SelectTiles(_MANY, mass=mass, local=1) for mass in (1e-6, 0.3, 0.5, 0.9, 0.999, 2.0)),
    SelectTiles(_MANY, 640, 0.4, 0.8, 1, 1),
    SelectTiles(_MANY, 640, 0.4, 0.8, 1, 1, strip=4),
    SelectTiles(_MANY, 640, 0.4, 0.8, 1, 1, "even", strip=1),
    *(SelectTiles(_MANY, keys, 0.5, 1.0, first, 0, "ties") for keys in (512, 1 << 40) for first in (0, 3)),
    SelectTiles(_MANY, mass=0.5, scores="ties"),
    *(SelectTiles(_MANY, keys, mass=mass, scores="wild") for keys in (700, 4000) for mass in (0.5, 1.0)),
    # ranked by one tensor, limited by another
    *(SelectTiles(_MANY, mass=mass, local=1, scores="even", masses="mass") for mass in (0.3, 0.9, 2.0)),
    SelectTiles(_MANY, 640, 0.4, 0.8, 1, 1, "even", 4, "mass"),
    *(SelectTiles(_MANY, keys, mass=0.5, scores="ties", masses="mass") for keys in (1280, 1 << 40)),
    *(SelectTiles(_MANY, mass=0.5, scores=scores, masses="wild") for scores in ("wild", "mass")),
    SelectTiles(_MANY, 128, 0.1, 0.1, 100, 0, "even"),  # what is always there exceeds every limit
    SelectTiles(_MANY, 128, 0.1, 0.1, 2, 2**31 - 1),
    SelectTiles((128,)),
    SelectTiles((256, 384), 256, local=1),
    SelectTiles((0, 1)),
]
