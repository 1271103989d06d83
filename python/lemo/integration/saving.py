"""What the layers of a pass save, and where: the model's setting, the run's, or a plan within its memory budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lemo.engine import budget
from lemo.engine.adapted import adapters, countable
from lemo.engine.budget import BudgetError, MemoryPlan, Needs
from lemo.engine.config import LemoConfig, Phase, Recompute
from lemo.engine.families.base import Family, refuse
from lemo.engine.memory import frozen_bytes, layer_shape, quantized, trained_bytes
from lemo.engine.offload import HostMemory, OffloadedRecords
from lemo.engine.records import Records
from lemo.engine.wrappers import sharded, tree
from lemo.integration.replay import under_checkpoint

# Plans for so many shapes of batches are remembered.
_REMEMBERED = 256


@dataclass(frozen=True, eq=False)
class Saving:
    """recompute: by layer. offloaded: layers whose rows go to host memory. segments: of layers, see `Step`."""

    recompute: tuple[Recompute, ...]
    offloaded: frozenset[int] = frozenset()
    host: HostMemory | None = None
    segments: tuple[int, ...] = ()

    @classmethod
    def full(cls, layers: int) -> Saving:
        """Of passes without a backward pass."""
        recompute: Recompute = "full"
        return cls((recompute,) * layers)

    def records(self) -> Records:
        """Where a step's records go."""
        return OffloadedRecords(self.host, self.offloaded) if self.host is not None and self.offloaded else Records()


class Savings:
    """Decides for every pass of one model. plan: the last one; None if there was none, or nothing to choose."""

    def __init__(self, family: Family, model: Any, config: LemoConfig, note: Callable[[str], None]) -> None:
        self.family, self.model, self.config, self.note = family, model, config, note
        self.plan: MemoryPlan | None = None
        self._host = HostMemory(note)
        self._plans: dict[Any, MemoryPlan] = {}

    def of(self, phase: Phase, lengths: Sequence[int], element: int, required: bool) -> Saving:
        """For a pass over documents of these lengths, in activations of `element` bytes. required: blocks are kept
        beyond the budget, and only the device knows how many."""
        config, count = self.config, len(self.family.layers(self.family.decoder(self.model)))
        surrounded = under_checkpoint()
        again = config.recompute_layers
        ignored = {"offload": config.offload, "recompute_layers": again not in (False, "auto")}
        if surrounded and any(ignored.values()):
            names = " and ".join(name for name, given in ignored.items() if given)
            are = "are" if " and " in names else "is"
            self.note(f"{names} {are} off inside an activation checkpoint around the model, which recomputes all of it")
        if surrounded or not config.plans_memory:
            return Saving((self.recompute(),) * count)
        try:
            self.plan = plan = self.planned(phase, lengths, element, required)
        except BudgetError:
            # The run's other phases have yet to come: one error for all that would stop it.
            every = (phase, *(p for p in config.phases or () if p is not phase))
            budget.planned_together(functools.partial(self.planned, p, lengths, element, required) for p in every)
            raise
        return Saving(plan.recompute, plan.offloaded, self._host, plan.segments)

    def planned(self, phase: Phase, lengths: Sequence[int], element: int, required: bool = False) -> MemoryPlan:
        """Raises BudgetError if the budget is too small."""
        key = (id(phase), tuple(lengths), element, required, self._adapted())
        if key not in self._plans:
            if len(self._plans) >= _REMEMBERED:
                self._plans.clear()
            needs, config = self.needs(phase, lengths, element, required), self.config
            if config.budget is None:
                again = False if config.recompute_layers == "auto" else config.recompute_layers
                graphs = config.recompute == "none"
                self._plans[key] = budget.fixed(needs, self.recompute(), config.offload, again, graphs)
            else:
                self._plans[key] = budget.choose(needs, config.budget, config.offload, config.recompute_layers)
                self._note_uncounted(needs)
        return self._plans[key]

    def pin(self, phase: Phase, lengths: Sequence[int], element: int) -> None:
        """Pins the host memory of such passes in advance; the first of them would otherwise do it."""
        if self.config.plans_memory:
            pinned = next(self.model.parameters()).is_cuda
            self._host.give_back(self._host.take(self.planned(phase, lengths, element).host, pinned))

    def _note_uncounted(self, needs: Needs) -> None:
        if not needs.countable:
            self.note(
                "memory_budget: this model's adapters or activations (dropout, DoRA, trained weights, other functions "
                "than SiLU and ReLU) save what lemo cannot count, so no layer saves everything; if that fits, set "
                'recompute="none" in place of the budget'
            )

    def recompute(self) -> Recompute:
        """What every layer saves, if there is neither a budget nor offload."""
        # A checkpoint around the model would recompute all of it for every local graph that a layer keeps.
        wanted = under_checkpoint() or any(map(_checkpointed, tree(self.model)))
        chosen = self.config.recompute
        if chosen == "auto":
            return "full" if wanted else "none"
        if wanted:
            self.note(
                "gradient checkpointing is switched on in the model; lemo runs the layers itself, with "
                f'recompute="{chosen}"'
            )
        return chosen

    def needs(self, phase: Phase, lengths: Sequence[int], element: int, required: bool = False) -> Needs:
        """What a pass needs, see `of`."""
        layers, tokens = self.family.layers(self.family.decoder(self.model)), sum(lengths)
        if any(map(sharded, layers)):
            refuse(
                "memory_budget, offload and recompute_layers with FSDP2: plans do not count its gathered layers",
                'set recompute="full" (or "attention", "none") instead',
            )
        shape = layer_shape(self.model.config, element=element)
        found, known = [], True
        for i, layer in enumerate(layers):
            ranks, counted = adapters(self.family, layer)
            known = known and counted
            found.append(dataclasses.replace(shape, lora=ranks).at(i))
        windows = self.family.windows(self.model.config, max(lengths))
        return Needs(
            shapes=budget.same_objects(found),
            lists=tuple(budget.layer_lists(self.config, phase, lengths, windows, required)),
            phase=phase,
            tokens=tokens,
            weights=frozen_bytes(self.model) + trained_bytes(self.model),
            dequantizes=quantized(self.model),
            logits=budget.logit_bytes(shape, tokens) if self.config.return_logits else 0,
            countable=countable(phase, shape, known),
        )

    def _adapted(self) -> tuple[int, int]:
        """What changes if adapters are added or removed between steps."""
        trained = [p.numel() for p in self.model.parameters() if p.requires_grad]
        return len(trained), sum(trained)

    def report(self) -> dict[str, Any]:
        """The last plan in plain values; empty if there was nothing to choose."""
        if self.plan is None:
            return {}
        return {
            "layers": self.plan.layers,
            "offloaded": len(self.plan.away),
            "segments": list(self.plan.segments),
            "saved_bytes": self.plan.saved,
            "host_bytes": self.plan.host,
            "estimated_peak_bytes": self.plan.peak,
        }


def _checkpointed(module: nn.Module) -> Any:
    """Whether gradient checkpointing is on, which transformers keeps in an instance over a default of its class. A
    failed `getattr` of a module takes long."""
    return module.__dict__.get("gradient_checkpointing", getattr(type(module), "gradient_checkpointing", False))
