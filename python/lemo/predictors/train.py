"""Calibration: trains the predictors of every layer on a frozen model and the user's text (paper section 4.3).

The model reads a document densely; each layer's input and exact scores come from hooks on the way, so one forward pass
serves every layer and nothing of size S x S exists. Of each input a fixed number of rows per block, drawn at random, is
kept in a bounded buffer, from which every training step draws documents: predictors are small and the model is not, so
a document that was read once trains them several times.

Training minimises, per layer and document, twice one minus the correlation of predicted and exact block scores (what
ranking blocks needs) plus a weak regression onto the exact scores in units of the layer's mean score (which gives
predicted scores one scale in all documents, so that one threshold serves them). It starts from a closed form: see
``init``. Predictions are always plain column
sums, also where the exact scores are normalised: the residual stream says little about position, and the number of
query blocks behind a block is how a predictor knows it.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine.layout import Blocks
from lemo.predictors.fingerprint import model_fingerprint
from lemo.predictors.fit import fit_outputs, refit_outputs
from lemo.predictors.network import ALIGNMENT, PredictorNetwork, informativeness
from lemo.predictors.prune import Activity, choose_units, prune
from lemo.predictors.report import Tally, compare
from lemo.predictors.store import PredictorSet
from lemo.predictors.teacher import Teacher, documents
from lemo.predictors.thresholds import search_thresholds

_HELD_OUT = 8  # one document in this many is never trained on: thresholds and the report come from these
_SCALE_WEIGHT = 0.1
_STEP_ROWS = 8192
_START_DOCUMENTS = 24  # what the closed-form start and pruning are solved from
_PRUNE_AT = (0.4, 0.55, 0.7)  # shares of the steps: late enough to know which units fire, early enough to recover


@dataclass(frozen=True, eq=False)
class _Sample:
    """One document: per layer, normalised rows [nb * tokens, d] and exact scores float32 [nb]."""

    rows: list[Tensor]
    exact: list[Tensor]


def score_loss(predicted: Tensor, exact: Tensor, blocks: Blocks) -> Tensor:
    """Mean over documents of 2 (1 - correlation) + a regression term. predicted, exact (scaled to mean 1): [nb].

    The first block of each document does not count: it is kept in any case, and as an attention sink it may score so
    high that its correlation would be all there is to learn.
    """
    choice = torch.ones_like(exact, dtype=torch.bool)
    choice[blocks.documents[:-1].long()] = False
    predicted, exact = predicted[choice], exact[choice]
    counts = (blocks.documents[1:] - blocks.documents[:-1]).long() - 1
    document = torch.repeat_interleave(torch.arange(counts.shape[0], device=exact.device), counts)

    def mean(values: Tensor) -> Tensor:
        return values.new_zeros(counts.shape[0]).index_add(0, document, values) / counts

    def centred(values: Tensor) -> Tensor:
        c = values - mean(values)[document]
        return c * torch.rsqrt(mean(c.square()) + 1e-12)[document]

    ranking = mean((centred(predicted) - centred(exact)).square())
    scale = nn.functional.smooth_l1_loss(predicted, exact, reduction="none")
    return (ranking + _SCALE_WEIGHT * mean(scale)).mean()


class _Trainer:
    """All layers' networks with one optimizer each."""

    def __init__(self, networks: list[PredictorNetwork], lr: float, steps: int, tokens: int) -> None:
        self.networks, self.lr, self.steps, self.tokens = networks, lr, steps, tokens
        self.optimizers: list[torch.optim.Optimizer] = []
        self.activities = [Activity() for _ in networks]
        self.scale = [0.0] * len(networks)

    def step(self, index: int, samples: list[_Sample]) -> float:
        """One step of every layer; the mean loss."""
        lr = (
            self.lr
            * min(1.0, (index + 1) / min(20, self.steps))
            * (0.52 + 0.48 * math.cos(math.pi * index / self.steps))
        )
        blocks = self.blocks(samples)
        total = 0.0
        for i, (network, optimizer) in enumerate(zip(self.networks, self.optimizers, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["base"]
            z = torch.cat([s.rows[i] for s in samples]).float()
            exact = torch.cat([s.exact[i] for s in samples]) / self.scale[i]
            vectors: list[Tensor] = []
            for side in "qk":
                first, second = network.hidden(z, side)
                self.activities[i].observe(side, first, second)
                vectors.append(network.pooled(second, blocks, side))
            loss = score_loss(informativeness(vectors[0], vectors[1], blocks, network.normalize), exact, blocks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise FloatingPointError(f"calibration step {index}: the loss is not finite; lower the learning rate")
        return total / len(self.networks)

    @torch.no_grad()
    def pooled(self, layer: int, samples: list[_Sample]) -> dict[str, Tensor]:
        """By side, p [nb, s] of all samples."""
        network = self.networks[layer]
        parts: dict[str, list[Tensor]] = {"q": [], "k": []}
        for sample in samples:
            rows = sample.rows[layer]
            blocks = Blocks.from_lengths([rows.shape[0]], self.tokens, rows.device)
            for side, pooled in parts.items():
                pooled.append(network.pool_block(network.hidden(rows.float(), side)[1], blocks))
        return {side: torch.cat(p) for side, p in parts.items()}

    def blocks(self, samples: list[_Sample]) -> Blocks:
        rows = [s.rows[0] for s in samples]
        return Blocks.from_lengths([r.shape[0] for r in rows], self.tokens, rows[0].device)

    def start(self, samples: list[_Sample]) -> None:
        """Scales of the exact scores, and the closed-form start of every layer, from the first documents."""
        blocks = self.blocks(samples)
        for i, network in enumerate(self.networks):
            exact = torch.cat([s.exact[i] for s in samples])
            self.scale[i] = max(float(torch.cat([s.exact[i][1:] for s in samples]).mean()), 1e-12)
            fit_outputs(network, self.pooled(i, samples), exact / self.scale[i], blocks)
            # Adam's steps have one size for all weights of a matrix; the matrices' own sizes differ a hundredfold.
            groups = [
                {"params": [p], "base": float(p.detach().square().mean().sqrt()), "lr": 0.0}
                for p in network.parameters()
            ]
            self.optimizers.append(torch.optim.Adam(groups, betas=(0.9, 0.99)))

    def prune(self, remove: float, multiple: int, samples: list[_Sample]) -> None:
        blocks = self.blocks(samples)
        chosen = choose_units(self.activities, remove, multiple)
        for i, (network, optimizer, kept) in enumerate(zip(self.networks, self.optimizers, chosen, strict=True)):
            before = self.pooled(i, samples)
            vectors = {side: p @ getattr(network, f"w{side}3").detach().T for side, p in before.items()}
            prune(network, optimizer, kept)
            refit_outputs(network, self.pooled(i, samples), vectors, blocks)
        for activity in self.activities:
            activity.reset()


class _Collector:
    """Reads documents with the model; keeps samples in a buffer of bounded size and every eighth one held out."""

    def __init__(
        self,
        teacher: Teacher,
        source: Iterator[Tensor],
        network: PredictorNetwork,
        tokens: int,
        room: int,
        seed: int,
        keep: float,
    ) -> None:
        self.teacher, self.source, self.network, self.tokens, self.room = teacher, source, network, tokens, room
        self.keep = keep
        self.generator = torch.Generator().manual_seed(seed)
        self.train: list[_Sample] = []
        self.held_out: list[Tensor] = []
        self.count = 0
        self.replace = 0

    def read(self) -> bool:
        """One more document; False where there is none left."""
        ids = next(self.source, None)
        if ids is None:
            return False
        self.count += 1
        if self.count % _HELD_OUT == 2:
            self.held_out.append(ids)
            return self.read()
        sample = _Sample([], [])
        picked: list[Tensor] = []  # the same rows in every layer

        def consume(layer: int, x: Tensor, exact: Tensor, blocks: Blocks) -> None:
            if layer == 0:
                sizes = blocks.offsets[1:] - blocks.offsets[:-1]
                # Random rows of every block, without repetition where the block is long enough.
                order = torch.rand(
                    blocks.num_blocks, blocks.block_size, generator=self.generator, dtype=torch.float32
                ).to(x.device)
                order = order.masked_fill(torch.arange(blocks.block_size, device=x.device) >= sizes[:, None], 2.0)
                pick = order.argsort(1)[:, : self.tokens] % sizes[:, None]
                picked.append((blocks.offsets[:-1, None] + pick).flatten().long())
            z = self.network.normalise(x[picked[0]])
            sample.rows.append(z.bfloat16())
            sample.exact.append(exact.float().clone())

        # Every other document with elimination: what predictors will see in training is not what a dense model shows.
        if self.count % 2:
            self.teacher.read_eliminating(ids, consume, self.keep)
        else:
            self.teacher.read(ids, consume)
        if sum(t.numel() * 2 for s in [*self.train, sample] for t in s.rows) <= self.room or not self.train:
            self.train.append(sample)
        else:
            self.train[self.replace % len(self.train)] = sample
            self.replace += 1
        return True


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    block_size: int = 64,
    keep: float = 0.5,
    steps: int = 300,
    context: int | None = None,
    rank: int = 64,
    features: int = 32,
    pool: str = "max",
    normalize: bool = False,
    learning_rate: float = 2e-2,
    batch_size: int | None = None,
    max_documents: int = 64,
    tokens_per_block: int | None = None,
    remove: float = 0.35,
    buffer_bytes: int = 2 << 30,
    seed: int = 0,
    progress: bool = True,
) -> PredictorSet:
    """Trains predictors for every layer of a frozen model and finds the layers' thresholds.

    model: as for `lemo.apply` (adapters are switched off meanwhile; nothing of the model changes).
    batches: documents or batches of them, see ``teacher.documents``; an endless iterator is read as far as needed.
    block_size: tokens per block; keep: share of blocks that thresholds and budgets shall keep, on average over layers;
    steps: optimizer steps; context: documents are cut to it; rank, features: sizes of the networks before pruning;
    pool: "mean" or "max" over a block's tokens; normalize: learn the exact scores divided by the number of query
    blocks; learning_rate: of Adam, in root mean squares of each matrix at the start; batch_size: documents per step
    (default: as many as hold 8192 rows, at most 4); max_documents: documents the model reads, one in eight held out;
    tokens_per_block: rows drawn from each block in training (default all; with pool "mean" a sample of them trains
    nearly as well for its share of the cost); remove: share of hidden units to prune;
    buffer_bytes: bound of the training buffer, beyond which the oldest documents are replaced.

    Returns a PredictorSet whose ``report`` holds recall on the held-out documents (``report.format_report``), losses,
    and parameters before and after pruning. The same arguments and seed give the same predictors on the same machine.
    Raises ValueError for arguments out of range or too little text.
    """
    for name, value in (
        ("block_size", block_size),
        ("steps", steps),
        ("batch_size", 1 if batch_size is None else batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep}")
    if not 0.0 <= remove < 1.0:
        raise ValueError(f"remove: expected a share in [0, 1), got {remove}")
    if context is not None and context <= block_size:
        raise ValueError(f"context: expected more than one block of {block_size} tokens, got {context}")
    if max_documents < 2:
        raise ValueError(f"max_documents: expected at least 2 (one is held out), got {max_documents}")
    teacher = Teacher(model, block_size, normalize)
    norm = teacher.norm
    width = int(teacher.decoder.config.hidden_size)
    tokens = min(block_size, tokens_per_block or block_size)
    generator = torch.Generator().manual_seed(seed)
    networks = [
        PredictorNetwork(width, rank, features, norm=norm.kind, pool=pool, eps=norm.eps, generator=generator)
        for _ in teacher.layers
    ]
    before = [n.export().num_parameters for n in networks]
    for n in networks:
        n.to(teacher.device)
    trainer = _Trainer(networks, learning_rate, steps, tokens)
    collector = _Collector(
        teacher, documents(batches, context, block_size), networks[0], tokens, buffer_bytes, seed, keep
    )
    bar = _progress(progress, steps)
    losses: list[float] = []
    draw = random.Random(seed)
    more, per_step = True, 1
    prune_steps = {int(share * steps) for share in _PRUNE_AT} if remove > 0 else set()
    each = 1 - (1 - remove) ** (1 / max(len(prune_steps), 1))
    for step in range(steps):
        # Documents arrive evenly over the first half of the steps; the first ones before training starts.
        due = min(max_documents, max(_START_DOCUMENTS, math.ceil(2 * max_documents * (step + 1) / steps)))
        while more and collector.count < due:
            more = collector.read()
        if step == 0:
            if not collector.train or not collector.held_out:
                raise ValueError(
                    f"batches: expected at least 2 documents longer than a block of {block_size} tokens, "
                    f"got {collector.count}; give more text or a smaller block size"
                )
            trainer.start(collector.train)
            longest = max(s.rows[0].shape[0] for s in collector.train)
            per_step = batch_size or max(1, min(4, _STEP_ROWS // longest))
        samples = draw.choices(collector.train, k=per_step)
        losses.append(trainer.step(step, samples))
        if step in prune_steps:
            recent = collector.train[-_START_DOCUMENTS:]
            trainer.prune(each, ALIGNMENT if step == max(prune_steps) else 1, recent)
        bar(1, losses[-1])
    bar(0, None)

    layers = [n.export() for n in networks]
    predictors = PredictorSet(
        layers=layers,
        norm=norm.kind,
        pool=pool,
        eps=norm.eps,
        normalize=False,
        thresholds=(0.0,) * len(layers),
        keep=(keep,) * len(layers),
        block_size=block_size,
        context=context or max(ids.shape[0] for ids in collector.held_out),
        fingerprint=model_fingerprint(model),
    )
    _finish(predictors, teacher, collector.held_out, keep)
    predictors.report |= {
        "exact_normalize": normalize,
        "parameters": {"before_pruning": before, "after_pruning": [layer.num_parameters for layer in layers]},
        "loss": {"first": losses[0], "last": sum(losses[-10:]) / len(losses[-10:])},
        "training": {"steps": steps, "documents": collector.count, "seed": seed, "rank": rank, "features": features},
    }
    return predictors


def _finish(predictors: PredictorSet, teacher: Teacher, held_out: list[Tensor], keep: float) -> None:
    """Thresholds, budgets and the report, from held-out documents and the operators that training will run."""
    n = predictors.num_layers
    dtype = torch.float32 if teacher.device.type == "cpu" else torch.bfloat16
    placed = predictors.to(device=teacher.device, dtype=dtype)
    Seen = list[list[tuple[Tensor, Tensor, Blocks]]]

    def collect(eliminating: bool) -> Seen:
        seen: Seen = [[] for _ in range(n)]

        def consume(layer: int, x: Tensor, exact: Tensor, blocks: Blocks) -> None:
            seen[layer].append((placed.scores(layer, x.to(dtype), blocks), exact.float().clone(), blocks))

        for ids in held_out:
            if eliminating:
                teacher.read_eliminating(ids, consume, keep)
            else:
                teacher.read(ids, consume)
        return seen

    # Thresholds are for training, so for activations with elimination; the report has both.
    seen = collect(True)
    forced = []
    for rows in seen:
        first = [torch.zeros(b.num_blocks, dtype=torch.bool) for _, _, b in rows]
        for f in first:
            f[0] = True
        forced.append(torch.cat(first))
    predictors.thresholds, predictors.keep = search_thresholds(
        [torch.cat([p for p, _, _ in rows]) for rows in seen],
        [torch.cat([e for _, e, _ in rows]) for rows in seen],
        forced,
        keep,
    )

    def tallied(seen: Seen) -> dict[str, Any]:
        tally = Tally(n)
        for i, rows in enumerate(seen):
            for predicted, exact, blocks in rows:
                tally.add(i, compare(predicted, exact, blocks, keep, predictors.thresholds[i], teacher.normalize))
        return tally.report(keep)

    predictors.report |= tallied(collect(False)) | {"with_elimination": tallied(seen)}


def _progress(show: bool, steps: int) -> Any:
    """A function (advance, loss) that draws progress; loss None closes it."""
    if not show:
        return lambda advance, loss: None
    from tqdm import tqdm

    bar = tqdm(total=steps, desc="calibrate", unit="step", file=sys.stderr)

    def update(advance: int, loss: float | None) -> None:
        if loss is None:
            bar.close()
            return
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(advance)

    return update
