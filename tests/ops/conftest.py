"""Fixtures of the operation tests: no output may pass that was not written."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
import torch
from lemo import _native


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Builds without every type and head dimension say so: then the case is skipped with that message."""
    try:
        return (yield)
    except NotImplementedError as error:
        if torch.cuda.is_available() and "build" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors hold NaN or the largest integer: torch does that in its deterministic mode. Kernels are still told
    what the call itself asks for, so that tests reach both kinds."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setattr(_native, "wants_determinism", lambda: False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
