"""Every test starts with one thread and without the state that Accelerate keeps."""

from support.fixtures import one_thread, own_accelerate_state

__all__ = ["one_thread", "own_accelerate_state"]
