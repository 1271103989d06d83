"""Long operations on the CPU end when they are asked to, and leave the library as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from lemo import ops
from support import capi
from support.capi import Call, make, view

# Operations that take many seconds, of little memory. Each is ended after a few tenths of a second.
ROWS = 1 << 15


def lists() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(0, ROWS + 1, 64, dtype=torch.int32), torch.tensor([0, ROWS // 64], dtype=torch.int32)


def forward() -> None:
    q = torch.zeros(4 * ROWS, 4, 16)
    ops.attention_forward(q, q, q, torch.tensor([0, 4 * ROWS], dtype=torch.int32), None, 4 * ROWS, 0.25)


def backward() -> None:
    q, lse = torch.zeros(ROWS, 4, 16), torch.zeros(4, ROWS)
    cu_seqlens = torch.tensor([0, ROWS], dtype=torch.int32)
    ops.attention_backward(q, q, q, q, q, lse, cu_seqlens, None, None, None, ROWS, 0.25)


def scores() -> None:
    q = torch.zeros(ROWS, 16, 16)
    ops.block_scores(q, q, *lists(), 64, 0.25)


def predict() -> None:
    x, w1, w2, w3 = torch.zeros(ROWS, 64), torch.zeros(2048, 64), torch.zeros(2048, 2048), torch.zeros(8, 2048)
    ops.predict(x, w1, w2, w3, w1, w2, w3, *lists(), 64)


def loss() -> None:
    hidden, weight = torch.zeros(8192, 256, requires_grad=True), torch.zeros(32000, 256)
    ops.linear_cross_entropy_loss(hidden, weight, torch.zeros(8192, dtype=torch.int64))


def tile_scores() -> None:
    q, slots = torch.zeros(ROWS, 4, 16), ROWS // 128 + 1
    cu_seqlens = torch.tensor([0, ROWS], dtype=torch.int32)
    ops.tile_scores(q, q, cu_seqlens, None, ROWS, 0.25, 128, 0, slots, slots)


class Interrupted(Exception):
    pass


@contextmanager
def third_signal_raises() -> Iterator[list[str]]:
    """Signals that come while nobody looks become one, so that only a call that looks now and then meets a third."""
    seen: list[str] = []

    def handle(*_: object) -> None:
        seen.append(threading.current_thread().name)
        if len(seen) == 3:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.07, 0.07)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("operation", [forward, backward, scores, predict, loss, tile_scores])
def test_signals_are_handled_during_an_operation(operation: Callable[[], None], threads: int) -> None:
    q = torch.randn(300, 2, 16)
    cu_seqlens = torch.tensor([0, 300], dtype=torch.int32)
    before = ops.attention_forward(q, q, q, cu_seqlens, None, 300, 0.25)[0]
    given = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with third_signal_raises() as seen, pytest.raises(Interrupted):
            operation()
    finally:
        torch.set_num_threads(given)
    assert set(seen) == {"MainThread"}
    assert torch.equal(ops.attention_forward(q, q, q, cu_seqlens, None, 300, 0.25)[0], before)


class Long(Call):
    """Attention over many rows; `asked` lists the threads that called `cancel`."""

    def __init__(self, threads: int, answer: Callable[[int], int]) -> None:
        rows = ROWS // 2
        self.q, self.lse = torch.zeros(rows, 8, 16), torch.empty(8, rows)
        self.out, self.cu_seqlens = torch.empty_like(self.q), torch.tensor([0, rows], dtype=torch.int32)
        fields = {name: view(self.q) for name in "qkv"}
        fields |= {"cu_seqlens": view(self.cu_seqlens), "out": view(self.out), "lse": view(self.lse)}
        args = make(capi.AttentionForward, max_seqlen=rows, scale=0.25, **fields)
        super().__init__("attention_forward", args, threads)
        self.asked: list[int] = []

        def cancel(_: int | None) -> int:
            self.asked.append(threading.get_ident())
            return answer(len(self.asked))

        self.exec.cancel = capi.CancelFunction(cancel)
        self.allocate()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_cancel_is_asked_by_the_calling_thread(threads: int) -> None:
    call = Long(threads, lambda asked: int(asked == 2))
    assert call.run() == capi.CANCELLED
    assert "cancel" in call.message()
    assert call.asked == [threading.get_ident()] * 2
    call.cu_seqlens[1] = 300  # a short one now
    assert call.run() == capi.OK and call.out[:300].eq(0).all()


def test_cancel_may_call_the_library() -> None:
    """A signal handler may do anything, lemo's operations included: they run, on the calling thread alone."""
    x = torch.arange(12.0).view(3, 4)
    rows, out = torch.tensor([2, 0], dtype=torch.int32), torch.empty(2, 4)
    inner = Call("gather", make(capi.Gather, x=view(x), rows=view(rows), out=view(out)), 2)
    statuses: list[int] = []

    def answer(asked: int) -> int:
        statuses.append(inner.run())
        return int(asked == 2)

    call = Long(2, answer)
    assert call.run() == capi.CANCELLED
    assert "cancel" in call.message()  # not what the inner calls left
    assert statuses == [capi.OK] * 2
    assert torch.equal(out, x[[2, 0]])


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_command_lets_waiting_threads_sleep(given: str | None, expected: str) -> None:
    """Spinning threads of several jobs on a few cores take the time that the others need."""
    code = "from lemo.cli import main; import atexit, os; atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY']))"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    command = [sys.executable, "-c", f"{code}; main(['--version'])"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == expected
