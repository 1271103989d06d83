"""A run as one HTML page: what it did, what it cost, and which parts of the text its layers left out.

Everything on the page is read from the run folder; nothing is measured anew. What a run did not record is named, with
what would record it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lemo.pages.charts import Series, line_chart
from lemo.pages.html import Section, details, escape, missing, number, page, table, values
from lemo.training.maps import MAPS_FILE, block_tokens, kept_of, read_maps
from lemo.training.phases import unreached_of
from lemo.training.plots import last_step, phase_name, steps_of, summary
from lemo.training.run_folder import is_complete, run_settings
from lemo.training.run_log import LOG_FILE, read_log

Decode = Callable[[Sequence[int]], str]
_DRAWN: tuple[str, ...] = ("step", "block_size", "layers", "maps", "attention", "mlp", "tiles")
_RECALL = "lemo calibrate measures recall of its predictors; --schedule sparse logs the attention that its tiles cover."


@dataclass(frozen=True)
class _Run:
    """What the sections are made from."""

    folder: Path
    saved: dict[str, Any]
    records: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    maps: list[dict[str, Any]]

    @property
    def x(self) -> list[float]:
        return [r["step"] for r in self.steps]

    def of(self, name: str) -> list[float | None]:
        return [r.get(name) for r in self.steps]

    def means(self, name: str) -> list[float | None]:
        """Mean over layers; None for steps without it."""
        return [sum(v) / len(v) if (v := r.get(name)) else None for r in self.steps]

    def phases(self) -> list[list[dict[str, Any]]]:
        return [list(group) for _, group in itertools.groupby(self.steps, phase_name)]

    def bounds(self) -> list[tuple[float, str]]:
        return [(group[0]["step"], phase_name(group[0])) for group in self.phases()] if len(self.phases()) > 1 else []


def run_page(
    folder: Path,
    decode: Decode | None = None,
    no_text: str = "",
    recall: dict[str, Any] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """The page of a run folder. decode: tokens to text, None: tokens are shown as numbers, and `no_text` states why.

    recall: the report of the run's calibration, if it can be read. Raises CheckpointError for what is not a run folder.
    """
    records = read_log(folder / LOG_FILE, report)
    run = _Run(folder, run_settings(folder), records, steps_of(records), read_maps(folder, report))
    sections = [
        Section("overview", "Overview", _overview(run)),
        Section("loss", "Loss", _loss(run)),
        Section("maps", "What was kept", _maps(run, no_text)),
        Section("attention", "Recall and covered attention", _coverage(run, recall)),
        Section("cost", "Speed, cost and memory", _cost(run)),
        Section("held-out", "Held-out text", _held_out(run)),
        Section("events", "Events", _events(run)),
        Section("settings", "Settings and environment", _settings(run)),
    ]
    data = {"steps": run.steps, "maps": [_map_data(m, decode, no_text) for m in run.maps]}
    lead = f"<p>Run folder {escape(folder.resolve())}</p>"
    return page(f"lemo run {folder.resolve().name}", lead, sections, data, ["maps.js"])


# ---- sections --------------------------------------------------------------------------------------------------------


def _overview(run: _Run) -> str:
    total = run.saved["settings"].get("steps")
    done = run.steps[-1]["step"] if run.steps else 0
    state = "complete" if is_complete(run.folder) else "not complete; lemo finetune --out RUN --resume continues it"
    shown = {"state": state, "steps": f"{done} of {number(total)}", "started": run.saved.get("started", "not recorded")}
    if not run.steps:
        return values(shown) + missing("No step has been logged yet.", "The page fills as the run writes its log.")
    rows = []
    for group in run.phases():
        kept = [k for r in group for k in r.get("kept", [])]
        density = [k for r in group for k in r.get("density", [])]
        losses = [r["loss"] for r in group if r["loss"] is not None]
        rows.append(
            [
                phase_name(group[0]) or "phase not recorded",
                f"{group[0]['step']} to {group[-1]['step']}",
                float(np.mean(losses)) if losses else None,
                _median(group, "tokens_per_second"),
                float(np.mean(kept)) if kept else None,
                float(np.mean(density)) if density else None,
                _most(group, "peak_memory_bytes", 2**20),
            ]
        )
    missed = unreached_of(run.saved, last_step(run.records))
    rows += [[f"{phase.name} (not reached)", f"{phase.first} to {phase.last}", *[None] * 5] for phase in missed]
    columns = ("phase", "steps", "mean loss", "tokens/s (median)", "kept", "pairs of tiles", "peak MiB")
    return (
        values(shown)
        + table(columns, rows, name="phases")
        + details("As text", f"<pre>{escape(summary(run.records, missed))}</pre>")
    )


def _median(group: list[dict[str, Any]], name: str) -> float | None:
    found = [r[name] for r in group if r.get(name) is not None]
    return float(np.median(found)) if found else None


def _most(group: list[dict[str, Any]], name: str, unit: float) -> float | None:
    found = [r[name] for r in group if r.get(name) is not None]
    return max(found) / unit if found else None


def _chart(run: _Run, title: str, y: str, name: str, series: list[float | None], how: str) -> str:
    """A line over the steps, or what is missing."""
    if all(v is None for v in series):
        return missing(f"The log has no {title.lower()}.", how)
    return f'<div id="chart-{name}">{line_chart(title, "step", y, [Series(title, run.x, series)], run.bounds())}</div>'


def _loss(run: _Run) -> str:
    again = "Logs of this version of lemo have it: run lemo finetune again."
    note = (
        '<p class="note">In mode skip the loss is that of the tokens that took part in a layer: phases with different '
        "numbers of participating tokens cannot be compared. The held-out evaluation measures the dense model.</p>"
    )
    parts = [
        _chart(run, "Training loss", "loss", "loss", run.of("loss"), again),
        _chart(run, "Participating tokens", "targets", "loss_tokens", run.of("loss_tokens"), again),
        _chart(run, "Learning rate", "rate", "lr", run.of("lr"), again),
        _chart(run, "Gradient norm", "norm", "grad_norm", run.of("grad_norm"), again),
    ]
    return note + "".join(parts)


def _maps(run: _Run, no_text: str) -> str:
    kept = _chart(run, "Kept blocks, mean over layers", "share", "kept", run.means("kept"), "Run lemo finetune again.")
    if not run.maps:
        return kept + missing(
            f"This run recorded no maps ({MAPS_FILE}).",
            "lemo finetune records some by default; --maps 0 switches that off, and older versions did not have it.",
        )
    view = (
        '<div id="map-view" hidden><div class="controls"><label>Step <select id="map-step"></select></label>'
        '<label>Document <select id="map-document"></select></label>'
        '<label>Part <select id="map-part"><option value="attention">attention</option><option value="mlp">MLP</option>'
        "</select></label></div>"
        '<p class="note">Rows are layers, columns blocks of the document in order; dark: kept. Point, tap, or use the '
        "arrow keys.</p>"
        '<div class="scroll"><canvas id="kept-map" tabindex="0" role="img" aria-label="Kept blocks by layer; arrow '
        'keys move, and the text below describes the block" aria-describedby="block-title"></canvas></div>'
        '<div class="panel" aria-live="polite"><div id="block-title"></div><pre id="block-text"></pre></div>'
        '<div id="tile-view" hidden><h3>Tiles that attention computed</h3><div class="controls"><label>Layer '
        '<select id="tile-layer"></select></label></div><canvas id="tile-map" role="img" aria-label="Computed pairs of '
        'tiles" aria-describedby="tile-title"></canvas>'
        '<p id="tile-title" class="note" aria-live="polite"></p></div></div>'
    )
    rows = []
    for record in run.maps:
        ratios = kept_of(record)
        for d, (first, count) in enumerate(_places(record)):
            for i, layer in enumerate(record["layers"]):
                rows.append([record["step"], d, layer, float(ratios[i, first : first + count].mean())])
    listed = details(
        "Kept share by step, document and layer", table(("step", "document", "layer", "kept"), rows, name="kept-shares")
    )
    thinned = [m for m in run.maps if len(m["layers"]) < m["of_layers"]]
    note = (
        f'<p class="note">Of {thinned[0]["of_layers"]} layers every {thinned[0]["layers"][1]}th was recorded.</p>'
        if thinned
        else ""
    )
    noscript = "<noscript><p>The maps need JavaScript; the table below does not.</p></noscript>"
    why = f'<p class="note">{escape(no_text)}</p>' if no_text else ""
    return kept + noscript + view + note + why + listed


def _coverage(run: _Run, recall: dict[str, Any] | None) -> str:
    covered = run.means("covered")
    parts = []
    if any(v is not None for v in covered):
        density = run.means("density")
        series = [
            Series("covered attention (as the policy estimates it)", run.x, covered),
            Series("computed pairs of tiles", run.x, density),
        ]
        chart = line_chart(
            "Covered attention and computed pairs, mean over layers", "step", "share", series, run.bounds()
        )
        last = next(r for r in reversed(run.steps) if r.get("covered"))
        rows = [[i, c, d] for i, (c, d) in enumerate(zip(last["covered"], last["density"], strict=True))]
        parts.append(f'<div id="chart-covered">{chart}</div>')
        parts.append(
            details(f"By layer at step {last['step']}", table(("layer", "covered", "pairs"), rows, name="covered"))
        )
    layers = (recall or {}).get("layers")
    if isinstance(layers, list) and layers and all("recall" in row for row in layers):
        rows = [[i, row["recall"], row.get("position_recall")] for i, row in enumerate(layers)]
        caption = "Recall of the run's calibration on its held-out documents, against blocks chosen by exact scores"
        parts.append(table(("layer", "recall", "by position alone"), rows, caption, name="recall"))
    return "".join(parts) or missing("This run has neither recall nor covered attention.", _RECALL)


def dense_rate(phases: Sequence[Sequence[dict[str, Any]]]) -> float | None:
    """Median tokens/s of the run's exact steps that leave nothing out; None if it has none."""
    rates = [
        r["tokens_per_second"]
        for group in phases
        for r in group
        if isinstance(r.get("phase"), dict) and r["phase"].get("mode") == "dense" and "window" not in r["phase"]
        if r.get("tokens_per_second")
    ]
    return float(np.median(rates)) if rates else None


def _cost(run: _Run) -> str:
    again = "Logs of this version of lemo have it: run lemo finetune again."
    speed = _chart(run, "Tokens per second", "tokens/s", "tokens_per_second", run.of("tokens_per_second"), again)
    memory = [None if v is None else v / 2**20 for v in run.of("peak_memory_bytes")]
    what = "CUDA allocator" if run.saved.get("device") == "cuda" else "resident set of the process, which never shrinks"
    peak = _chart(run, "Peak memory", "MiB", "peak", memory, again) + f'<p class="note">Peak of the {what}.</p>'
    return speed + _relative(run) + peak


def _relative(run: _Run) -> str:
    phases = run.phases()
    dense = dense_rate(phases)
    if dense is None:
        return missing(
            "The cost relative to dense steps is not known: this run has none.",
            "A schedule with a dense phase measures it, as does lemo sweep; lemo estimate predicts memory.",
        )
    rows = []
    for group in phases:
        rate = _median(group, "tokens_per_second")
        phase = group[0].get("phase")
        window = phase.get("window", 1.0) if isinstance(phase, dict) else 1.0
        rows.append([phase_name(group[0]), len(group), rate, None if not rate else window * dense / rate])
    caption = "A step's time relative to this run's dense steps (medians of what was logged)"
    return table(("phase", "logged steps", "tokens/s", "cost of a step, dense = 1"), rows, caption, name="costs")


def _held_out(run: _Run) -> str:
    found = [r for r in run.records if r.get("event") == "held-out"]
    if not found:
        return missing(
            "No held-out text was evaluated.",
            "lemo finetune --held-out 0.02 --evaluate-every 50 does; lemo evaluate, later.",
        )
    rows = [[r["step"], r["perplexity"], *(r.get("interval") or [None, None])] for r in found]
    known = [r for r in found if r["perplexity"] is not None]
    chart = (
        line_chart(
            "Dense perplexity of the held-out text",
            "step",
            "perplexity",
            [Series("perplexity", [r["step"] for r in known], [r["perplexity"] for r in known])],
        )
        if len(known) > 1
        else ""
    )
    return chart + table(("step", "perplexity", "low", "high"), rows, "95 % intervals", name="held-out-table")


def _events(run: _Run) -> str:
    rows = []
    for r in run.records:
        if "event" in r and r["event"] != "held-out":
            rows.append(
                [
                    r["event"],
                    r.get("step"),
                    ", ".join(f"{k} {number(v)}" for k, v in r.items() if k not in ("event", "step")),
                ]
            )
    for e in run.saved.get("events", []):
        changes = {k: v for k, v in e.items() if k in ("moved", "environment") and v}
        rows.append([f"{e.get('event', 'event')} with changes", e.get("step"), f"{e.get('time', '')} {changes or ''}"])
    return (
        table(("event", "step", "what"), rows, name="event-table")
        if rows
        else missing("The log has no events.", "It is damaged or empty.")
    )


def _settings(run: _Run) -> str:
    saved = run.saved
    parts = [
        "<h3>Environment</h3>",
        values(
            {
                **saved.get("environment", {}),
                "device": saved.get("device"),
                "dtype": saved.get("dtype"),
                "processes": saved.get("processes", 1),
            }
        ),
    ]
    parts += [
        "<h3>Settings</h3>",
        f'<div id="settings-list">{values(saved["settings"])}</div>',
        "<h3>Inputs</h3>",
        values(saved.get("inputs", {})),
    ]
    prints = {k: v for k, v in saved.items() if k.endswith("sha256") or k == "model_fingerprint"}
    return "".join(parts) + details("Fingerprints", values(prints))


# ---- maps ------------------------------------------------------------------------------------------------------------


def _places(record: dict[str, Any]) -> list[tuple[int, int]]:
    """(first block, blocks) of every recorded document."""
    counts = [math.ceil(n / record["block_size"]) for n in record["lengths"]]
    return [(end - count, count) for count, end in zip(counts, itertools.accumulate(counts), strict=True)]


def _map_data(record: dict[str, Any], decode: Decode | None, no_text: str) -> dict[str, Any]:
    """What the page's script draws."""
    named = record.get("documents") or [{}] * len(record["lengths"])
    documents: list[dict[str, Any]] = []
    for (first, count), length, of in zip(_places(record), record["lengths"], named, strict=True):
        start = of.get("start", 0)
        name = f"{of['source']}, document {of['number']}" if of else f"document {len(documents)} of the window"
        label = f"{name}, tokens {start} to {start + length - 1}"
        documents.append({"first": first, "blocks": count, "length": length, "start": start, "label": label})
    tokens = block_tokens(record)
    most = record.get("tokens_per_block", 0)
    texts = None
    if tokens is not None:
        texts = [decode(t.tolist()) if decode else " ".join(map(str, t.tolist())) for t in tokens]
        if most < record["block_size"]:
            texts = [f"{text} … (the first {most} tokens)" for text in texts]
    return {
        **{name: record[name] for name in _DRAWN if name in record},
        "label": f"{record['step']} ({record.get('mode', 'mode not recorded')})",
        "documents": documents,
        "texts": texts,
        "no_text": no_text
        or "The text of this block was not recorded: the context is too long for the budget of the maps.",
    }
