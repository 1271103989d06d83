"""The adapters of a layer, as plans of memory count them."""

from __future__ import annotations

from torch import nn

from lemo.engine.config import Phase
from lemo.engine.families.base import Family
from lemo.engine.linear import ordinary, projection
from lemo.engine.memory import LayerShape

# Activation functions whose graphs `saved_bytes` counts.
_COUNTED = (
    "torch.nn.modules.activation.SiLU",
    "transformers.activations.SiLUActivation",
    "torch.nn.modules.activation.ReLU",
)


def countable(phase: Phase, shape: LayerShape, adapters: bool) -> bool:
    """Whether `saved_bytes` counts all that layers save in a phase, if it does so for their adapters."""
    # Which of the two parts of a layer saves what lies inside of them is not known if they keep different rows.
    return adapters and not (phase.mlp_keep is not None and shape.inner_saved)


def adapters(family: Family, layer: nn.Module) -> tuple[dict[str, int], bool]:
    """Ranks of a layer's adapters by projection, and whether `saved_bytes` counts all that its graphs save."""
    roles = {}
    for path, module in layer.named_modules():
        name = path.rpartition(".")[2]
        if name in family.projections:
            roles[id(module)] = family.projections[name]
    ranks: dict[str, int] = {}
    for module in (*family.attention_modules(layer), *family.mlp_modules(layer)):
        role = roles.get(id(module))
        if role is None:
            if not (ordinary(module, *_COUNTED) or type(module).__name__.endswith("Norm")):
                return ranks, False
            continue
        found = projection(module)
        if found is None or found.magnitude is not None:
            return ranks, False
        if found.a is not None:
            if not isinstance(found.a, nn.Parameter):  # several adapters, added up anew in every pass
                return ranks, False
            ranks[role] = found.a.shape[0]
    return ranks, True
