"""The processes of one run, as `torchrun` or `accelerate launch` starts them: who writes, and how a failure ends all.

The first process (rank 0) alone writes the run folder and reports. A failure in one process must not leave the others
waiting for it: what can fail is done `together`, so that every process learns of it. Errors elsewhere end their own
process, and the launcher ends the rest.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # the command asks for `world_size` before it loads anything
    import numpy as np
    import torch

T = TypeVar("T")

# Of the messages between processes, not of gradients: the first process may write a checkpoint to a slow disk, or one
# may take longer to read the data. A process that died is noticed at once.
_PATIENCE = datetime.timedelta(days=1)


# Environment variables by which accelerate launch asks for an engine, and its name.
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


class AnotherProcessFailed(RuntimeError):
    """Another process of the run failed and reports why; this one ends with it."""


def world_size() -> int:
    """Processes that the launcher started, by its environment variable. Raises ValueError if that is not a number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"the environment variable WORLD_SIZE is {text!r}, expected the number of processes")
    return int(text)


def refuse_engines() -> None:
    """Raises ValueError if the launcher asks for a model that is divided among the processes."""
    for variable, name in _ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"{variable} is set: accelerate is configured for {name}, but lemo finetune keeps the whole model in "
                "every process (DistributedDataParallel). Launch it with torchrun or accelerate launch --multi_gpu; to "
                "train with FSDP2, write a script (see the guide to several GPUs)"
            )


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1
    # Messages travel through the CPU, so that waiting for one never waits for a GPU.
    _group: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Meets the other processes; `device` is the one this process trains on. Raises ValueError or RuntimeError."""
        import torch.distributed as distributed

        initialized = distributed.is_available() and distributed.is_initialized()
        expected = distributed.get_world_size() if initialized else world_size()
        refuse_engines()
        if expected == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")  # the Trainer asks the same object
        if state.num_processes != expected:
            raise RuntimeError(
                f"the launcher started {expected} processes, but accelerate sees {state.num_processes}; start the run "
                "with torchrun or accelerate launch, and use no accelerate state before it"
            )
        if device.type == "cuda" and state.device != device:
            raise ValueError(
                f"the model is on {device}, expected {state.device}, the GPU of this process (local rank "
                f"{state.local_process_index})"
            )
        group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes, group)

    def leave(self) -> None:
        """Takes leave of the other processes at the end of the program."""
        import torch

        if self.count > 1:
            torch.distributed.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.count == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over the processes, added in the order of their ranks."""
        total, *others = self.gather(values)
        for other in others:
            total = total + other
        return total

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns here, once it has succeeded in every process.

        If it fails anywhere, it fails everywhere: the first process in which it failed raises its own error, the others
        raise AnotherProcessFailed.
        """
        if self.count == 1:
            return action()
        result: Any = None
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        failures = self.gather(None if error is None else str(error) or type(error).__name__)
        for rank, text in enumerate(failures):
            if text is not None:
                if error is not None and rank == self.rank:
                    raise error
                raise AnotherProcessFailed(f"process {rank} of {self.count} failed: {text}") from error
        return result

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` returns in the first process, which alone runs it; the others wait. Fails as `together`."""
        result: Any = self.together(lambda: action() if self.first else None)
        return self.gather(result)[0]
