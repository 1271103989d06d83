"""Every test starts with one thread."""

import lemo.engine.policies
import pytest
from support.fixtures import one_thread

__all__ = ["one_thread"]


@pytest.fixture
def chosen(monkeypatch):
    """Every kept list as it was chosen."""
    lists = []
    original = lemo.engine.policies.select  # type: ignore[attr-defined]

    def record(*args, **kwargs):
        lists.append(original(*args, **kwargs))
        return lists[-1]

    monkeypatch.setattr(lemo.engine.policies, "select", record)
    return lists
