"""Every test starts with one thread."""

import pytest
from lemo.engine.layout import Selection
from support.fixtures import one_thread

__all__ = ["one_thread"]


@pytest.fixture
def chosen(monkeypatch):
    """Every kept list as it was chosen."""
    lists = []
    original = Selection.finish

    def record(selection):
        lists.append(original(selection))
        return lists[-1]

    monkeypatch.setattr(Selection, "finish", record)
    return lists
