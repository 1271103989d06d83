"""How much attention a few key tiles hold, and which cheap scores find them: covered mass at equal density.

The attention of a real model is cut into tiles of 128 rows, as the kernels cut it. A query tile always sees itself, the
document's first tile and the tile before it; the other earlier tiles compete for what is left of its budget. Covered
mass is the share of a row's softmax that the chosen tiles hold, averaged over rows, heads and documents. Every score is
judged at the same budget, per layer:

{scores}

With `heads` "shared" one list serves all query heads of a layer, with "grouped" one list those of a key/value head.
Rows of the first {start} tiles are left out: a budget covers them anyway.

  python benchmarks/tile_coverage.py --model smollm2 --context 8192              # benchmarks/smollm2.py makes the model
  python benchmarks/tile_coverage.py --model smollm2 --context 2048 --documents 1 --out /tmp/coverage.json

The text is source code of installed packages. One pass in float32 on the CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import add_output, table, write_results
from torch import Tensor

TILE = 128
FIRST_ROWS = 8  # query tiles left out at the beginning of a document
PROBES = 4  # query rows of a tile that the score "probe" looks at
LOWEST = -1e30

Score = Callable[["Layer"], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """Queries and keys of one layer, rotary positions applied, and the exact mass of its tiles.

    q [Hq, N, D], k [Hk, N, D]; mass float32 [Hq, tiles, tiles], mean over the rows of a query tile of the softmax that
    a key tile holds; before: the mass of the layer before, or None in the first.
    """

    q: Tensor
    k: Tensor
    scale: float
    mass: Tensor
    before: Tensor | None

    @property
    def tiles(self) -> int:
        return self.q.shape[1] // TILE

    @property
    def group(self) -> int:
        return self.q.shape[0] // self.k.shape[0]

    def tiled(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.tiles, TILE))


# --- scores: float32 [Hq, tiles, tiles], higher = chosen first --------------------------------------------------------


def exact(layer: Layer) -> Tensor:
    """the mass itself: what no score can beat"""
    return layer.mass


def probe(layer: Layer) -> Tensor:
    """exact softmax of 4 rows of each query tile, evenly spaced (3 % of the products of dense attention)"""
    rows = torch.arange(TILE // (2 * PROBES), TILE, TILE // PROBES, device=layer.q.device)
    q = layer.tiled(layer.q)[:, :, rows]
    place = torch.arange(layer.tiles, device=layer.q.device)[:, None] * TILE + rows
    return torch.stack(
        [_mass(q[:, m], place[m], layer.k, layer.group, layer.scale, layer.tiles) for m in range(layer.tiles)], dim=1
    )


def pooled(layer: Layer) -> Tensor:
    """softmax over tiles of mean query by mean key"""
    q, k = (layer.tiled(x).float().mean(2) for x in (layer.q, layer.k))
    return _over_tiles(torch.einsum("hmd,hnd->hmn", q, k.repeat_interleave(layer.group, 0)) * layer.scale)


def bounds(layer: Layer) -> Tensor:
    """mean query by the most favorable corner of the box around a tile's keys (an upper bound per tile)"""
    q, k = layer.tiled(layer.q).float().mean(2), layer.tiled(layer.k).float()
    high, low = (x.repeat_interleave(layer.group, 0) for x in (k.amax(2), k.amin(2)))
    products = torch.einsum("hmd,hnd->hmn", q.clamp(min=0), high) + torch.einsum("hmd,hnd->hmn", q.clamp(max=0), low)
    return _over_tiles(products * layer.scale)


def layer_before(layer: Layer) -> Tensor:
    """the mass of the layer before, head by head (the first layer: recent tiles)"""
    return recent(layer) if layer.before is None else layer.before


def recent(layer: Layer) -> Tensor:
    """the nearest tiles, as in sliding windows with attention sinks"""
    n = torch.arange(layer.tiles, device=layer.q.device, dtype=torch.float32)
    return n.expand(layer.q.shape[0], layer.tiles, layer.tiles)


def by_chance(layer: Layer) -> Tensor:
    """random tiles"""
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(1, layer.tiles, layer.tiles, generator=generator).to(layer.q.device)
    return one.expand(layer.q.shape[0], -1, -1)


SCORES: dict[str, Score] = {
    "exact": exact,
    "probe": probe,
    "pooled": pooled,
    "bounds": bounds,
    "layer before": layer_before,
    "recent": recent,
    "random": by_chance,
}


def _over_tiles(logits: Tensor) -> Tensor:
    tiles = logits.shape[-1]
    later = torch.ones(tiles, tiles, dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill(later, LOWEST).softmax(-1)


def _mass(q: Tensor, place: Tensor, k: Tensor, group: int, scale: float, tiles: int) -> Tensor:
    """[Hq, tiles]: the mean over rows q [Hq, R, D], at positions place [R], of their softmax by key tile."""
    logits = torch.einsum("hrd,hnd->hrn", q, k.repeat_interleave(group, 0)).float() * scale
    later = torch.arange(k.shape[1], device=k.device) > place[:, None]
    return logits.masked_fill(later, LOWEST).softmax(-1).unflatten(-1, (tiles, TILE)).sum(-1).mean(1)


def mass_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Exact mass float32 [Hq, tiles, tiles] of q [Hq, N, D] and k [Hk, N, D], one query tile at a time."""
    tiles, group = q.shape[1] // TILE, q.shape[0] // k.shape[0]
    rows = torch.arange(TILE, device=q.device)
    strips = [_mass(q[:, m * TILE : (m + 1) * TILE], m * TILE + rows, k, group, scale, tiles) for m in range(tiles)]
    return torch.stack(strips, dim=1)


# --- choice -----------------------------------------------------------------------------------------------------------


def choose(scores: Tensor, density: float) -> Tensor:
    """Chosen tiles, bool [H, tiles, tiles]: of the m + 1 tiles that query tile m could see, a share of `density`,
    rounded up and at least the forced ones (itself, the first, the one before)."""
    tiles = scores.shape[-1]
    m = torch.arange(tiles, device=scores.device)
    forced = (m == m[:, None]) | (m == 0) | (m == m[:, None] - 1)
    ranked = scores.masked_fill(m > m[:, None], LOWEST).masked_fill(forced & (m <= m[:, None]), -LOWEST)
    rank = ranked.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    budget = torch.ceil(density * (m + 1).double()).long().clamp(min=3).minimum(m + 1)
    return rank < budget[:, None]


def covered(layer: Layer, scores: Tensor, density: float, heads: str) -> float:
    """Mean covered mass of the rows after the first tiles."""
    if heads == "shared":
        lists = choose(scores.mean(0, keepdim=True), density)
    else:
        lists = choose(scores.unflatten(0, (-1, layer.group)).mean(1), density).repeat_interleave(layer.group, 0)
    return float((layer.mass * lists).sum(-1)[:, FIRST_ROWS:].mean())


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """Attention of a transformers model that judges every layer it computes."""

    densities: Sequence[float]
    names: Sequence[str]
    before: Tensor | None = None
    found: dict[tuple[int, str, str, float], list[float]] = field(default_factory=dict)

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls in place of its attention: query [1, Hq, N, D], key and value [1, Hk, N, D]."""
        layer = Layer(query[0], key[0], scaling, mass_of(query[0], key[0], scaling), self.before)
        for name in self.names:
            scores = SCORES[name](layer)
            for heads in ("shared", "grouped"):
                for density in self.densities:
                    place = (module.layer_idx, name, heads, density)
                    self.found.setdefault(place, []).append(covered(layer, scores, density, heads))
        self.before = layer.mass
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    def read(self, model: Any, ids: Tensor) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register("covered_mass", self.attention)
        model.set_attn_implementation("covered_mass")
        self.before = None
        with torch.no_grad():
            model.model(ids[None], use_cache=False)


def texts(tokenizer: Any, context: int, count: int) -> Iterator[Tensor]:
    """`count` documents of `context` tokens: source files of transformers and torch, long enough, in a fixed order."""
    for package in ("transformers", "torch"):
        for file in sorted(importlib.metadata.files(package) or [], key=str):
            path = Path(str(file.locate()))
            if path.suffix != ".py" or not path.is_file() or path.stat().st_size < 6 * context:
                continue
            ids = tokenizer(path.read_text(errors="replace"), return_tensors="pt").input_ids[0]
            if len(ids) < context:
                continue
            yield ids[:context]
            count -= 1
            if count == 0:
                return
    raise SystemExit(f"too few installed files of {context} tokens; choose a smaller --context or fewer --documents")


def summary(found: dict[tuple[int, str, str, float], list[float]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows by layer, and their means over layers."""
    rows = [
        {"score": name, "heads": heads, "density": density, "layer": layer, "covered": statistics.fmean(values)}
        for (layer, name, heads, density), values in found.items()
    ]
    means = []
    for place in dict.fromkeys((r["score"], r["heads"], r["density"]) for r in rows):
        values = [r["covered"] for r in rows if (r["score"], r["heads"], r["density"]) == place]
        means.append(
            dict(zip(("score", "heads", "density"), place, strict=True))
            | {"covered": statistics.fmean(values), "worst_layer": min(values)}
        )
    return rows, sorted(means, key=lambda r: (r["density"], r["heads"], -r["covered"]))


def main(arguments: Sequence[str] | None = None) -> int:
    scores = "\n".join(f"  {name:<13} {score.__doc__}" for name, score in SCORES.items())
    description = (__doc__ or "").format(scores=scores, start=FIRST_ROWS)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model with rotary positions")
    parser.add_argument("--context", type=int, default=8192, help="tokens per document (default: 8192)")
    parser.add_argument("--documents", type=int, default=4, help="documents to read (default: 4)")
    parser.add_argument("--density", type=float, nargs="+", default=[0.125, 0.25, 0.5], help="shares of the tiles")
    parser.add_argument("--score", nargs="+", choices=list(SCORES), default=list(SCORES), help="default: all of them")
    add_output(parser, "coverage-smollm2")
    args = parser.parse_args(arguments)
    if args.context % TILE or args.context <= FIRST_ROWS * TILE:
        parser.error(f"--context: expected a multiple of {TILE} above {FIRST_ROWS * TILE}, got {args.context}")
    if not all(0 < d <= 1 and math.isfinite(d) for d in args.density):
        parser.error(f"--density: expected shares in (0, 1], got {args.density}")
    if not Path(args.model).is_dir():
        parser.error(
            f"--model: {args.model} is not a folder; python benchmarks/smollm2.py --out {args.model} makes one"
        )
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to("cuda" if cuda else "cpu")
    reader = Reader(args.density, args.score)
    for ids in tqdm(texts(tokenizer, args.context, args.documents), total=args.documents, unit=" documents"):
        reader.read(model, ids.to(model.device))
    rows, means = summary(reader.found)
    print(table(means, ("density", "heads", "score", "covered", "worst_layer")))
    settings = {"context": args.context, "documents": args.documents, "tile": TILE}
    print(write_results(args.out, rows, model=Path(args.model).name, settings=settings, mean=means))
    return 0


if __name__ == "__main__":
    sys.exit(main())
