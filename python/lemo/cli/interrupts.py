"""Signals that end a command: raised as exceptions, so that whatever is under way stops in good order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
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
    waiting: list[tuple[threading.Timer, type[KeyboardInterrupt]]] = []

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not isinstance(error, KeyboardInterrupt):
            before(unraisable)
            return
        arm()
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        timer = threading.Timer(_AGAIN, signal.pthread_kill, (main, number))
        timer.daemon = True
        waiting[:] = [(timer, type(error))]
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
        if waiting and waiting[0][0].is_alive():
            raise waiting[0][1]  # the command was done before the signal came again
    finally:
        sys.unraisablehook = before
        for timer, _ in waiting:
            timer.cancel()
