"""Dense perplexity of a model and its adapters, per domain, with confidence intervals.

Adapters are measured as they are served: on the dense model, nothing eliminated. Every document is cut into pieces of
at most `context` tokens and each piece is scored by itself, so nothing is seen across a document boundary.

Intervals: the mean negative log-likelihood per token is a ratio of sums over independent units (documents if a
domain has enough of them, windows otherwise); its standard error is the usual linearized one and the quantile is
Student's. Two adapters are compared on the differences of the same units, which removes the text's own spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lemo.data import Documents, evaluation_pieces, evaluation_spans
from lemo.data.windows import Span
from lemo.engine.families import logit_scale, logit_softcap
from lemo.training.adapters import adapter_name, check_adapter, loaded_adapter
from lemo.training.processes import Processes

# Fewer documents than this are too few to estimate the variance between documents; windows are the units then.
_MIN_DOCUMENTS_AS_UNITS = 10
_TOKENS_PER_HEAD_CALL = 1024
_PROBE_TOKENS = 16


# ---- statistics ------------------------------------------------------------------------------------------------------


def _student_two_sided(t: float, df: int) -> float:
    """P(|T| <= t) for integer degrees of freedom (finite trigonometric sums, Abramowitz and Stegun 26.7.3-4)."""
    theta = math.atan2(t, math.sqrt(df))
    cos2 = math.cos(theta) ** 2
    if df % 2:
        total, term = 0.0, math.cos(theta)
        for j in range(1, df // 2 + 1):
            total += term
            term *= cos2 * (2 * j) / (2 * j + 1)
        return 2 / math.pi * (theta + math.sin(theta) * total)
    total, term = 0.0, 1.0
    for j in range(1, df // 2 + 1):
        total += term
        term *= cos2 * (2 * j - 1) / (2 * j)
    return math.sin(theta) * total


def student_quantile(level: float, df: int) -> float:
    """t with P(|T| <= t) = level, T of Student's distribution with `df` degrees of freedom."""
    if df < 1:
        return math.inf
    low, high = 0.0, 1.0
    while _student_two_sided(high, df) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_two_sided(middle, df) < level else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; `low` and `high` are infinite with a single unit."""

    value: float
    low: float
    high: float


def ratio_interval(sums: np.ndarray, counts: np.ndarray, level: float = 0.95) -> Interval:
    """Interval of sum(sums) / sum(counts) over independent units. sums, counts: float [units]."""
    n, total = len(sums), float(np.sum(counts))
    ratio = float(np.sum(sums)) / total
    if n < 2:
        return Interval(ratio, -math.inf, math.inf)
    residuals = np.asarray(sums, float) - ratio * np.asarray(counts, float)
    error = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / total
    half = student_quantile(level, n - 1) * error
    return Interval(ratio, ratio - half, ratio + half)


def _exp(interval: Interval) -> Interval:
    def e(x: float) -> float:
        return math.exp(x) if x < 700 else math.inf

    return Interval(e(interval.value), e(interval.low), e(interval.high))


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Negative log-likelihoods of one domain under one model: float64 [pieces], with label counts and documents."""

    nll: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray

    def units(self) -> tuple[str, np.ndarray, np.ndarray]:
        """("document" | "window", summed nll per unit, tokens per unit)."""
        ids, index = np.unique(self.documents, return_inverse=True)
        if len(ids) < _MIN_DOCUMENTS_AS_UNITS:
            return "window", self.nll, self.tokens
        nll, tokens = np.zeros(len(ids)), np.zeros(len(ids))
        np.add.at(nll, index, self.nll)
        np.add.at(tokens, index, self.tokens)
        return "document", nll, tokens

    def perplexity(self, level: float = 0.95) -> Interval:
        _, nll, tokens = self.units()
        return _exp(ratio_interval(nll, tokens, level))

    def ratio_to(self, other: Scores, level: float = 0.95) -> Interval:
        """Perplexity here divided by `other`'s, paired over the same units."""
        if not np.array_equal(self.tokens, other.tokens) or not np.array_equal(self.documents, other.documents):
            raise ValueError(
                "the two measurements were made on different text; evaluate both on the same data and context"
            )
        _, nll, tokens = self.units()
        _, reference, _ = other.units()
        return _exp(ratio_interval(nll - reference, tokens, level))


def _batches(pieces: Sequence[tuple[int, np.ndarray]], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of pieces of like length: at most `tokens_per_batch` tokens with the padding, at least one piece."""
    order = sorted(range(len(pieces)), key=lambda i: (-len(pieces[i][1]), i))
    start = 0
    while start < len(order):
        rows = max(1, tokens_per_batch // len(pieces[order[start]][1]))
        yield order[start : start + rows]
        start += rows


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the last layer, after the final norm, [B, T, d], of ids int64 [B, T]."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return _base_of(model).get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """float32 [..., V]."""
    base = _base_of(model)
    logits = base.get_output_embeddings()(hidden).float() * logit_scale(base.config)
    cap = logit_softcap(base.config)
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def _piece_losses(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood of each row's labels. ids, labels: int64 [B, T], right-padded. float64 [B].

    Attention is causal and padding stands at the right, so no mask is needed. The output head runs over slices of
    tokens: logits of the whole window never exist.
    """
    hidden = hidden_states(model, ids)
    targets = labels[:, 1:].reshape(-1)
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    losses = torch.zeros(len(targets), dtype=torch.float64, device=ids.device)
    for start in range(0, len(targets), _TOKENS_PER_HEAD_CALL):
        part = slice(start, start + _TOKENS_PER_HEAD_CALL)
        losses[part] = torch.nn.functional.cross_entropy(
            logits_of(model, hidden[part]), targets[part], ignore_index=-100, reduction="none"
        ).double()
    return losses.view(ids.shape[0], -1).sum(1)


def check_scorable(documents: Documents, context: int, what: str, max_tokens: int | None = None) -> list[Span]:
    """The parts that are scored. Raises ValueError if there are none."""
    spans = evaluation_spans(documents, context, max_tokens)
    if not spans:
        raise ValueError(
            f"no document of {what} has a token to predict (documents of one token, or without labels); nothing to "
            "evaluate"
        )
    return spans


def score(
    model: torch.nn.Module,
    documents: Documents,
    context: int,
    *,
    max_tokens: int | None = None,
    tokens_per_batch: int | None = None,
    tick: Callable[[int], None] = lambda n: None,
    processes: Processes | None = None,
) -> Scores:
    """Score every document densely, over its labels. The model's training mode is restored afterwards.

    tokens_per_batch: tokens of one forward pass (default: one context). tick: called with tokens done.
    processes: among which the batches are divided; all get the whole result. Default: this one does everything.
    """
    processes = processes or Processes()
    spans = check_scorable(documents, context, ", ".join(documents.names) or "the data", max_tokens)
    pieces = [(d, documents.document(d)[start:stop]) for d, start, stop in spans]
    masks = [None if (m := documents.labelled(d)) is None else m[start:stop] for d, start, stop in spans]
    device = next(model.parameters()).device
    nll = np.zeros(len(pieces))
    was_training = model.training
    model.eval()
    try:
        batches = list(_batches(pieces, tokens_per_batch or context))
        for rows in batches[processes.rank :: processes.count]:
            lengths = torch.tensor([len(pieces[i][1]) for i in rows])
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
            labels = torch.full_like(ids, -100)
            for r, i in enumerate(rows):
                ids[r, : lengths[r]] = torch.from_numpy(pieces[i][1].astype(np.int64))
                labels[r, : lengths[r]] = ids[r, : lengths[r]]
                if (mask := masks[i]) is not None:
                    labels[r, : lengths[r]][torch.from_numpy(~mask)] = -100
            nll[rows] = _piece_losses(model, ids.to(device), labels.to(device)).cpu().numpy()
            tick(int(lengths.sum()))
    finally:
        model.train(was_training)
    nll = processes.sum(nll)
    if not np.isfinite(nll).all():
        raise FloatingPointError(
            "the model's loss is not finite on this text; check the weights, the dtype and the context"
        )
    tokens = np.array(
        [len(p) - 1 if m is None else m[1:].sum() for (_, p), m in zip(pieces, masks, strict=True)], float
    )
    return Scores(nll, tokens, np.array([d for d, _ in pieces]))


# ---- several adapters ------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """scores[model][domain]; `models` in the order of the table, the first being what the others are compared with."""

    context: int
    level: float
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(self.scores)

    @property
    def domains(self) -> list[str]:
        return list(next(iter(self.scores.values())))

    def mean_ratio(self, model: str, reference: str) -> float:
        """Geometric mean over domains of the perplexity ratio."""
        logs = [
            math.log(self.scores[model][d].ratio_to(self.scores[reference][d], self.level).value) for d in self.domains
        ]
        return math.exp(sum(logs) / len(logs))

    def rows(self, reference: str | None = None) -> list[dict[str, Any]]:
        """One row per domain and model, as plain JSON values."""
        reference = reference or self.models[0]
        rows = []
        for domain in self.domains:
            for model in self.models:
                s = self.scores[model][domain]
                p = s.perplexity(self.level)
                unit, sums, _ = s.units()
                row: dict[str, Any] = {
                    "domain": domain,
                    "model": model,
                    "perplexity": p.value,
                    "low": _finite(p.low),
                    "high": _finite(p.high),
                    "unit": unit,
                    "units": len(sums),
                    "tokens": int(s.tokens.sum()),
                }
                if model != reference:
                    r = s.ratio_to(self.scores[reference][domain], self.level)
                    row.update(reference=reference, ratio=r.value, ratio_low=_finite(r.low), ratio_high=_finite(r.high))
                rows.append(row)
        return rows

    def table(self, reference: str | None = None) -> str:
        """The comparison as text: perplexity with its interval, and the paired change against `reference`."""
        reference = reference or self.models[0]
        width = max(len(m) for m in self.models)
        dwidth = max(6, *(len(d) for d in self.domains))
        percent = f"{100 * self.level:g} %"
        lines = [
            f"{'domain':{dwidth}}  {'model':{width}}  {'perplexity':>10}  {percent + ' interval':>19}  "
            f"change against {reference} ({percent}, paired)"
        ]
        for row in self.rows(reference):
            low, high = (_show(row[k]) for k in ("low", "high"))
            change = ""
            if "ratio" in row:
                change = (
                    f"{100 * (row['ratio'] - 1):+.2f} % [{_percent(row['ratio_low'])}, {_percent(row['ratio_high'])}]"
                )
            lines.append(
                f"{row['domain']:{dwidth}}  {row['model']:{width}}  {row['perplexity']:10.3f}  "
                f"{'[' + low + ', ' + high + ']':>19}  {change}".rstrip()
            )
        if len(self.domains) > 1:
            for model in self.models:
                if model != reference:
                    mean = 100 * (self.mean_ratio(model, reference) - 1)
                    lines.append(f"{'mean':{dwidth}}  {model:{width}}  {'':10}  {'':19}  {mean:+.2f} %")
        units = {(r["domain"], r["unit"], r["units"]) for r in self.rows(reference)}
        notes = ", ".join(f"{d}: {n} {u}s" for d, u, n in sorted(units))
        lines.append(f"dense evaluation, context {self.context}; intervals over {notes}")
        if any(n < 2 for _, _, n in units):
            lines.append("a domain with one unit has no interval: give more text or a smaller --context")
        return "\n".join(lines)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) and x > 0 else None


def _show(x: float | None) -> str:
    return "?" if x is None else f"{x:.3f}"


def _percent(x: float | None) -> str:
    return "?" if x is None else f"{100 * (x - 1):+.2f}"


def compare(
    model: torch.nn.Module,
    adapters: Sequence[str],
    domains: dict[str, Documents],
    context: int,
    *,
    include_base: bool = True,
    max_tokens: int | None = None,
    level: float = 0.95,
    tick: Callable[[int], None] = lambda n: None,
) -> Comparison:
    """Measure the base model and each adapter folder (`[NAME=]FOLDER`) on each domain, all on the same pieces.

    model: a transformers causal LM without adapters. Each adapter is loaded into it alone, with PEFT, and the model is
    bit for bit what it was afterwards.
    Raises ValueError for a folder that is not an adapter of this model.
    """
    result = Comparison(context, level)
    labels = model_labels(adapters, include_base)
    named = (
        [(label, adapter_name(a)[1]) for label, a in zip(labels[-len(adapters) :], adapters, strict=True)]
        if adapters
        else []
    )
    for _, folder in named:
        check_adapter(folder, model)
    for name, documents in domains.items():
        check_scorable(documents, context, name, max_tokens)

    def measure(label: str, m: torch.nn.Module) -> None:
        _check_path(m, label, next(iter(domains.values())), context)
        result.scores[label] = {
            d: score(m, documents, context, max_tokens=max_tokens, tick=tick) for d, documents in domains.items()
        }

    if include_base or not adapters:
        measure("base", model)
    for label, folder in named:
        with loaded_adapter(model, folder) as wrapped:
            measure(label, wrapped)
    return result


def _check_path(model: Any, label: str, documents: Documents, context: int) -> None:
    pieces = evaluation_pieces(documents, min(context, _PROBE_TOKENS), _PROBE_TOKENS)
    if pieces:  # `compare` has checked that there is something in the whole of it
        check_head(model, label, pieces[0][1])


@torch.no_grad()
def check_head(model: Any, label: str, tokens: np.ndarray) -> None:
    """Raises ValueError unless decoder and head, called as `score` does, give the logits of the model itself.

    tokens: integers, of which a few are read. If a model scales its logits, or an adapter acts outside of decoder and
    head, perplexities would be wrong.
    """
    ids = torch.from_numpy(tokens[:_PROBE_TOKENS].astype(np.int64))[None].to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits
        got = logits_of(model, hidden_states(model, ids))
    finally:
        model.train(was_training)
    # A few roundings of the model's own type: the products may run in another shape.
    limit = 16 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    if got.shape != expected.shape or not float((got - expected.float()).abs().max()) <= limit:
        if not expected.isfinite().all():
            return  # `score` reports what is wrong
        raise ValueError(
            f"{label}: its logits are not its decoder's output through its head (the model scales them, or the adapter "
            "acts elsewhere), so lemo evaluate would measure something else; use the model's own forward pass"
        )


def model_labels(adapters: Sequence[str], include_base: bool = True) -> list[str]:
    """Names of what `compare` measures, in its order. Raises ValueError if two are the same."""
    labels = [adapter_name(a)[0] for a in adapters]
    labels = ["base", *labels] if include_base or not adapters else labels
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"every model needs a different name in the table, got {labels}; write NAME=FOLDER for an adapter"
        )
    return labels
