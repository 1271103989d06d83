"""Every test starts with one thread."""

from support.fixtures import one_thread

__all__ = ["one_thread"]
