"""Training predictors on attention mass (mode `sparse`), and what they cover on held-out documents.

The block vectors of ``lemo.ops.predict`` for tiles of 128 tokens give the logits of a softmax over key tiles,

    mass(m, n) = softmax over n <= m of yq_m . yk_n + b(m - n) + b0 [n = 0],

with a table b of a few numbers per layer for the distance (a residual row says nothing about its place). Training
minimizes the divergence of this softmax from the true mass twice: over all tiles, so that predicted masses are shares
that add up, and over the tiles that compete, weighted by what they hold, since the tiles that are chosen in any case
would be most of what there is to learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine.layout import Blocks
from lemo.engine.tiles import TILE
from lemo.predictors.network import PredictorNetwork
from lemo.predictors.store import PredictorSet
from lemo.predictors.teacher import Teacher
from lemo.predictors.tiles import (
    ALL_ROWS,
    LOCAL,
    choose,
    distance_knots,
    distance_logits,
    free_tiles,
    numbers,
    pooled_mass,
    query_strips,
    tile_mass,
)
from lemo.predictors.train import Sample, Trainer, groups

DENSITIES = (0.125, 0.25, 0.5)  # of the report
_QUERY_TILES = 256  # of a document, at most
_START_LOGIT = 0.1  # root mean square of the products at the start: close to what the distance alone says
_TABLE_DOCUMENTS = 8  # that the distance tables start from
_TABLE_STEP = 1.0  # of a distance table, in the units of its logits, relative to the learning rate
_SKIPPED = 8  # query tiles at a document's beginning that a budget covers anyway: not in the report


class MassTeacher(Teacher):
    """Hands every layer's input and the true mass of its tiles to a consumer.

    The mass float32 [Q, N] is that of ``query_strips(N, 256)``; probes: rows of a query tile that it is taken from, 128
    for the exact mass. A few suffice for training: their mean over documents is the same.
    """

    def __init__(self, model: nn.Module, probes: int) -> None:
        super().__init__(model, TILE, False)
        self.probes = probes

    def check_scores(self, tokens: int) -> None:
        self.family.check_kernels(self.config, self.device)  # masses have the same sizes of heads, and no options

    def exact(self, index: int, x: Tensor, blocks: Blocks) -> Tensor:
        q, k, scale = self.queries_keys(index, x, blocks)
        return tile_mass(q, k, scale, self.probes, query_strips(blocks.num_blocks, _QUERY_TILES))


class MassTrainer(Trainer):
    """All layers' networks and distance tables."""

    def __init__(self, networks: list[PredictorNetwork], lr: float, steps: int, tokens: int) -> None:
        super().__init__(networks, lr, steps, tokens)
        self.tables: list[nn.Parameter] = []

    def start(self, samples: list[Sample]) -> None:
        """Products that hardly matter, and the distance table that explains the masses best without them."""
        blocks = self.blocks(samples)
        knots = distance_knots(max(s.exact[0].shape[1] for s in samples))
        for i, network in enumerate(self.networks):
            pooled = self.pooled(i, samples)
            y = {side: p @ getattr(network, f"w{side}3").detach().T for side, p in pooled.items()}
            size = (y["q"] @ y["k"].T).square().mean().sqrt().clamp(min=1e-12)
            for side in "qk":
                getattr(network, f"w{side}3").data.mul_((_START_LOGIT / size).sqrt())
            table = nn.Parameter(torch.zeros(knots, device=blocks.device))
            fit_table(table, [s.exact[i] for s in samples[:_TABLE_DOCUMENTS]])
            self.tables.append(table)
            places = {"params": [table], "base": _TABLE_STEP, "lr": 0.0}
            self.optimizers.append(torch.optim.Adam([*groups(network), places], betas=(0.9, 0.99)))

    def loss(self, layer: int, queries: Tensor, keys: Tensor, samples: list[Sample], blocks: Blocks) -> Tensor:
        total = queries.new_zeros(())
        first = 0
        for sample in samples:
            mass = sample.exact[layer]
            tiles = mass.shape[1]
            m = numbers(query_strips(tiles, _QUERY_TILES), mass.device)
            products = queries[first + m] @ keys[first : first + tiles].T
            total = total + mass_loss(products + distance_logits(self.tables[layer], m, tiles), mass, m)
            first += tiles
        return total / len(samples)

    def distances(self) -> Tensor:
        """float32 [layers, P] on the CPU."""
        return torch.stack([t.detach().float().cpu() for t in self.tables])


def fit_table(table: nn.Parameter, masses: Sequence[Tensor]) -> None:
    """The distance table with the least ``mass_loss`` over documents of masses [Q, N] where it is the only logit."""
    cases = [(mass, numbers(query_strips(mass.shape[1], _QUERY_TILES), mass.device)) for mass in masses]
    optimizer = torch.optim.LBFGS([table], max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A weak pull to 0 holds entries that no document reaches.
        loss = 1e-4 * table.square().mean()
        for mass, m in cases:
            loss = loss + mass_loss(distance_logits(table, m, mass.shape[1]), mass, m) / len(cases)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)


def mass_loss(logits: Tensor, mass: Tensor, m: Tensor) -> Tensor:
    """Divergence of softmax(logits) from the mass, in nats: over all visible tiles, plus over those that compete.

    logits, mass: [Q, N]; m: [Q]. In the second term a query tile weighs what its competing tiles hold.
    """
    tiles = logits.shape[1]
    visible = torch.arange(tiles, device=m.device) <= m[:, None]
    free = free_tiles(m, tiles)
    lowest = torch.finfo(logits.dtype).min

    def divergence(among: Tensor) -> Tensor:
        share = mass * among
        log_p = torch.log_softmax(logits.masked_fill(~among, lowest), -1).masked_fill(~among, 0.0)
        whole = share.sum(1)
        entropy = torch.xlogy(share, share).sum(1) - torch.xlogy(whole, whole)
        return (entropy - (share * log_p).sum(1)).sum() / whole.sum().clamp(min=1e-12)

    return divergence(visible) + divergence(free)


# --- report -----------------------------------------------------------------------------------------------------------


def covered(mass: Tensor, chosen: Tensor) -> Tensor:
    """[Q]: what the chosen tiles hold."""
    return (mass * chosen).sum(1)


@torch.no_grad()
def evaluate_coverage(
    model: nn.Module,
    predictors: PredictorSet,
    pieces: Iterable[Tensor],
    densities: Sequence[float] = DENSITIES,
    *,
    progress: Any = None,
) -> dict[str, Any]:
    """Covered mass of what predictors and other scores choose, per layer, at equal density; lists shared by all heads.

    pieces: documents int64 [T], of which more than 4 tiles; progress: called with no arguments after every layer.

    Returns {"densities", "documents", "layers": [{score: [by density]}], "mean": the same over layers, "competing"}.
    Covered mass is the share of the softmax of the query tiles (the first eight of a document left out, or the first
    half of a short one) that the chosen tiles hold, the three that are always chosen included. "predicted": what the
    predictors themselves expect their choice to cover. "competing": by density, the share of the tiles that compete by
    score which is chosen; 0 and 1 leave no choice, and every score covers the same.
    """
    for density in densities:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"densities: expected shares in (0, 1], got {density}")
    teacher = MassTeacher(model, ALL_ROWS)
    dtype = torch.float32 if teacher.device.type == "cpu" else torch.bfloat16
    placed = predictors.to(device=teacher.device, dtype=dtype)
    sums: list[dict[str, list[float]]] = [{} for _ in teacher.layers]
    counts = [0] * len(teacher.layers)
    competing, won = 0, [0] * len(densities)

    def visit(layer: int, x: Tensor, blocks: Blocks) -> None:
        tiles = blocks.num_blocks
        strips = query_strips(tiles, _QUERY_TILES)
        q, k, scale = teacher.queries_keys(layer, x, blocks)
        m = numbers(strips, x.device)
        counted = m >= min(_SKIPPED, tiles // 2)
        mass = tile_mass(q, k, scale, ALL_ROWS, strips)
        strip = placed.tile_scores(layer, x.to(dtype), blocks)
        predicted = torch.cat([strip(first, count, tiles) for first, count in strips])
        scores = {
            "exact": mass,
            "predictors": predicted,
            "probe 2": tile_mass(q, k, scale, 2, strips),
            "probe 4": tile_mass(q, k, scale, 4, strips),
            "pooled": pooled_mass(q, k, scale, m),
            "recent": torch.arange(tiles, device=x.device).expand(mass.shape).float(),
            "random": torch.rand(mass.shape, generator=torch.Generator().manual_seed(tiles)).to(x.device),
        }
        for name, score in scores.items():
            for i, density in enumerate(densities):
                chosen = choose(score, m, density)
                _add(sums[layer], name, i, float(covered(mass, chosen)[counted].sum()))
                if name == "predictors":
                    _add(sums[layer], "predicted", i, float(covered(predicted, chosen)[counted].sum()))
        counts[layer] += int(counted.sum())
        if layer == 0:
            count_choices(m[counted], tiles)
        if progress is not None:
            progress()

    def count_choices(m: Tensor, tiles: int) -> None:
        nonlocal competing
        free = free_tiles(m, tiles)
        competing += int(free.sum())
        for i, density in enumerate(densities):
            won[i] += int((choose(torch.zeros_like(free), m, density) & free).sum())

    documents = 0
    for ids in pieces:
        teacher.visit(ids, visit)
        documents += 1
    if not documents:
        raise ValueError("pieces: expected at least one document, got none")
    layers = [{name: [v / n for v in row] for name, row in rows.items()} for rows, n in zip(sums, counts, strict=True)]
    mean = {name: [sum(c) / len(layers) for c in zip(*(r[name] for r in layers), strict=True)] for name in layers[0]}
    shares = [n / max(1, competing) for n in won]
    return {"densities": list(densities), "documents": documents, "layers": layers, "mean": mean, "competing": shares}


def no_choice(report: dict[str, Any], index: int) -> str | None:
    """Why scores make no difference at a density of a report, by its index; None: they do."""
    share = report.get("competing", {index: 0.5})[index]
    if share >= 1.0:
        return "every tile is attended to, whatever its score"
    if share <= 0.0:
        return (
            f"documents this short leave no choice: a query tile attends to itself, the first tile and {LOCAL} before "
            "it in any case, and the density allows no more"
        )
    return None


def _add(sums: dict[str, list[float]], name: str, index: int, value: float) -> None:
    row = sums.setdefault(name, [])
    if len(row) == index:
        row.append(0.0)
    row[index] += value


def format_coverage(report: dict[str, Any]) -> str:
    """The report of ``evaluate_coverage`` or of a calibration for mass as text, a table per density at which scores
    make a difference."""
    names = list(report["mean"])
    text = []
    for d, density in enumerate(report["densities"]):
        if (reason := no_choice(report, d)) is not None:
            text += [f"density {density:g}: {reason}", ""]
            continue
        lines = [["layer", *names]]
        for i, row in enumerate([*report["layers"], report["mean"]]):
            label = "mean" if i == len(report["layers"]) else str(i)
            lines.append([label, *(f"{100 * row[name][d]:.1f} %" for name in names)])
        widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
        text.append(f"covered mass at density {density:g}")
        text += ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
        text.append("")
    return "\n".join(text).rstrip()
