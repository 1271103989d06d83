"""lemo: token elimination for long-context fine-tuning.

    controller = lemo.apply(model, lemo.LemoConfig(...))   # a transformers or PEFT model, in place
    Trainer(model, ..., callbacks=[controller.callback()]).train()
    lemo.remove(model)

`lemo.ops` holds the operators on their own. Submodules load on first use: the operators need no transformers.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lemo._moved import MovedModules
from lemo.engine.config import LemoConfig, Phase

if TYPE_CHECKING:
    from lemo.engine.estimate import estimate, longest
    from lemo.integration.callback import LemoCallback
    from lemo.integration.controller import Controller
    from lemo.integration.patch import apply, remove
    from lemo.integration.schedule import Schedule

__version__: str

_WHERE = {
    "__version__": "_version",
    "Controller": "integration.controller",
    "LemoCallback": "integration.callback",
    "Schedule": "integration.schedule",
    "apply": "integration.patch",
    "estimate": "engine.estimate",
    "longest": "engine.estimate",
    "remove": "integration.patch",
}

__all__ = ["Controller", "LemoCallback", "LemoConfig", "Phase", "Schedule", "apply", "estimate", "longest", "remove"]

sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
