"""Training the predictors of every layer on documents that the model reads once.

Of each input a fixed number of rows per block, drawn at random, is kept in a bounded buffer, from which every training
step draws documents: predictors are small and the model is not, so a document that was read once trains them several
times.

Training minimizes, per layer and document, twice one minus the correlation of predicted and exact block scores (what
ranking blocks needs) plus a weak regression onto the exact scores in units of the layer's mean score (which gives
predicted scores one scale in all documents, so that one threshold serves them). It starts from a closed form: see
``fit``. Predictions are always plain column sums, also if the exact scores are normalized: the residual stream says
little about position, and the number of query blocks behind a block is how a predictor knows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine.layout import Blocks
from lemo.predictors.fit import fit_outputs, refit_outputs
from lemo.predictors.network import PredictorNetwork, informativeness
from lemo.predictors.prune import Activity, choose_units, prune
from lemo.predictors.teacher import Teacher

_HELD_OUT = 8  # one document in this many is never trained on: thresholds and the report come from these
_SCALE_WEIGHT = 0.1


@dataclass(frozen=True, eq=False)
class Sample:
    """One document: per layer, normalized rows [nb * tokens, d] and exact scores float32 [nb] (or masses of tiles)."""

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


def groups(network: PredictorNetwork) -> list[dict[str, Any]]:
    """Adam's steps have one size for all weights of a matrix; the matrices' own sizes differ a hundredfold."""
    return [{"params": [p], "base": float(p.detach().square().mean().sqrt()), "lr": 0.0} for p in network.parameters()]


class Trainer:
    """All layers' networks with one optimizer each."""

    def __init__(self, networks: list[PredictorNetwork], lr: float, steps: int, tokens: int) -> None:
        self.networks, self.lr, self.steps, self.tokens = networks, lr, steps, tokens
        self.optimizers: list[torch.optim.Optimizer] = []
        self.activities = [Activity() for _ in networks]
        self.scale = [0.0] * len(networks)

    def step(self, index: int, samples: list[Sample]) -> float:
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
            vectors: list[Tensor] = []
            for side in "qk":
                first, second = network.hidden(z, side)
                self.activities[i].observe(side, first, second)
                vectors.append(network.pooled(second, blocks, side))
            loss = self.loss(i, vectors[0], vectors[1], samples, blocks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise FloatingPointError(f"calibration step {index}: the loss is not finite; lower the learning rate")
        return total / len(self.networks)

    def loss(self, layer: int, queries: Tensor, keys: Tensor, samples: list[Sample], blocks: Blocks) -> Tensor:
        """Of one layer, from the block vectors [nb, c] of all samples."""
        exact = torch.cat([s.exact[layer] for s in samples]) / self.scale[layer]
        return score_loss(informativeness(queries, keys, blocks, self.networks[layer].normalize), exact, blocks)

    @torch.no_grad()
    def pooled(self, layer: int, samples: list[Sample]) -> dict[str, Tensor]:
        """By side, p [nb, s] of all samples."""
        network = self.networks[layer]
        parts: dict[str, list[Tensor]] = {"q": [], "k": []}
        for sample in samples:
            rows = sample.rows[layer]
            blocks = Blocks.from_lengths([rows.shape[0]], self.tokens, rows.device)
            for side, pooled in parts.items():
                pooled.append(network.pool_block(network.hidden(rows.float(), side)[1], blocks))
        return {side: torch.cat(p) for side, p in parts.items()}

    def blocks(self, samples: list[Sample]) -> Blocks:
        rows = [s.rows[0] for s in samples]
        return Blocks.from_lengths([r.shape[0] for r in rows], self.tokens, rows[0].device)

    def start(self, samples: list[Sample]) -> None:
        """Scales of the exact scores, and the closed-form start of every layer, from the first documents."""
        blocks = self.blocks(samples)
        for i, network in enumerate(self.networks):
            exact = torch.cat([s.exact[i] for s in samples])
            self.scale[i] = max(float(torch.cat([s.exact[i][1:] for s in samples]).mean()), 1e-12)
            fit_outputs(network, self.pooled(i, samples), exact / self.scale[i], blocks)
            self.optimizers.append(torch.optim.Adam(groups(network), betas=(0.9, 0.99)))

    def prune(self, remove: float, multiple: int, samples: list[Sample]) -> None:
        blocks = self.blocks(samples)
        chosen = choose_units(self.activities, remove, multiple)
        for i, (network, optimizer, kept) in enumerate(zip(self.networks, self.optimizers, chosen, strict=True)):
            before = self.pooled(i, samples)
            vectors = {side: p @ getattr(network, f"w{side}3").detach().T for side, p in before.items()}
            prune(network, optimizer, kept)
            refit_outputs(network, self.pooled(i, samples), vectors, blocks)
        for activity in self.activities:
            activity.reset()


class Collector:
    """Reads documents with the model; keeps samples in a buffer of bounded size and every eighth one held out."""

    def __init__(
        self,
        teacher: Teacher,
        source: Iterator[Tensor],
        network: PredictorNetwork,
        tokens: int,
        room: int,
        seed: int,
        keep: float | None,
    ) -> None:
        """keep: what documents with elimination keep; None reads every document densely."""
        self.teacher, self.source, self.network, self.tokens, self.room = teacher, source, network, tokens, room
        self.keep = keep
        self.generator = torch.Generator().manual_seed(seed)
        self.train: list[Sample] = []
        self.held_out: list[Tensor] = []
        self.count = 0
        self.replace = 0

    def read(self) -> bool:
        """One more document; False if there is none left."""
        ids = next(self.source, None)
        if ids is None:
            return False
        self.count += 1
        if self.count % _HELD_OUT == 2:
            self.held_out.append(ids)
            return self.read()
        sample = Sample([], [])
        picked: list[Tensor] = []  # the same rows in every layer

        def consume(layer: int, x: Tensor, exact: Tensor, blocks: Blocks) -> None:
            if layer == 0:
                sizes = blocks.offsets[1:] - blocks.offsets[:-1]
                # Random rows of every block, without repetition if the block is long enough.
                order = torch.rand(
                    blocks.num_blocks, blocks.block_size, generator=self.generator, dtype=torch.float32
                ).to(x.device)
                order = order.masked_fill(torch.arange(blocks.block_size, device=x.device) >= sizes[:, None], 2.0)
                pick = order.argsort(1)[:, : self.tokens] % sizes[:, None]
                picked.append((blocks.offsets[:-1, None] + pick).flatten().long())
            z = self.network.apply_norm(x[picked[0]])
            sample.rows.append(z.bfloat16())
            sample.exact.append(exact.float().clone())

        # Every other document with elimination: what predictors will see in training is not what a dense model shows.
        if self.keep is not None and self.count % 2:
            self.teacher.read_eliminating(ids, consume, self.keep)
        else:
            self.teacher.read(ids, consume)
        if sum(t.nbytes for s in [*self.train, sample] for t in s.rows + s.exact) <= self.room or not self.train:
            self.train.append(sample)
        else:
            self.train[self.replace % len(self.train)] = sample
            self.replace += 1
        return True
