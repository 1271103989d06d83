"""The phases of a run by their steps: what each is called, and which of them a run has not reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lemo.integration.schedule import Schedule
from lemo.training.plots import phase_name
from lemo.training.settings import FinetuneSettings


@dataclass(frozen=True)
class PlannedPhase:
    """A phase as the log names it, and its steps, counted from 1. Few steps may leave a phase none."""

    name: str
    first: int
    last: int

    @property
    def steps(self) -> str:
        if self.first > self.last:
            return "no steps"
        return f"step {self.first}" if self.first == self.last else f"steps {self.first}-{self.last}"


def planned_phases(settings: FinetuneSettings) -> list[PlannedPhase]:
    config, found, before = settings.lemo_config(), [], 0
    ends = Schedule(settings.phases()).boundaries(settings.steps)
    for stage, end in zip(settings.stages(), ends, strict=True):
        phase = stage.phase
        values: dict[str, Any] = {"mode": phase.mode, "keep": phase.keep, **phase.limits}
        if phase.chooses_blocks:
            values["policy"] = config.policy(phase)[0]
        if stage.window < 1:
            values["window"] = float(stage.window)
        found.append(PlannedPhase(phase_name({"phase": values}), before + 1, end))
        before = end
    return found


def unreached(settings: FinetuneSettings, done: int) -> list[PlannedPhase]:
    """Phases that have steps, all of them after `done`."""
    return [phase for phase in planned_phases(settings) if phase.last >= phase.first > done]


def unreached_of(saved: dict[str, Any], done: int) -> list[PlannedPhase]:
    """As `unreached`, of a run folder's run.json; none if another version wrote settings that this one cannot read."""
    try:
        settings = FinetuneSettings.from_json(saved["settings"])
    except (TypeError, ValueError):
        return []
    return unreached(settings, done)


def stopped(settings: FinetuneSettings, done: int) -> str:
    """What an interrupted run has done, and what it has not."""
    text = f"stopped after {done} of {settings.steps} steps"
    if missing := unreached(settings, done):
        text += "; not reached: " + ", ".join(f"{phase.name} ({phase.steps})" for phase in missing)
    return text
