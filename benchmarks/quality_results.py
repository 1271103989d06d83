"""The results file of the quality study: its rows, and what another study takes from it.

Every row has what its final runs measured ("losses", by seed and group), so that intervals can be recomputed from the
file alone, and the sweep that chose its batch size and rate, so that another study need not repeat it (--settings).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quality_stats as stats
from common import results_path, write_results
from quality_data import PACKAGES_FILE
from quality_schedules import CONTEXTS, Row, cost
from quality_train import Spec, name_of

if TYPE_CHECKING:
    from quality import Study, Way

BASE = "not adapted"
KEPT = "settings"  # folder of a study with the file of --settings
MADE_BY = ("commit", "gpu", "versions")  # what every run says of itself
SAME = ("setting", "model", "context", "adapt")  # what studies have in common whose settings can be compared


def finite(loss: float) -> float:
    """A loss to choose by: infinite if the run diverged."""
    return loss if math.isfinite(loss) else math.inf


def scope(args: argparse.Namespace) -> dict[str, Any]:
    """What a study is about, as its results file says it."""
    adapt = args.adapt if args.setting == "B" else None
    return dict(zip(SAME, (args.setting, Path(args.model).name, args.context, adapt), strict=True))


def results_name(args: argparse.Namespace) -> str:
    return args.out or f"quality-{Path(args.model).name}-{args.setting}"


def schedule(row: Row) -> str:
    return row.text + "; first and last layer full" * row.edges


# ---- settings of another study ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Batch sizes and rates that the sweeps of another study found. source: its file, commit and date; text: of it."""

    source: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    text: str

    @classmethod
    def read(cls, path: Path, mine: Mapping[str, Any]) -> Settings:
        """mine: the scope of the study that takes them. Raises ValueError for a file that does not fit."""
        try:
            text = path.read_text()
            result = json.loads(text)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); name a results file of quality.py") from None
        except ValueError:
            raise ValueError(f"{path} is not JSON; name a results file of quality.py") from None
        lacking = [n for n in ("commit", "date", "rows", *SAME) if not isinstance(result, dict) or n not in result]
        if lacking or not isinstance(result["rows"], list) or not all(map(listed, result["rows"])):
            what = (
                f"no {', '.join(lacking)}" if lacking else "rows without a name, or with settings that are no numbers"
            )
            raise ValueError(f"{path} is not a results file of this study ({what}); name one that quality.py wrote")
        if different := [n for n in SAME if result[n] != mine[n]]:
            each = "; ".join(f"{n} {result[n]!r}, here {mine[n]!r}" for n in different)
            raise ValueError(f"{path} is of another {', '.join(different)} ({each}); name a file of the same")
        return cls({"file": path.name} | {n: result[n] for n in ("commit", "date")}, result["rows"], text)

    def keep(self, study: Path) -> None:
        """A copy in the study's folder: its runs follow from the file as it was, also if this study writes it over."""
        from lemo.storage import write_text

        folder = study / KEPT
        folder.mkdir(exist_ok=True)
        write_text(folder / self.source["file"], self.text)

    def of(self, row: Row, sequences: float, cost_at: int) -> dict[str, Any] | None:
        """What the row's sweep found and where; None if the file has no sweep of the same schedule at that cost."""
        at = {"sequences": sequences, "cost_at": cost_at}
        same = {"name": row.name, "schedule": schedule(row)} | at
        for there in self.rows:
            if "sweep" in there and all(there.get(n) == value for n, value in same.items()):
                # At every cost a row has the sweep of one of them. Files that do not say of which: if there is one.
                costs = {(r.get("sequences"), r.get("cost_at")) for r in self.rows if r["name"] == row.name}
                if there.get("swept_at", at if len(costs) == 1 else None) != at:
                    continue
                found = {n: there[n] for n in ("batch", "rate", "sweep", "at_edge")}
                # A row that took its setting itself names the study that made the sweep.
                return found | {"settings_from": there.get("settings_from", dict(self.source))}
        return None


def begun_with(args: argparse.Namespace) -> Settings:
    """What --settings holds, or held when the study began. Raises ValueError, also for another file than that."""
    given = Settings.read(Path(args.settings), scope(args))
    kept = next(iter((Path(args.study) / KEPT).glob("*.json")), None)
    if kept is None:
        return given
    if kept.name == given.source["file"]:
        before = Settings.read(kept, scope(args))
        own = Path(args.settings).resolve() == results_path(results_name(args)).resolve()
        if own or before.text == given.text:
            return before
    raise ValueError(
        f"{args.settings} is not what {args.study} began with, which is in {kept}; give that file, or another --study"
    )


def listed(row: Any) -> bool:
    """Whether it can be a row of a results file: with a sweep, there is what was chosen by it, and from what."""
    if not isinstance(row, dict) or "name" not in row:
        return False
    if "sweep" not in row:
        return True
    batch, rate, sweep = row.get("batch"), row.get("rate"), row["sweep"]
    chosen = isinstance(batch, int) and batch > 0 and isinstance(rate, int | float) and rate > 0
    tried = [(s.get("batch"), s.get("rate")) for s in sweep if isinstance(s, dict)] if isinstance(sweep, list) else []
    numbers = all(isinstance(n, int | float) for s in tried for n in s)
    return chosen and numbers and (batch, rate) in tried and isinstance(row.get("at_edge"), list)


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """Rows of the results file; runs of rows that have too few seeds yet; and what is still to come, as text."""

    rows: list[dict[str, Any]]
    unfinished: list[dict[str, Any]]
    missing: list[str]


def published(study: Study) -> Published:
    results = study.results()
    task, missing, found = study.task, [], []
    unfinished: list[dict[str, Any]] = []
    losses: dict[Way, dict[int, Any]] = {}
    for way in study.ways:
        specs = study.finals(way, results)
        done = {s.seed: results[name_of(s)] for s in specs if "losses" in results.get(name_of(s), {})}
        losses[way] = {seed: run["losses"] for seed, run in done.items()}
        if len(done) < len(study.args.seeds):
            missing.append(f"{way.row.name}, {way.sequences:g} sequences at {way.cost_at}: {len(done)} seeds")
        if len(done) >= min(2, len(study.args.seeds)):  # one seed of several has no interval
            found.append(describe(study, way, specs[0], done, results))
        elif done:  # others may be compared with it all the same
            unfinished.append(identified(way, specs[0]) | {"losses": by_seed(losses[way])})
    largest = max(study.args.sequences)
    rows = []
    for row in found:
        way = row.pop("way")
        for name, other in references(study, way, losses, largest).items():
            if set(losses[way]) & set(losses[other]):
                row[name] = stats.compared(task.setting, task.adapt, losses[way], losses[other])
                row[name]["to"] = other.row.name
        rows.append(row | {"losses": by_seed(losses[way])})
    base = results.get(name_of(study.base))
    if base and "losses" in base:
        measured = {study.base.seed: base["losses"]}
        of_base = {"name": BASE} | stats.absolute(task.setting, task.adapt, measured)
        rows.insert(0, of_base | {"losses": by_seed(measured)})
    return Published(rows, unfinished, missing)


def by_seed(losses: Mapping[int, Any]) -> dict[str, Any]:
    """As JSON has it; quality_stats.losses_of reads it."""
    return {str(seed): losses[seed] for seed in sorted(losses)}


def identified(way: Way, spec: Spec) -> dict[str, Any]:
    return {
        "name": way.row.name,
        "schedule": schedule(way.row),
        "rival": way.row.rival,
        "sequences": way.sequences,
        "cost_at": way.cost_at,
        "batch": spec.batch,
        "rate": spec.rate,
    }


def references(study: Study, way: Way, losses: dict[Way, dict[int, Any]], largest: float) -> dict[str, Way]:
    """What a way is compared with: dense and the best rival at equal cost, and dense at the largest budget."""
    task = study.task
    equal = [w for w in study.ways if (w.sequences, w.cost_at) == (way.sequences, way.cost_at) and losses[w]]
    rivals = [w for w in equal if w.row.rival]
    found = {}
    if dense := [w for w in equal if w.row.name == "dense"]:
        found["against_dense"] = dense[0]
    if rivals:
        found["against_best_rival"] = min(
            rivals, key=lambda w: finite(stats.absolute(task.setting, task.adapt, losses[w])["mean_loss"])
        )
    most = [w for w in study.ways if (w.row.name, w.sequences, w.cost_at) == ("dense", largest, way.cost_at)]
    if most and losses[most[0]]:
        found["against_largest_dense"] = most[0]
    return found


def describe(
    study: Study, way: Way, spec: Spec, done: dict[int, dict[str, Any]], results: dict[str, Any]
) -> dict[str, Any]:
    task, args = study.task, study.args
    costs = {str(n): cost(list(spec.segments), way.row, study.costs, n, spec.batch) for n in CONTEXTS}
    if way.cost_at not in CONTEXTS:
        costs = {str(way.cost_at): cost(list(spec.segments), way.row, study.costs, way.cost_at, spec.batch)}
    row = {"way": way} | identified(way, spec)
    row |= {
        "cost": {n: None if c is None else round(c, 2) for n, c in costs.items()},
        "chained": [chain for n in costs for chain in study.costs.chained(way.row, int(n))],
        "steps": sum(s.steps for s in spec.segments),
        "seeds": sorted(done),
        "train_s": round(statistics.mean(run["train_s"] for run in done.values()), 1),
    }
    row |= stats.absolute(task.setting, task.adapt, {seed: run["losses"] for seed, run in done.items()})
    if not args.sweep:
        return row
    at, taken = study.sweeps_at(way.row), study.taken(way.row)
    row["swept_at"] = {"sequences": at.sequences, "cost_at": at.cost_at}
    tried = study.tried(at, results)[0]
    here = [
        {
            "batch": b,
            "rate": r,
            "loss": round(x, 5) if math.isfinite(x := study.sweep_loss(at, (b, r), results)) else None,
        }
        for b, r in tried
    ]
    if taken and not here:
        return row | {name: taken[name] for name in ("sweep", "at_edge", "settings_from")}
    edges = {name for name in ("batch", "rate") if at_edge(name, spec, here)}
    if taken:  # the choice of the other study is the first that was tried here: what is beyond it is its only edge
        edges = {"batch"} & set(taken["at_edge"]) | {"rate" for s in here[-1:] if s["rate"] == spec.rate}
        row["settings_from"] = taken["settings_from"] | {"sweep": taken["sweep"]}
    return row | {"sweep": here, "at_edge": sorted(edges)}


def at_edge(name: str, spec: Spec, tried: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a wider sweep of batch sizes or rates might choose otherwise."""
    chosen = getattr(spec, name)
    values = {s[name] for s in tried if name == "batch" or s["batch"] == spec.batch}
    return len(values) > 1 and chosen in (min(values), max(values)) and not (name == "batch" and chosen == 1)


def text_of(study: Study) -> dict[str, Any]:
    """Digests of the token files, and the packages that the text is of: results of the same are of the same text."""
    if study.args.tokens is None:
        return {}
    packages = Path(study.args.tokens) / PACKAGES_FILE
    known = {"packages": json.loads(packages.read_text())} if packages.is_file() else {}
    return {"files": study.identity()["tokens"]} | known


def publish(study: Study) -> tuple[Path, list[dict[str, Any]]]:
    args = study.args
    found = published(study)
    runs = [r for r in study.results().values() if "losses" in r]
    where = {name: r[name] for r in runs[-1:] for name in MADE_BY}  # not of the machine that writes the table
    path = write_results(
        results_name(args),
        found.rows,
        **where,
        **scope(args),
        items=args.items,
        text=text_of(study),
        sequences=sorted(args.sequences),
        seeds=args.seeds,
        interval="95 %, t over seeds x documents (Welch-Satterthwaite), paired",
        costs={name: len(steps) for name, steps in study.costs.files.items()},
        runs={
            "count": len(runs),
            "commits": sorted({r["commit"] for r in runs}),
            "gpus": sorted({r["gpu"] for r in runs}),
            "hours": round(sum(r["wall_s"] for r in runs) / 3600, 2),
        },
        left_out=study.left_out,
        missing=found.missing,
        unfinished=found.unfinished,
        failed=study.failed(),
    )
    return path, found.rows
