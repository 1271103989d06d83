"""Calibration: trains the predictors of every layer on a frozen model and the user's text (paper section 4.3).

The model reads a document densely; each layer's input and exact scores come from hooks on the way, so one forward pass
serves every layer and nothing of size S x S exists. Thresholds, budgets and the report come from documents that the
predictors never saw.

With target "mass" the same networks learn the attention mass of key tiles instead (``mass``): no elimination, no
thresholds, and a report of covered mass.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lemo.engine.layout import Blocks
from lemo.engine.tiles import TILE
from lemo.predictors.fingerprint import model_fingerprint
from lemo.predictors.mass import MassTeacher, MassTrainer, evaluate_coverage
from lemo.predictors.network import ALIGNMENT, Pool, PredictorNetwork
from lemo.predictors.report import Tally, compare
from lemo.predictors.store import PredictorSet, Target
from lemo.predictors.teacher import Teacher, documents
from lemo.predictors.thresholds import search_thresholds
from lemo.predictors.tiles import FORCED
from lemo.predictors.train import Collector, Trainer

_STEP_ROWS = 8192
_START_DOCUMENTS = 24  # what the closed-form start and pruning are solved from
_PRUNE_AT = (0.4, 0.55, 0.7)  # shares of the steps: late enough to know which units fire, early enough to recover


@dataclass(frozen=True)
class CalibrationSettings:
    """How predictors are trained. Raises ValueError for values out of range.

    target: what they predict, the "importance" of blocks, or the attention "mass" of key tiles, which mode `sparse`
        chooses by.
    block_size: tokens per block. Default: 64; with target "mass" 128, the tiles of the kernels.
    keep: share of blocks that thresholds and budgets aim to keep, on average over layers. Not used with "mass".
    steps: optimizer steps.
    context: documents are cut to it, in tokens. Default: not cut.
    rank, features: sizes of the networks before pruning. Default: 64 and 32; with target "mass" 16 and 8, because
        larger ones learn a few dozen documents by heart.
    pool: "mean" or "max" over a block's tokens. Default: "max", with target "mass" "mean".
    normalize: learn the exact scores divided by the number of query blocks. Not with "mass".
    learning_rate: of Adam, in root mean squares of each matrix at the start.
    batch_size: documents per step. Default: as many as hold 8192 rows, at most 4.
    max_documents: documents the model reads, one in eight held out.
    tokens_per_block: rows drawn from each block in training. Default: all; with pool "mean" a sample of them trains
        nearly as well for its share of the cost.
    probes: with target "mass", rows of a query tile that the true mass is taken from in training, at most 128.
    remove: share of hidden units to prune.
    buffer_bytes: bound of the training buffer, beyond which the oldest documents are replaced.
    """

    target: Target = "importance"
    block_size: int | None = None
    keep: float = 0.5
    steps: int = 300
    context: int | None = None
    rank: int | None = None
    features: int | None = None
    pool: Pool | None = None
    normalize: bool = False
    learning_rate: float = 2e-2
    batch_size: int | None = None
    max_documents: int = 64
    tokens_per_block: int | None = None
    remove: float = 0.35
    probes: int = 8
    buffer_bytes: int = 2 << 30
    seed: int = 0

    @property
    def block(self) -> int:
        """Tokens per block."""
        return self.block_size or (TILE if self.target == "mass" else 64)

    @property
    def sizes(self) -> tuple[int, int]:
        """Rank and features."""
        rank, features = (16, 8) if self.target == "mass" else (64, 32)
        return self.rank or rank, self.features or features

    @property
    def tokens(self) -> int:
        """Rows of a block in training."""
        return min(self.block, self.tokens_per_block or self.block)

    @property
    def shortest(self) -> int:
        """Documents must be longer than this, in tokens, or there is nothing to choose from in them."""
        return (FORCED + 1) * TILE if self.target == "mass" else self.block

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise ValueError(f"target: expected {' or '.join(get_args(Target))}, got {self.target!r}")
        if self.target == "mass":
            if self.block_size not in (None, TILE):
                raise ValueError(f'block_size: target "mass" is about tiles of {TILE} tokens, got {self.block_size}')
            if self.normalize:
                raise ValueError('normalize: expected False with target "mass", whose scores are shares already')
        if not 1 <= self.probes <= TILE:
            raise ValueError(f"probes: expected 1 to {TILE} rows of a query tile, got {self.probes}")
        for name in ("block_size", "steps", "batch_size", "rank", "features"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep: expected a share in (0, 1], got {self.keep}")
        if not 0.0 <= self.remove < 1.0:
            raise ValueError(f"remove: expected a share in [0, 1), got {self.remove}")
        if self.context is not None and self.context <= (least := self.shortest):
            raise ValueError(f"context: expected more than {least} tokens, got {self.context}")
        if self.max_documents < 2:
            raise ValueError(f"max_documents: expected at least 2 (one is held out), got {self.max_documents}")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    settings: CalibrationSettings | None = None,
    *,
    progress: bool = True,
    **changes: Any,
) -> PredictorSet:
    """Trains predictors for every layer of a frozen model and finds the layers' thresholds.

    model: as for `lemo.apply` (adapters are off during calibration; the model does not change).
    batches: documents or batches of them, see ``teacher.documents``; an endless iterator is read as far as needed.
    settings: see CalibrationSettings; changes: of single fields, by name.

    Returns a PredictorSet whose ``report`` holds recall on the held-out documents (``report.format_report``), losses,
    and parameters before and after pruning. The same arguments and seed give the same predictors on the same machine.
    Raises ValueError for settings out of range or too little text.
    """
    settings = dataclasses.replace(settings or CalibrationSettings(), **changes)
    mass = settings.target == "mass"
    teacher = MassTeacher(model, settings.probes) if mass else Teacher(model, settings.block, settings.normalize)
    networks = _networks(teacher, settings)
    before = [n.export().num_parameters for n in networks]
    for n in networks:
        n.to(teacher.device)
    trainer = (MassTrainer if mass else Trainer)(networks, settings.learning_rate, settings.steps, settings.tokens)
    source = documents(batches, settings.context, settings.shortest)
    keep = None if mass else settings.keep
    collector = Collector(teacher, source, networks[0], settings.tokens, settings.buffer_bytes, settings.seed, keep)
    losses = _train(trainer, collector, settings, progress)

    layers = [n.export() for n in networks]
    predictors = PredictorSet(
        layers=layers,
        norm=teacher.norm.kind,
        pool=networks[0].pool,
        eps=teacher.norm.eps,
        normalize=False,
        thresholds=(0.0,) * len(layers),
        keep=(settings.keep,) * len(layers),
        block_size=settings.block,
        context=settings.context or max(ids.shape[0] for ids in collector.held_out),
        fingerprint=model_fingerprint(model),
        target=settings.target,
        distances=trainer.distances() if isinstance(trainer, MassTrainer) else None,
    )
    if mass:
        predictors.report |= _coverage(model, predictors, collector.held_out, progress) | {"probes": settings.probes}
    else:
        _finish(predictors, teacher, collector.held_out, settings.keep)
        predictors.report["exact_normalize"] = settings.normalize
    training = {"steps": settings.steps, "documents": collector.count, "seed": settings.seed}
    rank, features = settings.sizes
    predictors.report |= {
        "parameters": {"before_pruning": before, "after_pruning": [layer.num_parameters for layer in layers]},
        "loss": {"first": losses[0], "last": sum(losses[-10:]) / len(losses[-10:])},
        "training": training | {"rank": rank, "features": features},
    }
    return predictors


def _networks(teacher: Teacher, settings: CalibrationSettings) -> list[PredictorNetwork]:
    width, norm = int(teacher.decoder.config.hidden_size), teacher.norm
    generator = torch.Generator().manual_seed(settings.seed)
    sizes = (width, *settings.sizes)
    pool: Pool = settings.pool or ("mean" if settings.target == "mass" else "max")
    return [
        PredictorNetwork(*sizes, norm=norm.kind, pool=pool, eps=norm.eps, generator=generator) for _ in teacher.layers
    ]


def _train(trainer: Trainer, collector: Collector, settings: CalibrationSettings, progress: bool) -> list[float]:
    """Reads documents and trains on them in turns. Returns the loss of every step."""
    steps, documents_in_all = settings.steps, settings.max_documents
    bar = _progress(progress, steps)
    losses: list[float] = []
    draw = random.Random(settings.seed)
    more, per_step = True, 1
    prune_steps = {int(share * steps) for share in _PRUNE_AT} if settings.remove > 0 else set()
    each = 1 - (1 - settings.remove) ** (1 / max(len(prune_steps), 1))
    for step in range(steps):
        # Documents arrive evenly over the first half of the steps; the first ones before training starts.
        due = min(documents_in_all, max(_START_DOCUMENTS, math.ceil(2 * documents_in_all * (step + 1) / steps)))
        while more and collector.count < due:
            more = collector.read()
            bar(0, math.nan, collector.count)
        if step == 0:
            if not collector.train or not collector.held_out:
                mass = settings.target == "mass"
                least = f"{settings.shortest} tokens" if mass else f"a block of {settings.block} tokens"
                more_text = "longer documents" if mass else "more text or a smaller block size"
                raise ValueError(
                    f"batches: expected at least 2 documents longer than {least}, got {collector.count}; "
                    f"give {more_text}"
                )
            trainer.start(collector.train)
            longest = max(s.rows[0].shape[0] for s in collector.train)
            per_step = settings.batch_size or max(1, min(4, _STEP_ROWS // longest))
        samples = draw.choices(collector.train, k=per_step)
        losses.append(trainer.step(step, samples))
        if step in prune_steps:
            recent = collector.train[-_START_DOCUMENTS:]
            trainer.prune(each, ALIGNMENT if step == max(prune_steps) else 1, recent)
        bar(1, losses[-1])
    bar(0, None)
    return losses


def _coverage(model: nn.Module, predictors: PredictorSet, held_out: list[Tensor], progress: bool) -> dict[str, Any]:
    """The report of covered mass, with a bar that counts layers of documents."""
    bar = _progress(progress, len(held_out) * predictors.num_layers, "held-out text", "layer")
    report = evaluate_coverage(model, predictors, held_out, progress=lambda: bar(1, math.nan))
    bar(0, None)
    return report


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


def _progress(show: bool, steps: int, what: str = "calibrate", unit: str = "step") -> Any:
    """A function (advance, loss, documents) that draws progress; loss None closes it, NaN is not shown."""
    if not show:
        return lambda advance, loss, documents=None: None
    from tqdm import tqdm

    bar = tqdm(total=steps, desc=what, unit=unit, file=sys.stderr)

    shown: dict[str, Any] = {}

    def update(advance: int, loss: float | None, documents: int | None = None) -> None:
        if loss is None:
            bar.close()
            return
        if not math.isnan(loss):
            shown["loss"] = f"{loss:.3f}"
        if documents is not None:
            shown["documents read"] = documents
        bar.set_postfix(shown, refresh=documents is not None)
        bar.update(advance)

    return update
