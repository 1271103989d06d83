"""Modules under the names they had before the package was divided into rooms."""

import importlib
import sys

import pytest
from lemo._moved import _NEW_NAMES


@pytest.mark.parametrize("old", sorted(_NEW_NAMES))
def test_an_old_name_is_the_same_module_and_warns(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = importlib.import_module(_NEW_NAMES[old])
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {_NEW_NAMES[old]}"):
        assert importlib.import_module(old) is new
    assert new.__name__ == _NEW_NAMES[old]


def test_other_names_are_still_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"lemo\.nowhere"):
        importlib.import_module("lemo.nowhere")
