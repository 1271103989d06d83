"""Signals that end a command: raised as exceptions, so that whatever is under way stops in good order."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# Seconds after which a signal that could not be raised is sent again.
_AGAIN = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems and `kill` send it: whatever Ctrl-C stops in good order, this stops in the same way."""


@contextlib.contextmanager
def interrupts_raise() -> Iterator[None]:
    """SIGTERM raises Terminated, and neither it nor Ctrl-C is lost. A second SIGTERM ends the process at once, wherever
    it hangs.

    Only in place of SIGTERM's default action, which would end the process silently: someone who ignores or handles it
    around `main` keeps doing so. Processes forked later, like those that read data, die of it as before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, ours = os.getpid(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:
            os.kill(os.getpid(), number)
        raise Terminated

    def arm() -> None:
        if ours:
            signal.signal(signal.SIGTERM, handle)

    arm()
    try:
        with _sent_again(arm):
            yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _sent_again(arm: Callable[[], None]) -> Iterator[None]:
    """Handlers of signals run between any two lines of Python, also those of a finalizer or of a weak reference's
    callback. Python cannot raise from there: it reports the exception and resumes, so that a run would train to its end
    after Ctrl-C. The signal is then sent again a moment later.

    arm: what makes SIGTERM raise once more.
    """
    before, main = sys.unraisablehook, threading.get_ident()
    waiting: list[type[KeyboardInterrupt]] = []

    def send() -> None:
        time.sleep(_AGAIN)
        with contextlib.suppress(IndexError):  # whoever takes it out raises it
            kind = waiting.pop()
            signal.pthread_kill(main, signal.SIGTERM if kind is Terminated else signal.SIGINT)

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            before(unraisable)
            return
        arm()
        waiting.append(type(unraisable.exc_value))
        # Not threading.Thread: the finalizer may have interrupted one of its methods, which holds a lock.
        _thread.start_new_thread(send, ())

    sys.unraisablehook = hook
    try:
        yield
        if waiting:
            raise waiting.pop()  # the command was done before the signal came again
    finally:
        sys.unraisablehook = before
        waiting.clear()
