"""The most memory that is allocated at a time while something runs on the CPU, by the allocator's own account."""

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes above what there was at the start. Workspaces and autograd's tensors count, memory of the host's own
    libraries does not."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results.events()
    found = sorted((e.start_ns(), e.nbytes()) for e in results if e.name() == "[memory]")
    now = most = 0
    for _, size in found:
        now += size
        most = max(most, now)
    return most
