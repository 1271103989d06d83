"""Accuracy of answers to questions whose evidence is far away (`lemo.data.questions`), of a model and its adapters.

An answer is right if every token of it is the likeliest one after the right tokens before: exactly when greedy decoding
would give it, found in one dense pass over the document. Questions of a document stand one after the other, each with
its right answer, so that all of them cost one pass.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lemo.data.questions import TASKS, Document, Question
from lemo.training.adapters import adapter_name, check_adapter, loaded_adapter
from lemo.training.evaluate import Interval, check_head, hidden_states, logits_of, model_labels


def batch(documents: Sequence[Document], device: torch.device) -> dict[str, Tensor]:
    """input_ids and labels [B, length] of documents of one length."""
    return {
        "input_ids": torch.from_numpy(np.stack([d.ids for d in documents])).to(device),
        "labels": torch.from_numpy(np.stack([d.labels for d in documents])).to(device),
    }


@dataclass(frozen=True)
class Answer:
    """A question of a document of `length` tokens: mean loss of its answer's tokens, and whether all are right."""

    question: Question
    length: int
    loss: float
    correct: bool


@torch.no_grad()
def answers(model: Any, document: Document) -> list[Answer]:
    """Logits exist for one answer at a time. The model's training mode is restored afterwards."""
    ids = torch.from_numpy(document.ids)[None].to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        hidden = hidden_states(model, ids)[0]
        found = []
        for q in document.questions:
            logits, target = logits_of(model, hidden[q.start - 1 : q.stop - 1]), ids[0, q.start : q.stop]
            loss = torch.nn.functional.cross_entropy(logits, target).item()
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the model's loss is not finite on a document of {len(document.ids)} tokens; check the weights, "
                    "the dtype and the length"
                )
            found.append(Answer(q, len(document.ids), loss, bool((logits.argmax(-1) == target).all())))
    finally:
        model.train(was_training)
    return found


def evaluate(model: Any, documents: Sequence[Document]) -> dict[str, dict[str, list[float]]]:
    """By task and distance, an entry per document: mean loss of the answer, and 1 if it is right."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in documents:
        for a in sorted(answers(model, one), key=lambda a: a.question.group):
            group = found.setdefault(a.question.group, {"loss": [], "correct": []})
            group["loss"].append(round(a.loss, 5))
            group["correct"].append(float(a.correct))
    return found


def wilson(right: int, count: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a share: it stays within [0, 1], and has a width even if all answers are right."""
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(share, 0.0 if right == 0 else low, 1.0 if right == count else high)


# ---- several adapters ------------------------------------------------------------------------------------------------


@dataclass
class LongRange:
    """answers[model]: of every question of every document, in the same order for every model."""

    level: float
    answers: dict[str, list[Answer]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row per length, task, distance and model, and one over all distances (distance None), as plain JSON
        values. tokens: mean distance between evidence and answer."""
        rows = []
        every = next(iter(self.answers.values()))
        shares = sorted({a.question.share for a in every})
        for length in dict.fromkeys(a.length for a in every):
            for task in sorted({a.question.task for a in every}, key=TASKS.index):
                for model, found in self.answers.items():
                    mine = [a for a in found if a.length == length and a.question.task == task]
                    for share in (*shares, None):
                        some = [a for a in mine if share is None or a.question.share == share]
                        rows.append({"length": length, "task": task, "model": model, "distance": share})
                        rows[-1].update(self._summary(some))
        return rows

    def _summary(self, found: list[Answer]) -> dict[str, Any]:
        interval = wilson(sum(a.correct for a in found), len(found), self.level)
        return {
            "accuracy": interval.value,
            "low": interval.low,
            "high": interval.high,
            "loss": sum(a.loss for a in found) / len(found),
            "tokens": round(sum(a.question.distance for a in found) / len(found)),
            "questions": len(found),
        }

    def table(self) -> str:
        """Accuracy over all distances with its interval, and at every distance."""
        rows = self.rows()
        shares = sorted({r["distance"] for r in rows} - {None})
        width = max(5, *(len(m) for m in self.answers))
        percent = f"{100 * self.level:g} %"
        lines = [
            f"{'length':>8}  {'task':9}  {'model':{width}}  {'right':>7}  {percent + ' interval':>18}  "
            + "  ".join(f"{'at ' + format(s, 'g'):>8}" for s in shares)
        ]
        for i in range(0, len(rows), len(shares) + 1):
            *parts, whole = rows[i : i + len(shares) + 1]
            interval = f"[{100 * whole['low']:.1f}, {100 * whole['high']:.1f}]"
            lines.append(
                f"{whole['length']:8}  {whole['task']:9}  {whole['model']:{width}}  {100 * whole['accuracy']:5.1f} %  "
                f"{interval:>18}  " + "  ".join(f"{100 * p['accuracy']:6.1f} %" for p in parts)
            )
        count = rows[0]["questions"]
        lines.append(
            f"answers that greedy decoding gets right as a whole (dense model, one pass); {count} questions per task "
            "and distance, which is the share of the document between evidence and questions; Wilson's intervals"
        )
        return "\n".join(lines)


def compare_long_range(
    model: torch.nn.Module,
    adapters: Sequence[str],
    documents: Sequence[Document],
    *,
    include_base: bool = True,
    level: float = 0.95,
    tick: Callable[[int], None] = lambda n: None,
) -> LongRange:
    """Ask the base model and each adapter folder (`[NAME=]FOLDER`) the questions of the same documents.

    As `lemo.training.evaluate.compare` for perplexity: each adapter is loaded alone, and the model is what it was
    afterwards. tick: called with tokens done. Raises ValueError for a folder that is not an adapter of this model.
    """
    result = LongRange(level)
    labels = model_labels(adapters, include_base)
    named = list(zip(labels[len(labels) - len(adapters) :], [adapter_name(a)[1] for a in adapters], strict=True))
    for _, folder in named:
        check_adapter(folder, model)

    def measure(label: str, m: torch.nn.Module) -> None:
        check_head(m, label, documents[0].ids)
        result.answers[label] = []
        for one in documents:
            result.answers[label] += answers(m, one)
            tick(len(one.ids))

    if include_base or not adapters:
        measure("base", model)
    for label, folder in named:
        with loaded_adapter(model, folder) as wrapped:
            measure(label, wrapped)
    return result
