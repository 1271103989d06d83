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
  python benchmarks/tile_coverage.py --model smollm2 --calibration tiles         # lemo calibrate --target mass

The text is source code of transformers, and of torch if that is too little: calibrate on other files. One pass in
float32 on the CPU, bfloat16 on a GPU.
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
from lemo import ops
from lemo.engine.layout import Blocks
from lemo.predictors import PredictorSet
from torch import Tensor

TILE = 128
FIRST_ROWS = 8  # query tiles left out at the beginning of a document
LOWEST = -1e30

Score = Callable[["Layer"], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """Queries and keys of one layer, rotary positions applied, and the exact mass of its tiles.

    q [Hq, N, D], k [Hk, N, D]; mass float32 [Hq, tiles, tiles], mean over the rows of a query tile of the softmax that
    a key tile holds; before: the mass of the layer before, or None in the first; predicted: float32 [tiles, tiles] of
    a calibration, if there is one.
    """

    q: Tensor
    k: Tensor
    scale: float
    mass: Tensor
    before: Tensor | None
    predicted: Tensor | None = None

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


def probe_1(layer: Layer) -> Tensor:
    """exact softmax of 1 row of each query tile, its middle (1/128 of the products of dense attention)"""
    return mass_of(layer.q, layer.k, layer.scale, 1)


def probe_2(layer: Layer) -> Tensor:
    """exact softmax of 2 rows of each query tile, evenly spaced (1/64 of the products)"""
    return mass_of(layer.q, layer.k, layer.scale, 2)


def probe_4(layer: Layer) -> Tensor:
    """exact softmax of 4 rows of each query tile, evenly spaced (1/32 of the products)"""
    return mass_of(layer.q, layer.k, layer.scale, 4)


def predictors(layer: Layer) -> Tensor:
    """small networks on the layer's input, one list for all heads (with --calibration)"""
    assert layer.predicted is not None
    return layer.predicted.expand(layer.q.shape[0], -1, -1)


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
    "probe 4": probe_4,
    "probe 2": probe_2,
    "probe 1": probe_1,
    "predictors": predictors,
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


def mass_of(q: Tensor, k: Tensor, scale: float, probes: int = TILE) -> Tensor:
    """Mass float32 [Hq, tiles, tiles] of q [Hq, N, D] and k [Hk, N, D], head by head; exact with 128 probes."""
    n, group = q.shape[1], q.shape[0] // k.shape[0]
    ends, tiles = torch.tensor([0, n], dtype=torch.int32, device=q.device), n // TILE
    return torch.stack(
        [
            ops.tile_scores(q[h, :, None], k[h // group, :, None], ends, None, n, scale, probes, 0, tiles, tiles)[0]
            for h in range(q.shape[0])
        ]
    )


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
    """Attention of a transformers model that judges every layer it computes. predictors: calibrated for mass."""

    densities: Sequence[float]
    names: Sequence[str]
    predictors: PredictorSet | None = None
    predicted: Tensor | None = None
    before: Tensor | None = None
    found: dict[tuple[int, str, str, float], list[float]] = field(default_factory=dict)

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls in place of its attention: query [1, Hq, N, D], key and value [1, Hk, N, D]."""
        mass = mass_of(query[0], key[0], scaling)
        layer = Layer(query[0], key[0], scaling, mass, self.before, self.predicted)
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

    def predict(self, index: int, x: Tensor) -> None:
        """Predicted masses of a layer, from its input x [1, N, d]."""
        assert self.predictors is not None
        blocks = Blocks.from_lengths([x.shape[1]], TILE, x.device)
        self.predicted = self.predictors.tile_scores(index, x[0], blocks)(0, blocks.num_blocks, blocks.num_blocks)

    def read(self, model: Any, ids: Tensor) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register("covered_mass", self.attention)
        model.set_attn_implementation("covered_mass")
        self.before = None
        hooks = []
        if self.predictors is not None:
            for i, module in enumerate(model.model.layers):
                hooks.append(module.register_forward_pre_hook(lambda _, args, i=i: self.predict(i, args[0])))
        try:
            with torch.no_grad():
                model.model(ids[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()


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


def by_layer(rows: Sequence[dict[str, Any]], density: float) -> str:
    """Covered mass with shared lists as text: a row per layer, a column per score."""
    shown = [row for row in rows if row["heads"] == "shared" and row["density"] == density]
    layers: dict[int, dict[str, Any]] = {}
    for row in shown:
        layers.setdefault(row["layer"], {"layer": row["layer"]})[row["score"]] = row["covered"]
    return f"by layer at density {density:g}, shared lists\n" + table(
        [layers[i] for i in sorted(layers)], ("layer", *dict.fromkeys(row["score"] for row in shown))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    scores = "\n".join(f"  {name:<13} {score.__doc__}" for name, score in SCORES.items())
    description = (__doc__ or "").format(scores=scores, start=FIRST_ROWS)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model with rotary positions")
    parser.add_argument("--context", type=int, default=8192, help="tokens per document (default: 8192)")
    parser.add_argument("--documents", type=int, default=4, help="documents to read (default: 4)")
    parser.add_argument("--density", type=float, nargs="+", default=[0.125, 0.25, 0.5], help="shares of the tiles")
    parser.add_argument("--score", nargs="+", choices=list(SCORES), help="default: all that there are")
    parser.add_argument("--calibration", help="folder of lemo calibrate --target mass: adds the score predictors")
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
    names = args.score or [name for name in SCORES if name != "predictors" or args.calibration]
    if "predictors" in names and not args.calibration:
        parser.error("--score predictors needs --calibration, a folder of lemo calibrate --target mass")
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to("cuda" if cuda else "cpu")
    calibrated = None
    if args.calibration:
        calibrated = PredictorSet.load(args.calibration, model=model, device=model.device, dtype=dtype)
        calibrated.require("mass", args.calibration, "this benchmark")
    reader = Reader(args.density, names, calibrated)
    for ids in tqdm(texts(tokenizer, args.context, args.documents), total=args.documents, unit=" documents"):
        reader.read(model, ids.to(model.device))
    rows, means = summary(reader.found)
    print(table(means, ("density", "heads", "score", "covered", "worst_layer")))
    for density in args.density:
        print("\n" + by_layer(rows, density))
    settings: dict[str, Any] = {"context": args.context, "documents": args.documents, "tile": TILE}
    if calibrated is not None:
        training = calibrated.report.get("training", {})
        settings["calibration"] = training | {"context": calibrated.context, "parameters": calibrated.num_parameters}
    print(write_results(args.out, rows, model=Path(args.model).name, settings=settings, mean=means))
    return 0


if __name__ == "__main__":
    sys.exit(main())
