"""A tiny random model whose exact scores depend on content, and documents for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.tiny import BLOCK, build


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Nothing here is large enough for a second thread to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    return build()


@pytest.fixture(scope="session")
def texts() -> list[torch.Tensor]:
    """Blocks drawn from the lower or the upper half of the vocabulary, so that content decides which ones inform."""
    g = torch.Generator().manual_seed(3)
    documents = []
    for _ in range(40):
        upper = (torch.rand(16, generator=g) < 0.5).long().repeat_interleave(BLOCK)
        documents.append(torch.randint(0, 32, (16 * BLOCK,), generator=g) + 32 * upper)
    return documents
