"""How well predictors choose: recall and precision of kept blocks against the exact scores of the frozen model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine.layout import Blocks, kept_per_document
from lemo.predictors.network import visible_queries
from lemo.predictors.store import PredictorSet
from lemo.predictors.teacher import Consumer, Teacher, documents


def top(scores: Tensor, count: int, first: int = 1) -> Tensor:
    """bool [nb]: the ``first`` blocks and the highest others, ``count`` in all; ties go to the lower block."""
    scores = scores.float().clone()
    scores[:first] = torch.inf
    kept = torch.zeros(scores.shape[0], dtype=torch.bool, device=scores.device)
    kept[scores.sort(descending=True, stable=True).indices[:count]] = True
    return kept


def compare(
    predicted: Tensor,
    exact: Tensor,
    blocks: Blocks,
    keep: float,
    threshold: float | None = None,
    normalize: bool = False,
) -> dict[str, float]:
    """One document. Sums over its blocks, from which recall and precision follow.

    The truth is what the exact scores keep of a budget ``keep``; "position" is what a rule that knows no content keeps
    (the earliest blocks, or for normalized scores the latest): plain column sums favour early blocks, normalized ones
    late ones, and a predictor has to be measured against that. The document's first block, always kept, does not count.
    """
    count = kept_per_document(blocks, keep)[0]
    truth = top(exact, count)
    ours = top(predicted, count)
    place = visible_queries(blocks)
    rule = top(-place if normalize else place, count)
    reach = ours if threshold is None else (predicted >= threshold) | top(predicted, 1)

    def hits(kept: Tensor) -> float:
        return float((kept & truth)[1:].sum())

    return {
        "blocks": float(blocks.num_blocks),
        "true": float(truth[1:].sum()),
        "hits": hits(ours),
        "position_hits": hits(rule),
        "threshold_hits": hits(reach),
        "threshold_kept": float(reach[1:].sum()),
        "threshold_share": float(reach.sum()),
        "informativeness": float((exact * ours)[1:].sum() / exact[1:].sum().clamp_min(1e-30)),
        "best": float((exact * truth)[1:].sum() / exact[1:].sum().clamp_min(1e-30)),
    }


class Tally:
    """Sums of ``compare`` per layer."""

    def __init__(self, layers: int) -> None:
        self.rows: list[dict[str, float]] = [{} for _ in range(layers)]
        self.counts = [0] * layers

    def add(self, layer: int, values: dict[str, float]) -> None:
        row = self.rows[layer]
        for name, value in values.items():
            row[name] = row.get(name, 0.0) + value
        self.counts[layer] += 1

    def report(self, keep: float) -> dict[str, Any]:
        if not self.counts or min(self.counts) == 0:
            raise ValueError("batches: expected at least one document of two blocks, got none")
        layers = []
        for row in self.rows:
            true = max(row["true"], 1.0)
            layers.append(
                {
                    # A budget keeps as many blocks as the truth holds, so precision at the budget equals recall.
                    "recall": row["hits"] / true,
                    "precision": row["hits"] / true,
                    "position_recall": row["position_hits"] / true,
                    "threshold_recall": row["threshold_hits"] / true,
                    "threshold_precision": row["threshold_hits"] / max(row["threshold_kept"], 1.0),
                    "threshold_kept": row["threshold_share"] / row["blocks"],
                    "informativeness_kept": row["informativeness"] / max(row["best"], 1e-30),
                }
            )
        mean = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
        return {"keep": keep, "documents": self.counts[0], "layers": layers, "mean": mean}


def evaluate_recall(
    model: nn.Module,
    predictors: PredictorSet,
    batches: Iterable[Any],
    keep: float = 0.5,
    *,
    context: int | None = None,
    max_documents: int | None = None,
    normalize: bool | None = None,
    eliminating: bool = False,
) -> dict[str, Any]:
    """Recall and precision per layer of the blocks that predictors keep, against exact scores, on the given text.

    batches: as in ``calibrate``; context: documents are cut to it; normalize: exact scores divided by the number of
    query blocks (default: as in calibration); eliminating: the model reads with elimination by the exact choice, so
    that layers see what they see in mode "skip" (default: densely). Runs the operators that training runs.

    Returns {"keep", "documents", "layers": [per layer], "mean": average over layers}; each row has recall and precision
    at the budget, position_recall (what a rule without content reaches), threshold_recall, threshold_precision and
    threshold_kept (at the calibrated threshold), and informativeness_kept: the kept blocks' share of what the best
    choice would hold.
    """
    pieces = islice(documents(batches, context, predictors.block_size), max_documents)
    return evaluate_budgets(model, predictors, pieces, (keep,), normalize=normalize, eliminating=eliminating)[0]


def evaluate_budgets(
    model: nn.Module,
    predictors: PredictorSet,
    pieces: Iterable[Tensor],
    keeps: Sequence[float],
    *,
    normalize: bool | None = None,
    eliminating: bool = False,
) -> list[dict[str, Any]]:
    """``evaluate_recall`` at several budgets, densely in one pass of the model. pieces: documents int64 [T]."""
    for keep in keeps:
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep: expected a share in (0, 1], got {keep}")
    if normalize is None:
        normalize = bool(predictors.report.get("exact_normalize", False))
    teacher = Teacher(model, predictors.block_size, normalize)
    predictors.check_model(model)
    dtype = torch.float32 if teacher.device.type == "cpu" else torch.bfloat16
    placed = predictors.to(device=teacher.device, dtype=dtype)
    tallies = [Tally(predictors.num_layers) for _ in keeps]

    def consumer(wanted: Sequence[float]) -> Consumer:
        def consume(layer: int, x: Tensor, exact: Tensor, blocks: Blocks) -> None:
            predicted = placed.scores(layer, x.to(dtype), blocks)
            for keep, tally in zip(keeps, tallies, strict=True):
                if keep in wanted:
                    tally.add(layer, compare(predicted, exact, blocks, keep, placed.thresholds[layer], normalize))

        return consume

    for ids in pieces:
        if eliminating:
            for keep in keeps:
                teacher.read_eliminating(ids, consumer((keep,)), keep)
        else:
            teacher.read(ids, consumer(keeps))
    return [tally.report(keep) for keep, tally in zip(keeps, tallies, strict=True)]


def format_report(report: dict[str, Any]) -> str:
    """The report of ``evaluate_recall`` or of a calibration as a text table."""
    columns = ["recall", "position_recall", "informativeness_kept", "threshold_recall", "threshold_kept"]
    parameters = report.get("parameters")
    head = ["layer", "recall", "position", "informativeness", "at threshold", "kept there"]
    if parameters:
        head += ["parameters before", "after"]
    lines = [head]
    for i, row in enumerate([*report["layers"], report["mean"]]):
        mean = i == len(report["layers"])
        line = ["mean" if mean else str(i), *(f"{100 * row[c]:.1f} %" for c in columns)]
        if parameters:
            before, after = (
                sum(parameters[k]) if mean else parameters[k][i] for k in ("before_pruning", "after_pruning")
            )
            line += [f"{before}", f"{after}"]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def plot_report(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Recall per layer as a figure (needs matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("recall", "predictors"), ("position_recall", "position alone")):
        axes.plot([100 * row[name] for row in report["layers"]], marker="o", label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"recall of kept blocks at keep {report['keep']:g} (%)")
    axes.legend()
    figure.savefig(path)
