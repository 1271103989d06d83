"""What a sensitivity study found: a row of numbers per way of training, and what follows from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lemo.study.statistics import interval, paired_bootstrap, pareto, verdict
from lemo.study.sweep import DENSE, Row, Study

# A change of perplexity that is not worth a dense step, if nothing else is given.
TOLERANCE = 0.01


def rows_of(study: Study) -> list[dict[str, Any]]:
    """A dictionary per row: cost, steps, rate, held-out loss, and the change against dense in pairs, over seeds that
    both have. Rows without a finished run have no loss."""
    dense = next(row for row in study.plan.rows if row.name == DENSE)
    reference = _finished(study, dense)
    found = []
    for row in study.rows:
        runs = _finished(study, row)
        peaks = [r["peak_memory_bytes"] for r in runs.values() if r["peak_memory_bytes"] is not None]
        out: dict[str, Any] = {
            "name": row.name,
            "schedule": row.schedule if row.part == 1 else f"{row.schedule}, windows of 1/{row.part} of the context",
            "rival": row.rival,
            "cost": study.cost(row),
            "steps": study.steps(row),
            "rate": study.rate(row),
            "seeds": sorted(runs),
            "loss": float(np.mean([_loss(r) for r in runs.values()])) if runs else None,
            "peak_mib": max(peaks) / 2**20 if peaks else None,
            "note": _note(study, row, runs),
        }
        if row.name != DENSE and (seeds := sorted(runs.keys() & reference.keys())):
            out["against_dense"] = _compared([runs[s] for s in seeds], [reference[s] for s in seeds])
        found.append(out)
    known = [r for r in found if r["loss"] is not None and math.isfinite(r["loss"])]
    for i in pareto([(r["cost"], r["loss"]) for r in known]):
        known[i]["front"] = True
    return found


def _finished(study: Study, row: Row) -> dict[int, dict[str, Any]]:
    rate = study.rate(row)
    if rate is None:
        return {}
    results = {seed: study.result(study.settings(row, rate, seed)) for seed in study.plan.seeds}
    return {seed: r for seed, r in results.items() if r is not None and "failed" not in r}


def _loss(run: dict[str, Any]) -> float:
    return float(np.sum(run["judge"]["nll"]) / np.sum(run["judge"]["tokens"]))


def _note(study: Study, row: Row, runs: dict[int, dict[str, Any]]) -> str:
    """What a reader has to know of a row's numbers."""
    notes = []
    eliminates = any(stage.phase.mode != "dense" for stage in row.stages)
    if runs and eliminates and not any(r["left_out"] for r in runs.values()):
        whole = all(stage.window == 1 for stage in row.stages)
        notes.append("left nothing out at this context" + (": the same as dense" if whole else " within its windows"))
    rates, best = study.plan.rates, study.rate(row)
    tried = [study.settings(row, rate, study.plan.seeds[0]) for rate in rates]
    tried += [] if best is None else [study.settings(row, best, seed) for seed in study.plan.seeds[1:]]
    failed = [r["failed"] for settings in tried if (r := study.result(settings)) is not None and "failed" in r]
    if failed:
        notes.append(f"failed runs: {len(failed)} ({failed[0]})")
    if len(rates) > 1 and best is not None and best in (min(rates), max(rates)):
        notes.append(f"its best learning rate is the {'smallest' if best == min(rates) else 'largest'} that was tried")
    return "; ".join(notes)


def _compared(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences of the loss per token, mine minus the other's. low, high: paired bootstrap over seeds and pieces, and
    over pieces alone with one seed; t_low, t_high: Student's, over both, None with one seed."""
    tokens = np.array(mine[0]["judge"]["tokens"])
    each = np.array(
        [(np.array(a["judge"]["nll"]) - np.array(b["judge"]["nll"])) / tokens for a, b in zip(mine, other, strict=True)]
    )
    weighted = each * tokens / tokens.mean()
    mean, half = interval([[of_seed] for of_seed in weighted], joint=False)
    out: dict[str, Any] = {"difference": mean, "low": None, "high": None, "t_low": None, "t_high": None}
    if np.isfinite(each).all():
        out["low"], out["high"] = paired_bootstrap(each, tokens)
        if half is not None:
            out["t_low"], out["t_high"] = mean - half, mean + half
    out["verdict"] = _verdict(out)
    return out


def _verdict(found: dict[str, Any]) -> str:
    """Better or worse only if both intervals agree: with few seeds the bootstrap is too narrow."""
    if found["low"] is None:
        return "diverged"
    bootstrap = verdict({"low": found["low"], "high": found["high"]})
    student = verdict({"low": found["t_low"], "high": found["t_high"]})
    return student if student in (bootstrap, "one seed") else "equal"


def recommend(rows: list[dict[str, Any]], equal: str, seeds: int, tolerance: float = TOLERANCE) -> dict[str, str]:
    """{"use": name of a row, "reason"}. tolerance: change of perplexity that counts as none, with equal steps."""
    dense = next(r for r in rows if r["name"] == DENSE)
    if dense["loss"] is None:
        return {"use": DENSE, "reason": "no dense run is finished yet, so nothing can be compared with it."}
    judged = [r for r in rows if "against_dense" in r and len(r["seeds"]) >= 2]
    unfinished = [r["name"] for r in rows if len(r["seeds"]) < seeds]
    more = f" Not finished: {', '.join(unfinished)}." if unfinished else ""
    if not judged:
        return {"use": DENSE, "reason": f"fewer than two seeds are finished: no interval over seeds exists yet.{more}"}
    if equal == "cost":
        use, reason = _at_equal_cost(judged)
    else:
        use, reason = _at_equal_steps(judged, tolerance)
    return {"use": use, "reason": reason + more}


def _change(row: dict[str, Any]) -> str:
    against = row["against_dense"]
    # What a verdict needs both intervals for has to lie outside of what is shown.
    low = min(against[n] for n in ("low", "t_low") if against[n] is not None)
    high = max(against[n] for n in ("high", "t_high") if against[n] is not None)
    ends = [100 * math.expm1(x) for x in (against["difference"], low, high)]
    return f"{ends[0]:+.2f} % perplexity [{ends[1]:+.2f}, {ends[2]:+.2f}]"


def _at_equal_cost(judged: list[dict[str, Any]]) -> tuple[str, str]:
    better = sorted((r for r in judged if r["against_dense"]["verdict"] == "better"), key=lambda r: r["loss"])
    if not better:
        best = min(judged, key=lambda r: r["against_dense"]["difference"])
        return DENSE, (
            f"nothing beats dense beyond the interval at the same cost; the closest is {best['name']}, {_change(best)}."
        )
    best = better[0]
    reason = f"{_change(best)} against dense at the same measured cost, beyond the interval."
    rivals = [r for r in better if r["rival"]]
    if best["rival"]:
        reason += " It needs no elimination: no way of eliminating did better."
    elif rivals:
        reason += f" The best rival, {rivals[0]['name']}, has {_change(rivals[0])}."
    return best["name"], reason


def _at_equal_steps(judged: list[dict[str, Any]], tolerance: float) -> tuple[str, str]:
    limit = math.log1p(tolerance)

    def within(row: dict[str, Any]) -> bool:
        against = row["against_dense"]
        return None not in (against["high"], against["t_high"]) and max(against["high"], against["t_high"]) < limit

    good = sorted((r for r in judged if within(r) and r["cost"] < 1), key=lambda r: r["cost"])
    if not good:
        return DENSE, (
            f"no cheaper way is known to stay within {100 * tolerance:g} % of dense: every interval reaches beyond."
        )
    best = good[0]
    return best["name"], (
        f"the cheapest that stays within {100 * tolerance:g} % of dense: {_change(best)} at {best['cost']:.2f} of its "
        "cost, with the same number of steps."
    )


def as_text(rows: list[dict[str, Any]], advice: dict[str, str]) -> str:
    """The study as a table for a terminal."""
    width = max(len(r["name"]) for r in rows)
    lines = [
        f"{'row':{width}}  {'cost':>5}  {'steps':>6}  {'rate':>8}  {'seeds':>5}  {'loss':>8}  change against dense"
    ]
    for r in rows:
        against = r.get("against_dense")
        change = ""
        if against is not None:
            change = (
                f"diverged  {against['verdict']}" if against["low"] is None else f"{_change(r)}  {against['verdict']}"
            )
        rate = "" if r["rate"] is None else f"{r['rate']:g}"
        loss = "" if r["loss"] is None else f"{r['loss']:.4f}"
        more = f"  ({r['note']})" if r["note"] else ""
        lines.append(
            f"{r['name']:{width}}  {r['cost']:5.2f}  {r['steps']:6}  {rate:>8}  {len(r['seeds']):5}  {loss:>8}  "
            f"{change}{more}".rstrip()
        )
    lines.append(f"use {advice['use']}: {advice['reason']}")
    return "\n".join(lines)
