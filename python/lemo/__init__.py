"""lemo: token elimination for long-context fine-tuning.

    controller = lemo.apply(model, lemo.LemoConfig(...))   # a transformers or PEFT model, in place
    Trainer(model, ..., callbacks=[controller.callback()]).train()
    lemo.remove(model)

`lemo.ops` holds the operators on their own. Submodules load on first use: the operators need no transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import LemoConfig, Phase

if TYPE_CHECKING:
    from .attach import Controller, apply, remove
    from .memory import estimate
    from .schedule import LemoCallback, Schedule

__version__: str

_WHERE = {
    "__version__": "_version",
    "Controller": "attach",
    "apply": "attach",
    "remove": "attach",
    "estimate": "memory",
    "LemoCallback": "schedule",
    "Schedule": "schedule",
}

__all__ = ["Controller", "LemoCallback", "LemoConfig", "Phase", "Schedule", "apply", "estimate", "remove"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
