"""Modules under the names they had before the package was divided into rooms; imports of them warn, and still work."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_NEW_NAMES = {
    "lemo.checkpoint": "lemo.training.checkpoint",
    "lemo.config": "lemo.engine.config",
    "lemo.evaluate": "lemo.training.evaluate",
    "lemo.finetune": "lemo.training.finetune",
    "lemo.layout": "lemo.engine.layout",
    "lemo.memory": "lemo.engine.memory",
    "lemo.plots": "lemo.training.plots",
    "lemo.policies": "lemo.engine.policies",
    "lemo.run_log": "lemo.training.run_log",
    "lemo.settings": "lemo.training.settings",
}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a moved module under its old name: the very module object, so that classes and state exist once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _NEW_NAMES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(f"{old} is now {_NEW_NAMES[old]}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(_NEW_NAMES[old])
